"""Commands: the bytes that a proposer makes, Raft carries, and `apply` decodes.

    offset  0        1       2          4            8
            +--------+-------+----------+------------+-----+-------+
    PUT     | version| kind=1| key size | value size | key | value |
            +--------+-------+----------+------------+-----+-------+

All integers are little-endian; docs/format.md has the other kinds. Decoding allocates no memory, and checks each size
against the remaining bytes before it uses it.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from fastsm.disk.hashing cimport load32

import operator

from fastsm.errors import CommandError, UnknownCommandError
from fastsm.types import (
    Add, Batch, Call, CompareAndSwap, Config, Delete, DeleteRange, Exists, Forget, ModifiedAt, Noop, Once, OpenSession,
    Put, Read, Tick, Touch, Transaction, ValueIs,
)

cdef enum:
    SWAP_HEADER_SIZE = 12    # COMPARE_AND_SWAP: the size of `expected` follows the header
    TICK_HEADER_SIZE = 24    # TICK: the time and the limit follow the header
    ADD_HEADER_SIZE = 24     # ADD: delta and initial value follow the header
    TRANSACTION_HEADER_SIZE = 16  # TRANSACTION: the numbers of commands in its branches follow the header
    CALL_HEADER_SIZE = 12    # CALL: the procedure's version follows the header
    ONCE_HEADER_SIZE = 32    # ONCE: session, sequence and deadline follow the header

KEY_LIMIT = 0xFFFF
VALUE_LIMIT = 0x7FFFFFFF
COMMAND_LIMIT = 0xFFFFFFFF

NO_DEADLINE = 0xFFFFFFFFFFFFFFFF
cdef uint64_t LATEST_DEADLINE = 0x7FFFFFFFFFFFFFFF

MAX_KEY_SIZE = KEY_LIMIT
MAX_VALUE_SIZE = VALUE_LIMIT
MAX_COMMAND_SIZE = COMMAND_LIMIT

cdef enum:  # error codes
    TOO_SHORT = 1
    WRONG_SIZE
    UNKNOWN_VERSION
    UNKNOWN_KIND
    RESERVED_NOT_ZERO
    VALUE_TOO_LARGE
    COMMAND_TOO_LARGE
    NESTED
    BAD_NUMBER
    BAD_NAME
    NOTHING_TO_EXPIRE


# ---- decode -----------------------------------------------------------------------------------------

cdef inline int header_fault(const uint8_t *data, size_t size) noexcept nogil:
    if size == 0:
        return TOO_SHORT
    if data[0] != VERSION:
        return UNKNOWN_VERSION
    return TOO_SHORT if size < HEADER_SIZE else 0


cdef int open_command(Reader *reader, const uint8_t *data, size_t size) noexcept nogil:
    """Checks the first header; the rest is read by calling `next_operation` `reader.left` times."""
    cdef int fault
    reader.data = data
    reader.size = size
    reader.offset = 0
    reader.left = 1
    reader.form = SINGLE
    reader.once = NULL
    if size > COMMAND_LIMIT:
        return COMMAND_TOO_LARGE
    fault = header_fault(data, size)
    if fault:
        return fault
    return open_compound(reader) if data[1] >= BATCH else 0


cdef int open_compound(Reader *reader) noexcept nogil:
    """Continues `open_command` for kinds that may contain other commands: one (`once`), or a list."""
    cdef const uint8_t *data = reader.data
    cdef size_t size = reader.size
    cdef uint64_t members
    cdef int fault
    if data[1] == ONCE:
        if size < ONCE_HEADER_SIZE:
            return TOO_SHORT
        if data[2] or data[3]:
            return RESERVED_NOT_ZERO
        reader.once = data + HEADER_SIZE
        if number_at(reader.once + 8) == 0 or not is_deadline(number_at(reader.once + 16)):
            return BAD_NUMBER
        size -= ONCE_HEADER_SIZE
        if load32(data + 4) != size:
            return TOO_SHORT if load32(data + 4) > size else WRONG_SIZE
        data += ONCE_HEADER_SIZE
        reader.offset = ONCE_HEADER_SIZE
        fault = header_fault(data, size)
        if fault:
            return fault
        if data[1] == CONFIG or OPEN_SESSION <= data[1] <= FORGET or data[1] == TICK:
            return NESTED
    if data[1] == BATCH:
        if data[2] or data[3]:
            return RESERVED_NOT_ZERO
        reader.form = BATCHED
        members = load32(data + 4)
        reader.offset += HEADER_SIZE
    elif data[1] == TRANSACTION:
        if size < TRANSACTION_HEADER_SIZE:
            return TOO_SHORT
        if data[2] or data[3]:
            return RESERVED_NOT_ZERO
        reader.form = TRANSACTED
        reader.conditions = load32(data + 4)
        reader.first_branch = load32(data + 8)
        members = <uint64_t>reader.conditions + reader.first_branch + load32(data + 12)
        reader.offset += TRANSACTION_HEADER_SIZE
    else:
        return 0
    if members > (reader.size - reader.offset) / HEADER_SIZE:
        return TOO_SHORT
    if members == 0 and reader.offset != reader.size:
        return WRONG_SIZE
    reader.left = <uint32_t>members
    return 0


cdef inline bint is_deadline(uint64_t number) noexcept nogil:
    return number <= LATEST_DEADLINE or number == NO_DEADLINE


cdef int look_at_member(Reader *reader, uint8_t kind) noexcept nogil:
    """Checks whether a command of a known kind is allowed as the next operation of a batch or a transaction."""
    if VALUE_IS <= kind <= MODIFIED_AT:
        if reader.form != TRANSACTED or reader.conditions == 0:
            return NESTED
        reader.conditions -= 1
        return 0
    if kind > LAST_KIND or kind == 0:
        return 0  # unknown; the caller reports it
    if reader.form == BATCHED:
        return 0 if in_batch(kind) else NESTED
    if reader.conditions:
        return NESTED
    return 0 if kind == PUT or kind == DELETE or ADD <= kind <= DELETE_RANGE or kind == TOUCH else NESTED


cdef inline bint in_batch(uint8_t kind) noexcept nogil:
    """Returns whether a batch may contain a kind. PUT_UNTIL and SWAP_UNTIL, also allowed, are left to the caller."""
    return kind <= NOOP or kind == ADD or kind == DELETE_RANGE or kind == TOUCH


cdef int next_operation(Reader *reader, Operation *operation) noexcept nogil:
    """Decodes the next operation. After the last one, no bytes may be left over."""
    cdef const uint8_t *data = reader.data + reader.offset
    cdef size_t size = reader.size - reader.offset
    cdef size_t value_size, expected_size
    cdef size_t taken = HEADER_SIZE
    cdef int code
    if size < HEADER_SIZE:
        return TOO_SHORT
    if data[0] != VERSION:
        return UNKNOWN_VERSION
    operation.kind = data[1]
    operation.key_size = data[2] | <uint16_t>data[3] << 8
    operation.value_size = load32(data + 4)
    operation.expected_size = 0
    operation.timed = False
    if PUT_UNTIL <= operation.kind <= SWAP_UNTIL:
        code = look_at_deadline(operation, data, size, &taken)
        if code:
            return code
    if reader.form and look_at_member(reader, operation.kind):
        return NESTED
    if operation.kind == PUT:
        if operation.value_size > VALUE_LIMIT:
            return VALUE_TOO_LARGE
    elif operation.kind == COMPARE_AND_SWAP:
        if not operation.timed:
            taken = SWAP_HEADER_SIZE
        if size < taken:
            return TOO_SHORT
        operation.expected_size = load32(data + 8)
        if operation.value_size > VALUE_LIMIT and operation.value_size != ABSENT:
            return VALUE_TOO_LARGE
        if operation.expected_size > VALUE_LIMIT and operation.expected_size != ABSENT:
            return VALUE_TOO_LARGE
        if operation.timed and operation.value_size == ABSENT:
            return NOTHING_TO_EXPIRE
    elif operation.kind == DELETE or operation.kind == NOOP:
        if operation.value_size != 0 or (operation.kind == NOOP and operation.key_size != 0):
            return RESERVED_NOT_ZERO
    elif operation.kind == CONFIG:
        if operation.key_size != 0:
            return RESERVED_NOT_ZERO
        if operation.value_size > VALUE_LIMIT:
            return VALUE_TOO_LARGE
    else:
        code = look_at_rarer(operation, data, size, &taken, reader.form == TRANSACTED)
        if code:
            return code
    value_size = 0 if operation.value_size == ABSENT else operation.value_size
    expected_size = 0 if operation.expected_size == ABSENT else operation.expected_size
    # Three sizes below 2**31 cannot overflow a size_t.
    if size - taken < operation.key_size + expected_size + value_size:
        return TOO_SHORT
    operation.key = data + taken
    operation.expected = operation.key + operation.key_size
    operation.value = operation.expected + expected_size
    reader.offset += taken + operation.key_size + expected_size + value_size
    reader.left -= 1
    if reader.left == 0 and reader.offset != reader.size:
        return WRONG_SIZE
    return 0


cdef int look_at_deadline(Operation *operation, const uint8_t *data, size_t size, size_t *taken) noexcept nogil:
    """Turns a put or a swap whose deadline is stored right before the key into the plain kind, with `timed` set."""
    if operation.kind == PUT_UNTIL:
        operation.kind = PUT
        taken[0] = HEADER_SIZE + 8
    else:
        operation.kind = COMPARE_AND_SWAP
        taken[0] = SWAP_HEADER_SIZE + 8
    operation.timed = True
    if size < taken[0]:
        return TOO_SHORT
    return 0 if number_at(data + taken[0] - 8) <= LATEST_DEADLINE else BAD_NUMBER


cdef int look_at_rarer(
    Operation *operation, const uint8_t *data, size_t size, size_t *taken, bint in_transaction
) noexcept nogil:
    """Checks the header of a command of a rarer kind, or of a condition; `taken`: the bytes before its key."""
    cdef uint8_t kind = operation.kind
    if kind == ADD:
        taken[0] = ADD_HEADER_SIZE
    elif kind == CALL:
        taken[0] = CALL_HEADER_SIZE
    elif kind == TICK:
        taken[0] = TICK_HEADER_SIZE
    elif kind == OPEN_SESSION or kind == FORGET or kind == TOUCH or (kind == MODIFIED_AT and in_transaction):
        taken[0] = HEADER_SIZE + 8
    elif kind != READ and kind != DELETE_RANGE and not (VALUE_IS <= kind <= EXISTS and in_transaction):
        return UNKNOWN_KIND
    if size < taken[0]:
        return TOO_SHORT
    if kind == CALL or kind == VALUE_IS:
        if operation.value_size > VALUE_LIMIT and not (kind == VALUE_IS and operation.value_size == ABSENT):
            return VALUE_TOO_LARGE
    elif kind == DELETE_RANGE:
        if operation.value_size > KEY_LIMIT and operation.value_size != ABSENT:
            return VALUE_TOO_LARGE
    elif operation.value_size:
        return RESERVED_NOT_ZERO
    if (kind == OPEN_SESSION or kind == FORGET or kind == TICK) and operation.key_size:
        return RESERVED_NOT_ZERO
    if (kind == OPEN_SESSION or kind == TOUCH) and not is_deadline(number_at(data + HEADER_SIZE)):
        return BAD_NUMBER
    operation.timed = kind == TOUCH and number_at(data + HEADER_SIZE) != NO_DEADLINE
    if kind == TICK and not (
        number_at(data + HEADER_SIZE) <= LATEST_DEADLINE and is_deadline(number_at(data + HEADER_SIZE + 8))
    ):
        return BAD_NUMBER
    return 0


cdef str call_name(const Operation *operation):
    """Returns the name of the procedure that a CALL runs; None if it is not UTF-8."""
    cdef bytes name = operation.key[:operation.key_size]
    try:
        return name.decode()
    except UnicodeDecodeError:
        return None


cdef uint32_t call_version(const Operation *operation) noexcept nogil:
    return load32(operation.key - 4)


cdef object command_error(int code, const Reader *reader, object index):
    """Returns the exception for an error code; `index` is the entry's, or None."""
    cdef size_t offset = reader.offset
    cdef int version = reader.data[offset] if offset < reader.size else 0
    cdef int kind = reader.data[offset + 1] if offset + 1 < reader.size else 0
    where = f"command of {reader.size} bytes, offset {offset}"
    if index is not None:
        where = f"entry {index}: {where}"
    if code == UNKNOWN_VERSION:
        return UnknownCommandError(
            f"{where}: not made by fastsm's commands (put, delete and so on), or by those of a newer release: "
            f"version {version}, this release supports version {VERSION}; "
            "if there is a newer release, upgrade this replica before it continues", index=index)
    if code == UNKNOWN_KIND:
        return UnknownCommandError(
            f"{where}: kind {kind}, this release supports kinds {PUT} to {LAST_KIND}; "
            "upgrade this replica before it continues", index=index)
    reasons = {
        TOO_SHORT: "it ends before the sizes in its header say",
        WRONG_SIZE: "bytes are left over after its end",
        RESERVED_NOT_ZERO: "a field that this kind does not use is not zero",
        VALUE_TOO_LARGE: f"a value is larger than {VALUE_LIMIT} bytes",
        COMMAND_TOO_LARGE: f"it is larger than {COMMAND_LIMIT} bytes",
        NESTED: "it contains a command of a kind that is not allowed there",
        BAD_NUMBER: "a sequence is below 1, or a deadline, a time or a limit beyond 2**63 - 1",
        BAD_NAME: "the name of a procedure is not UTF-8",
        NOTHING_TO_EXPIRE: "a compare-and-swap that removes the key has a deadline",
    }
    return CommandError(
        f"{where}: {reasons[code]}; make commands with fastsm.put and similar functions", index=index)


