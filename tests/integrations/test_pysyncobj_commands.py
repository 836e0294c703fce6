"""Commands that answer, through a PySyncObj node: shorthands, procedures, sessions, and changes for on_change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pysyncobj")

from pysyncobj import FAIL_REASON
from pysyncobj.batteries import ReplCounter

import fastsm
from fastsm import Answer
from fastsm.integrations.pysyncobj import Change, DumpPolicy, FastJournal, ReplicatedStateMachine, SubmitError
from fastsm.integrations.pysyncobj.changes import Place
from fastsm.integrations.pysyncobj.shorthands import Shorthands
from support.one_node import Answers, MakeNode, answer, nodes_at, threading_call, ticks


@pytest.fixture
def node_at(tmp_path: Path) -> Iterator[MakeNode]:
    with nodes_at(tmp_path) as make:
        yield make


@fastsm.procedure
def move(tx: Any, payload: bytes) -> int:
    """Move a value from one key to another."""
    source, target = payload.split(b">")
    value = tx.get(source)
    if value is None:
        raise fastsm.Abort(source)
    tx.delete(source)
    tx.put(target, value)
    return len(value)


def ready(node: Any) -> Any:
    ticks(node, node.isReady)
    return node


# ---- shorthands ------------------------------------------------------------------------------------------


def test_every_shorthand_gives_what_apply_answers(node_at: MakeNode) -> None:
    """Each shorthand's callback gets the answer that a machine in memory gives to the command of the same name."""
    node = ready(node_at(procedures=[move], clock=None))
    model = fastsm.MemoryStateMachine(procedures=[move])
    steps: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("put", (b"a", b"1"), {}), ("add", (b"a", 5), {}), ("add", (b"n", 1), {"initial": 9}),
        ("add", (b"n", 2**63 - 1), {}), ("put", (b"t", b"text"), {}), ("add", (b"t", 1), {}), ("read", (b"a",), {}),
        ("compare_and_swap", (b"a", b"6", b"7"), {}), ("compare_and_swap", (b"a", b"6", b"7"), {}),
        ("batch", ([fastsm.put(b"r1", b""), fastsm.add(b"r2", 2)],), {}),
        ("transaction", ([fastsm.exists(b"r1")], [fastsm.read(b"a"), fastsm.delete(b"a")]), {}),
        ("transaction", ([fastsm.exists(b"a")], [fastsm.noop()][:0], [fastsm.read(b"r2")]), {}),
        ("call", ("move", b"r2>r3"), {}), ("call", ("move", b"r2>r3"), {}), ("call", ("move", b"nonsense"), {}),
        ("delete_range", (b"r", b"r3"), {}), ("delete_prefix", (b"r",), {}), ("delete", (b"n",), {}),
        ("forget", (77,), {}), ("put", (b"lease", b"1"), {"expires": 100}), ("touch", (b"lease", 200), {}),
        ("touch", (b"none", 200), {}), ("compare_and_swap", (b"lock", None, b"me"), {"expires": 300}),
        ("tick", (250,), {}), ("tick", (400,), {"limit": 0}), ("tick", (100,), {}),
    ]  # fmt: skip
    for name, arguments, options in steps:
        answers = Answers()
        getattr(node, name)(*arguments, **options, callback=answers)
        ticks(node, lambda answers=answers: answers)
        index = model.last_applied().index + 1
        expected = model.apply([(index, 1, getattr(fastsm, name)(*arguments, **options))])[0]
        assert answers == [(expected, FAIL_REASON.SUCCESS)], name
        assert type(answers[0][0]) is type(expected)
    assert dict(node.state_machine.items()) == dict(model.items())


def test_a_caller_that_waits_is_given_the_answer(node_at: MakeNode) -> None:
    """With sync=True the call returns the Answer itself, even one that is not ok."""
    node = node_at(conf={"autoTick": True}, procedures=[move])
    assert node.add(b"n", 2, sync=True, timeout=20) == Answer(True, 2)
    assert node.call("move", b"x>y", sync=True, timeout=20) == Answer(False, b"x", "abort")
    session = node.open_session(sync=True, timeout=20).value
    for _ in range(3):
        assert node.once(session, 1, fastsm.add(b"n", 1), sync=True, timeout=20) == Answer(True, 3)
    assert node.get(b"n") == b"3"
    assert node.forget(session, sync=True, timeout=20) is True
    assert node.once(session, 1, fastsm.add(b"n", 1), sync=True, timeout=20) == Answer(False, None, "no session")


