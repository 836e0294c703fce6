"""A state held still: what iterators and columns read while the machine continues.

Records never move or change, so the state at one moment is a list of places and the mapping they refer to. Making the
list copies 8 bytes per key; reading it needs neither the GIL nor the machine.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from fastsm.long_work cimport Work
from fastsm.disk.format cimport record_key, record_key_size, record_length, record_value_size

from fastsm.libraries import library
from fastsm.long_work import no_tick, run_long

cdef enum:
    SLICE = 1 << 15      # records between two checks for signals: a few milliseconds
    RECORD_BYTES = 64    # a rough lower bound of a record's size


@cython.freelist(64)
@cython.no_gc  # a mapping refers to no Python object
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
        """Reserves room for `count` places. Runs no Python code, except to raise when there is no memory."""
        self.places = <uint64_t *>malloc((count + 1) * sizeof(uint64_t))
        if self.places == NULL:
            raise MemoryError(f"no memory to hold {count} keys still")
        self.count = count
        return 0

    cdef Frozen in_order(self):
        """Sorts the places into the order of the log. O(keys), without the GIL."""
        cdef uint64_t *other
        if self.count > 1:
            other = <uint64_t *>malloc(self.count * sizeof(uint64_t))
            if other == NULL:
                raise MemoryError(f"no memory to sort {self.count} places")
            with nogil:
                sort_places(self.places, other, self.count)
            free(other)
        if self.readable:
            self.check_lengths()
        return self

    cdef int check_lengths(self) except -1:
        """Checks that each record ends within the mapping: before all bytes are verified, a length may be wrong."""
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
        """Returns an iterator over all keys."""
        cdef const uint8_t *record
        cdef Py_ssize_t i
        for i in range(<Py_ssize_t>self.count):
            record = self.arena + self.places[i]
            yield key_of(record)

    def items(self):
        """Returns an iterator over all pairs."""
        cdef const uint8_t *record
        cdef Py_ssize_t i
        for i in range(<Py_ssize_t>self.count):
            record = self.arena + self.places[i]
            yield key_of(record), value_of(record)

    @cython.boundscheck(False)
    @cython.wraparound(False)
    def columns(self):
        """Returns pairs as four arrays: key bytes (uint8), key offsets (int64, one more than keys), same of values."""
        np = library("numpy")  # imported on first use: it would dominate the import time of fastsm
        cdef Py_ssize_t count = <Py_ssize_t>self.count
        key_offsets = np.zeros(count + 1, dtype=np.int64)
        value_offsets = np.zeros(count + 1, dtype=np.int64)
        cdef int64_t[::1] key_ends = key_offsets
        cdef int64_t[::1] value_ends = value_offsets
        cdef uint8_t[::1] key_bytes, value_bytes
        cdef uint8_t nothing = 0  # memcpy takes no NULL, even for no bytes
        cdef Filling filling = Filling(self)
        filling.key_ends, filling.value_ends = &key_ends[0], &value_ends[0]
        run_long(filling, no_tick, self.count * RECORD_BYTES)
        keys = np.empty(key_ends[count], dtype=np.uint8)
        values = np.empty(value_ends[count], dtype=np.uint8)
        key_bytes, value_bytes = keys, values
        filling.fills = True
        filling.keys = &key_bytes[0] if key_bytes.shape[0] else &nothing
        filling.values = &value_bytes[0] if value_bytes.shape[0] else &nothing
        run_long(filling, no_tick, key_ends[count] + value_ends[count])
        return keys, key_offsets, values, value_offsets


cdef class Filling:
    """The work of `Frozen.columns`: first the offsets, then the bytes. Its caller waits, and keeps the arrays alive."""
    cdef Frozen frozen
    cdef int64_t *key_ends
    cdef int64_t *value_ends
    cdef uint8_t *keys
    cdef uint8_t *values
    cdef bint fills

    def __cinit__(self, Frozen frozen):
        self.frozen = frozen

    def __call__(self, Work work):
        cdef size_t done = 0
        while done < self.frozen.count:
            with nogil:
                done = self.do_slice(done)
                while done < self.frozen.count and work.goes_on(done):
                    done = self.do_slice(done)
            work()

    cdef size_t do_slice(self, size_t first) noexcept nogil:
        """Fills the slice at `first`; returns where the next slice starts."""
        cdef size_t stop = min(first + SLICE, self.frozen.count)
        cdef const uint8_t *record
        cdef size_t i
        for i in range(first, stop):
            record = self.frozen.arena + self.frozen.places[i]
            if self.fills:
                memcpy(self.keys + self.key_ends[i], record_key(record), record_key_size(record))
                memcpy(
                    self.values + self.value_ends[i], record_key(record) + record_key_size(record),
                    record_value_size(record))
            else:
                self.key_ends[i + 1] = self.key_ends[i] + record_key_size(record)
                self.value_ends[i + 1] = self.value_ends[i] + record_value_size(record)
        return stop


cdef void sort_places(uint64_t *places, uint64_t *other, size_t count) noexcept nogil:
    """Sorts places with a byte-wise radix sort, least significant byte first; `other` is scratch room of equal size.

    Places are multiples of 8, and high bytes are zero in all of them, so usually only four or five bytes need a pass.
    """
    cdef uint64_t starts[256]
    cdef uint64_t *source = places
    cdef uint64_t *target = other
    cdef uint64_t all_bits = 0
    cdef uint64_t at, counted
    cdef size_t i
    cdef int shift = 3
    for i in range(count):
        all_bits |= places[i]
    while shift < 64 and all_bits >> shift:
        memset(starts, 0, sizeof(starts))
        for i in range(count):
            starts[(source[i] >> shift) & 0xFF] += 1
        at = 0
        for i in range(256):
            counted = starts[i]
            starts[i] = at
            at += counted
        for i in range(count):
            at = (source[i] >> shift) & 0xFF
            target[starts[at]] = source[i]
            starts[at] += 1
        source, target = target, source
        shift += 8
    if source != places:
        memcpy(places, source, count * sizeof(uint64_t))


cdef bytes key_of(const uint8_t *record):
    return PyBytes_FromStringAndSize(<const char *>record_key(record), record_key_size(record))


cdef bytes value_of(const uint8_t *record):
    return PyBytes_FromStringAndSize(
        <const char *>record_key(record) + record_key_size(record), record_value_size(record))
