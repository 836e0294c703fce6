from libc.stdint cimport uint8_t, uint64_t


cdef enum:
    GUARD = 64 << 10        # the greatest size of a key, plus one: comparing a key never leaves the mapping
    BASE_ALIGNMENT = 64 << 10    # at least as large as the pages of any system


cdef inline uint64_t log_start(uint64_t base_size) noexcept nogil:
    """Returns where the log starts in an arena with a base of this size; 0 without a base."""
    if base_size == 0:
        return 0
    return (base_size + GUARD + BASE_ALIGNMENT - 1) & ~<uint64_t>(BASE_ALIGNMENT - 1)


cdef class Mapping:
    # Invariant: start <= mapped <= reserved. The base is at [0, base size), the log at [start, mapped). The bytes
    # between them, and GUARD bytes after the log, are readable and zero.
    cdef uint8_t *address
    cdef int protection
    cdef readonly size_t reserved
    cdef readonly size_t start           # of the log
    cdef readonly size_t mapped
    cdef object __weakref__
    cdef int lay_base(self, int descriptor, size_t size) except -1
    cdef int extend(self, int descriptor, size_t size) except -1
    cdef int shrink(self, size_t size) except -1
    cdef int guard(self, size_t file_end, size_t stop) except -1
    cdef bint fits(self, size_t size) noexcept
    cdef bint populate(self, size_t start, size_t stop) noexcept nogil
    cdef void populate_read(self, size_t start, size_t stop) noexcept nogil
    cdef void settle(self, size_t start, size_t stop) noexcept nogil
