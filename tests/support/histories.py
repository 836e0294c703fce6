"""Seeded histories of committed entries, as a Raft library would hand them over."""

from __future__ import annotations

import random
from collections.abc import Iterator

import fastsm
from fastsm import Entry, LogId

KEYS = (b"", b"\x00", b"k" * 300, *(b"key-%d" % number for number in range(21)))


class History:
    """An endless sequence of chunks that follow one another; equal seeds give equal chunks.

    Puts, deletes, compare-and-swaps that match and that do not, batches with and without them, noops and
    configs, deadlines, touches, ticks and sessions, in terms that rise now and then; with ``contiguous=False`` some indexes are left out.
    """

    def __init__(self, seed: int, *, contiguous: bool = True, large: bool = True, after: LogId | None = None):
        self.random = random.Random(seed)
        self.contiguous = contiguous
        self.large = large
        self.last = after or LogId()
        self._believed: dict[bytes, bytes | None] = {}

    def __iter__(self) -> Iterator[list[Entry]]:
        while True:
            yield self.chunk()

    def chunk(self, count: int | None = None) -> list[Entry]:
        """The next chunk, of ``count`` entries."""
        if count is None:
            count = self.random.choice((1, 1, 1, 2, 3, 8, 20))
        return [self.entry() for _ in range(count)]

    def entry(self) -> Entry:
        """The next entry."""
        index, term = self.last
        index += 1 if self.contiguous else self.random.choice((1, 1, 1, 2, 5))
        term += self.random.random() < 0.03 or not term
        self.last = LogId(index, term)
        return Entry(index, term, self.command())

    def command(self) -> bytes:
        """One command of any kind."""
        kind = self.random.random()
        if kind < 0.05:
            return fastsm.noop()
        if kind < 0.08:
            return fastsm.config(self.value())
        if kind < 0.11:
            return fastsm.tick(self.last.index, limit=self.random.choice((None, 0, 1, 3)))
        if kind < 0.13:
            return fastsm.open_session(expires=self.deadline())
        if kind < 0.16:
            session = max(1, self.last.index - self.random.randrange(40))
            return fastsm.once(session, self.random.randrange(1, 4), self.operation(), expires=self.deadline())
        if kind < 0.27:
            return fastsm.batch([self.operation() for _ in range(self.random.randrange(6))])
        return self.operation()

    def deadline(self) -> int | None:
        """None, or a time that ticks come to within some tens of entries."""
        return self.random.choice((None, max(0, self.last.index + self.random.randrange(-9, 40))))

    def operation(self) -> bytes:
        """A put, a delete or a compare-and-swap."""
        key = self.random.choice(KEYS)
        kind = self.random.random()
        if kind < 0.2:
            self._believed[key] = None
            return fastsm.delete(key)
        value = self.value() if kind < 0.9 else None
        if kind < 0.25:
            return fastsm.touch(key, self.deadline())
        if kind < 0.65:
            self._believed[key] = value
            return fastsm.put(key, value, expires=self.deadline() if kind < 0.4 else None)
        # What was written last is mostly still there: a match. Else it is a miss, mostly.
        matches = self.random.random() < 0.7
        expected = self._believed.get(key) if matches else self.random.choice((None, b"", b"no such value"))
        if matches:
            self._believed[key] = value
        return fastsm.compare_and_swap(key, expected, value)

    def value(self) -> bytes:
        """Mostly small, some of two pages, few that no window of populated pages holds."""
        dice = self.random.random()
        if self.large and dice < 0.002:
            return self.random.randbytes(200 << 10)
        if dice < 0.03:
            return self.random.randbytes(5 << 10)
        return self.random.randbytes(self.random.randrange(301))


def state_of(machine: fastsm.FastStateMachine | fastsm.MemoryStateMachine) -> dict[str, object]:
    """All that two state machines of one history must have in common."""
    applied = machine.last_applied()
    first = max(0, applied.index - 200)
    return {
        "values": dict(zip(KEYS, machine.get_many(KEYS), strict=True)),
        "len": machine.len(),
        "applied": applied,
        "membership": machine.membership(),
        "deadlines": [machine.deadline(key) for key in KEYS],
        "clock": machine.clock(),
        "next deadline": machine.next_deadline(),
        "terms": [machine.entry_term(index) for index in range(first, applied.index + 3)],
    }


def model_of(chunks: list[list[Entry]], *, contiguous: bool = True) -> fastsm.MemoryStateMachine:
    """The model after these chunks."""
    model = fastsm.MemoryStateMachine(contiguous=contiguous)
    for chunk in chunks:
        model.apply(chunk)
    return model