cdef object describe(const Operation *operation):
    cdef bytes key = operation.key[:operation.key_size]
    if operation.kind == PUT:
        return Put(key, operation.value[:operation.value_size], deadline_of(operation))
    if operation.kind == DELETE:
        return Delete(key)
    if operation.kind == NOOP:
        return Noop()
    if operation.kind == CONFIG:
        return Config(operation.value[:operation.value_size])
    if operation.kind == COMPARE_AND_SWAP:
        return CompareAndSwap(
            key, optional(operation.expected, operation.expected_size), optional(operation.value, operation.value_size),
            deadline_of(operation))
    return describe_rarer(operation, key)


cdef object describe_rarer(const Operation *operation, bytes key):
    cdef const uint8_t *numbers = operation.key
    cdef uint8_t kind = operation.kind
    if kind == ADD:
        return Add(key, <int64_t>number_at(numbers - 16), <int64_t>number_at(numbers - 8))
    if kind == READ:
        return Read(key)
    if kind == DELETE_RANGE:
        return DeleteRange(key, optional(operation.value, operation.value_size))
    if kind == CALL:
        return Call(call_name(operation), operation.value[:operation.value_size], call_version(operation))
    if kind == OPEN_SESSION:
        return OpenSession(deadline_or_none(number_at(numbers - 8)))
    if kind == FORGET:
        return Forget(number_at(numbers - 8))
    if kind == TOUCH:
        return Touch(key, deadline_of(operation))
    if kind == TICK:
        return Tick(number_at(numbers - 16), deadline_or_none(number_at(numbers - 8)))
    if kind == VALUE_IS:
        return ValueIs(key, optional(operation.value, operation.value_size))
    return Exists(key) if kind == EXISTS else ModifiedAt(key, number_at(numbers - 8))


