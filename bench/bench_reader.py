"""Readers: a refresh with nothing new, reads, how soon another process sees an entry, opening, catching up."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import fastsm
from bench.data import fill, scaled

CALLS = scaled(200_000)
WAITS = scaled(1_000)
REPEATS = 5


def test_a_refresh_with_nothing_new(note: Any, machine_at: Any, keys: list[bytes], values: list[bytes]) -> None:
    """Note the time of a reader's get and refresh, and of the owner's get for comparison."""
    machine = machine_at(auto_compact=False)
    fill(machine, keys, values)
    with fastsm.Reader(machine.path) as reader:
        for row, state in (("reader.get", reader), ("reader.owner_get", machine)):
            times = []
            for _ in range(REPEATS):
                begun = time.perf_counter()
                for key in keys[:CALLS]:
                    state.get(key)
                times.append((time.perf_counter() - begun) / min(CALLS, len(keys)) * 1e9)
            note(row, "ns", times)
        times = []
        for _ in range(REPEATS):
            begun = time.perf_counter()
            for _ in range(CALLS):
                reader.refresh()
            times.append((time.perf_counter() - begun) / CALLS * 1e9)
        note("reader.refresh", "ns", times)


def test_opening(note: Any, machine_at: Any, keys: list[bytes], values: list[bytes]) -> None:
    """Open without a saved table, then from the saved table that a clean close writes."""
    machine = machine_at(auto_compact=False)
    fill(machine, keys, values)
    for row in ("reader.open", "reader.open_saved"):
        times = []
        for _ in range(REPEATS):
            begun = time.perf_counter()
            fastsm.Reader(machine.path).close()
            times.append((time.perf_counter() - begun) * 1e3)
        note(row, "ms", times)
        machine.close()


def test_an_entry_is_seen(note: Any, machine_at: Any) -> None:
    """Note the time from the owner's apply, in this process, to a child's waiting reader and to its waiting watch."""
    machine = machine_at()
    for row, seen_by in (("reader.wait", wait_for), ("reader.watch", watch_for)):
        (back, to), first = os.pipe(), machine.last_applied().index + 1
        pid = os.fork()
        if pid == 0:
            try:
                seen_by(machine.path, first, to)
            finally:
                os._exit(0)
        waits = []
        os.read(back, 8)
        for index in range(first, first + WAITS):
            time.sleep(0.002)
            begun = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            machine.apply([(index, 1, fastsm.put(b"key", b"value"))])
            waits.append((int.from_bytes(os.read(back, 8), "little") - begun) / 1e6)
        os.waitpid(pid, 0)
        os.close(back)
        os.close(to)
        note(row, "ms", [sorted(waits)[int(len(waits) * 0.99)]])


def tell(to: int) -> None:
    os.write(to, time.clock_gettime_ns(time.CLOCK_MONOTONIC).to_bytes(8, "little"))


def wait_for(path: str, first: int, to: int) -> None:
    reader = fastsm.Reader(path)
    tell(to)
    for index in range(first, first + WAITS):
        reader.wait(index)
        tell(to)


def watch_for(path: str, first: int, to: int) -> None:
    watch = fastsm.Reader(path).watch(start=first)
    tell(to)
    for _ in range(WAITS):
        next(watch)
        tell(to)


def test_catching_up(note: Any, machine_at: Any, keys: list[bytes], values: list[bytes]) -> None:
    """Refresh a reader that is a whole load of entries late; then read its watch of the same entries in a thread."""
    times, told = [], []
    for _ in range(3):
        machine = machine_at(auto_compact=False)
        with fastsm.Reader(machine.path) as reader:
            watch = reader.watch()
            fill(machine, keys, values)
            begun = time.perf_counter()
            reader.refresh()
            times.append((time.perf_counter() - begun) / len(keys) * 1e9)
            begun = time.perf_counter()
            thread = threading.Thread(target=read_all, args=(watch,))
            thread.start()
            thread.join()
            told.append((time.perf_counter() - begun) / len(keys) * 1e9)
        machine.close()
    note("reader.catch_up", "ns", times)
    note("reader.watch_read", "ns", told)


def read_all(watch: fastsm.Watch) -> None:
    while watch.read(timeout=0):
        pass
