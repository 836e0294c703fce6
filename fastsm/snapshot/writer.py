"""Writing a snapshot's file, completely or not at all.

It is written under a temporary name, synced, and renamed. The writer locks it in the meantime, so the files of dead
writers are distinguished from those of running ones.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import blake3

from fastsm.arguments import flat_view
from fastsm.disk import format, snapshot_header
from fastsm.disk.descriptors import Descriptor
from fastsm.disk.files import Directory, make_directory, storage_errors
from fastsm.disk.forks import left_by_children
from fastsm.disk.mapping import map_file
from fastsm.disk.snapshot_header import CODEC_NONE, CODEC_ZSTD, SnapshotHead
from fastsm.errors import CorruptionError, FormatVersionError, SnapshotFormatError, StaleSnapshotError
from fastsm.long_work import no_tick, run_long
from fastsm.snapshot import codec
from fastsm.snapshot.file import SNAPSHOT, metadata_of
from fastsm.types import LogId, SnapshotMetadata

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

class Tick(Protocol):
    """Called between pieces, with the number of bytes of records written so far, if known; may raise."""

    def __call__(self, done: int = 0, /) -> object: ...


COMPRESSIONS = {None: CODEC_NONE, "none": CODEC_NONE, "zstd": CODEC_ZSTD}
HASH_PIECE = 1 << 30  # bytes hashed between two checks whether to go on: 0.15 s
COMPRESS_PIECE = 8 << 20

_LEFTOVER = re.compile(re.escape(SNAPSHOT) + r"\.[0-9]+-[0-9a-f]+\.tmp")


class Source(Protocol):
    """A state as of an entry, in the parts that a snapshot has."""

    @property
    def last_included(self) -> LogId: ...
    @property
    def membership(self) -> bytes:
        """The membership record, or nothing."""
    @property
    def runs(self) -> bytes:
        """The runs of terms, 24 bytes each, ascending."""
    @property
    def sessions(self) -> int:
        """How many of the written records are those of sessions."""
    @property
    def clock(self) -> int:
        """The clock as of that entry."""

    @property
    def estimated_size(self) -> int:
        """The approximate size of all records."""

    def find(self, tick: Tick) -> None:
        """Decides what is in the snapshot; called before everything else, and does nothing the second time."""

    def write_records(self, directory: Directory, fd: Descriptor, offset: int, tick: Tick) -> tuple[int, int]:
        """Writes all records with ``directory.write(fd, buffer, offset)``.

        Returns the number of records of keys, and the bytes of all records. Calls ``tick(bytes so far)`` between
        pieces, which may raise.
        """


def write_snapshot_file(
    path: str | os.PathLike[str], source: Source, *, compress: str | None = "none", attachment: Buffer = b"",
    tick: Tick | None = None, files: type[Directory] = Directory,
) -> SnapshotMetadata:
    """Writes ``path/snapshot.fsm``; its content, its name and the directory's name are durable on return.

    The directory is made if it is missing. After any error, or if ``tick`` raises, an older snapshot there is
    unchanged, and nothing else is left. O(size), mostly without the GIL. Raises ``StorageError``; ``SnapshotError``
    without Zstandard for ``compress="zstd"``; and ``StaleSnapshotError`` if a newer snapshot was put there in the
    meantime.
    """
    seen = look_at_present(path, files)
    with prepare(path, source, compress=compress, attachment=attachment, tick=tick, files=files, seen=seen) as prepared:
        prepared.commit()
    return prepared.metadata


def prepare(
    path: str | os.PathLike[str], source: Source, *, compress: str | None = "none", attachment: Buffer = b"",
    tick: Tick | None = None, files: type[Directory] = Directory, seen: SnapshotHead | None = None,
) -> PreparedSnapshot:
    """Does everything that :func:`write_snapshot_file` does except the rename, which is left to ``commit()``.

    ``seen``: what :func:`look_at_present` found before the source was captured.
    """
    if compress not in COMPRESSIONS:
        raise ValueError(f'expected compress "none" or "zstd", found {compress!r}')
    attachment = flat_view(attachment, "attachment")
    if len(attachment) > format.MAX_RECORD_VALUE:
        raise ValueError(f"expected an attachment of at most {format.MAX_RECORD_VALUE} bytes, found {len(attachment)}")
    tick = tick or no_tick
    with storage_errors(os.fsdecode(path), "writing a snapshot"):
        directory = make_directory(path, files)
        try:
            remove_leftovers(directory)
            return _prepare(directory, source, COMPRESSIONS[compress], attachment, tick, seen)
        except BaseException:
            directory.close()
            raise


class PreparedSnapshot:
    """A snapshot that was written and synced under a temporary name.

    A context manager, which discards the snapshot at the end unless :meth:`commit` was called.

    Attributes: ``head``, ``metadata``, ``state_checksum``, ``path`` (its final path). Thread safety: none.
    """

    def __init__(
        self, directory: Directory, temporary: Temporary, head: SnapshotHead, seen: SnapshotHead | None
    ) -> None:
        self._directory = directory
        self._temporary: Temporary | None = temporary
        self._seen = seen
        self.path = directory.path_of(SNAPSHOT)
        self.head = head
        self.metadata = metadata_of(head)
        self.state_checksum = head.state_checksum

    def __repr__(self) -> str:
        left = "prepared" if self._temporary else "done"
        return f"<PreparedSnapshot {self.path!r} as of {tuple(self.metadata.last_included)}, {left}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def commit(self) -> None:
        """Gives the snapshot its final name, durably. After a ``StorageError``, the older one or this one is there.

        ``StaleSnapshotError`` if a newer snapshot got the name while this one was being written: then that one stays.
        """
        if self._temporary is None or self._temporary.name is None:
            raise ValueError(f"{self.path}: this snapshot was already committed or discarded; prepare another one")
        with storage_errors(self.path, "writing a snapshot"):
            put_in_place(self._directory, self._temporary.name, self.metadata.last_included, self._seen)
            self._temporary.name = None  # it must not be removed any more
            try:
                self._directory.sync_directory()
            finally:
                self._close()

    def discard(self) -> None:
        """Removes the temporary file. Idempotent; does nothing after :meth:`commit`."""
        if self._temporary is not None:
            with storage_errors(self.path, "removing an unfinished snapshot"):
                try:
                    self._temporary.remove()
                finally:
                    self._close()

    def _close(self) -> None:
        if self._temporary is not None:
            temporary, self._temporary = self._temporary, None
            self._directory.close_file(temporary.fd)
        self._directory.close()


# ---- the name ------------------------------------------------------------------------------------------

def present_head(directory: Directory) -> SnapshotHead | None:
    """Returns the header of the snapshot that has the name now; None if there is none that can be read."""
    path = directory.path_of(SNAPSHOT)
    try:
        content = directory.read_file(SNAPSHOT, snapshot_header.HEADER_BYTES)
        return None if content is None else snapshot_header.unpack(content, path)
    except (CorruptionError, FormatVersionError, SnapshotFormatError, PermissionError):
        return None  # an unreadable one cannot be compared


def look_at_present(path: str | os.PathLike[str], files: type[Directory] = Directory) -> SnapshotHead | None:
    """Returns the :func:`present_head` of a directory, or None if the directory is missing."""
    with storage_errors(os.fsdecode(path), "looking for a snapshot"):
        try:
            directory = files(path, create=False)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None  # writing to it will raise the error
        try:
            return present_head(directory)
        finally:
            directory.close()


def put_in_place(directory: Directory, name: str, ours: LogId, seen: SnapshotHead | None) -> None:
    """Renames a complete, synced snapshot as of ``ours`` to ``snapshot.fsm``; ``seen`` had that name when work began.

    Replacing a newer snapshot that existed before is intended. A snapshot put there since was not seen: if it is newer,
    it stays, and this is a ``StaleSnapshotError``. The directory is not synced.
    """
    with directory.exclusive():
        present = present_head(directory)
        if present is not None and present != seen:
            there = metadata_of(present).last_included
            if there > ours:
                raise StaleSnapshotError(
                    f"{directory.path_of(SNAPSHOT)}: another writer put a snapshot as of {there} there while this "
                    f"one, as of {ours}, was being written; the newer one stays, use that")
        directory.rename(name, SNAPSHOT)


# ---- temporary files -----------------------------------------------------------------------------------

class Temporary:
    """A writer's file, locked as long as it is open. A forked child closes its copy, and so has no lock."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        while True:
            name = f"{SNAPSHOT}.{os.getpid()}-{secrets.token_hex(8)}.tmp"
            self.name: str | None = name
            self.fd = directory.create_file(name)
            try:
                directory.lock_file(self.fd, wait=True)
                if directory.is_named(self.fd, name):
                    _temporaries.add(self)
                    return
            except BaseException:
                self.remove()
                raise
            # Another writer took it for a leftover before it was locked.
            directory.close_file(self.fd)

    def remove(self) -> None:
        """Removes the file, unless it was renamed."""
        if self.name is not None:
            self._directory.unlink(self.name)

    def leave(self) -> None:
        """Leaves the file, in a forked child, to the parent."""
        self.fd.close()


