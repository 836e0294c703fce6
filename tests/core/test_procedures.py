"""Procedures: each of their rules, on both machines, and that a procedure can do no harm."""

from __future__ import annotations

import asyncio
import contextvars
import decimal
import errno
import gc
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import Abort, Answer, FastStateMachine, MemoryStateMachine, ProcedureError, UnknownCommandError
from support.inside import inside

Machine = FastStateMachine | MemoryStateMachine
Make = Callable[..., Machine]


@pytest.fixture(params=["fast", "model"])
def make(request: pytest.FixtureRequest, directory: Path) -> Iterator[Make]:
    """Make the machine with these functions as procedures, each under its own name."""
    machines: list[Machine] = []

    def with_procedures(*functions: Callable[[Any, bytes], Any], **options: Any) -> Machine:
        procedures = [fastsm.procedure(function) for function in functions]
        if request.param == "model":
            return MemoryStateMachine(procedures=procedures)
        machines.append(FastStateMachine(directory, procedures=procedures, **options))
        return machines[-1]

    yield with_procedures
    for machine in machines:
        inside(machine).check()  # type: ignore[union-attr]
        machine.close()  # type: ignore[union-attr]


def run(machine: Machine, name: str = "p", payload: bytes = b"") -> Any:
    return machine.apply([(machine.last_applied().index + 1, 1, fastsm.call(name, payload))])[0]


FAILED, UNTOUCHED = Answer(False, None, "failed"), {b"k": b"v"}
PUT = [(1, 1, fastsm.put(b"k", b"v"))]


@pytest.mark.parametrize(
    "value", [None, True, False, 0, 2**63 - 1, -(2**63), b"", b"x", [], [b"a", [None, 1]], [[[[[[[[]]]]]]]]],
    ids=repr)
def test_a_procedures_result_is_the_answer(make: Make, value: Any) -> None:
    """A procedure may return any type that an answer may have, with lists at most eight deep."""
    def p(tx: Any, payload: bytes) -> Any:
        return value

    assert run(make(p)) == Answer(True, value)


class Subclass(bytes):
    pass


@pytest.mark.parametrize(
    "value", [2**63, -(2**63) - 1, 1.0, "text", (1,), {}, {1}, bytearray(b"x"), Subclass(b"x"), object(), [1.0],
              [[[[[[[[[]]]]]]]]], LOOP := [1], [bytes(32 << 20)] * 2], ids=lambda value: type(value).__name__)
def test_a_result_that_cannot_be_an_answer_is_a_failure(make: Make, value: Any) -> None:
    """A procedure that returns a value that cannot be an answer fails, and has no effect."""
    def p(tx: Any, payload: bytes) -> Any:
        tx.put(b"k", b"w")
        return value

    if value is LOOP and LOOP == [1]:
        LOOP.append(LOOP)
    machine = make(p)
    machine.apply(PUT)
    answer = run(machine)
    assert answer == FAILED
    assert isinstance(answer.error, ValueError)
    assert dict(machine.items()) == UNTOUCHED


def test_an_answer_is_a_copy(make: Make) -> None:
    """A list that the procedure keeps and changes does not change the answer."""
    kept: list[Any] = [b"a", [1]]

    def p(tx: Any, payload: bytes) -> Any:
        return kept

    answer = run(make(p))
    kept[1].append(2)
    assert answer == Answer(True, [b"a", [1]])


def test_abort_takes_back_and_answers(make: Make) -> None:
    """The procedure's writes are undone, and its value is returned."""
    def p(tx: Any, payload: bytes) -> Any:
        tx.put(b"k", b"w")
        tx.delete_range(None, None)
        raise Abort([payload, 7])

    machine = make(p)
    machine.apply(PUT)
    assert run(machine, payload=b"why") == Answer(False, [b"why", 7], "abort")
    assert dict(machine.items()) == UNTOUCHED


def test_an_abort_with_nonsense_is_a_failure(make: Make) -> None:
    """An Abort's value has the limits of every answer."""
    def p(tx: Any, payload: bytes) -> Any:
        raise Abort({})

    assert run(make(p)) == FAILED


