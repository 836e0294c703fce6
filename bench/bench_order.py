"""Ordered reads next to sortedcontainers, a sorted list with bisect, and LMDB's cursor; what the order costs."""

from __future__ import annotations

import random
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.data import changes, chunked, entries_of, fill, random_keys, random_values, scaled
from fastsm import FastStateMachine

KEYS = scaled(1_000_000)
COUNTED = scaled(100_000)
PAGE = 100
SCANS = scaled(2_000)


@pytest.fixture(scope="module")
def ordered_keys() -> list[bytes]:
    return sorted(set(random_keys(KEYS)))


def microseconds(call: Callable[[bytes], object], starts: list[bytes]) -> float:
    """The time of a call, from each start."""
    begun = time.perf_counter()
    for start in starts:
        call(start)
    return (time.perf_counter() - begun) / len(starts) * 1e6


def scanners(who: str, keys: list[bytes], value: bytes, machine_at: Any, path: Path) -> tuple[Any, Any]:
    """`scan(start)` of a page, and `count(start, end)`."""
    if who == "fastsm":
        machine = machine_at(ordered=True)
        fill(machine, random.Random(1).sample(keys, len(keys)), [value] * len(keys))
        return (lambda start: machine.scan(start, limit=PAGE).entries), machine.count
    if who == "lmdb":
        lmdb = pytest.importorskip("lmdb")
        env = lmdb.open(str(path), map_size=16 << 30, sync=False, metasync=False, writemap=True)
        with env.begin(write=True) as transaction:
            for key in keys:
                transaction.put(key, value)
        transaction = env.begin()

        def scan(start: bytes) -> list[tuple[bytes, bytes]]:
            cursor = transaction.cursor()
            cursor.set_range(start)
            return [pair for pair, _ in zip(cursor.iternext(), range(PAGE), strict=False)]

        def count(start: bytes, end: bytes) -> int:
            cursor = transaction.cursor()
            cursor.set_range(start)
            total = 0
            for key in cursor.iternext(values=False):
                if key >= end:
                    break
                total += 1
            return total

        return scan, count
    if who == "sortedcontainers":
        pairs = pytest.importorskip("sortedcontainers").SortedDict(dict.fromkeys(keys, value))
        return (
            lambda start: [(key, pairs[key]) for key, _ in zip(pairs.irange(start), range(PAGE), strict=False)],
            lambda start, end: pairs.bisect_left(end) - pairs.bisect_left(start))
    table, listed = dict.fromkeys(keys, value), list(keys)

    def page(start: bytes) -> list[tuple[bytes, bytes]]:
        at = bisect_left(listed, start)
        return [(key, table[key]) for key in listed[at:at + PAGE]]

    return page, lambda start, end: bisect_left(listed, end) - bisect_left(listed, start)


@pytest.mark.parametrize("peer", ["fastsm", "lmdb", "sortedcontainers", "bisect"])
def test_scan_and_count(note: Any, machine_at: Any, ordered_keys: list[bytes], peer: str, tmp_path: Path) -> None:
    """A page in the middle, and a count of a tenth."""
    value = random_values(1)[0]
    scan, count = scanners(peer, ordered_keys, value, machine_at, tmp_path)
    dice = random.Random(2)
    first = len(ordered_keys) // 3
    start, end = ordered_keys[first], ordered_keys[min(first + COUNTED, len(ordered_keys) - 1)]
    rounds = [dice.choices(ordered_keys, k=SCANS) for _ in range(5)]
    note("scan.100", "us", [microseconds(scan, starts) for starts in rounds], peer)
    note("count.100k", "ms", [microseconds(lambda _: count(start, end), [b""]) / 1e3 for _ in range(9)], peer)
    assert len(scan(ordered_keys[0])) == min(PAGE, len(ordered_keys))


@pytest.mark.parametrize("shape", ["random", "kilobyte"])
def test_build(note: Any, machine_at: Any, shape: str) -> None:
    """The first call of all: a million random keys, or keys that share a kilobyte."""
    count = KEYS if shape == "random" else KEYS // 4
    keys = random_keys(count)
    if shape == "kilobyte":
        keys = [b"k" * 1024 + key for key in keys]
    machine = machine_at(auto_compact=False)
    fill(machine, keys, [b""] * count)
    seconds = []
    for _ in range(5):
        machine._ask_for_order()
        machine._order().forget()
        begun = time.perf_counter()
        machine._ask_for_order()
        seconds.append((time.perf_counter() - begun) * 1e6 / count)
    note(f"order.build.{shape}", "s", seconds)
    note("memory.order", "bytes", [machine._order().size / count])


