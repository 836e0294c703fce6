from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from libc.string cimport memcpy

from fastsm.disk.hashing cimport load64, xxh64_of_two

# ---- offsets: each is derived from the previous one; tests/disk/test_format.py recomputes them -------------

cdef enum:  # LogHeader
    LOG_MAGIC = 0
    LOG_VERSION = LOG_MAGIC + 8
    LOG_RESERVED = LOG_VERSION + 4
    LOG_GENERATION = LOG_RESERVED + 4
    LOG_IDENTITY = LOG_GENERATION + 8
    LOG_BASE_INDEX = LOG_IDENTITY + 8
    LOG_BASE_TERM = LOG_BASE_INDEX + 8
    LOG_BASE_SIZE = LOG_BASE_TERM + 8
    LOG_BASE_CHECKSUM = LOG_BASE_SIZE + 8
    LOG_CHECKSUM = LOG_BASE_CHECKSUM + 32
    LOG_HEADER_SIZE = LOG_CHECKSUM + 8

cdef enum:  # Current
    CURRENT_MAGIC = 0
    CURRENT_VERSION = CURRENT_MAGIC + 8
    CURRENT_RESERVED = CURRENT_VERSION + 4
    CURRENT_GENERATION = CURRENT_RESERVED + 4
    CURRENT_IDENTITY = CURRENT_GENERATION + 8
    CURRENT_DURABLE = CURRENT_IDENTITY + 8
    CURRENT_LAST_FRAME = CURRENT_DURABLE + 8
    CURRENT_LAST_CHECKSUM = CURRENT_LAST_FRAME + 8
    CURRENT_CHECKSUM = CURRENT_LAST_CHECKSUM + 8
    CURRENT_SIZE = CURRENT_CHECKSUM + 8

cdef enum:  # Frame
    FRAME_CHECKSUM = 0
    FRAME_LENGTH = FRAME_CHECKSUM + 8
    FRAME_LAG = FRAME_LENGTH + 8
    FRAME_RUN_COUNT = FRAME_LAG + 4
    FRAME_SEAL = FRAME_RUN_COUNT + 4
    FRAME_RUNS = FRAME_SEAL + 8
    RUN_SIZE = 16

cdef enum:  # Record
    RECORD_INDEX = 0
    RECORD_VALUE_SIZE = RECORD_INDEX + 8
    RECORD_KEY_SIZE = RECORD_VALUE_SIZE + 4
    RECORD_OPERATION = RECORD_KEY_SIZE + 2
    RECORD_TIMED = RECORD_OPERATION + 1          # 1: the record ends with a deadline
    RECORD_KEY = RECORD_TIMED + 1

cdef enum:  # SnapshotHeader
    SNAPSHOT_MAGIC = 0
    SNAPSHOT_VERSION = SNAPSHOT_MAGIC + 8
    SNAPSHOT_CODEC = SNAPSHOT_VERSION + 4
    SNAPSHOT_INDEX = SNAPSHOT_CODEC + 4          # the state checksum covers everything from here to itself
    SNAPSHOT_TERM = SNAPSHOT_INDEX + 8
    SNAPSHOT_KEYS = SNAPSHOT_TERM + 8
    SNAPSHOT_RUNS = SNAPSHOT_KEYS + 8
    SNAPSHOT_MEMBERSHIP_SIZE = SNAPSHOT_RUNS + 8
    SNAPSHOT_RECORDS_SIZE = SNAPSHOT_MEMBERSHIP_SIZE + 8
    SNAPSHOT_SESSIONS = SNAPSHOT_RECORDS_SIZE + 8
    SNAPSHOT_CLOCK = SNAPSHOT_SESSIONS + 8
    SNAPSHOT_STATE_CHECKSUM = SNAPSHOT_CLOCK + 8
    SNAPSHOT_ATTACHMENT_SIZE = SNAPSHOT_STATE_CHECKSUM + 32
    SNAPSHOT_STORED_SIZE = SNAPSHOT_ATTACHMENT_SIZE + 8
    SNAPSHOT_CHECKSUM = SNAPSHOT_STORED_SIZE + 8  # covers all other bytes of the file
    SNAPSHOT_HEADER_SIZE = SNAPSHOT_CHECKSUM + 32
    TERM_RUN_SIZE = 24

