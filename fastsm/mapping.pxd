from libc.stdint cimport uint8_t, uint64_t


cdef class Mapping:
    # Invariant: file bytes [0, mapped) are at address[0:mapped]; mapped <= reserved.
    cdef uint8_t *address
    cdef int protection
    cdef readonly size_t reserved
    cdef readonly size_t mapped
    cdef object __weakref__
    cdef int extend(self, int descriptor, size_t size) except -1
    cdef bint populate(self, size_t start, size_t stop) noexcept nogil