def test_open_in_order(note: Any, tmp_path: Path) -> None:
    """Opening by a saved table that has the order, and by one without; the first scan is in it."""
    keys = random_keys(KEYS)
    for ordered in (True, False):
        path = tmp_path / str(ordered)
        with FastStateMachine(path, ordered=ordered, auto_compact=False) as machine:
            fill(machine, keys, random_values(1) * KEYS)
        seconds = []
        for _ in range(9):
            begun = time.perf_counter()
            machine = FastStateMachine(path, verify_on_open="off")
            if ordered:
                machine.scan(limit=1)
            seconds.append((time.perf_counter() - begun) * 1e9 / KEYS)
            machine.close()
        note("open.ordered" if ordered else "open.unordered", "ms", seconds)


def test_apply_in_order(compare: Any, machine_at: Any, keys: list[bytes], values: list[bytes]) -> None:
    """apply(1000) with the order in use over apply without: half overwrites, a tenth deletes, the rest new."""
    count = min(KEYS, len(keys))
    machines = [machine_at(ordered=ordered, auto_compact=False) for ordered in (True, False)]
    for machine in machines:
        fill(machine, keys[:count], values[:count])
        machine.count(b"\x01")
    dice = random.Random(9)
    items = scaled(100_000)

    def prepare() -> Any:
        made = changes(dice, keys[:count], values, items)
        return tuple(
            (machine, chunked(entries_of(made, machine.last_applied().index + 1), 1000)) for machine in machines)

    def apply(machine: Any, chunks: Any) -> None:
        for chunk in chunks:
            machine.apply(chunk)

    compare("apply.ordered", apply, apply, items, prepare)


@pytest.mark.parametrize("peer", ["fastsm", "sortedcontainers", "bisect"])
def test_insert_and_scan_in_turns(
    note: Any, machine_at: Any, ordered_keys: list[bytes], peer: str, tmp_path: Path
) -> None:
    """One new key, then one page from there."""
    value = random_values(1)[0]
    dice = random.Random(3)
    new = [dice.randbytes(16) for _ in range(SCANS)]
    put: Callable[[bytes], object]
    if peer == "fastsm":
        machine = machine_at(ordered=True)
        fill(machine, ordered_keys, [value] * len(ordered_keys))

        def put(key: bytes) -> None:
            machine.apply(entries_of([(key, value)], machine.last_applied().index + 1))

        def scan(start: bytes) -> object:
            return machine.scan(start, limit=PAGE)

    elif peer == "sortedcontainers":
        pairs = pytest.importorskip("sortedcontainers").SortedDict(dict.fromkeys(ordered_keys, value))
        put = lambda key: pairs.__setitem__(key, value)  # noqa: E731

        def scan(start: bytes) -> object:
            return [(key, pairs[key]) for key, _ in zip(pairs.irange(start), range(PAGE), strict=False)]

    else:
        listed = list(ordered_keys)
        put = lambda key: insort(listed, key)  # noqa: E731

        def scan(start: bytes) -> object:
            at = bisect_left(listed, start)
            return [(key, value) for key in listed[at:at + PAGE]]

    def turn(key: bytes) -> None:
        put(key)
        scan(key)

    note("scan.insert", "us", [microseconds(turn, new[i::5]) for i in range(5)], peer)


@pytest.mark.parametrize("shape", ["rising", "falling", "gap"])
def test_adversarial_inserts(note: Any, machine_at: Any, shape: str) -> None:
    """One new key and one scan in turns, at three sizes: always the greatest key, the least, all into one gap."""
    curve = []
    for size in (KEYS // 100, KEYS // 10, KEYS):
        machine = machine_at(ordered=True, auto_compact=False)
        fill(machine, [b"%012d" % (10**11 + 1_000 * i) for i in range(size)], [b""] * size)
        machine.count(b"0")
        turns = range(min(SCANS, 1_000))
        if shape == "rising":
            new = [b"%012d" % (2 * 10**11 + i) for i in turns]
        elif shape == "falling":
            new = [b"%012d" % (10**11 - 1 - i) for i in turns]
        else:
            new = [b"%012d" % (10**11 + 1_000 * (size // 2) + 999 - i) for i in turns if i < 999]

        def turn(key: bytes, machine: FastStateMachine = machine) -> None:
            machine.apply(entries_of([(key, b"")], machine.last_applied().index + 1))
            machine.scan(key, limit=PAGE)

        curve.append([microseconds(turn, some) for some in chunked(new, len(new) // 5)[:5]])
    for name, times in zip(("1%", "10%", "100%"), curve, strict=True):
        print(f"{shape}, at {name} of the keys: {sorted(times)[2]:.1f} us a turn")
    note(f"scan.insert.{shape}", "ratio", [most / least for least, most in zip(curve[0], curve[-1], strict=True)])
