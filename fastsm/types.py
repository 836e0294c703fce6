"""The small values that go in and out: ids, entries, metadata, decoded commands, statistics."""

from __future__ import annotations

import operator
import reprlib
import struct
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

import blake3

from fastsm.arguments import bytes_of, pair_of
from fastsm.errors import FormatVersionError, SnapshotFormatError
from fastsm.units import count_text, size_text, time_text

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

CHECKSUM_BYTES = 32
_ID_LIMIT = 2**64 - 1
# Magic, version, index, term, checksum; followed by 8 bytes of BLAKE3 over all of these
_WIRE = struct.Struct("<4sIQQ32s")
_WIRE_MAGIC, _WIRE_VERSION, _WIRE_SUM_BYTES = b"FSMM", 0, 8

_shorten = reprlib.Repr()
_shorten.maxother = _shorten.maxstring = 60


class LogId(NamedTuple):
    """The place of an entry in the Raft log; ``LogId(0, 0)`` if there is none."""

    index: int = 0  # type: ignore[assignment]  # tuples have a method of this name
    term: int = 0


def log_id_text(log_id: LogId | None) -> str:
    """Formats an id, as ``"entry 1,200 of term 3"``; ``"nothing"`` for ``LogId(0, 0)``, ``"none"`` for None."""
    if log_id is None:
        return "none"
    return f"entry {log_id.index:,} of term {log_id.term:,}" if log_id != LogId() else "nothing"


class Entry(NamedTuple):
    """A committed Raft entry; ``command`` is made by :func:`fastsm.put` or a similar function."""

    index: int  # type: ignore[assignment]  # tuples have a method of this name
    term: int
    command: bytes


class Change(NamedTuple):
    """What an entry did to a key: the value that it set, or None if it removed the key."""

    index: int  # type: ignore[assignment]  # tuples have a method of this name
    term: int
    key: bytes
    value: bytes | None


class Position(NamedTuple):
    """Where a watch continues: after ``offset`` changes of an entry. ``term`` is None if unknown."""

    index: int  # type: ignore[assignment]  # tuples have a method of this name
    term: int | None
    offset: int


class ScanResult(NamedTuple):
    """Pairs sorted by key, and the last applied index of the state that they are from."""

    entries: list[tuple[bytes, bytes]]
    revision: int


class _Answer(NamedTuple):
    ok: bool
    value: Any
    reason: str | None = None


class Answer(_Answer):
    """The answer of an entry: whether it took effect, a value, and, if it did not, the reason.

    ``bool(answer)`` is ``ok``. ``value`` is None, a bool, a 64-bit int, bytes, or a list of such values. ``reason``, if
    ``ok`` is False, is one of "mismatch", "not a number", "overflow", "abort", "failed", "too large", "stale", "no
    session". All three are the same on every replica.

    ``error``, only on this replica, is the exception that led to "failed"; it is ignored by ``==``, ``hash`` and
    ``repr``, and not pickled.
    """

    error: Exception | None = None

    def __bool__(self) -> bool:
        return self.ok

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"an Answer is immutable: {name} cannot be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"an Answer is immutable: {name} cannot be deleted")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self)

    @classmethod
    def failed(cls, error: Exception) -> Answer:
        """Returns the answer of a procedure that raised ``error``."""
        answer = cls(False, None, "failed")
        answer.__dict__["error"] = error
        return answer


Result: TypeAlias = "bool | Answer | None"  # the result of an entry


