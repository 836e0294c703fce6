"""The content of files, one by one, for tools: the frames of a log, the records of a snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fastsm.disk import format, headers
from fastsm.generation.log import Log
from fastsm.snapshot.file import Snapshot
from fastsm.types import LogId


class Run(NamedTuple):
    """Entries applied in one frame: from ``first`` to ``last``, of ``term`` (None: unknown)."""

    first: int
    last: int
    term: int | None


class Record(NamedTuple):
    """The effect of one command, or hard state.

    ``operation``: put, delete, config, session, forget, touch, clock, snapshot (its metadata), close (a clean end).
    ``deadline``: the one that a put or a touch gives its key.
    """

    index: int  # type: ignore[assignment]  # tuples have a method of this name
    operation: str
    key: bytes
    value: bytes
    deadline: int | None = None


class Frame(NamedTuple):
    """One applied chunk, or one piece of hard state, as stored in the log. Offsets are relative to the file."""

    offset: int
    end: int
    watermark: int | None
    runs: tuple[Run, ...]
    records: tuple[Record, ...]


def log_frames(log: Log) -> Iterator[Frame]:
    """Yields the frames of a verified log, up to its present end. O(bytes)."""
    buffer = memoryview(log.mapping)[log.start :]
    offset, stop, last = headers.LOG_HEADER_BYTES, log.end, log.head.base_index
    while offset < stop:
        end, watermark, ends, place = format.unpack_frame(buffer, offset)
        runs = []
        for run_end, term in ends:
            runs.append(Run(last + 1, run_end, term))
            last = run_end
        records = []
        while place < end:
            index, operation, key, value, deadline, place = format.unpack_record(buffer, place)
            records.append(Record(index, format.OPERATIONS[operation], key, value, deadline))
        yield Frame(offset, end, watermark, tuple(runs), tuple(records))
        offset = end


def snapshot_runs(snapshot: Snapshot) -> list[Run]:
    """Returns the runs of terms of a verified snapshot. O(runs), but O(size) if it is compressed."""
    start = snapshot.head.membership_size
    flat = b"".join(bytes(piece) for piece in snapshot.flat_pieces(start + format.TERM_RUN_BYTES * snapshot.head.runs))
    end = start + format.TERM_RUN_BYTES * snapshot.head.runs
    return [Run(*run) for run in format.TERM_RUN_STRUCT.iter_unpack(flat[start:end])]


def snapshot_records(snapshot: Snapshot) -> Iterator[tuple[str, LogId, bytes, bytes, int | None]]:
    """Yields operation, entry, key, value and deadline of each record of a verified snapshot, in order. O(size)."""
    runs = iter(snapshot_runs(snapshot))
    run = Run(1, 0, 0)
    skip = snapshot.head.membership_size + format.TERM_RUN_BYTES * snapshot.head.runs
    data = bytearray()
    for piece in snapshot.flat_pieces():
        data += piece
        done, skip = min(skip, len(data)), max(0, skip - len(data))
        while len(data) - done >= format.RECORD_STRUCT.size:
            if len(data) - done < format.size_of_record(data[done : done + format.RECORD_STRUCT.size]):
                break
            index, operation, key, value, deadline, done = format.unpack_record(data, done)
            while index > run.last:
                run = next(runs)
            yield format.OPERATIONS[operation], LogId(index, run.term or 0), key, value, deadline
        del data[:done]
