"""Random histories for the conformance suite, and what they must come to on a plain dict."""

from __future__ import annotations

import random
from typing import Any

import fastsm
from fastsm import Entry

KEYS = (b"", b"\x00", b"\xff" * 40, b"a", b"aa", b"b", b"key", b"k" * 300)
VALUES = (b"", b"\x00", b"one", b"two", b"two\x00", b"three" * 200)

# What a command does: its name and its arguments, as the functions that make commands take them.
Meaning = tuple[Any, ...]


def encode(meaning: Meaning) -> bytes:
    """The command of this meaning."""
    name, *arguments = meaning
    if name == "batch":
        return fastsm.batch([encode(member) for member in arguments[0]])
    command: bytes = getattr(fastsm, name)(*arguments)
    return command


def perform(values: dict[bytes, bytes], meaning: Meaning) -> bool:
    """Does to a dict what the command does to a state machine; the result of its entry."""
    name, *arguments = meaning
    if name == "put":
        values[arguments[0]] = arguments[1]
    elif name == "delete":
        values.pop(arguments[0], None)
    elif name == "compare_and_swap":
        key, expected, value = arguments
        if values.get(key) != expected:
            return False
        perform(values, ("delete", key) if value is None else ("put", key, value))
    elif name == "batch":
        trial = dict(values)
        if not all(perform(trial, member) for member in arguments[0]):
            return False
        values.clear()
        values.update(trial)
    return True


class History:
    """Entries of every kind in terms that rise now and then, and the results and values they must come to."""

    def __init__(self, seed: int, length: int) -> None:
        self._random = random.Random(seed)
        self.entries: list[Entry] = []
        self.results: list[bool] = []
        self.values: dict[bytes, bytes] = {}
        term = 1
        for index in range(1, length + 1):
            term += self._random.choice((0, 0, 0, 0, 0, 1, 3))
            meaning = self._meaning()
            self.entries.append(Entry(index, term, encode(meaning)))
            self.results.append(perform(self.values, meaning))

    def chunks(self, largest: int, *, replayed: int = 0) -> list[list[Entry]]:
        """The history cut at random, each chunk with up to ``replayed`` entries of those before it."""
        chunks, first = [], 0
        while first < len(self.entries):
            stop = first + self._random.randint(1, largest)
            again = self._random.randint(0, min(first, replayed))
            chunks.append(self.entries[first - again : stop])
            first = stop
        return chunks

    def _meaning(self) -> Meaning:
        dice = self._random.random()
        if dice < 0.05:
            return ("noop",)
        if dice < 0.1:
            return ("config", self._random.choice(VALUES))
        if dice < 0.3:
            return ("batch", [self._operation() for _ in range(self._random.randrange(4))])
        return self._operation()

    def _operation(self) -> Meaning:
        key, dice = self._random.choice(KEYS), self._random.random()
        if dice < 0.4:
            return ("put", key, self._random.choice(VALUES))
        if dice < 0.55:
            return ("delete", key)
        expected = self.values.get(key) if self._random.random() < 0.6 else self._random.choice((None, *VALUES))
        return ("compare_and_swap", key, expected, self._random.choice((None, *VALUES)))
