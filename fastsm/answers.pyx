"""The answers of entries: making and checking them, and the bytes in which a session remembers them.

docs/format.md has the layout of these bytes.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fastsm.named cimport named, set_field, tracked

from fastsm.disk.format import MAX_RESULT_BYTES
from fastsm.types import Answer

cdef enum:
    HEAD = 5          # kind and count, ahead of the bytes of a value, or of the members of a list

# Without the head of the value itself, so that a value of exactly this many bytes is an answer.
MAX_ANSWER_SIZE = 64 << 20
MAX_ANSWER_DEPTH = 8
REASONS = ("mismatch", "not a number", "overflow", "abort", "failed", "too large", "stale", "no session")

cdef type ANSWER = Answer
cdef uint64_t SIZE_LIMIT = MAX_ANSWER_SIZE + HEAD
cdef int DEPTH_LIMIT = MAX_ANSWER_DEPTH
cdef uint64_t RESULT_LIMIT = MAX_RESULT_BYTES + HEAD

cdef enum:            # the first byte of a result
    FALSE = 0
    TRUE = 1
    OK = 2
    REFUSED = 3       # this and higher values: one for each reason

cdef enum:            # the first byte of a value; 0 to 2: None, False, True
    INTEGER = 3
    BYTES = 4
    LIST = 5

cdef enum:
    NUMBER = 9        # kind and integer


cdef object answer(object ok, object value, object reason):
    """Returns an `Answer`, made ten times as fast as by Python code. Only lists need garbage collection."""
    cdef object made = tracked(ANSWER, 3) if type(value) is list else named(ANSWER, 3)
    set_field(made, 0, ok)
    set_field(made, 1, value)
    set_field(made, 2, reason)
    return made


# ---- values of answers ----------------------------------------------------------------------------------

class BadAnswerError(ValueError):
    """A value that no answer can have; `too_large` if only its size is wrong."""

    def __init__(self, message, *, too_large=False):
        self.too_large = too_large
        super().__init__(message)


def checked_value(value):
    """Returns a checked copy of a value for an answer; its lists are copies too. Raises `BadAnswerError`.

    Allows None, bools, 64-bit ints, bytes, and lists of these, of exactly these types: others could behave in any way.
    """
    cdef uint64_t size = 0
    copied = copy_value(value, 0, SIZE_LIMIT, &size)
    if size > SIZE_LIMIT:
        raise BadAnswerError(f"an answer of {size - HEAD} bytes: the limit is {MAX_ANSWER_SIZE}", too_large=True)
    return copied


def checked_values(values):
    """Returns checked copies of a list's members. `BadAnswerError` at the first that makes the list too large."""
    cdef uint64_t room = SIZE_LIMIT - HEAD
    cdef uint64_t size
    cdef list members = []
    for each in values:
        size = 0
        members.append(copy_value(each, 1, room, &size))
        if size > room:
            raise too_large()
        room -= size
    return members


cdef object too_large():
    return BadAnswerError(f"an answer of more than the limit of {MAX_ANSWER_SIZE} bytes", too_large=True)


cdef object copy_value(object value, int depth, uint64_t room, uint64_t *size):
    """Returns a copy of a value, and adds its size to `size`, in bytes. Raises in a list once `size` exceeds `room`."""
    cdef list members
    cdef Py_ssize_t i = 0
    kind = type(value)
    if value is None or kind is bool:
        size[0] += 1
        return value
    if kind is int:
        if not -(1 << 63) <= value < 1 << 63:
            raise BadAnswerError(
                f"expected an int from -2**63 to 2**63 - 1 in an answer, found one of {value.bit_length()} bits")
        size[0] += NUMBER
        return value
    if kind is bytes:
        size[0] += HEAD + <uint64_t>PyBytes_GET_SIZE(value)
        return value
    if kind is not list:
        raise BadAnswerError(f"expected None, a bool, an int, bytes or a list of these, found {kind.__name__}")
    if depth == DEPTH_LIMIT:
        raise BadAnswerError(f"expected lists at most {MAX_ANSWER_DEPTH} deep in an answer, found deeper ones")
    members = []
    size[0] += HEAD
    while i < PyList_GET_SIZE(value):  # the length as it is now: another thread may change the list
        members.append(copy_value((<list>value)[i], depth + 1, room, size))
        if size[0] > room:
            raise too_large()
        i += 1
    return members