cdef object optional(const uint8_t *data, uint32_t size):
    return None if size == ABSENT else data[:size]


cdef object deadline_of(const Operation *operation):
    return number_at(operation.key - 8) if operation.timed else None


cdef object deadline_or_none(uint64_t number):
    return None if number == NO_DEADLINE else number


cdef object walk(object command, bint describing):
    cdef Reader reader
    cdef Operation operation
    cdef int code
    cdef bytes data = command if type(command) is bytes else bytes(memoryview(command))
    cdef list found = []
    cdef size_t conditions = 0
    code = open_command(&reader, <const uint8_t *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
    if code == 0 and reader.form == TRANSACTED:
        conditions = reader.conditions
    while code == 0 and reader.left:
        code = next_operation(&reader, &operation)
        if code == 0 and operation.kind == CALL and call_name(&operation) is None:
            code = BAD_NAME
        if code == 0 and describing:
            found.append(describe(&operation))
    if code:
        raise command_error(code, &reader, None)
    if not describing:
        return None
    return described(&reader, found, conditions)


cdef object described(const Reader *reader, list found, size_t conditions):
    """Returns the operations of a command as the object that combines them."""
    cdef size_t stop
    whole = None
    if reader.form == BATCHED:
        whole = Batch(tuple(found))
    elif reader.form == TRANSACTED:
        stop = conditions + reader.first_branch
        whole = Transaction(tuple(found[:conditions]), tuple(found[conditions:stop]), tuple(found[stop:]))
    else:
        whole = found[0]
    if reader.once != NULL:
        return Once(
            number_at(reader.once), number_at(reader.once + 8), whole, deadline_or_none(number_at(reader.once + 16)))
    return whole


def decode(command):
    """Returns the content of a command as a small printable object (`Put`, `Delete`, …, `Batch`). O(size).

    Raises `CommandError` or `UnknownCommandError`, exactly when `apply` would, except that only `apply` raises for a
    procedure that the machine was not given.

    >>> decode(put(b"color", b"blue"))
    Put(key=b'color', value=b'blue')
    """
    return walk(command, True)


def check(command):
    """Raises what `apply` would raise for this command, so a proposer can call it before proposing. O(size).

    Does not check whether a machine was given the procedure of a `call`.
    """
    walk(command, False)


# ---- encode -----------------------------------------------------------------------------------------

cdef class Field:
    """A bytes-like argument, for the duration of a call."""
    cdef Py_buffer buffer
    cdef const uint8_t *data
    cdef size_t size
    cdef bint held

    def __cinit__(self, source, str name, size_t limit):
        if type(source) is str:
            raise TypeError(f"{name} is a str: encode it first, {name}.encode()")
        PyObject_GetBuffer(source, &self.buffer, PyBUF_SIMPLE)
        self.held = True
        self.data = <const uint8_t *>self.buffer.buf
        self.size = self.buffer.len
        if self.size > limit:
            raise CommandError(f"{name} of {self.size} bytes: the limit is {limit}")

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.buffer)


