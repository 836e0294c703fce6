from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    # What a command does: byte 1 of its encoding. Numbers never change.
    PUT = 1
    DELETE = 2
    COMPARE_AND_SWAP = 3
    NOOP = 4
    CONFIG = 5
    BATCH = 6              # kinds below it write keys, or nothing; chunks of only these answer True or False
    ADD = 7
    READ = 8
    DELETE_RANGE = 9
    TRANSACTION = 10
    CALL = 11
    OPEN_SESSION = 12
    ONCE = 13
    FORGET = 14
    # A put and a compare-and-swap with a deadline; decoding turns them into those kinds, with `timed`
    PUT_UNTIL = 15
    SWAP_UNTIL = 16
    TOUCH = 17
    TICK = 18
    LAST_KIND = TICK       # the last kind that this release supports
    VALUE_IS = 128         # from here on: conditions of a transaction
    EXISTS = 129
    MODIFIED_AT = 130

cdef enum:  # the structure of a command's operations
    SINGLE = 0
    BATCHED = 1
    TRANSACTED = 2

# No value: `expected=None` or `value=None` of a compare-and-swap, an unbounded end of a range, an absent value.
cdef enum: ABSENT = 0xFFFFFFFF

cdef enum:
    VERSION = 0
    HEADER_SIZE = 8

cdef size_t KEY_LIMIT
cdef size_t VALUE_LIMIT
cdef size_t COMMAND_LIMIT
cdef uint64_t NO_DEADLINE     # stands for "no deadline"

ctypedef struct Operation:
    # One decoded operation. The pointers point into the command's own bytes. Any numbers of the kind (see `number_at`)
    # are right before its key.
    const uint8_t *key
    const uint8_t *value
    const uint8_t *expected
    uint32_t value_size      # ABSENT: remove the key
    uint32_t expected_size   # ABSENT: the key must be absent
    uint16_t key_size
    uint8_t kind
    uint8_t timed            # a deadline is right before the key

ctypedef struct Reader:
    # A command being decoded.
    # Invariant: offset <= size, and `left` operations start at `offset`.
    const uint8_t *data
    size_t size
    size_t offset
    uint32_t left
    uint32_t conditions      # of a transaction: how many of these operations are conditions
    uint32_t first_branch    # how many operations after these run if all conditions hold; the rest run if not
    const uint8_t *once      # session, sequence, deadline; NULL if the command is not inside a `once`
    uint8_t form

cdef inline bint is_put(const uint8_t *data, size_t size, Operation *operation) noexcept nogil:
    """Decodes a command if it is a put, with or without a deadline, that is complete and within the limits.

    Returns whether it is one; most commands are. All others, and all errors, are left to `open_command`.
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
    """Returns an 8-byte integer at any alignment."""
    cdef uint64_t number
    memcpy(&number, place, 8)
    return number

cdef inline uint8_t *write_header(uint8_t *p, uint8_t kind, uint16_t key_size, uint32_t size) noexcept:
    p[0] = VERSION
    p[1] = kind
    memcpy(p + 2, &key_size, 2)
    memcpy(p + 4, &size, 4)
    return p + HEADER_SIZE


# Both return an error code: 0 for success; `command_error` turns others into exceptions.
cdef int open_command(Reader *reader, const uint8_t *data, size_t size) noexcept nogil
cdef int next_operation(Reader *reader, Operation *operation) noexcept nogil
cdef object command_error(int code, const Reader *reader, object index)
cdef str call_name(const Operation *operation)
cdef uint32_t call_version(const Operation *operation) noexcept nogil
