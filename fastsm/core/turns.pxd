cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() noexcept


cdef class Place:
    cdef object gate             # a lock, released when this place gets the turn
    cdef unsigned long thread    # the thread that waits at the gate; 0: the keeper waits, or will
    cdef bint called             # it was given the turn
    cdef bint dropped            # it was withdrawn: its thread has closed the machine while it waited


cdef class Turns:
    # Invariants: a place waits only while `taken`; `taken` with `owner` 0: the keeper's turn, not begun yet.
    cdef bint taken
    cdef unsigned long owner     # the thread that has the turn
    cdef unsigned long borrower  # the thread that acts in the turn on the owner's behalf, or 0
    cdef Place called            # the place that has the turn, but whose thread has not resumed yet
    cdef list waiting            # places, in order
    cdef readonly size_t waiting_count
    cdef list amid               # threads in the middle of a sync or a commit; a thread may be in here more than once
    cdef size_t amid_count
    cdef unsigned long keeper    # the thread that serves the places that were taken for it
    cdef bint refusing           # `enqueue` raises from here on
    cdef list put_off            # (thread, function) pairs: the thread calls the function once it holds nothing
    cdef size_t put_off_count
    cdef int wait(self, check=*) except -1
    cdef int pass_on(self) except -1
    cdef int refuse_own(self, unsigned long thread) except -1
    cdef bint holds(self, unsigned long thread) except -1
    cdef bint is_amid(self, unsigned long thread) except -1
    cdef bint awaits(self, unsigned long thread) noexcept
    cdef int begin(self) except -1
    cdef int end(self) except -1
    cdef int do_what_was_put_off(self) except -1

    cdef inline int enter(self) except -1:
        """Takes the turn, after all earlier callers had it."""
        if self.taken or self.amid_count:
            self.wait()
        self.take()
        return 0

    cdef inline void take(self) noexcept:
        """Marks the turn as the caller's; it was free, or the caller has waited for it."""
        self.taken = True
        self.owner = PyThread_get_thread_ident()
        self.called = None

    cdef inline int leave(self) except -1:
        """Gives the turn to the place that has waited longest, if any."""
        self.owner = 0
        if self.waiting_count:
            self.pass_on()
        else:
            self.taken = False
        if self.put_off_count:
            self.do_what_was_put_off()
        return 0
