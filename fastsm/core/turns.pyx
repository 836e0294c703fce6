"""One writer at a time, first come, first served; and no thread ever waits for itself.

A signal handler, a finalizer or a callback runs on top of whatever its thread is doing. If that is a write of the same
machine, another write would wait for a turn that only the interrupted frame can give back. So a thread that requests
the turn gets a `ReentryError`, before anything has changed, if that thread

- already has the turn, or waits for it;
- is in the middle of a sync or a commit, for which the owner of the turn may wait;
- serves earlier places of the queue.

Closing is never refused: see `step_aside`.
"""

import sys
from _thread import allocate_lock

from fastsm.errors import NotRunningError, ReentryError

CHECK_SECONDS = 0.05  # between two checks while waiting
CLOSED = "this state machine or log is closed: open the directory again"
ENDING = (
    "the interpreter is ending while another thread, which no longer runs, is in the middle of a write: nothing more "
    "can be written; the next opening recovers what is there")
REENTERED = (
    "this thread is in the middle of a call of the same object that writers have to wait for: a signal handler, a "
    "finalizer or a callback cannot write during that call. Nothing was done; try again after it")


cdef class Place:
    """A place in the queue of writers."""

    def __cinit__(self, unsigned long thread=0):
        self.gate = allocate_lock()
        self.gate.acquire()
        self.thread = thread