@pytest.mark.parametrize("error", [KeyError, ValueError, ZeroDivisionError, StopIteration, AssertionError])
def test_an_exception_of_the_entry_is_a_failure(
    make: Make, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """An entry whose procedure raises has no effect; this replica has the exception, and its traceback is logged."""
    def p(tx: Any, payload: bytes) -> Any:
        tx.put(b"k", b"w")
        raise error("of the entry")

    machine = make(p)
    machine.apply(PUT)
    with caplog.at_level(logging.WARNING, "fastsm"):
        answer = run(machine)
    assert answer == FAILED
    assert type(answer.error) is error
    assert dict(machine.items()) == UNTOUCHED
    assert any(record.exc_info and record.exc_info[0] is error for record in caplog.records)


@pytest.mark.parametrize(
    "use", [lambda tx: tx.get("text"), lambda tx: tx.put(b"k" * 65536, b""), lambda tx: tx.put(b"k", None),
            lambda tx: tx.add(b"k", 1), lambda tx: tx.add(b"n", 2**63), lambda tx: tx.add(b"n", "1"),
            lambda tx: tx.scan(limit=-1), lambda tx: tx.nothing(), lambda tx: tx.put(1, 2),
            lambda tx: tx.delete_prefix(None), lambda tx: tx.delete_prefix("text")])
def test_a_bad_argument_is_a_failure(make: Make, use: Callable[[Any], Any]) -> None:
    """A bad argument, which is the same on every replica, is a failure and not an error of ``apply``."""
    def p(tx: Any, payload: bytes) -> Any:
        tx.put(b"other", b"")
        use(tx)

    machine = make(p)
    machine.apply(PUT)
    assert run(machine) == FAILED
    assert dict(machine.items()) == UNTOUCHED


def test_an_error_that_it_catches_is_its_own_affair(make: Make) -> None:
    """An impossible addition may be tried, and the error ignored; it names the key, and what was found there."""
    def p(tx: Any, payload: bytes) -> Any:
        tx.put(b"large", b"%d" % (2**63 - 1))
        tx.put(b"x" * 99, b"9" * 99)
        said = []
        for key, delta, initial in ((b"k", 1, 0), (b"x" * 99, 1, 0), (b"large", 2, 0), (b"new", 2**62, 2**62)):
            with pytest.raises(ValueError, match="key") as caught:
                tx.add(key, delta, initial=initial)
            said.append(str(caught.value).encode())
        return said

    machine = make(p)
    machine.apply(PUT)
    text = "not a number: expected an integer as text, such as b'-42', from -2**63 to 2**63 - 1, found"
    total = "overflow: expected a sum from -2**63 to 2**63 - 1, found"
    name = f"b'{'x' * 26}...{'x' * 28}'"
    assert run(machine) == Answer(True, [
        f"key b'k': {text} b'v'; put a number first".encode(),
        f"key {name}: {text} 99 bytes; put a number first".encode(),
        f"key b'large': {total} {2**63 - 1} + 2; the value is unchanged".encode(),
        f"key b'new': {total} {2**62} + {2**62}; the value is unchanged".encode()])


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "disk"), ImportError("no module"), SystemError("bug"), MemoryError(),
              RecursionError(), fastsm.OrderError("of another machine"), fastsm.StorageError(errno.EIO, "disk")])
def test_trouble_of_this_replica_ends_the_apply(make: Make, error: Exception) -> None:
    """Nothing of the chunk is applied, the error names entry and procedure, and the next try may succeed."""
    troubled = [True]

    def p(tx: Any, payload: bytes) -> Any:
        tx.put(b"k", b"w")
        if troubled[0]:
            raise error

    machine = make(p)
    machine.apply(PUT)
    chunk = [(2, 1, fastsm.put(b"before", b"")), (3, 1, fastsm.call("p")), (4, 1, fastsm.noop())]
    with pytest.raises(ProcedureError, match="update_last_applied") as raised:
        machine.apply(chunk)
    assert (raised.value.index, raised.value.name, raised.value.__cause__) == (3, "p", error)
    assert dict(machine.items()) == UNTOUCHED
    assert machine.last_applied() == (1, 1)
    troubled[0] = False
    assert machine.apply(chunk) == [True, Answer(True, None), True]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_base_exception_of_a_procedure_is_passed_on(make: Make, error: type[BaseException]) -> None:
    """Exceptions that are not an Exception are passed on, and nothing of the chunk is applied."""
    def p(tx: Any, payload: bytes) -> Any:
        tx.put(b"k", b"w")
        raise error

    machine = make(p)
    machine.apply(PUT)
    with pytest.raises(error):
        run(machine)
    assert dict(machine.items()) == UNTOUCHED
    assert machine.last_applied() == (1, 1)


