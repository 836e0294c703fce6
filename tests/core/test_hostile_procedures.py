"""Procedures that break the rules: whatever they do, a correct replica stays correct."""

from __future__ import annotations

import asyncio
import inspect
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastsm
from fastsm import Answer, FastStateMachine, LogId, MemoryStateMachine, ProcedureError, SnapshotMetadata
from support.inside import inside

Machine = FastStateMachine | MemoryStateMachine
Make = Callable[..., Machine]
PUT = [(1, 1, fastsm.put(b"k", b"v"))]
FAILED, UNTOUCHED = Answer(False, None, "failed"), {b"k": b"v"}


@pytest.fixture(params=["fast", "model"])
def make(request: pytest.FixtureRequest, directory: Path) -> Iterator[Make]:
    """Make the machine with these functions as procedures, each under its own name."""
    machines: list[FastStateMachine] = []

    def with_procedures(*functions: Callable[[Any, bytes], Any]) -> Machine:
        procedures = [fastsm.procedure(function) for function in functions]
        if request.param == "model":
            return MemoryStateMachine(procedures=procedures)
        machines.append(FastStateMachine(directory, procedures=procedures))
        return machines[-1]

    yield with_procedures
    for machine in machines:
        inside(machine).check()
        machine.close()


def run(machine: Machine, name: str = "p", payload: bytes = b"") -> Any:
    return machine.apply([(machine.last_applied().index + 1, 1, fastsm.call(name, payload))])[0]


METADATA = SnapshotMetadata(LogId(1, 1), bytes(32))
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "apply": ([],), "apply_chunk": ([],), "apply_snapshot_from_file": (METADATA, "nowhere"), "deadline": (b"k",),
    "check": (fastsm.noop(),), "entry_term": (1,), "entry_terms": (np.array([1], dtype=np.uint64),), "fill": ([],),
    "generate_snapshot_data": ("nowhere", LogId(1, 1)), "get": (b"k",), "get_columns": ([b"k"],), "get_many": ([b"k"],),
    "get_view": (b"k",), "install_snapshot": (None, "nowhere"), "modified": (b"k",), "persist_last_applied": ((1, 1),),
    "persist_last_snapshot_metadata": (METADATA,), "scan_prefix": (b"",), "update_last_applied": ((1, 1),),
    "update_last_snapshot_metadata": (METADATA,), "wait_applied": (1,), "wait_applied_async": (1,),
    "write_snapshot": ("nowhere",), "__contains__": (b"k",),
}
HARMLESS = {"is_running", "open_async"}  # they look at nothing that a procedure could change


def calls_of(machine: type[Machine]) -> list[str]:
    """Return the names of all its public methods."""
    names = {name for name in dir(machine) if name[0] != "_" and callable(getattr(machine, name))} - HARMLESS
    return sorted(names | ({"__len__", "__contains__"} & set(dir(machine))))


CALLS = [
    pytest.param(make, name, id=f"{name}-{make}")
    for make, machine in (("fast", FastStateMachine), ("model", MemoryStateMachine)) for name in calls_of(machine)
]


@pytest.mark.parametrize(("make", "name"), CALLS, indirect=["make"])
def test_every_call_of_its_own_machine_is_an_error(make: Make, name: str) -> None:
    """Any call of its machine by a procedure, even a read or a coroutine, is an error; nothing waits or changes."""
    raised: list[BaseException] = []

    def p(tx: Any, payload: bytes) -> None:
        try:
            outcome = getattr(machine, name)(*ARGUMENTS.get(name, ()))
            if inspect.iscoroutine(outcome):
                asyncio.run(asyncio.wait_for(outcome, 30))
        except BaseException as error:
            raised.append(error)

    machine = make(p)
    machine.apply(PUT)
    assert run(machine) == Answer(True, None)
    assert [type(error) for error in raised] == [ProcedureError]
    assert (dict(machine.items()), machine.last_applied(), machine.is_running()) == (UNTOUCHED, (2, 1), True)


@pytest.mark.parametrize("name", ["entry", "clock", "get", "own"])
def test_tx_keeps_nothing_for_a_procedure(make: Make, name: str) -> None:
    """Attributes of tx cannot be set: what one call leaves there another replica may not have."""
    def p(tx: Any, payload: bytes) -> None:
        tx.put(b"k", b"changed")
        setattr(tx, name, 1)

    machine = make(p)
    machine.apply(PUT)
    answer = run(machine)
    assert (answer, type(answer.error)) == (FAILED, AttributeError)
    assert dict(machine.items()) == UNTOUCHED


