from libc.stdint cimport uint8_t, uint64_t

cdef enum:
    CHILDREN = 4             # children per item, which share a cache line

ctypedef struct Due:
    # A deadline as stored in a saved table.
    uint64_t deadline
    uint64_t place       # of the record that sets the deadline


cdef class Deadlines:
    # Invariants: `items` is a heap: no item is due before its parent, the one at (i - 1) / 4. `stale` of them are
    # overtaken, and no longer count.
    cdef uint64_t *items         # each packs a rough deadline and a place
    cdef uint64_t base           # rough deadlines are relative to this; 0 stands for the base and everything before it
    cdef size_t earlier          # deadlines before the base that were pushed since the base was set
    cdef readonly size_t count
    cdef readonly size_t stale
    cdef uint64_t version        # changes whenever items move
    cdef size_t room
    cdef bint by_number          # deadlines of sessions: ties are broken by id, otherwise by key
    cdef uint64_t doubtful       # places below come from a saved table, and may be wrong

    cdef bint is_before(self, const uint8_t *arena, uint64_t one, uint64_t other) noexcept nogil
    cdef uint64_t deadline_of(self, const uint8_t *arena, uint64_t place) noexcept nogil
    cdef uint64_t item_of(self, uint64_t deadline, uint64_t place) noexcept nogil
    cdef void begin_at(self, const uint8_t *arena, uint64_t deadline) noexcept nogil
    cdef int order_of(self, const uint8_t *arena, uint64_t one, uint64_t other) noexcept nogil
    cdef int reserve(self, size_t more) except -1
    cdef int make_room(self, size_t more) noexcept nogil
    cdef int push(self, const uint8_t *arena, uint64_t deadline, uint64_t place) noexcept nogil
    cdef void drop(self, const uint8_t *arena, const uint64_t *positions, size_t count) noexcept nogil
    cdef void sink(self, const uint8_t *arena, size_t i) noexcept nogil
    cdef void keep(self, const uint8_t *arena, size_t count) noexcept nogil
    cdef int take_saved(self, const uint8_t *data, size_t count, uint64_t stop) except -1


cdef class DueWalk:
    # Invariant: `frontier` is a heap of positions; the first one is the earliest deadline that was not passed yet.
    cdef Deadlines deadlines
    cdef uint64_t version        # the version of the deadlines at the start
    cdef size_t *frontier
    cdef size_t count, room

    cdef int begin(self, Deadlines deadlines) except -1
    cdef void end(self) noexcept
    cdef bint holds(self) noexcept
    cdef uint64_t first(self) noexcept
    cdef int pass_first(self, const uint8_t *arena) except -1
    cdef int enter(self, const uint8_t *arena, size_t position) except -1
    cdef bint is_before(self, const uint8_t *arena, size_t i, size_t j) noexcept
