"""Threads of a machine that find no memory: nobody waits forever for them, and the next call works."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import FastStateMachine, LogId, event_loops
from fastsm.core import batches, coroutine_order, engine
from fastsm.core.batches import BatchThread
from fastsm.core.coroutine_order import OrderedWorker, Waiters
from fastsm.core.policy import Policy
from fastsm.core.waiting import AppliedWaiters
from fastsm.generation.verification import BackgroundVerification, Verification
from support.faulty import PATIENCE
from support.inside import inside

Opener = Callable[..., FastStateMachine]
LARGE = bytes(100 << 10)  # a value that makes a chunk too large for the event loop


def fail_first(monkeypatch: pytest.MonkeyPatch, of: Any, name: str, error: type[Exception] = MemoryError) -> list[Any]:
    """Let the first call of a function raise; return the list of calls."""
    real = getattr(of, name)
    calls: list[Any] = []

    def function(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(of, name, function)
    return calls


def run(main: Any) -> None:
    """Run a test's coroutine; one that hangs fails."""
    asyncio.run(asyncio.wait_for(main, PATIENCE))


async def write(machine: FastStateMachine) -> None:
    """Apply a chunk by the machine's thread."""
    index = machine.last_applied().index + 1
    assert await machine.apply_chunk([(index, 1, fastsm.put(b"key", LARGE))]) == [True]


async def wait_applied(machine: FastStateMachine) -> None:
    """Wait for an entry that is applied meanwhile."""
    index = machine.last_applied().index + 1
    waiting = asyncio.ensure_future(machine.wait_applied_async(index))
    await asyncio.sleep(0)
    machine.apply([(index, 1, fastsm.noop())])
    await waiting


# ---- threads that coroutines wait for ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "name", "call"),
    [
        (OrderedWorker, "_serve", write),
        (OrderedWorker, "_run", write),
        (OrderedWorker, "_forget", write),
        (coroutine_order, "tell", write),
        (BatchThread, "_take_batch", FastStateMachine.flush_async),
        (Waiters, "_outcomes", FastStateMachine.flush_async),
        (batches, "tell", FastStateMachine.flush_async),
        (BatchThread, "_take_batch", wait_applied),
        (AppliedWaiters, "_outcomes", wait_applied),
        (event_loops, "tell", FastStateMachine.state_checksum_async),
    ],
)
def test_a_thread_that_finds_no_memory_goes_on(
    of: Any, name: str, call: Any, directory: Path, machine_at: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that fails is repeated: the coroutine gets its result, as does the next one; the machine is closed."""
    machine = machine_at(directory)
    machine.apply([(1, 1, fastsm.put(b"key", b"value"))])
    calls = fail_first(monkeypatch, of, name)

    async def main() -> None:
        for _ in range(3):
            await call(machine)

    run(main())
    assert len(calls) > 3
    machine.close()
    with FastStateMachine(directory) as again:
        assert again.last_applied().index >= 1


def test_a_chunk_that_finds_no_memory_is_refused_once(
    directory: Path, machine_at: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `MemoryError` of the apply itself is its caller's, and the next chunk is applied."""
    machine = machine_at(directory)
    fail_first(monkeypatch, FastStateMachine, "_apply_in_turn")

    async def main() -> None:
        with pytest.raises(MemoryError):
            await write(machine)
        await write(machine)

    run(main())
    assert machine.last_applied() == LogId(1, 1)


@pytest.mark.parametrize("end", [FastStateMachine.stop, FastStateMachine.clear, FastStateMachine.close])
def test_a_wait_that_ends_without_memory_is_told(directory: Path, machine_at: Opener, end: Any) -> None:
    """No later call would tell a coroutine that it waits in vain."""
    machine = machine_at(directory)
    machine.apply([(1, 1, fastsm.noop())])
    told: list[Any] = []

    class Queue:
        def put(self, ticket: Any) -> None:
            told.append(ticket)
            if len(told) == 1:
                raise MemoryError

    ticket = inside(machine).await_applied(5, Queue(), None, False)
    end(machine)
    assert told == [ticket, ticket]
    assert not ticket.is_applied


# ---- threads that nobody waits for -------------------------------------------------------------------------


@pytest.mark.parametrize(("of", "name"), [(FastStateMachine, "_compact_by_itself"), (Policy, "renew")])
def test_an_automatic_compaction_that_finds_no_memory_is_tried_again(
    of: Any, name: str, directory: Path, machine_at: Opener, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither a thread that could not begin, nor one that could not end, is the machine's last compaction."""
    machine = machine_at(directory, retain_entries=0, compact_floor=20_000, compact_ratio=0.0)
    calls = fail_first(monkeypatch, of, name)
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)  # told of the error that ended the thread
    index = 0
    deadline = time.monotonic() + PATIENCE
    while len(calls) < 3 and time.monotonic() < deadline:
        index += 1
        machine.apply([(index, 1, fastsm.put(b"key", bytes(5_000)))])
        while inside(machine).is_called_for() and time.monotonic() < deadline:
            time.sleep(0.001)
    assert len(calls) >= 3


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, PermissionError])
def test_no_failure_to_start_a_thread_reaches_apply(
    error: type[Exception], directory: Path, machine_at: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunk is applied, whatever an audit hook, say, raises about the thread that is to compact or to sort."""
    machine = machine_at(directory, retain_entries=0, compact_floor=0, compact_ratio=0.0, ordered=True)
    calls: list[Any] = []

    def refuse(*arguments: Any) -> None:
        calls.append(arguments)
        raise error

    monkeypatch.setattr(engine, "start_new_thread", refuse)
    for index in range(1, 5):
        keys = [b"%d" % (number * index) for number in range(5_000)]
        assert machine.apply([(index, 1, fastsm.put_many(keys, keys))]) == [True]
    assert len(calls) >= 2


@pytest.fixture
def unverified(directory: Path) -> Path:
    """A directory with a base, which the next opening verifies in the background."""
    with FastStateMachine(directory, retain_entries=0) as machine:
        machine.apply([(index, 1, fastsm.put(b"%d" % index, bytes(100))) for index in range(1, 10)])
        machine.compact()
    return directory


@pytest.mark.parametrize(("of", "name"), [(Verification, "run"), (BackgroundVerification, "_run")])
def test_a_verification_that_finds_no_memory_is_no_damage(
    of: Any, name: str, unverified: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The machine works, is not verified, and is closed; a snapshot verifies its bytes first."""
    for verifies in (False, True):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "fastsm"):
            calls = fail_first(patch, of, name)
            with FastStateMachine(unverified) as machine:
                deadline = time.monotonic() + PATIENCE
                while not calls and time.monotonic() < deadline:
                    time.sleep(0.001)
                assert machine.get(b"1") == bytes(100)
                assert not machine.stats().verified
                if verifies:
                    assert machine.state_checksum()[0] == LogId(9, 1)
                    assert machine.stats().verified
    assert ("for lack of memory" in caplog.text) == (name == "run")
