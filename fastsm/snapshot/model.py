"""Snapshots of the model: made by the page of formats alone, so that the compiled code has something to be held to."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field

import blake3

from fastsm.disk.files import make_directory, storage_errors
from fastsm.errors import SnapshotFormatError
from fastsm.snapshot import codec
from fastsm.snapshot.file import Snapshot
from fastsm.snapshot.writer import present_head, put_in_place, remove_leftovers, temporary_file
from fastsm.types import LogId, SnapshotMetadata

PUT, CONFIG, SESSION = 1, 3, 6
CODECS = {"none": 0, "zstd": 1}


@dataclass
class State:
    """A state as of an entry. Values are in the order in which they were written."""

    values: dict[bytes, bytes] = field(default_factory=dict)
    writers: dict[bytes, LogId] = field(default_factory=dict)  # of keys that were deleted since, too
    membership: tuple[LogId, bytes] | None = None
    seen: list[LogId] = field(default_factory=list)
    # Of each session: the index of the entry that wrote its record, and the record's value.
    sessions: dict[int, tuple[int, bytes]] = field(default_factory=dict)

    def copy(self) -> State:
        return State(
            dict(self.values), dict(self.writers), self.membership, list(self.seen), dict(self.sessions))

    @property
    def last(self) -> LogId:
        return self.seen[-1] if self.seen else LogId()


def runs_of(seen: list[LogId]) -> list[tuple[int, int, int]]:
    """Maximal runs (first, last, term): entries seen, and what lies between two of one term."""
    runs: list[tuple[int, int, int]] = []
    for index, term in seen:
        if runs and runs[-1][2] == term:
            runs[-1] = (runs[-1][0], index, term)
        else:
            runs.append((index, index, term))
    return runs


def snapshot_bytes(state: State, compress: str, attachment: bytes) -> bytes:
    """The whole file."""
    membership = record(CONFIG, state.membership[0].index, b"", state.membership[1]) if state.membership else b""
    runs = runs_of(state.seen)
    # Within an entry what a session remembers comes last, and there is one of it.
    live = [(state.writers[key].index, 0, PUT, key, value) for key, value in state.values.items()]
    live += [
        (index, 1, SESSION, struct.pack("<Q", session), value)
        for session, (index, value) in state.sessions.items()
    ]
    live.sort(key=lambda each: each[:2])
    records = b"".join(record(operation, index, key, value) for index, _, operation, key, value in live)
    flat = membership + b"".join(struct.pack("<QQQ", *run) for run in runs) + records
    ids = struct.pack("<QQQQQQ", *state.last, len(state.values), len(runs), len(membership), len(records))
    stored = flat
    if compress == "zstd":
        parts: list[bytes] = []
        codec.compress([flat] if flat else [], len(flat), parts.append)
        stored = b"".join(parts)
    head = struct.pack("<8sII", b"FASTSM-S", 0, CODECS[compress]) + ids
    sizes = struct.pack("<QQQ8x", len(attachment), len(stored), len(state.sessions))
    head += blake3.blake3(ids + flat).digest() + sizes
    body = attachment + bytes(-len(attachment) % 8) + stored
    return head + blake3.blake3(head + body).digest() + body


def record(operation: int, index: int, key: bytes, value: bytes) -> bytes:
    """One record, padded."""
    content = struct.pack("<QIHBB", index, len(value), len(key), operation, 0) + key + value
    return content + bytes(-len(content) % 8)


def write_file(path: str | os.PathLike[str], data: bytes) -> SnapshotMetadata:
    """Puts a snapshot's file in place, whole; the metadata of it."""
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
                temporary.name = None  # from here on nobody removes it
            directory.sync_directory()
        finally:
            directory.close()
    return metadata


def read_state(snapshot: Snapshot) -> State:
    """The state of a snapshot that was verified."""
    flat = b"".join(bytes(piece) for piece in snapshot.flat_pieces())
    state = State(membership=snapshot.membership)
    at = snapshot.head.membership_size
    runs = list(struct.iter_unpack("<QQQ", flat[at : at + 24 * snapshot.head.runs]))
    for first, last, term in runs:
        # Whatever lies between two entries of one term is known by them.
        state.seen += [LogId(first, term), LogId(last, term)][first == last :]
    at += 24 * len(runs)
    terms = iter(runs)
    first, last, term = next(terms, (1, 0, 0))
    while at < len(flat):
        index, value_size, key_size, operation = struct.unpack_from("<QIHB", flat, at)
        key = flat[at + 16 : at + 16 + key_size]
        if operation == SESSION:
            session = int.from_bytes(key, "little")
            if session in state.sessions:
                raise SnapshotFormatError(f"{snapshot.path}: expected one record for session {session}, found two")
            state.sessions[session] = (index, flat[at + 24 : at + 24 + value_size])
            at += 16 + key_size + value_size + 7 & ~7
            continue
        if key in state.values:
            raise SnapshotFormatError(f"{snapshot.path}: expected one record for each key, found two for {key!r}")
        while last < index:
            first, last, term = next(terms)
        state.values[key] = flat[at + 16 + key_size : at + 16 + key_size + value_size]
        state.writers[key] = LogId(index, term)
        at += 16 + key_size + value_size + 7 & ~7
    return state
