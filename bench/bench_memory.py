"""Memory and disk space per key, as the system reports them; each series of sizes has its own process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.data import scaled
from bench.harness import measured

MILLION = scaled(1_000_000)

CHILD = """
import json, random, sys
import fastsm

def memory():
    fields = {}
    for line in open("/proc/self/smaps_rollup"):
        name, *rest = line.split()
        if name.endswith(":"):
            fields[name[:-1]] = int(rest[0]) * 1024
    return fields["Anonymous"], fields["Rss"] - fields["Anonymous"]

directory, wanted, chunk = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
source = random.Random(15)
machine = fastsm.FastStateMachine(directory, auto_compact=False)
value = b"v" * 100
machine.apply([(1, 1, fastsm.noop())])
before, applied, found = memory(), 0, []
for size in wanted:
    while applied < size:
        count = min(chunk, size - applied)
        machine.apply([(applied + i + 2, 1, fastsm.put(source.randbytes(16), value)) for i in range(count)])
        applied += count
    now = memory()
    found.append((size, (now[0] - before[0]) / size, machine.stats().log_bytes / size))
machine.close()
print(json.dumps(found))
"""

# The same keys and values in a dict. Each value is a new object, as values received from a network are.
CHILD_OF_DICT = """
import random

source, value, pairs, found = random.Random(15), b"v" * 100, {}, []
before = own_memory()
for size in json.loads(sys.argv[1]):
    while len(pairs) < size:
        pairs[source.randbytes(16)] = bytes(bytearray(value))
    found.append((size, (own_memory() - before) / size))
print(json.dumps(found))
"""


def measure(directory: Path, sizes: list[int], chunk: int = 1000) -> Any:
    """Return `(keys, private bytes per key, log bytes per key)` for each size."""
    return measured(CHILD, directory, json.dumps(sizes), chunk)


pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup")


def test_memory(note: Any, place: Path) -> None:
    """Note memory per key at a million keys, and the largest of twenty sizes up to ten million."""
    sizes = sorted({MILLION, *(int(scaled(10_000_000) * (i / 19) ** 1.5) or scaled(100_000) for i in range(20))})
    found = measure(place / "state", sizes)
    for size, private, mapped in found:
        if size == MILLION:
            note("memory.private.1m", "bytes", [private])
            note("memory.mapped", "bytes", [mapped])
    of_dict = measured(CHILD_OF_DICT, json.dumps([size for size in sizes if size >= scaled(100_000)]))
    large = [private for size, private, _ in found if size >= scaled(100_000)]
    note("memory.private.worst", "bytes", [max(large)], extra={"sizes": found, "dict": of_dict})


@pytest.mark.parametrize("chunk", [1000, 1])
def test_disk(note: Any, place: Path, chunk: int) -> None:
    """Note disk space per key after a clean close, including the saved table."""
    measure(place / "state", [MILLION], chunk)
    used = sum(path.stat().st_blocks * 512 for path in (place / "state").iterdir())
    note(f"disk.{chunk}", "bytes", [used / MILLION])
