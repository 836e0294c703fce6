"""Stores that keep keys in order, for `bench_order`, with the same few methods each.

Only fastsm and LMDB use the disk; all of LMDB's calls are in one write transaction, which is never committed.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pytest

import fastsm
from bench.data import entries_of, fill

Pairs = list[tuple[bytes, bytes]]
NAMES = ("fastsm", "lmdb", "sortedcontainers", "bisect")


class InOrder(Protocol):
    """The measured methods. ``delete_range`` removes the keys ``start <= key < end`` and returns how many."""

    def put(self, key: bytes, value: bytes) -> object: ...

    def scan(self, start: bytes, limit: int) -> Pairs: ...

    def count(self, start: bytes, end: bytes) -> int: ...

    def delete_range(self, start: bytes, end: bytes) -> int: ...


class Fastsm:
    def __init__(self, machine: fastsm.FastStateMachine, keys: list[bytes], value: bytes) -> None:
        self.machine = machine
        fill(machine, random.Random(1).sample(keys, len(keys)), [value] * len(keys))
        self.count = machine.count

    def put(self, key: bytes, value: bytes) -> object:
        return self.machine.apply(entries_of([(key, value)], self.machine.last_applied().index + 1))

    def scan(self, start: bytes, limit: int) -> Pairs:
        return self.machine.scan(start, limit=limit).entries

    def delete_range(self, start: bytes, end: bytes) -> int:
        (answer,) = self.machine.apply([(self.machine.last_applied().index + 1, 1, fastsm.delete_range(start, end))])
        return answer.value  # type: ignore[union-attr,no-any-return]


class Lmdb:
    def __init__(self, path: Path, keys: list[bytes], value: bytes) -> None:
        lmdb = pytest.importorskip("lmdb")
        self.env = lmdb.open(str(path), map_size=16 << 30, sync=False, metasync=False, writemap=True)
        self.transaction = self.env.begin(write=True)
        for key in keys:
            self.transaction.put(key, value)
        self.put = self.transaction.put

    def scan(self, start: bytes, limit: int) -> Pairs:
        cursor = self.transaction.cursor()
        return list(islice(cursor.iternext(), limit)) if cursor.set_range(start) else []

    def count(self, start: bytes, end: bytes) -> int:
        cursor = self.transaction.cursor()
        total = 0
        if cursor.set_range(start):
            for key in cursor.iternext(values=False):
                if key >= end:
                    break
                total += 1
        return total

    def delete_range(self, start: bytes, end: bytes) -> int:
        cursor = self.transaction.cursor()
        total = 0
        there = cursor.set_range(start)
        while there and cursor.key() < end:
            there = cursor.delete()  # moves to the next key
            total += 1
        return total


class Sorted:
    def __init__(self, keys: list[bytes], value: bytes) -> None:
        self.pairs = pytest.importorskip("sortedcontainers").SortedDict(dict.fromkeys(keys, value))
        self.put = self.pairs.__setitem__

    def scan(self, start: bytes, limit: int) -> Pairs:
        return [(key, self.pairs[key]) for key in islice(self.pairs.irange(start), limit)]

    def count(self, start: bytes, end: bytes) -> int:
        return self.pairs.bisect_left(end) - self.pairs.bisect_left(start)  # type: ignore[no-any-return]

    def delete_range(self, start: bytes, end: bytes) -> int:
        keys = list(self.pairs.irange(start, end, (True, False)))
        for key in keys:
            del self.pairs[key]
        return len(keys)


class Bisected:
    """A dict, and a list of its keys that is kept sorted."""

    def __init__(self, keys: list[bytes], value: bytes) -> None:
        self.pairs, self.keys = dict.fromkeys(keys, value), sorted(keys)

    def put(self, key: bytes, value: bytes) -> object:
        if key not in self.pairs:
            insort(self.keys, key)
        self.pairs[key] = value
        return None

    def scan(self, start: bytes, limit: int) -> Pairs:
        at = bisect_left(self.keys, start)
        return [(key, self.pairs[key]) for key in self.keys[at : at + limit]]

    def count(self, start: bytes, end: bytes) -> int:
        return bisect_left(self.keys, end) - bisect_left(self.keys, start)

    def delete_range(self, start: bytes, end: bytes) -> int:
        first, stop = bisect_left(self.keys, start), bisect_left(self.keys, end)
        for key in self.keys[first:stop]:
            del self.pairs[key]
        del self.keys[first:stop]
        return stop - first


def open_in_order(name: str, machine_at: Callable[..., Any], path: Path, keys: list[bytes], value: bytes) -> InOrder:
    """Return a store that holds these sorted keys, each with the same value; skip if its package is missing."""
    if name == "fastsm":
        return Fastsm(machine_at(ordered=True, auto_compact=False), keys, value)
    if name == "lmdb":
        return Lmdb(path, keys, value)
    return Sorted(keys, value) if name == "sortedcontainers" else Bisected(keys, value)
