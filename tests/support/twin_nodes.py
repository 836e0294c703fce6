"""A cluster of PySyncObj nodes, stock ones or fastsm's, driven the same way; it records what user code sees."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pysyncobj import SyncObj, SyncObjConf, SyncObjConsumer, replicated
from pysyncobj.batteries import ReplDict

from fastsm.integrations.pysyncobj import DumpPolicy, ReplicatedStateMachine
from support.cluster import free_ports

COMPARED = ("state", "has_quorum", "partner_nodes_count", "last_applied", "commit_idx", "leader_commit_idx",
            "match_idx_count", "enabled_code_version")  # fmt: skip


def ticked_until(
    condition: Callable[[], object], nodes: Callable[[], Iterable[Any]], *, rounds: int = 8000
) -> bool:
    """Tick nodes in turns until a condition holds; return whether it did."""
    for _ in range(rounds):
        if condition():
            return True
        for node in list(nodes()):
            node.doTick(0.001)
    return False


def close_pipe(node: Any) -> None:
    """Close the pipe that PySyncObj leaves open when a node ends that the test ticked."""
    notifier = getattr(node, "_SyncObj__pipeNotifier", None)  # with appendEntriesUseBatch there is none
    for end in () if notifier is None else ("_PipeNotifier__pipeR", "_PipeNotifier__pipeW"):
        descriptor = getattr(notifier, end)
        if descriptor >= 0:  # otherwise a node of fastsm's has closed it
            setattr(notifier, end, -1)
            os.close(descriptor)


class Items(SyncObjConsumer):  # type: ignore[misc]
    """The appended items, each with the index that PySyncObj showed. Attributes set in a constructor are not dumped."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[Any] = []

    @replicated
    def append(self, item: str) -> int:
        self.items.append((self._syncObj.raftLastApplied + 1, item))
        return len(self.items)

    @replicated(ver=1)
    def append(self, item: str) -> Any:  # noqa: F811  # PySyncObj finds both
        self.items.append((self._syncObj.raftLastApplied + 1, item, "version 1"))
        return "version 1", len(self.items)

    def _serialize(self) -> Any:
        return list(self.items)

    def _deserialize(self, data: Any) -> None:
        self.items = list(data)


