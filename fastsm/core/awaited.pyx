"""The queue of those who wait for an entry to be applied: for reads that must not be older than an index.

Writers look at one number, the least index that is waited for. Where it is reached they tell the waiters, without
running Python code: a chunk that is applied can no longer fail.
"""

cdef uint64_t NEVER = 0xFFFFFFFFFFFFFFFF


cdef class Ticket:
    """One wait for an index. `queue`, a `SimpleQueue`, gets the ticket when it is over; `owner` is the waiter's own."""

    def __cinit__(self, uint64_t index, queue, owner=None):
        self.index = index
        self.queue = queue
        self.owner = owner

    @property
    def is_applied(self):
        return self.outcome == APPLIED

    @property
    def is_replaced(self):
        return self.outcome == REPLACED


cdef class Awaited:
    """All tickets of one state. Thread safe, under the GIL."""

    def __cinit__(self):
        self.tickets = []
        self.least = NEVER

    cdef int add(self, Ticket ticket) except -1:
        cdef Ticket other
        cdef Py_ssize_t i = len(self.tickets)
        while i > 0:  # mostly the newest waits for the latest entry
            other = self.tickets[i - 1]
            if other.index <= ticket.index:
                break
            i -= 1
        self.tickets.insert(i, ticket)
        self.least = min(self.least, ticket.index)
        return 0

    cdef int discard(self, Ticket ticket) except -1:
        """Forgets a ticket, if it is still there."""
        cdef Py_ssize_t i
        for i in range(len(self.tickets)):
            if self.tickets[i] is ticket:
                del self.tickets[i]
                break
        self.find_least()
        return 0

    cdef int find_least(self) except -1:
        self.least = (<Ticket>self.tickets[0]).index if self.tickets else NEVER
        return 0

    cdef void note_applied(self, uint64_t index) noexcept:
        """Tells all who wait for an index up to this one. Where memory fails they are told after a later chunk."""
        cdef Ticket ticket
        while self.least <= index:
            ticket = self.tickets[0]
            del self.tickets[0]  # before the next step, which may collect, and so run a finalizer that comes here
            self.find_least()
            ticket.outcome = APPLIED
            try:
                ticket.queue.put(ticket)
            except MemoryError:
                self.tickets.insert(0, ticket)  # into the room that it left
                self.least = ticket.index
                return

    cdef void end_all(self, int outcome) noexcept:
        """Tells everybody that the wait is over, for another reason."""
        cdef Ticket ticket
        cdef list tickets = self.tickets
        self.tickets = []
        self.least = NEVER
        for ticket in tickets:
            ticket.outcome = outcome
            try:
                ticket.queue.put(ticket)
            except MemoryError:
                pass