cdef enum:  # RecordOperation
    RECORD_PUT = 1
    RECORD_DELETE = 2
    RECORD_CONFIG = 3
    RECORD_SNAPSHOT = 4
    RECORD_CLOSE = 5
    RECORD_SESSION = 6
    RECORD_FORGET = 7
    RECORD_TOUCH = 8
    RECORD_CLOCK = 9

cdef enum:
    SESSION_ID_SIZE = 8     # the key of a session's records
    SESSION_DEADLINE = 8    # its offset in the value, after the sequence
    SESSION_RESULT = 16     # the same, after the deadline
    DEADLINE_SIZE = 8       # at the end of a record
    CLOCK_SIZE = 8          # the value of a record of the clock

cdef uint64_t NO_DEADLINE
cdef uint64_t LATEST_DEADLINE

cdef enum:
    LARGE = 64 << 10    # bytes above which work is done without the GIL

# ---- results of checking bytes -----------------------------------------------------------------------

cdef enum:  # Finding
    VALID = 0
    NOTHING = 1       # length and checksum are zero: no frame was written here
    BROKEN = 2        # not a header of this log for this offset, a frame that is cut short, or a wrong checksum
    MALFORMED = 3     # the checksum matches, but the content is malformed: no crash produces this

cdef inline uint64_t align8(uint64_t size) noexcept nogil:
    return (size + 7) & ~<uint64_t>7

cdef inline uint64_t record_size(uint64_t key_size, uint64_t value_size) noexcept nogil:
    return align8(RECORD_KEY + key_size + value_size)

cdef inline const uint8_t *record_key(const uint8_t *record) noexcept nogil:
    return record + RECORD_KEY

cdef inline uint64_t record_index(const uint8_t *record) noexcept nogil:
    return (<const uint64_t *>record)[0]

cdef inline uint32_t record_value_size(const uint8_t *record) noexcept nogil:
    return (<const uint32_t *>(record + RECORD_VALUE_SIZE))[0]

cdef inline uint16_t record_key_size(const uint8_t *record) noexcept nogil:
    return (<const uint16_t *>(record + RECORD_KEY_SIZE))[0]

cdef inline uint8_t record_operation(const uint8_t *record) noexcept nogil:
    return record[RECORD_OPERATION]

cdef inline bint is_of_entry(int operation) noexcept nogil:
    """Returns whether a record was written by an entry; other records are hard state."""
    return operation <= RECORD_CONFIG or operation >= RECORD_SESSION

cdef inline bint may_be_live(int operation) noexcept nogil:
    """Returns whether a record belongs to the state unless a later one of its key, or session, follows."""
    return operation == RECORD_PUT or operation == RECORD_SESSION or operation == RECORD_TOUCH

cdef inline bint is_of_session(int operation) noexcept nogil:
    """Returns whether a record's key is the id of a session."""
    return operation == RECORD_SESSION or operation == RECORD_FORGET

cdef inline bint is_change(int operation) noexcept nogil:
    """Returns whether a record set or removed a key, which watches report."""
    return operation == RECORD_PUT or operation == RECORD_DELETE

cdef inline uint64_t record_length(const uint8_t *record) noexcept nogil:
    return record_size(record_key_size(record), record_value_size(record)) + (<uint64_t>record[RECORD_TIMED] << 3)

cdef inline uint64_t record_deadline(const uint8_t *record) noexcept nogil:
    """Returns the deadline that a put or a touch gives its key; NO_DEADLINE: none."""
    return load64(record + record_length(record) - DEADLINE_SIZE) if record[RECORD_TIMED] else NO_DEADLINE

