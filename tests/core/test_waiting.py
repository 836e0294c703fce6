"""Waiting until an entry is applied: on threads and event loops, and everything that ends the wait."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastsm
from fastsm import (
    FastStateMachine,
    LogId,
    MemoryStateMachine,
    NotRunningError,
    OrderError,
    ReadOnlyError,
    ReentryError,
    StorageError,
)
from support.faulty import PATIENCE, Disk, memory_directory
from support.inside import inside

Opener = Callable[..., FastStateMachine]
Machine = Any


@pytest.fixture(params=["fast", "model"])
def machine(request: pytest.FixtureRequest, directory: Path, machine_at: Opener) -> Machine:
    """The machine and its model: both wait alike."""
    return machine_at(directory) if request.param == "fast" else MemoryStateMachine()


def put(index: int, term: int = 1) -> tuple[int, int, bytes]:
    return index, term, fastsm.put(b"key", b"%d" % index)


def started(function: Callable[[], object]) -> threading.Thread:
    """Start a thread that runs a function."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def waiters(machine: Machine) -> int:
    """Return how many callers are waiting."""
    if isinstance(machine, MemoryStateMachine):
        return len(inside(machine).waiters.waiting)
    return int(inside(machine).waiting_for_entries())


def until_waiting(machine: Machine, count: int = 1) -> None:
    """Return once ``count`` callers are waiting."""
    deadline = time.monotonic() + PATIENCE
    while waiters(machine) < count and time.monotonic() < deadline:
        threading.Event().wait(0.001)


# ---- applied --------------------------------------------------------------------------------------------


def test_an_applied_entry_is_not_waited_for(machine: Machine) -> None:
    """Index 0, and every index up to last applied, return immediately, even with a timeout of 0."""
    machine.apply([put(1), put(2)])
    for index in range(3):
        machine.wait_applied(index)
        machine.wait_applied(index, timeout=0)
        asyncio.run(machine.wait_applied_async(index))


@pytest.mark.parametrize("how", ["apply", "update_last_applied", "install_snapshot"])
def test_wait_applied_returns_when_the_entry_is_applied(machine: Machine, how: str, tmp_path: Path) -> None:
    """Any call that moves last applied past the index ends the wait, and reads then show the entry."""
    other = MemoryStateMachine()
    other.apply([put(1), put(2), put(3)])
    other.write_snapshot(tmp_path / "snapshot")
    seen = []
    thread = started(lambda: (machine.wait_applied(2), seen.append(machine.last_applied())))
    until_waiting(machine)
    machine.apply([put(1)])
    assert not seen
    assert waiters(machine) == 1
    {
        "apply": lambda: machine.apply([put(2), put(3)]),
        "update_last_applied": lambda: machine.update_last_applied(LogId(3, 1)),
        "install_snapshot": lambda: machine.install_snapshot(None, tmp_path / "snapshot"),
    }[how]()
    thread.join(PATIENCE)
    assert seen == [LogId(3, 1)]


def test_each_waiter_is_told_when_its_own_entry_is_applied(machine: Machine) -> None:
    """Concurrent waits for many indexes, in any order, end one after another as the entries come."""

    async def main() -> None:
        order: list[int] = []

        async def wait(index: int) -> None:
            await machine.wait_applied_async(index)
            order.append(index)

        tasks = [asyncio.ensure_future(wait(index)) for index in (3, 1, 5, 2, 4, 1)]
        while waiters(machine) < len(tasks):
            await asyncio.sleep(0)
        for index in range(1, 6):
            machine.apply([put(index)])
            while len(order) < index + 1:
                await asyncio.sleep(0)
        assert order == [1, 1, 2, 3, 4, 5]
        await asyncio.gather(*tasks)

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert waiters(machine) == 0


# ---- not applied ------------------------------------------------------------------------------------------


def test_a_timeout_is_a_timeout_error(machine: Machine) -> None:
    """TimeoutError names the entry; no wait remains; a negative timeout or NaN is a ValueError."""
    machine.apply([put(1)])
    for timeout in (0, 0.001):
        with pytest.raises(TimeoutError, match="entry 2"):
            machine.wait_applied(2, timeout)
    assert waiters(machine) == 0
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="timeout"):
            machine.wait_applied(2, wrong)


def waiting_for_seven(machine: Machine, kind: str) -> tuple[threading.Thread, list[BaseException]]:
    """Return a thread that waits for entry 7, itself or in a coroutine, and a list for what that wait raises."""
    found: list[BaseException] = []

    def wait() -> None:
        try:
            if kind == "thread":
                machine.wait_applied(7)
            else:
                asyncio.run(machine.wait_applied_async(7))
        except Exception as caught:
            found.append(caught)

    thread = started(wait)
    until_waiting(machine)
    return thread, found


@pytest.mark.parametrize(
    ("end", "error"),
    [("stop", NotRunningError), ("close", NotRunningError), ("clear", OrderError), ("install", OrderError)],
)
@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_a_wait_that_cannot_succeed_raises(
    machine: Machine, end: str, error: type[Exception], kind: str, tmp_path: Path
) -> None:
    """A stop or a close is a NotRunningError; a reset, or the install of an older state, an OrderError."""
    if end == "close" and isinstance(machine, MemoryStateMachine):
        pytest.skip("the model is not closed")
    machine.apply([put(1)])
    machine.write_snapshot(tmp_path / "snapshot")
    machine.apply([put(2)])
    thread, found = waiting_for_seven(machine, kind)
    if end == "install":
        machine.install_snapshot(None, tmp_path / "snapshot", allow_older=True)
    else:
        getattr(machine, end)()
    thread.join(PATIENCE)
    assert [type(one) for one in found] == [error]
    if end in ("stop", "close"):
        with pytest.raises(NotRunningError):
            machine.wait_applied(1)


