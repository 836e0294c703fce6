"""Coroutines: their order, what blocks what, cancellation, and the effect of a failure on chunks queued later."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

import fastsm
from fastsm import CommandError, Entry, FastStateMachine, LogId, NotRunningError, OrderError, StorageError
from fastsm.core.coroutine_order import Waiters
from support.faulty import PATIENCE, Disk, in_thread
from support.inside import inside

Opener = Callable[..., FastStateMachine]
LARGE = 100 << 10  # bytes of a value that make a chunk too large for the event loop


def put(index: int, size: int = 10, term: int = 1) -> list[Entry]:
    """Return a chunk of one put."""
    return [Entry(index, term, fastsm.put(b"key-%d" % index, b"v" * size))]


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; one that hangs fails."""
    asyncio.run(asyncio.wait_for(main, PATIENCE))


async def called(wait: Callable[[], None]) -> None:
    """Wait for something on another thread, off the event loop."""
    await asyncio.get_running_loop().run_in_executor(None, wait)


async def a_moment() -> None:
    """Let every task run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


# ---- each does what its twin does --------------------------------------------------------------------------


def test_coroutines_do_what_their_twins_do(directory: Path, machine_at: Opener) -> None:
    """apply_chunk, flush_async and reset do what the plain methods do, with small and large chunks."""
    machine = machine_at(directory)

    async def main() -> None:
        assert await machine.apply_chunk(put(1)) == [True]
        assert await machine.apply_chunk([*put(1), *put(2, LARGE)]) == [None, True]
        assert await machine.apply_chunk([]) == []
        assert machine.durable() == LogId(0, 0)
        await machine.flush_async()
        assert machine.durable() == LogId(2, 1)
        await machine.reset()
        assert (machine.last_applied(), machine.len()) == (LogId(0, 0), 0)
        assert await machine.apply_chunk(put(1)) == [True]

    run(main())


@pytest.mark.parametrize("size", [10, LARGE])
def test_errors_are_those_of_the_twins(size: int, directory: Path, machine_at: Opener) -> None:
    """Wrong chunks raise where they are awaited, whether applied on the event loop or not, and the next one works."""
    machine = machine_at(directory)

    async def main() -> None:
        for wrong, error in (
            (put(2, size), OrderError),
            ([*put(1, size), Entry(2, 1, b"")], CommandError),
            ([*put(1, size), None], TypeError),
        ):
            with pytest.raises(error):
                await machine.apply_chunk(wrong)
            assert machine.last_applied() == LogId(0, 0)
        assert await machine.apply_chunk(put(1, size)) == [True]

    run(main())


def test_coroutines_work_from_several_event_loops(directory: Path, machine_at: Opener) -> None:
    """A machine is not bound to an event loop: several may use it, one after another or at the same time."""
    machine = machine_at(directory, contiguous=False)
    for index in range(1, 4):
        run(_apply(machine, put(index, LARGE)))
    loops = threading.Barrier(2)

    async def meet(size: int) -> list[bool | None]:
        loops.wait()
        return await machine.apply_chunk(put(9, size))

    with in_thread(lambda: asyncio.run(meet(LARGE))) as other:
        here = asyncio.run(meet(LARGE + 1))
    assert sorted([here, other.value], key=str) == [[None], [True]]  # one was first, for the other it is a replay
    assert machine.last_applied() == LogId(9, 1)


async def _apply(machine: FastStateMachine, chunk: list[Entry]) -> None:
    assert await machine.apply_chunk(chunk) == [True] * len(chunk)


# ---- order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", ["flush", "apply"])
def test_chunks_are_applied_in_the_order_in_which_their_tasks_start(
    sync: str, directory: Path, machine_at: Opener
) -> None:
    """Small chunks do not overtake large ones that are queued, nor a reset that is."""
    machine = machine_at(directory, sync=sync)

    async def main() -> None:
        tasks = [machine.apply_chunk(put(index, LARGE if index % 3 == 1 else 10)) for index in range(1, 31)]
        assert await asyncio.gather(*tasks) == [[True]] * 30
        first = asyncio.create_task(machine.apply_chunk(put(31, LARGE)))
        second = asyncio.create_task(machine.reset())
        third = asyncio.create_task(machine.apply_chunk(put(1, 20)))
        fourth = asyncio.create_task(machine.apply_chunk(put(2, LARGE)))
        await asyncio.gather(first, second, third, fourth)
        assert machine.last_applied() == LogId(2, 1)
        assert machine.get(b"key-1") == b"v" * 20

    run(main())


def test_plain_calls_take_their_place_after_queued_ones(directory: Path, machine_at: Opener) -> None:
    """An update_last_applied on the loop comes after the chunks whose tasks have started."""
    machine = machine_at(directory)

    async def main() -> None:
        tasks = [asyncio.create_task(machine.apply_chunk(put(index, LARGE))) for index in range(1, 6)]
        await a_moment()
        machine.update_last_applied(LogId(6, 2))
        assert machine.last_applied() == LogId(6, 2)
        assert await asyncio.gather(*tasks) == [[True]] * 5
        assert machine.apply([Entry(7, 2, fastsm.noop())]) == [True]

    run(main())


# ---- who waits for whom -------------------------------------------------------------------------------------


def test_flush_async_does_not_hold_up_applies(directory: Path, machine_at: Opener) -> None:
    """During a sync a thousand chunks are applied and read, and the loop stays free."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)

    async def main() -> None:
        await machine.apply_chunk(put(1))
        gate = disk.hold("sync")
        flush = asyncio.create_task(machine.flush_async())
        await called(gate.wait)
        for index in range(2, 1002):
            assert await machine.apply_chunk(put(index, LARGE if index % 200 == 0 else 10)) == [True]
            assert machine.get(b"key-%d" % index) is not None
        assert not flush.done()
        assert machine.durable() == LogId(0, 0)
        gate.open()
        await flush
        assert machine.durable() == LogId(1, 1)

    run(main())


