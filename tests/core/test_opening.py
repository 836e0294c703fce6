"""Machines on event loops: opened, compacted, compared and closed without blocking the loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import FastStateMachine, LockedError, LogId, MemoryStateMachine, NotRunningError, SnapshotRangeError
from support.faulty import PATIENCE
from support.inside import inside

Opener = Callable[..., FastStateMachine]


def put(index: int, size: int = 10) -> tuple[int, int, bytes]:
    return index, 1, fastsm.put(b"key-%d" % index, b"v" * size)


def run(main: Any) -> Any:
    """Run a test's coroutine; one that hangs fails."""
    return asyncio.run(asyncio.wait_for(main, PATIENCE))


# ---- open and close ----------------------------------------------------------------------------------------


def test_open_async_can_be_awaited(directory: Path) -> None:
    """``open_async`` opens with the constructor's options, off the event loop's thread."""

    async def main() -> None:
        machine = await FastStateMachine.open_async(directory, contiguous=False)
        assert await machine.apply_chunk([put(5)]) == [True]
        await machine.close_async()
        await machine.close_async()
        with pytest.raises(NotRunningError):
            machine.get(b"key-5")

    run(main())


def test_open_async_can_be_entered(directory: Path) -> None:
    """The context closes the machine at the end, even if the block raises."""

    async def main() -> None:
        try:
            async with FastStateMachine.open_async(directory) as machine:
                await machine.apply_chunk([put(1)])
                raise KeyError
        except KeyError:
            assert not machine.is_running()
        async with FastStateMachine.open_async(directory) as machine:
            assert machine.get(b"key-1") == b"v" * 10

    run(main())


def test_a_machine_is_an_asynchronous_context_too(directory: Path) -> None:
    """`async with machine` closes it off the event loop."""

    async def main() -> None:
        threads = []
        machine = FastStateMachine(directory)
        release = inside(machine).release
        async with machine as entered:
            assert entered is machine
            inside(type(machine)).release = lambda self: (threads.append(threading.get_ident()), release())[1]
        assert threads != [threading.get_ident()]

    release = FastStateMachine._release
    try:
        run(main())
    finally:
        FastStateMachine._release = release


def test_an_opening_that_is_never_awaited_opens_nothing(directory: Path) -> None:
    """An opening that is never awaited makes no file, lock or warning; a second `await` of one is refused."""

    async def main() -> None:
        opening = FastStateMachine.open_async(directory)
        assert not directory.exists()
        machine = await opening
        with pytest.raises(RuntimeError, match="opened already"):
            await opening
        await machine.close_async()

    run(main())


def test_errors_of_the_constructor_come_where_it_is_awaited(directory: Path, machine_at: Opener) -> None:
    """A locked directory is a LockedError, wrong options are a ValueError."""
    machine_at(directory)

    async def main() -> None:
        with pytest.raises(LockedError):
            await FastStateMachine.open_async(directory)
        with pytest.raises(ValueError, match="sync"):
            async with FastStateMachine.open_async(directory, sync="never"):
                pass

    run(main())


@pytest.mark.parametrize("when", ["while it opens", "at the last moment"])
def test_a_cancelled_opening_leaves_no_lock(directory: Path, when: str) -> None:
    """A caller that cancels the wait gets no machine: it is closed as soon as it is open, and the directory is free."""
    gate, begun = threading.Event(), threading.Event()

    class Slow(FastStateMachine):
        def __init__(self, *args: Any, **options: Any) -> None:
            begun.set()
            assert gate.wait(PATIENCE)
            super().__init__(*args, **options)

    async def main() -> None:
        task = asyncio.ensure_future(inside(Slow.open_async(directory)).opened())
        while not begun.is_set():
            await asyncio.sleep(0)
        if when == "while it opens":
            task.cancel()
            await asyncio.sleep(0)
            gate.set()
        else:
            future = task._fut_waiter  # type: ignore[attr-defined]
            gate.set()
            while not future.done():
                await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    with FastStateMachine(directory, lock_timeout=PATIENCE) as machine:
        assert machine.is_running()


