"""The guard's suite: one round of short measurements, run by `compare` in each commit's own environment.

It uses nothing of fastsm but its public names, so that any commit can be measured, and nothing of the rest of `bench`.
`python guard.py DIRECTORY` prints JSON: for each workload the seconds of fastsm and, of work that no commit changes,
the seconds of a dict, right beside it. Their ratio is what commits are compared by.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import fastsm

KEYS = 200_000
LOOKUPS = 100_000
ENTRIES = 50_000


def fresh(items: list[bytes]) -> list[bytes]:
    return [bytes(bytearray(item)) for item in items]


def best_of(function: Callable[..., object], prepare: Callable[[], tuple[Any, ...]], times: int) -> float:
    best = float("inf")
    for _ in range(times):
        arguments = prepare()
        gc.collect()
        gc.disable()
        start = time.perf_counter()
        function(*arguments)
        best = min(best, time.perf_counter() - start)
        gc.enable()
    return best


def look_up(get: Callable[[bytes], object], keys: list[bytes]) -> None:
    for key in keys:
        get(key)


def into_dict(pairs: dict[bytes, bytes], some: list[tuple[bytes, bytes]]) -> None:
    for key, value in some:
        pairs[key] = value


def measure(directory: str) -> dict[str, tuple[float, float]]:
    source = random.Random(17)
    keys = [source.randbytes(16) for _ in range(KEYS)]
    value = source.randbytes(100)
    machine = fastsm.FastStateMachine(os.path.join(directory, "state"), auto_compact=False)
    pairs = dict.fromkeys(fresh(keys), value)

    def entries(some: list[bytes]) -> list[tuple[int, int, bytes]]:
        first = machine.last_applied().index + 1
        return [(first + i, 1, fastsm.put(key, value)) for i, key in enumerate(some)]

    def apply_chunks(chunks: list[Any], flush: bool = False) -> None:
        for chunk in chunks:
            machine.apply(chunk)
            if flush:
                machine.flush()

    def chunks_of(size: int, count: int) -> tuple[Any, ...]:
        work = entries(source.choices(keys, k=count))
        return ([work[i : i + size] for i in range(0, count, size)],)

    def to_dict(count: int) -> tuple[Any, ...]:
        return pairs, [(key, value) for key in fresh(source.choices(keys, k=count))]

    apply_chunks([entries(keys)])
    machine.flush()
    found = {
        "get": (
            best_of(look_up, lambda: (machine.get, fresh(source.choices(keys, k=LOOKUPS))), 3),
            best_of(look_up, lambda: (pairs.get, fresh(source.choices(keys, k=LOOKUPS))), 3)),
        "get_many": (
            best_of(machine.get_many, lambda: (fresh(source.choices(keys, k=LOOKUPS)),), 3),
            best_of(lambda some: list(map(pairs.get, some)), lambda: (fresh(source.choices(keys, k=LOOKUPS)),), 3)),
    }  # fmt: skip
    for size in (1, 100):
        found[f"apply.{size}"] = (
            best_of(apply_chunks, lambda size=size: chunks_of(size, ENTRIES), 3),  # type: ignore[misc]
            best_of(into_dict, lambda: to_dict(ENTRIES), 3))
    machine.flush()
    found["flush"] = (best_of(lambda chunks: apply_chunks(chunks, True), lambda: chunks_of(100, 5000), 3),
                      bare_flushes(directory, 50))  # fmt: skip
    start = time.perf_counter()
    machine.write_snapshot(os.path.join(directory, "out"))
    found["snapshot"] = time.perf_counter() - start, bare_flushes(directory, 1, 28 << 20)
    machine.close()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        machine = fastsm.FastStateMachine(os.path.join(directory, "state"), verify_on_open="off")
        times.append(time.perf_counter() - start)
        machine.close()
    found["open"] = min(times), best_of(dict, lambda: (list(pairs.items()),), 3)
    return found


def bare_flushes(directory: str, count: int, size: int = 14 << 10) -> float:
    piece = os.urandom(size)
    descriptor = os.open(os.path.join(directory, "bare"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    start = time.perf_counter()
    for _ in range(count):
        os.write(descriptor, piece)
        os.fsync(descriptor)
    seconds = time.perf_counter() - start
    os.close(descriptor)
    return seconds


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
