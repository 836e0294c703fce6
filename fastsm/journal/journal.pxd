from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.journal.entries cimport Entries
from fastsm.journal.segment cimport Segment


cdef class Journal(Entries):
    # Invariant: each entry lies in the last segment whose `begin` is not above its index.
    cdef object __weakref__
    cdef readonly str path
    cdef object directory
    cdef readonly bint durable
    cdef list segments                   # oldest first; all that hold entries, and the newest
    cdef list retired                    # segments whose files may go
    cdef Segment newest                  # what is appended to; None: closed
    cdef Segment spare                   # the next one, made ahead
    cdef uint64_t current_term
    cdef str current_vote
    cdef uint64_t committed
    cdef uint64_t written_commit
    cdef uint64_t synced
    cdef uint64_t declared               # the first entry that is kept, as frames say: `first`, once recovered
    cdef uint64_t next_index             # while recovering: of the next entry; 0: any
    cdef object creating                 # a lock: one segment at a time is made

    cpdef add(self, bytes command, uint64_t index, uint64_t term)
    cdef int note(self, uint32_t kind, uint64_t index, uint64_t term=*, bytes data=*) except -1
    cdef int forget_from(self, uint64_t index) except -1
    cdef int take_base(self, const uint8_t *frame) except -1
    cdef int begin_segment(self, uint64_t first) except -1
    cdef int retire(self) except -1
    cdef bytes state_behind(self, uint64_t first)
    cdef bint take_frame(self, Segment segment, const uint8_t *frame, bint is_first) except -1
    cdef bint take_entry(self, const uint8_t *frame, uint64_t index) except -1
    cdef bint take_cut(self, uint64_t index) except -1
    cdef bint take_state(self, Segment segment, const uint8_t *frame, bint is_first) except -1
    cdef int check_open(self) except -1
    cdef int close_files(self) except -1
