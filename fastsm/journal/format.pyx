"""The journal's disk format, as docs/format.md has it: segments of frames, each of which is one step of a Raft log.

A frame has the header that those of a state machine's log have, with no runs, so that it is sealed and checked by
the same code; behind the header stands one item.
"""

import struct
from typing import NamedTuple

from libc.string cimport memcpy

from fastsm.disk.format cimport BROKEN, MALFORMED, VALID, frame_length, frame_run_count

from fastsm.disk import format
from fastsm.errors import CorruptionError

SEGMENT_MAGIC_BYTES = b"FASTSM-J"
SEGMENT_STRUCT = struct.Struct("<8sIIQQ56s")
STATE_STRUCT = struct.Struct("<QQQQQQQQQ")
ITEM_DATA_BYTES = ITEM_DATA


class SegmentHead(NamedTuple):
    """The first bytes of a segment. It has the fields that a log's has, as far as these are of use here."""
    generation: int     # its number: segments are numbered in the order in which they were begun
    identity: int
    base_size: int = 0


class SegmentState(NamedTuple):
    """What all segments before one came to."""
    first: int          # the first entry that is kept
    last: int           # the last entry; first - 1 when there is none
    term: int           # the current term
    voted: int          # 1: a vote was given in it, to the node whose id follows in UTF-8
    commit: int
    previous_end: int       # where the frames of the segment before it end; 0: there is none
    previous_durable: int   # and an offset in it below which they were durable
    last_term: int      # of the last entry, or of the one before the first
    previous_checksum: int  # of the last frame of the segment before it, which stands for all of that; 0: there is none


def pack_segment_head(head):
    """A segment's header."""
    return format.with_checksum(
        SEGMENT_STRUCT.pack(SEGMENT_MAGIC_BYTES, format.VERSION, 0, head.generation, head.identity, bytes(56)))


def unpack_segment_head(data, path):
    """The header of the segment at `path`; raises `CorruptionError` or `FormatVersionError`."""
    number, identity, zero = format.unpack(
        SEGMENT_STRUCT, SEGMENT_MAGIC_BYTES, data[:format.LOG_HEADER_BYTES], path, 3)
    if any(zero):
        raise CorruptionError(path, 32, "zeros", zero)
    return SegmentHead(number, identity)


cdef void write_item(
    uint8_t *frame, uint32_t kind, uint64_t index, uint64_t term, const uint8_t *data, uint32_t size
) noexcept nogil:
    """Writes all of a frame but its header, padding included."""
    (<uint64_t *>(frame + item_length(size) - 8))[0] = 0
    (<uint64_t *>(frame + ITEM_INDEX))[0] = index
    (<uint64_t *>(frame + ITEM_TERM))[0] = term
    (<uint32_t *>(frame + ITEM_SIZE))[0] = size
    (<uint32_t *>(frame + ITEM_KIND))[0] = kind
    memcpy(frame + ITEM_DATA, data, size)


cdef int look_at_item(const uint8_t *frame, uint64_t available) noexcept nogil:
    """VALID or MALFORMED: whether an item fills its frame, and is of a known kind; BROKEN when it cannot be a frame."""
    cdef uint64_t length, padding
    if available < ITEM_DATA:
        return BROKEN
    length = frame_length(frame)
    if length > available or frame_run_count(frame) or length != item_length(item_size(frame)):
        return MALFORMED
    if not (ITEM_ENTRY <= item_kind(frame) <= LAST_KIND):
        return MALFORMED
    # Little-endian: padding is the top of the last word.
    padding = length - ITEM_DATA - item_size(frame)
    if padding and (<const uint64_t *>(frame + length - 8))[0] >> (64 - 8 * padding):
        return MALFORMED
    return VALID
