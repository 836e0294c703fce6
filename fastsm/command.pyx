"""Commands: the bytes that a proposer makes, Raft carries, and `apply` decodes.

    offset  0        1       2          4            8
            +--------+-------+----------+------------+-----+-------+
    PUT     | version| kind=1| key size | value size | key | value |
            +--------+-------+----------+------------+-----+-------+

All integers are little-endian; docs/format.md has the other kinds. Decoding takes no memory, and
trusts nothing: each size is checked against what is left before it is used.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_SIMPLE, PyBUF_STRIDES, PyBuffer_IsContiguous, PyBuffer_Release, PyBuffer_ToContiguous,
    PyObject_GetBuffer,
)
from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.ref cimport Py_INCREF, PyObject
from cpython.sequence cimport PySequence_Fast
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, strcmp

from fastsm.disk.hashing cimport load32
from fastsm.distinct cimport LastOfEqual

from fastsm.errors import CommandError, UnknownCommandError
from fastsm.types import (
    Add, Batch, Call, CompareAndSwap, Config, Delete, DeleteRange, Exists, Forget, ModifiedAt, Noop, Once, OpenSession,
    Put, Read, Transaction, ValueIs,
)

cdef extern from *:
    """
    #define fastsm_prefetch(address) __builtin_prefetch(address)
    """
    void prefetch "fastsm_prefetch"(const void *address) noexcept nogil
    PyObject **PySequence_Fast_ITEMS(object sequence)
    Py_ssize_t PySequence_Fast_GET_SIZE(object sequence)

cdef enum:
    VERSION = 0
    HEADER_SIZE = 8
    AHEAD = 16               # cells of a column whose cache misses overlap
    SWAP_HEADER_SIZE = 12    # COMPARE_AND_SWAP: the size of `expected` follows the header
    ADD_HEADER_SIZE = 24     # ADD: delta and initial value follow the header
    TRANSACTION_HEADER_SIZE = 16  # TRANSACTION: the numbers of commands in its branches follow the header
    CALL_HEADER_SIZE = 12    # CALL: the procedure's version follows the header
    ONCE_HEADER_SIZE = 32    # ONCE: session, sequence and deadline follow the header

cdef size_t KEY_LIMIT = 0xFFFF
cdef size_t VALUE_LIMIT = 0x7FFFFFFF
cdef size_t COMMAND_LIMIT = 0xFFFFFFFF

cdef uint64_t NO_DEADLINE = 0xFFFFFFFFFFFFFFFF
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


# ---- decode -----------------------------------------------------------------------------------------

cdef inline int header_fault(const uint8_t *data, size_t size) noexcept nogil:
    if size == 0:
        return TOO_SHORT
    if data[0] != VERSION:
        return UNKNOWN_VERSION
    return TOO_SHORT if size < HEADER_SIZE else 0


cdef int open_command(Reader *reader, const uint8_t *data, size_t size) noexcept nogil:
    """Looks at the first header; what follows is read by `next_operation`, `reader.left` times."""
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
    """The rest of `open_command` for kinds that may hold others. A command nests once, in `once`, and holds a list."""
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
        if data[1] == CONFIG or (OPEN_SESSION <= data[1] <= FORGET):
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
    """Whether a command of a known kind may stand where the next operation of a batch or a transaction stands."""
    if VALUE_IS <= kind <= MODIFIED_AT:
        if reader.form != TRANSACTED or reader.conditions == 0:
            return NESTED
        reader.conditions -= 1
        return 0
    if kind > LAST_KIND or kind == 0:
        return 0  # unknown: the caller says so
    if reader.form == BATCHED:
        return 0 if kind <= NOOP or kind == ADD or kind == DELETE_RANGE else NESTED
    if reader.conditions:
        return NESTED
    return 0 if kind == PUT or kind == DELETE or ADD <= kind <= DELETE_RANGE else NESTED


cdef int next_operation(Reader *reader, Operation *operation) noexcept nogil:
    """Decodes the next operation. After the last one, nothing may be left over."""
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
    if reader.form and look_at_member(reader, operation.kind):
        return NESTED
    if operation.kind == PUT:
        if operation.value_size > VALUE_LIMIT:
            return VALUE_TOO_LARGE
    elif operation.kind == COMPARE_AND_SWAP:
        if size < SWAP_HEADER_SIZE:
            return TOO_SHORT
        taken = SWAP_HEADER_SIZE
        operation.expected_size = load32(data + 8)
        if operation.value_size > VALUE_LIMIT and operation.value_size != ABSENT:
            return VALUE_TOO_LARGE
        if operation.expected_size > VALUE_LIMIT and operation.expected_size != ABSENT:
            return VALUE_TOO_LARGE
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
    # Three sizes below 2**31 cannot wrap a size_t.
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


cdef int look_at_rarer(
    Operation *operation, const uint8_t *data, size_t size, size_t *taken, bint in_transaction
) noexcept nogil:
    """Checks the header of a command that answers, or of a condition; `taken`: what stands before its key."""
    cdef uint8_t kind = operation.kind
    if kind == ADD:
        taken[0] = ADD_HEADER_SIZE
    elif kind == CALL:
        taken[0] = CALL_HEADER_SIZE
    elif kind == OPEN_SESSION or kind == FORGET or (kind == MODIFIED_AT and in_transaction):
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
    if (kind == OPEN_SESSION or kind == FORGET) and operation.key_size:
        return RESERVED_NOT_ZERO
    if kind == OPEN_SESSION and not is_deadline(number_at(data + HEADER_SIZE)):
        return BAD_NUMBER
    return 0


cdef str call_name(const Operation *operation):
    """The name of the procedure that a CALL runs; None where it is no UTF-8."""
    cdef bytes name = operation.key[:operation.key_size]
    try:
        return name.decode()
    except UnicodeDecodeError:
        return None


cdef uint32_t call_version(const Operation *operation) noexcept nogil:
    return load32(operation.key - 4)


cdef object command_error(int code, const Reader *reader, object index):
    """The exception for an error code; `index` is the entry's, or None."""
    cdef size_t offset = reader.offset
    cdef int version = reader.data[offset] if offset < reader.size else 0
    cdef int kind = reader.data[offset + 1] if offset + 1 < reader.size else 0
    where = f"command of {reader.size} bytes, offset {offset}"
    if index is not None:
        where = f"entry {index}: {where}"
    if code == UNKNOWN_VERSION:
        return UnknownCommandError(
            f"{where}: not made by fastsm's commands (put, delete and so on), or by those of a newer release: "
            f"version {version}, this release knows version {VERSION}; "
            "if there is a newer release, upgrade this replica before it goes on", index=index)
    if code == UNKNOWN_KIND:
        return UnknownCommandError(
            f"{where}: kind {kind}, this release knows kinds {PUT} to {LAST_KIND}; "
            "upgrade this replica before it goes on", index=index)
    reasons = {
        TOO_SHORT: "it ends before the sizes in its header say",
        WRONG_SIZE: "bytes are left over behind its end",
        RESERVED_NOT_ZERO: "a field that this kind does not use is not zero",
        VALUE_TOO_LARGE: f"a value is larger than {VALUE_LIMIT} bytes",
        COMMAND_TOO_LARGE: f"it is larger than {COMMAND_LIMIT} bytes",
        NESTED: "it holds a command of a kind that cannot stand there",
        BAD_NUMBER: "a sequence is below 1, or a deadline beyond 2**63 - 1",
        BAD_NAME: "the name of a procedure is not UTF-8",
    }
    return CommandError(
        f"{where}: {reasons[code]}; make commands with fastsm.put and its siblings", index=index)