class Nodes:
    """Four places for nodes, three of which run, ticked in turns. By its timeout the lowest running number leads."""

    def __init__(self, root: Path, fast: bool) -> None:
        self.root, self.fast = root, fast
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(4)]
        self.members = [0, 1, 2]
        self.running: dict[int, Any] = {}
        self.items: dict[int, Items] = {}
        self.values: dict[int, ReplDict] = {}
        self.paused: set[int] = set()
        self.called: dict[int, list[Any]] = {}
        self.seen: list[Any] = []
        for number in self.members:
            self.start(number)
        self.settle()

    def start(self, number: int) -> None:
        least = 0.4 + 0.8 * number
        conf = SyncObjConf(
            autoTick=False, bindAddress=self.addresses[number], dynamicMembershipChange=True,
            appendEntriesUseBatch=False, connectionRetryTime=0.05, raftMinTimeout=least, raftMaxTimeout=least + 0.01,
            appendEntriesPeriod=0.02, connectionTimeout=5.0, commandsQueueSize=50,
        )  # fmt: skip
        own = self.addresses[number]
        others = [self.addresses[other] for other in self.members if other != number]
        self.items[number], self.values[number] = Items(), ReplDict()
        consumers = [self.items[number], self.values[number]]
        called = self.called[number] = []
        conf.onReady = lambda: called.append("ready")
        conf.onStateChanged = lambda old, new: called.append((old, new))
        conf.onCodeVersionChanged = lambda old, new: called.append(("version", old, new))
        directory = self.root / str(number)
        if self.fast:
            self.running[number] = ReplicatedStateMachine(
                own, others, directory, conf=conf, consumers=consumers,
                policy=DumpPolicy(trailing_entries=2))
        else:
            directory.mkdir(exist_ok=True)
            conf.useFork = False
            conf.journalFile, conf.fullDumpFile = str(directory / "journal"), str(directory / "dump")
            self.running[number] = SyncObj(own, others, conf, consumers=consumers)

    def stop(self, number: int) -> None:
        node = self.running.pop(number)
        node.destroy()
        close_pipe(node)

    def stop_if_running(self, number: int) -> None:
        if number in self.running:
            self.stop(number)

    def end(self) -> None:
        for number in list(self.running):
            self.stop(number)

    def until(self, condition: Callable[[], object]) -> None:
        if not ticked_until(condition, lambda: [
            node for number, node in self.running.items() if number not in self.paused
        ], rounds=6000):  # fmt: skip
            raise AssertionError([node.getStatus() for node in self.running.values()])

    def until_leader(self) -> None:
        """Tick until all members that run and are not paused follow one of them."""

        def found() -> bool:
            numbers = self.running.keys() & set(self.members) - self.paused
            nodes = [self.running[number] for number in numbers]
            leaders = {node._getLeader() for node in nodes}
            return len(leaders) == 1 and any(node._isLeader() and node.selfNode in leaders for node in nodes)

        self.until(found)

    def leader(self) -> Any:
        return next(node for node in self.running.values() if node._isLeader())

    def settled(self) -> bool:
        """Return whether all running members follow one leader, see a majority, and have applied the same entries."""
        members = [node for number, node in self.running.items() if number in self.members]
        leaders = {getattr(node._getLeader(), "id", None) for node in members}
        applied = {(node.raftLastApplied, node.raftCommitIndex, node._SyncObj__raftLog[-1][1]) for node in members}
        ready = all(node.isReady() and node.getStatus()["has_quorum"] for node in members)
        return leaders != {None} and len(leaders) == 1 and len(applied) == 1 and len(set(*applied)) == 1 and ready

    def settle(self) -> None:
        self.until(self.settled)
        leader = self.leader()
        self.until(lambda: self.settled() and all(
            leader._SyncObj__raftMatchIndex[node] == leader.raftLastApplied
            for node in leader.otherNodes if self.number(node) in self.running))  # fmt: skip
        self.note("settled", [
            (number, [node.getStatus()[name] for name in COMPARED if name != "match_idx_count" or node._isLeader()],
             sorted(self.number(other) for other in node.otherNodes), list(self.items[number].items),
             dict(self.values[number].items()), list(self.called[number]))
            for number, node in sorted(self.running.items()) if number in self.members
        ])  # fmt: skip

    def number(self, node: Any) -> int:
        return self.addresses.index(node.id)

    def note(self, *what: Any) -> None:
        self.seen.append(what)

    def call(self, what: str, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function, tick until its callback is called, and record the callback's arguments."""
        answers: list[Any] = []
        function(*arguments, callback=lambda *answer: answers.append(answer))
        self.until(lambda: answers)
        self.note(what, answers[0])

    # ---- steps -------------------------------------------------------------------------------------------

    def append(self, number: int, item: str) -> None:
        self.call(f"append at {number}", self.items[number].append, item)
        self.settle()

    def remove(self, number: int, *, alive: bool) -> None:
        if not alive:
            self.stop(number)
        self.call(f"remove {number}", self.leader().removeNodeFromCluster, self.addresses[number])
        self.members.remove(number)
        self.settle()

    def add(self, number: int) -> None:
        self.call(f"add {number}", self.leader().addNodeToCluster, self.addresses[number])
        self.members.append(number)

    def dump(self) -> None:
        for node in self.running.values():
            node.forceLogCompaction()
        for _ in range(30):
            for node in self.running.values():
                node.doTick(0.001)
        self.settle()

    def replace(self, number: int) -> None:
        """Remove a node, lose its disk, and add it again under the same address."""
        self.remove(number, alive=True)
        self.stop(number)
        shutil.rmtree(self.root / str(number))
        self.add(number)
        self.start(number)
        self.settle()


@contextmanager
def twins(root: Path) -> Iterator[Callable[[bool], Nodes]]:
    """Provide a function that makes a cluster of fastsm's nodes (True) or stock ones (False); end them all."""
    made: list[Nodes] = []

    def make(fast: bool) -> Nodes:
        directory = root / str(fast)
        directory.mkdir()
        made.append(Nodes(directory, fast))
        return made[-1]

    try:
        yield make
    finally:
        for nodes in made:
            nodes.end()
