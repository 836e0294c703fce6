"""How long the event loop stands still while fastsm works on a slow disk: `python -m bench.event_loop [seconds]`.

A task that does nothing but sleep measures how late it wakes up, while chunks are applied and flushed, and a
compaction, a snapshot and a reset run. Each call of the seam to the system takes as long as on a bad disk. What is left
is the interpreter's own switching between threads (5 ms a time, `sys.getswitchinterval()`).
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import fastsm
from fastsm.disk.files import Directory

SYNC_SECONDS, WRITE_SECONDS = 0.1, 0.02


class SlowDisk(Directory):
    """The seam to the system, on a disk that takes its time."""

    @staticmethod
    def sync(fd: Any) -> None:
        time.sleep(SYNC_SECONDS)
        Directory.sync(fd)

    @staticmethod
    def write(fd: Any, data: Any, offset: int) -> None:
        time.sleep(WRITE_SECONDS)
        Directory.write(fd, data, offset)

    def allocate(self, *arguments: Any) -> None:
        time.sleep(WRITE_SECONDS)
        super().allocate(*arguments)


async def longest_delay(seconds: float, work: Callable[[], Awaitable[object]]) -> tuple[float, int]:
    """The longest time that the loop stood still, in ms, while ``work`` ran again and again; and how often it ran."""
    longest, rounds, ended = 0.0, 0, False

    async def watch() -> None:
        nonlocal longest
        while not ended:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - before - 0.001)

    watching = asyncio.ensure_future(watch())
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        await work()
        await asyncio.sleep(0)  # work that is done at once lets nobody else run
        rounds += 1
    ended = True
    await watching
    return longest * 1000, rounds


async def main(root: Path, seconds: float) -> None:
    async with fastsm.FastStateMachine.open_async(root / "state", retain_entries=0, _files=SlowDisk) as machine:
        value = bytes(100)

        async def apply() -> None:
            index = machine.last_applied().index + 1
            await machine.apply_chunk([(index, 1, fastsm.put(b"key-%d" % (index % 1000), value))])

        async def apply_and_flush() -> None:
            for _ in range(10):
                await apply()
                await asyncio.sleep(0)
            await machine.flush_async()

        async def with_many(other: Callable[[], Awaitable[object]]) -> None:
            task = asyncio.ensure_future(other())
            while not task.done():
                await apply()
                await asyncio.sleep(0)
            await task

        rows: dict[str, Callable[[], Awaitable[object]]] = {
            "nothing": lambda: asyncio.sleep(0.01),
            "apply_chunk": apply,
            "10 x apply_chunk, flush_async": apply_and_flush,
            "apply_chunk during flush_async": lambda: with_many(machine.flush_async),
            "apply_chunk during compact_async": lambda: with_many(machine.compact_async),
            "apply_chunk during generate_snapshot_data": lambda: with_many(
                lambda: machine.generate_snapshot_data(root / "snapshot")),
            "apply_chunk during state_checksum_async": lambda: with_many(machine.state_checksum_async),
            "reset": machine.reset,
        }
        for name, work in rows.items():
            delay, rounds = await longest_delay(seconds, work)
            print(f"{name:45}  longest delay {delay:6.1f} ms in {rounds} rounds", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder), float(sys.argv[1]) if len(sys.argv) > 1 else 5))