def test_reads_are_those_of_the_state_machine(node_at: MakeNode) -> None:
    """scan, count, ordered and modified show what this node has applied."""
    node = ready(node_at())
    for number in range(10):
        answer(node, node.put, b"key-%d" % number, b"%d" % number)
    pairs = [(b"key-%d" % number, b"%d" % number) for number in range(10)]
    assert node.scan(b"key-3", b"key-6") == (pairs[3:6], node.raftLastApplied)
    assert node.scan(prefix=b"key-", limit=2, reverse=True).entries == [pairs[9], pairs[8]]
    assert node.count(b"key-7") == 3
    assert node.count(prefix=b"") == 10
    view = node.ordered(b"key-8")
    answer(node, node.delete_prefix, b"key-")
    assert list(view) == pairs[8:]
    assert node.count() == 0
    answer(node, node.put, b"a", b"b")
    assert node.modified(b"a") == (node.raftLastApplied, node.raftCurrentTerm)


def test_a_subclass_may_use_every_name_for_something_else(node_at: MakeNode) -> None:
    """A subclass may have methods with the names of shorthands, because no method of the node calls those."""
    names = [name for name in vars(Shorthands) if not name.startswith("_")]

    def taken(*_: Any, **__: Any) -> None:
        raise AssertionError("a subclass's own")

    for name in names:
        others = {other: taken for other in [*names, "submit"] if other != name}
        node = ready(node_at(type("Own", (ReplicatedStateMachine,), others), name=name, procedures=[move]))
        arguments: tuple[Any, ...] = {
            "put": (b"a", b"b"), "compare_and_swap": (b"a", None, b"b"), "batch": ([],), "add": (b"a", 1),
            "transaction": ([], []), "call": ("move", b""), "delete_range": (None, None), "open_session": (),
            "once": (1, 1, fastsm.noop()), "forget": (1,), "scan": (), "count": (), "ordered": (),
            "get_many": ([b"a"],), "sync_read": (b"a",), "scan_prefix": (b"a",), "touch": (b"a", 1), "tick": (1,),
            "next_deadline": (), "clock": (),
        }.get(name, (b"a",))  # fmt: skip
        if name == "sync_read":
            with pytest.raises(SubmitError):
                threading_call(lambda node=node: node.sync_read(b"a", timeout=0.001))
            continue
        getattr(node, name)(*arguments)
        for _ in range(5):
            node.doTick(0.001)
        assert node.failure is None


# ---- procedures ------------------------------------------------------------------------------------------


def test_an_unknown_procedure_is_refused_where_it_is_submitted(node_at: MakeNode) -> None:
    """A node refuses to submit a procedure that it does not have; nothing gets into the log."""
    node = ready(node_at(procedures=[move]))
    last = node.journal.last_index
    for call in (
        lambda: node.call("other", b""), lambda: node.call("move", b"", version=2),
        lambda: node.submit(fastsm.call("other")), lambda: node.once(1, 1, fastsm.call("other")),
    ):
        with pytest.raises(fastsm.UnknownCommandError, match="procedure"):
            call()
    assert node.journal.last_index == last


def test_a_node_without_the_procedure_of_an_entry_stops(node_at: MakeNode) -> None:
    """A node without the procedure of an entry stops; restarted with it, the node continues from there."""
    node = ready(node_at())
    node._applyCommand(fastsm.call("move", b"a>b"), None, 0x46)  # as if another node forwarded it
    ticks(node, lambda: node.failure)
    assert isinstance(node.failure, fastsm.UnknownCommandError)
    node.destroy()
    node = ready(node_at(procedures=[move]))
    assert answer(node, node.put, b"a", b"1") == (True, FAIL_REASON.SUCCESS)


