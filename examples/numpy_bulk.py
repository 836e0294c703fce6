"""Put a million rows from NumPy columns and read them back, without a Python object for each row.

Run: ``python examples/numpy_bulk.py [rows]``
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import fastsm

ROWS_PER_ENTRY = 50_000  # keeps each command small enough for a Raft library


def main(folder: Path, rows: int) -> None:
    # Keys: the row's number, big-endian, so that they sort. Values: two columns of float64, 16 bytes a row.
    numbers = np.arange(rows, dtype=">u8")
    keys = numbers.view(np.uint8).reshape(rows, 8)
    table = np.random.default_rng(1).normal(size=(rows, 2))
    values = table.view(np.uint8).reshape(rows, 16)

    with fastsm.FastStateMachine(folder / "state") as machine:
        begin = time.perf_counter()
        for index, first in enumerate(range(0, rows, ROWS_PER_ENTRY), 1):
            part = slice(first, first + ROWS_PER_ENTRY)
            machine.apply([(index, 1, fastsm.put_many(keys[part], values[part]))])
        machine.flush()
        print(f"in:  {machine.len():,} rows in {time.perf_counter() - begin:.2f} s, durable")

        begin = time.perf_counter()
        key_data, _, value_data, _ = machine.columns()  # all as of one moment, in no particular order
        order = np.argsort(key_data.view(">u8"))
        found = value_data.view(np.float64).reshape(-1, 2)[order]
        print(f"out: {len(found):,} rows in {time.perf_counter() - begin:.2f} s")
        assert np.array_equal(found, table)

        wanted = np.random.default_rng(2).integers(0, rows, min(rows, 1000)).astype(">u8")
        data, _, present = machine.get_columns([key.tobytes() for key in wanted.view("V8")])
        assert present.all()
        assert np.array_equal(data.view(np.float64).reshape(-1, 2), table[wanted.astype(np.int64)])
        print(f"and {len(wanted):,} of them by key")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name), int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