cdef bytes encode(uint8_t kind, key, value, expires=None):
    """Returns a command made of a key and a value; if `expires` is given, of the kind with a deadline."""
    cdef Field key_field = Field(key, "key", KEY_LIMIT)
    cdef Field value_field = Field(value, "value", VALUE_LIMIT)
    cdef size_t extra = 0 if expires is None else 8
    cdef uint64_t deadline = deadline_number(expires)
    cdef bytes command = PyBytes_FromStringAndSize(NULL, HEADER_SIZE + extra + key_field.size + value_field.size)
    cdef uint8_t *p = <uint8_t *>PyBytes_AS_STRING(command)
    p = write_header(p, PUT_UNTIL if extra else kind, key_field.size, value_field.size)
    memcpy(p, &deadline, extra)
    p += extra
    memcpy(p, key_field.data, key_field.size)
    memcpy(p + key_field.size, value_field.data, value_field.size)
    return command


def deadline_number(expires):
    """Returns a deadline as commands and records store it: milliseconds since 1970. `CommandError` if invalid."""
    if expires is None:
        return NO_DEADLINE
    number = operator.index(expires)
    if not 0 <= number <= LATEST_DEADLINE:
        raise CommandError(f"expires {number}: expected 0 to 2**63 - 1 milliseconds since 1970")
    return number


