"""Parts of PySyncObj that programs use: its constructor, read-only nodes, custom transports; and on_change."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pysyncobj")

from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, replicated
from pysyncobj.node import TCPNode
from pysyncobj.transport import TCPTransport

import fastsm
from fastsm.integrations.pysyncobj import Change, DumpPolicy, FastSyncObj, ReplicatedStateMachine
from support.cluster import free_ports
from support.twin_nodes import close_pipe, ticked_until


class Counting:
    """A replicated counter, for any base class."""

    total: int

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.total = 0

    @replicated
    def add(self, number: int) -> int:
        self.total += number
        return self.total


class FastCounting(Counting, FastSyncObj):
    pass


class StockCounting(Counting, SyncObj):
    pass


class Nodes:
    """Nodes that the test ticks in turns."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
        self.running: list[Any] = []

    def conf(self, own: str | None, number: int, **settings: Any) -> Any:
        least = 0.1 + 0.8 * number
        return SyncObjConf(**{
            "autoTick": False, "bindAddress": own, "appendEntriesUseBatch": False, "connectionRetryTime": 0.05,
            "raftMinTimeout": least, "raftMaxTimeout": least + 0.01, "appendEntriesPeriod": 0.02, **settings,
        })  # fmt: skip

    def start(self, kind: type[Any], number: int | None, *, members: int = 2, conf: Any = None, **options: Any) -> Any:
        """Start a member, by its number, or a read-only node (None)."""
        own = None if number is None else self.addresses[number]
        others = [address for address in self.addresses[:members] if address != own]
        settings = {"conf": self.conf(own, number or 0, **(conf or {})), **options}
        if not issubclass(kind, (FastSyncObj, SyncObj)) or kind is ReplicatedStateMachine:
            settings["directory"] = self.root / str(options.pop("name", number))
            settings.pop("name", None)
        self.running.append(kind(own, others, **settings))
        return self.running[-1]

    def stop(self, node: Any) -> None:
        self.running.remove(node)
        node.destroy()
        close_pipe(node)

    def end(self) -> None:
        for node in list(self.running):
            self.stop(node)

    def until(self, condition: Callable[[], object]) -> None:
        if not ticked_until(condition, lambda: self.running):
            raise AssertionError([getattr(node, "failure", None) for node in self.running])

    def ready(self) -> None:
        self.until(lambda: all(node.isReady() for node in self.running))

    def call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        told: list[Any] = []
        method(*arguments, callback=lambda *answer: told.append(answer))
        self.until(lambda: told)
        return told[0]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    made.end()


# ---- PySyncObj's constructor -----------------------------------------------------------------------------


def test_a_class_on_fastsms_base_keeps_its_state(nodes: Nodes, tmp_path: Path) -> None:
    """With journalFile the state is kept in a directory of that name; the caller's configuration is not changed."""
    conf = nodes.conf(nodes.addresses[0], 0, journalFile=str(tmp_path / "a.journal"), fullDumpFile=str(tmp_path / "a"))
    for total in (5, 10):
        node = FastCounting(nodes.addresses[0], [], conf)
        nodes.running.append(node)
        nodes.ready()
        assert nodes.call(node.add, 5) == (total, FAIL_REASON.SUCCESS)
        nodes.stop(node)
    assert conf.journalFile == str(tmp_path / "a.journal")
    assert [each.name for each in tmp_path.iterdir()] == ["a.journal.fastsm"]


def test_a_node_that_is_given_a_journal_goes_on_with_what_it_has(nodes: Nodes, tmp_path: Path) -> None:
    """A node made with a dump file alone keeps its state if a journal file is added, and if it is removed again."""
    dump = {"fullDumpFile": str(tmp_path / "a.dump")}
    for total, conf in ((5, dump), (10, {"journalFile": str(tmp_path / "a.journal"), **dump}), (15, dump)):
        node = nodes.start(FastCounting, 0, members=1, conf=conf)
        nodes.ready()
        assert nodes.call(node.add, 5) == (total, FAIL_REASON.SUCCESS)
        nodes.stop(node)
    assert [each.name for each in tmp_path.iterdir()] == ["a.dump.fastsm"]


