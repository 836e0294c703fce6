"""``SnapshotReceiver``: a follower receives its leader's snapshot in pieces, across restarts of either."""

from __future__ import annotations

import operator
import os
from functools import partial
from typing import TYPE_CHECKING

from fastsm.arguments import flat_view
from fastsm.disk import snapshot_header
from fastsm.disk.descriptors import Descriptor
from fastsm.disk.files import Directory, hides_seam, make_directory, storage_errors
from fastsm.disk.forks import left_by_children
from fastsm.disk.snapshot_header import SnapshotHead
from fastsm.errors import FormatVersionError, LockedError, SnapshotError, SnapshotFormatError, StaleSnapshotError
from fastsm.event_loops import call
from fastsm.snapshot.file import SNAPSHOT, Snapshot, check_metadata, metadata_of
from fastsm.snapshot.writer import present_head, put_in_place
from fastsm.types import LogId, SnapshotMetadata, checked_metadata

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

    from fastsm.background import BackgroundCall

PART = f"{SNAPSHOT}.part"

# The disk writes while the network transfers, so that the last sync is short. After a power loss, pages written since
# the last sync may be missing. The durable offset is not recorded, which would cost two more syncs each time: the
# checksum of the whole file detects that rare case anyway, and the transfer starts over.
SYNC_EVERY = 16 << 20


