from libc.stdint cimport int64_t

from fastsm.disk.hashing cimport Part


cdef int write_parts(int descriptor, const Part *parts, size_t count, int64_t offset) noexcept nogil
cdef int write_all(int descriptor, const void *data, size_t size, int64_t offset) noexcept nogil
cdef int pace(int descriptor, int64_t start, int64_t stop) noexcept nogil
