"""Watches: how fast they deliver changes, what waiting watches cost apply, and how soon a waiting one is woken."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import fastsm
from bench.data import changes, chunked, entries_of, fill, fresh_pairs, scaled

TOLD = scaled(500_000)
WRITTEN = scaled(200_000)
WAITING = 1000
WAKES = scaled(2_000)


def read_all(watch: fastsm.Watch) -> int:
    count = 0
    while found := watch.read(timeout=0):
        count += len(found)
    return count


def iterate(watch: fastsm.Watch) -> int:
    for count, _ in enumerate(watch, 1):
        if count == TOLD:
            return count
    return 0


def test_changes_are_told(note: Any, machine_at: Any) -> None:
    """Read all changes of a log, many at a time and one by one."""
    machine = machine_at(auto_compact=False)
    fill(machine, [b"key-%012d" % i for i in range(TOLD)], [bytes(32)] * TOLD)
    for row, call in (("watch.read", read_all), ("watch.for", iterate)):
        times = []
        for _ in range(5):
            watch = machine.watch(start=1)
            begun = time.perf_counter()
            assert call(watch) == TOLD
            times.append((time.perf_counter() - begun) / TOLD * 1e9)
        note(row, "ns", times)


def waiting_threads(machine: fastsm.FastStateMachine) -> Iterator[threading.Thread]:
    """Start threads that wait for changes of prefixes that are never written."""
    for i in range(WAITING):
        watch = machine.watch(b"nobody/%d/" % i)
        thread = threading.Thread(target=list, args=(watch,))
        thread.start()
        yield thread


def test_waiting_watches_cost_apply_nothing(
    compare: Any, machine_at: Any, keys: list[bytes], values: list[bytes]
) -> None:
    """Apply the same chunks to two machines; a thousand watches wait on one of them."""
    watched, alone = machine_at(auto_compact=False), machine_at(auto_compact=False)
    for machine in (watched, alone):
        fill(machine, keys[:WRITTEN], values[:WRITTEN])
    threads = list(waiting_threads(watched))
    source = random.Random(7)

    def prepare() -> Any:
        made = changes(source, keys[:WRITTEN], values, WRITTEN)
        index = watched.last_applied().index + 1
        return tuple((chunked(entries_of(fresh_pairs(made), index), 100),) for _ in range(2))

    def applying(machine: fastsm.FastStateMachine) -> Any:
        def run(chunks: Any) -> None:
            for chunk in chunks:
                machine.apply(chunk)
        return run

    compare("watch.idle", applying(watched), applying(alone), WRITTEN, prepare)
    watched.close()
    for thread in threads:
        thread.join()


def test_a_waiting_read_is_woken(note: Any, machine_at: Any) -> None:
    """Note the time from the apply of a change to its arrival in a waiting thread, entry by entry."""
    machine = machine_at()
    told: list[float] = []
    ready = threading.Semaphore(0)

    def consume() -> None:
        for _ in machine.watch(b"key", start=1):
            told.append(time.perf_counter())
            ready.release()

    thread = threading.Thread(target=consume)
    thread.start()
    waits = []
    for index in range(1, WAKES + 1):
        time.sleep(0.002)
        begun = time.perf_counter()
        machine.apply([(index, 1, fastsm.put(b"key", b"value"))])
        ready.acquire()
        waits.append((told[-1] - begun) * 1e3)
    machine.close()
    thread.join()
    note("watch.wake", "ms", [sorted(waits)[int(len(waits) * 0.99)]])
