"""Seeded histories of committed entries, as a Raft library would supply them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import fastsm
from fastsm import Entry, LogId

KEYS = (b"", b"\x00", b"k" * 300, *(b"key-%d" % number for number in range(21)))


class History:
    """An endless sequence of consecutive chunks; equal seeds give equal chunks.

    It has puts, deletes, compare-and-swaps that match and that do not, batches with and without them, noops and
    configs, in terms that rise now and then; with ``contiguous=False`` some indexes are left out. One command in four
    answers or is about time: additions, ranges, transactions, sessions, touches, ticks, and deadlines in puts.
    ``plain=True`` leaves these out.
    """

    def __init__(
        self, seed: int, *, contiguous: bool = True, large: bool = True, after: LogId | None = None,
        plain: bool = False,
    ) -> None:
        self.random = random.Random(seed)
        self.contiguous = contiguous
        self.large = large
        self.last = after or LogId()
        self.plain = plain
        self._believed: dict[bytes, bytes | None] = {}
        self._sessions: list[int] = []
        self._now = 0

    def __iter__(self) -> Iterator[list[Entry]]:
        while True:
            yield self.chunk()

    def chunk(self, count: int | None = None) -> list[Entry]:
        """Return the next chunk, of ``count`` entries."""
        if count is None:
            count = self.random.choice((1, 1, 1, 2, 3, 8, 20))
        return [self.entry() for _ in range(count)]

    def entry(self) -> Entry:
        """Return the next entry."""
        index, term = self.last
        index += 1 if self.contiguous else self.random.choice((1, 1, 1, 2, 5))
        term += self.random.random() < 0.03 or not term
        self.last = LogId(index, term)
        return Entry(index, term, self.command())

    def command(self) -> bytes:
        """Return a command of any kind."""
        if not self.plain and self.random.random() < 0.25:
            return self.answering()
        kind = self.random.random()
        if kind < 0.05:
            return fastsm.noop()
        if kind < 0.08:
            return fastsm.config(self.value())
        if kind < 0.2:
            return fastsm.batch([self.operation() for _ in range(self.random.randrange(6))])
        return self.operation()

    def answering(self) -> bytes:  # one for each kind
        """Return a command that answers, or one about time."""
        kind = self.random.random()
        if kind < 0.1:
            self._sessions = [*self._sessions[-2:], self.last.index]
            return fastsm.open_session(expires=self.expires())
        if kind < 0.35 and self._sessions:
            inner = self.random.choice((self.answer, self.operation))()
            session, sequence = self.random.choice(self._sessions), self.random.randrange(1, 4 + self.last.index // 50)
            return fastsm.once(session, sequence, inner, expires=self.expires())
        if kind < 0.37 and self._sessions:
            return fastsm.forget(self.random.choice(self._sessions))
        if kind < 0.5:
            self._now += self.random.choice((0, 1, 10))
            return fastsm.tick(self._now, limit=self.random.choice((None, None, 0, 2)))
        return self.answer()

    def answer(self) -> bytes:
        """Return a command that answers, and that a ``once`` may hold."""
        key, kind = self.random.choice(KEYS), self.random.random()
        if kind < 0.3:
            return fastsm.add(b"key-9", self.random.randrange(-9, 99))
        if kind < 0.6:
            return fastsm.touch(key, self.expires())
        if kind < 0.65:
            return fastsm.delete_prefix(self.random.choice((b"key-1", b"k")))
        if kind < 0.7:
            return fastsm.delete_range(b"key-15", b"key-19")
        members = [fastsm.put(key, self.value(), expires=self.expires()), fastsm.touch(b"key-2", self.expires())]
        if kind < 0.8:
            return fastsm.batch([*members, fastsm.add(b"key-9", 1)])
        return fastsm.transaction([fastsm.exists(key)], members, [fastsm.put(b"key-3", b"", expires=self.expires())])

    def expires(self) -> int | None:
        """Return a deadline soon after the last tick, or None."""
        return self._now + self.random.randrange(1, 50) if self.random.random() < 0.6 else None

    def operation(self) -> bytes:
        """Return a put, a delete or a compare-and-swap."""
        key = self.random.choice(KEYS)
        kind = self.random.random()
        if kind < 0.2:
            self._believed[key] = None
            return fastsm.delete(key)
        value = self.value() if kind < 0.9 else None
        if kind < 0.65:
            self._believed[key] = value
            expires = None if self.plain or self.random.random() < 0.8 else self.expires()
            return fastsm.put(key, value, expires=expires)
        # The value that was written last is mostly still there, so expecting it mostly matches; other values do not.
        matches = self.random.random() < 0.7
        expected = self._believed.get(key) if matches else self.random.choice((None, b"", b"no such value"))
        if matches:
            self._believed[key] = value
        return fastsm.compare_and_swap(key, expected, value)

    def value(self) -> bytes:
        """Return a value: most are small, some have two pages, few exceed a window of populated pages."""
        dice = self.random.random()
        if self.large and dice < 0.002:
            return self.random.randbytes(200 << 10)
        if dice < 0.03:
            return self.random.randbytes(5 << 10)
        return self.random.randbytes(self.random.randrange(301))


def state_of(machine: fastsm.FastStateMachine | fastsm.MemoryStateMachine) -> dict[str, object]:
    """Return everything that two state machines with the same history must have in common."""
    applied = machine.last_applied()
    first = max(0, applied.index - 200)
    return {
        "values": dict(zip(KEYS, machine.get_many(KEYS), strict=True)),
        "len": machine.len(),
        "applied": applied,
        "membership": machine.membership(),
        "clock": machine.clock(),
        "deadlines": [machine.deadline(key) for key in KEYS],
        "next deadline": machine.next_deadline(),
        "terms": [machine.entry_term(index) for index in range(first, applied.index + 3)],
    }


def model_of(chunks: list[list[Entry]], *, contiguous: bool = True) -> fastsm.MemoryStateMachine:
    """Return the model after these chunks."""
    model = fastsm.MemoryStateMachine(contiguous=contiguous)
    for chunk in chunks:
        model.apply(chunk)
    return model


def put(index: int, size: int = 10) -> list[Entry]:
    """A chunk of one put."""
    return [Entry(index, 1, fastsm.put(b"key-%d" % index, b"v" * size))]
