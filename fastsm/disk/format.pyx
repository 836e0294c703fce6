"""The disk formats: every magic, version, offset and limit. Opens no files.

Pictures are in docs/format.md. In short, with little-endian integers and 8-byte aligned records:

    CURRENT   which generation is in use, and how far its log is known durable
    log       header | frame | frame | … | zeros (preallocated)
    frame     checksum | length | watermark lag | run count | seal | runs | records
    run       last index | term
    record    index | value size | key size | operation | timed | key | value | padding | deadline, if timed
    snapshot  header | attachment | membership record | runs (first, last, term) | records
    table     header | runs | snapshot metadata | dead map | directories | deadlines | segments, paged | order

A frame is bound to its place and to everything before it. The seal is a checksum of the header alone, seeded with the
log's identity and the frame's offset, so the header alone shows whether bytes are a header of this log at this place,
whatever values contain. The checksum of the rest is seeded with the seal and with the previous frame's checksum (for
the first frame, that of the log's header): so a frame of another file, of another place, or of another history of the
same file does not match, and the last frame's checksum covers the whole file.
"""

import struct
from typing import NamedTuple

from libc.string cimport memcpy

from fastsm.disk.hashing cimport Part, xxh64, xxh64_of_parts

from fastsm.errors import CorruptionError, FormatVersionError, SnapshotFormatError
from fastsm.disk.hashing import checksum

VERSION = 0
LOG_MAGIC_BYTES = b"FASTSM-L"
CURRENT_MAGIC_BYTES = b"FASTSM-C"
SNAPSHOT_MAGIC_BYTES = b"FASTSM-S"
TABLE_MAGIC_BYTES = b"FASTSM-T"
LOG_HEADER_BYTES = LOG_HEADER_SIZE
SNAPSHOT_HEADER_BYTES = SNAPSHOT_HEADER_SIZE
TERM_RUN_BYTES = TERM_RUN_SIZE
LARGE_BYTES = LARGE
CODEC_NONE = 0
CODEC_ZSTD = 1

# A run of this term is a gap: indexes that were never seen, between two runs of different terms.
UNKNOWN_TERM = <uint64_t>0xFFFFFFFFFFFFFFFF
cdef uint64_t LARGEST = UNKNOWN_TERM - 1
ARENA_LIMIT = <uint64_t>1 << 39
cdef uint64_t LARGEST_VALUE = 0x7FFFFFFF
MAX_TERM = MAX_INDEX = LARGEST

cdef enum:  # a session's record of its last command's result
    RESULT_LIMIT = 1 << 20   # bytes of its value
    RESULT_ANSWER = 2        # an Answer with ok=True; lower codes: False, True
    RESULT_REFUSED = 3       # this and higher codes: one for each reason
    REFUSALS = 8
    VALUE_INTEGER = 3        # lower codes: None, False, True
    VALUE_BYTES = 4
    VALUE_LIST = 5
    VALUE_DEPTH = 8

NO_DEADLINE = <uint64_t>0xFFFFFFFFFFFFFFFF
LATEST_DEADLINE = <uint64_t>0x7FFFFFFFFFFFFFFF
MAX_DEADLINE = LATEST_DEADLINE


# ---- files with one fixed header ----------------------------------------------------------------------

class LogHead(NamedTuple):
    """The header of a log: its identity, the entry after which it starts, and the base with the state as of that entry.

    `base_size` is 0 if there is no base: the log starts with the empty state.
    """
    generation: int
    identity: int
    base_index: int = 0
    base_term: int = 0
    base_size: int = 0
    base_checksum: bytes = bytes(32)
    base_changes: int = 0     # how many changes of keys the base's last entry made, plus one; 0: unknown


class CurrentFile(NamedTuple):
    """CURRENT: the generation in use, its log's identity, and an offset up to which that is durable."""
    generation: int
    identity: int
    durable_offset: int
    last_frame: int = 0       # the offset of the frame that ends there; 0: no frame, or unknown
    last_checksum: int = 0    # of that frame


class Sections(NamedTuple):
    """Offsets in a saved table: the start of each section, and the end of the file."""
    runs: int
    metadata: int
    dead: int
    directories: tuple        # of the tables of keys, sessions and touches
    deadlines: tuple          # of keys and of sessions
    front_end: int            # the end of the sections above
    segments: tuple           # of each table
    order: int                # the places of keys, sorted by key
    end: int


