from libc.stdint cimport int64_t, uint8_t, uint64_t

from fastsm.disk.mapping cimport Mapping


cdef class View:
    cdef Mapping mapping
    cdef const uint8_t *data
    cdef Py_ssize_t size


cdef class Frozen:
    # Invariant: every place is that of a whole record in the mapping, which is never written again.
    cdef Mapping mapping
    cdef object log                      # holds the files that are mapped into the arena
    cdef const uint8_t *arena
    cdef uint64_t readable               # no record may extend past this offset; 0: all records were checked
    cdef uint64_t *places
    cdef size_t count
    cdef readonly uint64_t revision      # the last applied index
    cdef int reserve(self, size_t count) except -1
    cdef Frozen in_order(self)
    cdef int check_lengths(self) except -1


cdef bytes key_of(const uint8_t *record)
cdef bytes value_of(const uint8_t *record)