def test_a_cancelled_wait_is_forgotten(machine: Machine) -> None:
    """A cancelled coroutine leaves no ticket, and the entry is applied as usual."""

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(machine.wait_applied_async(1), 0.01)
        assert waiters(machine) == 0
        machine.apply([put(1)])

    asyncio.run(main())


def test_a_poisoned_or_read_only_machine_says_so(directory: Path, machine_at: Opener) -> None:
    """If nothing can be applied, waiting for an entry would never end, so it raises."""
    machine_at(directory).close()
    with FastStateMachine(directory, read_only=True) as machine, pytest.raises(ReadOnlyError):
        machine.wait_applied(1)


def test_a_handler_that_outlasts_the_deadline_does_not_make_it_endless(machine: Machine) -> None:
    """The time of signal handlers that run during the wait counts: the timeout ends the wait after them."""
    ended = threading.Event()

    def handler(*_: object) -> None:
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:  # longer than the wait
            pass
        ended.set()

    before = signal.signal(signal.SIGUSR1, handler)
    main = threading.get_ident()
    thread = started(lambda: (until_waiting(machine), signal.pthread_kill(main, signal.SIGUSR1)))
    try:
        with pytest.raises(TimeoutError):
            machine.wait_applied(1, timeout=0.1)
    finally:
        thread.join(PATIENCE)
        signal.signal(signal.SIGUSR1, before)
    assert waiters(machine) == 0


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_a_failed_sync_ends_the_wait(directory: Path, machine_at: Opener, kind: str) -> None:
    """Once the machine is poisoned nothing will be applied, so waiting callers get the StorageError immediately."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.apply([put(1)])
    thread, found = waiting_for_seven(machine, kind)
    disk.fail("sync")
    with pytest.raises(StorageError):
        machine.flush()
    thread.join(PATIENCE)
    assert [type(one) for one in found] == [StorageError]
    with pytest.raises(StorageError):
        machine.wait_applied(7)
    with pytest.raises(StorageError):
        machine.close()


@given(st.lists(st.tuples(st.sampled_from(["wait", "cancel", "apply"]), st.integers(1, 30)), max_size=60))
def test_waiters_are_told_as_a_model_says(steps: list[tuple[str, int]]) -> None:
    """In any order of calls, those up to the applied index are told, by index and then by arrival."""
    with memory_directory() as root, FastStateMachine(root / "state", contiguous=False) as machine:
        engine = inside(machine)
        queue: SimpleQueue[Any] = SimpleQueue()
        model: list[tuple[int, int, Any]] = []
        for number, (step, index) in enumerate(steps):
            if step == "wait":
                ticket = engine.await_applied(index, queue, None, False)
                assert (ticket is None) == (index <= machine.last_applied().index)
                if ticket is not None:
                    model.append((index, number, ticket))
            elif step == "cancel" and model:
                engine.wait_no_more(model.pop(index % len(model))[2])
            elif step == "apply" and index > machine.last_applied().index:
                machine.update_last_applied((index, 1))
                told = sorted(one for one in model if one[0] <= index)
                model = [one for one in model if one[0] > index]
                assert [queue.get_nowait() for _ in told] == [one[2] for one in told]
            assert queue.empty()
            assert engine.waiting_for_entries() == len(model)


def test_a_handler_does_not_wait_for_the_apply_below_it(directory: Path, machine_at: Opener) -> None:
    """In the middle of its own thread's apply, a wait that only this apply could end is a ReentryError."""
    machine = machine_at(directory)
    found: list[type[BaseException]] = []

    def handler(*_: object) -> None:
        try:
            machine.wait_applied(1)
        except BaseException as error:
            found.append(type(error))

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with inside(machine).turns:
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert found == [ReentryError]


def test_a_machine_that_is_waited_for_in_a_loop_that_ended_goes_on(directory: Path, machine_at: Opener) -> None:
    """A wait that was abandoned with its event loop does no harm."""
    machine = machine_at(directory)

    async def leave() -> None:
        asyncio.ensure_future(machine.wait_applied_async(1))  # noqa: RUF006
        await asyncio.sleep(0)

    asyncio.run(leave())
    machine.apply([put(1)])
    asyncio.run(machine.wait_applied_async(1))


def test_thousands_wait_with_one_thread(directory: Path, machine_at: Opener) -> None:
    """Waiting does not need a thread per waiter."""
    machine = machine_at(directory)

    async def main() -> None:
        tasks = [asyncio.ensure_future(machine.wait_applied_async(index % 100 + 1)) for index in range(3000)]
        while waiters(machine) < len(tasks):
            await asyncio.sleep(0)
        before = threading.active_count()
        machine.apply([put(index) for index in range(1, 101)])
        await asyncio.gather(*tasks)
        assert threading.active_count() <= before

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
