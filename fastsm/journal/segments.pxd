from libc.stdint cimport uint8_t, uint64_t

from fastsm.journal.entries cimport Entries
from fastsm.journal.segment cimport Segment


cdef class Segments(Entries):
    # Invariant: each entry is in the last segment whose `begin` is not above its index.
    cdef object __weakref__
    cdef readonly str path
    cdef object directory
    cdef readonly bint durable
    cdef readonly bint read_only         # for tools: nothing is written or removed
    cdef list retired                    # segments whose files may be removed
    cdef uint64_t retired_syncs          # their syncs so far, and those of segments that are gone
    cdef double retired_seconds
    cdef Segment newest                  # where frames are appended; None: closed
    cdef Segment spare                   # the next segment, made in advance
    cdef object named                    # the content of NEWEST; None: the file does not exist yet
    cdef uint64_t border_term            # of the entry before the first
    cdef uint64_t current_term
    cdef bytes current_vote              # None: no vote yet
    cdef uint64_t committed
    cdef uint64_t written_commit
    cdef uint64_t synced                 # entries up to this one survive a power loss, if they exist
    cdef uint64_t declared               # the first kept entry as recorded in frames; equals `first` after recovery
    cdef object creating                 # a lock: only one segment at a time is made

    cdef int begin_segment(self, uint64_t first, uint64_t border_term) except -1
    cdef int require_newest(self, Segment segment) except -1
    cdef bytes state_before(self, uint64_t first, uint64_t border_term)
    cdef int retire(self) except -1
    cdef int forget_from(self, uint64_t index) except -1
    cdef int start_after(self, uint64_t index, uint64_t term) except -1
    cdef int take_base(self, const uint8_t *frame) except -1
    cdef uint64_t last_term(self) noexcept
