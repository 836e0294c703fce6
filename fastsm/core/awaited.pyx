"""Tickets of callers that wait for an entry to be applied, so that they do not read a state older than an index.

Writers check a single number, the least index that any ticket waits for. Once that index is applied they tell the
waiting callers, without running Python code, because a chunk that was applied can no longer fail. The tickets form a
binary heap (J. W. J. Williams, "Algorithm 232: Heapsort", CACM 1964), and each ticket stores its position in the heap,
so a wait that ends early can be removed.
"""

from _thread import allocate_lock

from fastsm.background import pause_for_memory

cdef uint64_t NEVER = 0xFFFFFFFFFFFFFFFF


cdef class Ticket:
    """One wait for an index.

    When the wait is over, `queue` (a `SimpleQueue`) receives the ticket. Without a queue, one thread waits by calling
    `wait`. `owner` is for the caller's own use.
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
        """Returns whether the wait ended within `timeout` seconds (-1: no limit). To be called once, by one thread.

        The time that signal handlers take is included.
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
        """Ends the wait. Only putting the ticket into a queue can fail, when there is no memory."""
        self.outcome = outcome
        if self.queue is None:
            self.gate.release()
        else:
            self.queue.put(self)
        return 0

    cdef bint is_before(self, Ticket other) noexcept:
        return self.index < other.index or (self.index == other.index and self.number < other.number)


cdef class Awaited:
    """All tickets of one state; adding, removing and telling a ticket is O(log tickets). Thread safe, under the GIL."""

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
        """Removes a ticket, if it is still in the heap."""
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
        """Puts a ticket at a place of the heap, or as far above as its order requires."""
        cdef Ticket above
        while place > 0:
            above = self.tickets[(place - 1) >> 1]
            if not ticket.is_before(above):
                break
            self.put(above, place)
            place = (place - 1) >> 1
        return self.put(ticket, place)

    cdef int sink(self, Ticket ticket, Py_ssize_t place) except -1:
        """Puts a ticket at a place of the heap, or as far below as its order requires."""
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
        """Tells all tickets that wait for an index up to this one. If memory runs out, a later call tells the rest."""
        cdef Ticket ticket
        while self.least <= index:
            ticket = self.tickets[0]
            self.discard(ticket)  # first: telling may collect garbage, and so run a finalizer that calls this again
            try:
                ticket.tell(APPLIED)
            except MemoryError:
                ticket.outcome = WAITING
                self.add(ticket)  # needs no memory: its room is still there
                return

    cdef void end_all(self, int outcome) noexcept:
        """Ends all waits with an outcome other than "applied". None is left out, since no later call would tell it."""
        cdef Ticket ticket
        cdef bint told
        while self.tickets:
            ticket = self.tickets[0]
            self.discard(ticket)
            told = False
            while not told:
                try:
                    ticket.tell(outcome)
                    told = True
                except MemoryError:
                    pause_for_memory()

    def end_poisoned(self):
        """Ends all waits because nothing more will be applied."""
        self.end_all(POISONED)
