"""Those who wait for an entry to be applied: for reads that must not be older than an index.

Writers look at one number, the least index that is waited for. Where it is reached they tell the waiters, without
running Python code: a chunk that is applied can no longer fail. The tickets are a binary heap (J. W. J. Williams,
"Algorithm 232: Heapsort", CACM 1964), and each knows its place in it, so that a wait that ends early is found.
"""

from _thread import allocate_lock

cdef uint64_t NEVER = 0xFFFFFFFFFFFFFFFF


cdef class Ticket:
    """One wait for an index.

    When it is over `queue`, a `SimpleQueue`, gets the ticket; without a queue, a thread waits for it by `wait`. `owner`
    is the waiter's own.
    """

    def __cinit__(self, uint64_t index, queue, owner=None):
        self.index = index
        self.queue = queue
        self.owner = owner
        self.place = -1
        if queue is None:
            self.gate = allocate_lock()
            self.gate.acquire()

    def wait(self, timeout=-1):
        """Returns whether the wait was over within so many seconds (-1: without end). In one thread, once.

        The time that signal handlers take counts, too.
        """
        return self.gate.acquire(True, timeout)

    @property
    def is_applied(self):
        return self.outcome == APPLIED

    @property
    def is_replaced(self):
        return self.outcome == REPLACED

    @property
    def is_poisoned(self):
        return self.outcome == POISONED

    cdef int tell(self, int outcome) except -1:
        """Ends the wait. Only a queue can fail, for want of memory."""
        self.outcome = outcome
        if self.queue is None:
            self.gate.release()
        else:
            self.queue.put(self)
        return 0

    cdef bint is_before(self, Ticket other) noexcept:
        return self.index < other.index or (self.index == other.index and self.number < other.number)


cdef class Awaited:
    """All tickets of one state; adding, removing and telling one is O(log tickets). Thread safe, under the GIL."""

    def __cinit__(self):
        self.tickets = []
        self.least = NEVER

    cdef int add(self, Ticket ticket) except -1:
        self.tickets.append(ticket)
        self.added += 1
        ticket.number = self.added
        self.rise(ticket, len(self.tickets) - 1)
        self.find_least()
        return 0

    cdef int discard(self, Ticket ticket) except -1:
        """Forgets a ticket, if it is still there."""
        cdef Ticket last
        cdef Py_ssize_t place = ticket.place
        if place < 0:
            return 0
        last = self.tickets[len(self.tickets) - 1]
        del self.tickets[len(self.tickets) - 1]
        ticket.place = -1
        if last is not ticket:
            self.sink(last, place)
            self.rise(last, last.place)
        self.find_least()
        return 0

    cdef int rise(self, Ticket ticket, Py_ssize_t place) except -1:
        """Puts a ticket at a place, or above: after those that come before it."""
        cdef Ticket above
        while place > 0:
            above = self.tickets[(place - 1) >> 1]
            if not ticket.is_before(above):
                break
            self.put(above, place)
            place = (place - 1) >> 1
        return self.put(ticket, place)

    cdef int sink(self, Ticket ticket, Py_ssize_t place) except -1:
        """Puts a ticket at a place, or below: before those that come after it."""
        cdef Ticket below, other
        cdef Py_ssize_t at = 2 * place + 1
        while at < len(self.tickets):
            below = self.tickets[at]
            if at + 1 < len(self.tickets):
                other = self.tickets[at + 1]
                if other.is_before(below):
                    below = other
                    at += 1
            if ticket.is_before(below):
                break
            self.put(below, place)
            place = at
            at = 2 * place + 1
        return self.put(ticket, place)

    cdef int put(self, Ticket ticket, Py_ssize_t place) except -1:
        self.tickets[place] = ticket
        ticket.place = place
        return 0

    cdef int find_least(self) except -1:
        self.least = (<Ticket>self.tickets[0]).index if self.tickets else NEVER
        return 0

    cdef void note_applied(self, uint64_t index) noexcept:
        """Tells all who wait for an index up to this one. Where memory fails they are told after a later chunk."""
        cdef Ticket ticket
        while self.least <= index:
            ticket = self.tickets[0]
            self.discard(ticket)  # before the next step, which may collect, and so run a finalizer that comes here
            try:
                ticket.tell(APPLIED)
            except MemoryError:
                ticket.outcome = WAITING
                self.add(ticket)  # into the room that it left
                return

    cdef void end_all(self, int outcome) noexcept:
        """Tells everybody that the wait is over, for another reason."""
        cdef Ticket ticket
        while self.tickets:
            ticket = self.tickets[0]
            self.discard(ticket)
            try:
                ticket.tell(outcome)
            except MemoryError:
                pass

    def end_poisoned(self):
        """Tells everybody that nothing will be applied any more."""
        self.end_all(POISONED)