_temporaries = left_by_children(Temporary.leave)


@contextmanager
def temporary_file(directory: Directory) -> Iterator[Temporary]:
    """Returns a temporary file for the block; it stays if the block has renamed it."""
    temporary = Temporary(directory)
    try:
        yield temporary
    finally:
        temporary.remove()
        directory.close_file(temporary.fd)


def remove_leftovers(directory: Directory) -> None:
    """Removes the temporary files of dead writers, whose locks are free."""
    for name in directory.names():
        if _LEFTOVER.fullmatch(name):
            try:
                fd = directory.open_file(name, os.O_RDONLY)
            except (OSError, CorruptionError):
                continue  # gone by now, or not a writer's file
            try:
                if directory.lock_file(fd):
                    directory.unlink(name)
            finally:
                directory.close_file(fd)


# ---- content -------------------------------------------------------------------------------------------

def _prepare(
    directory: Directory, source: Source, wanted: int, attachment: memoryview, tick: Tick, seen: SnapshotHead | None
) -> PreparedSnapshot:
    temporary = Temporary(directory)
    try:
        if wanted == CODEC_NONE:
            head = write_snapshot_into(directory, temporary.fd, source, attachment, tick)
        else:
            with temporary_file(directory) as flat:
                fd = flat.fd
                parts = run_long(partial(_write_state, directory, fd, source, 0), tick, source.estimated_size)
                head = _write_compressed(directory, temporary.fd, fd, parts, attachment=attachment, tick=tick)
        return PreparedSnapshot(directory, temporary, head, seen)
    except BaseException:
        temporary.remove()
        directory.close_file(temporary.fd)
        raise


