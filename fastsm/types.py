"""The small values that go in and out: ids, entries, metadata, decoded commands, statistics."""

from __future__ import annotations

import reprlib
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

_shorten = reprlib.Repr()
_shorten.maxother = _shorten.maxstring = 60


class LogId(NamedTuple):
    """The place of an entry in the Raft log; ``LogId(0, 0)`` when there is none."""

    index: int = 0  # type: ignore[assignment]  # tuples have a method of this name
    term: int = 0


class Entry(NamedTuple):
    """A committed Raft entry; ``command`` is made by :func:`fastsm.put` and its siblings."""

    index: int  # type: ignore[assignment]  # tuples have a method of this name
    term: int
    command: bytes


class ScanResult(NamedTuple):
    """Pairs sorted by key, and the last applied index at which they were the state."""

    entries: list[tuple[bytes, bytes]]
    revision: int


@dataclass(frozen=True, slots=True)
class SnapshotMetadata:
    """What a snapshot holds (everything up to ``last_included``) and its 32-byte BLAKE3 checksum."""

    last_included: LogId
    checksum: bytes


class _Command:
    """Shared by the decoded commands: a ``repr`` that stays short however large the value is."""

    __slots__ = ()

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{name}={_shorten.repr(getattr(self, name))}" for name in self.__dataclass_fields__  # type: ignore[attr-defined]
        )
        return f"{type(self).__name__}({fields})"


@dataclass(frozen=True, slots=True, repr=False)
class Put(_Command):
    """``fastsm.put``, decoded."""

    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True, repr=False)
class Delete(_Command):
    """``fastsm.delete``, decoded."""

    key: bytes


@dataclass(frozen=True, slots=True, repr=False)
class CompareAndSwap(_Command):
    """``fastsm.compare_and_swap``, decoded."""

    key: bytes
    expected: bytes | None
    value: bytes | None


@dataclass(frozen=True, slots=True, repr=False)
class Noop(_Command):
    """``fastsm.noop``, decoded."""


@dataclass(frozen=True, slots=True, repr=False)
class Config(_Command):
    """``fastsm.config``, decoded."""

    data: bytes


@dataclass(frozen=True, slots=True, repr=False)
class Batch(_Command):
    """``fastsm.batch`` or ``fastsm.put_many``, decoded."""

    commands: tuple[Put | Delete | CompareAndSwap | Noop, ...]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What opening a directory found.

    ``clean`` says whether the last close was; ``torn_bytes`` is the length of the torn tail that was cut
    (0: none), ``suspect_bytes`` what the first flush writes again because no sync is known to cover it.
    """

    clean: bool = True
    frames: int = 0
    log_bytes: int = 0
    torn_bytes: int = 0
    suspect_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    """A moment of a state machine, as :meth:`fastsm.FastStateMachine.stats` gives it. Sizes are in bytes."""

    keys: int
    live_bytes: int
    dead_bytes: int
    pinned_bytes: int
    log_bytes: int
    base_bytes: int
    generation: int
    base: LogId
    table_bytes: int
    table_load: float
    term_runs: int
    last_applied: LogId
    durable: LogId
    verified: bool
    flush_count: int
    flush_seconds: float
    recovery: Recovery

    def as_dict(self) -> dict[str, Any]:
        """The same, flat: one name, one number, as metrics libraries like it."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                flat.update({f"{name}_{inner}": v for inner, v in value.items()})
            elif isinstance(value, LogId):
                flat[f"{name}_index"], flat[f"{name}_term"] = value
            else:
                flat[name] = value
        return flat
