"""Reading a snapshot's file: its header, its parts, its two checksums. `flat` checks whether the parts are well-formed.

Nothing here needs a state machine. The content is untrusted, even after its checksum was compared: anybody who can
make a file can make its checksums. Memory stays bounded whatever the header claims.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import blake3

from fastsm.disk import format, snapshot_header
from fastsm.disk.descriptors import Descriptor
from fastsm.disk.files import Directory, storage_errors
from fastsm.disk.snapshot_header import SnapshotHead
from fastsm.errors import ChecksumMismatchError, CorruptionError, SnapshotError, SnapshotFormatError
from fastsm.snapshot import codec
from fastsm.snapshot.flat import Stream, bad_state, check_membership, check_runs, check_state
from fastsm.types import LogId, SnapshotMetadata, checked_metadata

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

SNAPSHOT = "snapshot.fsm"
PIECE = 64 << 20  # large, since each read and each checksum takes the GIL once
CODECS = {snapshot_header.CODEC_NONE: "none", snapshot_header.CODEC_ZSTD: "zstd"}

Progress = Callable[[int, int], object]


def open_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Opens a snapshot without a state machine; ``path`` is the file, or the directory that contains ``snapshot.fsm``.

    Reads only the header: O(1). Raises ``SnapshotFormatError`` for anything but a regular file whose sizes add up (also
    for a symbolic link), ``FormatVersionError``, and ``StorageError`` if there is no file.
    """
    path = os.fsdecode(path)
    if os.path.isdir(path):
        path = os.path.join(path, SNAPSHOT)
    return Snapshot(*open_file(path))


def open_file(path: str) -> tuple[Descriptor, str]:
    """Opens the regular file at ``path``; returns its descriptor and the path."""
    try:
        with storage_errors(path, "opening a snapshot"):
            folder = Directory(os.path.dirname(path) or ".", create=False)
            try:
                return folder.open_file(os.path.basename(path), os.O_RDONLY), path
            except CorruptionError as error:
                raise _no_file(path, error.found) from None
            finally:
                folder.close()
    except ValueError as error:  # a NUL character in the path
        raise SnapshotError(f"expected the path of a snapshot, found {path!r}: {error}") from None


def _no_file(path: str, found: object) -> SnapshotFormatError:
    return SnapshotFormatError(f"{path}: expected a regular file, found {found}; give the snapshot's own path")


