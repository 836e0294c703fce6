from libc.stdint cimport uint8_t, uint64_t

from fastsm.generation.framefile cimport FrameFile


cdef class Log(FrameFile):
    cdef readonly object base            # the snapshot that the log is stacked on, or None
    cdef readonly uint64_t base_bytes    # the size of its file
    cdef uint64_t copy_piece(self, const uint8_t *source, uint64_t first, uint64_t stop) except 0
    cdef void copy_and_seal(self, const uint8_t *source, uint64_t first, uint64_t stop) noexcept nogil
