from libc.stdint cimport uint8_t, uint64_t

from fastsm.journal.segment cimport Segment
from fastsm.journal.segments cimport Segments


cdef struct Walk:           # how far the frames of a segment were taken over
    uint64_t end
    uint64_t chain          # the checksum of the last frame taken, or of the header
    uint64_t watermark      # the highest watermark in the frames
    uint64_t frames
    uint64_t last_frame     # where the last frame starts


cdef class RecoveredSegments(Segments):
    # While recovering: of the newest vote; NULL: the vote is in the segment's first frame
    cdef const uint8_t *vote_frame
    cdef const uint8_t *border_frame     # the same for the newest border
    cdef uint64_t least_term             # while recovering: the term of the entry before `first`; 0: unknown
    cdef readonly uint64_t torn_bytes    # bytes that recovery has cut off

    cdef void take_entries(self, Segment segment, Walk *walk, uint64_t stop) noexcept nogil
    cdef bint is_in_doubt(self, const uint8_t *frame) noexcept
    cdef bint is_vote(self, bytes vote) except -1
    cdef bint take_frame(self, Segment segment, const uint8_t *frame, bint is_first) except -1
    cdef bint take_entry(self, const uint8_t *frame, uint64_t index) except -1
    cdef bint take_start(self, uint64_t index, uint64_t term) except -1
    cdef bint take_state(self, Segment segment, const uint8_t *frame, bint is_first) except -1
    cdef int note_durable_entries(self) except -1