def test_recursion_without_end(make: Make) -> None:
    """Infinite recursion counts as this replica's trouble, because the maximum depth of a stack differs."""
    def p(tx: Any, payload: bytes) -> Any:
        return p(tx, payload)

    with pytest.raises(ProcedureError) as raised:
        run(make(p))
    assert isinstance(raised.value.__cause__, RecursionError)


class NoMemory:
    """A number whose conversion fails with MemoryError."""

    def __index__(self) -> int:
        raise MemoryError("none left")


@pytest.mark.parametrize(
    "use", [lambda tx: tx.add(b"k", NoMemory()), lambda tx: tx.add(b"k", 1, initial=NoMemory()),
            lambda tx: tx.put(b"k", b"", expires=NoMemory()), lambda tx: tx.touch(b"k", NoMemory()),
            lambda tx: tx.scan(limit=NoMemory())])
def test_trouble_that_came_out_of_tx_cannot_be_swallowed(make: Make, use: Callable[[Any], Any]) -> None:
    """A MemoryError of tx ends the apply even if the procedure catches it."""
    def p(tx: Any, payload: bytes) -> Any:
        try:
            use(tx)
        except MemoryError:
            return b"went on"

    machine = make(p)
    with pytest.raises(ProcedureError) as raised:
        run(machine)
    assert isinstance(raised.value.__cause__, MemoryError)
    assert machine.last_applied() == (0, 0)


def test_tx_is_dead_after_its_call(make: Make) -> None:
    """A tx that was kept can neither read nor write, even in a later call."""
    kept: list[Any] = []

    def p(tx: Any, payload: bytes) -> Any:
        if kept:
            kept[0].put(b"k", b"late")
        kept.append(tx)

    machine = make(p)
    run(machine)
    for use in (lambda tx: tx.get(b"k"), lambda tx: tx.put(b"k", b""), lambda tx: tx.scan(), lambda tx: tx.count()):
        with pytest.raises(ProcedureError):
            use(kept[0])
    with pytest.raises(ProcedureError):
        run(machine)
    assert machine.len() == 0
    assert kept[0].entry == (1, 1)
    assert repr(kept[0])


def test_tx_belongs_to_the_thread_of_its_call(make: Make) -> None:
    """Another thread started by the procedure gets an error."""
    errors: list[BaseException] = []

    def p(tx: Any, payload: bytes) -> Any:
        def use() -> None:
            try:
                tx.put(b"k", b"")
            except ProcedureError as error:
                errors.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()

    machine = make(p)
    with pytest.raises(ProcedureError):  # tx noted it as this replica's trouble
        run(machine)
    assert len(errors) == 1
    assert machine.len() == 0


CALLS: dict[str, Callable[[Any], Any]] = {
    "get": lambda machine: machine.get(b"k"),
    "get_many": lambda machine: machine.get_many([b"k"]),
    "len": lambda machine: machine.len(),
    "items": lambda machine: list(machine.items()),
    "modified": lambda machine: machine.modified(b"k"),
    "apply": lambda machine: machine.apply([(2, 1, fastsm.noop())]),
    "flush": lambda machine: machine.flush(),
    "update_last_applied": lambda machine: machine.update_last_applied((9, 9)),
    "stop": lambda machine: machine.stop(),
    "clear": lambda machine: machine.clear(),
    "last_applied": lambda machine: machine.last_applied(),
    "entry_term": lambda machine: machine.entry_term(1),
}
ONLY_FAST = {
    "close": lambda machine: machine.close(),
    "stats": lambda machine: machine.stats(),
    "get_view": lambda machine: machine.get_view(b"k"),
    "contains": lambda machine: b"k" in machine,
    "scan_prefix": lambda machine: machine.scan_prefix(b""),
    "compact": lambda machine: machine.compact(),
    "membership": lambda machine: machine.membership(),
    "write_snapshot": lambda machine: machine.write_snapshot("nowhere"),
    "live_records": lambda machine: machine.live_records(),
    "verify": lambda machine: machine.verify(),
    "durable": lambda machine: machine.durable(),
}


