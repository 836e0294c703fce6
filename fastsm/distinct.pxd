from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef class LastOfEqual:
    cdef uint64_t *slots             # the upper half of a hash, and a key's number plus 1; 0: empty
    cdef const uint8_t **keys        # by number, like the sizes
    cdef uint32_t *sizes
    cdef uint8_t *overruled          # by number: whether a later key is equal
    cdef size_t mask
    cdef size_t patience             # steps that may still be lost to collisions
    cdef dict known                  # replaces the slots once patience runs out
    cdef Py_ssize_t take(self, Py_ssize_t number, const uint8_t *key, size_t size) except -2
    cdef Py_ssize_t take_slowly(self, Py_ssize_t number) except -2