class SavedPart(NamedTuple):
    """One table of a saved table's file. An empty one has neither segments nor a directory."""
    seed0: int
    seed1: int
    entries: int
    segments: int
    depth: int


class SavedTable(NamedTuple):
    """The header of a saved table: the place in a log's life at which it was made, and what follows."""
    identity: int         # of the log
    log_offset: int       # the end of the frames that it covers
    log_start: int        # where the log starts in the arena
    seed0: int
    seed1: int
    keys: int
    live_bytes: int
    config_place: int
    segments: int
    depth: int
    runs: int
    metadata_size: int
    dead_words: int
    frames: int
    last_frame: int       # the offset of the last of those frames; 0: none
    last_checksum: int    # of that frame, or of the log's header: covers base and log up to `log_offset`
    clock: int
    clock_place: int      # of the newest clock record; 0: none in the log
    touch_place: int      # of the newest touch; 0: none
    key_deadlines: int
    session_deadlines: int
    sessions: SavedPart
    touches: SavedPart
    # The number of places in the order of their keys: that of the keys, or 0 if the order was not in use
    ordered: int
    body_checksum: int    # XXH64 of everything after the header

    @property
    def parts(self):
        """The three tables."""
        return SavedPart(self.seed0, self.seed1, self.keys, self.segments, self.depth), self.sessions, self.touches

    @property
    def sections(self):
        """Where each section is."""
        runs = TABLE_HEADER_BYTES
        metadata = runs + TERM_RUN_SIZE * self.runs
        dead = metadata + align8(self.metadata_size)
        at = dead + 8 * self.dead_words
        directories, deadlines, segments = [], [], []
        for part in self.parts:
            directories.append(at)
            at += align8(4 << part.depth) if part.segments else 0
        for count in (self.key_deadlines, self.session_deadlines):
            deadlines.append(at)
            at += DUE_BYTES * count
        front_end = at
        for part in self.parts:
            if part.segments:
                at = (at + TABLE_PAGE - 1) // TABLE_PAGE * TABLE_PAGE
            segments.append(at)
            at += part.segments * SEGMENT_BYTES
        return Sections(
            runs, metadata, dead, tuple(directories), tuple(deadlines), front_end, tuple(segments), at,
            at + 8 * self.ordered)


# Reserved zeros follow the version, and the fields.
LOG_STRUCT = struct.Struct("<8sIIQQQQQ32s")
CURRENT_STRUCT = struct.Struct("<8sIIQQQQQ")
TABLE_STRUCT = struct.Struct("<8sII33Q")
TABLE_HEADER_BYTES = TABLE_STRUCT.size + 8
TABLE_PAGE = 65536      # at least as large as the pages of any system: segments are mapped
SEGMENT_BYTES = 8 * 4096 + 64
DUE_BYTES = 16          # a deadline and a place


MOST_CHANGES = 2**31 - 2    # changes of one entry: higher counts are not distinguished


def pack_log_head(head):
    """Returns a log's header as bytes."""
    return with_checksum(LOG_STRUCT.pack(LOG_MAGIC_BYTES, VERSION, head.base_changes, *head[:-1]))


def head_checksum(packed):
    """Returns the checksum of a packed header without the word after its version; the first frame is chained to it.

    That word cannot be derived from the base; without it, a lost header can be made again.
    """
    return checksum(packed[:12] + bytes(4) + packed[16:-8])


def pack_saved_table(saved):
    """Returns a saved table's header as bytes."""
    *fields, sessions, touches, ordered, body_checksum = saved
    return with_checksum(TABLE_STRUCT.pack(
        TABLE_MAGIC_BYTES, VERSION, 0, *fields, *sessions, *touches, ordered, body_checksum))


def unpack_saved_table(data, path, size):
    """Returns the header of the saved table at `path`, a file of `size` bytes in which every section must lie."""
    fields = unpack(TABLE_STRUCT, TABLE_MAGIC_BYTES, data[:TABLE_HEADER_BYTES], path, 33)
    saved = SavedTable(
        *fields[:21], SavedPart(*fields[21:26]), SavedPart(*fields[26:31]), *fields[31:])
    counts = [saved.runs, saved.metadata_size, saved.dead_words, saved.key_deadlines, saved.session_deadlines]
    counts.append(saved.ordered)
    counts += [part.segments for part in saved.parts]
    depth = max(part.depth for part in saved.parts)
    if max(counts) > size or depth > 40 or saved.sections.end != size:
        raise CorruptionError(path, None, "sections that add up to the file's size", f"{size} bytes")
    return saved


