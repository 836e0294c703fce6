"""Nodes that are removed, added again and replaced, next to a stock PySyncObj cluster that is treated the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pysyncobj")

from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, SyncObjConsumer, replicated

from fastsm.integrations.pysyncobj import DumpPolicy, ReplicatedStateMachine
from support.cluster import free_ports

# PySyncObj's own journal leaves a file to the collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

COMPARED = ("state", "has_quorum", "partner_nodes_count", "last_applied", "commit_idx", "leader_commit_idx",
            "match_idx_count", "enabled_code_version")  # fmt: skip


class Items(SyncObjConsumer):  # type: ignore[misc]
    """What was appended, each with the index that PySyncObj showed. What a constructor sets is not in a dump."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[Any] = []

    @replicated
    def append(self, item: str) -> int:
        self.items.append((self._syncObj.raftLastApplied + 1, item))
        return len(self.items)

    def _serialize(self) -> Any:
        return list(self.items)

    def _deserialize(self, data: Any) -> None:
        self.items = list(data)


class Nodes:
    """Four places for nodes, three of which run; ticked in turns by the test. The lowest number that runs leads."""

    def __init__(self, root: Path, fast: bool) -> None:
        self.root, self.fast = root, fast
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(4)]
        self.members = [0, 1, 2]
        self.running: dict[int, Any] = {}
        self.items: dict[int, Items] = {}
        self.seen: list[Any] = []
        for number in self.members:
            self.start(number)
        self.settle()

    def start(self, number: int) -> None:
        least = 0.4 + 0.8 * number
        conf = SyncObjConf(
            autoTick=False, bindAddress=self.addresses[number], dynamicMembershipChange=True,
            appendEntriesUseBatch=False, connectionRetryTime=0.05, raftMinTimeout=least, raftMaxTimeout=least + 0.01,
            appendEntriesPeriod=0.02, connectionTimeout=5.0,
        )  # fmt: skip
        own = self.addresses[number]
        others = [self.addresses[other] for other in self.members if other != number]
        self.items[number] = Items()
        directory = self.root / str(number)
        if self.fast:
            self.running[number] = ReplicatedStateMachine(
                own, others, directory, conf=conf, consumers=[self.items[number]],
                policy=DumpPolicy(trailing_entries=2))
        else:
            directory.mkdir(exist_ok=True)
            conf.useFork = False
            conf.journalFile, conf.fullDumpFile = str(directory / "journal"), str(directory / "dump")
            self.running[number] = SyncObj(own, others, conf, consumers=[self.items[number]])

    def stop(self, number: int) -> None:
        self.running.pop(number).destroy()

    def end(self) -> None:
        for number in list(self.running):
            self.stop(number)

    def until(self, condition: Callable[[], object]) -> None:
        for _ in range(6000):
            if condition():
                return
            for node in list(self.running.values()):
                node.doTick(0.001)
        raise AssertionError([node.getStatus() for node in self.running.values()])

    def leader(self) -> Any:
        return next(node for node in self.running.values() if node._isLeader())

    def settled(self) -> bool:
        """Whether all members that run follow one leader and have applied the same."""
        members = [node for number, node in self.running.items() if number in self.members]
        leaders = {getattr(node._getLeader(), "id", None) for node in members}
        applied = {(node.raftLastApplied, node.raftCommitIndex, node._SyncObj__raftLog[-1][1]) for node in members}
        ready = all(node.isReady() for node in members)
        return leaders != {None} and len(leaders) == 1 and len(applied) == 1 and len(set(*applied)) == 1 and ready

    def settle(self) -> None:
        self.until(self.settled)
        leader = self.leader()
        self.until(lambda: self.settled() and all(
            leader._SyncObj__raftMatchIndex[node] == leader.raftLastApplied
            for node in leader.otherNodes if self.number(node) in self.running))  # fmt: skip
        self.note("settled", [
            (number, [node.getStatus()[name] for name in COMPARED if name != "match_idx_count" or node._isLeader()],
             sorted(self.number(other) for other in node.otherNodes), self.items[number].items)
            for number, node in sorted(self.running.items()) if number in self.members
        ])  # fmt: skip

    def number(self, node: Any) -> int:
        return self.addresses.index(node.id)

    def note(self, *what: Any) -> None:
        self.seen.append(what)

    def call(self, what: str, function: Callable[..., object], *arguments: Any) -> None:
        """Calls, ticks until its callback was called, and notes what that was given."""
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
        """Removed, its disk lost, added again under the same address."""
        self.remove(number, alive=True)
        self.stop(number)
        shutil.rmtree(self.root / str(number))
        self.add(number)
        self.start(number)
        self.settle()


