"""User code of a PySyncObj node: its names, callbacks that raise, answers, limits, and the end of a node."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pysyncobj")

from pysyncobj import FAIL_REASON, SyncObjConsumer, SyncObjException, replicated
from pysyncobj.batteries import ReplCounter, ReplDict

import fastsm
from fastsm.integrations.pysyncobj import (
    ReplicatedStateMachine,
    SubmitError,
    applying,
)
from support.one_node import Answers, MakeNode, answer, nodes_at, threading_call, ticks


@pytest.fixture
def node_at(tmp_path: Path) -> Iterator[MakeNode]:
    """Provide a function that makes nodes of a cluster of one each, which the test ticks itself."""
    with nodes_at(tmp_path) as make:
        yield make


# ---- names -----------------------------------------------------------------------------------------------


def test_no_plain_name_of_a_subclass_can_collide() -> None:
    """Every private name of the node's classes is PySyncObj's own or begins with _fastsm_."""
    from pysyncobj import SyncObj  # noqa: PLC0415

    allowed = set(dir(SyncObj))
    for owner in ReplicatedStateMachine.__mro__:
        if owner in (SyncObj, object):
            continue
        private = [name for name in vars(owner) if name.startswith("_") and not name.startswith(("__", "_SyncObj__"))]
        assert [n for n in private if n not in allowed and not n.startswith("_fastsm_")] == [], owner


def test_attributes_of_a_node_begin_with_a_prefix(node_at: MakeNode) -> None:
    """Every attribute that the constructor sets is PySyncObj's own or begins with _fastsm_."""
    stock = {"_poller", "_methodToID", "_idToMethod", "_idToConsumer"}
    names = {name for name in vars(node_at()) if not name.startswith(("_SyncObj__", "_fastsm_"))}
    assert names <= stock