@dataclass(frozen=True, slots=True)
class SnapshotMetadata:
    """What a snapshot contains (everything up to ``last_included``), and its 32-byte BLAKE3 checksum.

    >>> metadata = SnapshotMetadata(LogId(7, 2), bytes(32))
    >>> SnapshotMetadata.from_bytes(metadata.to_bytes()) == metadata
    True
    """

    last_included: LogId
    checksum: bytes

    def to_bytes(self) -> bytes:
        """Returns 64 bytes for the wire, with a checksum of their own. docs/format.md describes them."""
        index, term = self.last_included
        if len(self.checksum) != CHECKSUM_BYTES:
            raise ValueError(f"expected a checksum of {CHECKSUM_BYTES} bytes, found {len(self.checksum)}")
        try:
            fields = _WIRE.pack(_WIRE_MAGIC, _WIRE_VERSION, index, term, self.checksum)
        except struct.error:
            raise ValueError(f"expected an index and a term of 64 bits, found {self.last_included}") from None
        return fields + _wire_sum(fields)

    @classmethod
    def from_bytes(cls, data: Buffer) -> Self:
        """Parses what :meth:`to_bytes` returned. ``SnapshotFormatError`` if any byte was changed."""
        content = bytes(memoryview(data))
        size = _WIRE.size + _WIRE_SUM_BYTES
        if len(content) != size:
            raise SnapshotFormatError(
                f"metadata of a snapshot: expected {size} bytes, found {len(content)}; pass what to_bytes() returned")
        fields, found = content[: _WIRE.size], content[_WIRE.size :]
        magic, version, index, term, checksum = _WIRE.unpack(fields)
        if magic != _WIRE_MAGIC:
            raise SnapshotFormatError(
                f"metadata of a snapshot: expected magic {_WIRE_MAGIC!r}, found {magic!r}; pass the bytes that "
                "to_bytes() returned")
        if found != _wire_sum(fields):
            raise SnapshotFormatError(
                f"metadata of a snapshot: expected checksum {_wire_sum(fields).hex()}, found {found.hex()}; a byte was "
                "changed in transit: request the metadata again")
        if version != _WIRE_VERSION:
            raise FormatVersionError("metadata of a snapshot", _WIRE_VERSION, version)
        return cls(LogId(index, term), checksum)


def _wire_sum(fields: bytes) -> bytes:
    return blake3.blake3(fields).digest(length=_WIRE_SUM_BYTES)


def checked_metadata(metadata: Any, path: str) -> SnapshotMetadata:
    """Returns metadata from a caller as plain values, for a snapshot at ``path``.

    ``TypeError`` for other types; ``SnapshotFormatError`` for metadata that no snapshot can have.
    """
    if not isinstance(metadata, SnapshotMetadata):
        raise TypeError(f"expected a SnapshotMetadata, found {type(metadata).__name__}")
    index, term = map(operator.index, pair_of(metadata.last_included, "last_included"))
    checksum = bytes_of(metadata.checksum, "checksum")
    if not (0 <= index < _ID_LIMIT and 0 <= term < _ID_LIMIT):
        raise SnapshotFormatError(
            f"{path}: expected last_included with index and term from 0 to 2**64 - 2, found {LogId(index, term)}")
    if len(checksum) != CHECKSUM_BYTES:
        raise SnapshotFormatError(
            f"{path}: expected a snapshot's checksum of {CHECKSUM_BYTES} bytes, found {len(checksum)}")
    return SnapshotMetadata(LogId(index, term), checksum)


class _Command:
    """The base of decoded commands: a ``repr`` without defaults, short however large a value is."""

    __slots__ = ()

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{name}={_shorten.repr(getattr(self, name))}"
            for name, field in self.__dataclass_fields__.items()  # type: ignore[attr-defined]
            if getattr(self, name) != field.default
        )
        return f"{type(self).__name__}({fields})"


@dataclass(frozen=True, slots=True, repr=False)
class Put(_Command):
    """A command of ``fastsm.put``, decoded."""

    key: bytes
    value: bytes
    expires: int | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Delete(_Command):
    """A command of ``fastsm.delete``, decoded."""

    key: bytes


@dataclass(frozen=True, slots=True, repr=False)
class CompareAndSwap(_Command):
    """A command of ``fastsm.compare_and_swap``, decoded."""

    key: bytes
    expected: bytes | None
    value: bytes | None
    expires: int | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Noop(_Command):
    """A command of ``fastsm.noop``, decoded."""


@dataclass(frozen=True, slots=True, repr=False)
class Config(_Command):
    """A command of ``fastsm.config``, decoded."""

    data: bytes


@dataclass(frozen=True, slots=True, repr=False)
class Add(_Command):
    """A command of ``fastsm.add``, decoded."""

    key: bytes
    delta: int
    initial: int


@dataclass(frozen=True, slots=True, repr=False)
class Read(_Command):
    """A command of ``fastsm.read``, decoded."""

    key: bytes


@dataclass(frozen=True, slots=True, repr=False)
class DeleteRange(_Command):
    """A command of ``fastsm.delete_range`` or ``fastsm.delete_prefix``, decoded."""

    start: bytes
    end: bytes | None


@dataclass(frozen=True, slots=True, repr=False)
class Batch(_Command):
    """A command of ``fastsm.batch`` or ``fastsm.put_many``, decoded."""

    commands: tuple[Put | Delete | CompareAndSwap | Noop | Add | Touch | DeleteRange, ...]


@dataclass(frozen=True, slots=True, repr=False)
class ValueIs(_Command):
    """A condition of ``fastsm.value_is`` or ``fastsm.absent``, decoded."""

    key: bytes
    value: bytes | None


