"""Ordered reads compared with LMDB's cursor, sortedcontainers and a sorted list with bisect; what the order costs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.data import changes, chunked, entries_of, fill, random_keys, random_values, scaled
from bench.peers.in_order import NAMES, open_in_order
from fastsm import FastStateMachine, delete_prefix

KEYS = scaled(1_000_000)
COUNTED = scaled(100_000)
PAGE = 100
SCANS = scaled(2_000)
SIZES = {"1%": KEYS // 100, "10%": KEYS // 10, "100%": KEYS}


@pytest.fixture(scope="module")
def ordered_keys() -> list[bytes]:
    return sorted(set(random_keys(KEYS)))


def microseconds(call: Callable[[bytes], object], starts: Sequence[bytes]) -> float:
    """Return the mean time of a call, one call for each start."""
    begun = time.perf_counter()
    for start in starts:
        call(start)
    return (time.perf_counter() - begun) / len(starts) * 1e6


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


@pytest.mark.parametrize("peer", NAMES)
def test_scan_and_count(note: Any, machine_at: Any, ordered_keys: list[bytes], peer: str, tmp_path: Path) -> None:
    """Scan pages from random keys, and count a tenth of the keys."""
    store = open_in_order(peer, machine_at, tmp_path / "peer", ordered_keys, random_values(1)[0])
    dice = random.Random(2)
    first = len(ordered_keys) // 3
    start, end = ordered_keys[first], ordered_keys[min(first + COUNTED, len(ordered_keys) - 1)]
    rounds = [dice.choices(ordered_keys, k=SCANS) for _ in range(5)]
    note("scan.100", "us", [microseconds(lambda key: store.scan(key, PAGE), starts) for starts in rounds], peer)
    note("count.100k", "ms", [seconds(lambda: store.count(start, end)) * 1e3 for _ in range(9)], peer)
    assert store.scan(ordered_keys[0], PAGE) == [(key, random_values(1)[0]) for key in ordered_keys[:PAGE]]
    assert store.count(start, end) == min(COUNTED, len(ordered_keys) - 1 - first)


@pytest.mark.parametrize("peer", NAMES)
def test_insert_and_scan_in_turns(
    note: Any, machine_at: Any, ordered_keys: list[bytes], peer: str, tmp_path: Path
) -> None:
    """Insert one new key, then scan one page that starts at it."""
    value = random_values(1)[0]
    dice = random.Random(3)
    new = [dice.randbytes(16) for _ in range(SCANS)]
    store = open_in_order(peer, machine_at, tmp_path / "peer", ordered_keys, value)

    def turn(key: bytes) -> None:
        store.put(key, value)
        store.scan(key, PAGE)

    note("scan.insert", "us", [microseconds(turn, new[i::5]) for i in range(5)], peer)


@pytest.mark.parametrize("peer", NAMES)
def test_delete_of_a_range(note: Any, machine_at: Any, ordered_keys: list[bytes], peer: str, tmp_path: Path) -> None:
    """Delete a tenth of the keys, then scan a page across the gap; note the time of both per key, five times."""
    store = open_in_order(peer, machine_at, tmp_path / "peer", ordered_keys, b"")
    count = min(COUNTED, len(ordered_keys) // 7)

    def turn(first: int) -> None:
        assert store.delete_range(ordered_keys[first], ordered_keys[first + count]) == count
        assert len(store.scan(ordered_keys[first - 1], PAGE)) == min(PAGE, 1 + len(ordered_keys) - first - count)

    found = [seconds(partial(turn, first)) / count * 1e9 for first in range(1, 5 * count, count + 1)]
    note("delete_range.100k", "ns", found, peer)


@pytest.mark.parametrize("shape", ["random", "kilobyte"])
def test_build(note: Any, machine_at: Any, shape: str) -> None:
    """Build the order, as the first ordered read does: of a million random keys, or of keys that share a kilobyte."""
    count = KEYS if shape == "random" else KEYS // 4
    keys = random_keys(count)
    if shape == "kilobyte":
        keys = [b"k" * 1024 + key for key in keys]
    machine = machine_at(auto_compact=False)
    fill(machine, keys, [b""] * count)
    found = []
    for _ in range(5):
        machine._ask_for_order()
        machine._order().forget()
        found.append(seconds(machine._ask_for_order) * 1e6 / count)
    note(f"order.build.{shape}", "s", found)
    note("memory.order", "bytes", [machine._order().size / count])


def test_open_in_order(note: Any, tmp_path: Path) -> None:
    """Open from a saved table that includes the order, the first scan included; and from one without the order."""
    keys = random_keys(KEYS)
    for ordered in (True, False):
        path = tmp_path / str(ordered)
        with FastStateMachine(path, ordered=ordered, auto_compact=False) as machine:
            fill(machine, keys, random_values(1) * KEYS)
        found = []
        for _ in range(9):
            begun = time.perf_counter()
            machine = FastStateMachine(path, verify_on_open="off")
            if ordered:
                machine.scan(limit=1)
            found.append((time.perf_counter() - begun) * 1e9 / KEYS)
            machine.close()
        note("open.ordered" if ordered else "open.unordered", "ms", found)


def test_apply_in_order(compare: Any, machine_at: Any, keys: list[bytes], values: list[bytes]) -> None:
    """Apply chunks of 1,000 with the order in use and without: half overwrites, a tenth deletes, the rest new."""
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
            (machine, chunked(entries_of(made, machine.last_applied().index + 1), 1000)) for machine in machines
        )

    def apply(machine: Any, chunks: Any) -> None:
        for chunk in chunks:
            machine.apply(chunk)

    compare("apply.ordered", apply, apply, items, prepare)


# ---- curves: what must not grow with the number of keys ------------------------------------------------


def note_curve(note: Any, row: str, curve: dict[str, list[float]], unit: str) -> None:
    """Print the median at each size, and note the ratios of the largest size's times to the smallest size's."""
    for size, times in curve.items():
        print(f"{row}, at {size} of the keys: {sorted(times)[len(times) // 2]:.1f} {unit}")
    least, *_, most = curve.values()
    note(row, "ratio", [large / small for small, large in zip(least, most, strict=True)])


@pytest.mark.parametrize("shape", ["random", "rising", "falling", "gap"])
def test_adversarial_inserts(note: Any, machine_at: Any, shape: str) -> None:
    """Alternate one new key and one scan at three sizes; new keys are random, rising, falling, or all in one gap."""
    curve = {}
    for name, size in SIZES.items():
        machine = machine_at(ordered=True, auto_compact=False)
        fill(machine, [b"%012d" % (10**11 + 1_000 * i) for i in range(size)], [b""] * size)
        machine.count(b"0")
        turns = range(min(SCANS, 999))
        dice = random.Random(4)
        new = {
            "random": [b"%012d" % (10**11 + 1_000 * dice.randrange(size) + 1 + i) for i in turns],
            "rising": [b"%012d" % (2 * 10**11 + i) for i in turns],
            "falling": [b"%012d" % (10**11 - 1 - i) for i in turns],
            "gap": [b"%012d" % (10**11 + 1_000 * (size // 2) + 999 - i) for i in turns],
        }[shape]

        def turn(key: bytes, machine: FastStateMachine = machine) -> None:
            machine.apply(entries_of([(key, b"")], machine.last_applied().index + 1))
            machine.scan(key, limit=PAGE)

        curve[name] = [microseconds(turn, some) for some in chunked(new, len(new) // 5)[:5]]
    note_curve(note, f"scan.insert.{shape}", curve, "us a turn")


def test_deletes_of_a_prefix_between_scans(note: Any, machine_at: Any) -> None:
    """Delete all keys of a prefix, then scan across the gap, at three sizes; only the first scan walks over it."""
    delete: dict[str, list[float]] = {}
    first: dict[str, list[float]] = {}
    next_ones: dict[str, list[float]] = {}
    for name, size in SIZES.items():
        machine = machine_at(ordered=True, auto_compact=False)
        around = [b"%s%06d" % (end, i) for end in (b"a", b"z") for i in range(PAGE)]
        fill(machine, around, [b""] * len(around))
        delete[name], first[name], next_ones[name] = [], [], []
        scan = partial(machine.scan, b"a%06d" % (PAGE // 2), limit=PAGE)
        for _ in range(3):
            fill(machine, [b"m%012d" % i for i in range(size)], [b""] * size)
            machine.count(b"a")
            chunk = [(machine.last_applied().index + 1, 1, delete_prefix(b"m"))]
            delete[name].append(seconds(partial(machine.apply, chunk)) / size * 1e9)
            first[name].append(seconds(scan) / size * 1e9)
            next_ones[name].append(microseconds(lambda _, scan=scan: scan(), [b""] * SCANS))  # type: ignore[misc]
            assert len(scan().entries) == PAGE
    note_curve(note, "delete_prefix", delete, "ns a key")
    note_curve(note, "scan.deleted.first", first, "ns a deleted key")
    note_curve(note, "scan.deleted", next_ones, "us")
