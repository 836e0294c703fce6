"""apply compared with a plain loop that makes the same changes in a dict, without durability.

Commands are made before the timing starts.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsm
from bench.data import (
    Pairs,
    changes,
    chunked,
    entries_of,
    fill,
    fresh,
    fresh_pairs,
    into_dict,
    random_keys,
    scaled,
)  # fmt: skip
from bench.machine import write_all
from bench.peers import open_peer

ENTRIES = scaled(100_000)
AWAITED = scaled(5000)


def apply_chunks(apply: Callable[[Any], object], chunks: list[Any]) -> None:
    for chunk in chunks:
        apply(chunk)


@pytest.mark.parametrize("size", [1, 10, 100, 1000])
def test_apply_chunks_of(
    compare: Any, place: Path, keys: list[bytes], values: list[bytes], size: int, who: str
) -> None:
    """Apply to a million keys: half overwrites, a tenth deletes, the rest new keys."""
    count = ENTRIES if who == "fastsm" or size > 1 else ENTRIES // 10
    pairs = dict(zip(fresh(keys), fresh(values), strict=True))
    source = random.Random(7)
    if who == "fastsm":
        store: Any = fastsm.FastStateMachine(place / who, auto_compact=False)
        fill(store, keys, values)
    else:
        store = open_peer(who, place / who)
        for chunk in chunked(list(zip(keys, values, strict=True)), 1000):
            store.apply(chunk)

    def prepare() -> Any:
        store.flush()
        made = changes(source, keys, values, count)
        mine: Any = fresh_pairs(made)
        if who == "fastsm":
            mine = entries_of(made, store.last_applied().index + 1)
        return (store.apply, chunked(mine, size)), (pairs, fresh_pairs(made))

    compare(f"apply.{size}", apply_chunks, into_dict, count, prepare, who=who)
    store.close()


def test_load_a_million(compare: Any, place: Path, keys: list[bytes], values: list[bytes], who: str) -> None:
    """Apply a million new keys in chunks of 1,000, then flush; compared with a dict that grows from empty."""
    opened: list[Any] = []

    def prepare() -> Any:
        while opened:
            opened.pop().close()
        made: Pairs = list(zip(fresh(keys), fresh(values), strict=True))
        directory = place / f"{who}-{random.random()}"
        if who == "fastsm":
            opened.append(fastsm.FastStateMachine(directory))
            mine: Any = entries_of(made, 1)
        else:
            opened.append(open_peer(who, directory))
            mine = made
        return (opened[-1], chunked(mine, 1000)), ({}, fresh_pairs(made))

    def subject(store: Any, chunks: list[Any]) -> None:
        apply_chunks(store.apply, chunks)
        store.flush()

    compare("load", subject, into_dict, len(keys), prepare, rounds=5, who=who)
    opened.pop().close()


@pytest.mark.parametrize(("size", "count", "chunk"), [("4k", scaled(5000), 10), ("1m", scaled(100), 1)])
def test_apply_large_values(compare: Any, machine_at: Any, place: Path, size: str, count: int, chunk: int) -> None:
    """Compare with a bare write of as many bytes to a growing file."""
    machine = machine_at(auto_compact=False)
    value_bytes = 4096 if size == "4k" else 1 << 20
    source = random.Random(9)
    turn = iter(range(1000))

    def prepare() -> Any:
        os.sync()  # so that writes of one round do not slow the next
        keys = [source.randbytes(16) for _ in range(count)]
        value = source.randbytes(value_bytes)
        entries = [
            (machine.last_applied().index + 1 + i, 1, fastsm.put(key, value)) for i, key in enumerate(keys)
        ]
        descriptor = os.open(place / f"bare-{next(turn)}", os.O_WRONLY | os.O_CREAT)
        pieces = [source.randbytes(value_bytes) * chunk] * (count // chunk)
        return (machine.apply, chunked(entries, chunk)), (descriptor, pieces)

    def base(descriptor: int, pieces: list[bytes]) -> None:
        for piece in pieces:
            write_all(descriptor, piece)

    compare(f"apply.{size}", apply_chunks, base, count, prepare)


def test_apply_chunk_in_a_coroutine(note: Any, machine_at: Any) -> None:
    """Note how much longer `await apply_chunk` takes than `apply`, per chunk of one entry."""
    machine = machine_at(auto_compact=False)
    more: list[float] = []

    async def awaited(chunks: list[Any]) -> float:
        start = time.perf_counter()
        for chunk in chunks:
            await machine.apply_chunk(chunk)
        return time.perf_counter() - start

    for turn in range(9):
        times = {}
        for kind in ("plain", "awaited") if turn % 2 else ("awaited", "plain"):
            first = machine.last_applied().index + 1
            chunks = chunked(entries_of([(key, b"v" * 100) for key in random_keys(AWAITED, seed=first)], first), 1)
            if kind == "awaited":
                times[kind] = asyncio.run(awaited(chunks))
            else:
                start = time.perf_counter()
                apply_chunks(machine.apply, chunks)
                times[kind] = time.perf_counter() - start
        more.append((times["awaited"] - times["plain"]) / AWAITED * 1e6)
    note("apply_chunk.1", "us", more)


def test_growth_without_a_pause(note: Any, machine_at: Any) -> None:
    """Note the longest call, each of a thousand new entries, while the table grows from empty to ten million keys.

    The row is the thread's own CPU time; `extra` also holds wall-clock times, which include waits for a core and for
    the disk.
    """
    machine = machine_at(auto_compact=False)
    source = random.Random(10)
    value = b"v" * 32
    applied = 0
    times, own = [], []
    while applied < scaled(10_000_000):
        block = source.randbytes(8 * 100_000)
        for start in range(0, len(block), 8000):
            entries = [
                (applied + i + 1, 1, fastsm.put(block[start + 8 * i : start + 8 * i + 8], value)) for i in range(1000)
            ]
            before, own_before = time.perf_counter(), time.thread_time()
            machine.apply(entries)
            own.append((time.thread_time() - own_before) * 1e3)
            times.append((time.perf_counter() - before) * 1e3)
            applied += 1000
        machine.flush()
    times.sort()
    own.sort()
    extra = {"median_ms": statistics.median(times), "p999_ms": times[-10], "longest_ms": times[-3:], "own_ms": own[-5:]}
    note("apply.longest", "ms", [own[-1]], items=1000, extra=extra)