def test_a_node_without_files_leaves_none(nodes: Nodes) -> None:
    """A node without files uses a temporary directory, and leaves nothing, as in PySyncObj."""
    node = nodes.start(FastCounting, 0, members=1)
    nodes.ready()
    assert nodes.call(node.add, 1) == (1, FAIL_REASON.SUCCESS)
    directory = node._fastsm_places.path
    assert os.path.isdir(directory)
    nodes.stop(node)
    assert not os.path.exists(directory)


def test_files_of_pysyncobjs_own_are_not_passed_over(nodes: Nodes, tmp_path: Path) -> None:
    """A node does not start if PySyncObj's own files are there, because it would begin empty."""
    journal = tmp_path / "a.journal"
    journal.write_bytes(b"PySyncObj")
    with pytest.raises(ValueError, match=r"a\.journal'.*not taken over"):
        nodes.start(FastCounting, 0, conf={"journalFile": str(journal)})
    journal.unlink()
    nodes.start(FastCounting, 0, members=1, conf={"journalFile": str(journal)})


def test_a_transport_that_is_made_already_is_refused(nodes: Nodes) -> None:
    """A transport object, and a transport class of another kind, are refused."""
    for options in ({"transport": object()}, {"transportClass": dict}):
        with pytest.raises(TypeError, match="transport"):
            nodes.start(FastCounting, 0, **options)


def test_own_transports_and_nodes_are_as_in_stock(nodes: Nodes) -> None:
    """A subclass of PySyncObj's transport is called as PySyncObj would call it; nodes are of the given class."""
    for kind in (StockCounting, FastCounting):
        seen: list[str] = []

        class Transport(TCPTransport):  # type: ignore[misc]
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                self.setOnUtilityMessageCallback("hello", lambda _, callback: callback("hello", None))

            def _connectIfNecessarySingle(self, node: Any, seen: list[str] = seen) -> bool:
                seen.append(type(node).__name__)
                return bool(super()._connectIfNecessarySingle(node))

            def _onNodeConnected(self, node: Any, seen: list[str] = seen) -> None:
                seen.append("connected")
                super()._onNodeConnected(node)

        class Address(TCPNode):  # type: ignore[misc]
            pass

        first = nodes.start(kind, 0, transportClass=Transport, nodeClass=Address)
        second = nodes.start(kind, 1, transportClass=Transport, nodeClass=Address)
        nodes.ready()
        assert nodes.call(second.add, 3) == (3, FAIL_REASON.SUCCESS)
        assert set(seen) == {"Address", "connected"}
        assert {type(first.selfNode), *(type(each) for each in second.otherNodes)} == {Address}
        nodes.end()


# ---- read-only nodes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [StockCounting, FastCounting])
def test_read_only_nodes_are_as_in_stock(nodes: Nodes, kind: type[Any]) -> None:
    """Read-only nodes follow, submit, survive a change of leader, do not count, and are forgotten after they end."""
    first, second = nodes.start(kind, 0), nodes.start(kind, 1)
    nodes.ready()
    assert nodes.call(first.add, 1) == (1, FAIL_REASON.SUCCESS)
    readers = [nodes.start(kind, None) for _ in range(2)]
    nodes.ready()
    nodes.until(lambda: all(each.total == 1 for each in readers))
    assert nodes.call(readers[0].add, 2) == (3, FAIL_REASON.SUCCESS)
    nodes.until(lambda: all(each.total == 3 for each in (first, second, *readers)))
    for member in (first, second):
        nodes.until(lambda member=member: len(member.readonlyNodes) == 2)
        status = member.getStatus()
        assert (status["readonly_nodes_count"], status["partner_nodes_count"]) == (2, 1)
    leader, other = (first, second) if first._isLeader() else (second, first)
    assert readers[0]._getLeader() == leader.selfNode
    assert (readers[0].selfNode, readers[0]._isLeader(), readers[0].hasQuorum) == (None, False, True)
    nodes.call(leader.transferLeadership)
    nodes.until(lambda: other._isLeader() and all(each._getLeader() == other.selfNode for each in readers))
    assert nodes.call(readers[1].add, 4) == (7, FAIL_REASON.SUCCESS)
    nodes.until(lambda: readers[0].total == 7)
    nodes.stop(readers[0])
    for member in (first, second):
        nodes.until(lambda member=member: len(member.readonlyNodes) == 1)
    nodes.stop(first)
    nodes.until(lambda: not readers[1].isNodeConnected(first.selfNode))
    refused: list[Any] = []
    readers[1].add(1, callback=lambda *answer: refused.append(answer))  # a reader is not a majority
    for _ in range(200):
        for node in nodes.running:
            node.doTick(0.001)
    assert (second.total, refused) == (7, [])


