"""Snapshots of the model: made from docs/format.md alone, so that the compiled code can be compared with them."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

import blake3

from fastsm.disk.files import make_directory, storage_errors
from fastsm.errors import SnapshotFormatError
from fastsm.snapshot import codec
from fastsm.snapshot.file import Snapshot
from fastsm.snapshot.writer import present_head, put_in_place, remove_leftovers, temporary_file
from fastsm.types import LogId, SnapshotMetadata

PUT, CONFIG, SESSION, TOUCH = 1, 3, 6, 8
NO_DEADLINE = 2**64 - 1
CODECS = {"none": 0, "zstd": 1}


class Newest(NamedTuple):
    """The newest record of its kind and key: the index of its entry, and the deadline in a put or a touch."""

    index: int  # type: ignore[assignment]  # tuples have a method of this name
    expires: int | None = None


@dataclass
class State:
    """A state as of an entry. Values are in the order in which they were written."""

    values: dict[bytes, bytes] = field(default_factory=dict)
    writers: dict[bytes, LogId] = field(default_factory=dict)
    membership: tuple[LogId, bytes] | None = None
    seen: list[LogId] = field(default_factory=list)
    sessions: dict[int, bytes] = field(default_factory=dict)  # the value of each session's record
    clock: int = 0  # in milliseconds since 1970
    # In the order in which they were written. A later put or delete of its key supersedes a touch.
    records: dict[tuple[int, bytes], Newest] = field(default_factory=dict)

    def copy(self) -> State:
        return State(
            dict(self.values), dict(self.writers), self.membership, list(self.seen), dict(self.sessions), self.clock,
            dict(self.records))

    @property
    def last(self) -> LogId:
        return self.seen[-1] if self.seen else LogId()

    # ---- effects of entries ----------------------------------------------------------------------------

    def put(self, log_id: LogId, key: bytes, value: bytes, expires: int | None = None) -> None:
        """Sets a key, which moves to the end of the order."""
        self.delete(log_id, key)
        self.values[key] = value
        self.writers[key] = log_id
        self.records[PUT, key] = Newest(log_id.index, expires)

    def delete(self, log_id: LogId, key: bytes) -> None:
        """Removes a key."""
        del log_id
        self.values.pop(key, None)
        self.writers.pop(key, None)
        self.records.pop((PUT, key), None)
        self.records.pop((TOUCH, key), None)

    def touch(self, log_id: LogId, key: bytes, expires: int | None) -> None:
        """Changes only the deadline of an existing key."""
        self.records.pop((TOUCH, key), None)
        self.records[TOUCH, key] = Newest(log_id.index, expires)

    def remember(self, log_id: LogId, session: int, value: bytes) -> None:
        """Sets the value of a session's record."""
        self.forget(log_id, session)
        self.sessions[session] = value
        self.records[SESSION, struct.pack("<Q", session)] = Newest(log_id.index)

    def forget(self, log_id: LogId, session: int) -> None:
        """Ends a session."""
        del log_id
        self.sessions.pop(session, None)
        self.records.pop((SESSION, struct.pack("<Q", session)), None)

    def set_clock(self, log_id: LogId, now: int) -> None:
        """Moves the clock."""
        del log_id
        self.clock = now

    def set_membership(self, log_id: LogId, data: bytes) -> None:
        """Sets the cluster's membership."""
        self.membership = (log_id, data)

    # ---- time ------------------------------------------------------------------------------------------

    def deadline(self, key: bytes) -> int | None:
        """Returns the deadline of a key, or None."""
        record = self.records.get((TOUCH, key)) or self.records.get((PUT, key))
        return record.expires if record else None

    def deadlines_of_keys(self) -> list[tuple[int, bytes]]:
        """Returns the keys that have deadlines, in the order in which a tick removes due keys."""
        found = ((self.deadline(key), key) for key in self.values)
        return sorted((expires, key) for expires, key in found if expires is not None)

    def deadlines_of_sessions(self) -> list[tuple[int, int]]:
        """Returns the sessions that have deadlines, in the order in which a tick removes due sessions."""
        found = ((struct.unpack_from("<Q", value, 8)[0], session) for session, value in self.sessions.items())
        return sorted((expires, session) for expires, session in found if expires != NO_DEADLINE)


def runs_of(seen: list[LogId]) -> list[tuple[int, int, int]]:
    """Returns maximal runs (first, last, term) of entries, including indexes between two entries of one term."""
    runs: list[tuple[int, int, int]] = []
    for index, term in seen:
        if runs and runs[-1][2] == term:
            runs[-1] = (runs[-1][0], index, term)
        else:
            runs.append((index, index, term))
    return runs