def test_flush_async_fixes_its_point_when_it_starts(directory: Path, machine_at: Opener) -> None:
    """What was applied before its task ran is durable when it returns, including ids without a command."""
    machine = machine_at(directory)

    async def main() -> None:
        for index in range(1, 20):
            await machine.apply_chunk(put(3 * index))
            machine.update_last_applied(LogId(3 * index + 1, 1))
            flush = asyncio.create_task(machine.flush_async())
            await asyncio.sleep(0)
            await machine.apply_chunk(put(3 * index + 2))
            await flush
            assert machine.durable() >= LogId(3 * index + 1, 1)

    machine.update_last_applied(LogId(2, 1))
    run(main())


def test_overlapping_flushes_of_coroutines_share_a_sync(directory: Path, machine_at: Opener) -> None:
    """A hundred tasks that flush cost two syncs: the running one, and one for all others."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)

    async def main() -> None:
        await machine.apply_chunk(put(1))
        disk.forget()
        gate = disk.hold("sync")
        first = asyncio.create_task(machine.flush_async())
        await called(gate.wait)
        await machine.apply_chunk(put(2))
        others = [asyncio.create_task(machine.flush_async()) for _ in range(100)]
        await a_moment()
        gate.open()
        await asyncio.gather(first, *others)
        assert machine.durable() == LogId(2, 1)
        assert disk.count("sync") == 2

    run(main())


def test_large_chunk_does_not_block_the_loop(directory: Path, machine_at: Opener) -> None:
    """While the write of a large chunk is held up, other tasks run, and reads show the state before it."""
    disk = Disk(stores=False)
    machine = machine_at(directory, _files=disk.files)

    async def main() -> None:
        gate = disk.hold("write")
        task = asyncio.create_task(machine.apply_chunk(put(1, LARGE)))
        await called(gate.wait)
        assert machine.get(b"key-1") is None
        await a_moment()
        assert not task.done()
        gate.open()
        assert await task == [True]

    run(main())


def ends_at_once(coroutine: Coroutine[Any, Any, Any]) -> bool:
    """Return whether a coroutine ends without waiting; one that waits is closed."""
    try:
        coroutine.send(None)
    except StopIteration:
        return True
    coroutine.close()
    return False


def test_small_chunk_runs_inline(directory: Path, machine_at: Opener) -> None:
    """With nothing queued, sync="flush" and prepared pages, a small chunk is applied on the event loop's thread."""
    machine = machine_at(directory)

    async def main() -> None:
        await machine.apply_chunk(put(1))  # on the worker's thread, which prepares pages
        assert ends_at_once(machine.apply_chunk(put(2)))
        assert machine.last_applied() == LogId(2, 1)
        await machine.apply_chunk(put(3, LARGE))
        assert not ends_at_once(machine.apply_chunk(put(4, LARGE)))
        await machine.wait_applied_async(4)  # the chunk itself is not awaited

    if machine.apply(put(1)) and inside(machine).log.has_room(100):
        machine.clear()
        run(main())
    else:
        pytest.skip("this file system has no pages that can be prepared")


def test_where_no_pages_can_be_prepared_no_chunk_runs_on_the_loop(directory: Path, machine_at: Opener) -> None:
    """Writing to the file could block, so the worker thread does it."""
    machine = machine_at(directory, _files=Disk(stores=False).files)

    async def main() -> None:
        await machine.apply_chunk(put(1))
        assert not ends_at_once(machine.apply_chunk(put(2)))

    run(main())