def test_a_read_only_node_comes_by_a_snapshot_and_comes_back(nodes: Nodes) -> None:
    """A read-only node keeps its state over a restart, and an empty one catches up by a leader's dump."""
    policy = DumpPolicy(trailing_entries=1)
    first = nodes.start(ReplicatedStateMachine, 0, members=1, policy=policy)
    nodes.ready()
    for number in range(30):
        nodes.call(first.put, b"%d" % number, b"value")
    first.forceLogCompaction()
    nodes.until(lambda: first.dumps)
    for installs in (1, 0, 1):
        reader = nodes.start(ReplicatedStateMachine, None, members=1, policy=policy, name="reader")
        nodes.ready()
        nodes.until(lambda reader=reader: reader.get(b"29"))
        assert (reader.installs, dict(reader.state_machine.items())) == (installs, dict(first.state_machine.items()))
        assert nodes.call(reader.put, b"29", b"value") == (True, FAIL_REASON.SUCCESS)
        reader.forceLogCompaction()
        nodes.until(lambda reader=reader: reader.dumps)
        nodes.stop(reader)
        if installs == 0:
            shutil.rmtree(nodes.root / "reader")
    nodes.until(lambda: not first.readonlyNodes)
    tables = {**vars(first), **vars(first._fastsm_transport)}
    assert [name for name, table in tables.items() if isinstance(table, dict) and any(
        getattr(key, "id", "").isdigit() for key in table)] == []  # fmt: skip


def test_a_read_only_node_without_fastsm_is_told_apart(nodes: Nodes) -> None:
    """A read-only node without fastsm is refused by name, and the cluster continues."""
    first = nodes.start(FastCounting, 0, members=1, conf={"connectionTimeout": 0.12})
    nodes.ready()
    nodes.start(StockCounting, None, members=1)
    nodes.until(lambda: "without fastsm" in first.refused.get("readonly", ""))
    assert nodes.call(first.add, 1) == (1, FAIL_REASON.SUCCESS)
    assert first.failure is None


# ---- changes and reads -----------------------------------------------------------------------------------


def test_changes_are_told_in_their_order(nodes: Nodes) -> None:
    """on_change gets every key that an entry changed, before the caller's callback, and nothing without effect."""
    seen: list[Any] = []
    told: list[int] = []
    node = nodes.start(ReplicatedStateMachine, 0, members=1, on_change=seen.extend)
    nodes.ready()
    first = node.raftLastApplied + 1
    commands = [
        fastsm.put(b"a", b"1"), fastsm.compare_and_swap(b"a", b"2", b"3"), fastsm.compare_and_swap(b"a", b"1", None),
        fastsm.batch([fastsm.put(b"b", b""), fastsm.delete(b"c"), fastsm.put(b"b", b"2")]), fastsm.noop(),
        fastsm.put_many([b"x", b"y"], [b"1", b"2"]),
    ]  # fmt: skip
    for command in commands:
        node.submit(command, callback=lambda *_: told.append(len(seen)))
    nodes.until(lambda: len(told) == len(commands))
    term = node.raftCurrentTerm
    assert seen == [Change(first + at, term, key, value) for at, key, value in (
        (0, b"a", b"1"), (2, b"a", None), (3, b"b", b""), (3, b"c", None), (3, b"b", b"2"), (5, b"x", b"1"),
        (5, b"y", b"2"))]  # fmt: skip
    assert told[0] >= 1
    assert told[-1] == len(seen)


