"""Inputs for decoders, drawn from a stream of decisions: `random`'s, or the bytes of a coverage-guided fuzzer.

An input is a structure with a few false fields, or a known file with a few changed bytes. Checksums, if they should be
correct, are computed by the caller afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

T = TypeVar("T")

# Numbers that overflow, wrap, or are a limit or a mark somewhere in the formats.
NUMBERS = (
    0, 1, 2, 7, 8, 9, 15, 16, 23, 24, 95, 96, 97, 0xFFFF, 0x10000, 2**31 - 1, 2**31, 2**32 - 9, 2**32 - 1, 2**32,
    2**36, 2**39 - 8, 2**39, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 2, 2**64 - 1,
)


class Stream(random.Random):
    """A stream of decisions made by bytes; after the last byte all decisions are 0."""

    def __new__(cls, _data: bytes) -> Stream:
        return super().__new__(cls)

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = data
        self._at = 0

    def getrandbits(self, count: int, /) -> int:
        size = count + 7 >> 3
        piece = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(piece, "little") & (1 << count) - 1

    def random(self) -> float:
        return self.getrandbits(16) / (1 << 16)


def lie(dice: random.Random, number: int, limit: int = 2**64) -> int:
    """Return a false number in place of a number: close to it, or a special one."""
    if dice.random() < 0.5:
        return (number + dice.choice((-24, -16, -8, -2, -1, 1, 2, 8, 16, 24))) % limit
    return dice.choice(NUMBERS) % limit


def sometimes(dice: random.Random, chance: float, number: int, limit: int = 2**64) -> int:
    """Return a number or, with some chance, a false one."""
    return lie(dice, number, limit) if dice.random() < chance else number


def shuffle_some(dice: random.Random, items: list[T], make: Callable[[], T]) -> None:
    """Drop, repeat or add a part, or exchange two."""
    if not items:
        items.append(make())
        return
    at, other = dice.randrange(len(items)), dice.randrange(len(items))
    way = dice.randrange(4)
    if way == 0:
        del items[at]
    elif way == 1:
        items.insert(other, items[at])
    elif way == 2:
        items[at], items[other] = items[other], items[at]
    else:
        items.insert(at, make())


def change_bytes(dice: random.Random, data: bytes, others: Sequence[bytes] = (b"",)) -> bytes:
    """Make a few changes: flipped bits, other numbers, pieces removed, repeated or copied from another input."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 6))):
        way = dice.randrange(7)
        at = dice.randrange(len(changed) + 1)
        if way <= 1 and at < len(changed):
            changed[at] ^= 1 << dice.randrange(8)
        elif way == 2:
            width = dice.choice((1, 2, 4, 8))
            at &= ~(width - 1)
            old = int.from_bytes(changed[at : at + width], "little")
            changed[at : at + width] = lie(dice, old, 1 << 8 * width).to_bytes(width, "little")
        elif way == 3:
            del changed[at : at + dice.choice((1, 8, 16, 24, 64))]
        elif way == 4:
            size = dice.choice((8, 16, 24, 64))
            start = dice.randrange(len(changed) + 1) & ~7
            changed[at & ~7 : at & ~7] = changed[start : start + size]
        elif way == 5:
            other = dice.choice(others)
            start = dice.randrange(len(other) + 1)
            changed[at : at + 32] = other[start : start + 32]
        else:
            del changed[at:]
    return bytes(changed)


def pieces_of(dice: random.Random, data: Any) -> list[tuple[int, Any]]:
    """Cut the bytes into some pieces; return each with its offset."""
    cuts = sorted({0, len(data), *(dice.randrange(len(data) + 1) for _ in range(dice.randrange(5)))})
    return [(start, data[start:stop]) for start, stop in pairwise(cuts)]
