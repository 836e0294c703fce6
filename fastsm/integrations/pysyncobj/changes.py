"""Which keys an applied entry changed, for those who want to be told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fastsm.command import decode
from fastsm.types import Batch, CompareAndSwap, Delete, Put


class Change(NamedTuple):
    """A key that was put or deleted, and the entry that did so; ``value`` is None where it was deleted."""

    index: int  # type: ignore[assignment]  # tuples have a method of this name
    term: int
    key: bytes
    value: bytes | None


def _pairs(command: Any) -> Iterator[tuple[bytes, bytes | None]]:
    if isinstance(command, (Put, CompareAndSwap)):
        yield command.key, command.value
    elif isinstance(command, Delete):
        yield command.key, None
    elif isinstance(command, Batch):
        for each in command.commands:
            yield from _pairs(each)


def changes_of(entries: Sequence[tuple[int, int, bytes]], results: Sequence[Any]) -> list[Change]:
    """In order, of the entries that took effect; of a key that is changed several times, each."""
    return [
        Change(index, term, key, value)
        for (index, term, command), result in zip(entries, results, strict=True) if result
        for key, value in _pairs(decode(command))
    ]  # fmt: skip
