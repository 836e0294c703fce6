from libc.stdint cimport uint8_t, uint64_t

from fastsm.generation.framefile cimport FrameFile
from fastsm.journal.format cimport Item


cdef class Segment(FrameFile):
    cdef public uint64_t begin           # the lowest index of an entry that may be in this segment
    cdef list mappings                   # all mappings so far, since entries are pointers into them
    cdef int hold_mapping(self) except -1
    cdef int rest(self) except -1
    cdef int wake(self) except -1
    cdef const uint8_t *append(self, const Item *items, size_t count) except NULL
    cdef const uint8_t *append_large(self, const Item *item, uint64_t length) except NULL
    cdef const uint8_t *frame_of(self, uint64_t offset, uint64_t previous) except? NULL
    cdef uint64_t end_of_torn_tail(self, uint64_t end) except? 0