cdef object describe(const Operation *operation):
    cdef bytes key = operation.key[:operation.key_size]
    if operation.kind == PUT:
        return Put(key, operation.value[:operation.value_size])
    if operation.kind == DELETE:
        return Delete(key)
    if operation.kind == NOOP:
        return Noop()
    if operation.kind == CONFIG:
        return Config(operation.value[:operation.value_size])
    if operation.kind == COMPARE_AND_SWAP:
        return CompareAndSwap(
            key, optional(operation.expected, operation.expected_size), optional(operation.value, operation.value_size))
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
    if kind == VALUE_IS:
        return ValueIs(key, optional(operation.value, operation.value_size))
    return Exists(key) if kind == EXISTS else ModifiedAt(key, number_at(numbers - 8))


cdef object optional(const uint8_t *data, uint32_t size):
    return None if size == ABSENT else data[:size]


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
    """The operations of a command, as what holds them together."""
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
    """Returns what a command says, as a small printable object (`Put`, `Delete`, …, `Batch`). O(size).

    Raises `CommandError` or `UnknownCommandError`, exactly where `apply` would.

    >>> decode(put(b"color", b"blue"))
    Put(key=b'color', value=b'blue')
    """
    return walk(command, True)


def check(command):
    """Raises what `apply` would raise for this command; a proposer calls it before it proposes. O(size)."""
    walk(command, False)


