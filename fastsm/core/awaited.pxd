from libc.stdint cimport uint64_t


cdef enum:  # what became of a ticket
    WAITING = 0
    APPLIED = 1
    REPLACED = 2
    ENDED = 3


cdef class Ticket:
    cdef readonly uint64_t index
    cdef readonly object owner
    cdef readonly int outcome
    cdef object queue      # gets the ticket once its outcome is known


cdef class Awaited:
    # Invariants: tickets are in the order of their indexes; `least` is the first one's, NEVER where there is none.
    cdef list tickets
    cdef uint64_t least
    cdef int add(self, Ticket ticket) except -1
    cdef int find_least(self) except -1
    cdef int discard(self, Ticket ticket) except -1
    cdef void note_applied(self, uint64_t index) noexcept
    cdef void end_all(self, int outcome) noexcept
