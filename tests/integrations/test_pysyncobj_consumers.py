"""Consumers and attributes of a PySyncObj node; its threads, connections and configuration."""

from __future__ import annotations

import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pysyncobj")

from pysyncobj import FAIL_REASON, SyncObjConf, SyncObjConsumer, SyncObjException, replicated
from pysyncobj.batteries import ReplCounter, ReplDict, ReplLockManager
from pysyncobj.node import Node as PySyncObjNode

import fastsm
from fastsm.integrations.pysyncobj import (
    ConsumersChangedError,
    ReplicatedStateMachine,
    dumping,
)
from support.cluster import free_ports
from support.one_node import Answers, MakeNode, answer, nodes_at, threading_call, ticks


@pytest.fixture
def node_at(tmp_path: Path) -> Iterator[MakeNode]:
    """Provide a function that makes nodes of a cluster of one each, which the test ticks itself."""
    with nodes_at(tmp_path) as make:
        yield make


# ---- state outside of the state machine ---------------------------------------------------------------------


def test_attributes_of_a_node_without_replicated_methods_are_its_own(node_at: MakeNode) -> None:
    """Attributes of a node without replicated methods are not in dumps, and may be anything."""

    class Node(ReplicatedStateMachine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.lock, self.name = threading.Lock(), "mine"

    node = node_at(Node)
    ticks(node, node.isReady)
    assert node._fastsm_attributes() == {}
    node.put(b"a", b"b")
    node.forceLogCompaction()
    ticks(node, lambda: node.dumps)
    node._fastsm_restore(node._fastsm_attachment())
    assert node.name == "mine"


def test_replicated_attributes_that_cannot_travel_stop_the_node_at_its_start(node_at: MakeNode) -> None:
    """A class with replicated methods and an attribute that cannot be dumped fails at the start, with its name."""

    class Node(ReplicatedStateMachine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.before = threading.Lock()
            super().__init__(*arguments, **options)
            self.after = threading.Lock()

        @replicated
        def method(self) -> None: ...

    node = node_at(Node)
    ticks(node, lambda: node.failure)
    assert isinstance(node.failure, TypeError)
    assert "after" in str(node.failure)
    assert "before" not in str(node.failure).split("found")[1].split(";")[0]


def test_a_consumer_may_be_added_and_not_dropped(node_at: MakeNode) -> None:
    """A consumer may be added at the end, and begins empty; a missing or different one is refused at the start."""
    counter = ReplCounter()
    node = node_at(consumers=[counter])
    ticks(node, node.isReady)
    assert answer(node, counter.add, 5) == (5, FAIL_REASON.SUCCESS)
    node.forceLogCompaction()
    ticks(node, lambda: node.dumps)
    node.destroy()
    for consumers in ([], [ReplDict()], [ReplDict(), ReplCounter()]):
        with pytest.raises(ConsumersChangedError, match=r"ReplCounter.*add a consumer at the end"):
            node_at(consumers=consumers)
    counter, values = ReplCounter(), ReplDict()
    node = node_at(consumers=[counter, values])
    ticks(node, node.isReady)
    assert counter.get() == 5
    answer(node, values.set, "a", "b")
    assert values.get("a") == "b"


def test_a_method_added_in_the_middle_is_refused(node_at: MakeNode) -> None:
    """A release that changes the numbers by which entries name methods is refused; a method at the end is fine."""

    def node_class(*names: str) -> type[ReplicatedStateMachine]:
        class Node(ReplicatedStateMachine):
            for name in names:
                exec(f"@replicated\ndef {name}(self): ...")

        return Node

    node = node_at(node_class("beta"))
    ticks(node, node.isReady)
    node.put(b"a", b"b")
    node.forceLogCompaction()
    ticks(node, lambda: node.dumps)
    node.destroy()
    with pytest.raises(ConsumersChangedError, match="alpha"):
        node_at(node_class("alpha", "beta"))
    ticks(node := node_at(node_class("beta", "gamma")), node.isReady)


def test_a_lock_manager_is_a_consumer(node_at: MakeNode) -> None:
    """An object that has a consumer, like ReplLockManager, can be passed as a consumer."""
    locks = ReplLockManager(autoUnlockTime=10, selfID="one")
    try:
        node = node_at(consumers=[locks])
        ticks(node, node.isReady)
        answers = Answers()
        locks.tryAcquire("lock", callback=answers)
        ticks(node, lambda: answers)
        assert answers == [(True, FAIL_REASON.SUCCESS)]
        node.forceLogCompaction()
        ticks(node, lambda: node.dumps)
    finally:
        locks.destroy()


# ---- threads, connections, configuration ---------------------------------------------------------------------


def test_a_dump_waits_for_a_thread(node_at: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, a dump is deferred, and the node continues."""
    node = node_at()
    ticks(node, node.isReady)
    answer(node, node.put, b"a", b"b")
    with monkeypatch.context() as patch:
        patch.setattr(dumping.threading.Thread, "start", no_thread)
        node.forceLogCompaction()
        for _ in range(10):
            node.doTick(0)
        assert (node.failure, node.dumps) == (None, 0)
    node._fastsm_no_thread_before = 0.0
    ticks(node, lambda: node.dumps == 1)


def no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_the_end_of_the_thread_that_made_a_node_ends_the_node(node_at: MakeNode, tmp_path: Path) -> None:
    """If the thread that made a node ends, the node fails, pending calls are answered, and the directory is free."""
    made: list[Any] = []
    answers, failed = Answers(), threading.Event()

    def make() -> None:
        made.append(node_at(
            partners=("127.0.0.1:1",), conf={"autoTick": True, "raftMinTimeout": 0.4, "raftMaxTimeout": 1.4},
            on_failure=lambda error: failed.set()))
        made[0].put(b"a", b"b", callback=answers)

    threading_call(make)
    assert failed.wait(20)
    made[0]._SyncObj__thread.join(20)
    assert isinstance(made[0].failure, fastsm.NotRunningError)
    assert "has ended" in str(made[0].failure)
    assert answers == [(None, FAIL_REASON.UNKNOWN_OUTCOME)]
    fastsm.FastStateMachine(tmp_path / "node" / "state").close()


def test_an_address_that_cannot_be_bound_ends_the_node(node_at: MakeNode, tmp_path: Path) -> None:
    """If the address cannot be bound, failure is set and the directory is free."""
    other = node_at(name="other", conf={"autoTick": True, "raftMinTimeout": 0.4, "raftMaxTimeout": 1.4})
    other.waitBinded()
    node = node_at(conf={
        "autoTick": True, "bindAddress": other.selfNode.address, "maxBindRetries": 1, "raftMinTimeout": 0.4,
        "raftMaxTimeout": 1.4,
    })  # fmt: skip
    node._SyncObj__thread.join(20)
    assert node.failure is not None
    with pytest.raises(SyncObjException):
        node.waitBinded()
    fastsm.FastStateMachine(tmp_path / "node" / "state").close()


def test_a_node_that_is_dropped_after_destroy_is_ended_by_its_tick_thread(tmp_path: Path) -> None:
    """A node dropped right after destroy is still closed, although PySyncObj's thread only has a weak reference."""
    conf = SyncObjConf(autoTick=True, bindAddress=f"127.0.0.1:{free_ports(1)[0]}")
    node = ReplicatedStateMachine(conf.bindAddress, (), tmp_path / "node", conf=conf)
    thread, machine = node._SyncObj__thread, weakref.ref(node._fastsm_machine)
    node.destroy()
    del node
    gc.collect()
    thread.join()
    fastsm.FastStateMachine(tmp_path / "node" / "state").close()  # its lock is free
    gc.collect()
    assert machine() is None


def test_read_only_nodes_without_fastsm_are_refused_once(
    node_at: MakeNode, caplog: pytest.LogCaptureFixture
) -> None:
    """Read-only nodes without fastsm leave one log line, one entry in `refused` and no connection, however many try."""
    node = node_at(conf={"connectionTimeout": 0.04})
    transport = node._fastsm_transport
    for number in range(20):
        reader, connection = PySyncObjNode(str(number)), FakeConnection()
        connection.on_end = lambda reader=reader: transport._onReadonlyNodeDisconnected(reader)
        transport._connections[reader] = connection
        transport._post = lambda *_: None
        transport._onReadonlyNodeConnected(reader)
        ticks(node, lambda: not transport._connections)
    assert list(transport.refused) == ["readonly"]
    assert (node.readonlyNodes, transport._silent) == (set(), {})
    assert caplog.text.count("without fastsm") == 1


class FakeConnection:
    on_end: Callable[[], None]

    def disconnect(self) -> None:
        self.on_end()


# ---- entries that this node cannot apply ------------------------------------------------------------------


class Calls(SyncObjConsumer):  # type: ignore[misc]
    """A consumer whose methods are called by number."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Any] = []

    @replicated
    def take(self, value: Any) -> int:
        self.taken.append(value)
        return len(self.taken)

    @replicated
    def check(self, command: bytes) -> None:
        fastsm.check(command)


class Passing:
    """A value of a class that a release may not have."""


@pytest.mark.parametrize("lacks", ["method", "class", "module"])
def test_an_entry_that_this_node_cannot_call_stops_it(
    node_at: MakeNode, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    """A node stops at an entry whose method, class or module it lacks, because skipping it would diverge."""
    calls = Calls()
    node = node_at(consumers=[calls])
    ticks(node, node.isReady)
    assert answer(node, calls.take, 1) == (1, FAIL_REASON.SUCCESS)
    if lacks == "method":
        node._applyCommand(pickle.dumps((77, (1,)), 2), None, 0)  # as a node of a later release would call it
    else:
        calls.take(Passing())
        monkeypatch.delattr(sys.modules[__name__], "Passing")
        if lacks == "module":
            monkeypatch.setitem(sys.modules, __name__, None)
    ticks(node, lambda: node.failure)
    expected = ImportError if lacks == "module" else fastsm.UnknownCommandError
    assert isinstance(node.failure, expected), node.failure
    assert calls.taken == [1]
    node.destroy()
    if lacks != "method":  # with the class the node continues
        monkeypatch.undo()
        calls = Calls()
        node = node_at(consumers=[calls])
        ticks(node, lambda: len(calls.taken) == 2 and node.isReady())


def test_entries_that_no_node_can_read_are_skipped(node_at: MakeNode) -> None:
    """Invalid pickles, objects that cannot be unpickled and methods that raise are skipped on every replica."""
    calls = Calls()
    node = node_at(consumers=[calls])
    ticks(node, node.isReady)
    for content in (b"", b"nonsense", pickle.dumps((0,), 2), pickle.dumps(([], ()), 2), pickle.dumps(Unmakeable(1), 2)):
        answers = Answers()
        node._applyCommand(content, answers, 0)
        ticks(node, lambda answers=answers: answers)
        assert answers == [(None, FAIL_REASON.UNKNOWN_OUTCOME)]
    assert answer(node, calls.check, b"nonsense") == (None, FAIL_REASON.UNKNOWN_OUTCOME)
    assert answer(node, calls.check, fastsm.noop()) == (None, FAIL_REASON.SUCCESS)
    assert answer(node, calls.take, 1) == (1, FAIL_REASON.SUCCESS)


class Unmakeable(Exception):
    def __init__(self, one: int, other: int = 2) -> None:
        super().__init__(one, other, 3)


def test_a_consumer_that_could_never_be_in_a_snapshot_is_refused(node_at: MakeNode, tmp_path: Path) -> None:
    """A consumer with an attribute that cannot be in a snapshot is refused at the start, before anything is made."""

    class Locked(SyncObjConsumer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.own = threading.Lock()
            super().__init__()
            self.shared = threading.Lock()

    with pytest.raises(TypeError, match=r"Locked.*found shared \("):
        node_at(consumers=[Locked()])
    assert not (tmp_path / "node").exists()

    class OwnWay(Locked):
        def _serialize(self) -> int:
            return 1

    node = node_at(consumers=[OwnWay()])
    ticks(node, node.isReady)