def test_ctrl_c_cannot_be_swallowed(directory: Path) -> None:
    """A procedure may catch the interrupt and complete, but the apply is interrupted anyway, and nothing counts."""
    started = threading.Event()

    def p(tx: Any, payload: bytes) -> bytes:
        try:
            while payload:
                started.set()
                tx.get(b"k")
        except KeyboardInterrupt:
            tx.put(b"k", b"caught")
        return b"went on"

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    killer = threading.Thread(target=lambda: (started.wait(30), signal.raise_signal(signal.SIGINT)))
    try:
        with FastStateMachine(directory, procedures=[fastsm.procedure(p)]) as machine:
            machine.apply(PUT)
            killer.start()
            with pytest.raises(KeyboardInterrupt):
                run(machine, payload=b"endless")
            assert (dict(machine.items()), machine.last_applied()) == (UNTOUCHED, (1, 1))
            assert run(machine) == Answer(True, b"went on")
    finally:
        signal.signal(signal.SIGINT, before)
        killer.join()


def test_a_replica_without_the_procedure_stops_and_catches_up(tmp_path: Path) -> None:
    """A replica without the procedure applies nothing of the chunk; reopened with it, it equals the others."""
    def p(tx: Any, payload: bytes) -> int:
        return tx.add(payload, 1)

    known = [fastsm.procedure(p)]
    chunk = [*PUT, (2, 1, fastsm.open_session()), (3, 1, fastsm.once(2, 1, fastsm.call("p", b"n")))]
    with FastStateMachine(tmp_path / "one", procedures=known) as one:
        answers = one.apply(chunk)
        with FastStateMachine(tmp_path / "other") as other:
            with pytest.raises(fastsm.UnknownCommandError, match="procedures="):
                other.apply(chunk)
            assert (other.last_applied(), other.len()) == ((0, 0), 0)
        with FastStateMachine(tmp_path / "other", procedures=known) as other:
            assert other.apply(chunk) == answers
            assert other.state_checksum() == one.state_checksum()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="groups of exceptions came with Python 3.11")
def test_trouble_in_a_group_ends_the_apply(make: Make) -> None:
    """This replica's trouble, at any depth of a group, ends the apply; a group of the entry's errors is a failure."""
    groups = {
        b"own": ExceptionGroup("", [ValueError(), ExceptionGroup("", [KeyError(), MemoryError()])]),  # noqa: F821
        b"entry": ExceptionGroup("", [ValueError(), fastsm.CommandError("")]),  # noqa: F821
    }

    def p(tx: Any, payload: bytes) -> Any:
        tx.put(b"k", b"w")
        raise groups[payload]

    machine = make(p)
    machine.apply(PUT)
    with pytest.raises(ProcedureError) as raised:
        run(machine, payload=b"own")
    assert raised.value.__cause__ is groups[b"own"]
    assert machine.last_applied() == (1, 1)
    assert run(machine, payload=b"entry") == FAILED
    assert dict(machine.items()) == UNTOUCHED


async def coroutine(tx: Any, payload: bytes) -> None: ...


def generator(tx: Any, payload: bytes) -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "name"),
    [(coroutine, None), (generator, None), (5, "five"), (partial(print), None), ([].append, None), (print, "print"),
     (lambda tx, payload: None, 5)],
    ids=["coroutine", "generator", "number", "partial", "bound", "builtin", "name"],
)  # fmt: skip
def test_what_cannot_be_a_procedure_is_refused(function: Any, name: Any) -> None:
    """A function that could never answer, has no name, or cannot be marked is refused by the decorator."""
    with pytest.raises(TypeError):
        fastsm.procedure(name=name)(function)
    with pytest.raises(TypeError):
        MemoryStateMachine(procedures=[function])


def test_check_procedures_tells_true_from_one(directory: Path) -> None:
    """True and 1 are equal in Python, but not in what a session remembers."""
    calls: list[int] = []

    def p(tx: Any, payload: bytes) -> Any:
        calls.append(1)
        return [1 if len(calls) % 2 else True]

    with FastStateMachine(directory, procedures=[fastsm.procedure(p)], check_procedures=True) as machine:
        with pytest.raises(ProcedureError, match="twice"):
            run(machine)
        assert machine.last_applied() == (0, 0)


FORKS = """
import os, sys, fastsm
import fastsm.core.judging as judging

machine = fastsm.FastStateMachine(sys.argv[1])
machine.apply([(1, 1, fastsm.open_session()), (2, 1, fastsm.once(1, 1, fastsm.put(b"k", b"v")))])
unpack_result, forked = judging.unpack_result, []

def forking(*arguments):  # a signal handler of the main thread may run here
    if not forked:
        forked.append(os.fork())
    return unpack_result(*arguments)

judging.unpack_result = forking
try:
    found = machine.apply([(3, 1, fastsm.once(1, 1, fastsm.put(b"k", b"v")))])
except fastsm.NotRunningError as error:
    found = str(error)
if forked == [0]:
    os._exit("fork" not in found)
assert os.waitpid(forked[0], 0)[1] == 0
assert (found, machine.get(b"k")) == ([True], b"v")
machine.close()
"""


def test_a_child_does_not_go_on_with_the_chunk_of_its_parent(directory: Path) -> None:
    """If a signal handler forks while a chunk is judged, and returns in the child, the call is refused there."""
    subprocess.run([sys.executable, "-c", FORKS, directory], check=True, timeout=60)