cdef class Turns:
    """A lock that is granted in order of arrival; a place can be taken now, and waited for later by the keeper thread.

    Under the GIL a flag suffices: taking a free turn costs two nanoseconds. Signal handlers run between any two steps
    of Python code, and finalizers whenever an object is made, so neither happens between a decision and what depends
    on it. Thread safe.
    """

    def __cinit__(self):
        self.waiting = []
        self.amid = []
        self.put_off = []

    def __enter__(self):
        self.enter()

    def __exit__(self, *exc_info):
        self.leave()

    cdef int wait(self, check=None) except -1:
        """Returns once the turn is the caller's: it is free, or was given to the caller, who must `take` it then.

        `check()` is called now and then during the wait; what it or a signal handler raises ends the wait.
        """
        cdef unsigned long thread = PyThread_get_thread_ident()
        cdef Place place
        self.refuse_own(thread)
        place = Place(thread)  # may run a finalizer, so it comes before the check of `taken`
        if not self.taken:
            return 0
        if sys.is_finalizing():
            raise NotRunningError(ENDING)
        self.waiting.append(place)
        self.waiting_count += 1
        try:
            while not place.gate.acquire(True, -1 if check is None else CHECK_SECONDS):
                check()  # on the main thread, signal handlers run between these calls
        except BaseException:
            if place.dropped:
                pass
            elif place.called:
                self.called = None
                self.leave()  # the turn had been given to us just before the exception
            else:
                self.waiting.remove(place)
                self.waiting_count -= 1
            raise
        if place.dropped:
            raise NotRunningError(CLOSED)
        return 0

    cdef int pass_on(self) except -1:
        cdef Place place = self.waiting[0]
        del self.waiting[0]
        self.waiting_count -= 1
        place.called = True
        self.called = place
        self.owner = place.thread or self.keeper
        place.gate.release()
        return 0

    def checking(self, check):
        """Returns a context manager that takes the turn, and calls `check` while it waits: see `wait`."""
        return Checking(self, check)

    # ---- a thread's own calls ----------------------------------------------------------------------------

    def check(self):
        """Raises `ReentryError` if `enter` would, for calls that do other work before they take the turn."""
        self.refuse_own(PyThread_get_thread_ident())

    cdef int refuse_own(self, unsigned long thread) except -1:
        if self.holds(thread) or self.awaits(thread):
            raise ReentryError(REENTERED)
        return 0

    cdef bint holds(self, unsigned long thread) except -1:
        if self.taken and (self.owner == thread or self.borrower == thread):
            return True
        return self.amid_count and self.is_amid(thread)

    cdef bint is_amid(self, unsigned long thread) except -1:
        return self.amid_count and thread in self.amid

    cdef bint awaits(self, unsigned long thread) noexcept:
        cdef Place place
        for place in self.waiting:
            if place.thread == thread or (place.thread == 0 and self.keeper == thread):
                return True
        return False

    def step_aside(self, function):
        """Returns True if this thread will call `function()`, a close, as soon as it holds nothing any more.

        Returns False if the caller may go on. In both cases, an interrupted call of this thread that waits for the turn
        gets a `NotRunningError`.
        """
        cdef unsigned long thread = PyThread_get_thread_ident()
        cdef Place place
        if thread == self.borrower:
            thread = self.owner
        entry = (thread, function)
        if self.called is not None and self.called.thread == thread:
            self.called.dropped = True
            self.called = None
            self.leave()
        for place in self.waiting:
            if place.thread == thread:
                place.dropped = True
                self.waiting.remove(place)
                self.waiting_count -= 1
                place.gate.release()
                break
        if not (self.holds(thread) or self.keeper == thread):
            return False
        for other, _ in self.put_off:
            if other == thread:
                return True
        self.put_off.append(entry)
        self.put_off_count += 1
        return True

    cdef int do_what_was_put_off(self) except -1:
        cdef unsigned long thread = PyThread_get_thread_ident()
        cdef Py_ssize_t i
        if self.holds(thread) or self.keeper == thread:
            return 0
        for i in range(len(self.put_off)):
            if self.put_off[i][0] == thread:
                _, function = self.put_off[i]
                del self.put_off[i]
                self.put_off_count -= 1
                function()
                return 0
        return 0

    # ---- syncs and commits -------------------------------------------------------------------------------

    cdef int begin(self) except -1:
        self.amid.append(PyThread_get_thread_ident())
        self.amid_count += 1
        return 0

    cdef int end(self) except -1:
        cdef unsigned long thread = PyThread_get_thread_ident()
        cdef Py_ssize_t i
        for i in range(len(self.amid)):  # allocates nothing, so it also works if there is no memory
            if <unsigned long>self.amid[i] == thread:
                del self.amid[i]
                break
        self.amid_count -= 1
        if self.put_off_count:
            self.do_what_was_put_off()
        return 0

    def waited_for(self):
        """Returns a context manager for work that writers may wait for: in it, this thread must not wait for them."""
        return WaitedFor(self)

    def lent(self, function):
        """Returns a call of `function` for another thread, which acts in the turn of the caller, who waits for it.

        What runs on top of it (such as a finalizer) is refused, and a close is put off, as on the caller's own thread.
        """
        return Lent(self, function)

    # ---- places for the keeper ---------------------------------------------------------------------------

    def keep(self):
        """Makes the calling thread the keeper, which serves the places that other threads take."""
        self.keeper = PyThread_get_thread_ident()

    def keep_no_more(self):
        """Ends the caller's role as the keeper, once all places are served."""
        self.keeper = 0
        if self.put_off_count:
            self.do_what_was_put_off()

    def refuse_places(self):
        """Makes `enqueue` raise from here on."""
        self.refusing = True

    def enqueue(self, Place place, deliver, job):
        """Takes a place for the keeper, and delivers its job by `deliver(job)`, which must not be Python code.

        No signal handler can interrupt this, so no place is taken that is not served.
        """
        if self.refusing:
            raise NotRunningError(CLOSED)
        if self.taken:
            self.waiting.append(place)
            self.waiting_count += 1
        else:
            self.taken = place.called = True
            self.owner = self.keeper
            place.gate.release()
        try:
            deliver(job)
        except BaseException:
            if place.called:
                self.leave()
            else:
                self.waiting.remove(place)
                self.waiting_count -= 1
            raise

    def serve(self, Place place):
        """Waits for a place's turn, which then belongs to the calling keeper."""
        place.gate.acquire()
        self.called = None
        self.owner = PyThread_get_thread_ident()

    def is_free(self):
        """Returns whether the turn can be taken without waiting."""
        return not self.taken


cdef class WaitedFor:
    """The context manager of `Turns.waited_for`."""
    cdef Turns turns

    def __cinit__(self, Turns turns):
        self.turns = turns

    def __enter__(self):
        self.turns.refuse_own(PyThread_get_thread_ident())
        self.turns.begin()

    def __exit__(self, *exc_info):
        self.turns.end()


cdef class Checking:
    """The context manager of `Turns.checking`."""
    cdef Turns turns
    cdef object check

    def __cinit__(self, Turns turns, check):
        self.turns = turns
        self.check = check

    def __enter__(self):
        if self.turns.taken or self.turns.amid_count:
            self.turns.wait(self.check)
        self.turns.take()

    def __exit__(self, *exc_info):
        self.turns.leave()


cdef class Lent:
    """The call that `Turns.lent` returns."""
    cdef Turns turns
    cdef object function

    def __cinit__(self, Turns turns, function):
        self.turns = turns
        self.function = function

    def __call__(self):
        self.turns.borrower = PyThread_get_thread_ident()
        try:
            return self.function()
        finally:
            self.turns.borrower = 0
