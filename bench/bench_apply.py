"""apply beside a plain loop that does the same to a dict, with no durability at all; commands are made before."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from conftest import KEYS, fill, fresh

import fastsm

ENTRIES = 100_000


def apply_chunks(apply: Callable[[Any], object], chunks: list[Any]) -> None:
    for chunk in chunks:
        apply(chunk)


def into_dict(pairs: dict[bytes, bytes], changes: list[tuple[bytes, bytes | None]]) -> None:
    for key, value in changes:
        if value is None:
            pairs.pop(key, None)
        else:
            pairs[key] = value


@pytest.mark.parametrize("size", [1, 10, 100, 1000])
def test_apply_chunks_of(compare: Any, machine_at: Any, keys: list[bytes], values: list[bytes], size: int) -> None:
    """Half overwrites of a million keys, a tenth deletes, the rest new keys."""
    machine = machine_at()
    fill(machine, keys, values)
    pairs = dict(zip(fresh(keys), fresh(values), strict=True))
    source = random.Random(7)

    def prepare() -> Any:
        machine.flush()
        changes: list[tuple[bytes, bytes | None]] = []
        for kind in source.choices(["overwrite", "delete", "new"], [5, 1, 4], k=ENTRIES):
            key = source.randbytes(16) if kind == "new" else source.choice(keys)
            changes.append((key, None if kind == "delete" else source.choice(values)))
        first = machine.last_applied().index + 1
        entries = [
            (first + i, 1, fastsm.delete(key) if value is None else fastsm.put(key, value))
            for i, (key, value) in enumerate(changes)
        ]
        theirs = [(bytes(bytearray(k)), None if v is None else bytes(bytearray(v))) for k, v in changes]
        return (machine.apply, [entries[i : i + size] for i in range(0, ENTRIES, size)]), (pairs, theirs)

    compare(apply_chunks, into_dict, ENTRIES, prepare)


@pytest.mark.parametrize("flush", [False, True], ids=["apply", "apply_and_flush"])
def test_load_a_million(compare: Any, machine_at: Any, keys: list[bytes], values: list[bytes], flush: bool) -> None:
    """A million new keys in chunks of 1,000, beside a dict that grows from nothing."""

    def prepare() -> Any:
        entries = [(i + 1, 1, fastsm.put(*pair)) for i, pair in enumerate(zip(keys, values, strict=True))]
        chunks = [entries[i : i + 1000] for i in range(0, KEYS, 1000)]
        return (machine_at(), chunks), (list(zip(fresh(keys), fresh(values), strict=True)),)

    def subject(machine: fastsm.FastStateMachine, chunks: list[Any]) -> None:
        apply_chunks(machine.apply, chunks)
        if flush:
            machine.flush()

    def base(changes: list[tuple[bytes, bytes]]) -> None:
        pairs = {}
        for key, value in changes:
            pairs[key] = value

    compare(subject, base, KEYS, prepare, rounds=5)
