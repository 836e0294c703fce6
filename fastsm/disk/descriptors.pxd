from libc.stdint cimport int64_t, uint8_t


ctypedef struct Part:
    # Bytes that need not be adjacent to those of the previous part.
    const uint8_t *data
    size_t size

cdef int write_parts(int descriptor, const Part *parts, size_t count, int64_t offset) noexcept nogil
cdef int write_all(int descriptor, const void *data, size_t size, int64_t offset) noexcept nogil
cdef int pace(int descriptor, int64_t start, int64_t stop) noexcept nogil