@pytest.mark.parametrize("on_a_thread", [False, True])
@pytest.mark.parametrize("name", [*CALLS, *ONLY_FAST])
def test_a_call_of_its_own_machine_is_an_error(directory: Path, name: str, on_a_thread: bool) -> None:
    """Any call of its machine by a procedure, even a read, is an error; the machine is unchanged for all threads."""
    def p(tx: Any, payload: bytes) -> Any:
        {**CALLS, **ONLY_FAST}[name](machine)

    with FastStateMachine(directory, procedures=[fastsm.procedure(p)]) as machine:
        raised: list[BaseException] = []

        def apply() -> None:
            try:
                run(machine)
            except ProcedureError as error:
                raised.append(error)

        if on_a_thread:
            thread = threading.Thread(target=apply)
            thread.start()
            thread.join()
        else:
            apply()
        assert len(raised) == 1
        assert isinstance(raised[0].__cause__, ProcedureError)
        assert machine.last_applied() == (0, 0)
        assert machine.apply(PUT) == [True]
        assert machine.get(b"k") == b"v"


def test_the_model_refuses_calls_too() -> None:
    """The model refuses what a procedure must not do, so its tests show that."""
    def p(tx: Any, payload: bytes) -> Any:
        machine.get(b"k")

    machine = MemoryStateMachine(procedures=[fastsm.procedure(p)])
    with pytest.raises(ProcedureError):
        run(machine)
    assert machine.get(b"k") is None


def test_other_threads_see_the_state_before_the_chunk(directory: Path) -> None:
    """Other threads can read while a procedure runs, and see nothing of the chunk before all of it is applied."""
    seen: list[Any] = []

    def p(tx: Any, payload: bytes) -> Any:
        tx.put(b"k", b"new")
        def look() -> None:
            seen.append((machine.get(b"k"), machine.last_applied(), machine.len()))

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return tx.get(b"k")

    with FastStateMachine(directory, procedures=[fastsm.procedure(p)]) as machine:
        machine.apply(PUT)
        assert machine.apply([(2, 1, fastsm.put(b"other", b"")), (3, 1, fastsm.call("p"))])[1] == Answer(True, b"new")
        assert seen == [(b"v", (1, 1), 1)]
        assert machine.get(b"k") == b"new"


@pytest.mark.parametrize("on_a_thread", [False, True])
def test_a_call_sees_no_context(make: Make, on_a_thread: bool) -> None:
    """What the host or an earlier call has set in a context, such as the precision of `decimal`, does not count."""
    name = contextvars.ContextVar("name", default=b"nobody")

    def p(tx: Any, payload: bytes) -> Any:
        seen = [name.get(), str(decimal.Decimal(1) / 3).encode()]
        name.set(b"an earlier call")
        decimal.getcontext().prec = 3
        return seen

    def host() -> list[Any]:
        name.set(b"the host")
        decimal.getcontext().prec = 5
        found = [*machine.apply([(1, 1, fastsm.call("p")), (2, 1, fastsm.call("p"))]), run(machine)]
        assert (name.get(), decimal.getcontext().prec) == (b"the host", 5)
        return found

    machine = make(p)
    if on_a_thread:
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(host).result()
    else:
        found = contextvars.copy_context().run(host)
    assert found == [Answer(True, [b"nobody", b"0." + b"3" * 28])] * 3


def test_unknown_procedures_are_found_before_any_runs(make: Make) -> None:
    """An unknown name or version raises before anything of the chunk is applied, and names the entry."""
    ran: list[bytes] = []

    def p(tx: Any, payload: bytes) -> Any:
        ran.append(payload)

    machine = make(p)
    for unknown in (fastsm.call("q"), fastsm.call("p", version=2)):
        with pytest.raises(UnknownCommandError) as raised:
            machine.apply([(1, 1, fastsm.call("p")), (2, 1, unknown)])
        assert raised.value.index == 2
        with pytest.raises(UnknownCommandError):
            machine.check(unknown)
    machine.check(fastsm.call("p"))
    assert ran == []
    assert machine.last_applied() == (0, 0)


def test_two_of_one_name_and_version_are_refused(directory: Path) -> None:
    """Two procedures of one name and version, or a plain function, are refused before a file is made."""
    @fastsm.procedure(name="same", version=3)
    def first(tx: Any, payload: bytes) -> None: ...

    @fastsm.procedure(name="same", version=3)
    def second(tx: Any, payload: bytes) -> None: ...

    for build in (lambda p: FastStateMachine(directory, procedures=p), lambda p: MemoryStateMachine(procedures=p)):
        with pytest.raises(ValueError, match="same"):
            build([first, second])
        with pytest.raises(TypeError, match="procedure"):
            build([print])
    assert not directory.exists()


