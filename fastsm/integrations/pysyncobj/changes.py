"""What applied entries have changed, read from the state machine's log, which has the outcome of every command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastsm.disk import format, headers
from fastsm.generation.log import Log
from fastsm.machine import FastStateMachine


class Change(NamedTuple):
    """A key that was put or deleted, and the entry that did it; ``value`` is None if it was deleted."""

    index: int  # type: ignore[assignment]  # tuples have a method of this name
    term: int
    key: bytes
    value: bytes | None


class Place:
    """Where a state machine's log ended before certain entries were applied."""

    __slots__ = ("_applied", "_end", "_log", "_machine")

    def __init__(self, machine: FastStateMachine) -> None:
        self._machine = machine
        self._applied = machine.last_applied().index
        self._log: Log = machine._log
        self._end = self._log.end

    def changes(self, entries: Sequence[tuple[int, int, bytes]]) -> list[Change] | None:
        """Returns what these entries changed, in order: each put and each delete of a key.

        Skips entries that were applied before this object was made. None if a compaction has removed the others'
        records from the log in the meantime. O(bytes that they wrote).
        """
        terms = {index: term for index, term, _ in entries if index > self._applied}
        if not terms:
            return []
        found = _changes_from(self._log, self._end, terms)
        if found is None:  # a compaction intervened, and they are in the log that it began
            found = _changes_from(self._machine._log, headers.LOG_HEADER_BYTES, terms)
        return found


def _changes_from(log: Log, offset: int, terms: dict[int, int]) -> list[Change] | None:
    """Returns the changes in a log, or None unless it has all of the entries."""
    mapping, stop = log.mapping, log.end
    first, last = next(iter(terms)), next(reversed(terms))
    if mapping is None or log.head.base_index >= first:
        return None
    buffer = memoryview(mapping)[log.start :]
    found: list[Change] = []
    reached = 0
    while offset < stop and reached < last:
        end, _, runs, place = format.unpack_frame(buffer, offset)
        reached = runs[-1][0] if runs else reached
        if reached >= first:
            found += _changes_of(buffer, place, end, terms)
        offset = end
    return found if reached >= last else None


def _changes_of(buffer: memoryview, place: int, end: int, terms: dict[int, int]) -> Iterator[Change]:
    while place < end:
        index, operation, key, value, _, place = format.unpack_record(buffer, place)
        name = format.OPERATIONS[operation]
        if index in terms and name in ("put", "delete"):
            yield Change(index, terms[index], key, value if name == "put" else None)
