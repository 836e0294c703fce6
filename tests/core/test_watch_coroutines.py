"""Watches on event loops: many at a time, cancelled, or on closed loops; nothing is lost."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastsm import CompactedError, FastStateMachine, MemoryStateMachine, NotRunningError, Reader, batch, put
from support.inside import inside
from support.other_tasks import counting

Opener = Callable[..., FastStateMachine]


def fill(machine: Any, *commands: bytes) -> None:
    first = machine.last_applied().index + 1
    machine.apply([(first + i, 1, command) for i, command in enumerate(commands)])


async def until_waiting(machine: FastStateMachine, count: int) -> None:
    while len(inside(machine).watchers) < count:
        await asyncio.sleep(0)


def test_reads_wait_for_changes(directory: Path, machine_at: Opener) -> None:
    """`read_async` returns what there is, or waits for it; `async for` continues until the machine is closed."""
    machine = machine_at(directory)

    async def main() -> None:
        watch = machine.watch()
        fill(machine, put(b"a", b"1"))
        assert [change.value for change in await watch.read_async()] == [b"1"]
        waiting = asyncio.ensure_future(watch.read_async())
        await until_waiting(machine, 1)
        fill(machine, batch([put(b"a", b"2"), put(b"a", b"3")]))
        assert [change.value for change in await waiting] == [b"2", b"3"]
        assert await watch.read_async(timeout=0) == []
        assert await watch.read_async(timeout=0.01) == []
        assert await watch.read_async(0) == []

        async def follow() -> list[bytes | None]:
            return [change.value async for change in watch]

        following = asyncio.ensure_future(follow())
        for value in (b"4", b"5"):
            await until_waiting(machine, 1)
            fill(machine, put(b"a", value))
            await asyncio.sleep(0)
        await until_waiting(machine, 1)
        await machine.close_async()
        assert await following == [b"4", b"5"]

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["machine", "model", "reader"])
def test_other_tasks_run_while_there_is_always_something_to_tell(
    directory: Path, machine_at: Opener, kind: str
) -> None:
    """A loop over changes that never has to wait, and one that polls, lets other tasks run every now and then."""
    machine: Any = MemoryStateMachine() if kind == "model" else machine_at(directory)
    fill(machine, *[put(b"%d" % i, b"") for i in range(1500)])
    source = Reader(directory) if kind == "reader" else machine

    async def main() -> None:
        turns = [0]
        watch = source.watch(start=1)
        told = 0
        async with counting(turns):
            before = turns[0]
            async for _change in watch:
                told += 1
                if told == 800:
                    break
            assert turns[0] > before
            before = turns[0]
            for _ in range(800):
                told += len(await watch.read_async(1, timeout=0))
            assert turns[0] > before
        assert told == 1500

    asyncio.run(main())
    if source is not machine:
        source.close()


def test_the_model_waits_too() -> None:
    """The model's coroutines are woken by entries that other tasks apply."""
    machine = MemoryStateMachine()

    async def main() -> None:
        watch = machine.watch(b"a")
        waiting = asyncio.ensure_future(watch.read_async())
        await asyncio.sleep(0)
        fill(machine, put(b"b", b""))
        await asyncio.sleep(0)
        fill(machine, put(b"a", b"1"))
        assert len(await waiting) == 1
        assert await watch.read_async(timeout=0.01) == []
        waiting = asyncio.ensure_future(watch.read_async())
        await asyncio.sleep(0)
        machine.clear()
        with pytest.raises(CompactedError):
            await waiting

    asyncio.run(main())


@pytest.mark.parametrize("timeout", [0.001, 60.0])
def test_the_model_forgets_loops_that_are_over(timeout: float) -> None:
    """A reader that waited there, or was told immediately, is not told again, so a later write is not disturbed."""
    machine = MemoryStateMachine()
    fill(machine, put(b"a", b"0"))
    watch = machine.watch(start=1 if timeout > 1 else None)
    asyncio.run(watch.read_async(timeout=timeout))
    fill(machine, put(b"a", b"1"))
    assert [change.value for change in watch.read(timeout=float("inf"))] == [b"1"]


def test_an_abandoned_loop_does_not_disturb_the_model() -> None:
    """A task that its loop abandoned is not told, while others are."""
    machine = MemoryStateMachine()
    other = machine.watch()
    loop = asyncio.new_event_loop()
    task = loop.create_task(machine.watch().read_async())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    fill(machine, put(b"a", b"1"))
    assert len(other.read()) == 1
    del task
    gc.collect()