def write_snapshot_into(
    directory: Directory, fd: Descriptor, source: Source, attachment: Buffer, tick: Tick
) -> SnapshotHead:
    """Writes a complete snapshot without compression into an empty file of any name; synced on return.

    Bases in the state's own directory are also made by this. Raises plain OSErrors, and what ``tick`` raises.
    """
    attachment = memoryview(attachment).cast("B")
    size = source.estimated_size + len(attachment)
    head = run_long(partial(_write_flat, directory, fd, source, attachment), tick, size)
    _finish(directory, fd, head)
    return head


def _write_flat(
    directory: Directory, fd: Descriptor, source: Source, attachment: memoryview, tick: Tick
) -> SnapshotHead:
    """Writes everything except the header, which is returned with its checksums."""
    start = _write_attachment(directory, fd, attachment)
    parts = _write_state(directory, fd, source, start, tick)
    head = parts.head(CODEC_NONE, len(attachment), parts.size)
    # The disk writes while the checksums are computed, so that the sync has less to do.
    directory.start_writeback(fd, 0, start + parts.size)
    with _mapped(fd, start + parts.size) as content:
        head = head._replace(state_checksum=_sum(_state_prefix(head), content, start, tick))
        return head._replace(checksum=_sum(_prefix(head), content, snapshot_header.HEADER_BYTES, tick))


class _Sink:
    """Takes what a state would write to a file, and passes it to a function, or drops it."""

    def __init__(self, take: Callable[[memoryview], object] = lambda piece: None) -> None:
        self._take = take

    def write(self, fd: object, data: memoryview, offset: int) -> None:
        self._take(data)


def state_checksum(source: Source, tick: Tick) -> bytes:
    """Returns the state checksum that a snapshot of ``source`` would have; writes nothing. O(size), in two passes.

    The first pass counts, since the checksum covers the counts before the records.
    """

    def compute(work: Tick) -> bytes:
        parts = _write_state(cast("Directory", _Sink()), cast("Descriptor", None), source, 0, work)
        hasher = blake3.blake3(_state_prefix(parts.head(CODEC_NONE, 0, parts.size)))
        _write_state(cast("Directory", _Sink(hasher.update)), cast("Descriptor", None), source, 0, work)
        return hasher.digest()

    return run_long(compute, tick, source.estimated_size)