@pytest.mark.parametrize("error", [MemoryError, OSError, RecursionError, SystemExit, KeyboardInterrupt])
def test_trouble_of_one_replica_in_a_procedure_stops_that_node(node_at: MakeNode, error: type[BaseException]) -> None:
    """An error of one replica's environment, even a KeyboardInterrupt, stops the node; a restart applies the entry."""
    trouble = [True]

    @fastsm.procedure
    def fragile(tx: Any, payload: bytes) -> None:
        if trouble[0]:
            raise error
        tx.put(payload, b"there")

    node = node_at(conf={"autoTick": True}, procedures=[fragile])
    with pytest.raises((fastsm.NotRunningError, SubmitError)):
        node.call("fragile", b"key", sync=True, timeout=20)
    assert error in (type(node.failure), type(node.failure.__cause__))
    node.destroy_synchronous()
    trouble[0] = False
    node = node_at(conf={"autoTick": True}, procedures=[fragile])
    node.sync_read(b"key", timeout=20)
    assert node.get(b"key") == b"there"


def test_an_interrupt_passes_through_a_tick_of_the_users(node_at: MakeNode) -> None:
    """A caller that ticks the node itself gets the KeyboardInterrupt, and the next tick continues."""
    interrupts = [KeyboardInterrupt(), SystemExit()]

    @fastsm.procedure
    def slow(tx: Any, payload: bytes) -> None:
        if interrupts:
            raise interrupts.pop()
        tx.put(payload, b"there")

    node = ready(node_at(procedures=[slow]))
    node.call("slow", b"key")
    with pytest.raises(SystemExit):
        ticks(node, lambda: False)
    with pytest.raises(KeyboardInterrupt):
        ticks(node, lambda: False)
    ticks(node, lambda: node.get(b"key") == b"there")


def test_a_procedure_cannot_use_its_node(node_at: MakeNode, tmp_path: Path) -> None:
    """A procedure that submits, waits or reads through its node gets a ``ProcedureError``, and nothing is submitted."""
    made: list[Any] = []

    @fastsm.procedure
    def nosy(tx: Any, payload: bytes) -> None:
        if payload == b"submit":
            made[0].put(b"a", b"b")
        elif payload == b"wait":
            made[0].put(b"a", b"b", sync=True)
        else:
            made[0].get(b"a")

    for number, payload in enumerate([b"submit", b"wait", b"read"]):
        made[:] = [ready(node_at(name=f"node-{number}", procedures=[nosy]))]
        made[0].call("nosy", payload)
        ticks(made[0], lambda: made[0].failure)
        assert isinstance(made[0].failure, fastsm.ProcedureError)
        made[0].destroy()
        entries = FastJournal(tmp_path / f"node-{number}" / "journal")
        assert entries.last_index == made[0].raftCommitIndex
        entries.abandon()


def test_procedures_of_the_users_and_of_the_batteries_go_together(node_at: MakeNode) -> None:
    """A user's procedures work next to fastsm's own; two of one name and version are refused at the start."""

    @fastsm.procedure(name="fastsm.queue_put")
    def clash(tx: Any, payload: bytes) -> None:
        pass

    with pytest.raises(ValueError, match="two procedures"):
        node_at(procedures=[clash])
    node = ready(node_at(procedures=[move], check_procedures=True))
    answer(node, node.put, b"a", b"1")
    assert answer(node, node.call, "move", b"a>b") == (Answer(True, 1), FAIL_REASON.SUCCESS)


# ---- time ------------------------------------------------------------------------------------------------


