from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.journal.format cimport Item
from fastsm.journal.recovery cimport RecoveredSegments


cdef class Journal(RecoveredSegments):
    cdef bint busy                       # in the middle of a step: another one would write to the same place
    cdef bint closes                     # close at the end of that step

    cdef int check_open(self) except -1
    cdef int begin_step(self) except -1
    cdef int end_step(self) except -1
    cdef int append_entries(self, const Item *items, size_t count) except -1
    cdef const uint8_t *note(self, uint32_t kind, uint64_t index, uint64_t term=*, bytes data=*) except NULL
    cdef int remove_from(self, uint64_t index) except -1
    cdef int remove_up_to(self, uint64_t index) except -1
    cdef int begin_after(self, uint64_t index, uint64_t term) except -1
    cdef int replace_all(self, uint64_t index, uint64_t term, bytes command) except -1
    cdef int go_on(self, uint64_t first, uint64_t border_term) except -1
    cdef int note_vote(self, uint64_t term, bytes vote) except -1
    cdef int note_commit(self) except -1
    cdef int sync_segments(self) except -1
    cdef int end_cleanly(self) except -1
    cdef int close_files(self) except -1