def test_close_async_goes_on_when_its_wait_is_cancelled(directory: Path) -> None:
    """Work that has begun is not stopped by a cancelled wait."""

    async def main() -> None:
        machine = FastStateMachine(directory)
        machine.apply([put(1)])
        task = asyncio.ensure_future(machine.close_async())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    with FastStateMachine(directory, lock_timeout=PATIENCE) as machine:
        assert machine.durable() == LogId(1, 1)


# ---- compact, snapshot, checksum -----------------------------------------------------------------------------


def test_compact_async_compacts(directory: Path, machine_at: Opener) -> None:
    """``compact_async`` has the effect, arguments and errors of ``compact``; progress is reported on another thread."""
    machine = machine_at(directory, retain_entries=0)
    machine.apply([put(1)])
    machine.apply([put(2)])
    threads: list[int] = []

    async def main() -> None:
        await machine.compact_async(1)
        assert machine.stats().base == LogId(1, 1)
        await machine.compact_async(LogId(2, 1), progress=lambda done, total: threads.append(threading.get_ident()))
        assert machine.stats().base == LogId(2, 1)
        with pytest.raises(SnapshotRangeError):
            await machine.compact_async(3)

    run(main())
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("kind", ["fast", "model"])
def test_generate_snapshot_data_takes_what_write_snapshot_takes(
    kind: str, tmp_path: Path, directory: Path, machine_at: Opener
) -> None:
    """``generate_snapshot_data`` takes an entry (by default the last one), an attachment, a codec, and progress."""
    machine = machine_at(directory) if kind == "fast" else MemoryStateMachine()
    machine.apply([put(1), put(2)])
    told: list[tuple[int, int]] = []

    async def main() -> None:
        checksum = await machine.generate_snapshot_data(
            tmp_path, attachment=b"theirs", compress="none", progress=lambda done, total: told.append((done, total)))
        with fastsm.open_snapshot(tmp_path) as snapshot:
            assert snapshot.metadata == machine.snapshot_metadata()
            assert (snapshot.metadata.checksum, snapshot.attachment) == (checksum, b"theirs")
            assert snapshot.metadata.last_included == LogId(2, 1)

    run(main())
    assert told


@pytest.mark.parametrize("kind", ["fast", "model"])
def test_state_checksum_is_that_of_a_snapshot(kind: str, tmp_path: Path, directory: Path, machine_at: Opener) -> None:
    """``state_checksum`` equals a snapshot's, as of any entry or gap; it writes no file and records no metadata."""
    machine = machine_at(directory, contiguous=False) if kind == "fast" else MemoryStateMachine(contiguous=False)
    machine.apply([put(1), put(2, 100_000), (3, 1, fastsm.config(b"nodes")), (4, 1, fastsm.delete(b"key-1"))])
    machine.apply([(9, 2, fastsm.put(b"key-2", b""))])
    sums = {}
    for wanted in (None, (9, 2), (7, 1), (4, 1), (2, 1), (1, 1)):
        sums[wanted] = machine.state_checksum(wanted)
        assert asyncio.run(machine.state_checksum_async(wanted)) == sums[wanted]
    assert machine.snapshot_metadata() is None
    for wanted, (log_id, checksum) in sums.items():
        machine.write_snapshot(tmp_path / str(wanted), wanted)
        with fastsm.open_snapshot(tmp_path / str(wanted)) as snapshot:
            assert (log_id, checksum) == (snapshot.metadata.last_included, snapshot.state_checksum)
    with pytest.raises(SnapshotRangeError):
        machine.state_checksum((10, 2))


def test_replicas_of_one_state_have_one_checksum(directory: Path, machine_at: Opener) -> None:
    """However chunks were split, after a compaction, and in the model, the checksum is the same."""
    machine, model = machine_at(directory, retain_entries=0), MemoryStateMachine()
    entries = [(index, 1, fastsm.put(b"key-%d" % (index % 7), b"%d" % index)) for index in range(1, 50)]
    model.apply(entries)
    for first in range(0, len(entries), 5):
        machine.apply(entries[first : first + 5])
    assert machine.state_checksum() == model.state_checksum()
    machine.compact()
    assert machine.state_checksum() == model.state_checksum()
