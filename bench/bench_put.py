"""Making commands, which is the proposer's share of the work."""

from __future__ import annotations

import random
import time
from typing import Any

import fastsm
from bench.data import changes, chunked, entries_of, fill, fresh, fresh_pairs, into_dict, scaled

COUNT = scaled(100_000)


def test_put(note: Any, keys: list[bytes], values: list[bytes]) -> None:
    """Note the time of a call; the same run's `limits` hold the time of an empty method's call for comparison."""
    times = []
    for _ in range(9):
        pairs = list(zip(fresh(keys[:COUNT]), fresh(values[:COUNT]), strict=True))
        start = time.perf_counter()
        for key, value in pairs:
            fastsm.put(key, value)
        times.append((time.perf_counter() - start) / COUNT * 1e9)
    note("put", "ns", times)


def test_put_many(note: Any, keys: list[bytes], values: list[bytes]) -> None:
    times = []
    for _ in range(9):
        columns = list(zip(chunked(fresh(keys[:COUNT]), 1000), chunked(fresh(values[:COUNT]), 1000), strict=True))
        start = time.perf_counter()
        for some_keys, some_values in columns:
            fastsm.put_many(some_keys, some_values)
        times.append((time.perf_counter() - start) / COUNT * 1e9)
    note("put_many", "ns", times)


def test_put_and_apply(compare: Any, machine_at: Any, keys: list[bytes], values: list[bytes]) -> None:
    """Make and apply commands in one process, in chunks of 100: `bench_apply`'s changes, on a million keys."""
    machine = machine_at(auto_compact=False)
    fill(machine, keys, values)
    pairs = dict(zip(fresh(keys), fresh(values), strict=True))
    source = random.Random(11)

    def prepare() -> Any:
        machine.flush()
        made = changes(source, keys, values, COUNT)
        return (chunked(fresh_pairs(made), 100), machine.last_applied().index + 1), (pairs, fresh_pairs(made))

    def subject(chunks: Any, index: int) -> None:
        apply = machine.apply
        for chunk in chunks:
            apply(entries_of(chunk, index))
            index += len(chunk)

    compare("put_apply.100", subject, into_dict, COUNT, prepare)
