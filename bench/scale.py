"""How rates, memory, snapshots and reopening scale, from a thousand keys to fifty million."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import fastsm
from bench.harness import Result, timed, write_results
from bench.machine import describe, limits

SIZES = [10**3, 10**4, 10**5, 10**6, 10**7, 5 * 10**7]
VALUE = bytes(range(32))
CHUNK = 1000
LOOKUPS = 200_000
PAGE = 100
SCANS = 2_000


def key_of(number: int) -> bytes:
    """Return an 8-byte key, distributed like a random one: a permutation of 64 bits (SplitMix64's finalizer)."""
    mask = (1 << 64) - 1
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & mask
    number = (number ^ number >> 27) * 0x94D049BB133111EB & mask
    return (number ^ number >> 31).to_bytes(8, "little")


def memory() -> tuple[int, int]:
    """Return the bytes of this process's own memory, and of its mapped files."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, number, *_ = line.split()
        fields[name[:-1]] = int(number) * 1024
    return fields["Anonymous"], fields["Rss"] - fields["Anonymous"]


def grow(machine: fastsm.FastStateMachine, start: int, stop: int) -> tuple[float, float]:
    """Apply new keys in chunks; return the seconds spent in `apply`: in all calls, and in the longest one."""
    total = longest = 0.0
    put, apply, clock = fastsm.put, machine.apply, time.perf_counter
    while start < stop:
        count = min(CHUNK, stop - start)
        first = machine.last_applied().index + 1 - start
        entries = [(i + first, 1, put(key_of(i + 1), VALUE)) for i in range(start, start + count)]
        before = clock()
        apply(entries)
        seconds = clock() - before
        total += seconds
        longest = max(longest, seconds)
        start += count
        if start % 1_000_000 == 0:
            machine.flush()
    return total, longest


def look_up(machine: fastsm.FastStateMachine, keys: list[bytes]) -> None:
    get = machine.get
    for key in keys:
        get(key)


def measure_size(machine: fastsm.FastStateMachine, directory: Path, size: int) -> dict[str, Any]:
    """Measure a machine that holds `size` keys, and close it."""
    source = random.Random(size)
    keys = [key_of(source.randrange(1, size + 1)) for _ in range(LOOKUPS)]
    look_up(machine, keys[:1000])
    found = {"get_ns": min(timed(look_up, machine, keys) for _ in range(3)) / LOOKUPS * 1e9}
    batches = [keys[i : i + 1000] for i in range(0, LOOKUPS, 1000)]
    found["get_many_ns"] = min(timed(lambda: [machine.get_many(some) for some in batches]) for _ in range(3))
    found["get_many_ns"] *= 1e9 / LOOKUPS
    machine.flush()
    target = directory / "snapshot"
    found["snapshot_s"] = timed(machine.write_snapshot, target)
    found["snapshot_bytes"] = (target / "snapshot.fsm").stat().st_size
    shutil.rmtree(target)
    found["log_bytes"] = machine.stats().log_bytes
    found["close_s"] = timed(machine.close)
    found["disk_bytes"] = sum(path.stat().st_blocks * 512 for path in Path(machine.path).iterdir())
    return found


def measure_order(machine: fastsm.FastStateMachine, directory: Path, size: int) -> dict[str, Any]:
    """Measure ordered reads at one size; close the machine and leave its state in `directory`, without the order."""
    source = random.Random(size)
    found = {"order_build_s": timed(machine._ask_for_order)}
    order = machine._order()
    assert order is not None
    found["order_bytes"] = order.size
    starts = [source.randbytes(8) for _ in range(SCANS)]
    found["scan_us"] = timed(lambda: [machine.scan(start, limit=PAGE) for start in starts]) / SCANS * 1e6
    tenth = bytes([0x40]), bytes([0x40 + 26])  # of all keys, which are spread like random ones
    found["count_ms"] = timed(machine.count, *tenth) * 1e3
    index = machine.last_applied().index
    new = [key + b"+" for key in starts]  # longer than all existing keys, hence new

    def insert_and_scan() -> None:
        for number, key in enumerate(new, index + 1):
            machine.apply([(number, 1, fastsm.put(key, VALUE))])
            machine.scan(key, limit=PAGE)

    found["insert_scan_us"] = timed(insert_and_scan) / SCANS * 1e6
    machine.apply([(machine.last_applied().index + 1, 1, fastsm.batch([fastsm.delete(key) for key in new]))])
    assert machine.len() == size
    found["close_ordered_s"] = timed(machine.close)
    start = time.perf_counter()
    machine = fastsm.FastStateMachine(directory, auto_compact=False, verify_on_open="off")
    machine.scan(limit=1)
    found["open_ordered_s"] = time.perf_counter() - start
    order = machine._order()
    assert order is not None
    assert order.loaded or size < 100_000  # small states save no table
    order.forget()
    machine.apply([(machine.last_applied().index + 1, 1, fastsm.noop())])  # the next saved table has no order
    machine.close()
    return found


def measure_scale(largest: int, directory: Path, results: Path) -> int:
    """Grow one state from size to size, reopening it at each; write the results as JSON."""
    directory = directory / "scale"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    about = {**describe(directory), "limits": limits(directory)}
    rows = []
    start_memory = memory()
    machine = fastsm.FastStateMachine(directory / "state", auto_compact=False)
    held = 0
    try:
        for size in [size for size in SIZES if size <= largest]:
            seconds, longest = grow(machine, held, size)
            own, mapped = memory()
            row: dict[str, Any] = {
                "keys": size, "apply_ns": seconds / (size - held) * 1e9, "longest_ms": longest * 1e3,
                "private_bytes": own - start_memory[0], "mapped_bytes": mapped - start_memory[1],
            }  # fmt: skip
            row.update(measure_size(machine, directory, size))
            for mode in ("background", "full"):
                os.sync()
                start = time.perf_counter()
                machine = fastsm.FastStateMachine(directory / "state", auto_compact=False, verify_on_open=mode)
                row[f"open_{mode}_s"] = time.perf_counter() - start
                assert machine.len() == size
                assert machine.get(key_of(size)) == VALUE
                if mode == "background":
                    machine.close()
            row.update(measure_order(machine, directory / "state", size))
            machine = fastsm.FastStateMachine(directory / "state", auto_compact=False)
            held = size
            rows.append(row)
            print(" ".join(f"{name}={value:,.4g}" for name, value in row.items()), flush=True)
            write_results(results, [as_result(row) for row in rows], about)
    finally:
        machine.close()
        shutil.rmtree(directory, ignore_errors=True)
    return 0


def as_result(row: dict[str, Any]) -> Result:
    return Result(f"scale.{row['keys']}", "fastsm", "ns", [row["apply_ns"]], extra=row)
