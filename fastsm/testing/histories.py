"""Random histories for the conformance suite, and their expected outcomes on plain dicts."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from fastsm import Answer, Entry
from fastsm.testing.plain import Meaning, PlainState, encode

KEYS = (b"", b"\x00", b"\xff" * 40, b"a", b"aa", b"b", b"key", b"k" * 300)
VALUES = (b"", b"\x00", b"one", b"two", b"two\x00", b"three" * 200)
NUMBERS = (0, 1, -1, 5, 2**63 - 1, -(2**63))
TEXTS = (b"0", b"7", b"-41", b"01", b"-0", b"9223372036854775807", b"9223372036854775808")


class History:
    """Entries in terms that rise now and then, with the expected results and values.

    The commands are put, delete, compare_and_swap, noop, config and batches of these, which all give True or False.
    """

    def __init__(self, seed: int, length: int) -> None:
        self._random = random.Random(seed)
        self.entries: list[Entry] = []
        self.results: list[bool | Answer] = []
        self.state = PlainState()
        term = 1
        for index in range(1, length + 1):
            term += self._random.choice((0, 0, 0, 0, 0, 1, 3))
            meaning = self._meaning(index)
            self.entries.append(Entry(index, term, encode(meaning)))
            self.results.append(self.state.perform(index, meaning))

    @property
    def values(self) -> dict[bytes, bytes]:
        return self.state.values

    def chunks(self, largest: int, *, replayed: int = 0) -> list[list[Entry]]:
        """Splits the history at random; each chunk starts with up to ``replayed`` entries of earlier ones."""
        chunks, first = [], 0
        while first < len(self.entries):
            stop = first + self._random.randint(1, largest)
            again = self._random.randint(0, min(first, replayed))
            chunks.append(self.entries[first - again : stop])
            first = stop
        return chunks

    def _drawn(self, *weights: tuple[float, Callable[[], Meaning]]) -> Meaning:
        return self._random.choices([make for _, make in weights], [weight for weight, _ in weights])[0]()

    def _meaning(self, index: int) -> Meaning:
        return self._drawn(
            (5, lambda: ("noop",)),
            (5, lambda: ("config", self._value())),
            (20, lambda: ("batch", [self._operation() for _ in range(self._random.randrange(4))])),
            (70, self._operation),
        )

    def _operation(self) -> Meaning:
        return self._drawn(
            (40, lambda: ("put", self._key(), self._value())), (15, lambda: ("delete", self._key())), (45, self._swap))

    def _swap(self) -> Meaning:
        key = self._key()
        expected = self.values.get(key) if self._random.random() < 0.6 else self._random.choice((None, *VALUES))
        return ("compare_and_swap", key, expected, self._random.choice((None, *VALUES)))

    def _key(self) -> bytes:
        return self._random.choice(KEYS)

    def _value(self) -> bytes:
        return self._random.choice(VALUES)


class AnsweringHistory(History):
    """Also commands that answer: sums, reads, ranges, transactions, sessions and commands done once in them."""

    def __init__(self, seed: int, length: int) -> None:
        self._opened: list[int] = []  # the latest sessions
        super().__init__(seed, length)

    def _meaning(self, index: int) -> Meaning:
        return self._drawn(
            (4, lambda: ("noop",)), (4, lambda: ("config", self._value())), (22, self._operation), (12, self._batch),
            (6, self._read), (16, lambda: self._transaction(index)), (6, lambda: self._open(index)),
            (2, self._forget), (28, lambda: self._once(index)),
        )

    def _operation(self) -> Meaning:
        return self._drawn(
            (25, lambda: ("put", self._key(), self._value())), (10, lambda: ("delete", self._key())), (25, self._swap),
            (30, self._add), (10, self._range),
        )

    def _add(self) -> Meaning:
        return ("add", self._key(), self._random.choice(NUMBERS), {"initial": self._random.choice(NUMBERS)})

    def _range(self) -> Meaning:
        if self._random.random() < 0.3:
            return ("delete_prefix", self._random.choice((b"k", b"aa", b"\xff", b"no such")))
        return ("delete_range", self._random.choice((None, *KEYS)), self._random.choice((None, *KEYS)))

    def _read(self) -> Meaning:
        return ("read", self._key())

    def _batch(self) -> Meaning:
        return ("batch", [self._operation() for _ in range(self._random.randrange(4))])

    def _transaction(self, index: int) -> Meaning:
        branches = [[self._in_branch() for _ in range(self._random.randrange(4))] for _ in range(2)]
        return ("transaction", [self._condition(index) for _ in range(self._random.randrange(3))], *branches)

    def _in_branch(self) -> Meaning:
        meaning = self._drawn((7, self._operation), (3, self._read))
        return meaning if meaning[0] != "compare_and_swap" else self._read()

    def _condition(self, index: int) -> Meaning:
        key = self._key()
        return self._drawn(
            (1, lambda: ("exists", key)), (1, lambda: ("absent", key)),
            (2, lambda: ("value_is", key, self._random.choice((self.values.get(key), None, *VALUES)))),
            (2, lambda: ("modified_at", key, self._random.choice((self.state.writers.get(key, 0), 0, index - 1)))),
        )

    def _open(self, index: int) -> Meaning:
        self._opened = [*self._opened[-2:], index]
        return ("open_session", self._options())

    def _forget(self) -> Meaning:
        return ("forget", self._session())

    def _session(self) -> int:
        known = [number for number in self._opened if number in self.state.sessions]
        return self._random.choice(known) if known and self._random.random() < 0.9 else self._random.randrange(99)

    def _once(self, index: int) -> Meaning:
        number = self._session()
        session = self.state.sessions.get(number)
        sequence = max(1, (session.sequence if session else 1) + self._random.choice((0, 0, 1, 1, 1, 7, -1)))
        inner = self._meaning(index)
        while inner[0] in ("config", "open_session", "once", "forget", "tick"):
            inner = self._meaning(index)
        return ("once", number, sequence, inner, self._options())

    def _options(self) -> dict[str, Any]:
        return {}

    def _value(self) -> bytes:
        return self._random.choice((*VALUES, *TEXTS))


class TimedHistory(AnsweringHistory):
    """Adds deadlines of keys and sessions, touches that move deadlines of keys, and ticks that remove what is due."""

    def _meaning(self, index: int) -> Meaning:
        return self._drawn((85, lambda: super(TimedHistory, self)._meaning(index)), (15, self._tick))

    def _operation(self) -> Meaning:
        meaning = self._drawn((80, super()._operation), (20, self._touch))
        may_expire = meaning[0] == "put" or (meaning[0] == "compare_and_swap" and meaning[3] is not None)
        return (*meaning, self._options()) if may_expire else meaning

    def _touch(self) -> Meaning:
        return ("touch", self._key(), self._random.choice((None, self._deadline(), self._deadline())))

    def _tick(self) -> Meaning:
        now = max(0, self.state.clock + self._random.choice((-5, 0, 1, 3, 10, 30)))
        return ("tick", now, {"limit": self._random.choice((None, None, 0, 1, 2, 5))})

    def _options(self) -> dict[str, Any]:
        return {"expires": self._random.choice((None, self._deadline()))}

    def _deadline(self) -> int:
        return self._random.choice((2**63 - 1, *[max(0, self.state.clock + self._random.randrange(-3, 40))] * 9))
