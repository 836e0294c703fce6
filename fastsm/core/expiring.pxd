from libc.stdint cimport int32_t, uint8_t, uint16_t, uint64_t

from fastsm.core.view cimport Step, View
from fastsm.lookup.deadlines cimport DueWalk

ctypedef struct DueKey:
    # A key, or a session, with its deadline.
    uint64_t deadline
    const uint8_t *key
    uint64_t hashed
    int32_t write         # the one that says so; -1: it was applied before this chunk
    uint16_t key_size
    bint by_number        # it is the id of a session


cdef class DueHeap:
    cdef DueKey *items
    cdef size_t count, room

    cdef int push(self, const DueKey *added) except -1
    cdef void end(self) noexcept
    cdef void drop_first(self) noexcept


cdef class Expiring(View):
    cdef bint ticking                    # this chunk has had a tick: what follows counts
    cdef DueWalk due_keys, due_sessions  # over what was applied before this chunk
    cdef DueHeap new_keys, new_sessions  # what this chunk has written with a deadline, up to `looked_at`
    cdef size_t looked_at

    cdef int tick(self, const Step *step, uint64_t now, uint64_t limit, uint64_t *removed) except -1
    cdef int move_clock(self, const Step *step, uint64_t now) except -1
    cdef uint64_t remove_due(self, const Step *step, bint sessions, uint64_t limit) except? 0
    cdef bint is_due(self, bint sessions, uint64_t place) except -1
    cdef int begin_ticks(self) except -1
    cdef int take_written(self) except -1
    cdef const DueKey *first_written(self, bint sessions) noexcept
    cdef int remove_key(self, const Step *step, const DueKey *due) except -1
