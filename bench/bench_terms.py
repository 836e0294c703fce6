"""entry_term and entry_terms over a history of a thousand elections."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np

import fastsm
from bench.data import chunked, scaled

ENTRIES, TERMS, LOOKUPS = scaled(100_000), 1000, scaled(100_000)


def test_entry_term(note: Any, machine_at: Any) -> None:
    machine = machine_at()
    noop = fastsm.noop()
    for chunk in chunked([(i + 1, 1 + i * TERMS // ENTRIES, noop) for i in range(ENTRIES)], 1000):
        machine.apply(chunk)
    source = random.Random(12)
    one, many = [], []
    for _ in range(9):
        ids = [source.randrange(1, ENTRIES + 1) for _ in range(LOOKUPS)]
        entry_term = machine.entry_term
        start = time.perf_counter()
        for entry_id in ids:
            entry_term(entry_id)
        one.append((time.perf_counter() - start) / LOOKUPS * 1e9)
        array = np.array(ids * 10, dtype=np.uint64)
        start = time.perf_counter()
        machine.entry_terms(array)
        many.append((time.perf_counter() - start) / len(array) * 1e9)
    note("entry_term", "ns", one)
    note("entry_terms", "ns", many)
