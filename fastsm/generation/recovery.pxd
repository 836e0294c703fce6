from libc.stdint cimport uint8_t, uint64_t

from fastsm.disk.format cimport Progress
from fastsm.disk.mapping cimport Mapping
from fastsm.lookup.terms cimport Terms


cdef class Scan:
    # Invariant: [0, end) of the mapping consists of the header and valid frames.
    cdef Mapping mapping
    cdef const uint8_t *address
    cdef readonly str path
    cdef uint64_t identity
    cdef uint64_t size
    cdef readonly uint64_t end
    cdef readonly uint64_t watermark     # an offset below which the log is known to be durable
    cdef bint whole_frames_only          # only complete frames of the file were mapped
    cdef Terms terms
    cdef Progress progress               # the last entry, and the newest snapshot's metadata
    cdef readonly uint64_t frames
    cdef readonly uint64_t last_frame    # where the last frame starts; 0: there is none
    cdef readonly uint64_t chain         # its checksum, or the header's, to which the next frame is chained
    cdef int look(self, uint64_t offset) noexcept nogil
    cdef int read_slice(self) except -1 nogil
