"""Arguments of calls: converted, or refused with a message that says what to pass instead."""

from __future__ import annotations

import operator
import time
from collections.abc import Mapping, Set
from typing import Any

from fastsm.errors import OrderError

LARGEST = 2**64 - 2  # the largest index or term


def bytes_of(source: Any, name: str) -> bytes:
    """Copies a bytes-like object; ``name`` is its name in a ``TypeError``."""
    return bytes(_view_of(source, name))


def flat_view(source: Any, name: str) -> memoryview:
    """Returns a flat view of the bytes of a bytes-like object, without a copy if they lie in one piece."""
    view = _view_of(source, name)
    try:
        return view.cast("B")
    except (TypeError, ValueError):  # in several pieces, empty, or in a byte order of its own
        return memoryview(bytes(view))


def _view_of(source: Any, name: str) -> memoryview:
    if isinstance(source, str):
        raise TypeError(f"{name} is a str: encode it first, {name}.encode()")
    try:
        return memoryview(source)
    except TypeError as error:
        raise TypeError(f"{name}: {str(error).removeprefix('memoryview: ')}") from error


def pair_of(log_id: Any, name: str) -> tuple[Any, Any]:
    """Splits a ``LogId``, or any other pair of an index and a term; ``TypeError`` for anything else.

    Bytes are a sequence of integers too, and sets and mappings have no order of their items: none of them is a pair.
    """
    try:
        if not isinstance(log_id, tuple) and isinstance(log_id, (bytes, bytearray, memoryview, Set, Mapping)):
            raise TypeError
        index, term = log_id
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: expected a LogId(index, term) or a tuple of both, found {log_id!r}; "
            "entry_term(index) returns the term of an applied entry"
        ) from None
    return index, term


def index_of(index: Any, name: str = "index") -> int:
    """Returns an index, or a term, as an int; ``OrderError`` if it is out of the range that entries can have."""
    number = operator.index(index)
    if not 0 <= number <= LARGEST:
        raise OrderError(f"{name} {number}: expected 0 to 2**64 - 2")
    return number


def watch_start(start: Any) -> tuple[int, int | None, int | None]:
    """Splits the start of a watch: an index, or a ``Position``, which may be a plain tuple.

    Returns the entry after which to continue, its term (None: unknown), and how many of its changes were delivered
    (None: all of them).
    """
    if isinstance(start, tuple):
        if len(start) != 3:
            raise TypeError(f"start={start!r}: expected an index, or a Position (index, term, offset)")
        index, term, offset = (None if number is None else operator.index(number) for number in start)
        for name, number in (("an index", index), ("a term", term or 0), ("an offset", offset)):
            if number is None:
                raise TypeError(f"start={start!r}: expected {name}, found None")
            if not 0 <= number <= LARGEST:
                raise ValueError(f"start={start!r}: expected {name} from 0 to 2**64 - 2")
        assert index is not None
        return index, term, offset
    try:
        index = operator.index(start)
    except TypeError:
        raise TypeError(f"start={start!r}: expected an index, or a Position (index, term, offset)") from None
    if not 0 <= index <= LARGEST:
        raise ValueError(f"start={index}: expected an index from 0 to 2**64 - 2, or a Position")
    return max(index, 1) - 1, None, None


def not_an_entry(item: Any, position: int) -> TypeError:
    """Returns the error for an item of a chunk that is not an entry."""
    found = f"a tuple of {len(item)}" if isinstance(item, tuple) else type(item).__name__
    hint = "" if isinstance(item, tuple) else "; a chunk is a list of entries, even if there is only one"
    return TypeError(f"position {position} of the chunk: expected an Entry(index, term, command), found {found}{hint}")


def at_least_zero(name: str, number: Any, what: str = "") -> None:
    """Raises a ``TypeError`` or a ``ValueError`` that names an option unless it is a number from 0 on."""
    try:
        fine = number >= 0  # not of NaN
    except TypeError:
        raise TypeError(f"{name}={number!r}: expected a number, 0 or more{what}") from None
    if not fine:
        raise ValueError(f"{name}={number!r}: expected 0 or more{what}")


def check_timeout(timeout: float | None) -> None:
    """Raises a ``TypeError`` or a ``ValueError`` unless a timeout is a number of seconds from 0 on, or None."""
    if timeout is not None:
        at_least_zero("timeout", timeout, " seconds, or None")


def end_of_wait(timeout: float | None) -> float | None:
    """Returns the time, of ``time.monotonic``, at which a wait ends; None: never."""
    check_timeout(timeout)
    return None if timeout is None else time.monotonic() + timeout


def plain_id(log_id: Any, name: str) -> tuple[int, int]:
    """Returns an id as plain integers; ``ValueError`` if one is out of the range that entries can have."""
    index, term = map(operator.index, pair_of(log_id, name))
    if not (0 <= index <= LARGEST and 0 <= term <= LARGEST):
        raise ValueError(f"{name}={log_id!r}: expected 0 to 2**64 - 2 each")
    return index, term
