"""Long work that takes the GIL a fixed number of times, however long it is.

While another thread computes, taking the GIL costs up to 5 ms (`sys.getswitchinterval`). So long work does not take it
between its pieces: it runs on a thread of its own, mostly in one call of C code, while its caller waits in steps of
WAIT_SECONDS, serves signals, reports progress, and passes on requests to stop.

Short work is done directly by its caller, which takes the GIL between pieces: a thread would cost more than it saves.
"""

from cpython.exc cimport PyErr_CheckSignals

from fastsm.background import BackgroundCall
from fastsm.errors import NotRunningError

WAIT_SECONDS = 0.1
SHORT_BYTES = 8 << 20     # less is done directly: a few milliseconds


class Stopped(Exception):
    """The caller of this work has told it to end. Never leaves this module."""


def no_tick(done=0):
    """Does nothing: the `tick` of work that only a signal handler can end."""


cdef class Work:
    """One piece of long work, as used by the code that does it.

    C code calls `goes_on` between pieces; code that has the GIL calls the work itself, `work(done)`, which raises if
    the work must end. Thread safety: one thread works, another one waits.
    """

    def __cinit__(self, tick=None):
        self.tick = tick

    def __call__(self, done=0):
        """Reports progress between two pieces; raises if the work must end."""
        self.takes += 1
        if done > self.done:
            store_done(&self.done, done)
        if self.tick is not None:
            PyErr_CheckSignals()
            if done:
                self.tick(done)
            else:
                self.tick()
        elif load_stopped(&self.stopped):
            raise Stopped


cdef class Aside:
    """Work that runs on a thread of its own."""
    cdef object function
    cdef Work work
    cdef object result, error
    cdef bint over

    def __cinit__(self, function):
        self.function = function
        self.work = Work()

    def __call__(self):
        try:
            self.result = self.function(self.work)
        except BaseException as error:
            self.error = error
        self.function = None
        self.over = True

    def wait(self, call, tick):
        """Waits for the end; returns what the work returned, or raises what it raised or what has ended it early."""
        interruption = None
        while True:
            try:
                if call.wait(WAIT_SECONDS):
                    break
                PyErr_CheckSignals()
                if interruption is None:
                    tick(load_done(&self.work.done))
            except BaseException as error:
                store_stopped(&self.work.stopped, True)
                if interruption is None:
                    interruption = error
                with nogil:  # without memory, every wait may fail immediately
                    pass
        error, self.error = self.error, None
        if interruption is not None:
            raise interruption
        if error is not None:
            raise error
        if not self.over:  # a tick has forked: this is the child, and the working thread exists only in the parent
            tick(load_done(&self.work.done))
            raise NotRunningError("this work belongs to the process from which this one was forked")
        tick(load_done(&self.work.done))
        return self.result


def run_long(function, tick, size):
    """Returns `function(work)`, which processes about `size` bytes.

    `tick(done)` is called now and then on the caller's thread, and may raise: then the work ends, and the exception is
    raised once it has ended. `done` is what the work reported last.
    """
    cdef Aside aside
    if size >= SHORT_BYTES:
        aside = Aside(function)
        try:
            call = BackgroundCall(aside)
        except RuntimeError:  # no thread can be started
            pass
        else:
            return aside.wait(call, tick)
    return function(Work(tick))
