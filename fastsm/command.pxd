from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    # What a command does: byte 1 of its encoding. Numbers are for ever.
    PUT = 1
    DELETE = 2
    COMPARE_AND_SWAP = 3
    NOOP = 4
    CONFIG = 5
    BATCH = 6

# No value: `expected=None` and `value=None` of a compare-and-swap.
cdef enum: ABSENT = 0xFFFFFFFF

ctypedef struct Operation:
    # One decoded command. The pointers lead into the command's own bytes.
    const uint8_t *key
    const uint8_t *value
    const uint8_t *expected
    uint32_t value_size      # ABSENT: remove the key
    uint32_t expected_size   # ABSENT: the key must not be there
    uint16_t key_size
    uint8_t kind

ctypedef struct Reader:
    # A command under decoding.
    # Invariant: offset <= size, and `left` operations start at `offset`.
    const uint8_t *data
    size_t size
    size_t offset
    uint32_t left
    bint batch

# Both give an error code: 0 for none, else what `command_error` turns into an exception.
cdef int open_command(Reader *reader, const uint8_t *data, size_t size) noexcept nogil
cdef int next_operation(Reader *reader, Operation *operation) noexcept nogil
cdef object command_error(int code, const Reader *reader, object index)
