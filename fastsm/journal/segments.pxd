from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.journal.entries cimport Entries
from fastsm.journal.segment cimport Segment


cdef struct Walk:           # how far the frames of a segment were taken over
    uint64_t end
    uint64_t chain          # the checksum of the last frame taken, or of the header
    uint64_t watermark      # the highest watermark in the frames
    uint64_t frames
    uint64_t last_frame     # where the last frame starts


cdef class Segments(Entries):
    # Invariant: each entry is in the last segment whose `begin` is not above its index.
    cdef object __weakref__
    cdef readonly str path
    cdef object directory
    cdef readonly bint durable
    cdef readonly bint read_only         # for tools: nothing is written or removed
    cdef list retired                    # segments whose files may be removed
    cdef Segment newest                  # where frames are appended; None: closed
    cdef Segment spare                   # the next segment, made in advance
    cdef object named                    # the content of NEWEST; None: the file does not exist yet
    cdef uint64_t border_term            # of the entry before the first
    cdef uint64_t current_term
    cdef bytes current_vote              # None: no vote yet
    # While recovering: of the newest vote; NULL: the vote is in the segment's first frame
    cdef const uint8_t *vote_frame
    cdef const uint8_t *border_frame     # the same for the newest border
    cdef uint64_t committed
    cdef uint64_t written_commit
    cdef uint64_t synced                 # entries up to this one survive a power loss, if they exist
    cdef uint64_t declared               # the first kept entry as recorded in frames; equals `first` after recovery
    cdef uint64_t least_term             # while recovering: the term of the entry before `first`; 0: unknown
    cdef readonly uint64_t torn_bytes    # bytes that recovery has cut off
    cdef object creating                 # a lock: only one segment at a time is made

    cdef void take_entries(self, Segment segment, Walk *walk, uint64_t stop) noexcept nogil
    cdef int begin_segment(self, uint64_t first, uint64_t border_term) except -1
    cdef int require_newest(self, Segment segment) except -1
    cdef bytes state_before(self, uint64_t first, uint64_t border_term)
    cdef int retire(self) except -1
    cdef int forget_from(self, uint64_t index) except -1
    cdef int start_after(self, uint64_t index, uint64_t term) except -1
    cdef int take_base(self, const uint8_t *frame) except -1
    cdef uint64_t last_term(self) noexcept
    cdef bint is_in_doubt(self, const uint8_t *frame) noexcept
    cdef bint is_vote(self, bytes vote) except -1
    cdef bint take_frame(self, Segment segment, const uint8_t *frame, bint is_first) except -1
    cdef bint take_entry(self, const uint8_t *frame, uint64_t index) except -1
    cdef bint take_start(self, uint64_t index, uint64_t term) except -1
    cdef bint take_state(self, Segment segment, const uint8_t *frame, bint is_first) except -1
    cdef int note_durable_entries(self) except -1