# ---- encode -----------------------------------------------------------------------------------------

cdef class Field:
    """A bytes-like argument for the time of a call."""
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


cdef inline uint8_t *write_header(uint8_t *p, uint8_t kind, uint16_t key_size, uint32_t size) noexcept:
    p[0] = VERSION
    p[1] = kind
    memcpy(p + 2, &key_size, 2)
    memcpy(p + 4, &size, 4)
    return p + HEADER_SIZE


cdef bytes encode(uint8_t kind, key, value):
    cdef Field key_field = Field(key, "key", KEY_LIMIT)
    cdef Field value_field = Field(value, "value", VALUE_LIMIT)
    cdef bytes command = PyBytes_FromStringAndSize(NULL, HEADER_SIZE + key_field.size + value_field.size)
    cdef uint8_t *p = <uint8_t *>PyBytes_AS_STRING(command)
    p = write_header(p, kind, key_field.size, value_field.size)
    memcpy(p, key_field.data, key_field.size)
    memcpy(p + key_field.size, value_field.data, value_field.size)
    return command


def put(key, value):
    """Returns the command that sets `key` to `value` (bytes-like objects). O(size).

    Raises `CommandError` over `MAX_KEY_SIZE` or `MAX_VALUE_SIZE`.
    """
    cdef size_t key_size, value_size
    cdef bytes command
    cdef uint8_t *p
    if type(key) is not bytes or type(value) is not bytes:
        return encode(PUT, key, value)
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
    """Returns the command that removes `key`; a key that is not there is no error."""
    return encode(DELETE, key, b"")


def compare_and_swap(key, expected, value):
    """Returns the command that sets `key` to `value` if its value is `expected`.

    `expected=None`: if the key is not there. `value=None`: remove the key on a match.
    """
    cdef Field key_field = Field(key, "key", KEY_LIMIT)
    cdef Field expected_field = Field(b"" if expected is None else expected, "expected", VALUE_LIMIT)
    cdef Field value_field = Field(b"" if value is None else value, "value", VALUE_LIMIT)
    cdef size_t size = SWAP_HEADER_SIZE + key_field.size + expected_field.size + value_field.size
    cdef uint32_t expected_size = ABSENT if expected is None else <uint32_t>expected_field.size
    cdef uint32_t value_size = ABSENT if value is None else <uint32_t>value_field.size
    if size > COMMAND_LIMIT:
        raise CommandError(f"command of {size} bytes: the limit is {COMMAND_LIMIT}")
    cdef bytes command = PyBytes_FromStringAndSize(NULL, size)
    cdef uint8_t *p = <uint8_t *>PyBytes_AS_STRING(command)
    p = write_header(p, COMPARE_AND_SWAP, key_field.size, value_size)
    memcpy(p, &expected_size, 4)
    p += 4
    memcpy(p, key_field.data, key_field.size)
    p += key_field.size
    memcpy(p, expected_field.data, expected_field.size)
    memcpy(p + expected_field.size, value_field.data, value_field.size)
    return command