@dataclass(frozen=True, slots=True, repr=False)
class Exists(_Command):
    """A condition of ``fastsm.exists``, decoded."""

    key: bytes


@dataclass(frozen=True, slots=True, repr=False)
class ModifiedAt(_Command):
    """A condition of ``fastsm.modified_at``, decoded."""

    key: bytes
    index: int


@dataclass(frozen=True, slots=True, repr=False)
class Transaction(_Command):
    """A command of ``fastsm.transaction``, decoded."""

    conditions: tuple[ValueIs | Exists | ModifiedAt, ...]
    then: tuple[Put | Delete | Add | Touch | DeleteRange | Read, ...]
    otherwise: tuple[Put | Delete | Add | Touch | DeleteRange | Read, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Call(_Command):
    """A command of ``fastsm.call``, decoded."""

    name: str
    payload: bytes
    version: int


@dataclass(frozen=True, slots=True, repr=False)
class OpenSession(_Command):
    """A command of ``fastsm.open_session``, decoded."""

    expires: int | None


@dataclass(frozen=True, slots=True, repr=False)
class Once(_Command):
    """A command of ``fastsm.once``, decoded."""

    session: int
    sequence: int
    command: _Command
    expires: int | None


@dataclass(frozen=True, slots=True, repr=False)
class Forget(_Command):
    """A command of ``fastsm.forget``, decoded."""

    session: int


@dataclass(frozen=True, slots=True, repr=False)
class Touch(_Command):
    """A command of ``fastsm.touch``, decoded."""

    key: bytes
    expires: int | None


@dataclass(frozen=True, slots=True, repr=False)
class Tick(_Command):
    """A command of ``fastsm.tick``, decoded."""

    now: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class Recovery:
    """What opening a directory found.

    ``clean``: whether the last close was clean; ``torn_bytes``: the size of the torn tail that was cut (0: none);
    ``suspect_bytes``: how much the first flush writes again because no known sync covers it.
    """

    clean: bool = True
    frames: int = 0
    log_bytes: int = 0
    torn_bytes: int = 0
    suspect_bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        end = "a clean close" if self.clean else "an unclean end"
        parts = [f"{end}, {count_text(self.frames, 'frame')} in {size_text(self.log_bytes)}"]
        if self.torn_bytes:
            parts.append(f"a torn tail of {size_text(self.torn_bytes)}")
        if self.suspect_bytes:
            parts.append(f"{size_text(self.suspect_bytes)} that no known sync covers")
        return "; ".join(parts)


def flattened(stats: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass and of nested ones as a flat dict; a ``LogId`` becomes an index and a term."""
    flat: dict[str, Any] = {}
    for name, value in asdict(stats).items():
        if isinstance(value, dict):
            flat.update({f"{name}_{inner}": v for inner, v in value.items()})
        elif isinstance(value, LogId):
            flat[f"{name}_index"], flat[f"{name}_term"] = value
        else:
            flat[name] = value
    return flat


@dataclass(frozen=True, slots=True)
class Stats:
    """The figures of a state machine at one moment, as returned by :meth:`fastsm.FastStateMachine.stats`.

    Sizes are in bytes. ``print`` shows them in human units; :meth:`as_dict` is for metrics.
    """

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

    def __str__(self) -> str:
        flushes = count_text(self.flush_count, "flush", "flushes")
        verified = "every byte" if self.verified else "not every byte yet"
        rows = {
            "keys": f"{self.keys:,}, {size_text(self.live_bytes)} live, {size_text(self.dead_bytes)} dead",
            "last applied": log_id_text(self.last_applied),
            "durable": log_id_text(self.durable),
            "files": f"log {size_text(self.log_bytes)}, base {size_text(self.base_bytes)} as of "
            f"{log_id_text(self.base)}, generation {self.generation}",
            "pinned": f"{size_text(self.pinned_bytes)}, by views and iterators of older generations",
            "table": f"{size_text(self.table_bytes)}, {self.table_load:.0%} full",
            "terms": count_text(self.term_runs, "run"),
            "verified": verified,
            "flushes": flushes + (f" in {time_text(self.flush_seconds)}" if self.flush_count else ""),
            "recovery": str(self.recovery),
        }
        return "\n".join(f"{label:12}  {text}" for label, text in rows.items())

    def as_dict(self) -> dict[str, Any]:
        """Returns these figures as a flat dict of numbers, as metrics libraries expect."""
        return flattened(self)
