"""`put_many`: a batch of puts, made from columns without an object for each cell."""

from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_SIMPLE, PyBUF_STRIDES, PyBuffer_IsContiguous, PyBuffer_Release, PyBuffer_ToContiguous,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.ref cimport Py_INCREF, PyObject
from cpython.sequence cimport PySequence_Fast
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, strcmp

from fastsm.command cimport (
    BATCH, COMMAND_LIMIT, HEADER_SIZE, KEY_LIMIT, NO_DEADLINE, PUT, PUT_UNTIL, VALUE_LIMIT, write_header,
)
from fastsm.distinct cimport LastOfEqual

from fastsm.command import deadline_number
from fastsm.errors import CommandError

cdef extern from *:
    """
    #define fastsm_prefetch(address) __builtin_prefetch(address)
    """
    void prefetch "fastsm_prefetch"(const void *address) noexcept nogil
    PyObject **PySequence_Fast_ITEMS(object sequence)
    Py_ssize_t PySequence_Fast_GET_SIZE(object sequence)

cdef enum: AHEAD = 16    # cells of a column whose cache misses overlap


cdef class Column:
    """Cells of bytes: a sequence of bytes-like objects, a NumPy `S` or 2-D uint8 array, or `(data, offsets)`.

    Everything is copied from the source before it is checked, or locked by its buffer, so code that runs between the
    check and the last use (such as that of the other column) cannot invalidate a pointer.
    """
    cdef readonly Py_ssize_t count
    cdef list cells                # of a sequence
    cdef PyObject **items          # those of `cells`, which no other code can reach
    cdef Py_buffer data            # of an array
    cdef bint data_held, strips
    cdef uint8_t *copied           # the cells of an array with gaps, without the gaps
    cdef int64_t *offsets          # a checked copy
    cdef Py_ssize_t width          # of each cell, if there are no offsets

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
            self.strips = True  # as in NumPy: NULs at the end are padding
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
        """Returns where cell i is, and its size, which may change: a thread without the GIL may write to an array."""
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
    """Gets the buffer of an array, whatever attributes the array has; `TypeError` if there is none of that kind."""
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
    """Returns whether `format` is that of NumPy's `S`: a size, then `s`."""
    cdef size_t i = 0
    while b"0" <= format[i] <= b"9":
        i += 1
    return format[i] == b"s" and format[i + 1] == 0


cdef bint is_signed(const char *format, Py_ssize_t size) noexcept:
    """Returns whether it is the format of an int32 or int64 in native byte order."""
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
    """Returns `list(source)`, with overlapping cache misses for its objects."""
    cdef object fast = PySequence_Fast(source, "a column is a sequence of bytes")
    cdef Py_ssize_t count = PySequence_Fast_GET_SIZE(fast)
    cdef list copied = PyList_New(count)  # may collect garbage, and so run code that changes the caller's list
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


cdef class Deadlines:
    """A column of deadlines: a sequence of ints and Nones, or an integer array of one dimension; or one int for all."""
    cdef uint64_t *numbers         # a checked copy
    cdef Py_ssize_t count

    def __cinit__(self, source, Py_ssize_t count):
        cdef list cells
        cdef Py_ssize_t i
        if source is None:
            return
        if hasattr(source, "__index__") and getattr(source, "ndim", 0) == 0:
            source = [source] * count
        if isinstance(source, (str, bytes, bytearray, memoryview)) or getattr(source, "ndim", 1) != 1:
            raise TypeError(f"expires: expected a column of deadlines, found {type(source).__name__}")
        cells = source.tolist() if hasattr(source, "dtype") else list(source)
        self.numbers = <uint64_t *>malloc(len(cells) * sizeof(uint64_t) + 1)
        if self.numbers == NULL:
            raise MemoryError(f"no memory for {len(cells)} deadlines")
        for i in range(len(cells)):
            try:
                self.numbers[i] = deadline_number(cells[i])
            except (CommandError, TypeError) as error:
                raise type(error)(f"deadline {i}: {error}") from None
        self.count = len(cells)

    def __dealloc__(self):
        free(self.numbers)

    cdef inline bint has(self, Py_ssize_t i) noexcept:
        return self.numbers != NULL and self.numbers[i] != NO_DEADLINE


def put_many(keys, values, *, expires=None):
    """Returns the batch that sets each key of one column to the value in the other one. O(bytes).

    If keys are equal, only the last pair becomes part of the batch.

    A column is a sequence of bytes-like objects, a NumPy `S` array (without the NULs at the end of each cell), a 2-D
    uint8 array (complete rows), or Arrow's `(data, offsets)`: a buffer, and an int32 or int64 array one longer than the
    column. `expires`: a column of deadlines as in `put`, a sequence of ints and Nones or an integer array, or one
    deadline for all keys; without it no key has a deadline.

    Raises `CommandError` if a limit is exceeded or a deadline is out of range, `ValueError` if the columns differ in
    length.
    """
    cdef Column key_column = Column(keys, "keys")
    cdef Column value_column = Column(values, "values")
    cdef Deadlines deadlines = Deadlines(expires, key_column.count)
    cdef size_t key_size, value_size
    cdef size_t size = HEADER_SIZE
    cdef const uint8_t *key
    cdef const uint8_t *value
    cdef size_t timed
    cdef Py_ssize_t i
    if key_column.count != value_column.count:
        raise ValueError(f"{key_column.count} keys, but {value_column.count} values")
    if expires is not None and deadlines.count != key_column.count:
        raise ValueError(f"{key_column.count} keys, but {deadlines.count} deadlines")
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
        size += HEADER_SIZE + key_size + value_size + 8 * deadlines.has(i)
        earlier = last.take(i, key, key_size)
        if earlier >= 0:
            value_column.cell(earlier, &value_size)
            size -= HEADER_SIZE + key_size + value_size + 8 * deadlines.has(earlier)
            count -= 1
    if size > COMMAND_LIMIT:
        raise CommandError(f"command of {size} bytes: the limit is {COMMAND_LIMIT}; make several")
    if size < HEADER_SIZE:  # sizes have changed since they were measured
        size = HEADER_SIZE
    cdef bytes command = PyBytes_FromStringAndSize(NULL, size)
    cdef uint8_t *p = write_header(<uint8_t *>PyBytes_AS_STRING(command), BATCH, 0, count)
    cdef const uint8_t *stop = <const uint8_t *>PyBytes_AS_STRING(command) + size
    for i in range(key_column.count):
        if last.overruled[i]:
            continue
        key = key_column.cell(i, &key_size)
        value = value_column.cell(i, &value_size)
        timed = deadlines.has(i)
        if key_size > KEY_LIMIT or HEADER_SIZE + 8 * timed + key_size + value_size > <size_t>(stop - p):
            break
        p = write_header(p, PUT_UNTIL if timed else PUT, key_size, value_size)
        if timed:
            memcpy(p, &deadlines.numbers[i], 8)
            p += 8
        memcpy(p, key, key_size)
        memcpy(p + key_size, value, value_size)
        p += key_size + value_size
    if p != stop:
        raise ValueError("the columns were changed while they were read: another thread writes to their arrays")
    return command
