"""How long fastsm blocks the event loop while its disk is slow: `python -m bench.event_loop [seconds]`.

A task that only sleeps measures how late it wakes up while chunks are applied and flushed, and while a compaction, a
snapshot and a reset run. Each sync, write and allocation takes as long as on a bad disk. The delays that remain come
from the interpreter's switching between threads (5 ms each, `sys.getswitchinterval()`).
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
    """A directory on a slow disk: syncs, writes and allocations sleep first."""

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
    """Run ``work`` again and again; return the longest time that the loop was blocked, in ms, and the rounds."""
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
        await asyncio.sleep(0)  # work that never suspends would not let the watching task run
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