def removed_alive(nodes: Nodes) -> None:
    nodes.append(1, "a")
    nodes.remove(2, alive=True)
    nodes.dump()
    nodes.append(1, "b")


def removed_and_added_again(nodes: Nodes) -> None:
    """Each side in turn is the one that connects."""
    for number in (2, 1):
        nodes.append(0, f"before {number}")
        nodes.remove(number, alive=True)
        nodes.stop(number)
        nodes.add(number)
        nodes.start(number)
        nodes.settle()
        nodes.append(number, f"after {number}")
    nodes.dump()


def replaced(nodes: Nodes) -> None:
    nodes.append(0, "a")
    nodes.dump()
    nodes.replace(2)
    nodes.append(2, "b")
    nodes.replace(1)
    nodes.append(1, "c")
    nodes.dump()


def one_more_and_a_dead_one_less(nodes: Nodes) -> None:
    nodes.append(2, "a")
    nodes.add(3)
    nodes.start(3)
    nodes.settle()
    nodes.append(3, "b")
    nodes.remove(1, alive=False)
    nodes.append(3, "c")
    nodes.dump()
    nodes.stop(0)
    nodes.until(lambda: any(node._isLeader() for node in nodes.running.values()))
    nodes.settle()
    nodes.append(3, "d")


def what_is_denied(nodes: Nodes) -> None:
    leader = nodes.leader()
    nodes.call("add a member", leader.addNodeToCluster, nodes.addresses[1])
    nodes.call("remove a stranger", leader.removeNodeFromCluster, nodes.addresses[3])
    nodes.call("remove the leader itself", leader.removeNodeFromCluster, leader.selfNode)
    nodes.call("transfer at a follower", nodes.running[1].transferLeadership)
    nodes.call("transfer to a stranger", leader.transferLeadership, nodes.addresses[3])
    nodes.settle()
    nodes.append(0, "a")


STORIES = [removed_alive, removed_and_added_again, replaced, one_more_and_a_dead_one_less, what_is_denied]


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[Callable[[bool], Nodes]]:
    made: list[Nodes] = []

    def make(fast: bool) -> Nodes:
        root = tmp_path / str(fast)
        root.mkdir()
        made.append(Nodes(root, fast))
        return made[-1]

    yield make
    for nodes in made:
        nodes.end()


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_membership_changes_are_seen_as_in_stock(
    clusters: Callable[[bool], Nodes], story: Callable[[Nodes], None]
) -> None:
    """Answers, indexes shown to methods, members, status, contents: after each step what stock PySyncObj shows."""
    seen = []
    for fast in (False, True):
        nodes = clusters(fast)
        story(nodes)
        seen.append(nodes.seen)
        if fast:
            assert [node.failure for node in nodes.running.values()] == [None] * len(nodes.running)
    stock, fastsm = seen
    for step, (there, here) in enumerate(zip(stock, fastsm, strict=True)):
        assert here == there, step
    assert any(answer[1] == FAIL_REASON.SUCCESS for what, answer in stock if what != "settled")


def test_a_node_that_was_removed_is_not_connected(clusters: Callable[[bool], Nodes]) -> None:
    """No table keyed by node has it any more, on the leader or on a follower."""
    nodes = clusters(True)
    nodes.append(0, "a")
    gone = next(node for node in nodes.leader().otherNodes if nodes.number(node) == 2)
    nodes.remove(2, alive=True)
    for number in (0, 1):
        node = nodes.running[number]
        assert not node.isNodeConnected(gone)
        transport = node._fastsm_transport
        tables = {
            **{name: value for name, value in vars(node).items() if name != "_SyncObj__lastResponseTime"},
            **vars(transport),
        }
        keeps = [name for name, table in tables.items() if isinstance(table, (dict, set)) and gone in table]
        assert keeps == []
