"""The base of a generation: the snapshot that a log is stacked on, open as long as the log."""

from __future__ import annotations

import os

from fastsm.disk import format, headers, snapshot_header
from fastsm.disk.descriptors import Descriptor
from fastsm.disk.files import Directory, storage_errors
from fastsm.disk.snapshot_header import SnapshotHead
from fastsm.errors import CorruptionError, SnapshotFormatError
from fastsm.types import LogId


def base_name(generation: int) -> str:
    """Returns the file name of a generation's base."""
    return f"base-{generation}"


class Base:
    """A base whose header was checked. Its bytes are those of a flat snapshot, at the start of the arena.

    Thread safety: immutable, except for :meth:`close`.
    """

    def __init__(self, directory: Directory, name: str, descriptor: Descriptor, head: SnapshotHead) -> None:
        self.directory = directory
        self.name = name
        self.path = directory.path_of(name)
        self.descriptor: Descriptor | None = descriptor
        self.head = head
        self.size = head.file_size
        self.last_included = LogId(head.last_index, head.last_term)
        self.membership_offset = head.state_offset if head.membership_size else 0
        self.runs_offset = head.state_offset + head.membership_size
        self.records_offset = self.runs_offset + format.TERM_RUN_BYTES * head.runs

    def __repr__(self) -> str:
        return f"<Base {self.path!r}: {self.head.keys} keys as of {tuple(self.last_included)}>"

    @classmethod
    def open(cls, directory: Directory, log_head: headers.LogHead) -> Base | None:
        """Returns the base that a log's header names, or None; ``CorruptionError`` if the file is another base."""
        if log_head.base_size == 0:
            return None
        name = base_name(log_head.generation)
        path = directory.path_of(name)
        with storage_errors(path, "opening the base"):
            try:
                descriptor = directory.open_file(name, os.O_RDONLY)
            except FileNotFoundError:
                raise CorruptionError(path, None, "the base that the log is stacked on", "no file") from None
            try:
                size = directory.size(descriptor)
                content = os.pread(descriptor.number, snapshot_header.HEADER_BYTES, 0)
                head = snapshot_header.unpack(content, path, size)
                found = (head.file_size, head.checksum, head.last_index, head.last_term, head.codec)
                wanted = log_head.base_size, log_head.base_checksum, log_head.base_index, log_head.base_term
                if found != (*wanted, snapshot_header.CODEC_NONE):
                    raise CorruptionError(path, 0, f"the base that the log is stacked on, {wanted}", found)
                attachment_end = snapshot_header.HEADER_BYTES + head.attachment_size
                padding = os.pread(descriptor.number, head.state_offset - attachment_end, attachment_end)
                if any(padding):
                    raise CorruptionError(path, attachment_end, "zeros", padding)
            except SnapshotFormatError as error:
                directory.close_file(descriptor)
                raise CorruptionError(path, 0, "the header of a base", str(error)) from error
            except BaseException:
                directory.close_file(descriptor)
                raise
        return cls(directory, name, descriptor, head)

    def duplicate_descriptor(self) -> Descriptor:
        """Returns another descriptor of the file, which may outlive this object."""
        if self.descriptor is None:
            raise ValueError(f"{self!r} is closed")
        return self.descriptor.duplicate()

    def close(self) -> None:
        """Closes the descriptor. Idempotent."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            self.directory.close_file(descriptor)
