"""A cluster in one process, on disks that lose power, with a simulated network and clock.

Nodes tick in a random order; messages arrive in order on each connection, at random times. Each node's directories
have platters of their own (`power.py`). A `Moment` is a state of all disks at the same time, with all promises so far.
"""

from __future__ import annotations

import pickle
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pysyncobj.monotonic
import pysyncobj.syncobj
import pytest
from pysyncobj import FAIL_REASON, SyncObjConf
from pysyncobj.transport import Transport

import fastsm
from fastsm.disk.files import Directory
from fastsm.integrations.pysyncobj import DumpPolicy, ReplicatedStateMachine, dumping
from fastsm.integrations.pysyncobj.transport import FastTransport
from fastsm.types import LogId
from support.power import Platter, Point, QuietDirectory

PARTS = ("state", "journal", "snapshot", "incoming")
ADDRESSES = ("10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1")


class Clock:
    """PySyncObj's clock, which a test advances. ``time.monotonic`` returns other values: it is an hour ahead."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr(time, "monotonic", lambda: self.now + 3600)
        patch.setattr(pysyncobj.monotonic, "monotonic", self)
        patch.setattr(pysyncobj.syncobj, "monotonicTime", self)
        patch.setattr(dumping, "Work", WorkAtOnce)

    def __call__(self) -> float:
        return self.now


class WorkAtOnce:
    """Stands in for a thread: its work is done as soon as it is created."""

    done = True

    def __init__(self, name: str, function: Callable[[], Any]) -> None:
        self._error: BaseException | None = None
        self._value = None
        try:
            self._value = function()
        except Exception as error:
            self._error = error

    def finish(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


class Promises:
    """What a node has told others: it must hold after a power loss, too."""

    def __init__(self) -> None:
        self.term = 0
        self.vote: tuple[int, str] | None = None
        self.entries: dict[int, int] = {}  # index: term

    def copy(self) -> Promises:
        other = Promises()
        other.term, other.vote, other.entries = self.term, self.vote, dict(self.entries)
        return other


class SimulatedTransport(FastTransport):
    """A transport that sends through a `Network`, and holds and releases messages as the real one does."""

    network: Network

    def __init__(self, node: Any, own: Any, others: Any) -> None:
        Transport.__init__(self, node, own, others)
        self.holding = False
        self.refused = {}
        self._held: list[Any] = []
        self._gathered = self._ended = None
        self._node, self._own, self._others = node, own, list(others)
        self._ready = True
        self.network.transports[own.id] = self

    def _onNodeConnected(self, node: Any) -> None:
        Transport._onNodeConnected(self, node)

    def _onNodeDisconnected(self, node: Any) -> None:
        Transport._onNodeDisconnected(self, node)

    def _onMessageReceived(self, node: Any, message: Any) -> None:
        self._pass_on(node, message)

    def reaches(self, node: Any) -> bool:
        return node.id in self.network.transports

    def backlog(self, node: Any) -> int:
        return 0

    def disconnect(self, node: Any) -> None:
        raise AssertionError(f"a message of {node} made no sense")

    def _post(self, node: Any, message: dict[str, Any]) -> None:
        self.network.note_promise(self._node, self._own.id, message)
        self.network.links[self._own.id, node.id].append(pickle.dumps(message))

    def destroy(self) -> None:
        self.network.transports.pop(self._own.id, None)


class Network:
    """The links between nodes, and the promises that each node has sent on them."""

    def __init__(self) -> None:
        self.transports: dict[str, SimulatedTransport] = {}
        self.links: dict[tuple[str, str], deque[bytes]] = defaultdict(deque)
        self.promises: dict[str, Promises] = defaultdict(Promises)

    def note_promise(self, node: Any, own: str, message: dict[str, Any]) -> None:
        promises = self.promises[own]
        if message["type"] in ("request_vote", "response_vote", "next_node_idx"):
            promises.term = max(promises.term, message["term"])
        if message["type"] in ("request_vote", "response_vote"):
            promises.vote = (message["term"], node.journal.vote)
        if message["type"] == "next_node_idx" and message["success"]:
            last = message["next_node_idx"] - 1
            known = max(promises.entries, default=0)
            for index in range(min(known + 1, last), last + 1):
                term = node.journal.term_at(index)
                if term is not None:
                    promises.entries[index] = term

    def deliver(self, rng: random.Random) -> None:
        """Deliver some of the messages in flight."""
        links = [link for link, queued in sorted(self.links.items()) if queued]
        rng.shuffle(links)
        for source, target in links:
            for _ in range(rng.randrange(4)):
                queued = self.links[source, target]
                if queued:
                    self._deliver_one(source, target, queued.popleft())

    def _deliver_one(self, source: str, target: str, message: bytes) -> None:
        transport = self.transports.get(target)
        if transport is not None and source in self.transports:
            sender = next(node for node in transport._others if node.id == source)
            transport._onMessageReceived(sender, pickle.loads(message))


class Moment:
    """All disks at the same time, and what must hold after all of them lose power."""

    def __init__(self, cluster: SimulatedCluster, where: str) -> None:
        self.where = where
        self.points = {
            address: {part: Point(platter, where) for part, platter in platters.items()}
            for address, platters in cluster.platters.items()
        }
        self.promises = {address: cluster.network.promises[address].copy() for address in ADDRESSES}
        self.acknowledged = dict(cluster.acknowledged)

    def build(self, root: Path, rng: random.Random, lost: tuple[str, ...] = ADDRESSES) -> None:
        """Make the directories as they are left if the nodes `lost` lose power and the others are killed."""
        for number, address in enumerate(ADDRESSES):
            (root / f"node-{number}").mkdir(parents=True, exist_ok=True)
            for part, point in self.points[address].items():
                drawn = point.draw(rng) if address in lost else point.killed()
                drawn.build(root / f"node-{number}" / part)


def routed(state: type[Directory], snapshot: type[Directory]) -> type[Directory]:
    """Return a seam that sends snapshots to a platter of their own: the machine writes them by its own seam."""

    def new(cls: type[Directory], path: Any, **options: Any) -> Directory:
        if Path(path).name == "snapshot":
            return snapshot(path, **options)
        return object.__new__(cls)

    return type("Routed", (state,), {"__new__": new})


class SimulatedCluster:
    """Three nodes in ``root``. ``acknowledged`` maps a key to its value and the entry that wrote it."""

    def __init__(
        self, root: Path, clock: Clock, rng: random.Random, *, durable: bool = True, watched: bool = True,
        node: type[ReplicatedStateMachine] = ReplicatedStateMachine, share: float = 0.02, piece_bytes: int = 256 << 10,
    ) -> None:  # fmt: skip
        self.root, self.clock, self.random, self.share = root, clock, rng, share
        self.network = Network()
        self.moments: list[Moment] = []
        self.acknowledged: dict[bytes, tuple[bytes, LogId]] = {}
        self.platters: dict[str, dict[str, Platter]] = {address: {} for address in ADDRESSES}
        self.policy = DumpPolicy(
            journal_bytes=20_000, ratio=0, least_seconds=1.0, trailing_entries=5, piece_bytes=piece_bytes)
        self.watched, self.durable, self.node_class = watched, durable, node
        self.nodes: dict[str, ReplicatedStateMachine] = {}
        self._number = 0
        for address in ADDRESSES:
            self.nodes[address] = self._make(address)
        for transport_of in self.network.transports.values():
            for other in transport_of._others:
                transport_of._onNodeConnected(other)

    def _make(self, address: str) -> ReplicatedStateMachine:
        conf = SyncObjConf(
            autoTick=False, appendEntriesUseBatch=False, appendEntriesPeriod=0.1, raftMinTimeout=0.4,
            raftMaxTimeout=1.4, commandsWaitLeader=False,
        )  # fmt: skip

        def files(part: str) -> Any:
            if not self.watched:
                return QuietDirectory
            platters = self.platters[address]
            if part not in platters:
                platters[part] = Platter(self._note)
            return routed(platters["state"].files, files("snapshot")) if part == "state" else platters[part].files

        return self.node_class(
            address, [other for other in ADDRESSES if other != address], self.directory(address), conf=conf,
            durable=self.durable, policy=self.policy, _files=files, verify_on_open="off", auto_compact=False,
            transportClass=type("Transport", (SimulatedTransport,), {"network": self.network}),
        )  # fmt: skip

    def directory(self, address: str) -> Path:
        return self.root / f"node-{ADDRESSES.index(address)}"

    def _note(self, where: str) -> None:
        if len(self.platters[ADDRESSES[-1]]) >= 2 and self.random.random() < self.share:
            self.moments.append(Moment(self, where))

    # ---- life ------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Run some ticks and deliver some messages."""
        self.clock.now += self.random.choice((0.001, 0.005, 0.02))
        order = list(self.nodes.values())
        self.random.shuffle(order)
        for node in order:
            if self.random.random() < 0.7:
                node.doTick(0)
                assert node.failure is None, node.failure
            self.network.deliver(self.random)

    def write(self) -> None:
        """Submit a command at a random node; record it when it is acknowledged."""
        self._number += 1
        key, value = b"key-%d" % self._number, self.random.randbytes(self.random.choice((10, 200, 3000)))
        node = self.random.choice(list(self.nodes.values()))

        def answered(result: Any, reason: Any) -> None:
            if reason == FAIL_REASON.SUCCESS:
                assert result is True
                entry = node.state_machine.modified(key)
                assert entry is not None
                self.acknowledged[key] = (value, entry)
                if self.watched and self.random.random() < 0.05:
                    self.moments.append(Moment(self, "after an acknowledgement"))

        node.compare_and_swap(key, None, value, callback=answered)

    def silence(self, address: str) -> None:
        """Lose a node's messages, and those to it, until `hear`."""
        self._silent = self.network.transports.pop(address)

    def hear(self, address: str) -> None:
        self.network.transports[address] = self._silent

    def disconnect(self, address: str) -> None:
        """End a node's connections: all sides notice, and messages in flight are lost."""
        for one, other in self._pairs(address):
            one._onNodeDisconnected(other)
        for link in [link for link in self.network.links if address in link]:
            del self.network.links[link]
        del self.network.transports[address]

    def connect(self, address: str) -> None:
        self.network.transports[address] = self.nodes[address]._fastsm_transport
        for one, other in self._pairs(address):
            one._onNodeConnected(other)

    def _pairs(self, address: str) -> Iterator[tuple[SimulatedTransport, Any]]:
        """Yield the two sides of each connection of a node."""
        own = self.network.transports[address]
        for node in own._others:
            other = self.network.transports.get(node.id)
            if other is not None:
                yield own, node
                yield other, own._own

    def restart(self, address: str) -> None:
        """Kill a node's process, and start it again before the others' next tick."""
        self.disconnect(address)
        kill(self.nodes[address])
        self.nodes[address] = self._make(address)
        self.connect(address)

    def leader(self) -> str | None:
        return next((address for address, node in self.nodes.items() if node._isLeader()), None)

    def settle(self) -> None:
        """Run steps until there is a leader and all nodes have applied the same entries."""
        for _ in range(4000):
            self.step()
            applied = {node.state_machine.last_applied() for node in self.nodes.values()}
            ends = {node.journal.last_index for node in self.nodes.values()}
            leads = [node for node in self.nodes.values() if node._isLeader()]
            equal = len(applied) == 1 and ends == {next(iter(applied)).index}
            if equal and len(leads) == 1 and leads[0].journal[-1][2] == leads[0].raftCurrentTerm:
                return
        raise AssertionError([node.getStatus() for node in self.nodes.values()])

    def end(self) -> None:
        """Kill all processes."""
        for node in self.nodes.values():
            kill(node)
        for platters in self.platters.values():
            for platter in platters.values():
                platter.close()


def kill(node: ReplicatedStateMachine) -> None:
    """End a node's process: files and locks are released, nothing else happens."""
    node.journal.abandon()
    node.state_machine._worker.abandon()
    node.state_machine._release()
    node._fastsm_end_dumping()
    node._fastsm_end_waking()


def state_checksum(machine: fastsm.FastStateMachine, directory: Path) -> bytes:
    """Return the checksum of a machine's state as of its last applied entry."""
    machine.write_snapshot(directory)
    with fastsm.open_snapshot(directory) as snapshot:
        return snapshot.state_checksum