def test_versions_stand_next_to_each_other(make: Make) -> None:
    """To change a procedure in a running cluster, add the new version everywhere, then propose it."""
    @fastsm.procedure(name="p", version=1)
    def old(tx: Any, payload: bytes) -> int:
        return 1

    @fastsm.procedure(name="p", version=2)
    def new(tx: Any, payload: bytes) -> int:
        return 2

    machine = MemoryStateMachine(procedures=[old, new])
    assert machine.apply([(1, 1, fastsm.call("p")), (2, 1, fastsm.call("p", version=2))]) == [
        Answer(True, 1), Answer(True, 2)]


def test_check_procedures_finds_what_differs(directory: Path) -> None:
    """A procedure that counts its calls is detected; one that depends only on tx is not."""
    calls: list[int] = []

    def p(tx: Any, payload: bytes) -> Any:
        calls.append(1)
        tx.put(b"k", b"%d" % len(calls) if payload else b"v")
        return 1

    with FastStateMachine(directory, procedures=[fastsm.procedure(p)], check_procedures=True) as machine:
        assert run(machine) == Answer(True, 1)
        with pytest.raises(ProcedureError, match="twice"):
            run(machine, payload=b"x")
        assert dict(machine.items()) == UNTOUCHED


def main_thread_signal(number: int) -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, number)


@pytest.mark.parametrize("woken_by_another", [False, True])
def test_ctrl_c_interrupts_a_procedure(directory: Path, woken_by_another: bool) -> None:
    """The handler runs in the main thread, the procedure ends, and nothing of the chunk is applied."""
    started = threading.Event()
    endings: list[str] = []

    def p(tx: Any, payload: bytes) -> Any:
        endings.append(threading.current_thread().name)
        tx.put(b"k", b"w")
        started.set()
        while True:
            tx.get(b"k")

    def handler(*_: object) -> None:
        endings.append(threading.current_thread().name)
        assert machine.get(b"k") == b"v"  # the main thread is not the procedure's
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    send = signal.raise_signal if woken_by_another else main_thread_signal
    killer = threading.Thread(target=lambda: (started.wait(30), send(signal.SIGINT)))
    try:
        with FastStateMachine(directory, procedures=[fastsm.procedure(p)]) as machine:
            machine.apply(PUT)
            killer.start()
            with pytest.raises(KeyboardInterrupt):
                run(machine)
            assert dict(machine.items()) == UNTOUCHED
            assert machine.apply([(2, 1, fastsm.noop())]) == [True]
    finally:
        signal.signal(signal.SIGINT, before)
        killer.join()
    assert endings[0] != "MainThread"
    assert endings[1] == "MainThread"


def test_a_finalizer_in_a_procedure_cannot_write(directory: Path) -> None:
    """A finalizer that writes on the procedure's thread is refused; the chunk continues."""
    refused: list[BaseException] = []

    class Garbage:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            try:
                machine.apply([(9, 9, fastsm.noop())])
            except fastsm.FastsmError as error:
                refused.append(error)

    def p(tx: Any, payload: bytes) -> Any:
        Garbage()
        gc.collect()
        return tx.scan()

    with FastStateMachine(directory, procedures=[fastsm.procedure(p)]) as machine:
        machine.apply(PUT)
        assert run(machine) == Answer(False, None, "failed")  # a scan's pairs are tuples, which no answer has
        assert len(refused) == 1
        assert machine.last_applied() == (2, 1)


def test_procedures_do_not_run_on_the_event_loop(directory: Path) -> None:
    """However small the chunk is, `apply_chunk` hands it to a thread."""
    threads: list[int] = []

    def p(tx: Any, payload: bytes) -> Any:
        threads.append(threading.get_ident())
        return 1

    with FastStateMachine(directory, procedures=[fastsm.procedure(p)]) as machine:
        machine.apply(PUT)
        answers = asyncio.run(machine.apply_chunk([(2, 1, fastsm.call("p")), (3, 1, fastsm.add(b"n", 1))]))
    assert answers == [Answer(True, 1)] * 2
    assert threads[0] != threading.get_ident()