def test_the_rest_of_a_long_entry_is_passed_in_pieces(directory: Path, machine_at: Opener) -> None:
    """A read that takes an entry's first change does not block the event loop while it looks for a second one."""
    machine = machine_at(directory)
    fill(machine, batch([put(b"a", b""), *(put(b"x%d" % i, bytes(1 << 20)) for i in range(12))]))

    async def main() -> int:
        turns = 0
        reading = asyncio.ensure_future(machine.watch(b"a", start=1).read_async(1))
        while not reading.done():
            turns += 1
            await asyncio.sleep(0)
        assert len(await reading) == 1
        return turns

    assert asyncio.run(main()) > 5


def test_a_cancelled_read_loses_nothing(directory: Path, machine_at: Opener) -> None:
    """Cancelled while it waits, when it was just told, or within a long read: the next read returns everything."""
    machine = machine_at(directory)

    async def main() -> None:
        watch = machine.watch()
        for told in (False, True):
            waiting = asyncio.ensure_future(watch.read_async())
            await until_waiting(machine, 1)
            if told:
                fill(machine, put(b"a", b"1"))
                while len(inside(machine).watchers):
                    await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert len(inside(machine).watchers) == 0
        fill(machine, *(put(b"%d" % i, b"v" * 400) for i in range(20_000)))
        long = asyncio.ensure_future(watch.read_async(10**6, max_bytes=1 << 30))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not long.done()
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        assert len(await watch.read_async(10**6, max_bytes=1 << 30)) == 20_001

    asyncio.run(main())


def test_a_loop_that_was_closed_is_forgotten(directory: Path, machine_at: Opener) -> None:
    """A task that its loop abandoned is not told, while others are."""
    machine = machine_at(directory)
    watch, other = machine.watch(), machine.watch()
    loop = asyncio.new_event_loop()
    task = loop.create_task(watch.read_async())
    loop.run_until_complete(until_waiting(machine, 1))
    loop.close()

    async def main() -> None:
        waiting = asyncio.ensure_future(other.read_async())
        await until_waiting(machine, 2)
        fill(machine, put(b"a", b"1"))
        assert len(await waiting) == 1

    asyncio.run(main())
    assert len(inside(machine).watchers) == 0
    with pytest.raises(RuntimeError):
        watch.read(timeout=0)  # it is being read, by that task
    gone = weakref.ref(task)
    del task
    while gone() is not None:  # the thread that told may hold it for another moment
        gc.collect()
    assert len(watch.read(timeout=0)) == 1


@pytest.mark.parametrize("how", ["reset", "stop", "close", "close the watch"])
def test_a_read_that_waits_hears_of_the_end(how: str, directory: Path, machine_at: Opener) -> None:
    """A waiting read is ended by a reset, stop or close, with the error that a read on a thread would raise."""
    machine = machine_at(directory)

    async def main() -> None:
        watch = machine.watch()
        waiting = asyncio.ensure_future(watch.read_async())
        await until_waiting(machine, 1)
        if how == "close the watch":
            watch.close()
        else:
            {"reset": machine.clear, "stop": machine.stop, "close": machine.close}[how]()
        with pytest.raises(CompactedError if how == "reset" else NotRunningError):
            await waiting

    asyncio.run(main())


def test_very_many_wait_at_once(directory: Path, machine_at: Opener) -> None:
    """A thousand watches of unwritten prefixes are not woken; one whose prefix is written is."""
    machine = machine_at(directory)

    async def main() -> None:
        tasks = [asyncio.ensure_future(machine.watch(b"idle-%d/" % i).read_async()) for i in range(1000)]
        await until_waiting(machine, 1000)
        for i in range(100):
            fill(machine, put(b"busy-%d" % i, b""))
        fill(machine, put(b"idle-500/", b"now"))
        assert [change.value for change in await tasks[500]] == [b"now"]
        assert len(inside(machine).watchers) == 999
        assert sum(task.done() for task in tasks) == 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(inside(machine).watchers) == 0

    asyncio.run(main())


def test_a_second_task_is_refused(directory: Path, machine_at: Opener) -> None:
    """A second task that reads the same watch is refused."""
    machine = machine_at(directory)

    async def main() -> None:
        watch = machine.watch()
        waiting = asyncio.ensure_future(watch.read_async())
        await until_waiting(machine, 1)
        with pytest.raises(RuntimeError, match="being read already"):
            await watch.read_async()
        fill(machine, put(b"a", b""))
        assert len(await waiting) == 1

    asyncio.run(main())
