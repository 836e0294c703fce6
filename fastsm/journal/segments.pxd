from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.journal.entries cimport Entries
from fastsm.journal.segment cimport Segment


cdef struct Walk:           # how far the frames of a segment were taken over
    uint64_t end
    uint64_t chain          # the checksum of the last of them, or of the header
    uint64_t watermark      # the highest that they say
    uint64_t frames
    uint64_t last_frame     # where the last of them starts


cdef class Segments(Entries):
    # Invariant: each entry lies in the last segment whose `begin` is not above its index.
    cdef object __weakref__
    cdef readonly str path
    cdef object directory
    cdef readonly bint durable
    cdef readonly bint read_only         # for tools: nothing is written, nothing removed
    cdef list retired                    # segments whose files may go
    cdef Segment newest                  # what is appended to; None: closed
    cdef Segment spare                   # the next one, made ahead
    cdef object named                    # what NEWEST says; None: there is no such file yet
    cdef uint64_t border_term            # of the entry before the first
    cdef uint64_t current_term
    cdef bytes current_vote              # None: nobody yet
    cdef const uint8_t *vote_frame       # while recovering: of the newest vote; NULL: the segment began with it
    cdef const uint8_t *border_frame     # while recovering: of the newest border, in the same way
    cdef uint64_t committed
    cdef uint64_t written_commit
    cdef uint64_t synced                 # entries up to it survive a power loss, as far as they are there
    cdef uint64_t declared               # the first entry that is kept, as frames say: `first`, once recovered
    cdef uint64_t least_term             # while recovering: of the entry before `first`; 0: it is not known
    cdef readonly uint64_t torn_bytes    # that recovery has cut off
    cdef object creating                 # a lock: one segment at a time is made

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
