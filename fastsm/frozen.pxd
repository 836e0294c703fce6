from libc.stdint cimport int64_t, uint8_t, uint64_t

from fastsm.mapping cimport Mapping


cdef class View:
    cdef Mapping mapping
    cdef const uint8_t *data
    cdef Py_ssize_t size


cdef class Frozen:
    # Invariant: every place leads to a whole record in the mapping, which is never written again.
    cdef readonly Mapping mapping
    cdef const uint8_t *arena
    cdef uint64_t[::1] places
    cdef int fill(
        self, uint8_t[::1] keys, int64_t[::1] key_ends, uint8_t[::1] values, int64_t[::1] value_ends) except -1
