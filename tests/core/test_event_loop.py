"""The event loop never waits for the disk: its thread makes no system calls for files."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import FastStateMachine, LogId
from fastsm.disk.files import Directory
from support.faulty import PATIENCE
from support.inside import inside

WATCHED = ("write", "sync", "truncate", "allocate", "rename", "unlink", "sync_directory", "start_writeback",
           "pace_writeback", "write_file", "create_file", "open_file", "names")  # fmt: skip


class Noting(Directory):
    """Records from which thread each call to the system is made."""

    calls: Counter[tuple[str, bool]]
    loop_thread = 0


def noted(name: str) -> Any:
    static = isinstance(Directory.__dict__[name], staticmethod)
    real = getattr(Directory, name)

    def call(*args: Any, **options: Any) -> Any:
        Noting.calls[name, threading.get_ident() == Noting.loop_thread] += 1
        return real(*args, **options)

    return staticmethod(call) if static else call


for _name in WATCHED:
    setattr(Noting, _name, noted(_name))


@pytest.fixture(autouse=True)
def _fresh_counts() -> None:
    Noting.calls = Counter()


def on_the_loop() -> list[str]:
    """Return the calls that were made on the event loop's thread."""
    return sorted(name for name, on_loop in Noting.calls if on_loop)


@pytest.mark.parametrize("flush_every", [1, 5, 1000])
@pytest.mark.parametrize("size", [10, 1000, 20_000])
def test_no_coroutine_asks_the_system_for_anything_on_the_event_loop(
    directory: Path, tmp_path: Path, flush_every: int, size: int
) -> None:
    """Chunks of all sizes, with rare and frequent flushes, snapshots, compactions, installs, a reset and a close."""

    async def main() -> None:
        Noting.loop_thread = threading.get_ident()
        async with FastStateMachine.open_async(directory, _files=Noting, retain_entries=0) as machine:
            for index in range(1, 400):
                await machine.apply_chunk([(index, 1, fastsm.put(b"key-%d" % (index % 50), b"v" * size))])
                if index % flush_every == 0:
                    await machine.flush_async()
                if index % 150 == 0:
                    await asyncio.gather(machine.compact_async(), machine.generate_snapshot_data(tmp_path))
            await machine.state_checksum_async()
            await machine.reset()
            await machine.apply_snapshot_from_file(None, tmp_path)
            assert machine.last_applied() == LogId(300, 1)
        assert Noting.calls["sync", False] > 0

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert on_the_loop() == []


def test_small_chunks_run_on_the_loop_where_pages_are_prepared(directory: Path) -> None:
    """With frequent flushes, and without any, most small chunks need no other thread."""

    async def main() -> dict[int, int]:
        on_loop = {}
        for flush_every in (5, 1000):
            with FastStateMachine(directory / str(flush_every)) as machine:
                real, count = inside(machine).worker.run, 0

                async def run(*args: Any, real: Any = real, **options: Any) -> Any:
                    nonlocal count
                    count += 1
                    return await real(*args, **options)

                inside(machine).worker.run = run  # type: ignore[method-assign]
                for index in range(1, 1001):
                    await machine.apply_chunk([(index, 1, fastsm.put(b"key", b"v" * 100))])
                    if index % flush_every == 0:
                        await machine.flush_async()
                on_loop[flush_every] = 1000 - count
        return on_loop

    directory.mkdir()
    for flush_every, count in asyncio.run(main()).items():
        assert count > 700, f"{count} of 1000 chunks ran on the loop, with a flush after each {flush_every}"
