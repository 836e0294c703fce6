"""One writer at a time, first come, first served; and no thread that waits for itself.

A signal handler, a finalizer or a callback runs on top of whatever its thread is doing. When that is a write of the
same machine, a second write would wait for a turn that only the frame below it can give back. So a thread that asks for
the turn is refused with `ReentryError`, before anything has changed, while its own thread

- has the turn, or waits for it;
- is amid a sync or a commit, for which the holder of the turn may wait;
- serves places of the order that come before.

Closing is never refused: see `step_aside`.
"""

import sys
from _thread import allocate_lock

from fastsm.errors import NotRunningError, ReentryError

CHECK_SECONDS = 0.05  # between two checks while waiting
CLOSED = "this state machine or log is closed: open the directory again"
ENDING = (
    "the interpreter ends while another thread, which does not go on, is in the middle of a write: nothing more is "
    "written; the next opening reads what is there")
REENTERED = (
    "this thread is in the middle of a call of the same object that holds its writers up, or waits for them: a "
    "signal handler, a finalizer or a callback cannot write then. Nothing was done; do it after that call")


cdef class Place:
    """A place in the order of writers."""

    def __cinit__(self, unsigned long thread=0):
        self.gate = allocate_lock()
        self.gate.acquire()
        self.thread = thread


cdef class Turns:
    """A lock in order of arrival, whose place can be taken now and waited for later, by another thread: the keeper.

    Under the GIL a flag is enough: taking a free turn costs two nanoseconds. Signal handlers run between any two steps
    of Python code, and finalizers wherever an object is made; so a decision and what follows from it stand together,
    with nothing of either kind between. Thread safe.
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
        """Returns when the turn is the caller's: free, or given to it. The caller takes note of that at once.

        `check()` is called now and then meanwhile; what it raises ends the waiting, as what a signal handler raises.
        """
        cdef unsigned long thread = PyThread_get_thread_ident()
        cdef Place place
        self.refuse_own(thread)
        place = Place(thread)  # a collection may run a finalizer here: so the turn is looked at only now
        if not self.taken:
            return 0
        if sys.is_finalizing():
            raise NotRunningError(ENDING)
        self.waiting.append(place)
        self.waiting_count += 1
        try:
            while not place.gate.acquire(True, -1 if check is None else CHECK_SECONDS):
                check()  # in the main thread, signal handlers run in between
        except BaseException:
            if place.dropped:
                pass
            elif place.called:
                self.called = None
                self.leave()  # it was given to us just before the interruption
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
        """A context like the turns themselves, for a wait that something else may have to end: see `wait`."""
        return Checking(self, check)

    # ---- a thread's own calls ----------------------------------------------------------------------------

    def check(self):
        """Raises `ReentryError` where `enter` would, for calls that take the turn only after other work."""
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
        """For closing. True: `function()` will be called by this thread as soon as it holds nothing any more.

        False: it may go on. If the frame below waits for its turn, it gets a `NotRunningError` in its place.
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
        for i in range(len(self.amid)):  # nothing is made: it ends also without memory
            if <unsigned long>self.amid[i] == thread:
                del self.amid[i]
                break
        self.amid_count -= 1
        if self.put_off_count:
            self.do_what_was_put_off()
        return 0

    def waited_for(self):
        """A context: while this thread is in it, writers may wait for it, so that it must not wait for them."""
        return WaitedFor(self)

    def lent(self, function):
        """`function` for another thread, which acts in the turn of the caller, who waits for it.

        What runs on top of it there (a finalizer) is refused, and a close put off, as in the caller's own thread.
        """
        return Lent(self, function)

    # ---- places for the keeper ---------------------------------------------------------------------------

    def keep(self):
        """The caller's thread serves the places that others take, from here on."""
        self.keeper = PyThread_get_thread_ident()

    def keep_no_more(self):
        """Ends that, when all of them are served."""
        self.keeper = 0
        if self.put_off_count:
            self.do_what_was_put_off()

    def refuse_places(self):
        """No more places are taken for the keeper."""
        self.refusing = True

    def enqueue(self, Place place, deliver, job):
        """Takes a place for the keeper, and hands the job for it over by `deliver(job)`, which is no Python code.

        In one step, which no signal handler interrupts: no place is ever taken that nobody serves.
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
        """Waits for a place's turn, which is the calling keeper's then."""
        place.gate.acquire()
        self.called = None
        self.owner = PyThread_get_thread_ident()

    def is_free(self):
        """Whether taking the turn would take no time."""
        return not self.taken


cdef class WaitedFor:
    """The context of `Turns.waited_for`."""
    cdef Turns turns

    def __cinit__(self, Turns turns):
        self.turns = turns

    def __enter__(self):
        self.turns.refuse_own(PyThread_get_thread_ident())
        self.turns.begin()

    def __exit__(self, *exc_info):
        self.turns.end()


cdef class Checking:
    """The context of `Turns.checking`."""
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
    """What `Turns.lent` returns."""
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