class Snapshot:
    """A snapshot's file, open for reading. Made by :func:`open_snapshot`; a context manager.

    The attributes repeat what the file says; whether that is true is known only after :meth:`verify`.

    Attributes: ``path``; ``size``, in bytes; ``metadata`` (:class:`fastsm.SnapshotMetadata`, from the header);
    ``state_checksum``, 32 bytes, equal on all replicas at one entry; ``keys`` and ``sessions``, their numbers;
    ``clock``, in milliseconds since 1970; ``codec``, "none" or "zstd"; ``head``, the header's fields.

    Thread safety: every method, from any thread. A call that has begun when the snapshot is closed still completes.
    """

    def __init__(self, fd: Descriptor, path: str) -> None:
        self.path = path
        self._fd: Descriptor | None = fd
        with storage_errors(path, "reading a snapshot"):
            self.size = os.fstat(fd.number).st_size
            self.head = read_head(fd, path, self.size)
        self.metadata = metadata_of(self.head)
        self.state_checksum = self.head.state_checksum
        self.keys = self.head.keys
        self.sessions = self.head.sessions
        self.clock = self.head.clock
        self.codec = CODECS[self.head.codec]

    def __repr__(self) -> str:
        closed = ", closed" if self._fd is None else ""
        last = tuple(self.metadata.last_included)
        return f"<Snapshot {self.path!r}: {self.keys} keys as of {last}, {self.size} bytes, codec {self.codec}{closed}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Idempotent."""
        self._fd = None  # closes with the last reference, so not while another thread reads

    @property
    def descriptor(self) -> Descriptor:
        """The open file; raises ``SnapshotError`` if the snapshot is closed."""
        if self._fd is None:
            raise SnapshotError(f"{self.path}: this snapshot was closed; open it again")
        return self._fd

    def read_at(self, offset: int, size: int) -> bytes:
        """Returns ``size`` bytes of the file at ``offset``; fewer at the end, and none after it.

        For sending a snapshot in pieces to a :class:`fastsm.SnapshotReceiver`. O(size).
        """
        if offset < 0 or size < 0:
            raise ValueError(f"expected an offset and a size from 0 on, found {offset} and {size}")
        fd = self.descriptor
        stop = min(offset + size, self.size)
        return b"".join(bytes(piece) for piece in read_pieces(fd, offset, stop, self.path))

    @property
    def attachment(self) -> bytes:
        """The embedder's own bytes. Read from the file each time: O(size)."""
        return self.read_at(snapshot_header.HEADER_BYTES, self.head.attachment_size)

    @property
    def membership(self) -> tuple[LogId, bytes] | None:
        """The cluster's membership and the entry that carried it, or None.

        Reads (and decompresses) the state up to its records. Raises ``SnapshotFormatError`` if that part is malformed.
        """
        head = self.head
        if not head.membership_size:
            return None
        stream = Stream(self.flat_pieces())
        record = stream.take(head.membership_size)
        index, size = check_membership(head, record, self.path)
        for first, last, term in check_runs(stream, head, self.path):
            if first <= index <= last:
                return LogId(index, term), record[format.RECORD_STRUCT.size :][:size]
        raise bad_state(self.path, 0, "a membership whose entry is in a run", f"index {index}")

    def flat_pieces(self, stop: int | None = None) -> Iterator[Buffer]:
        """Yields the state in flat form, decompressed if needed. A piece is valid until the next one.

        Only an uncompressed state ends at ``stop``; a compressed one is always yielded whole.
        """
        fd, head = self.descriptor, self.head
        if head.codec == snapshot_header.CODEC_NONE:
            end = head.file_size if stop is None else head.state_offset + stop
            return read_pieces(fd, head.state_offset, end, self.path)
        stored = _Sequence(fd, head.state_offset, self.path)
        return codec.decompress(stored.read, head.stored_size, head.state_size, self.path)

    def verify(self, progress: Progress | None = None) -> None:
        """Reads every byte: compares ``checksum``, then ``state_checksum``, then checks that the parts are well-formed.

        ``progress(done, total)`` gets numbers of bytes, and may raise to abort. Raises ``ChecksumMismatchError`` and
        ``SnapshotFormatError``. Does not find duplicate keys; an install does. O(size), about one second per million
        records; memory for two pieces.
        """
        head, fd = self.head, self.descriptor
        counter = _Counter(progress, head.file_size + head.state_size)
        copy_checked(fd, head, self.path, counter.count)
        flat = _Summed(head, self.flat_pieces(), counter.count)
        problem = None
        try:
            check_state(head, flat, self.flat_pieces, self.path)
        except SnapshotFormatError as error:
            if flat.broken:
                raise
            problem = error  # raised only if the checksum is right; otherwise the file is damaged, not malformed
        compare(self.path, "state checksum", head.state_checksum, flat.digest())
        if problem is not None:
            raise problem


# ---- the file ------------------------------------------------------------------------------------------

def read_head(fd: Descriptor, path: str, size: int) -> SnapshotHead:
    """Returns the header of an open file of ``size`` bytes."""
    return snapshot_header.unpack(os.pread(fd.number, snapshot_header.HEADER_BYTES, 0), path, size)


def metadata_of(head: SnapshotHead) -> SnapshotMetadata:
    """Returns a snapshot's metadata for a Raft library."""
    return SnapshotMetadata(LogId(head.last_index, head.last_term), head.checksum)


def check_metadata(metadata: SnapshotMetadata, head: SnapshotHead, path: str) -> None:
    """Raises unless a snapshot is the one that was announced."""
    metadata = checked_metadata(metadata, path)
    compare(path, "checksum as announced", metadata.checksum, head.checksum)
    expected, found = metadata.last_included, LogId(head.last_index, head.last_term)
    if expected != found:
        raise SnapshotError(f"{path}: expected a snapshot as of {expected}, found one as of {found}; get the right one")


