"""What callers hand over: taken as it should be, or refused with a message that says what to hand over instead."""

from __future__ import annotations

from typing import Any


def bytes_of(source: Any, name: str) -> bytes:
    """Copies a bytes-like object; ``name`` is what a ``TypeError`` calls it."""
    if isinstance(source, str):
        raise TypeError(f"{name} is a str: encode it first, {name}.encode()")
    try:
        view = memoryview(source)
    except TypeError as error:
        raise TypeError(f"{name}: {str(error).removeprefix('memoryview: ')}") from error
    return bytes(view)


def pair_of(log_id: Any, name: str) -> tuple[Any, Any]:
    """Takes a ``LogId``, or any other pair of an index and a term, apart; anything else is a ``TypeError``."""
    try:
        index, term = log_id
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: expected a LogId(index, term) or a tuple of both, found {log_id!r}; "
            "entry_term(index) tells the term of an applied entry"
        ) from None
    return index, term


def not_an_entry(item: Any, position: int) -> TypeError:
    """Returns the error for an item of a chunk that is no entry."""
    found = f"a tuple of {len(item)}" if isinstance(item, tuple) else type(item).__name__
    hint = "" if isinstance(item, tuple) else "; a chunk is a list of entries, also where it is a single one"
    return TypeError(f"position {position} of the chunk: expected an Entry(index, term, command), found {found}{hint}")
