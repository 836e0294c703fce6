"""The disk format of a Raft log, see docs/format.md: segments of frames, each of which is one step of the log.

A frame starts with the same header as in a state machine's log, without runs, so that the same code seals and checks
it; the header is followed by one item. A small file names the newest segment, so that no segment is lost unnoticed.
"""

import struct
from typing import NamedTuple

from libc.string cimport memcpy

from fastsm.disk.format cimport BROKEN, FRAME_LENGTH, MALFORMED, VALID, frame_length, frame_run_count

from fastsm.disk import headers
from fastsm.errors import CorruptionError

SEGMENT_MAGIC_BYTES = b"FASTSM-J"
SEGMENT_STRUCT = struct.Struct("<8sIIQQ56s")
STATE_STRUCT = struct.Struct("<QQQQQQQQQQ")
NEWEST_MAGIC_BYTES = b"FASTSM-N"
NEWEST_STRUCT = struct.Struct("<8sIIQQQ")
NEWEST_BYTES = NEWEST_STRUCT.size + 8
ITEM_DATA_BYTES = ITEM_DATA


class SegmentHead(NamedTuple):
    """The header of a segment."""
    generation: int     # its number: segments are numbered in the order in which they were begun
    identity: int


class SegmentState(NamedTuple):
    """A summary of all segments before this one."""
    first: int          # the first entry that is kept
    last: int           # the last entry; first - 1 if there is none
    term: int           # the current term
    voted: int          # 1: a vote was given in this term, to the node whose id follows
    commit: int
    previous_end: int       # where the previous segment's frames end; 0: there is none
    previous_durable: int   # an offset in that segment below which it was durable
    last_term: int      # of the last entry, or of the entry before the first
    previous_checksum: int  # of the last frame of the previous segment, which covers all of it; 0: there is none
    border_term: int    # of the entry before the first


class Newest(NamedTuple):
    """The content of NEWEST: which segments exist, so that none is lost unnoticed."""
    number: int         # the newest segment that was made
    identity: int       # its identity
    given_up: int       # later segments, up to this number, are being removed; 0: none


def pack_segment_head(head):
    """Returns a segment's header as bytes."""
    return headers.with_checksum(
        SEGMENT_STRUCT.pack(SEGMENT_MAGIC_BYTES, headers.VERSION, 0, head.generation, head.identity, bytes(56)))


def unpack_segment_head(data, path):
    """Returns the header of the segment at `path`; raises `CorruptionError` or `FormatVersionError`."""
    number, identity, zero = headers.unpack(
        SEGMENT_STRUCT, SEGMENT_MAGIC_BYTES, data[:headers.LOG_HEADER_BYTES], path, 3)
    if any(zero):
        raise CorruptionError(path, 32, "zeros", zero)
    return SegmentHead(number, identity)


def pack_newest(newest):
    """Returns the content of the file that names the newest segment."""
    return headers.with_checksum(NEWEST_STRUCT.pack(NEWEST_MAGIC_BYTES, headers.VERSION, 0, *newest))


def unpack_newest(data, path):
    """Returns what the file at `path` contains; raises `CorruptionError` or `FormatVersionError`."""
    newest = Newest(*headers.unpack(NEWEST_STRUCT, NEWEST_MAGIC_BYTES, data[:NEWEST_BYTES], path, 3))
    if len(data) > NEWEST_BYTES:
        raise CorruptionError(path, NEWEST_BYTES, "the end of the file", "more bytes")
    return newest


cdef void write_item(uint8_t *frame, const Item *item) noexcept nogil:
    """Writes all of a frame except its seal: the length, the item, the padding."""
    (<uint64_t *>(frame + item_length(item.size) - 8))[0] = 0
    write_item_head(frame, item)
    memcpy(frame + ITEM_DATA, item.data, item.size)


cdef void write_item_head(uint8_t *frame, const Item *item) noexcept nogil:
    """Writes what `write_item` writes, without the data and the padding: the first ITEM_DATA bytes."""
    (<uint64_t *>(frame + FRAME_LENGTH))[0] = item_length(item.size)
    (<uint64_t *>(frame + ITEM_INDEX))[0] = item.index
    (<uint64_t *>(frame + ITEM_TERM))[0] = item.term
    (<uint32_t *>(frame + ITEM_SIZE))[0] = <uint32_t>item.size
    (<uint32_t *>(frame + ITEM_KIND))[0] = item.kind


cdef int look_at_item(const uint8_t *frame, uint64_t available) noexcept nogil:
    """Returns VALID if an item of a known kind fills its frame, else MALFORMED; BROKEN if it cannot be a frame."""
    cdef uint64_t length, padding
    if available < ITEM_DATA:
        return BROKEN
    length = frame_length(frame)
    if length > available or frame_run_count(frame) or length != item_length(item_size(frame)):
        return MALFORMED
    if not (ITEM_ENTRY <= item_kind(frame) <= LAST_KIND):
        return MALFORMED
    # Little-endian, so padding is at the top of the last word.
    padding = length - ITEM_DATA - item_size(frame)
    if padding and (<const uint64_t *>(frame + length - 8))[0] >> (64 - 8 * padding):
        return MALFORMED
    return VALID