def noop():
    """Returns the command that changes nothing: a new leader's first entry."""
    return encode(NOOP, b"", b"")


def config(data):
    """Returns the command that records opaque cluster membership; see `FastStateMachine.membership`."""
    return encode(CONFIG, b"", data)


def batch(commands):
    """Returns the command that does several others in order, each seeing those before it, all or none.

    When a compare-and-swap in it does not match, or an add in it cannot be done, nothing of it happens. It takes put,
    delete, compare_and_swap, noop, add, delete_range and delete_prefix; anything else in it is a `CommandError`, as is
    a member that is malformed itself. With an add or a range in it, it answers `Answer(True, [one value for each])`,
    or `Answer(False, None, reason)`.
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
        if member[1] > NOOP and member[1] not in (ADD, DELETE_RANGE):
            raise CommandError(
                f"member {position} of the batch: expected a put, delete, compare_and_swap, noop, add, delete_range "
                f"or delete_prefix, found {decode(member)}")
        size += PyBytes_GET_SIZE(member)
    if size > COMMAND_LIMIT:
        raise CommandError(f"command of {size} bytes: the limit is {COMMAND_LIMIT}")
    cdef uint8_t header[HEADER_SIZE]
    write_header(header, BATCH, 0, len(members))
    return header[:HEADER_SIZE] + b"".join(members)


# ---- put_many ---------------------------------------------------------------------------------------

cdef class Column:
    """Cells of bytes: a sequence of bytes-like objects, a NumPy `S` or 2-D uint8 array, or `(data, offsets)`.

    What is read was taken from the source before it is checked, or is locked by its buffer: code that runs between here
    and the last look (that of the other column, say) cannot lead a pointer astray.
    """
    cdef readonly Py_ssize_t count
    cdef list cells                # a sequence's
    cdef PyObject **items          # of `cells`, which nobody else knows
    cdef Py_buffer data            # an array's
    cdef bint data_held, strips
    cdef uint8_t *copied           # cells of an array that has gaps, without them
    cdef int64_t *offsets          # a copy, checked
    cdef Py_ssize_t width          # of a cell, without offsets

    def __cinit__(self, source, str name):
        if type(source) is tuple and len(source) == 2 and getattr(source[1], "ndim", 0):
            self.take_offsets(source[0], source[1], name)
        elif hasattr(source, "dtype"):
            self.take_array(source, name)
        elif isinstance(source, (str, bytes, bytearray, memoryview)):
            raise TypeError(f"{name}: expected a column of bytes, found one {type(source).__name__}")
        else:
            self.cells = copy_ahead(source)
            self.count = len(self.cells)
            self.convert_cells()
            self.items = PySequence_Fast_ITEMS(self.cells)

    def __dealloc__(self):
        free(self.copied)
        free(self.offsets)
        if self.data_held:
            PyBuffer_Release(&self.data)

    cdef int convert_cells(self) except -1:
        cdef Py_ssize_t i
        for i in range(self.count):
            if type(<object>PySequence_Fast_ITEMS(self.cells)[i]) is not bytes:
                self.cells[i] = bytes(memoryview(self.cells[i]))
        return 0

    cdef int take_array(self, source, str name) except -1:
        expected = "an array of dtype S, or of uint8 in two dimensions"
        take_buffer(source, &self.data, PyBUF_STRIDES | PyBUF_FORMAT, name, expected)
        self.data_held = True
        if self.data.ndim == 1 and is_text(self.data.format):
            self.width = self.data.itemsize
            self.strips = True  # NumPy's rule: NULs at the end are padding
        elif self.data.ndim == 2 and strcmp(self.data.format, b"B") == 0:
            self.width = self.data.shape[1]
        else:
            raise not_a(expected, source, name)
        self.count = self.data.shape[0]
        if not PyBuffer_IsContiguous(&self.data, b"C"):
            self.copied = <uint8_t *>malloc(self.data.len + 1)
            if self.copied == NULL:
                raise MemoryError(f"no memory for {self.data.len} bytes of {name}")
            PyBuffer_ToContiguous(self.copied, &self.data, self.data.len, b"C")
        return 0

    cdef int take_offsets(self, data, offsets, str name) except -1:
        cdef Py_buffer taken
        cdef Py_ssize_t i
        expected = "offsets as an array of int32 or int64, one longer than the column"
        take_buffer(data, &self.data, PyBUF_SIMPLE, name, "bytes-like data before its offsets")
        self.data_held = True
        take_buffer(offsets, &taken, PyBUF_STRIDES | PyBUF_FORMAT, name, expected)
        try:
            if taken.ndim != 1 or taken.shape[0] < 1 or not is_signed(taken.format, taken.itemsize):
                raise not_a(expected, offsets, name)
            self.count = taken.shape[0] - 1
            self.offsets = <int64_t *>malloc(taken.shape[0] * sizeof(int64_t))
            if self.offsets == NULL:
                raise MemoryError(f"no memory for {taken.shape[0]} offsets of {name}")
            for i in range(self.count + 1):
                self.offsets[i] = read_signed(<const char *>taken.buf + i * taken.strides[0], taken.itemsize)
        finally:
            PyBuffer_Release(&taken)
        for i in range(self.count):
            if not 0 <= self.offsets[i] <= self.offsets[i + 1] <= self.data.len:
                raise ValueError(
                    f"{name}: offsets {i} and {i + 1} are {self.offsets[i]} and {self.offsets[i + 1]}: they must rise "
                    f"within the {self.data.len} bytes of data")
        return 0

    cdef inline const uint8_t *cell(self, Py_ssize_t i, size_t *size) noexcept:
        """Where cell i is, and its size, which is not sure: a thread without the GIL may write to an array."""
        cdef const uint8_t *start
        if self.items != NULL:
            size[0] = PyBytes_GET_SIZE(<object>self.items[i])
            return <const uint8_t *>PyBytes_AS_STRING(<object>self.items[i])
        start = <const uint8_t *>self.data.buf if self.copied == NULL else self.copied
        if self.offsets != NULL:
            size[0] = self.offsets[i + 1] - self.offsets[i]
            return start + self.offsets[i]
        start += i * self.width
        size[0] = self.width
        while self.strips and size[0] and start[size[0] - 1] == 0:
            size[0] -= 1
        return start


cdef int take_buffer(source, Py_buffer *buffer, int flags, str name, str expected) except -1:
    """The buffer of an array, whatever the array says of itself; `TypeError` when there is none of that kind."""
    mask = getattr(source, "mask", None)
    if mask is not None and hasattr(mask, "any") and mask.any():
        raise TypeError(f"{name}: an array with masked cells, which have no value: fill them first, .filled()")
    try:
        PyObject_GetBuffer(source, buffer, flags)
    except (BufferError, TypeError, ValueError) as error:
        raise not_a(expected, source, name) from error
    return 0


cdef object not_a(str expected, source, str name):
    kind = type(source).__name__
    if hasattr(source, "dtype"):
        kind = f"{kind} of dtype {source.dtype} in {getattr(source, 'ndim', '?')} dimensions"
    return TypeError(f"{name}: expected {expected}, found {kind}")


cdef bint is_text(const char *format) noexcept:
    """Whether it is the format of NumPy's `S`: a size, and `s`."""
    cdef size_t i = 0
    while b"0" <= format[i] <= b"9":
        i += 1
    return format[i] == b"s" and format[i + 1] == 0


