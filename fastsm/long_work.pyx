"""Long work, which takes the GIL a fixed number of times however long it is.

Next to a thread that computes, each time that the GIL is taken back costs up to 5 ms (`sys.getswitchinterval`). So long
work does not come back between its pieces: it runs on a thread of its own, mostly in one call of C code, while its
caller waits in steps of WAIT_SECONDS, serves signals, tells of progress, and passes on what ends it from outside.

Short work is done at once by its caller, who comes back between the pieces: a thread would cost more than it saves.
"""

from cpython.exc cimport PyErr_CheckSignals

from fastsm.background import BackgroundCall
from fastsm.errors import NotRunningError

WAIT_SECONDS = 0.1
SHORT_BYTES = 8 << 20     # less is done at once: some milliseconds


class Stopped(Exception):
    """The caller of this work wants it to end. Seen by nobody else."""


def no_tick(done=0):
    """For work that only signals end."""


cdef class Work:
    """One piece of long work, as the code that does it sees it.

    C code asks `goes_on` at each piece; whatever has the GIL calls the work itself, `work(done)`, between its pieces,
    which raises when the work has to end. Thread safety: one thread works, another one waits.
    """

    def __cinit__(self, tick=None):
        self.tick = tick

    def __call__(self, done=0):
        """Between two pieces; raises when the work has to end."""
        self.takes += 1
        if done > self.done:
            self.done = done
        if self.tick is not None:
            PyErr_CheckSignals()
            if done:
                self.tick(done)
            else:
                self.tick()
        elif self.stopped:
            raise Stopped


cdef class Aside:
    """Work on a thread of its own."""
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
        """Returns what the work returned, or raises what it raised, or what ended it, when it is over."""
        interruption = None
        while True:
            try:
                if call.wait(WAIT_SECONDS):
                    break
                PyErr_CheckSignals()
                if interruption is None:
                    tick(self.work.done)
            except BaseException as error:
                self.work.stopped = True
                if interruption is None:
                    interruption = error
        error, self.error = self.error, None
        if interruption is not None:
            raise interruption
        if error is not None:
            raise error
        if not self.over:  # a tick has forked: this is the child, the thread that works is its parent's
            tick(self.work.done)
            raise NotRunningError("this work is that of the process that this one was forked from")
        tick(self.work.done)
        return self.result


def run_long(function, tick, size):
    """Returns `function(work)`, whose work is of about `size` bytes.

    `tick(done)` is called now and then, on the caller's thread, and may raise: then the work ends, and that is raised
    when it is over. `done` is what the work told last.
    """
    cdef Aside aside
    if size >= SHORT_BYTES:
        aside = Aside(function)
        try:
            call = BackgroundCall(aside)
        except RuntimeError:  # no thread can be had
            pass
        else:
            return aside.wait(call, tick)
    return function(Work(tick))
