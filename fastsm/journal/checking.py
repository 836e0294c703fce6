"""Checks every byte of a Raft log against its checksum, in the files, not the mapping, so an owner may be writing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from functools import partial

from fastsm.disk import headers
from fastsm.disk.files import Directory, storage_errors
from fastsm.errors import CorruptionError, StorageError
from fastsm.generation.names import NEWEST
from fastsm.generation.recovery import whole_frames
from fastsm.journal.format import NEWEST_BYTES, Newest, SegmentHead, pack_segment_head, unpack_newest

Progress = Callable[[int, int], None]
SegmentFile = tuple[str, SegmentHead, int, int]  # name, header, end of its frames, checksum of the last one


def check_segments(
    directory: Directory, segments: Sequence[SegmentFile], is_needed: Callable[[str], bool],
    progress: Progress | None = None,
) -> None:
    """Raises ``CorruptionError`` at the first damage, ``StorageError`` if a file cannot be read. O(bytes).

    ``is_needed(name)`` says whether a file that no longer exists should still exist.
    """
    path = directory.path_of(NEWEST)
    with storage_errors(path, "reading it"):
        content = directory.read_file(NEWEST, NEWEST_BYTES + 1)
    if content is None:
        raise CorruptionError(path, None, "the name of the newest segment", "no file")
    check_newest(unpack_newest(content, path), segments[-1][1], path)
    total = sum(end for _, _, end, _ in segments)
    done = 0
    for segment in segments:
        try:
            check_segment(directory, segment, progress and partial(_tell, progress, done, total))
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            if is_needed(segment[0]):
                raise CorruptionError(directory.path_of(segment[0]), None, "a segment", "no file") from None
        done += segment[2]


def check_newest(named: Newest, head: SegmentHead, path: str) -> None:
    """Raises ``CorruptionError`` unless NEWEST names the segment with this header, or one made later."""
    if named.number < head.generation:
        raise CorruptionError(
            path, 16, f"segment {head.generation} or a later one, since that one is in use", f"segment {named.number}")
    if named.number == head.generation and named.identity != head.identity:
        raise CorruptionError(path, 24, f"identity {head.identity:#018x}, that of the newest segment",
                              f"{named.identity:#018x}: it belongs to another log")  # fmt: skip


def _tell(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def check_segment(directory: Directory, segment: SegmentFile, progress: Progress | None = None) -> None:
    """Checks one segment as :func:`check_segments` does."""
    name, head, end, chain = segment
    path = directory.path_of(name)
    with storage_errors(path, "reading a segment of the log"):
        descriptor = directory.open_file(name, os.O_RDONLY)
        try:
            packed = pack_segment_head(head)
            found = os.pread(descriptor.number, len(packed), 0)
            if found != packed:
                raise CorruptionError(path, 0, f"the header of segment {head.generation}", "other bytes")
            stop, last = whole_frames(descriptor.number, head, end, progress, headers.head_checksum(packed))
        finally:
            directory.close_file(descriptor)
    if stop < end:
        raise CorruptionError(path, stop, "a valid frame", "bytes whose checksum does not match, or the end")
    if last != chain:
        raise CorruptionError(
            path, stop, f"a last frame of checksum {chain:#018x}", f"another one, of checksum {last:#018x}")