def test_sync_on_apply_does_not_block_the_loop(directory: Path, machine_at: Opener) -> None:
    """With sync="apply" even a small chunk waits for its sync off the event loop."""
    disk = Disk()
    machine = machine_at(directory, sync="apply", _files=disk.files)

    async def main() -> None:
        gate = disk.hold("sync")
        task = asyncio.create_task(machine.apply_chunk(put(1)))
        await called(gate.wait)
        assert machine.last_applied() == LogId(0, 0)
        gate.open()
        assert await task == [True]
        assert machine.durable() == LogId(1, 1)

    run(main())


# ---- cancellation -------------------------------------------------------------------------------------------


def test_cancelled_chunk_that_has_begun_goes_on(directory: Path, machine_at: Opener) -> None:
    """The await ends immediately, the work does not: last_applied tells."""
    disk = Disk(stores=False)
    machine = machine_at(directory, _files=disk.files)

    async def main() -> None:
        gate = disk.hold("write")
        task = asyncio.create_task(machine.apply_chunk(put(1, LARGE)))
        await called(gate.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert machine.last_applied() == LogId(0, 0)
        gate.open()
        assert await machine.apply_chunk(put(2, LARGE)) == [True]
        assert machine.last_applied() == LogId(2, 1)
        assert machine.get(b"key-1") == b"v" * LARGE

    run(main())


def test_cancelled_chunk_that_has_not_begun_is_dropped(directory: Path, machine_at: Opener) -> None:
    """A cancelled chunk that is queued after another one is never applied, and its place is passed on."""
    disk = Disk(stores=False)
    machine = machine_at(directory, _files=disk.files)

    async def main() -> None:
        gate = disk.hold("write")
        first = asyncio.create_task(machine.apply_chunk(put(1, LARGE)))
        await called(gate.wait)
        second = asyncio.create_task(machine.apply_chunk(put(2, LARGE)))
        reset = asyncio.create_task(machine.reset())
        await a_moment()
        second.cancel()
        reset.cancel()
        await a_moment()
        gate.open()
        assert await first == [True]
        assert await machine.apply_chunk(put(2, 30)) == [True]
        assert machine.get(b"key-2") == b"v" * 30
        assert machine.get(b"key-1") == b"v" * LARGE

    run(main())


def test_cancelled_flush_goes_on(directory: Path, machine_at: Opener) -> None:
    """A running sync is not stopped when its caller stops waiting."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)

    async def main() -> None:
        await machine.apply_chunk(put(1))
        gate = disk.hold("sync")
        flush = asyncio.create_task(machine.flush_async())
        await called(gate.wait)
        flush.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flush
        gate.open()
        await machine.flush_async()
        assert machine.durable() == LogId(1, 1)

    run(main())


# ---- failures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 100])
def test_chunks_queued_after_one_that_failed_fail_too(count: int, directory: Path, machine_at: Opener) -> None:
    """Chunks queued after a failed one fail with OrderError, whose cause is that failure."""
    disk = Disk(stores=False)
    machine = machine_at(directory, contiguous=False, _files=disk.files)

    async def main() -> None:
        gate = disk.hold("write")
        first = asyncio.create_task(machine.apply_chunk(put(1, LARGE)))
        await called(gate.wait)
        failing = asyncio.create_task(machine.apply_chunk([*put(2, LARGE), Entry(3, 1, b"")]))
        after = [asyncio.create_task(machine.apply_chunk(put(index))) for index in range(4, 4 + count)]
        await a_moment()
        gate.open()
        results = await asyncio.gather(first, failing, *after, return_exceptions=True)
        assert results[0] == [True]
        assert isinstance(results[1], CommandError)
        assert [type(result) for result in results[2:]] == [OrderError] * count
        assert all(result.__cause__ is results[1] for result in results[2:])
        assert machine.last_applied() == LogId(1, 1)

    run(main())


@pytest.mark.parametrize("size", [10, LARGE])
def test_next_chunk_after_the_failure_was_seen_works(size: int, directory: Path, machine_at: Opener) -> None:
    """A caller that has seen the failure can send the next chunk."""
    machine = machine_at(directory)

    async def main() -> None:
        with pytest.raises(OrderError):
            await machine.apply_chunk(put(5, LARGE))
        assert await machine.apply_chunk(put(1, size)) == [True]

    run(main())


def test_failure_that_no_caller_sees_does_not_last(directory: Path, machine_at: Opener) -> None:
    """If the caller of a failed chunk was cancelled, chunks queued after it fail, and later ones work."""
    disk = Disk(stores=False)
    machine = machine_at(directory, contiguous=False, _files=disk.files)

    async def main() -> None:
        gate = disk.hold("write")
        disk.fail("write")
        failing = asyncio.create_task(machine.apply_chunk(put(1, LARGE)))
        await called(gate.wait)
        after = asyncio.create_task(machine.apply_chunk(put(2, LARGE)))
        await a_moment()
        failing.cancel()
        await a_moment()
        gate.open()
        with pytest.raises(OrderError) as caught:
            await after
        assert isinstance(caught.value.__cause__, StorageError)
        assert machine.last_applied() == LogId(0, 0)
        assert await machine.apply_chunk(put(3, LARGE)) == [True]
        assert await machine.apply_chunk(put(4)) == [True]

    run(main())


def test_reset_after_a_failure_is_done(directory: Path, machine_at: Opener) -> None:
    """A reset does not depend on anything before it."""
    disk = Disk(stores=False)
    machine = machine_at(directory, _files=disk.files)

    async def main() -> None:
        gate = disk.hold("write")
        first = asyncio.create_task(machine.apply_chunk(put(1, LARGE)))
        await called(gate.wait)
        failing = asyncio.create_task(machine.apply_chunk(put(9, LARGE)))
        reset = asyncio.create_task(machine.reset())
        await a_moment()
        gate.open()
        results = await asyncio.gather(first, failing, reset, return_exceptions=True)
        assert [type(result) for result in results] == [list, OrderError, type(None)]
        assert (machine.len(), machine.last_applied()) == (0, LogId(0, 0))

    run(main())


def test_failed_sync_is_seen_by_all_who_await(directory: Path, machine_at: Opener) -> None:
    """flush_async raises the StorageError, and so do later calls."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)

    async def main() -> None:
        await machine.apply_chunk(put(1))
        disk.fail("sync")
        for call in (machine.flush_async(), machine.flush_async(), machine.apply_chunk(put(2)), machine.reset()):
            with pytest.raises(StorageError):
                await call
        assert machine.get(b"key-1") == b"v" * 10

    run(main())
    with pytest.raises(StorageError):
        machine.close()


# ---- stop and close -------------------------------------------------------------------------------------------


def test_close_ends_what_is_queued_first(directory: Path, machine_at: Opener) -> None:
    """What was queued before close is applied and durable; later calls are refused; no thread remains."""
    machine = machine_at(directory)

    async def main() -> None:
        tasks = [asyncio.create_task(machine.apply_chunk(put(index, LARGE))) for index in range(1, 8)]
        flush = asyncio.create_task(machine.flush_async())
        await a_moment()
        await called(machine.close)
        assert await asyncio.gather(*tasks) == [[True]] * 7
        await flush
        for call in (machine.apply_chunk(put(8)), machine.apply_chunk(put(8, LARGE)), machine.reset()):
            with pytest.raises(NotRunningError):
                await call

    run(main())
    for thread in (inside(inside(machine).worker).thread, inside(inside(machine).waiters).thread):
        assert thread is not None
        assert thread.wait(0)
    with machine_at(directory) as reopened:
        assert reopened.last_applied() == LogId(7, 1)


def test_loop_that_is_gone_does_not_stop_what_has_begun(directory: Path, machine_at: Opener) -> None:
    """A machine still works after a loop was closed with tasks on it."""
    disk = Disk(stores=False)
    machine = machine_at(directory, _files=disk.files)
    gate = disk.hold("write")

    async def main() -> None:
        task = asyncio.create_task(machine.apply_chunk(put(1, LARGE)))
        await called(gate.wait)
        task.cancel()

    run(main())
    gate.open()
    assert machine.apply(put(2)) == [True]
    assert machine.get_many([b"key-1", b"key-2"]) == [b"v" * LARGE, b"v" * 10]


def test_a_flush_that_comes_while_the_machine_is_closed_is_told(directory: Path, machine_at: Opener) -> None:
    """A flush during the sync of a close raises `NotRunningError` instead of waiting for ever."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)

    async def main() -> None:
        await machine.apply_chunk(put(1))
        await machine.flush_async()
        await machine.apply_chunk(put(2))
        gate = disk.hold("sync")
        with in_thread(machine.close):
            await called(gate.wait)
            try:
                with pytest.raises(NotRunningError):
                    await asyncio.wait_for(machine.flush_async(), PATIENCE / 2)
            finally:
                gate.open()

    run(main())


def test_a_flush_whose_signal_handler_closes_the_machine_is_told() -> None:
    """A flush raises if a signal handler closes the machine just before the flush is queued."""
    waiters = Waiters()

    class Interrupted(SimpleQueue[Any]):
        def put(self, item: Any, *_: Any, **__: Any) -> None:
            if item is not None:
                waiters.close()
            super().put(item)

    vars(waiters)["_queue"] = Interrupted()
    with pytest.raises(NotRunningError):
        run(waiters.flush(lambda _: None, None))
