"""The ids of entries in the model: which terms follow from the list of seen entries, and which ids fit it."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from fastsm.arguments import index_of
from fastsm.errors import SnapshotRangeError
from fastsm.types import LogId


def checked_id(log_id: Sequence[Any]) -> LogId:
    """Converts two numbers to an id; ``OrderError`` if no entry can have it."""
    index, term = operator.index(log_id[0]), operator.index(log_id[1])
    return LogId(index_of(index), index_of(term, "term"))


def term_of(index: int, seen: list[LogId]) -> int | None:
    """Returns the term of an entry that was seen, or that is between two seen entries of one term; otherwise None."""
    at = bisect_left(seen, (index,))
    if at == len(seen):
        return None
    if seen[at].index == index or (at and seen[at - 1].term == seen[at].term):
        return seen[at].term
    return None


def fits(one: LogId, seen: list[LogId]) -> bool:
    """Returns whether an entry fits the history of the seen entries: one term per entry, and terms never fall."""
    before = max((other for other in seen if other.index <= one.index), default=LogId())
    after = min((other for other in seen if other.index >= one.index), default=one)
    return before.term <= one.term <= after.term and (before.index != one.index or before == one)


def in_range(last: LogId, base: LogId, seen: list[LogId]) -> LogId:
    """Returns the id of a state, from the base on: `last`, or the entry before it if it is between two terms."""
    applied = seen[-1] if seen else LogId()
    if not base.index <= last.index <= applied.index:
        raise SnapshotRangeError(f"expected an id from {base} to {applied}, found {last}")
    at = bisect_left(seen, (last.index,))
    if last.index == base.index or seen[at].index == last.index:
        known = base if last.index == base.index else seen[at]
        if last != known:
            raise SnapshotRangeError(f"expected {known}, found {last}: another term")
        return last
    before = seen[at - 1] if at else LogId()
    if not before.term <= last.term <= seen[at].term:
        raise SnapshotRangeError(f"{last} cannot be between {before} and {seen[at]}: another term")
    return last if at and before.term == seen[at].term else before
