"""``SnapshotReceiver``: a follower gets its leader's snapshot in pieces, across restarts of either."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fastsm.disk import format
from fastsm.disk.files import Directory, hides_seam, make_directory, storage_errors
from fastsm.disk.format import SnapshotHead
from fastsm.disk.mapping import Descriptor
from fastsm.errors import ChecksumMismatchError, FormatVersionError, LockedError, SnapshotError, SnapshotFormatError
from fastsm.snapshot.file import SNAPSHOT, Snapshot, check_metadata
from fastsm.types import SnapshotMetadata

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

PART = f"{SNAPSHOT}.part"

# The disk works while the network does, so that the last sync is short. After a power loss pages may be missing all
# the same, behind the last sync. No mark of what is safe is kept: it would cost two more syncs each time, and all a
# restart would gain by it is what the checksum of the whole finds out anyway, in the rare case that it was a
# power loss. Then the transfer starts over.
SYNC_EVERY = 16 << 20


class SnapshotReceiver:
    """Takes the bytes of a snapshot in order, and gives the path of the file once the whole checks out.

    They are kept in ``directory/snapshot.fsm.part``. A new receiver on the same directory goes on behind them, from
    ``offset``. The directory is made when it is missing.

    Attributes: ``offset``, the next byte that is expected; ``size``, of the whole, None until the header (160 bytes)
    is there.

    Thread safety: none; one thread at a time. Two receivers of one directory exclude each other: ``LockedError``.
    """

    @hides_seam
    def __init__(self, directory: str | os.PathLike[str], *, _files: type[Directory] = Directory) -> None:
        self.directory = os.fsdecode(directory)
        self.offset = 0
        self._head: SnapshotHead | None = None
        self._fd: Descriptor | None = None
        self._finished: SnapshotHead | None = None
        self._synced = 0
        with storage_errors(self.directory, "receiving a snapshot"):
            self._files: Directory | None = make_directory(directory, _files)
            try:
                self._open(self._files)
            except BaseException:
                self._files.close()
                raise

    def __repr__(self) -> str:
        done = "finished" if self._finished else f"{self.offset} of {self.size or '?'} bytes"
        return f"<SnapshotReceiver {self.directory!r}: {done}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int | None:
        """The size of the whole in bytes, as the header has it; None until that is there."""
        head = self._finished or self._head
        return head.file_size if head else None

    @property
    def progress(self) -> float:
        """The part that is there, from 0.0 to 1.0; 0.0 until the size is known."""
        return self.offset / self.size if self.size else 0.0

    @property
    def _path(self) -> str:
        return os.path.join(self.directory, PART)

    # ---- pieces ----------------------------------------------------------------------------------------

    def write(self, offset: int, piece: Buffer) -> int:
        """Takes the bytes from ``offset`` on; returns the new ``offset``, which is what the sender should send next.

        What is there already may come again, if it is the same. A gap, other bytes, or more than the header announces
        are a ``SnapshotError``, and nothing of the piece is taken. A header that cannot be one is a
        ``SnapshotFormatError`` (``FormatVersionError``) and discards what was received. O(size of the piece). Nothing
        is durable before :meth:`finish` or :meth:`close`. After a ``StorageError`` for want of room the same piece
        may come again.
        """
        files = self._require()
        data = memoryview(piece).cast("B")
        if offset < 0:
            raise ValueError(f"expected an offset from 0 on, found {offset}")
        if self._finished:
            raise SnapshotError(f"{self.directory}: this snapshot is complete; a new receiver takes the next one")
        with storage_errors(self._path, "receiving a snapshot"):
            fd = self._fd or self._open(files)
            if offset > self.offset:
                raise SnapshotError(f"{self._path}: expected a piece from {self.offset} on, found one from {offset}")
            data = self._without_known(fd, offset, data)
            self._look_at_head(fd, data)
            if self.size is not None and self.offset + len(data) > self.size:
                found = self.offset + len(data)
                raise SnapshotError(f"{self._path}: expected {self.size} bytes in all, found {found}")
            self._append(files, fd, data)
        return self.offset

    def _without_known(self, fd: Descriptor, offset: int, data: memoryview) -> memoryview:
        """The bytes of a piece that are new; those that are not must be the same."""
        while offset < self.offset and data:
            there = os.pread(fd.number, min(len(data), self.offset - offset, 1 << 20), offset)
            if not there or data[: len(there)] != there:
                raise SnapshotError(
                    f"{self._path}: the piece from {offset} on is not what came before; discard() it to start over, "
                    "or go on with the snapshot that was begun"
                )
            data = data[len(there) :]
            offset += len(there)
        return data

    def _look_at_head(self, fd: Descriptor, data: memoryview) -> None:
        """The header, once it is there: before anything behind it is written."""
        size = format.SNAPSHOT_HEADER_BYTES
        if self._head is None and self.offset + len(data) >= size:
            start = os.pread(fd.number, min(self.offset, size), 0)
            try:
                self._head = format.unpack_snapshot_head(start + bytes(data[: size - len(start)]), self._path)
            except (SnapshotFormatError, FormatVersionError):
                self.discard()
                raise

    def _append(self, files: Directory, fd: Descriptor, data: memoryview) -> None:
        try:
            files.write(fd, data, self.offset)
        except OSError:
            files.truncate(fd.number, self.offset)
            raise
        self.offset += len(data)
        if self.offset - self._synced >= SYNC_EVERY:
            self._sync(files, fd)

    def _sync(self, files: Directory, fd: Descriptor) -> None:
        try:
            files.sync(fd)
        except OSError:
            # What the disk holds is unknown, and a second sync would not tell: it starts over.
            self.discard()
            raise
        self._synced = self.offset

    # ---- the end ---------------------------------------------------------------------------------------

    def finish(self, metadata: SnapshotMetadata | None = None) -> str:
        """The path of the snapshot, complete, checked and durable. Idempotent.

        Needs all bytes (else ``SnapshotError``). They are synced, read again, and checked like :meth:`Snapshot.verify`
        does, and against ``metadata`` when it is given. When they are not right (``ChecksumMismatchError``,
        ``SnapshotFormatError``, another ``last_included``) they are discarded: the transfer must start over, at
        offset 0. Then the file gets its name, ``snapshot.fsm``, in place of an older one. O(size).
        """
        files = self._require()
        if self._finished is None:
            self._finish(files, metadata)
        elif metadata is not None:
            check_metadata(metadata, self._finished, files.path_of(SNAPSHOT))
        return files.path_of(SNAPSHOT)

    def _finish(self, files: Directory, metadata: SnapshotMetadata | None) -> None:
        fd, head = self._fd, self._head
        if fd is None or head is None or self.offset != head.file_size:
            expected = f"{self.size} bytes" if self.size else "a whole snapshot"
            raise SnapshotError(f"{self._path}: expected {expected}, found {self.offset}; write the rest first")
        with storage_errors(self._path, "receiving a snapshot"):
            self._sync(files, fd)
            try:
                Snapshot(fd, self._path).verify()
            except (SnapshotFormatError, ChecksumMismatchError):
                self.discard()
                raise
            if metadata is not None:
                try:
                    check_metadata(metadata, head, self._path)
                except SnapshotError:
                    self.discard()
                    raise
            files.rename(PART, SNAPSHOT)
            files.sync_directory()
            self._finished = head
            self._release(files)

    def discard(self) -> None:
        """Removes what was received; a transfer may start over, at offset 0. Nothing when it is finished."""
        files = self._require()
        if self._fd is not None:
            with storage_errors(self._path, "discarding a snapshot"):
                files.unlink(PART)
                self._release(files)
        if self._finished is None:
            self.offset, self._head, self._synced = 0, None, 0

    def close(self) -> None:
        """Makes what was received durable and gives the directory free, for a receiver that goes on. Idempotent."""
        files, self._files = self._files, None
        if files is None:
            return
        try:
            if self._fd is not None:
                with storage_errors(self._path, "receiving a snapshot"):
                    if self.offset:
                        files.sync(self._fd)
                        files.sync_directory()
                    else:
                        files.unlink(PART)
        finally:
            self._release(files)
            files.close()

    # ---- the file --------------------------------------------------------------------------------------

    def _require(self) -> Directory:
        if self._files is None:
            raise SnapshotError(f"{self.directory}: this receiver was closed; a new one goes on")
        return self._files

    def _open(self, files: Directory) -> Descriptor:
        """Opens and locks the partial file, and takes over what is in it."""
        while True:
            fd = files.open_file(PART, os.O_RDWR | os.O_CREAT)
            if not files.lock_file(fd):
                raise LockedError(self.directory, None)
            if files.is_named(fd, PART):  # else the one before finished or discarded it meanwhile
                break
        self._fd = fd
        self.offset = files.size(fd)
        self._synced = self.offset
        self._head = self._read_head(fd)
        if self._head is None and self.offset >= format.SNAPSHOT_HEADER_BYTES:
            self.offset = self._synced = 0
            files.truncate(fd.number, 0)
        return fd

    def _read_head(self, fd: Descriptor) -> SnapshotHead | None:
        """The header of what was received before; None when it is not there, or was lost with the power."""
        try:
            head = format.unpack_snapshot_head(os.pread(fd.number, format.SNAPSHOT_HEADER_BYTES, 0), self._path)
        except (SnapshotFormatError, FormatVersionError):
            return None
        return head if self.offset <= head.file_size else None

    def _release(self, files: Directory) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            files.close_file(fd)