def copy_checked(
    source: Descriptor, head: SnapshotHead, path: str, write: Callable[[memoryview], object] | None = None,
    progress: Progress | None = None,
) -> None:
    """Reads the whole file once, passes each piece (at most 64 MiB, in order) to ``write``, and compares ``checksum``.

    Nothing is read twice: what was written is what was checked, even if the source changes. A piece is valid until
    ``write`` returns. ``progress(done, total)`` may raise to abort. Raises ``ChecksumMismatchError``, and
    ``SnapshotFormatError`` if the file changes meanwhile, or its padding is not zero.
    """
    hasher = blake3.blake3()
    attachment_end = snapshot_header.HEADER_BYTES + head.attachment_size
    padding = b""
    done = 0
    for piece in read_pieces(source, 0, head.file_size, path):
        if done == 0:
            if piece[: snapshot_header.HEADER_BYTES] != _head_bytes(head):
                raise SnapshotFormatError(f"{path}: the file changed while it was read; get it again")
            hasher.update(piece[snapshot_header.CHECKSUM_COVERS])
            hasher.update(piece[snapshot_header.HEADER_BYTES :])
        else:
            hasher.update(piece)
        padding += piece[max(0, attachment_end - done) : max(0, head.state_offset - done)]
        done += len(piece)
        if write is not None:
            write(piece)
        if progress is not None:
            progress(done, head.file_size)
    compare(path, "checksum", head.checksum, hasher.digest())
    if any(padding):
        raise SnapshotFormatError(f"{path}, offset {attachment_end}: expected zeros, found {padding!r}; get it again")


def flat_state_checksum(head: SnapshotHead, pieces: Iterable[Buffer]) -> bytes:
    """Returns the state checksum of a flat state, given in pieces."""
    hasher = blake3.blake3(_head_bytes(head)[snapshot_header.STATE_CHECKSUM_COVERS])
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()


def compare(path: str, what: str, expected: bytes, found: bytes) -> None:
    """Raises ``ChecksumMismatchError`` if two checksums differ."""
    if expected != found:
        raise ChecksumMismatchError(path, what, expected, found)


def read_pieces(fd: Descriptor, start: int, stop: int, path: str) -> Iterator[memoryview]:
    """Yields the bytes from ``start`` to ``stop``, in pieces that are valid until the next one."""
    buffer = memoryview(bytearray(max(0, min(PIECE, stop - start))))
    while start < stop:
        with storage_errors(path, "reading a snapshot"):
            size = os.preadv(fd.number, [buffer[: stop - start]], start)
        if not size:
            raise SnapshotFormatError(f"{path}: the file was cut at {start} while it was read; get it again")
        yield buffer[:size]
        start += size


class _Sequence:
    """A file that is read sequentially from an offset."""

    def __init__(self, fd: Descriptor, offset: int, path: str) -> None:
        self._fd = fd
        self._offset = offset
        self._path = path

    def read(self, size: int) -> bytes:
        with storage_errors(self._path, "reading a snapshot"):
            piece = os.pread(self._fd.number, size, self._offset)
        self._offset += len(piece)
        return piece


class _Counter:
    """Counts the work done, for progress reports."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def count(self, piece: Buffer) -> None:
        if self._progress is not None:
            self._done += memoryview(piece).nbytes
            self._progress(self._done, self._total)


class _Summed:
    """Pieces of a flat state, and the checksum of those that were read."""

    def __init__(self, head: SnapshotHead, pieces: Iterator[Buffer], note: Callable[[Buffer], object]) -> None:
        self._hasher = blake3.blake3(_head_bytes(head)[snapshot_header.STATE_CHECKSUM_COVERS])
        self._pieces = pieces
        self._note = note
        self.broken = False  # reading a piece has raised an error

    def __iter__(self) -> Iterator[Buffer]:
        return self

    def __next__(self) -> Buffer:
        try:
            piece = next(self._pieces)
        except SnapshotFormatError:
            self.broken = True
            raise
        self._hasher.update(piece)
        self._note(piece)
        return piece

    def digest(self) -> bytes:
        for _ in self:
            pass
        return self._hasher.digest()


def _head_bytes(head: SnapshotHead) -> bytes:
    return snapshot_header.pack(head)