class Now:
    """A host's clock in milliseconds, which the test moves."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self) -> int:
        return self.at

    def clock_of(self, machine: Any) -> fastsm.Clock:
        return fastsm.Clock(machine, interval_ms=1, idle_ms=10**9, now=self)


def test_the_leader_removes_what_is_due(node_at: MakeNode) -> None:
    """The leader removes due keys by the given clock, and proposes nothing without deadlines or before one is due."""
    now, seen = Now(1000), []
    node = ready(node_at(clock=now.clock_of, on_change=seen.extend))
    answer(node, node.put, b"a", b"forever")
    last = node.journal.last_index
    for _ in range(50):
        now.at += 10
        node.doTick(0.001)
    assert node.journal.last_index == last
    node.put(b"lease", b"mine", expires=now.at + 1000)
    node.put(b"longer", b"mine", expires=now.at + 9000)
    ticks(node, lambda: node.deadline(b"longer"))
    assert (node.next_deadline(), node.clock()) == (now.at + 1000, 0)
    for _ in range(20):
        node.doTick(0.001)
    assert node.journal.last_index == last + 2
    now.at += 1001
    seen.clear()
    ticks(node, lambda: node.get(b"lease") is None)
    assert [(change.key, change.value) for change in seen] == [(b"lease", None)]
    assert (node.clock(), node.get(b"longer")) == (now.at, b"mine")
    assert answer(node, node.touch, b"longer", None)[0] is True
    last = node.journal.last_index
    now.at += 10**6
    for _ in range(20):
        node.doTick(0.001)
    assert (node.journal.last_index, node.get(b"longer")) == (last, b"mine")


def test_a_leader_with_a_clock_that_is_late_does_no_harm(node_at: MakeNode) -> None:
    """A leader whose clock is late removes keys that are due by the state's clock, which never goes back."""
    now = Now(5000)
    node = ready(node_at(clock=now.clock_of))
    answer(node, node.tick, 9000)
    node.put(b"lease", b"", expires=6000)
    ticks(node, lambda: node.get(b"lease") is None and node.next_deadline() is None)
    assert node.clock() == 9000


def test_a_leap_is_not_proposed(node_at: MakeNode, caplog: pytest.LogCaptureFixture) -> None:
    """A host whose clock is years ahead proposes no tick; it logs that once, and the node continues."""
    now = Now(10**12)
    node = ready(node_at(clock=now.clock_of))
    answer(node, node.put, b"lease", b"", )
    answer(node, node.touch, b"lease", 1)
    node._fastsm_timers[0]._not_before = 0.0
    for _ in range(20):
        node.doTick(0.001)
    assert (node.get(b"lease"), node.clock(), node.failure) == (b"", 0, None)
    assert caplog.text.count("no tick is proposed") == 1


# ---- changes ---------------------------------------------------------------------------------------------


def test_changes_of_commands_that_answer(node_at: MakeNode) -> None:
    """on_change gets the sum of an add, the keys of a deleted range, and the writes of a procedure or a branch."""
    seen: list[Any] = []
    node = ready(node_at(on_change=seen.extend, procedures=[move]))
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], list[tuple[bytes, bytes | None]]]] = [
        (node.add, (b"n", 5), [(b"n", b"5")]),
        (node.batch, ([fastsm.put(b"r2", b""), fastsm.put(b"r1", b""), fastsm.add(b"n", 1)],),
         [(b"r2", b""), (b"r1", b""), (b"n", b"6")]),
        (node.delete_range, (b"r", b"s"), [(b"r1", None), (b"r2", None)]),
        (node.transaction, ([fastsm.absent(b"n")], [fastsm.put(b"x", b"")], [fastsm.put(b"y", b""), fastsm.read(b"n")]),
         [(b"y", b"")]),
        (node.call, ("move", b"n>m"), [(b"n", None), (b"m", b"6")]),
        (node.call, ("move", b"n>m"), []), (node.delete, (b"absent",), [(b"absent", None)]),
        (node.open_session, (), []),
    ]  # fmt: skip
    for call, arguments, expected in calls:
        seen.clear()
        result, _ = answer(node, call, *arguments)
        assert [(change.key, change.value) for change in seen] == expected
        assert all(change[:2] == (node.raftLastApplied, node.raftCurrentTerm) for change in seen)
    seen.clear()
    for _ in range(2):
        answer(node, node.once, result.value, 1, fastsm.add(b"n", 1))
    assert seen == [Change(node.raftLastApplied - 1, node.raftCurrentTerm, b"n", b"1")]