def put(key, value, *, expires=None):
    """Returns the command that sets `key` to `value` (bytes-like objects). O(size).

    `expires`: the deadline, in milliseconds since 1970, from 0 to 2**63 - 1; a `tick` at or after it removes the key.
    Without it the key has no deadline, even if it had one before.

    Raises `CommandError` over `MAX_KEY_SIZE` or `MAX_VALUE_SIZE`, and for a deadline out of range.
    """
    cdef size_t key_size, value_size
    cdef bytes command
    cdef uint8_t *p
    if type(key) is not bytes or type(value) is not bytes or expires is not None:
        return encode(PUT, key, value, expires)
    key_size = PyBytes_GET_SIZE(key)
    value_size = PyBytes_GET_SIZE(value)
    if key_size > KEY_LIMIT or value_size > VALUE_LIMIT:
        return encode(PUT, key, value)
    command = PyBytes_FromStringAndSize(NULL, HEADER_SIZE + key_size + value_size)
    p = write_header(<uint8_t *>PyBytes_AS_STRING(command), PUT, key_size, value_size)
    memcpy(p, PyBytes_AS_STRING(key), key_size)
    memcpy(p + key_size, PyBytes_AS_STRING(value), value_size)
    return command


def delete(key):
    """Returns the command that removes `key`; removing an absent key is not an error."""
    return encode(DELETE, key, b"")


