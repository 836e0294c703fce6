"""What user code of a PySyncObj node meets: its own names, callbacks that raise, answers, limits, the end of a node."""

from __future__ import annotations

import logging
import threading
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
    DumpPolicy,
    ReplicatedStateMachine,
    SubmitError,
    applying,
    dumping,
)
from support.cluster import free_ports

MakeNode = Callable[..., Any]


@pytest.fixture
def node_at(tmp_path: Path) -> Iterator[MakeNode]:
    """Makes nodes of a cluster of one each, which the test ticks itself; they end with the test."""
    nodes: list[ReplicatedStateMachine] = []

    def make(
        node: type[ReplicatedStateMachine] = ReplicatedStateMachine, *, partners: tuple[str, ...] = (),
        name: str = "node", conf: dict[str, Any] | None = None, **options: Any,
    ) -> ReplicatedStateMachine:
        address = f"127.0.0.1:{free_ports(1)[0]}"
        configuration = SyncObjConf(**{
            "bindAddress": address, "appendEntriesUseBatch": False, "autoTick": False, "raftMinTimeout": 0.02,
            "raftMaxTimeout": 0.03, "appendEntriesPeriod": 0.005, **(conf or {}),
        })  # fmt: skip
        nodes.append(node(address, partners, tmp_path / name, conf=configuration, **options))
        return nodes[-1]

    yield make
    for node in nodes:
        node.destroy()


def ticks(node: ReplicatedStateMachine, condition: Callable[[], object]) -> None:
    """Ticks until the condition holds."""
    for _ in range(5000):
        if condition():
            return
        node.doTick(0.002)
    raise AssertionError(f"it never came to that: {node.failure!r}")


class Answers(list[Any]):
    """Callbacks' arguments."""

    def __call__(self, result: Any, reason: Any) -> None:
        self.append((result, reason))


def answer(node: ReplicatedStateMachine, call: Callable[..., object], *arguments: Any) -> Any:
    """What the callback of a call is given."""
    answers = Answers()
    call(*arguments, callback=answers)
    ticks(node, lambda: answers)
    return answers[0]


# ---- names -----------------------------------------------------------------------------------------------


def test_no_plain_name_of_a_subclass_can_collide() -> None:
    """Every private name of the node's classes is PySyncObj's own or begins with _fastsm_; instances too."""
    from pysyncobj import SyncObj  # noqa: PLC0415

    allowed = set(dir(SyncObj))
    for owner in ReplicatedStateMachine.__mro__:
        if owner in (SyncObj, object):
            continue
        private = [name for name in vars(owner) if name.startswith("_") and not name.startswith(("__", "_SyncObj__"))]
        assert [n for n in private if n not in allowed and not n.startswith("_fastsm_")] == [], owner


def test_attributes_of_a_node_begin_with_a_prefix(node_at: MakeNode) -> None:
    """What the constructor sets is PySyncObj's own or begins with _fastsm_."""
    stock = {"_poller", "_methodToID", "_idToMethod", "_idToConsumer"}
    names = {name for name in vars(node_at()) if not name.startswith(("_SyncObj__", "_fastsm_"))}
    assert names <= stock


def test_a_subclass_may_use_the_names_of_what_is_shown(node_at: MakeNode) -> None:
    """Attributes and replicated methods named as parts of the node, or as Patroni names its own, harm nothing."""

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


# ---- what is seen while user code runs --------------------------------------------------------------------


class Marks(SyncObjConsumer):  # type: ignore[misc]
    """Notes which entry PySyncObj shows while a method runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    @replicated
    def mark(self) -> int:
        self.seen.append(self._syncObj.raftLastApplied + 1)
        return self.seen[-1]


def test_methods_and_callbacks_see_their_own_index(node_at: MakeNode) -> None:
    """raftLastApplied is one less than the entry's index: live, in a backlog, and when entries come again."""
    marks, order = Marks(), []
    node = node_at(consumers=[marks])
    ticks(node, node.isReady)
    first = node.raftLastApplied + 1
    for number in range(40):  # all under way at once
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
    """The state machine is at the method's own entry, and who waited for earlier ones was told, also in a backlog."""
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
    """An exception that is returned is a result like any other; one that is raised is none."""

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


# ---- what user code raises --------------------------------------------------------------------------------


def burst(*_: Any) -> None:
    raise ValueError("burst")