cdef bint is_signed(const char *format, Py_ssize_t size) noexcept:
    """Whether it is the format of an int32 or int64, in this machine's order of bytes."""
    return (size == 4 or size == 8) and format[0] in b"ilq" and format[0] and format[1] == 0


cdef int64_t read_signed(const char *p, Py_ssize_t size) noexcept:
    cdef int32_t narrow
    cdef int64_t wide
    if size == 4:
        memcpy(&narrow, p, 4)
        return narrow
    memcpy(&wide, p, 8)
    return wide


cdef list copy_ahead(source):
    """`list(source)`, with the cache misses of its objects overlapping."""
    cdef object fast = PySequence_Fast(source, "a column is a sequence of bytes")
    cdef Py_ssize_t count = PySequence_Fast_GET_SIZE(fast)
    cdef list copied = PyList_New(count)  # this may collect garbage, and so run code that changes the caller's list
    cdef PyObject **items = PySequence_Fast_ITEMS(fast)
    cdef Py_ssize_t i
    if PySequence_Fast_GET_SIZE(fast) != count:
        return list(fast)
    for i in range(count):
        if i + AHEAD < count:
            prefetch(items[i + AHEAD])
            prefetch(<char *>items[i + AHEAD] + 64)
            prefetch(<char *>items[i + AHEAD] + 128)
        Py_INCREF(<object>items[i])
        PyList_SET_ITEM(copied, i, <object>items[i])
    return copied