def pack_current(current):
    """Returns the content of CURRENT."""
    return with_checksum(CURRENT_STRUCT.pack(CURRENT_MAGIC_BYTES, VERSION, 0, *current))


def unpack_log_head(data, path):
    """Returns the header of the log at `path`; raises `CorruptionError` or `FormatVersionError`."""
    base_changes, *fields = unpack(LOG_STRUCT, LOG_MAGIC_BYTES, data[:LOG_HEADER_SIZE], path, 6, True)
    head = LogHead(*fields, base_changes)
    if head.base_size == 0 and base_changes:
        raise CorruptionError(path, LOG_RESERVED, "zero, since there is no base", base_changes)
    for offset, number, limit in (
        (LOG_BASE_INDEX, head.base_index, LARGEST), (LOG_BASE_TERM, head.base_term, LARGEST),
        (LOG_BASE_SIZE, head.base_size, ARENA_LIMIT),
    ):
        if number > limit:
            raise CorruptionError(path, offset, f"at most {limit}", number)
    if head.base_size == 0 and (head.base_index or head.base_term or any(head.base_checksum)):
        raise CorruptionError(
            path, LOG_BASE_INDEX, "no entry, since there is no base", (head.base_index, head.base_term))
    return head


def unpack_current(data, path):
    """Parses the content of CURRENT; raises `CorruptionError` or `FormatVersionError`."""
    if len(data) != CURRENT_SIZE:
        raise CorruptionError(path, None, f"{CURRENT_SIZE} bytes", f"{len(data)} bytes")
    return CurrentFile(*unpack(CURRENT_STRUCT, CURRENT_MAGIC_BYTES, data, path, 5))


def with_checksum(bytes head):
    return head + struct.pack("<Q", checksum(head))


def unpack(layout, magic, bytes data, path, used, bint has_word=False):
    """Returns `used` fields; the word after the version is the first of them if `has_word`, or else must be zero.

    All versions keep magic, version and checksum in the same places, so that damage is distinguished from age.
    """
    if len(data) < layout.size + 8:
        raise CorruptionError(path, 0, f"a header of {layout.size + 8} bytes", f"{len(data)} bytes")
    if data[:8] != magic:
        raise CorruptionError(path, 0, f"magic {magic!r}", repr(data[:8]))
    found_sum = int.from_bytes(data[layout.size:], "little")
    expected_sum = checksum(data[:layout.size])
    _, version, reserved, *fields = layout.unpack(data[:layout.size])
    if found_sum != expected_sum:
        raise CorruptionError(path, layout.size, f"checksum {expected_sum:#018x}", f"{found_sum:#018x}")
    if version != VERSION:
        raise FormatVersionError(path, VERSION, version)
    if reserved and not has_word:
        raise CorruptionError(path, 12, "zero", reserved)
    for i in range(used, len(fields)):
        if fields[i]:
            raise CorruptionError(path, 16 + 8 * i, "zero", fields[i])
    return [reserved, *fields[:used]] if has_word else fields[:used]


# ---- snapshots ----------------------------------------------------------------------------------------

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
        """The offset of the state."""
        return SNAPSHOT_HEADER_SIZE + align8(self.attachment_size)

    @property
    def state_size(self):
        """The size of the state in flat form."""
        return self.membership_size + TERM_RUN_SIZE * self.runs + self.records_size

    @property
    def file_size(self):
        """The size of the whole file."""
        return self.state_offset + self.stored_size