def compare_and_swap(key, expected, value, *, expires=None):
    """Returns the command that sets `key` to `value` if its value is `expected`.

    `expected=None`: the key must be absent. `value=None`: a match removes the key. `expires`: as in `put`; combined
    with `value=None` it is a `CommandError`.
    """
    if expires is not None and value is None:
        raise CommandError(f"expires {expires} with value=None: a key that is removed has no deadline")
    cdef uint64_t deadline = deadline_number(expires)
    cdef size_t extra = 0 if expires is None else 8
    cdef Field key_field = Field(key, "key", KEY_LIMIT)
    cdef Field expected_field = Field(b"" if expected is None else expected, "expected", VALUE_LIMIT)
    cdef Field value_field = Field(b"" if value is None else value, "value", VALUE_LIMIT)
    cdef size_t size = SWAP_HEADER_SIZE + extra + key_field.size + expected_field.size + value_field.size
    cdef uint32_t expected_size = ABSENT if expected is None else <uint32_t>expected_field.size
    cdef uint32_t value_size = ABSENT if value is None else <uint32_t>value_field.size
    if size > COMMAND_LIMIT:
        raise CommandError(f"command of {size} bytes: the limit is {COMMAND_LIMIT}")
    cdef bytes command = PyBytes_FromStringAndSize(NULL, size)
    cdef uint8_t *p = <uint8_t *>PyBytes_AS_STRING(command)
    p = write_header(p, SWAP_UNTIL if extra else COMPARE_AND_SWAP, key_field.size, value_size)
    memcpy(p, &expected_size, 4)
    memcpy(p + 4, &deadline, extra)
    p += 4 + extra
    memcpy(p, key_field.data, key_field.size)
    p += key_field.size
    memcpy(p, expected_field.data, expected_field.size)
    memcpy(p + expected_field.size, value_field.data, value_field.size)
    return command


def noop():
    """Returns the command that changes nothing, for example for a new leader's first entry."""
    return encode(NOOP, b"", b"")


def config(data):
    """Returns the command that records opaque cluster membership; see `FastStateMachine.membership`."""
    return encode(CONFIG, b"", data)


def batch(commands):
    """Returns the command that applies several commands in order, all or none; each sees the effects of earlier ones.

    If a compare-and-swap in it does not match, or an add is impossible, the whole batch has no effect. It may contain
    put, delete, compare_and_swap, noop, add, touch, delete_range and delete_prefix; anything else, or a malformed
    member, is a `CommandError`. If it contains an add, a touch or a range, its result is
    `Answer(True, [one value for each command])`, or `Answer(False, None, reason)`.
    """
    cdef list members = list(commands)
    cdef size_t size = HEADER_SIZE
    cdef Py_ssize_t i
    for i in range(len(members)):
        members[i] = bytes(memoryview(members[i]))
    for position, member in enumerate(members):
        try:
            walk(member, False)
        except CommandError as error:
            raise type(error)(f"member {position} of the batch: {error}") from None
        if not in_batch(member[1]) and member[1] not in (PUT_UNTIL, SWAP_UNTIL):
            raise CommandError(
                f"member {position} of the batch: expected a put, delete, compare_and_swap, noop, add, touch, "
                f"delete_range or delete_prefix, found {decode(member)}")
        size += PyBytes_GET_SIZE(member)
    if size > COMMAND_LIMIT:
        raise CommandError(f"command of {size} bytes: the limit is {COMMAND_LIMIT}")
    cdef uint8_t header[HEADER_SIZE]
    write_header(header, BATCH, 0, len(members))
    return header[:HEADER_SIZE] + b"".join(members)
