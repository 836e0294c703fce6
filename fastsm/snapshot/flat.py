"""The state of a snapshot in flat form: membership, runs and records, checked against docs/format.md.

The state comes in pieces, and memory stays bounded by their size, whatever the header and the records claim.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fastsm.disk import format
from fastsm.disk.snapshot_header import SnapshotHead
from fastsm.errors import SnapshotFormatError

if TYPE_CHECKING:
    from typing_extensions import Buffer

LATEST = format.MAX_DEADLINE.to_bytes(8, "big")
SESSION_ID_BYTES = 8
WORD = struct.Struct("<Q")


def check_state(
    head: SnapshotHead, pieces: Iterator[Buffer], again: Callable[[int], Iterator[Buffer]], path: str
) -> None:
    """Reads a flat state to its end: ``SnapshotFormatError`` unless it conforms to docs/format.md.

    ``again(stop)`` reads the state a second time, at least up to ``stop``: the runs are walked in step with the
    records, so that memory does not depend on their number.
    """
    stream = Stream(pieces)
    index = -1
    if head.membership_size:
        index, size = check_membership(head, stream.take(format.RECORD_STRUCT.size), path)
        stream.skip(size)
        check_padding(stream, head.membership_size - format.RECORD_STRUCT.size - size, path)
    known = index < 0
    for first, last, _ in check_runs(stream, head, path):
        known = known or first <= index <= last
    if not known:
        raise bad_state(path, 0, "a membership of an entry in a run", f"index {index}")
    runs_end = head.membership_size + format.TERM_RUN_BYTES * head.runs
    runs = Stream(again(runs_end))
    runs.skip(head.membership_size)
    check_records(stream, head, check_runs(runs, head, path), path)
    if stream.take(1):
        raise bad_state(path, stream.offset, "the end", "more")


def check_membership(head: SnapshotHead, record: bytes, path: str) -> tuple[int, int]:
    """Returns the index and the size of the membership, given the start of its record."""
    index, size, key_size, operation, zero = format.RECORD_STRUCT.unpack_from(record)
    whole = format.RECORD_STRUCT.size + size + 7 & ~7
    if (key_size, operation, zero) != (0, format.OPERATION_CONFIG, 0) or whole != head.membership_size:
        found = f"operation {operation}, a key of {key_size} bytes, {whole} bytes in all"
        raise bad_state(path, 0, f"a membership of {head.membership_size} bytes", found)
    if any(record[format.RECORD_STRUCT.size + size :]):
        raise bad_state(path, whole, "zeros", "padding that is not")
    return index, size


def check_padding(stream: Stream, size: int, path: str) -> None:
    """Checks for zeros up to the next multiple of 8."""
    if any(stream.take(size)):
        raise bad_state(path, stream.offset, "zeros", "padding that is not")


def check_runs(stream: Stream, head: SnapshotHead, path: str) -> Iterator[tuple[int, int, int]]:
    """Yields the runs, after checking each: ascending, of rising terms, up to the last included entry."""
    before, term_before = 0, -1
    for _ in range(head.runs):
        data = stream.take(format.TERM_RUN_BYTES)
        if len(data) < format.TERM_RUN_BYTES:
            raise bad_state(path, stream.offset, f"{head.runs} runs", "the end")
        first, last, term = format.TERM_RUN_STRUCT.unpack(data)
        if not before < first <= last or term <= term_before:
            expected = f"a run after index {before}, of a term above {term_before}"
            raise bad_state(path, stream.offset, expected, f"{first} to {last}, term {term}")
        before, term_before = last, term
        yield first, last, term
    if head.runs and (before, term_before) != (head.last_index, head.last_term):
        expected = f"a last run up to {head.last_index} of term {head.last_term}"
        raise bad_state(path, stream.offset, expected, f"{before}, {term_before}")


def check_records(
    stream: Stream, head: SnapshotHead, runs: Iterator[tuple[int, int, int]], path: str
) -> None:
    """Checks the records: complete, in order, each of an entry in a run, and as many as the header says."""
    head_size, put, limit = format.RECORD_STRUCT.size, format.OPERATION_PUT, format.MAX_RECORD_VALUE
    left, before, keys, sessions = head.records_size, 0, 0, 0
    first, last = 1, 0
    touch, session = format.OPERATION_TOUCH, format.OPERATION_SESSION
    for index, value_size, key_size, operation, timed, padding, tail in _records(stream, head.records_size):
        size = (head_size + key_size + value_size + 7 & ~7) + 8 * timed
        if operation == put:
            known = not timed or (timed == 1 and tail <= LATEST)
        elif operation == touch:
            known = value_size == 0 and (not timed or (timed == 1 and tail <= LATEST))
        else:
            known = operation == session and not timed and format.is_session_value(tail)
        if size > left or not known or value_size > limit or index < before or padding:
            found = f"operation {operation}, index {index}, {size} bytes, padding {padding:#x}"
            expected = (
                f"a key, a touch or a session of index {before} or above, of at most {left} bytes, padded with zeros"
            )
            raise bad_state(path, stream.offset, expected, found)
        while index > last:
            first, last, _ = next(runs, (1, 1 << 64, 0))
        if not first <= index <= head.last_index:
            raise bad_state(path, stream.offset, "an index within a run", f"index {index}")
        left -= size
        before = index
        if operation == put:
            keys += 1
        elif operation == session:
            sessions += 1
    if (keys, sessions) != (head.keys, head.sessions):
        expected = f"{head.keys} keys and {head.sessions} sessions"
        raise bad_state(path, stream.offset, expected, f"{keys} and {sessions}")
    for _ in runs:
        pass


def _records(stream: Stream, left: int) -> Iterator[tuple[int, int, int, int, int, int, bytes]]:
    """Yields, for each record, the fields of its head, its padding as a number, and its last field.

    The last field is the deadline at the end of a record that has one, or the value of a session's record. A deadline
    is yielded in big-endian order, so that it compares as bytes. Stops after a record that claims more bytes than
    remain.
    """
    head_size, unpack_from, word_at = format.RECORD_STRUCT.size, format.RECORD_STRUCT.unpack_from, WORD.unpack_from
    while left:
        data, at = stream.window
        index, value_size, key_size, operation, timed = 0, 0, 0, 0, 0
        # Most records are within one piece.
        while len(data) - at >= head_size <= left:
            index, value_size, key_size, operation, timed = unpack_from(data, at)
            used = head_size + key_size + value_size
            padded = used + 7 & ~7
            size = padded + 8 * timed
            if at + size > len(data) or size > left:
                break
            at += size
            left -= size
            padding = word_at(data, at - size + padded - 8)[0] >> 8 * (8 - (padded - used))
            tail = b""
            if timed:
                tail = bytes(data[at - size + padded : at - size + padded + 8])[::-1]
            elif operation == format.OPERATION_SESSION and key_size == SESSION_ID_BYTES:
                tail = bytes(data[at - size + head_size + key_size : at - size + used])
            yield index, value_size, key_size, operation, timed, padding, tail
        stream.go_to(at)
        if not left:
            return
        # Sizes are multiples of 8, but the head of a record takes 16 bytes.
        start = stream.take(min(left, head_size)).ljust(head_size, b"\0")
        index, value_size, key_size, operation, timed = unpack_from(start)
        used = head_size + key_size + value_size
        padded = used + 7 & ~7
        size = padded + 8 * timed
        padding = 0
        tail = b""
        if size <= left:
            kind = (operation, key_size, timed)
            if kind == (format.OPERATION_SESSION, SESSION_ID_BYTES, 0) and value_size <= format.MAX_SESSION_VALUE:
                tail = stream.take(used - head_size)[key_size:]
            else:
                stream.skip(used - head_size)
            padding = int.from_bytes(stream.take(padded - used), "little")
            if timed:
                tail = stream.take(8 * timed)[:8][::-1]
        left = max(0, left - size)
        yield index, value_size, key_size, operation, timed, padding, tail


def bad_state(path: str, offset: int, expected: str, found: object) -> SnapshotFormatError:
    """Returns the error for a malformed flat state; if its checksum matches, it was crafted, or made by a bug."""
    return SnapshotFormatError(
        f"{path}, flat state, before offset {offset}: expected {expected}, found {found}; "
        "this is not a fastsm snapshot, although its checksums may match: get it again"
    )


class Stream:
    """Pieces as one stream of bytes."""

    def __init__(self, pieces: Iterator[Buffer]) -> None:
        self._pieces = pieces
        self._data = memoryview(b"")
        self._at = 0
        self._base = 0  # where the current piece starts

    @property
    def offset(self) -> int:
        """The number of bytes taken."""
        return self._base + self._at

    @property
    def window(self) -> tuple[memoryview, int]:
        """The current piece, and how much of it was taken."""
        return self._data, self._at

    def go_to(self, at: int) -> None:
        """Sets how much of the current piece was taken."""
        self._at = at

    def take(self, size: int) -> bytes:
        """Returns the next bytes; fewer at the end."""
        at, self._at = self._at, self._at + size
        if self._at <= len(self._data):
            return bytes(self._data[at : self._at])
        self._at = at
        parts: list[bytes] = []
        while size and (self._at < len(self._data) or self._next()):
            parts.append(bytes(self._data[self._at : self._at + size]))
            self._at += len(parts[-1])
            size -= len(parts[-1])
        return b"".join(parts)

    def skip(self, size: int) -> None:
        """Skips the next bytes."""
        self._at += size
        while self._at > len(self._data):
            size = self._at - len(self._data)
            self._at = len(self._data)
            if not self._next():
                return
            self._at = size

    def _next(self) -> bool:
        self._base += len(self._data)
        self._data, self._at = memoryview(next(self._pieces, b"")), 0
        return len(self._data) > 0