class SnapshotReceiver:
    """Receives the bytes of a snapshot in order, and returns the path of the file once it is complete and checked.

    The bytes are kept in ``directory/snapshot.fsm.part``. The directory is made if it is missing.

    ``metadata`` is what the sender announces. With it, the receiver continues a part of that very snapshot at
    ``offset``, and starts over if the part belongs to another one; bytes of another snapshot are refused as soon as
    their header is there. If the directory already has the complete snapshot, it is offered: ``complete`` is true, and
    :meth:`finish` returns its path. A complete file of an older snapshot is removed when the first byte of the
    announced one arrives. Without ``metadata``, a receiver continues any part that exists, and the caller has to know
    which snapshot that belongs to.

    A part shorter than a header (160 bytes) cannot be identified, so the transfer starts over.

    Attributes: ``offset``, the next byte that is expected; ``size``, of the whole file, None until the header is there;
    ``metadata``, of the snapshot being received, as announced or from its header, None until it is known; ``complete``,
    whether all bytes are there, so that :meth:`finish` is next.

    Thread safety: none; use one thread at a time. While a ``finish_async`` is running, ``close`` waits for it, and
    every other call is a ``SnapshotError``. Two receivers of one directory exclude each other: ``LockedError``. In a
    forked child the receiver is closed; the file and its lock stay with the parent.
    """

    @hides_seam
    def __init__(
        self,
        directory: str | os.PathLike[str],
        metadata: SnapshotMetadata | None = None,
        *,
        _files: type[Directory] = Directory,
    ) -> None:
        self.directory = os.fsdecode(directory)
        self.offset = 0
        self._announced = None if metadata is None else checked_metadata(metadata, self.directory)
        self._head: SnapshotHead | None = None
        self._present: SnapshotHead | None = None  # of the complete file that existed at the opening
        self._whole: Descriptor | None = None  # that file, if it is the announced snapshot
        self._fd: Descriptor | None = None
        self._finished: SnapshotHead | None = None
        self._name_is_durable = False
        self._finishing: BackgroundCall | None = None
        self._synced = 0
        with storage_errors(self.directory, "receiving a snapshot"):
            self._files: Directory | None = make_directory(directory, _files)
            try:
                self._open(self._files)
            except BaseException:
                self._release(self._files, remove=False)
                self._files.close()
                raise
        _receivers.add(self)

    def __repr__(self) -> str:
        done = "finished" if self._finished else f"{self.offset} of {self.size or '?'} bytes"
        return f"<SnapshotReceiver {self.directory!r}: {done}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int | None:
        """The size of the whole file in bytes, from its header; None until the header is there."""
        head = self._finished or self._head
        return head.file_size if head else None

    @property
    def metadata(self) -> SnapshotMetadata | None:
        """The metadata of the snapshot being received, as announced or from its header; None until it is known."""
        head = self._finished or self._head
        return self._announced or (metadata_of(head) if head else None)

    @property
    def complete(self) -> bool:
        """Whether every byte is there; only :meth:`finish` checks that they are right."""
        return self.size is not None and self.offset == self.size

    @property
    def progress(self) -> float:
        """The received share of the file, from 0.0 to 1.0; 0.0 until the size is known."""
        return self.offset / self.size if self.size else 0.0

    @property
    def _path(self) -> str:
        return os.path.join(self.directory, PART)

    # ---- pieces ----------------------------------------------------------------------------------------

    def write(self, offset: int, piece: Buffer) -> int:
        """Takes the bytes at ``offset``; returns the new ``offset``, which the sender should send next.

        Bytes that were received already may be sent again, if they are the same. A gap, other bytes, or more than the
        header announces are a ``SnapshotError``, and nothing of the piece is taken. An invalid header is a
        ``SnapshotFormatError`` (``FormatVersionError``), and the header of a snapshot other than the announced one is a
        ``ChecksumMismatchError``; both discard what was received. O(size of the piece). Nothing is durable before
        :meth:`finish` or :meth:`close`. After a ``StorageError`` because the disk is full, the same piece may be sent
        again.
        """
        files = self._require()
        offset = operator.index(offset)
        data = flat_view(piece, "piece")
        if offset < 0:
            raise ValueError(f"expected an offset from 0 on, found {offset}")
        if self._finished:
            raise SnapshotError(f"{self.directory}: this snapshot is complete; a new receiver takes the next one")
        with storage_errors(self._path, "receiving a snapshot"):
            fd = self._whole or self._fd or self._open(files)
            if offset > self.offset:
                raise SnapshotError(
                    f"{self._path}: expected a piece from {self.offset} on, found one from {offset}; send the bytes "
                    f"from {self.offset} on first"
                )
            data = self._without_known(fd, offset, data)
            self._look_at_head(fd, data)
            if self.size is not None and self.offset + len(data) > self.size:
                found = self.offset + len(data)
                raise SnapshotError(
                    f"{self._path}: expected {self.size} bytes in all, found {found}; send none after the first "
                    f"{self.size}, or discard() to start over"
                )
            if data:
                self._append(files, fd, data)
        return self.offset

    def _without_known(self, fd: Descriptor, offset: int, data: memoryview) -> memoryview:
        """Returns the new bytes of a piece, after checking that the others are the same as before."""
        while offset < self.offset and data:
            there = os.pread(fd.number, min(len(data), self.offset - offset, 1 << 20), offset)
            if not there or data[: len(there)] != there:
                raise SnapshotError(
                    f"{self._path}: the piece at offset {offset} differs from what was received before. If the sender "
                    "has another snapshot now, give its metadata to a new receiver, or discard() to start over"
                )
            data = data[len(there) :]
            offset += len(there)
        return data

    def _look_at_head(self, fd: Descriptor, data: memoryview) -> None:
        """Parses the header once it is there, before anything after it is written."""
        size = snapshot_header.HEADER_BYTES
        if self._head is None and self.offset + len(data) >= size:
            start = os.pread(fd.number, min(self.offset, size), 0)
            try:
                head = snapshot_header.unpack(start + bytes(data[: size - len(start)]), self._path)
                if self._announced is not None:
                    check_metadata(self._announced, head, self._path)
            except (SnapshotError, FormatVersionError):
                self.discard()
                raise
            self._head = head

    def _append(self, files: Directory, fd: Descriptor, data: memoryview) -> None:
        if self._is_older(self._present):
            with files.exclusive():
                if present_head(files) == self._present:  # otherwise a newer one has come meanwhile, which stays
                    files.unlink(SNAPSHOT)
            self._present = None
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
            # It is unknown what the disk holds, and another sync would not tell, so the transfer starts over.
            self.discard()
            raise
        self._synced = self.offset

    # ---- the end ---------------------------------------------------------------------------------------

    def finish(self, metadata: SnapshotMetadata | None = None) -> str:
        """Returns the path of the snapshot, which is complete, checked and durable. Idempotent.

        All bytes must be there (else ``SnapshotError``). They are synced, read again, and checked as by
        :meth:`Snapshot.verify`. If they are wrong (``ChecksumMismatchError``, ``SnapshotFormatError``), or not the
        snapshot that ``metadata`` names, they are discarded: the transfer must start over, at offset 0. (A receiver
        that was made with another snapshot's metadata keeps its part.) Then the file is renamed to ``snapshot.fsm``,
        and replaces the one that existed when this receiver was made; if a newer one has come since, it stays, and this
        is a ``StaleSnapshotError``. O(size).
        """
        return self._finish_once(self._require(), metadata)

    async def finish_async(self, metadata: SnapshotMetadata | None = None) -> str:
        """Awaits :meth:`finish` on a thread of its own: the event loop runs while the file is synced and checked.

        Cancelling the await does not stop the work: await it again, or call ``close``, which waits for its end.
        """
        files = self._require()
        future, self._finishing = call(partial(self._finish_once, files, metadata))
        try:
            return await future
        finally:
            if future.done() and not future.cancelled():
                self._finishing.wait()  # the outcome is here, so the thread is about to end

    def _finish_once(self, files: Directory, metadata: SnapshotMetadata | None) -> str:
        if metadata is not None:
            metadata = checked_metadata(metadata, self.directory)  # before anything is discarded because of it
        with storage_errors(self._path, "receiving a snapshot"):
            if self._finished is None:
                self._finish(files, metadata)
            elif metadata is not None:
                check_metadata(metadata, self._finished, files.path_of(SNAPSHOT))
            if not self._name_is_durable:  # also if an earlier call failed at this very sync
                files.sync_directory()
                self._name_is_durable = True
        return files.path_of(SNAPSHOT)

    def _finish(self, files: Directory, metadata: SnapshotMetadata | None) -> None:
        fd, head = self._whole or self._fd, self._head
        if metadata is not None and head is not None:
            self._check_asked(metadata, head)  # first: the rest of another snapshot need not be sent
        if fd is None or head is None or self.offset != head.file_size:
            expected = f"{self.size} bytes" if self.size else "a whole snapshot"
            raise SnapshotError(f"{self._path}: expected {expected}, found {self.offset}; write the rest first")
        self._sync(files, fd)
        try:
            Snapshot(fd, self._path).verify()
        except SnapshotError:
            self.discard()
            raise
        if self._whole is None:
            self._put_in_place(files, fd, head)
        elif not files.is_named(self._whole, SNAPSHOT):
            raise StaleSnapshotError(
                f"{files.path_of(SNAPSHOT)}: another snapshot has replaced the one as of "
                f"{LogId(head.last_index, head.last_term)}, which was complete here; use that, or make a new receiver")
        self._finished = head
        # The partial file either has its final name now, or is an empty one that only carried the lock.
        self._release(files, remove=self._whole is not None)

    def _put_in_place(self, files: Directory, fd: Descriptor, head: SnapshotHead) -> None:
        """Gives the checked file its name, unless a rename did that and reported an error all the same."""
        if files.is_named(fd, SNAPSHOT):
            return
        if not files.is_named(fd, PART):  # another file has that name, or none: a rename would move that one, or fail
            self._release(files, remove=False)
            self.offset, self._head, self._synced = 0, None, 0
            raise SnapshotError(
                f"{self._path}: the file that was being received is no longer there: somebody removed or replaced it; "
                "the transfer starts over, at offset 0")
        put_in_place(files, PART, LogId(head.last_index, head.last_term), self._present)

    def _check_asked(self, metadata: SnapshotMetadata, head: SnapshotHead) -> None:
        """Raises unless this is the snapshot that ``metadata`` names; discards a part that was not announced first."""
        try:
            check_metadata(metadata, head, self._path)
        except SnapshotError:
            if self._announced is None:
                self.discard()
            raise

    def discard(self) -> None:
        """Removes what was received, so that the transfer can start over at offset 0; does nothing once finished.

        Also removes a complete snapshot that was offered, but not taken by :meth:`finish`.
        """
        files = self._require()
        if self._finished is not None:
            return
        with storage_errors(self._path, "discarding a snapshot"):
            if self._whole is not None:
                with files.exclusive():
                    if files.is_named(self._whole, SNAPSHOT):  # otherwise the name belongs to another one by now
                        files.unlink(SNAPSHOT)
            try:
                self._release(files, remove=True)
            finally:  # after an error, the next `write` takes over what may still be there
                self.offset, self._head, self._synced = 0, None, 0

    def close(self) -> None:
        """Makes what was received durable, and releases the directory for a later receiver to continue. Idempotent.

        Waits for a running ``finish_async``.
        """
        if self._finishing is not None:
            self._finishing.wait()
        files, self._files = self._files, None
        if files is None:
            return
        kept = bool(self.offset) and self._whole is None
        try:
            with storage_errors(self._path, "receiving a snapshot"):
                try:
                    if self._fd is not None and kept:
                        files.sync(self._fd)
                        files.sync_directory()
                finally:
                    self._release(files, remove=not kept)
        finally:
            files.close()

    def _leave(self) -> None:
        """In a forked child: leaves the file and its lock to the parent, without releasing the lock."""
        self._files = self._whole = None
        fd, self._fd = self._fd, None
        if fd is not None:
            fd.close()

    # ---- the file --------------------------------------------------------------------------------------

    def _require(self) -> Directory:
        if self._files is None:
            raise SnapshotError(f"{self.directory}: this receiver is closed; a new one continues")
        if self._finishing is not None and not self._finishing.wait(0):
            raise SnapshotError(f"{self.directory}: finish_async is running; await its end first")
        return self._files

    def _open(self, files: Directory) -> Descriptor:
        """Opens and locks the partial file, and takes over its content, or the complete file that was announced."""
        while True:
            fd = files.open_file(PART, os.O_RDWR | os.O_CREAT)
            if not files.lock_file(fd):
                raise LockedError(self.directory, None)
            if files.is_named(fd, PART):  # otherwise the previous receiver has just finished or discarded it
                break
        self._fd = fd
        self._present = present_head(files)
        if not self._take_whole(files):
            self._take_part(files, fd)
        self._synced = self.offset
        return fd

    def _take_whole(self, files: Directory) -> bool:
        """Takes the existing complete file, if it is the announced snapshot, with all its bytes."""
        head = self._present
        if head is None or self._announced != metadata_of(head):
            return False
        whole = files.open_file(SNAPSHOT, os.O_RDONLY)
        if files.size(whole) != head.file_size:
            return False
        self._whole, self._head, self.offset = whole, head, head.file_size
        return True

    def _take_part(self, files: Directory, fd: Descriptor) -> None:
        """Takes over an earlier receiver's part; empties it if it is of another snapshot or has no valid header."""
        self.offset = files.size(fd)
        self._head = self._read_head(fd)
        another = self._head is not None and self._announced not in (None, metadata_of(self._head))
        if self.offset and (self._head is None or another):
            self.offset, self._head = 0, None
            files.truncate(fd.number, 0)

    def _read_head(self, fd: Descriptor) -> SnapshotHead | None:
        """Returns the header that was received earlier; None if it is not there, or was lost in a power loss."""
        try:
            head = snapshot_header.unpack(os.pread(fd.number, snapshot_header.HEADER_BYTES, 0), self._path)
        except (SnapshotFormatError, FormatVersionError):
            return None
        return head if self.offset <= head.file_size else None

    def _is_older(self, head: SnapshotHead | None) -> bool:
        """Returns whether a complete file's snapshot is older than the announced one."""
        announced = self._announced
        return head is not None and announced is not None and metadata_of(head).last_included < announced.last_included

    def _release(self, files: Directory, *, remove: bool) -> None:
        """Closes the partial file, and releases its lock."""
        self._whole = None
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            if remove and files.is_named(fd, PART):  # not another receiver's, after somebody removed this one's
                files.unlink(PART)
        finally:
            files.unlock_file(fd)  # closing is not enough while a child process being started has a copy
            files.close_file(fd)


_receivers = left_by_children(SnapshotReceiver._leave)