@pytest.mark.parametrize("name", ["onReady", "onStateChanged", "onCodeVersionChanged"])
def test_a_callback_of_the_configuration_may_raise(
    node_at: MakeNode, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the node goes on; so with one that is set later."""

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
    """What it raises is logged in each tick, until it is removed."""
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
    """On every way to an answer, of replicated methods too."""
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
def test_whoever_waits_is_told_of_the_end(node_at: MakeNode, how: str) -> None:
    """Commands of submit, of consumers and of PySyncObj's own, in the queue or on their way: each hears of it once."""
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
    """A command that was answered, or whose caller gave up, leaves nothing, however long its timeout is."""
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


def threading_call(call: Callable[[], object]) -> None:
    """Calls in another thread; raises what it raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_timeouts_come_in_their_order(node_at: MakeNode) -> None:
    """A deadline among many that were answered is still met."""
    node = node_at(partners=("127.0.0.1:1",))
    answers = Answers()
    node.put(b"a", b"b", callback=answers, timeout=0.001)
    for _ in range(500):
        node._fastsm_waiting.add(burst, 3600).forget()
    ticks(node, lambda: answers)
    assert answers == [(None, FAIL_REASON.UNKNOWN_OUTCOME)]
    assert node._fastsm_waiting.deadlines <= 64


def test_waiting_in_the_thread_that_ticks_is_refused(node_at: MakeNode) -> None:
    """Without autoTick too, and for replicated methods: it would wait for itself, for ever."""
    counter = ReplCounter()
    node = node_at(consumers=[counter])
    ticks(node, node.isReady)
    for call in (lambda: node.put(b"a", b"b", sync=True), lambda: counter.inc(sync=True)):
        with pytest.raises(SubmitError, match="wait for itself"):
            call()
    assert len(node._fastsm_waiting) == 0


def test_a_full_pipe_is_no_error(node_at: MakeNode) -> None:
    """More commands than PySyncObj's wake-up pipe holds bytes, while nobody ticks: all are queued and applied."""
    node = node_at()
    ticks(node, node.isReady)
    answers = Answers()
    for _ in range(70_000):
        node.put(b"key", b"value", callback=answers)
    ticks(node, lambda: len(answers) == 70_000)
    assert set(answers) == {(True, FAIL_REASON.SUCCESS)}


def test_a_command_that_would_depose_its_leader_is_refused(node_at: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is named; it holds for replicated methods too."""
    monkeypatch.setattr(applying, "LARGEST_COMMAND", 100_000)
    values = ReplDict()
    node = node_at(consumers=[values])
    ticks(node, node.isReady)
    assert answer(node, node.put, b"a", bytes(90_000)) == (True, FAIL_REASON.SUCCESS)
    for call in (lambda: node.put(b"a", bytes(110_000)), lambda: values.set("a", bytes(110_000))):
        with pytest.raises(fastsm.CommandError, match="at most 100000 bytes"):
            call()


def test_a_backlog_of_replicated_methods_is_read_once(node_at: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are under way, the journal hands each out a bounded number of times."""
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


# ---- state next to the state machine's ----------------------------------------------------------------------


def test_attributes_of_a_node_without_replicated_methods_are_its_own(node_at: MakeNode) -> None:
    """They do not travel, whatever they are."""

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
    """A class with replicated methods that sets a lock behind PySyncObj's constructor could never dump: it says so."""

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
    """One at the end begins empty; one that is gone, or another one in its place, is refused before anything starts."""
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
    """Entries name methods by numbers: a release in which they mean others does not start."""

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
    """A consumer that is given by an object that has it."""
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
    """Where the system has no thread for it, a dump is put off, not given up, and the node goes on."""
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
    """PySyncObj's ticks end with it: failure says so, who waits is told, and the directory is free."""
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
    """Where PySyncObj gives up its ticks, failure is set and the directory is free."""
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


def test_read_only_nodes_without_fastsm_are_refused_once(
    node_at: MakeNode, caplog: pytest.LogCaptureFixture
) -> None:
    """However often they connect there is one line in the log and one entry in `refused`, and no connection kept."""
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


def test_a_setting_of_no_effect_is_said_once(node_at: MakeNode, caplog: pytest.LogCaptureFixture) -> None:
    """PySyncObj's settings of dumps are the policy's here: a node for which they were set says which."""
    node_at(name="usual", policy=DumpPolicy(trailing_entries=5))
    assert "of no effect" not in caplog.text
    with caplog.at_level(logging.WARNING):
        node_at(conf={"logCompactionMinEntries": 99, "useFork": False})
    assert caplog.text.count("conf.logCompactionMinEntries, conf.useFork: set, but of no effect") == 1
