from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.disk.descriptors cimport Part


cdef int write_frame(
    int descriptor, Part *parts, size_t count, uint64_t length, uint32_t run_count,
    uint64_t identity, uint64_t offset, uint64_t watermark, uint64_t *chain,
) noexcept nogil
