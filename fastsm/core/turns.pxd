cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() noexcept


cdef class Turns:
    # Invariant: somebody waits only while `taken`.
    cdef bint taken
    cdef unsigned long owner     # the thread whose turn it is, 0 while it is handed over
    cdef object waiting          # the locks of those who wait, in order
    cdef object waiters          # the threads that wait
    cdef size_t waiting_count
    cdef int pass_on(self) except -1

    cdef inline int enter(self) except -1:
        """Takes the turn, after everyone who came before."""
        if self.taken:
            self.wait()
        self.taken = True
        self.owner = PyThread_get_thread_ident()
        return 0

    cdef inline bint try_enter(self) noexcept:
        """Takes the turn if it is nobody's."""
        if self.taken:
            return False
        self.taken = True
        self.owner = PyThread_get_thread_ident()
        return True

    cdef inline int leave(self) except -1:
        """Gives the turn to whoever has waited longest."""
        self.owner = 0
        if self.waiting_count:
            self.pass_on()
        else:
            self.taken = False
        return 0
