"""One writer at a time, first come, first served."""

import collections
import threading

from fastsm.errors import NotRunningError, ReentryError


cdef class Turns:
    """A lock in order of arrival, whose place can be taken now and waited for later, by another thread.

    Under the GIL a flag is enough: taking a free turn costs two nanoseconds.
    """

    def __cinit__(self):
        self.waiting = collections.deque()
        self.waiters = []

    def is_here(self):
        """Whether this very thread has the turn, or waits for it: then it is a handler that interrupted a write."""
        cdef unsigned long thread = PyThread_get_thread_ident()
        return (self.taken and self.owner == thread) or thread in self.waiters

    def forget(self):
        """In a forked child: nobody has the turn, and nobody waits. They were threads of the parent."""
        self.waiting = collections.deque()
        self.waiters = []
        self.waiting_count = 0
        self.taken = False
        self.owner = 0

    def __enter__(self):
        self.enter()

    def __exit__(self, *exc_info):
        self.leave()

    def wait(self):
        if self.is_here():
            raise ReentryError(
                "this call interrupted a write of its own thread, and would wait for it for ever: expected signal "
                "handlers, finalizers and callbacks to leave writes to the code that they interrupt")
        turn = self.reserve()
        if turn is None:
            return
        thread = PyThread_get_thread_ident()
        try:
            self.waiters.append(thread)
            try:
                turn.acquire()  # in the main thread, signal handlers run meanwhile
            finally:
                self.waiters.remove(thread)
        except BaseException:
            try:
                self.waiting.remove(turn)
                self.waiting_count -= 1
            except ValueError:
                self.leave()  # it was given to us just before the interruption
            raise

    cdef int pass_on(self) except -1:
        self.waiting_count -= 1
        self.waiting.popleft().release()
        return 0

    def reserve(self):
        """A place in the order, taken now: None when it is the caller's turn already, else a lock to wait on."""
        # First of all: making a lock may run the collector, and finalizers, while others come and go.
        turn = threading.Lock()
        turn.acquire()
        if not self.taken:
            self.taken = True
            return None
        self.waiting.append(turn)
        self.waiting_count += 1
        return turn

    def enqueue(self, worker, job):
        """Takes a place for a worker's job, and hands it over: in one step, which no signal handler interrupts."""
        if worker.closed:
            raise NotRunningError("this state machine is closed: open the directory again")
        job.turn = self.reserve()
        worker.jobs.append(job)
        job.doomed_by = worker.failed
        worker.queue.put(job)

    def own(self):
        """This thread has the reserved turn now."""
        self.owner = PyThread_get_thread_ident()