# The parts of a state, for readers in Python. A run: first index, last index, term. The head of a record: index, size
# of the value, size of the key, operation, and 1 if it ends with a deadline.
TERM_RUN_STRUCT = struct.Struct("<QQQ")
RECORD_STRUCT = struct.Struct("<QIHBB")
# A frame: checksum, length, lag of the watermark, number of runs, seal. One of its runs: last index, term.
FRAME_STRUCT = struct.Struct("<QQIIQ")
FRAME_RUN_STRUCT = struct.Struct("<QQ")
OPERATIONS = {
    RECORD_PUT: "put", RECORD_DELETE: "delete", RECORD_CONFIG: "config", RECORD_SNAPSHOT: "snapshot",
    RECORD_CLOSE: "close", RECORD_SESSION: "session", RECORD_FORGET: "forget",
    RECORD_TOUCH: "touch", RECORD_CLOCK: "clock",
}
OPERATION_PUT = RECORD_PUT
OPERATION_CONFIG = RECORD_CONFIG
OPERATION_SESSION = RECORD_SESSION
OPERATION_TOUCH = RECORD_TOUCH
MAX_RESULT_BYTES = RESULT_LIMIT
MAX_SESSION_VALUE = SESSION_RESULT + 1 + RESULT_LIMIT
MAX_RECORD_VALUE = LARGEST_VALUE
STATE_CHECKSUM_COVERS = slice(SNAPSHOT_INDEX, SNAPSHOT_STATE_CHECKSUM)
CHECKSUM_COVERS = slice(0, SNAPSHOT_CHECKSUM)
SNAPSHOT_STRUCT = struct.Struct("<8sIIQQQQQQQQ32sQQ32s")


def unpack_record(buffer, place):
    """Parses a checked record in memory: index, operation, key, value, deadline, and where the next one starts."""
    index, value_size, key_size, operation, timed = RECORD_STRUCT.unpack_from(buffer, place)
    key = place + RECORD_STRUCT.size
    value = key + key_size
    stop = value + value_size
    end = place + (stop - place + 7 & ~7) + DEADLINE_SIZE * timed
    deadline = int.from_bytes(buffer[end - DEADLINE_SIZE:end], "little") if timed else None
    return index, operation, bytes(buffer[key:value]), bytes(buffer[value:stop]), deadline, end


def size_of_record(head):
    """Returns the size of a record, given its head."""
    _, value_size, key_size, _, timed = RECORD_STRUCT.unpack_from(head)
    return (RECORD_STRUCT.size + key_size + value_size + 7 & ~7) + DEADLINE_SIZE * timed


def unpack_frame(buffer, offset):
    """Parses a checked frame: returns its end, its watermark, its runs (last index, term), and where its records are.

    The watermark is None if the frame does not record it; so is the term of a run of entries that were never seen.
    """
    _, length, lag, count, _ = FRAME_STRUCT.unpack_from(buffer, offset)
    place = offset + FRAME_STRUCT.size
    runs = []
    for _ in range(count):
        last, term = FRAME_RUN_STRUCT.unpack_from(buffer, place)
        runs.append((last, None if term == UNKNOWN_TERM else term))
        place += FRAME_RUN_STRUCT.size
    return offset + length, None if lag == NO_WATERMARK else offset - 8 * lag, runs, place


def pack_snapshot_head(head):
    """Returns a snapshot's header; `state_checksum` covers `[16:64]` of it, `checksum` everything but itself."""
    *fields, own_sum = head
    return SNAPSHOT_STRUCT.pack(SNAPSHOT_MAGIC_BYTES, VERSION, *fields, own_sum)