def put_many(keys, values):
    """Returns the batch that sets each key of a column to the value in the other one. O(bytes).

    Of equal keys the last pair counts, and it alone becomes part of the batch.

    A column is a sequence of bytes-like objects, a NumPy `S` array (NULs at the end of a cell do not belong to it), a
    2-D uint8 array (rows, taken whole), or Arrow's `(data, offsets)`: a buffer, and an int32 or int64 array one longer
    than the column. Raises `CommandError` over the limits, `ValueError` when the columns differ in length.
    """
    cdef Column key_column = Column(keys, "keys")
    cdef Column value_column = Column(values, "values")
    cdef size_t key_size, value_size
    cdef size_t size = HEADER_SIZE
    cdef const uint8_t *key
    cdef const uint8_t *value
    cdef Py_ssize_t i
    if key_column.count != value_column.count:
        raise ValueError(f"{key_column.count} keys, but {value_column.count} values")
    cdef LastOfEqual last = LastOfEqual(key_column.count)
    cdef Py_ssize_t count = key_column.count
    cdef Py_ssize_t earlier
    for i in range(key_column.count):
        key = key_column.cell(i, &key_size)
        value_column.cell(i, &value_size)
        if key_size > KEY_LIMIT or value_size > VALUE_LIMIT:
            raise CommandError(
                f"pair {i}: a key of {key_size} bytes, a value of {value_size} bytes; the limits are {KEY_LIMIT} "
                f"and {VALUE_LIMIT}")
        size += HEADER_SIZE + key_size + value_size
        earlier = last.take(i, key, key_size)
        if earlier >= 0:
            value_column.cell(earlier, &value_size)
            size -= HEADER_SIZE + key_size + value_size
            count -= 1
    if size > COMMAND_LIMIT:
        raise CommandError(f"command of {size} bytes: the limit is {COMMAND_LIMIT}; make several")
    cdef bytes command = PyBytes_FromStringAndSize(NULL, size)
    cdef uint8_t *p = write_header(<uint8_t *>PyBytes_AS_STRING(command), BATCH, 0, count)
    cdef const uint8_t *stop = <const uint8_t *>PyBytes_AS_STRING(command) + size
    for i in range(key_column.count):
        if last.overruled[i]:
            continue
        key = key_column.cell(i, &key_size)
        value = value_column.cell(i, &value_size)
        if key_size > KEY_LIMIT or HEADER_SIZE + key_size + value_size > <size_t>(stop - p):
            break
        p = write_header(p, PUT, key_size, value_size)
        memcpy(p, key, key_size)
        memcpy(p + key_size, value, value_size)
        p += key_size + value_size
    if p != stop:
        raise ValueError("the columns were changed while they were read: another thread writes to their arrays")
    return command
