"""A state held still: what iterators, scans and columns read while the machine goes on.

Records never move or change, so the state at a moment is a list of places, and the mapping that they lead
into. Taking it copies 8 bytes a key; reading it needs neither the GIL nor the machine.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, malloc, qsort
from libc.string cimport memcmp, memcpy

from fastsm.disk.format cimport record_key, record_key_size, record_length, record_value_size
from fastsm.lookup.table cimport prefetch

cdef enum:
    SLICE = 1 << 15      # records between two looks at signals: some milliseconds
    AHEAD = 16

ctypedef const uint8_t *Record


@cython.freelist(64)
@cython.no_gc  # a mapping refers to nothing
cdef class View:
    """The bytes of one value, lent out: holds the mapping for as long as a memoryview of it lives."""

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, <void *>self.data, self.size, 1, flags)


cdef class Frozen:
    """The live records of one state, in the order of the entries that wrote them: the same on every replica.

    Thread safety: immutable; all methods from any thread. Long ones work without the GIL, in slices.
    """

    def __dealloc__(self):
        free(self.places)

    cdef int reserve(self, size_t count) except -1:
        """Room for as many places. Runs no Python code, unless there is no memory."""
        self.places = <uint64_t *>malloc((count + 1) * sizeof(uint64_t))
        if self.places == NULL:
            raise MemoryError(f"no memory to hold {count} keys still")
        self.count = count
        return 0

    cdef Frozen in_order(self):
        """Sorts the places: in the order of the log."""
        import numpy as np  # not at import time: it would be most of it

        if self.count:
            np.asarray(<uint64_t[:self.count]>self.places).sort()
        if self.readable:
            self.check_lengths()
        return self

    cdef int check_lengths(self) except -1:
        """Before all is verified, a record may say that it is longer than it can be."""
        cdef size_t first, i
        cdef uint64_t bad = 0
        for first in range(0, self.count, SLICE):
            with nogil:
                for i in range(first, min(first + SLICE, self.count)):
                    if self.places[i] + record_length(self.arena + self.places[i]) > self.readable + 7:
                        bad = self.places[i]
                        break
            PyErr_CheckSignals()
            if bad:
                raise self.log.damage_at(bad)
        return 0

    def __len__(self):
        return self.count

    def keys(self):
        """Iterates over all keys."""
        cdef const uint8_t *record
        cdef Py_ssize_t i
        for i in range(<Py_ssize_t>self.count):
            record = self.arena + self.places[i]
            yield key_of(record)

    def items(self):
        """Iterates over all pairs."""
        cdef const uint8_t *record
        cdef Py_ssize_t i
        for i in range(<Py_ssize_t>self.count):
            record = self.arena + self.places[i]
            yield key_of(record), value_of(record)

    @cython.boundscheck(False)
    @cython.wraparound(False)
    def columns(self):
        """All pairs as four arrays: key bytes (uint8), key offsets (int64, one more than keys), the same of values."""
        import numpy as np  # not at import time: it would be most of it

        cdef Py_ssize_t count = <Py_ssize_t>self.count
        key_offsets = np.zeros(count + 1, dtype=np.int64)
        value_offsets = np.zeros(count + 1, dtype=np.int64)
        cdef int64_t[::1] key_ends = key_offsets
        cdef int64_t[::1] value_ends = value_offsets
        cdef Py_ssize_t i, first, stop
        cdef const uint8_t *record
        for first in range(0, count, SLICE):
            stop = min(first + SLICE, count)
            with nogil:
                for i in range(first, stop):
                    record = self.arena + self.places[i]
                    key_ends[i + 1] = key_ends[i] + record_key_size(record)
                    value_ends[i + 1] = value_ends[i] + record_value_size(record)
            PyErr_CheckSignals()
        keys = np.empty(key_ends[count], dtype=np.uint8)
        values = np.empty(value_ends[count], dtype=np.uint8)
        self.fill(keys, key_ends, values, value_ends)
        return keys, key_offsets, values, value_offsets

    @cython.boundscheck(False)
    @cython.wraparound(False)
    cdef int fill(
        self, uint8_t[::1] keys, int64_t[::1] key_ends, uint8_t[::1] values, int64_t[::1] value_ends
    ) except -1:
        cdef Py_ssize_t count = <Py_ssize_t>self.count
        cdef Py_ssize_t i, first, stop
        cdef uint8_t *key_bytes = &keys[0] if keys.shape[0] else NULL
        cdef uint8_t *value_bytes = &values[0] if values.shape[0] else NULL
        cdef const uint8_t *record
        for first in range(0, count, SLICE):
            stop = min(first + SLICE, count)
            with nogil:
                for i in range(first, stop):
                    record = self.arena + self.places[i]
                    memcpy(key_bytes + key_ends[i], record_key(record), record_key_size(record))
                    memcpy(
                        value_bytes + value_ends[i], record_key(record) + record_key_size(record),
                        record_value_size(record))
            PyErr_CheckSignals()
        return 0

    def scan(self, bytes prefix, limit, start_after):
        """The pairs whose key starts with `prefix`, sorted by key; see `FastStateMachine.scan_prefix`."""
        cdef Scan scan = Scan(<Py_ssize_t>self.count)
        cdef bytes after = start_after or b""
        cdef bint skipping = start_after is not None
        cdef const uint8_t *prefix_bytes = <const uint8_t *>PyBytes_AS_STRING(prefix)
        cdef const uint8_t *after_bytes = <const uint8_t *>PyBytes_AS_STRING(after)
        cdef size_t prefix_size = PyBytes_GET_SIZE(prefix)
        cdef size_t after_size = PyBytes_GET_SIZE(after)
        cdef Py_ssize_t count = <Py_ssize_t>self.count
        cdef Py_ssize_t first, stop, i
        cdef const uint8_t *record
        for first in range(0, count, SLICE):
            stop = min(first + SLICE, count)
            with nogil:
                for i in range(first, stop):
                    if i + AHEAD < stop:
                        prefetch(self.arena + self.places[i + AHEAD])
                    record = self.arena + self.places[i]
                    if record_key_size(record) < prefix_size:
                        continue
                    if memcmp(record_key(record), prefix_bytes, prefix_size):
                        continue
                    if skipping and compare_key(record, after_bytes, after_size) <= 0:
                        continue
                    scan.records[scan.count] = record
                    scan.count += 1
            PyErr_CheckSignals()
        scan.sort()
        return scan.pairs(scan.count if limit is None else min(scan.count, limit))


cdef class Scan:
    """The records that a scan found, and room to sort them."""
    cdef Record *records
    cdef Record *spare
    cdef Py_ssize_t count

    def __cinit__(self, Py_ssize_t room):
        self.records = <Record *>malloc((room + 1) * sizeof(Record))
        self.spare = <Record *>malloc((room + 1) * sizeof(Record))
        if self.records == NULL or self.spare == NULL:
            raise MemoryError(f"no memory to scan {room} keys")

    def __dealloc__(self):
        free(self.records)
        free(self.spare)

    cdef int sort(self) except -1:
        """Sorts by key: slices by qsort, then merged pair by pair, so that signals are served meanwhile."""
        cdef Py_ssize_t first, width
        for first in range(0, self.count, SLICE):
            with nogil:
                qsort(
                    self.records + first, min(self.count - first, <Py_ssize_t>SLICE), sizeof(Record),
                    compare_records)
            PyErr_CheckSignals()
        width = SLICE
        while width < self.count:
            for first in range(0, self.count, 2 * width):
                self.merge(first, min(first + width, self.count), min(first + 2 * width, self.count))
            self.records, self.spare = self.spare, self.records
            width *= 2
        return 0

    cdef int merge(self, Py_ssize_t first, Py_ssize_t middle, Py_ssize_t stop) except -1:
        """Merges [first, middle) and [middle, stop) of `records` into `spare`."""
        cdef Py_ssize_t i = first
        cdef Py_ssize_t j = middle
        cdef Py_ssize_t k = first
        cdef Py_ssize_t pause
        while k < stop:
            pause = min(k + SLICE, stop)
            with nogil:
                while k < pause:
                    if i < middle and (
                        j == stop or compare_records(&self.records[i], &self.records[j]) <= 0
                    ):
                        self.spare[k] = self.records[i]
                        i += 1
                    else:
                        self.spare[k] = self.records[j]
                        j += 1
                    k += 1
            PyErr_CheckSignals()
        return 0

    cdef list pairs(self, Py_ssize_t stop):
        cdef list pairs = []
        cdef Py_ssize_t i
        for i in range(stop):
            pairs.append((key_of(self.records[i]), value_of(self.records[i])))
        return pairs


cdef int compare_key(const uint8_t *record, const uint8_t *key, size_t size) noexcept nogil:
    """As `bytes` compare: byte by byte, then the shorter one first."""
    cdef size_t own = record_key_size(record)
    cdef int order = memcmp(record_key(record), key, min(own, size))
    if order:
        return order
    return (own > size) - (own < size)


cdef int compare_records(const void *a, const void *b) noexcept nogil:
    cdef Record other = (<const Record *>b)[0]
    return compare_key((<const Record *>a)[0], record_key(other), record_key_size(other))


cdef bytes key_of(const uint8_t *record):
    return PyBytes_FromStringAndSize(<const char *>record_key(record), record_key_size(record))


cdef bytes value_of(const uint8_t *record):
    return PyBytes_FromStringAndSize(
        <const char *>record_key(record) + record_key_size(record), record_value_size(record))
