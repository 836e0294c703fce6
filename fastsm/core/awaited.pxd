from libc.stdint cimport uint64_t


cdef enum:  # the outcome of a ticket's wait
    WAITING = 0
    APPLIED = 1
    REPLACED = 2
    ENDED = 3
    POISONED = 4


cdef class Ticket:
    cdef readonly uint64_t index
    cdef readonly object owner
    cdef readonly int outcome
    cdef object queue      # receives the ticket once its outcome is known; None: the gate is released instead
    cdef object gate
    cdef uint64_t number   # of two tickets for the same index, the one with the lower number is told first
    cdef Py_ssize_t place  # its position in the heap; -1: not in it
    cdef int tell(self, int outcome) except -1
    cdef bint is_before(self, Ticket other) noexcept


cdef class Awaited:
    # Invariants: `tickets` is a binary heap; each ticket in it has its position in `place`; `least` is the index of
    # the first ticket, NEVER when there is none.
    cdef list tickets
    cdef uint64_t added
    cdef uint64_t least
    cdef int add(self, Ticket ticket) except -1
    cdef int rise(self, Ticket ticket, Py_ssize_t place) except -1
    cdef int sink(self, Ticket ticket, Py_ssize_t place) except -1
    cdef int put(self, Ticket ticket, Py_ssize_t place) except -1
    cdef int find_least(self) except -1
    cdef int discard(self, Ticket ticket) except -1
    cdef void note_applied(self, uint64_t index) noexcept
    cdef void end_all(self, int outcome) noexcept