@pytest.mark.parametrize("retained", [0, 10_000])
def test_changes_next_to_compactions(node_at: MakeNode, retained: int) -> None:
    """While the log is compacted all the time, no change is missed; if nothing is retained, on_change gets None."""
    seen: list[Any] = []
    node = ready(node_at(on_change=seen.append, retain_entries=retained, auto_compact=False))
    machine = node.state_machine

    class Compacting:
        """The machine, compacted right before and after each chunk."""

        def __getattr__(self, name: str) -> Any:
            return getattr(machine, name)

        def apply(self, entries: Any) -> Any:
            threading_call(machine.compact)
            results = machine.apply(entries)
            threading_call(machine.compact)
            return results

    node._fastsm_machine = Compacting()
    for number in range(20):
        answer(node, node.put, b"key", b"%d" % number)
    node._fastsm_machine = machine
    told = [None if changes is None else [change.value for change in changes] for changes in seen]
    if retained == 0:
        told = [values or [b"%d" % number] for number, values in enumerate(told)]
    assert told == [[b"%d" % number] for number in range(20)]


@pytest.mark.parametrize("retained", [0, 10_000])
def test_changes_that_were_compacted_away(tmp_path: Path, retained: int) -> None:
    """Changes before two compactions are found in the newest log; the result is None if they are gone."""
    with fastsm.FastStateMachine(tmp_path, retain_entries=retained, auto_compact=False) as machine:
        place = Place(machine)
        entries = [(index, 1, fastsm.put(b"key", b"%d" % index)) for index in (1, 2, 3)]
        for entry in entries:
            machine.apply([entry])
            machine.compact()
        if retained:
            machine.compact(1)
        expected = [Change(index, 1, b"key", b"%d" % index) for index in (2, 3)]
        assert place.changes(entries[1:]) == (expected if retained else None)
        assert Place(machine).changes(entries) == []


def test_the_end_of_a_node_that_leads_is_no_failure(node_at: MakeNode) -> None:
    """Destroying a leader at any moment between the ticks that it proposes is not a failure."""
    for number in range(5):
        failures: list[BaseException] = []
        now = Now(10**6)
        node = node_at(
            name=f"node-{number}", conf={"autoTick": True, "autoTickPeriod": 0.001}, clock=now.clock_of,
            on_failure=failures.append)
        node.put(b"lease", b"", expires=1, sync=True, timeout=20)
        for _ in range(number * 20):
            now.at += 10
            node.put(b"lease", b"", expires=now.at)
        node.destroy_synchronous()
        assert failures == []


def test_an_error_in_the_clock_of_the_users_stops_nothing(node_at: MakeNode, caplog: pytest.LogCaptureFixture) -> None:
    """An error in a user's clock is logged once, and nothing expires."""

    def broken() -> int:
        raise ValueError("the user's own")

    node = ready(node_at(clock=lambda machine: fastsm.Clock(machine, now=broken)))
    answer(node, node.put, b"lease", b"")
    answer(node, node.touch, b"lease", 1)
    for _ in range(20):
        node.doTick(0.001)
    assert (node.failure, node.get(b"lease")) == (None, b"")
    assert caplog.text.count("no tick is proposed") == 1


def test_a_callback_ends_its_node_among_entries_of_a_consumer(node_at: MakeNode) -> None:
    """A callback may destroy its node without a failure; after a restart each entry was applied once."""
    counter, failures = ReplCounter(), []
    node = ready(node_at(consumers=[counter], on_failure=failures.append))

    def told(total: Any, reason: Any) -> None:
        if total == 10:
            node.destroy()

    for _ in range(50):
        counter.inc(callback=told)
    for _ in range(5000):
        if node._fastsm_over:
            break
        node.doTick(0.001)
    assert (counter.get(), failures, node.failure) == (10, [], None)
    counter = ReplCounter()
    node = ready(node_at(consumers=[counter]))
    ticks(node, lambda: counter.get() == 50)
    assert node.state_machine.last_applied() == (node.raftLastApplied, node.raftCurrentTerm)


def test_a_snapshot_keeps_sessions(node_at: MakeNode) -> None:
    """After a dump and a restart, a repeated command is still recognized."""
    node = ready(node_at(policy=DumpPolicy(trailing_entries=1)))
    session = answer(node, node.open_session)[0].value
    first = answer(node, node.once, session, 1, fastsm.add(b"n", 1))
    node.forceLogCompaction()
    ticks(node, lambda: node.dumps)
    node.destroy()
    node = ready(node_at())
    assert answer(node, node.once, session, 1, fastsm.add(b"n", 1)) == first
    assert node.get(b"n") == b"1"
