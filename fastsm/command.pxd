from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    # What a command does: byte 1 of its encoding. Numbers are for ever.
    PUT = 1
    DELETE = 2
    COMPARE_AND_SWAP = 3
    NOOP = 4
    CONFIG = 5
    BATCH = 6              # the kinds below it write keys, or nothing; a chunk of them alone answers True and False
    ADD = 7
    READ = 8
    DELETE_RANGE = 9
    TRANSACTION = 10
    CALL = 11
    OPEN_SESSION = 12
    ONCE = 13
    FORGET = 14
    PUT_UNTIL = 15         # a put and a compare-and-swap with a deadline: decoded they are those, and `timed`
    SWAP_UNTIL = 16
    TOUCH = 17
    TICK = 18
    LAST_KIND = TICK       # that this release knows
    VALUE_IS = 128         # conditions of a transaction
    EXISTS = 129
    MODIFIED_AT = 130

cdef enum:  # how the operations of a command belong together
    SINGLE = 0
    BATCHED = 1
    TRANSACTED = 2

# No value: `expected=None` and `value=None` of a compare-and-swap, an open end of a range, an absent value.
cdef enum: ABSENT = 0xFFFFFFFF

cdef enum:
    VERSION = 0
    HEADER_SIZE = 8

cdef size_t KEY_LIMIT
cdef size_t VALUE_LIMIT
cdef size_t COMMAND_LIMIT
cdef uint64_t NO_DEADLINE     # for "none" where a deadline may stand

ctypedef struct Operation:
    # One decoded command. The pointers lead into the command's own bytes. Numbers that a kind has (see `number_at`)
    # stand right before its key.
    const uint8_t *key
    const uint8_t *value
    const uint8_t *expected
    uint32_t value_size      # ABSENT: remove the key
    uint32_t expected_size   # ABSENT: the key must not be there
    uint16_t key_size
    uint8_t kind
    uint8_t timed            # a deadline stands right before the key

ctypedef struct Reader:
    # A command under decoding.
    # Invariant: offset <= size, and `left` operations start at `offset`.
    const uint8_t *data
    size_t size
    size_t offset
    uint32_t left
    uint32_t conditions      # of a transaction: as many of these operations are conditions
    uint32_t first_branch    # as many after them are for when all conditions hold, the rest for when one does not
    const uint8_t *once      # session, sequence, deadline; NULL where the command is not inside a `once`
    uint8_t form

cdef inline bint is_put(const uint8_t *data, size_t size, Operation *operation) noexcept nogil:
    """Whether a command is a put, with a deadline or without, that is whole and within the limits: it is decoded then.

    Most commands are. All others, and whatever is wrong with one, is for `open_command` to find.
    """
    cdef uint64_t head, key_size, value_size
    cdef uint64_t taken = HEADER_SIZE
    if size < HEADER_SIZE:
        return False
    memcpy(&head, data, HEADER_SIZE)
    key_size, value_size = head >> 16 & 0xFFFF, head >> 32
    operation.timed = head & 0xFFFF == (VERSION | PUT_UNTIL << 8)
    if operation.timed:
        taken += 8
        if size < taken or number_at(data + HEADER_SIZE) >> 63:  # deadlines have 63 bits
            return False
    elif head & 0xFFFF != (VERSION | PUT << 8):
        return False
    if size != taken + key_size + value_size or value_size > VALUE_LIMIT or size > COMMAND_LIMIT:
        return False
    operation.kind = PUT
    operation.key_size = <uint16_t>key_size
    operation.value_size = <uint32_t>value_size
    operation.expected_size = 0
    operation.key = data + taken
    operation.value = operation.expected = operation.key + key_size
    return True

cdef inline uint64_t number_at(const uint8_t *place) noexcept nogil:
    """An integer of 8 bytes, at any alignment."""
    cdef uint64_t number
    memcpy(&number, place, 8)
    return number

cdef inline uint8_t *write_header(uint8_t *p, uint8_t kind, uint16_t key_size, uint32_t size) noexcept:
    p[0] = VERSION
    p[1] = kind
    memcpy(p + 2, &key_size, 2)
    memcpy(p + 4, &size, 4)
    return p + HEADER_SIZE


# Both give an error code: 0 for none, else what `command_error` turns into an exception.
cdef int open_command(Reader *reader, const uint8_t *data, size_t size) noexcept nogil
cdef int next_operation(Reader *reader, Operation *operation) noexcept nogil
cdef object command_error(int code, const Reader *reader, object index)
cdef str call_name(const Operation *operation)
cdef uint32_t call_version(const Operation *operation) noexcept nogil
