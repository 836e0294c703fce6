from libc.stdint cimport int32_t, uint8_t, uint16_t, uint64_t

from fastsm.core.ranging cimport Ranging
from fastsm.core.view cimport Step
from fastsm.lookup.deadlines cimport DueWalk

ctypedef struct DueKey:
    # A key, or a session, with its deadline.
    uint64_t deadline
    const uint8_t *key
    uint64_t hashed
    int32_t write         # the position of the write that set the deadline; -1: it was applied before this chunk
    uint16_t key_size
    bint by_number        # the key is the id of a session


cdef class DueHeap:
    cdef DueKey *items
    cdef size_t count, room

    cdef int push(self, const DueKey *added) except -1
    cdef void end(self) noexcept
    cdef void drop_first(self) noexcept


cdef class Expiring(Ranging):
    cdef bint ticking                    # this chunk has had a tick, so the fields below are in use
    cdef DueWalk due_keys, due_sessions  # walks over deadlines that were applied before this chunk
    cdef DueHeap new_keys, new_sessions  # deadlines that this chunk has written, in writes before `looked_at`
    cdef size_t looked_at

    cdef int tick(self, const Step *step, uint64_t now, uint64_t limit, uint64_t *removed) except -1
    cdef int move_clock(self, const Step *step, uint64_t now) except -1
    cdef uint64_t remove_due(self, const Step *step, bint sessions, uint64_t limit) except? 0
    cdef bint is_due(self, bint sessions, uint64_t place) except -1
    cdef int begin_ticks(self) except -1
    cdef int take_written(self) except -1
    cdef const DueKey *first_written(self, bint sessions) noexcept
    cdef int remove_key(self, const Step *step, const DueKey *due) except -1
