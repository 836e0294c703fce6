"""The header of a snapshot: what it holds, where, and two checksums. Opens no files.

What follows it, an attachment and the state as runs and records, is in `format`.
"""

import struct
from typing import NamedTuple

from fastsm.disk.format cimport (
    ARENA_LIMIT, DEADLINE_SIZE, LATEST_DEADLINE, RECORD_KEY, SNAPSHOT_ATTACHMENT_SIZE, SNAPSHOT_CHECKSUM,
    SNAPSHOT_CLOCK, SNAPSHOT_CODEC, SNAPSHOT_HEADER_SIZE, SNAPSHOT_INDEX, SNAPSHOT_MAGIC, SNAPSHOT_MEMBERSHIP_SIZE,
    SNAPSHOT_RECORDS_SIZE, SNAPSHOT_RUNS, SNAPSHOT_STATE_CHECKSUM, SNAPSHOT_STORED_SIZE, TERM_RUN_SIZE, align8,
    record_size,
)

from fastsm.disk.format import MAX_INDEX, MAX_RECORD_VALUE
from fastsm.disk.headers import VERSION
from fastsm.errors import FormatVersionError, SnapshotFormatError

MAGIC_BYTES = b"FASTSM-S"
HEADER_BYTES = SNAPSHOT_HEADER_SIZE
CODEC_NONE = 0
CODEC_ZSTD = 1


class SnapshotHead(NamedTuple):
    """The header of a snapshot. Sizes are in bytes; the state consists of membership, runs and records."""
    codec: int
    last_index: int
    last_term: int
    keys: int
    runs: int
    membership_size: int
    records_size: int
    sessions: int             # each has one record
    clock: int                # 0: before the first tick
    state_checksum: bytes
    attachment_size: int
    stored_size: int          # of the state as stored in the file
    checksum: bytes

    @property
    def state_offset(self):
        """The offset of the state in the file."""
        return SNAPSHOT_HEADER_SIZE + align8(self.attachment_size)

    @property
    def state_size(self):
        """The size of the state in flat form."""
        return self.membership_size + TERM_RUN_SIZE * self.runs + self.records_size

    @property
    def file_size(self):
        """The size of the whole file."""
        return self.state_offset + self.stored_size


STATE_CHECKSUM_COVERS = slice(SNAPSHOT_INDEX, SNAPSHOT_STATE_CHECKSUM)
CHECKSUM_COVERS = slice(0, SNAPSHOT_CHECKSUM)
STRUCT = struct.Struct("<8sIIQQQQQQQQ32sQQ32s")


def pack(head):
    """Returns a snapshot's header.

    `state_checksum` covers the bytes [16:80] of it and the flat state; `checksum` covers the whole file except itself.
    """
    *fields, own_sum = head
    return STRUCT.pack(MAGIC_BYTES, VERSION, *fields, own_sum)


def unpack(data, path, size=None):
    """Returns the header of the snapshot at `path`, whose `size` bytes must all be accounted for.

    While the file is being received (`size` None), the size in the header is trusted. Raises `SnapshotFormatError` or
    `FormatVersionError`. The caller has to compare the checksums.
    """
    def refuse(offset, expected, found):
        raise SnapshotFormatError(f"{path}, offset {offset}: expected {expected}, found {found}; "
                                  "this is not a complete fastsm snapshot: get it again")

    if len(data) < SNAPSHOT_HEADER_SIZE:
        refuse(0, f"a header of {SNAPSHOT_HEADER_SIZE} bytes", f"{len(data)} bytes")
    magic, version, *fields, own_sum = STRUCT.unpack(data[:SNAPSHOT_HEADER_SIZE])
    if magic != MAGIC_BYTES:
        refuse(SNAPSHOT_MAGIC, f"magic {MAGIC_BYTES!r}", repr(magic))
    if version != VERSION:
        raise FormatVersionError(path, VERSION, version)
    head = SnapshotHead(*fields, own_sum)
    if head.codec not in (CODEC_NONE, CODEC_ZSTD):
        refuse(SNAPSHOT_CODEC, f"codec {CODEC_NONE} (none) or {CODEC_ZSTD} (zstd)", head.codec)
    if head.last_index > MAX_INDEX or head.last_term > MAX_INDEX:
        refuse(SNAPSHOT_INDEX, f"an index and a term of at most {MAX_INDEX}", (head.last_index, head.last_term))
    if head.clock > LATEST_DEADLINE:
        refuse(SNAPSHOT_CLOCK, f"a clock of at most {LATEST_DEADLINE}", head.clock)
    if head.attachment_size > MAX_RECORD_VALUE:
        refuse(SNAPSHOT_ATTACHMENT_SIZE, f"an attachment of at most {MAX_RECORD_VALUE} bytes", head.attachment_size)
    if size is not None and head.file_size != size:
        refuse(SNAPSHOT_STORED_SIZE, f"sizes that add up to the file's {size} bytes", head.file_size)
    if head.codec == CODEC_NONE and head.stored_size != head.state_size:
        refuse(SNAPSHOT_STORED_SIZE, f"the state's {head.state_size} bytes", head.stored_size)
    if head.state_size > ARENA_LIMIT:
        refuse(SNAPSHOT_RECORDS_SIZE, f"a state of at most {ARENA_LIMIT} bytes", head.state_size)
    # Zstandard adds three bytes to a block that it cannot compress, and a few to the whole.
    if head.stored_size > head.state_size + (head.state_size >> 8) + 1024:
        refuse(SNAPSHOT_STORED_SIZE, f"what {head.state_size} bytes may take at most", head.stored_size)
    if head.records_size & 7 or not (
        (head.keys + head.sessions) * RECORD_KEY <= head.records_size
        <= (2 * head.keys + head.sessions) * <object>(record_size(0xFFFF, MAX_RECORD_VALUE) + DEADLINE_SIZE)
    ):
        refuse(SNAPSHOT_RECORDS_SIZE, f"the size of whole records for {head.keys} keys and {head.sessions} sessions",
               head.records_size)
    if head.membership_size & 7 or (
        head.membership_size and not RECORD_KEY <= head.membership_size <= record_size(0, MAX_RECORD_VALUE)
    ):
        refuse(SNAPSHOT_MEMBERSHIP_SIZE, "the size of one record, or 0", head.membership_size)
    if (head.runs == 0) != (head.last_index == 0) or head.runs > min(head.last_index, head.last_term + 1):
        refuse(SNAPSHOT_RUNS, "runs of rising terms up to the last included entry", head.runs)
    if head.last_index == 0 and (
        head.last_term or head.keys or head.sessions or head.membership_size or head.clock
    ):
        refuse(SNAPSHOT_INDEX, "nothing in the state before the first entry",
               (head.last_term, head.keys, head.membership_size))
    return head