def unpack_snapshot_head(data, path, size=None):
    """Returns the header of the snapshot at `path`, whose `size` bytes must all be accounted for.

    While the file is being received (`size` None), the size in the header is trusted. Raises `SnapshotFormatError` or
    `FormatVersionError`. The caller has to compare the checksums.
    """
    def refuse(offset, expected, found):
        raise SnapshotFormatError(f"{path}, offset {offset}: expected {expected}, found {found}; "
                                  "this is not a complete fastsm snapshot: get it again")

    if len(data) < SNAPSHOT_HEADER_SIZE:
        refuse(0, f"a header of {SNAPSHOT_HEADER_SIZE} bytes", f"{len(data)} bytes")
    magic, version, *fields, own_sum = SNAPSHOT_STRUCT.unpack(data[:SNAPSHOT_HEADER_SIZE])
    if magic != SNAPSHOT_MAGIC_BYTES:
        refuse(SNAPSHOT_MAGIC, f"magic {SNAPSHOT_MAGIC_BYTES!r}", repr(magic))
    if version != VERSION:
        raise FormatVersionError(path, VERSION, version)
    head = SnapshotHead(*fields, own_sum)
    if head.codec not in (CODEC_NONE, CODEC_ZSTD):
        refuse(SNAPSHOT_CODEC, f"codec {CODEC_NONE} (none) or {CODEC_ZSTD} (zstd)", head.codec)
    if head.last_index > LARGEST or head.last_term > LARGEST:
        refuse(SNAPSHOT_INDEX, f"an index and a term of at most {LARGEST}", (head.last_index, head.last_term))
    if head.clock > LATEST_DEADLINE:
        refuse(SNAPSHOT_CLOCK, f"a clock of at most {LATEST_DEADLINE}", head.clock)
    if head.attachment_size > LARGEST_VALUE:
        refuse(SNAPSHOT_ATTACHMENT_SIZE, f"an attachment of at most {LARGEST_VALUE} bytes", head.attachment_size)
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
        <= (2 * head.keys + head.sessions) * <object>(record_size(0xFFFF, LARGEST_VALUE) + DEADLINE_SIZE)
    ):
        refuse(SNAPSHOT_RECORDS_SIZE, f"the size of whole records for {head.keys} keys and {head.sessions} sessions",
               head.records_size)
    if head.membership_size & 7 or (
        head.membership_size and not RECORD_KEY <= head.membership_size <= record_size(0, LARGEST_VALUE)
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


# ---- frames and records -------------------------------------------------------------------------------

cdef uint8_t *write_record(
    uint8_t *p, uint8_t operation, uint64_t index,
    const uint8_t *key, uint16_t key_size, const uint8_t *value, uint32_t value_size,
) noexcept nogil:
    """Writes a record and its padding; returns where the next one starts. Pointers must not be NULL, even if empty."""
    cdef uint64_t size = record_size(key_size, value_size)
    (<uint64_t *>(p + size - 8))[0] = 0
    memcpy(write_head(p, operation, index, key, key_size, value_size), value, value_size)
    return p + size


cdef uint8_t *write_record_head(
    uint8_t *p, uint8_t operation, uint64_t index, const uint8_t *key, uint16_t key_size, uint32_t value_size,
) noexcept nogil:
    """Writes a record up to its value; returns where the value goes."""
    return write_head(p, operation, index, key, key_size, value_size)


cdef inline uint8_t *write_head(
    uint8_t *p, uint8_t operation, uint64_t index, const uint8_t *key, uint16_t key_size, uint32_t value_size,
) noexcept nogil:
    (<uint64_t *>p)[0] = index
    (<uint32_t *>(p + RECORD_VALUE_SIZE))[0] = value_size
    (<uint16_t *>(p + RECORD_KEY_SIZE))[0] = key_size
    p[RECORD_OPERATION] = operation
    p[RECORD_TIMED] = 0
    memcpy(p + RECORD_KEY, key, key_size)
    return p + RECORD_KEY + key_size


cdef uint64_t seal_frame(
    uint8_t *frame, uint64_t length, uint32_t run_count,
    uint64_t identity, uint64_t offset, uint64_t watermark, uint64_t previous,
) noexcept nogil:
    """Fills in the header of a frame whose runs and records are in place; returns its checksum.

    `previous`: the checksum of the previous frame, or of the file's header.
    """
    cdef uint64_t seal = fill_header(frame, length, run_count, identity, offset, watermark)
    cdef uint64_t own = xxh64(frame + FRAME_RUNS, length - FRAME_RUNS, seal ^ previous)
    (<uint64_t *>frame)[0] = own
    return own


cdef uint64_t seal_parts(
    Part *parts, size_t count, uint64_t length, uint32_t run_count,
    uint64_t identity, uint64_t offset, uint64_t watermark, uint64_t previous,
) noexcept nogil:
    """`seal_frame` for a frame in parts, the first of which begins with the frame's header."""
    cdef uint8_t *frame = <uint8_t *>parts[0].data
    cdef uint64_t seal = fill_header(frame, length, run_count, identity, offset, watermark)
    cdef uint64_t own
    parts[0].data += FRAME_RUNS
    parts[0].size -= FRAME_RUNS
    own = xxh64_of_parts(parts, count, seal ^ previous)
    parts[0].data -= FRAME_RUNS
    parts[0].size += FRAME_RUNS
    (<uint64_t *>frame)[0] = own
    return own


cdef inline uint64_t fill_header(
    uint8_t *frame, uint64_t length, uint32_t run_count, uint64_t identity, uint64_t offset, uint64_t watermark
) noexcept nogil:
    """Fills in the header except its checksum; returns the seal."""
    cdef uint64_t lag = (offset - watermark) >> 3
    cdef uint64_t seal
    (<uint64_t *>(frame + FRAME_LENGTH))[0] = length
    (<uint32_t *>(frame + FRAME_LAG))[0] = <uint32_t>lag if lag < NO_WATERMARK else NO_WATERMARK
    (<uint32_t *>(frame + FRAME_RUN_COUNT))[0] = run_count
    seal = frame_seal(frame, identity, offset)
    (<uint64_t *>(frame + FRAME_SEAL))[0] = seal
    return seal


cdef int look_at_header(
    const uint8_t *frame, uint64_t available, uint64_t identity, uint64_t offset
) noexcept nogil:
    """Checks for a header of this file at this place, with a plausible length: VALID, NOTHING or BROKEN.

    O(1). `available`: the readable bytes after `frame`. The frame may be longer than that.
    """
    cdef uint64_t length
    cdef uint32_t lag
    if available < FRAME_RUNS:
        return NOTHING if available == 0 else BROKEN
    length = frame_length(frame)
    if length == 0 and frame_checksum(frame) == 0:
        return NOTHING
    if load64(frame + FRAME_SEAL) != frame_seal(frame, identity, offset):
        return BROKEN
    if length < FRAME_RUNS or length > ARENA_LIMIT or length & 7 or frame_size(frame_run_count(frame), 0) > length:
        return BROKEN
    lag = (<const uint32_t *>(frame + FRAME_LAG))[0]
    if lag != NO_WATERMARK and (<uint64_t>lag << 3) > offset - LOG_HEADER_SIZE:
        return BROKEN
    return VALID


cdef int look_at_frame(
    const uint8_t *frame, uint64_t available, uint64_t identity, uint64_t offset, uint64_t previous
) noexcept nogil:
    """Checks the frame at `frame`, `available` bytes before the end of the file: VALID, NOTHING or BROKEN. O(length).

    `previous`: the checksum of the previous frame, or of the file's header.
    """
    cdef int finding = look_at_header(frame, available, identity, offset)
    cdef uint64_t length
    if finding != VALID:
        return finding
    length = frame_length(frame)
    if length > available:
        return BROKEN
    if xxh64(frame + FRAME_RUNS, length - FRAME_RUNS, load64(frame + FRAME_SEAL) ^ previous) != frame_checksum(frame):
        return BROKEN
    return VALID


cdef int look_inside_frame(const uint8_t *frame, Progress *progress) noexcept nogil:
    """Checks that a frame's runs and records are well-formed and continue what came before: VALID or MALFORMED.

    Advances `progress` past the frame. Later walks over the frame need no checks.
    """
    cdef uint32_t run_count = frame_run_count(frame)
    cdef const uint64_t *run = <const uint64_t *>(frame + FRAME_RUNS)
    cdef const uint8_t *record = frame + frame_size(run_count, 0)
    cdef uint64_t left = frame_length(frame) - frame_size(run_count, 0)
    cdef uint64_t before = progress.last_index + 1
    cdef uint64_t length
    cdef uint32_t i
    for i in range(run_count):
        if run[0] <= progress.last_index or run[0] > LARGEST:
            return MALFORMED
        progress.last_index = run[0]
        if run[1] != UNKNOWN_TERM:
            if run[1] < progress.last_term:
                return MALFORMED
            progress.last_term = run[1]
        elif i + 1 == run_count:
            return MALFORMED  # a gap must be between two runs
        run += 2
    run = <const uint64_t *>(frame + FRAME_RUNS)
    while left:
        if left < RECORD_KEY:
            return MALFORMED
        length = record_length(record)
        if length > left or look_at_record(record, length) != VALID:
            return MALFORMED
        if is_of_entry(record_operation(record)):
            # Records are in the order of their entries, each of which must be in a run that is not a gap.
            if not (before <= record_index(record) <= progress.last_index):
                return MALFORMED
            before = record_index(record)
            while run[0] < before:  # ends, since the last run reaches last_index
                run += 2
            if run[1] == UNKNOWN_TERM:
                return MALFORMED
        elif record_operation(record) == RECORD_SNAPSHOT:
            progress.snapshot = record
        record += length
        left -= length
    return VALID


cdef int look_at_record(const uint8_t *record, uint64_t length) noexcept nogil:
    """Checks the record at `record`, whose size by its head is `length`: VALID or MALFORMED."""
    cdef uint64_t key_size = record_key_size(record)
    cdef uint64_t value_size = record_value_size(record)
    cdef uint64_t padding, end
    cdef int operation = record_operation(record)
    if not (RECORD_PUT <= operation <= RECORD_CLOCK):
        return MALFORMED
    end = record_size(key_size, value_size)
    padding = end - RECORD_KEY - key_size - value_size
    if record[RECORD_TIMED]:
        if record[RECORD_TIMED] > 1 or (operation != RECORD_PUT and operation != RECORD_TOUCH):
            return MALFORMED
        if load64(record + end) > LATEST_DEADLINE:
            return MALFORMED
    if value_size > LARGEST_VALUE or (key_size and RECORD_CONFIG <= operation <= RECORD_CLOSE):
        return MALFORMED
    if value_size and (operation == RECORD_DELETE or operation == RECORD_CLOSE):
        return MALFORMED
    if operation == RECORD_SNAPSHOT and value_size < 8:
        return MALFORMED
    if operation == RECORD_TOUCH and value_size:
        return MALFORMED
    if operation == RECORD_CLOCK and (
        key_size or value_size != CLOCK_SIZE or not 0 < load64(record_key(record)) <= LATEST_DEADLINE
    ):
        return MALFORMED
    if is_of_session(operation) and key_size != SESSION_ID_SIZE:
        return MALFORMED
    if operation == RECORD_FORGET and value_size:
        return MALFORMED
    if operation == RECORD_SESSION and not is_session(record_key(record) + SESSION_ID_SIZE, value_size):
        return MALFORMED
    # Padding must be zero, or equal states could differ in bytes. Little-endian: it is at the top of the word.
    if padding and (<const uint64_t *>(record + end - 8))[0] >> (64 - 8 * padding):
        return MALFORMED
    return VALID


cdef bint is_session(const uint8_t *value, uint64_t size) noexcept nogil:
    """Returns whether this is a valid value of a session's record: sequence, deadline, result (if sequence > 0)."""
    cdef uint64_t sequence
    cdef uint64_t deadline
    cdef uint64_t left
    if size < SESSION_RESULT or size > SESSION_RESULT + 1 + <uint64_t>RESULT_LIMIT:
        return False
    memcpy(&sequence, value, 8)
    memcpy(&deadline, value + 8, 8)
    if deadline > LATEST_DEADLINE and deadline != NO_DEADLINE:
        return False
    if sequence == 0:
        return size == SESSION_RESULT
    if size == SESSION_RESULT or value[SESSION_RESULT] >= RESULT_REFUSED + REFUSALS:
        return False
    left = size - SESSION_RESULT - 1
    if value[SESSION_RESULT] < RESULT_ANSWER:
        return left == 0
    return take_value(value + SESSION_RESULT + 1, &left, 0) and left == 0


cdef bint take_value(const uint8_t *value, uint64_t *left, int depth) noexcept nogil:
    """Returns whether a complete value of an answer is at `value`, and subtracts its size from `left`."""
    cdef uint64_t start = left[0]
    cdef uint32_t count
    if start == 0 or value[0] > VALUE_LIST:
        return False
    if value[0] < VALUE_INTEGER:
        left[0] -= 1
        return True
    if value[0] == VALUE_INTEGER:
        if start < 9:
            return False
        left[0] -= 9
        return True
    if start < 5:
        return False
    memcpy(&count, value + 1, 4)
    left[0] -= 5
    if value[0] == VALUE_BYTES:
        if count > left[0]:
            return False
        left[0] -= count
        return True
    if depth == VALUE_DEPTH or count > left[0]:
        return False
    while count:
        if not take_value(value + (start - left[0]), left, depth + 1):
            return False
        count -= 1
    return True


def is_session_value(bytes value):
    """Returns whether these bytes are a valid value of a session's record, for readers in Python."""
    return bool(is_session(<const uint8_t *><const char *>value, len(value)))