cdef inline uint64_t session_deadline(const uint8_t *record) noexcept nogil:
    """Returns the deadline in a session's record; NO_DEADLINE: none."""
    return load64(record + RECORD_KEY + SESSION_ID_SIZE + SESSION_DEADLINE)

cdef inline uint8_t *write_deadline(uint8_t *record, uint8_t *p, uint64_t deadline) noexcept nogil:
    """Adds a deadline to a record just written, which ends at `p`; returns where the next record starts."""
    record[RECORD_TIMED] = 1
    memcpy(p, &deadline, DEADLINE_SIZE)
    return p + DEADLINE_SIZE

cdef inline uint64_t frame_size(uint64_t run_count, uint64_t record_bytes) noexcept nogil:
    return FRAME_RUNS + run_count * RUN_SIZE + record_bytes

cdef inline uint64_t frame_checksum(const uint8_t *frame) noexcept nogil:
    return (<const uint64_t *>frame)[0]

cdef inline uint64_t frame_length(const uint8_t *frame) noexcept nogil:
    return (<const uint64_t *>(frame + FRAME_LENGTH))[0]

cdef inline uint32_t frame_run_count(const uint8_t *frame) noexcept nogil:
    return (<const uint32_t *>(frame + FRAME_RUN_COUNT))[0]

cdef inline uint64_t frame_seal(const uint8_t *frame, uint64_t identity, uint64_t offset) noexcept nogil:
    """Returns the seal of a header with its lengths and counts, for the file's identity and an offset."""
    return xxh64_of_two(load64(frame + FRAME_LENGTH), load64(frame + FRAME_LAG), identity ^ offset)

cdef uint8_t *write_record(
    uint8_t *p, uint8_t operation, uint64_t index,
    const uint8_t *key, uint16_t key_size, const uint8_t *value, uint32_t value_size,
) noexcept nogil

cdef uint8_t *write_record_head(
    uint8_t *p, uint8_t operation, uint64_t index, const uint8_t *key, uint16_t key_size, uint32_t value_size,
) noexcept nogil

cdef uint64_t seal_frame(
    uint8_t *frame, uint64_t length, uint32_t run_count,
    uint64_t identity, uint64_t offset, uint64_t watermark, uint64_t previous,
) noexcept nogil

cdef uint64_t fill_header(
    uint8_t *frame, uint64_t length, uint32_t run_count, uint64_t identity, uint64_t offset, uint64_t watermark
) noexcept nogil

cdef int look_at_header(
    const uint8_t *frame, uint64_t available, uint64_t identity, uint64_t offset
) noexcept nogil

cdef int look_at_frame(
    const uint8_t *frame, uint64_t available, uint64_t identity, uint64_t offset, uint64_t previous
) noexcept nogil

ctypedef struct Progress:
    # What a walk over frames has seen so far.
    uint64_t last_index
    uint64_t last_term
    const uint8_t *snapshot      # the newest record of snapshot metadata, or NULL

cdef int look_inside_frame(const uint8_t *frame, Progress *progress) noexcept nogil

cdef int look_at_record(const uint8_t *record, uint64_t length) noexcept nogil

cdef enum: NO_WATERMARK = 0xFFFFFFFF

cdef inline uint64_t frame_watermark(const uint8_t *frame, uint64_t offset) noexcept nogil:
    """Returns the offset below which the log was known durable when the frame was written; 0: not recorded."""
    cdef uint32_t lag = (<const uint32_t *>(frame + FRAME_LAG))[0]
    return 0 if lag == NO_WATERMARK else offset - (<uint64_t>lag << 3)

cdef uint64_t UNKNOWN_TERM
cdef uint64_t ARENA_LIMIT     # the maximum of base and log together: a place fits into a slot of the table
