"""Seeded data: the same keys, values and changes in every run."""

from __future__ import annotations

import random
from typing import Any

import fastsm

smoke = False  # set by `pytest bench --smoke` before the suites are imported


def scaled(count: int) -> int:
    """Return the count, or in a smoke run a five-hundredth of it, but at least 10."""
    return max(count // 500, 10) if smoke else count


KEY_BYTES = 16
VALUE_BYTES = 100
Pairs = list[tuple[bytes, "bytes | None"]]


def random_keys(count: int, size: int = KEY_BYTES, seed: int = 1) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(size) for _ in range(count)]


def random_values(count: int, size: int = VALUE_BYTES, seed: int = 2) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(size) for _ in range(count)]


def fresh(items: list[bytes]) -> list[bytes]:
    """Return equal bytes as new objects without a cached hash, like keys that come from a network."""
    return [bytes(bytearray(item)) for item in items]


def fresh_pairs(pairs: Pairs) -> Pairs:
    return [(bytes(bytearray(key)), None if value is None else bytes(bytearray(value))) for key, value in pairs]


def changes(source: random.Random, keys: list[bytes], values: list[bytes], count: int) -> Pairs:
    """Draw changes: half overwrites, a tenth deletes, the rest new keys."""
    made: Pairs = []
    for kind in source.choices(["overwrite", "delete", "new"], [5, 1, 4], k=count):
        key = source.randbytes(KEY_BYTES) if kind == "new" else source.choice(keys)
        made.append((key, None if kind == "delete" else source.choice(values)))
    return made


def entries_of(pairs: Pairs, first_index: int) -> list[tuple[int, int, bytes]]:
    """Return the pairs as committed entries; a value of None becomes a delete."""
    return [
        (first_index + i, 1, fastsm.delete(key) if value is None else fastsm.put(key, value))
        for i, (key, value) in enumerate(pairs)
    ]


def chunked(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def fill(machine: fastsm.FastStateMachine, keys: list[bytes], values: list[bytes], chunk: int = 1000) -> None:
    """Put all pairs."""
    first = machine.last_applied().index + 1
    for start in range(0, len(keys), chunk):
        pairs: Pairs = list(zip(keys[start : start + chunk], values[start : start + chunk], strict=True))
        machine.apply(entries_of(pairs, first + start))


def into_dict(pairs: dict[bytes, bytes], made: Pairs) -> None:
    """Make the same changes in a dict by a plain loop, with no durability: what `apply` is compared with."""
    for key, value in made:
        if value is None:
            pairs.pop(key, None)
        else:
            pairs[key] = value