def _write_compressed(
    directory: Directory, fd: Descriptor, flat: Descriptor, parts: _Parts, *, attachment: memoryview, tick: Tick
) -> SnapshotHead:
    start = _write_attachment(directory, fd, attachment)
    offset = start

    def write(piece: bytes) -> None:
        nonlocal offset
        offset = directory.write_paced(fd, piece, offset)

    def pieces(content: memoryview) -> Generator[memoryview, None, None]:
        for at in range(0, len(content), COMPRESS_PIECE):
            tick()
            with content[at : at + COMPRESS_PIECE] as piece:
                yield piece

    head = parts.head(CODEC_ZSTD, len(attachment), 0)
    with _mapped(flat, parts.size) as content:
        head = head._replace(state_checksum=_sum(_state_prefix(head), content, 0, tick))
        with closing(pieces(content)) as flat_pieces:
            head = head._replace(stored_size=codec.compress(flat_pieces, parts.size, write))
    with _mapped(fd, head.file_size) as content:
        head = head._replace(checksum=_sum(_prefix(head), content, snapshot_header.HEADER_BYTES, tick))
    _finish(directory, fd, head)
    return head


def _finish(directory: Directory, fd: Descriptor, head: SnapshotHead) -> None:
    """Writes the header; has the file written to the disk in pieces, between which others may be synced; syncs it."""
    directory.write(fd, snapshot_header.pack(head), 0)
    directory.pace_writeback(fd, 0, head.file_size)
    directory.sync(fd)


class _Parts(NamedTuple):
    """The parts of a state in flat form that were written."""

    last_included: LogId
    keys: int
    runs: int
    membership_size: int
    records_size: int
    sessions: int
    clock: int

    @property
    def size(self) -> int:
        return self.membership_size + format.TERM_RUN_BYTES * self.runs + self.records_size

    def head(self, codec: int, attachment_size: int, stored_size: int) -> SnapshotHead:
        """Returns the header, without its checksums."""
        return SnapshotHead(
            codec, *self.last_included, self.keys, self.runs, self.membership_size, self.records_size,
            self.sessions, self.clock, bytes(32), attachment_size, stored_size, bytes(32),
        )


def _write_attachment(directory: Directory, fd: Descriptor, attachment: memoryview) -> int:
    """Leaves room for the header, and writes the attachment and padding; returns where the state starts."""
    directory.write(fd, bytes(snapshot_header.HEADER_BYTES), 0)
    directory.write(fd, attachment, snapshot_header.HEADER_BYTES)
    end = snapshot_header.HEADER_BYTES + len(attachment)
    directory.write(fd, bytes(-end % 8), end)
    return end + -end % 8


def _write_state(directory: Directory, fd: Descriptor, source: Source, start: int, tick: Tick) -> _Parts:
    """Writes the flat state, starting at ``start``."""
    source.find(tick)
    membership, runs = source.membership, source.runs
    directory.write(fd, membership + runs, start)
    keys, size = source.write_records(directory, fd, start + len(membership) + len(runs), tick)
    return _Parts(
        source.last_included, keys, len(runs) // format.TERM_RUN_BYTES, len(membership), size,
        source.sessions, source.clock)


# ---- sums ----------------------------------------------------------------------------------------------

def _state_prefix(head: SnapshotHead) -> bytes:
    return snapshot_header.pack(head)[snapshot_header.STATE_CHECKSUM_COVERS]


def _prefix(head: SnapshotHead) -> bytes:
    return snapshot_header.pack(head)[snapshot_header.CHECKSUM_COVERS]


def _sum(prefix: bytes, content: memoryview, start: int, tick: Tick) -> bytes:
    """Returns the BLAKE3 of the prefix, followed by the content from ``start`` on."""
    hasher = blake3.blake3(prefix)
    for at in range(start, len(content), HASH_PIECE):
        with content[at : at + HASH_PIECE] as piece:
            hasher.update(piece)
        tick()
    return hasher.digest()


@contextmanager
def _mapped(fd: Descriptor, size: int) -> Iterator[memoryview]:
    """Maps the content of this process's own file, which is never cut."""
    if size == 0:
        yield memoryview(b"")
        return
    # Not a plain `mmap`, which takes the GIL twice more.
    with memoryview(map_file(fd.number, size)) as content:
        yield content[:size]