# ---- results in sessions -----------------------------------------------------------------------------------

def pack_session(uint64_t sequence, uint64_t deadline, bytes result):
    """Returns the value of a session's record."""
    cdef bytes made = PyBytes_FromStringAndSize(NULL, 16 + PyBytes_GET_SIZE(result))
    cdef uint8_t *p = <uint8_t *>PyBytes_AS_STRING(made)
    memcpy(p, &sequence, 8)
    memcpy(p + 8, &deadline, 8)
    memcpy(p + 16, PyBytes_AS_STRING(result), PyBytes_GET_SIZE(result))
    return made


cpdef pack_result(result):
    """Returns the result of an entry as bytes; None if its value takes more than 1 MiB."""
    cdef uint64_t size
    cdef bytes packed
    cdef uint8_t *p
    if result is True or result is False:
        return b"\x01" if result is True else b"\x00"
    _, value, reason = result
    # From here on no other code runs, so the value does not change between measuring and writing.
    size = 1 + packed_size(value)
    if size > 1 + RESULT_LIMIT:
        return None
    packed = PyBytes_FromStringAndSize(NULL, size)
    p = <uint8_t *>PyBytes_AS_STRING(packed)
    p[0] = OK if reason is None else REFUSED + <uint8_t>REASONS.index(reason)
    pack_value(value, p + 1)
    return packed


cdef uint64_t packed_size(object value) except 0:
    cdef uint64_t size = HEAD
    cdef Py_ssize_t i
    kind = type(value)
    if value is None or kind is bool:
        return 1
    if kind is int:
        return NUMBER
    if kind is bytes:
        return HEAD + <uint64_t>PyBytes_GET_SIZE(value)
    for i in range(PyList_GET_SIZE(<list?>value)):
        size += packed_size((<list>value)[i])
    return size


cdef uint8_t *pack_value(object value, uint8_t *p) except NULL:
    """Writes a value; returns where it ends."""
    cdef uint32_t count
    cdef int64_t number
    cdef Py_ssize_t i
    kind = type(value)
    if value is None or kind is bool:
        p[0] = 0 if value is None else 2 if value is True else 1
        return p + 1
    if kind is int:
        number = value
        p[0] = INTEGER
        memcpy(p + 1, &number, 8)
        return p + NUMBER
    if kind is bytes:
        count = <uint32_t>PyBytes_GET_SIZE(value)
        p[0] = BYTES
        memcpy(p + 1, &count, 4)
        memcpy(p + HEAD, PyBytes_AS_STRING(value), count)
        return p + HEAD + count
    count = <uint32_t>PyList_GET_SIZE(value)
    p[0] = LIST
    memcpy(p + 1, &count, 4)
    p += HEAD
    for i in range(count):
        p = pack_value((<list>value)[i], p)
    return p


def same_answer(one, other):
    """Returns whether two answers are equal as stored: True is not 1."""
    return one == other and packed_value(one[1]) == packed_value(other[1])


cdef bytes packed_value(object value):
    cdef bytes packed = PyBytes_FromStringAndSize(NULL, packed_size(value))
    pack_value(value, <uint8_t *>PyBytes_AS_STRING(packed))
    return packed


def unpack_result(bytes data):
    """Reverses `pack_result`. The bytes were checked when they were read from a file."""
    cdef const uint8_t *p = <const uint8_t *>PyBytes_AS_STRING(data)
    cdef uint8_t first = p[0]
    if first <= TRUE:
        return first == TRUE
    p += 1
    value = unpack_value(&p)
    return answer(True, value, None) if first == OK else answer(False, value, REASONS[first - REFUSED])


cdef object unpack_value(const uint8_t **at):
    """Returns the value at `at`, and moves `at` to the value's end."""
    cdef const uint8_t *p = at[0]
    cdef uint32_t count
    cdef int64_t number
    cdef list members
    cdef uint8_t kind = p[0]
    at[0] = p + 1
    if kind < INTEGER:
        return None if kind == 0 else kind == 2
    if kind == INTEGER:
        memcpy(&number, p + 1, 8)
        at[0] = p + NUMBER
        return number
    memcpy(&count, p + 1, 4)
    at[0] = p + HEAD
    if kind == BYTES:
        at[0] += count
        return PyBytes_FromStringAndSize(<const char *>p + HEAD, count)
    members = []
    while count:
        members.append(unpack_value(at))
        count -= 1
    return members