def test_a_subclass_may_use_the_names_of_the_nodes_parts(node_at: MakeNode) -> None:
    """Attributes and replicated methods with names of the node's parts, or with Patroni's names, do no harm."""

    class Node(ReplicatedStateMachine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.expired: list[str] = []
            super().__init__(*arguments, **options)
            self.machine = self.policy = self.places = self.journal = "mine"
            self._pending = self._failure = self._transport = self._dump = "mine"

        @replicated
        def _expire(self, key: str) -> int:
            self.expired.append(key)
            return len(self.expired)

        @replicated
        def _fail(self) -> str:
            return "mine"

    node = node_at(Node)
    ticks(node, node.isReady)
    assert answer(node, node._expire, "a") == (1, FAIL_REASON.SUCCESS)
    assert answer(node, node._fail) == ("mine", FAIL_REASON.SUCCESS)
    assert answer(node, node.put, b"a", b"b") == (True, FAIL_REASON.SUCCESS)
    before = node.raftLastApplied
    for _ in range(50):
        node.doTick(0)
    node.forceLogCompaction()
    ticks(node, lambda: node.dumps == 1)
    assert (node.raftLastApplied, node.expired, node.failure) == (before, ["a"], None)


class Poor(ReplicatedStateMachine):
    """A node whose replicated method raises an error that is not the entry's fault."""

    trouble: Exception | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.items: list[str] = []

    @replicated
    def append(self, item: str) -> int:
        if Poor.trouble is not None:
            raise Poor.trouble
        self.items.append(item)
        return len(self.items)


TROUBLES = [MemoryError(), OSError(28, "full"), ImportError("gone"), SystemError(), RecursionError()]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda each: type(each).__name__)
def test_trouble_of_one_replica_is_not_passed_over(
    node_at: MakeNode, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    """An error of one replica's environment stops the node; after a restart the entry is applied."""
    node = node_at(Poor)
    ticks(node, node.isReady)
    assert answer(node, node.append, "a") == (1, FAIL_REASON.SUCCESS)
    monkeypatch.setattr(Poor, "trouble", trouble)
    assert answer(node, node.append, "b") == (None, FAIL_REASON.UNKNOWN_OUTCOME)
    assert node.failure is trouble
    for _ in range(2):
        monkeypatch.setattr(Poor, "trouble", None)
        node = node_at(Poor)
        ticks(node, node.isReady)
        assert (node.items, node.failure) == (["a", "b"], None)
        node.destroy()


# ---- the state that user code sees ------------------------------------------------------------------------


class Marks(SyncObjConsumer):  # type: ignore[misc]
    """A consumer that records the index that PySyncObj shows while a method runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    @replicated
    def mark(self) -> int:
        self.seen.append(self._syncObj.raftLastApplied + 1)
        return self.seen[-1]


def test_methods_and_callbacks_see_their_own_index(node_at: MakeNode) -> None:
    """Methods and callbacks see raftLastApplied as one less than their index, even in a backlog and after a restart."""
    marks, order = Marks(), []
    node = node_at(consumers=[marks])
    ticks(node, node.isReady)
    first = node.raftLastApplied + 1
    for number in range(40):  # all in flight at the same time
        def told(result: Any, reason: Any, number: int = number) -> None:
            order.append((number, node.raftLastApplied + 1, result))
        if number % 3:
            node.put(b"key", b"value", callback=told)
        else:
            marks.mark(callback=told)
    ticks(node, lambda: len(order) == 40)
    assert order == [(n, first + n, True if n % 3 else first + n) for n in range(40)]
    seen = [first + n for n in range(0, 40, 3)]
    assert marks.seen == seen
    node.destroy()
    marks = Marks()
    node = node_at(consumers=[marks])
    ticks(node, node.isReady)
    assert marks.seen == seen


def test_a_method_meets_all_before_it_and_nothing_after_it(node_at: MakeNode) -> None:
    """A method sees the state of the entries before it, whose callbacks were called, and no later entry."""
    told: list[bytes] = []

    class Node(ReplicatedStateMachine):
        @replicated
        def look(self) -> Any:
            return self.get(b"key"), self.state_machine.last_applied().index - self.raftLastApplied, list(told)

    node = node_at(Node)
    ticks(node, node.isReady)
    answers = Answers()
    for number in range(10):
        node.put(b"key", b"%d" % number, callback=lambda *_, number=number: told.append(b"%d" % number))
        node.look(callback=answers)
    ticks(node, lambda: len(answers) == 10)
    for number, (result, _) in enumerate(answers):
        assert result == (b"%d" % number, 1, [b"%d" % n for n in range(number + 1)])


def test_a_method_that_returns_an_exception_has_that_result(node_at: MakeNode) -> None:
    """An exception that a method returns is its result; one that it raises is not."""

    class Node(ReplicatedStateMachine):
        @replicated
        def give(self, error: Exception, *, burst: bool = False) -> Exception:
            if burst:
                raise error
            return error

    node = node_at(Node)
    ticks(node, node.isReady)
    result, reason = answer(node, node.give, ValueError("x"))
    assert (repr(result), reason) == ("ValueError('x')", FAIL_REASON.SUCCESS)
    answers = Answers()
    node.give(ValueError("x"), burst=True, callback=answers)
    ticks(node, lambda: answers)
    assert answers == [(None, FAIL_REASON.UNKNOWN_OUTCOME)]


# ---- errors of user code ----------------------------------------------------------------------------------


def burst(*_: Any) -> None:
    raise ValueError("burst")


@pytest.mark.parametrize("name", ["onReady", "onStateChanged", "onCodeVersionChanged"])
def test_a_callback_of_the_configuration_may_raise(
    node_at: MakeNode, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of a callback of the configuration, even of one set later, is logged, and the node continues."""

    class Node(ReplicatedStateMachine):
        @replicated(ver=1)
        def newer(self) -> None: ...

    node = node_at(Node, conf={name: burst})
    assert node.conf.__dict__[name] is burst
    setattr(node.conf, name, burst)
    ticks(node, node.isReady)
    assert answer(node, node.setCodeVersion, 1)[1] == FAIL_REASON.SUCCESS
    assert answer(node, node.put, b"a", b"b") == (True, FAIL_REASON.SUCCESS)
    assert node.failure is None
    assert "burst" in caplog.text


def test_a_tick_callback_may_raise_and_be_removed(node_at: MakeNode, caplog: pytest.LogCaptureFixture) -> None:
    """The error of a tick callback is logged in each tick, until the callback is removed."""
    node = node_at()
    node.addOnTickCallback(burst)
    ticks(node, node.isReady)
    assert "burst" in caplog.text
    node.removeOnTickCallback(burst)
    caplog.clear()
    node.doTick(0)
    assert (caplog.text, node.failure) == ("", None)


@pytest.mark.parametrize("reason", ["full", "denied", "discarded", "applied", "ended"])
def test_a_callback_of_a_call_may_raise(
    node_at: MakeNode, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback of a call, even of a replicated method, may raise on every way to an answer."""
    counter = ReplCounter()
    node = node_at(consumers=[counter], conf={"commandsQueueSize": 1, "dynamicMembershipChange": True})
    ticks(node, node.isReady)
    if reason == "full":
        counter.inc()
        counter.inc(callback=burst)
    elif reason == "denied":
        node.addNodeToCluster(node.selfNode, callback=burst)
    elif reason == "discarded":
        index = node.raftLastApplied + 1
        node._SyncObj__commandsWaitingCommit[index].append((0, node._fastsm_waiting.add(burst)))
        counter.inc()
    elif reason == "applied":
        counter.inc(callback=burst)
    else:
        counter.inc(callback=burst)
        node.destroy()
    for _ in range(20):
        node.doTick(0)
    assert node.failure is None
    assert "a callback raised" in caplog.text
    assert len(node._fastsm_waiting) == 0


# ---- answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["destroy", "failure"])
def test_pending_calls_are_answered_at_the_end(node_at: MakeNode, how: str) -> None:
    """At the end of a node every pending command, in the queue or in flight, gets one callback."""
    counter = ReplCounter()
    node = node_at(partners=("127.0.0.1:1",), consumers=[counter], conf={"dynamicMembershipChange": True})
    answers = Answers()
    waiting = [
        lambda: node.put(b"a", b"b", callback=answers), lambda: counter.inc(callback=answers),
        lambda: node.addNodeToCluster("127.0.0.1:2", callback=answers), lambda: node.setCodeVersion(0, answers),
    ]  # fmt: skip
    for call in waiting:
        call()

    def wait() -> None:
        with pytest.raises(SyncObjException):
            counter.inc(sync=True)

    blocked = threading.Thread(target=wait)
    blocked.start()
    while len(node._fastsm_waiting) < len(waiting) + 1:
        pass
    if how == "destroy":
        node.destroy()
    else:
        node._fastsm_fail(OSError("no disk"))
    blocked.join(20)
    assert not blocked.is_alive()
    assert answers == [(None, FAIL_REASON.UNKNOWN_OUTCOME)] * len(waiting)
    for call in (lambda: node.put(b"a", b"b"), lambda: node.setCodeVersion(0)):
        with pytest.raises(fastsm.NotRunningError):
            call()


def test_an_answer_is_not_kept(node_at: MakeNode) -> None:
    """A command that was answered, or whose caller timed out, leaves nothing in memory, however long its timeout is."""
    node = node_at()
    ticks(node, node.isReady)
    answers = Answers()
    for _ in range(1000):
        node.put(b"key", b"value", callback=answers, timeout=3600)
    ticks(node, lambda: len(answers) == 1000)
    node.doTick(0)
    assert len(node._fastsm_waiting) == 0
    assert node._fastsm_waiting.deadlines < 100
    with pytest.raises(SubmitError):
        threading_call(lambda: node.put(b"key", b"value", sync=True, timeout=0))
    assert len(node._fastsm_waiting) == 0


def test_timeouts_come_in_their_order(node_at: MakeNode) -> None:
    """The timeout of a command among many answered ones is still met."""
    node = node_at(partners=("127.0.0.1:1",))
    answers = Answers()
    node.put(b"a", b"b", callback=answers, timeout=0.001)
    for _ in range(500):
        node._fastsm_waiting.add(burst, 3600).forget()
    ticks(node, lambda: answers)
    assert answers == [(None, FAIL_REASON.UNKNOWN_OUTCOME)]
    assert node._fastsm_waiting.deadlines <= 64


def test_waiting_in_the_thread_that_ticks_is_refused(node_at: MakeNode) -> None:
    """A wait in the thread that ticks, which would never end, is refused, even for replicated methods."""
    counter = ReplCounter()
    node = node_at(consumers=[counter])
    ticks(node, node.isReady)
    for call in (lambda: node.put(b"a", b"b", sync=True), lambda: counter.inc(sync=True)):
        with pytest.raises(SubmitError, match="wait for itself"):
            call()
    assert len(node._fastsm_waiting) == 0


def test_a_full_pipe_is_no_error(node_at: MakeNode) -> None:
    """More commands than PySyncObj's wake-up pipe has room for are all queued and applied."""
    node = node_at()
    ticks(node, node.isReady)
    answers = Answers()
    for _ in range(70_000):
        node.put(b"key", b"value", callback=answers)
    ticks(node, lambda: len(answers) == 70_000)
    assert set(answers) == {(True, FAIL_REASON.SUCCESS)}


def test_a_command_that_would_depose_its_leader_is_refused(node_at: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command above the limit, even of a replicated method, is refused with an error that names the limit."""
    monkeypatch.setattr(applying, "LARGEST_COMMAND", 100_000)
    values = ReplDict()
    node = node_at(consumers=[values])
    ticks(node, node.isReady)
    assert answer(node, node.put, b"a", bytes(90_000)) == (True, FAIL_REASON.SUCCESS)
    for call in (lambda: node.put(b"a", bytes(110_000)), lambda: values.set("a", bytes(110_000))):
        with pytest.raises(fastsm.CommandError, match="at most 100000 bytes"):
            call()


def test_a_backlog_of_replicated_methods_is_read_once(node_at: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal reads each entry of a backlog of replicated methods once."""
    monkeypatch.setattr(applying, "TURN", 1e9)
    counter = ReplCounter()
    node = node_at(consumers=[counter])
    ticks(node, node.isReady)
    read = []
    original = type(node._fastsm_journal).marked

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(journal, name)

        def __getitem__(self, item: Any) -> Any:
            return journal[item]

        def __len__(self) -> int:
            return len(journal)

        def marked(self, *arguments: Any) -> Any:
            found = original(journal, *arguments)
            read.append(len(found[0]))
            return found

    journal = node._fastsm_journal
    node._fastsm_journal = Counting()
    answers = Answers()
    for _ in range(5000):
        counter.inc(callback=answers)
    ticks(node, lambda: len(answers) == 5000)
    node._fastsm_journal = journal
    assert sum(read) == 5000


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_keyboard_interrupt_does_not_end_pysyncobjs_thread(node_at: MakeNode, error: type[BaseException]) -> None:
    """A KeyboardInterrupt or SystemExit raised by user code in PySyncObj's thread is handled like any error."""

    class Node(ReplicatedStateMachine):
        @replicated
        def give(self) -> None:
            raise error

    def give(*_: Any) -> None:
        raise error

    node = node_at(Node, conf={"autoTick": True, "onReady": give})
    node.put(b"a", b"b", callback=give)
    node.addOnTickCallback(give)
    with pytest.raises(SyncObjException):
        node.give(sync=True, timeout=20)
    assert node.put(b"a", b"c", sync=True, timeout=20) is True
    assert node.failure is None
    node.destroy_synchronous()