def snapshot_bytes(state: State, compress: str, attachment: bytes) -> bytes:
    """Returns the whole file as bytes."""
    membership = record(CONFIG, state.membership[0].index, b"", state.membership[1]) if state.membership else b""
    runs = runs_of(state.seen)
    records = b"".join(_record_of(state, operation, key, newest) for (operation, key), newest in state.records.items())
    flat = membership + b"".join(struct.pack("<QQQ", *run) for run in runs) + records
    sizes = (len(state.values), len(runs), len(membership), len(records), len(state.sessions))
    ids = struct.pack("<QQQQQQQQ", *state.last, *sizes, state.clock)
    stored = flat
    if compress == "zstd":
        parts: list[bytes] = []
        codec.compress([flat] if flat else [], len(flat), parts.append)
        stored = b"".join(parts)
    head = struct.pack("<8sII", b"FASTSM-S", 0, CODECS[compress]) + ids
    head += blake3.blake3(ids + flat).digest() + struct.pack("<QQ", len(attachment), len(stored))
    body = attachment + bytes(-len(attachment) % 8) + stored
    return head + blake3.blake3(head + body).digest() + body


def _record_of(state: State, operation: int, key: bytes, newest: Newest) -> bytes:
    if operation == SESSION:
        return record(operation, newest.index, key, state.sessions[int.from_bytes(key, "little")])
    value = state.values[key] if operation == PUT else b""
    return record(operation, newest.index, key, value, newest.expires)


def record(operation: int, index: int, key: bytes, value: bytes, expires: int | None = None) -> bytes:
    """Returns one record, padded, followed by its deadline, if any."""
    content = struct.pack("<QIHBB", index, len(value), len(key), operation, expires is not None) + key + value
    return content + bytes(-len(content) % 8) + (b"" if expires is None else struct.pack("<Q", expires))


def write_file(path: str | os.PathLike[str], data: bytes) -> SnapshotMetadata:
    """Writes a snapshot's file completely, then puts it in place; returns its metadata."""
    metadata = SnapshotMetadata(LogId(*struct.unpack_from("<QQ", data, 16)), data[128:160])
    with storage_errors(os.fsdecode(path), "writing a snapshot"):
        directory = make_directory(path)
        try:
            remove_leftovers(directory)
            seen = present_head(directory)
            with temporary_file(directory) as temporary:
                directory.write(temporary.fd, data, 0)
                directory.sync(temporary.fd)
                assert temporary.name is not None
                put_in_place(directory, temporary.name, metadata.last_included, seen)
                temporary.name = None  # it must not be removed any more
            directory.sync_directory()
        finally:
            directory.close()
    return metadata


def read_state(snapshot: Snapshot) -> State:
    """Returns the state of a verified snapshot."""
    flat = b"".join(bytes(piece) for piece in snapshot.flat_pieces())
    state = State(membership=snapshot.membership, clock=snapshot.clock)
    at = snapshot.head.membership_size
    runs = list(struct.iter_unpack("<QQQ", flat[at : at + 24 * snapshot.head.runs]))
    for first, last, term in runs:
        # Any index between two entries of one term has that term.
        state.seen += [LogId(first, term), LogId(last, term)][first == last :]
    at += 24 * len(runs)
    terms = iter(runs)
    first, last, term = next(terms, (1, 0, 0))
    while at < len(flat):
        index, value_size, key_size, operation, timed = struct.unpack_from("<QIHBB", flat, at)
        key, value = flat[at + 16 : at + 16 + key_size], flat[at + 16 + key_size : at + 16 + key_size + value_size]
        at += 16 + key_size + value_size + 7 & ~7
        expires = struct.unpack_from("<Q", flat, at)[0] if timed else None
        at += 8 * timed
        if (operation, key) in state.records:
            raise SnapshotFormatError(
                f"{snapshot.path}: expected one record of operation {operation} for each key, found two for {key!r}")
        while last < index:
            first, last, term = next(terms)
        log_id = LogId(index, term)
        if operation == SESSION:
            state.remember(log_id, int.from_bytes(key, "little"), value)
        elif operation == TOUCH:
            if key not in state.values:
                raise SnapshotFormatError(f"{snapshot.path}: expected a touch after the put of its key, {key!r}")
            state.touch(log_id, key, expires)
        else:
            state.put(log_id, key, value, expires)
    return state