def test_an_install_is_told_and_an_exception_is_not_the_nodes_end(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    """on_change gets None after an install, because all keys may have changed; an error that it raises is logged."""
    seen: list[Any] = []

    def on_change(changes: Any) -> None:
        seen.append(changes)
        raise ValueError("mine")

    policy = DumpPolicy(trailing_entries=1)
    first = nodes.start(ReplicatedStateMachine, 0, members=2, policy=policy, on_change=on_change)
    second = nodes.start(ReplicatedStateMachine, 1, members=2, policy=policy)
    nodes.ready()
    for number in range(20):
        nodes.call(second.put, b"%d" % number, b"value")
    assert [change.key for changes in seen for change in changes] == [b"%d" % number for number in range(20)]
    assert caplog.text.count("mine") >= 20
    for node in (first, second):
        node.forceLogCompaction()
        nodes.until(lambda node=node: node.dumps)
    nodes.stop(first)
    shutil.rmtree(nodes.root / "0")
    seen.clear()
    first = nodes.start(ReplicatedStateMachine, 0, members=2, policy=policy, on_change=on_change)
    nodes.until(lambda: first.installs and first.isReady())
    assert seen == [None]
    assert first.failure is None


def test_value_and_entry_come_in_one_read(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of value and entry is consistent, even if an entry that writes the key is applied in between."""
    node = nodes.start(ReplicatedStateMachine, 0, members=1)
    nodes.ready()
    assert node.get_modified(b"a") is None
    nodes.call(node.put, b"a", b"1")
    index, term = node.raftLastApplied, node.raftCurrentTerm
    assert node.get_modified(b"a") == (b"1", (index, term))
    machine = node.state_machine

    class Interrupted:
        """The state machine; another entry is applied before the second read of a call."""

        reads = 0

        def __getattr__(self, name: str) -> Any:
            Interrupted.reads += 1
            if Interrupted.reads == 2:
                machine.apply([(index + 1, term, fastsm.put(b"a", b"2"))])
            return getattr(machine, name)

    monkeypatch.setattr(node, "_fastsm_machine", Interrupted())
    assert node.get_modified(b"a") == (b"2", (index + 1, term))
    assert Interrupted.reads > 3
    monkeypatch.undo()


def test_a_node_that_is_not_ended_leaves_no_temporary_directory(nodes: Nodes) -> None:
    """A temporary directory is removed with the node or its process; a forked child leaves it to its parent."""
    node = FastCounting(None, [nodes.addresses[0]], nodes.conf(None, 0))
    directory = node._fastsm_places.path
    child = os.fork()
    if child == 0:
        node.destroy()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.path.isdir(directory)
    node.destroy()
    assert not os.path.exists(directory)
    node = FastCounting(None, [nodes.addresses[0]], nodes.conf(None, 0))
    directory = node._fastsm_places.path
    del node
    with pytest.warns(ResourceWarning):
        gc.collect()
    assert not os.path.exists(directory)


@pytest.mark.parametrize("kind", [StockCounting, FastCounting])
def test_changes_of_the_callers_configuration_take_effect(nodes: Nodes, tmp_path: Path, kind: type[Any]) -> None:
    """Changes of callbacks and times in the caller's configuration take effect even after the node was made."""
    conf = nodes.conf(nodes.addresses[0], 0, journalFile=str(tmp_path / f"{kind.__name__}.journal"))
    node = kind(nodes.addresses[0], [], conf)
    nodes.running.append(node)
    called: list[str] = []
    conf.onReady = lambda: called.append("ready")
    nodes.ready()
    assert called == ["ready"]
    conf.appendEntriesPeriod = 0.123
    assert node.conf.appendEntriesPeriod == 0.123
    node.conf.connectionRetryTime = 0.5
    assert conf.connectionRetryTime == 0.5
    assert conf.journalFile == str(tmp_path / f"{kind.__name__}.journal")


def test_nodes_stay_as_the_user_made_them(nodes: Nodes, tmp_path: Path) -> None:
    """Node objects that the user made are used with their attributes, also after a restart from a snapshot."""
    own = nodes.addresses[0]
    for _ in range(2):
        other = TCPNode(nodes.addresses[1], rack="b")
        conf = nodes.conf(own, 0, dynamicMembershipChange=True)
        node = ReplicatedStateMachine(own, [other], tmp_path / "node", conf=conf)
        nodes.running.append(node)
        peer = ReplicatedStateMachine(
            nodes.addresses[1], [own], tmp_path / "peer", conf=nodes.conf(nodes.addresses[1], 1))
        nodes.running.append(peer)
        nodes.ready()
        assert [each.rack for each in node.otherNodes] == ["b"]
        nodes.call(node.put, b"a", b"b")
        node.forceLogCompaction()
        nodes.until(lambda node=node: node.dumps)
        nodes.end()
