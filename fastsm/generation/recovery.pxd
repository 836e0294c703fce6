from libc.stdint cimport int64_t, uint8_t, uint64_t

from fastsm.disk.format cimport Progress
from fastsm.disk.mapping cimport Mapping
from fastsm.lookup.terms cimport Terms


cdef class Scan:
    # Invariant: [0, end) of the mapping is the header and valid frames.
    cdef Mapping mapping
    cdef const uint8_t *address
    cdef readonly str path
    cdef uint64_t identity
    cdef uint64_t size
    cdef readonly uint64_t end
    cdef readonly uint64_t watermark     # an offset below which the log was known durable
    cdef bint whole_frames_only          # that is all that was mapped of the file
    cdef Terms terms
    cdef Progress progress               # the last entry, and the newest snapshot metadata
    cdef readonly uint64_t frames
    cdef readonly uint64_t last_frame    # where the last of them begins, 0: there is none
    cdef object proven(self, uint64_t offset, uint64_t watermark)
    cdef object forged(self)
    cdef int look(self, uint64_t offset) noexcept nogil
    cdef uint64_t search(
        self, uint64_t offset, uint64_t stop, uint64_t *torn_end, int64_t *budget) noexcept nogil
    cdef bint looks_like_frame(self, const uint8_t *p, uint64_t offset, int64_t *budget) noexcept nogil
