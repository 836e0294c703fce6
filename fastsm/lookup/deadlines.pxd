from libc.stdint cimport uint8_t, uint64_t

ctypedef struct Due:
    uint64_t deadline
    uint64_t place       # of the record that says it


cdef class Deadlines:
    # Invariant: none of `items` is due before its parent, which is the one at (i - 1) / 4. So many of them are `stale`:
    # they do not count any more.
    cdef Due *items
    cdef readonly size_t count
    cdef readonly size_t stale
    cdef uint64_t version        # changes when items move
    cdef size_t room
    cdef bint by_number          # of sessions: equal deadlines are in the order of ids, else of keys
    cdef uint64_t doubtful       # places below come from a saved table

    cdef bint is_before(self, const uint8_t *arena, const Due *one, const Due *other) noexcept nogil
    cdef int order_of(self, const uint8_t *arena, uint64_t one, uint64_t other) noexcept nogil
    cdef int reserve(self, size_t more) except -1
    cdef int make_room(self, size_t more) noexcept nogil
    cdef int push(self, const uint8_t *arena, uint64_t deadline, uint64_t place) noexcept nogil
    cdef void drop_first(self, const uint8_t *arena) noexcept nogil
    cdef void sink(self, const uint8_t *arena, size_t i) noexcept nogil
    cdef void keep(self, const uint8_t *arena, size_t count) noexcept nogil
    cdef int take_saved(self, const uint8_t *data, size_t count, uint64_t stop) except -1


cdef class DueWalk:
    # Invariant: `frontier` is a heap of positions; what is due first of all that was not passed is its first one.
    cdef Deadlines deadlines
    cdef uint64_t version        # of the deadlines when it began
    cdef size_t *frontier
    cdef size_t count, room

    cdef int begin(self, Deadlines deadlines) except -1
    cdef void end(self) noexcept
    cdef bint holds(self) noexcept
    cdef const Due *first(self) noexcept
    cdef int pass_first(self, const uint8_t *arena) except -1
    cdef int enter(self, const uint8_t *arena, size_t position) except -1
    cdef bint is_before(self, const uint8_t *arena, size_t i, size_t j) noexcept
