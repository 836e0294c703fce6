"""The disk formats: every offset and limit; frames and records, which are written, sealed and checked here.

Pictures are in docs/format.md. In short, with little-endian integers and 8-byte aligned records:

    CURRENT   which generation is in use, and how far its log is known durable
    log       header | frame | frame | … | zeros (preallocated)
    frame     checksum | length | watermark lag | run count | seal | runs | records
    run       last index | term
    record    index | value size | key size | operation | timed | key | value | padding | deadline, if timed
    snapshot  header | attachment | membership record | runs (first, last, term) | records
    table     header | runs | snapshot metadata | dead map | directories | deadlines | segments (page-aligned) | order

A frame is bound to its place and to everything before it. The seal is a checksum of the header alone, seeded with the
log's identity and the frame's offset, so the header alone shows whether bytes are a header of this log at this place,
whatever values contain. The checksum of the rest is seeded with the seal and with the previous frame's checksum (for
the first frame, that of the log's header): so a frame of another file, of another place, or of another history of the
same file does not match, and the last frame's checksum covers the whole file.

The headers of files are read and written in `headers`.
"""

import struct

from libc.string cimport memcpy, memset

from fastsm.disk.hashing cimport xxh64

TERM_RUN_BYTES = TERM_RUN_SIZE
LARGE_BYTES = LARGE

# A run of this term is a gap: indexes that were never seen, between two runs of different terms or before the first.
UNKNOWN_TERM = <uint64_t>0xFFFFFFFFFFFFFFFF
cdef uint64_t LARGEST = UNKNOWN_TERM - 1
ARENA_LIMIT = <uint64_t>1 << 39
cdef uint64_t LARGEST_VALUE = 0x7FFFFFFF
MAX_INDEX = LARGEST

cdef enum:  # a session's record of its last command's result
    RESULT_LIMIT = 1 << 20   # bytes of its value, without its head
    VALUE_HEAD = 5
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


# ---- for readers in Python ----------------------------------------------------------------------------

# The parts of a state. A run: first index, last index, term. The head of a record: index, size
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
MAX_SESSION_VALUE = SESSION_RESULT + 1 + VALUE_HEAD + RESULT_LIMIT
MAX_RECORD_VALUE = LARGEST_VALUE


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


# ---- frames and records -------------------------------------------------------------------------------

cdef uint8_t *write_record(
    uint8_t *p, uint8_t operation, uint64_t index,
    const uint8_t *key, uint16_t key_size, const uint8_t *value, uint32_t value_size,
) noexcept nogil:
    """Writes a record and its padding; returns where the next one starts. Pointers must not be NULL, even if empty."""
    cdef uint64_t size = record_size(key_size, value_size)
    memset(p + size - 8, 0, 8)
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
    memcpy(p, &index, 8)  # unaligned if the value before it is written from where it is
    memcpy(p + RECORD_VALUE_SIZE, &value_size, 4)
    memcpy(p + RECORD_KEY_SIZE, &key_size, 2)
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


cdef uint64_t fill_header(
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
            return MALFORMED  # a gap must be followed by a run
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
    if size < SESSION_RESULT or size > SESSION_RESULT + 1 + VALUE_HEAD + <uint64_t>RESULT_LIMIT:
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
