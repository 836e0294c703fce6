"""A Raft log as a list, written from its page of docs alone: the model that tests compare ``RaftLog`` with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from fastsm import CompactedError, Entry, LogId, OrderError, RaftLog


class LogState(NamedTuple):
    """Everything that a log holds."""

    border: LogId
    entries: tuple[Entry, ...]
    hard_state: tuple[int, bytes | None]


def state_of(log: RaftLog) -> LogState:
    """Read the state of a log by its public methods."""
    first, last = log.first_index, log.last_index
    term = log.term(first - 1)
    assert term is not None
    entries = tuple(log.entries(first, last))
    assert [entry.index for entry in entries] == list(range(first, last + 1))
    return LogState(LogId(first - 1, term), entries, log.hard_state())


class ListLog:
    """The model of a Raft log."""

    def __init__(self, state: LogState | None = None) -> None:
        self.state = LogState(LogId(0, 0), (), (0, None)) if state is None else state

    @property
    def first_index(self) -> int:
        return self.state.border.index + 1

    @property
    def last(self) -> LogId:
        return LogId(*self.state.entries[-1][:2]) if self.state.entries else self.state.border

    def term(self, index: int) -> int | None:
        border, entries, _ = self.state
        if index == border.index:
            return border.term
        return entries[index - border.index - 1].term if border.index < index <= self.last.index else None

    def entries(self, first: int, last: int, max_bytes: int | None = None) -> list[Entry]:
        if last < first:
            return []
        if first < self.first_index:
            raise CompactedError("compacted", oldest=self.first_index)
        found, size = [], 0
        for entry in self.state.entries[first - self.first_index : last - self.first_index + 1]:
            size += len(entry.command)
            if max_bytes is not None and found and size > max_bytes:
                break
            found.append(entry)
        return found

    def append(self, entries: Sequence[tuple[int, int, bytes]]) -> None:
        border, mine, hard = self.state
        new: list[Entry] = []
        before: tuple[int, int] | None = None
        for index, term, _ in entries:
            if before is not None and (index != before[0] + 1 or term < before[1]):
                raise OrderError("order", index=index)
            before = index, term
        for index, term, command in entries:
            if index <= border.index or index > self.last.index + 1 + len(new):
                raise OrderError("place", index=index)
            if index <= self.last.index:
                if self.term(index) != term:
                    raise OrderError("conflict", index=index)
                continue
            if not new and term < self.last.term:
                raise OrderError("term", index=index)
            new.append(Entry(index, term, command))
        self.state = LogState(border, mine + tuple(new), hard)

    def truncate_after(self, index: int) -> None:
        border, entries, hard = self.state
        if index < border.index:
            raise OrderError("border", index=index)
        self.state = LogState(border, entries[: index - border.index], hard)

    def compact(self, up_to: LogId) -> None:
        border, entries, hard = self.state
        if up_to.index <= border.index:
            return
        if up_to.term < border.term:
            raise OrderError("term", index=up_to.index)
        kept = entries[up_to.index - border.index :] if self.term(up_to.index) == up_to.term else ()
        self.state = LogState(up_to, kept, hard)

    def save_hard_state(self, term: int, voted_for: bytes | None) -> None:
        known, vote = self.state.hard_state
        if term < known or (term == known and vote is not None and voted_for != vote):
            raise OrderError("hard state")
        self.state = self.state._replace(hard_state=(term, voted_for))


class Step(NamedTuple):
    """A call of a log's method."""

    method: str
    arguments: tuple[object, ...]


def invent(rng: random.Random, model: ListLog, largest: int = 5000) -> Step:  # noqa: PLR0911
    """Draw a call that the model accepts, as a Raft node might make it."""
    border, _, (term, vote) = model.state
    last = model.last
    dice = rng.random()
    if dice < 0.55:
        chunk = []
        index, of = last
        start = rng.randrange(max(border.index, index - 3), index + 1)
        chunk += [Entry(each, model.term(each) or 0, b"skipped") for each in range(start + 1, index + 1)]
        for _ in range(rng.choice((0, 1, 1, 3, 30))):
            index, of = index + 1, of + (rng.random() < 0.1)
            chunk.append(Entry(index, of, rng.randbytes(rng.choice((0, 1, 7, 8, 200, largest)))))
        return Step("append", (chunk,))
    if dice < 0.65:
        return Step("truncate_after", (rng.randrange(border.index, last.index + 2),))
    if dice < 0.8:
        index = rng.randrange(border.index, last.index + 1)
        return Step("compact", (LogId(index, model.term(index) or 0),))
    if dice < 0.84:
        index = rng.randrange(border.index, last.index + 40)
        return Step("compact", (LogId(index, last.term + rng.choice((0, 1, 9))),))
    if dice < 0.94:
        if rng.random() < 0.5 or vote is not None:
            return Step("save_hard_state", (term + rng.choice((1, 1, 7)), rng.choice((None, b"", b"node-\xff"))))
        return Step("save_hard_state", (term, rng.choice((None, b"me"))))
    return Step("sync", ())


def do(log: RaftLog | ListLog, step: Step) -> None:
    """Make the call."""
    if step.method == "sync" and isinstance(log, ListLog):
        return
    getattr(log, step.method)(*step.arguments)
