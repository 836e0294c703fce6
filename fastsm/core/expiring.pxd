from libc.stdint cimport uint8_t, uint16_t, uint64_t

from fastsm.core.view cimport Step, View
from fastsm.lookup.deadlines cimport DueWalk

ctypedef struct DueKey:
    # A key, or a session, that this chunk has written, and that is due.
    uint64_t deadline
    const uint8_t *key
    uint64_t hashed
    uint16_t key_size
    bint by_number        # it is the id of a session


cdef class Expiring(View):
    cdef DueWalk due_keys, due_sessions  # over what was applied before this chunk; None: there was no tick yet

    cdef int tick(self, const Step *step, uint64_t now, uint64_t limit, uint64_t *removed) except -1
    cdef int move_clock(self, const Step *step, uint64_t now) except -1
    cdef uint64_t remove_due(self, const Step *step, bint sessions, uint64_t limit) except? 0
    cdef bint is_due(self, bint sessions, uint64_t place) except -1
    cdef int gather_due(self, bint sessions, DueKey **found, size_t *count) except -1
    cdef int remove_key(self, const Step *step, const DueKey *due) except -1
