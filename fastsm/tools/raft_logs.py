"""Examining a Raft log from outside: nothing is written, no lock is kept, and its owner is not disturbed."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fastsm.arguments import LARGEST
from fastsm.disk.files import Directory
from fastsm.errors import CorruptionError, FastsmError, StorageError
from fastsm.generation.names import LOG_NAMES, NEWEST
from fastsm.journal.checking import check_segments
from fastsm.journal.engine import LogEngine
from fastsm.journal.journal import Journal
from fastsm.types import Entry
from fastsm.units import count_text, size_text

TRIES = 10  # an owner may be creating and removing files
PIECE_BYTES = 4 << 20


def are_of_a_log(names: Iterable[str]) -> bool:
    """Returns whether these are the files of a Raft log, or some of them."""
    return any(name == NEWEST or LOG_NAMES.fullmatch(name) for name in names)


class OutsideLog:
    """A log as it was when it was opened."""

    def __init__(self, journal: Journal, directory: Directory) -> None:
        self._journal = journal
        self._directory = directory
        self._engine = LogEngine()
        self._begun = journal.is_begun
        if self._begun:
            self._clean = self._engine._attach(journal, 0)[0]

    def facts(self) -> dict[str, Any]:
        """Returns facts about the log, as plain values."""
        if not self._begun:
            return {
                "first_index": 1, "last_index": 0, "last_term": 0, "durable_index": 0, "border_index": 0,
                "border_term": 0, "term": 0, "voted_for": None, "entries": 0, "log_bytes": 0, "segments": 0,
                "torn_bytes": 0, "clean": False,
            }  # fmt: skip
        first, last, last_term, durable, entries, size, segments, *_ = self._engine._counts()
        vote = self.vote()
        return {
            "first_index": first, "last_index": last, "last_term": last_term, "durable_index": durable,
            "border_index": first - 1, "border_term": self._engine.term(first - 1),
            "term": self._engine.hard_state()[0],
            "voted_for": None if vote is None else ascii(vote.decode("utf-8", "replace"))[1:-1], "entries": entries,
            "log_bytes": size, "segments": segments, "torn_bytes": self._journal.torn_bytes, "clean": self._clean,
        }  # fmt: skip

    def vote(self) -> bytes | None:
        return self._engine.hard_state()[1] if self._begun else None

    def entries(self, first: int, last: int | None) -> Iterator[Entry]:
        """Yields the existing entries from ``first`` to ``last``, read piece by piece."""
        if not self._begun:
            return
        index = max(first, self._engine.first_index)
        stop = self._engine.last_index if last is None else last
        while True:
            found = self._engine.entries(index, min(stop, LARGEST), max_bytes=PIECE_BYTES)
            if not found:
                return
            yield from found
            index = found[-1].index + 1

    def verified(self, progress: Callable[[int, int], None] | None) -> str:
        """Checks every byte; returns a sentence about what was verified."""
        facts = self.facts()
        if self._begun:
            check_segments(self._directory, self._engine._files(), self._is_needed, progress)
        text = f"{count_text(facts['entries'], 'entry', 'entries')} up to {facts['last_index']:,}, " + size_text(
            facts["log_bytes"])
        if facts["torn_bytes"]:
            text += f"; after it a torn tail of {size_text(facts['torn_bytes'])}, which opening cuts off"
        return text

    def _is_needed(self, _: str) -> bool:
        return self._directory.owner() is None  # otherwise it may just have been compacted away


@contextmanager
def opened(path: str) -> Iterator[OutsideLog]:
    """Opens the log in a directory; raises what opening it would raise, except because of an owner."""
    directory = Directory(path, create=False)
    try:
        journal = _read(path, directory)
        try:
            yield OutsideLog(journal, directory)
        finally:
            journal.abandon()
    finally:
        directory.close()


def _read(path: str, directory: Directory) -> Journal:
    """Reads the log, repeatedly while its owner changes it."""
    for left in reversed(range(TRIES)):
        try:
            return Journal(path, read_only=True)
        except FastsmError as error:
            moved = isinstance(error, CorruptionError) or getattr(error, "errno", None) == errno.ENOENT
            if not left or not moved or directory.owner() is None:
                raise
    raise StorageError(errno.EAGAIN, "its owner changes it faster than it can be read: try again", path)
