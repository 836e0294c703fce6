cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() noexcept


cdef class Place:
    cdef object gate             # a lock, released when the turn is this place's
    cdef unsigned long thread    # that waits at the gate; 0: the keeper does, or will
    cdef bint called             # the turn was given to it
    cdef bint dropped            # it was taken back: its thread has closed the machine meanwhile


cdef class Turns:
    # Invariants: a place waits only while `taken`; `taken` with `owner` 0 is a turn of a keeper that has not begun yet.
    cdef bint taken
    cdef unsigned long owner     # the thread whose turn it is
    cdef unsigned long borrower  # the thread that acts in the turn for its owner, or 0
    cdef Place called            # it has the turn, but its thread has not gone on yet
    cdef list waiting            # places, in order
    cdef readonly size_t waiting_count
    cdef list amid               # threads amid a sync or a commit, once for each
    cdef size_t amid_count
    cdef unsigned long keeper    # the thread that serves the places that others took for it
    cdef bint refusing           # takes no more such places
    cdef list put_off            # (thread, function): what threads do once they hold nothing
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
        """Takes the turn, after everyone who came before."""
        if self.taken or self.amid_count:
            self.wait()
        self.take()
        return 0

    cdef inline void take(self) noexcept:
        """Notes that the turn is the caller's, for which it was free or had waited."""
        self.taken = True
        self.owner = PyThread_get_thread_ident()
        self.called = None

    cdef inline int leave(self) except -1:
        """Gives the turn to the thread that has waited longest."""
        self.owner = 0
        if self.waiting_count:
            self.pass_on()
        else:
            self.taken = False
        if self.put_off_count:
            self.do_what_was_put_off()
        return 0
