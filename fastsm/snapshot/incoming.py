"""Copying a snapshot's file in: it is checked while it is copied, and becomes a base.

The source is read only once, so what was checked is what is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import blake3

from fastsm.disk import snapshot_header
from fastsm.disk.base import Base, base_name
from fastsm.disk.descriptors import Descriptor
from fastsm.disk.files import Directory, storage_errors
from fastsm.snapshot.file import Snapshot, compare, copy_checked, flat_state_checksum

if TYPE_CHECKING:
    from typing_extensions import Buffer

Progress = Callable[[int, int], None]


def copy_in(directory: Directory, generation: int, snapshot: Snapshot, progress: Progress | None) -> Base | None:
    """Copies a snapshot in as a generation's base, synced. Returns None for the empty state, which has no base.

    Raises ``ChecksumMismatchError``, ``SnapshotFormatError``, ``StorageError``; the caller then removes what is left.
    """
    name = base_name(generation)
    flat = snapshot.head.codec == snapshot_header.CODEC_NONE
    with storage_errors(directory.path_of(name), "copying a snapshot in"):
        descriptor = copy(directory, name if flat else f"{name}.tmp", snapshot, progress)
        try:
            head = snapshot.head
            if not flat:
                stored, descriptor = descriptor, directory.create_file(name)
                try:
                    head = unpack(directory, stored, descriptor, snapshot)
                finally:
                    directory.close_file(stored)
                    directory.unlink(f"{name}.tmp")
            directory.sync(descriptor)
        except BaseException:
            directory.close_file(descriptor)
            raise
    base = Base(directory, name, descriptor, head)
    if head.last_index == 0:
        base.close()
        directory.unlink(name)
        return None
    return base


def copy(directory: Directory, name: str, snapshot: Snapshot, progress: Progress | None) -> Descriptor:
    """Copies the file as it is, and checks it against the checksum in its header."""
    descriptor = directory.create_file(name)
    offset = 0

    def write(piece: memoryview) -> None:
        nonlocal offset
        if snapshot.head.codec == snapshot_header.CODEC_NONE:
            offset = directory.write_paced(descriptor, piece, offset)
        else:  # unlinked after it is unpacked
            directory.write(descriptor, piece, offset)
            offset += len(piece)

    try:
        directory.allocate(descriptor, 0, snapshot.size)
        copy_checked(snapshot.descriptor, snapshot.head, snapshot.path, write, progress)
    except BaseException:
        directory.close_file(descriptor)
        raise
    return descriptor


def unpack(
    directory: Directory, stored: Descriptor, descriptor: Descriptor, snapshot: Snapshot
) -> snapshot_header.SnapshotHead:
    """Writes the flat form of a compressed snapshot, without its attachment; returns the header of that base.

    Checks the size and the state checksum.
    """
    head = snapshot.head._replace(
        codec=snapshot_header.CODEC_NONE, attachment_size=0, stored_size=snapshot.head.state_size, checksum=bytes(32)
    )
    packed = snapshot_header.pack(head)
    hasher = blake3.blake3(packed[: snapshot_header.HEADER_BYTES - len(head.checksum)])
    offset = head.state_offset

    def written_pieces() -> Iterator[Buffer]:
        nonlocal offset
        with Snapshot(stored.duplicate(), snapshot.path) as copied:
            for piece in copied.flat_pieces():
                offset = directory.write_paced(descriptor, piece, offset)
                hasher.update(piece)
                yield piece

    compare(snapshot.path, "state checksum", head.state_checksum, flat_state_checksum(head, written_pieces()))
    head = head._replace(checksum=hasher.digest())
    directory.write(descriptor, snapshot_header.pack(head), 0)
    return head
