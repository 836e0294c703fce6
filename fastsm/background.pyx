"""Calls on threads of their own: concurrent with the caller's work, or where no signal handler can interrupt them."""

from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport PyThread_get_thread_ident
from posix.unistd cimport getpid, usleep

import errno
import sys
import threading
from _thread import allocate_lock, start_new_thread

from fastsm.errors import NotRunningError, StorageError

LOOK_SECONDS = 0.1    # between two checks for signals: a signal sent to another thread does not wake the main thread
IDLE_SECONDS = 0.1    # after which a kept thread that was given nothing to do ends

cdef enum:
    NO_MEMORY_PAUSE = 1000    # microseconds until work that had no memory is tried again

cdef extern from "Python.h":
    int PyThreadState_SetAsyncExc(unsigned long thread, object error)


cdef class KeptThread


cdef class BackgroundCall:
    """Runs `function()` on a new thread; raises `RuntimeError` if none can be started.

    `threading.Thread.start` waits forever for a thread that died for lack of memory (CPython before 3.15). A thread
    started here runs compiled code, without a Python frame, until its end is certain to be reported.

    While an interpreter is ending, no other thread runs: no new threads are started, and existing ones are not waited
    for.

    Thread safety: every method, from any thread.
    """
    cdef object function
    cdef object over         # locked until the end
    cdef object error
    cdef unsigned long thread
    cdef int process         # the process of the thread: a forked child has no such thread
    cdef bint interrupted
    cdef bint ending         # too late to interrupt
    cdef KeptThread keeper   # None: a thread of its own

    def __cinit__(self, function, bint begins=True):
        self.function = function
        self.over = allocate_lock()
        self.over.acquire()
        self.process = getpid()
        if begins:
            self.begin()

    cdef int begin(self) except -1:
        if sys.is_finalizing():
            raise RuntimeError("can't create new thread at interpreter shutdown")  # the message as CPython's since 3.12
        try:
            self.thread = start_new_thread(self if self.keeper is None else self.keeper, ())
        except BaseException:
            self.function = None  # a thread may have been started, but there was no memory for its number
            raise
        return 0

    def __call__(self):
        self.thread = PyThread_get_thread_ident()
        try:
            if self.function is not None:
                self.function()
        except BaseException as error:
            self.error = error
        finally:
            self.function = None
            self.ending = True
            if self.interrupted:
                take_interruption()
            # No other thread runs until the release, so whoever sees the end can hand over the next call.
            if self.keeper is not None:
                self.keeper.call = None
            self.over.release()

    def wait(self, timeout=-1):
        """Returns whether the call is over, after at most `timeout` seconds (-1: no limit). Raises its error, once."""
        if self.process != getpid() or (sys.is_finalizing() and self.over.locked()):
            return True
        if not self.over.acquire(True, timeout):
            return False
        self.over.release()
        error, self.error = self.error, None
        if error is not None:
            raise error
        return True

    def interrupt(self):
        """Raises `KeyboardInterrupt` in the call, at its next step of Python code, unless it is over."""
        # A call sets and unlocks these under the GIL: so the thread still exists, and its number is not reused.
        if self.over.locked() and not self.ending:
            self.interrupted = True
            PyThreadState_SetAsyncExc(self.thread, KeyboardInterrupt)

    def is_of_this_process(self):
        """Returns whether it was started by this process, rather than by the process that forked it."""
        return self.process == getpid()

    def is_this_thread(self):
        """Returns whether it runs on the calling thread."""
        return self.thread == PyThread_get_thread_ident()

    def is_excused(self, excuses):
        """Returns the result of `excuses(thread)`, where `thread` is the number of this call's thread."""
        return excuses(self.thread)


cdef object python_step = eval("lambda: None")  # compiled code takes no interruption


cdef int take_interruption() except -1:
    """Takes an interruption that came too late for its call.

    If it stayed pending, it would interrupt the thread's next call. If the thread ended with it, CPython 3.11 would
    look for it at every call of a Python function, in all threads; under a profile function, that call would hang.
    """
    try:
        python_step()
    except BaseException:  # also without memory, or if a profile function raises: the call's end must still be reported
        pass
    return 0


cdef class KeptThread:
    """A thread for one call after another, which ends when none has come for IDLE_SECONDS.

    Starting a thread for each call takes five times as long.

    Thread safety: calls are handed over by the main thread alone.
    """
    cdef BackgroundCall call    # under way, or handed over; None: the thread is idle
    cdef object wakes           # locked, except between the hand-over of a call and its start
    cdef unsigned long thread
    cdef int process
    cdef bint ends
    cdef KeptThread older       # one that was busy when this one was started

    def __cinit__(self):
        self.wakes = allocate_lock()
        self.wakes.acquire()

    cdef int begin(self, BackgroundCall call) except -1:
        """Starts the thread with its first call. Raises `RuntimeError` if none can be started."""
        self.call, call.keeper, self.process = call, self, call.process
        call.begin()
        self.thread = call.thread
        return 0

    cdef bint takes(self, BackgroundCall call) except -1:
        """Hands a call over, unless the thread is busy, has ended, or is another process's. Returns whether it did."""
        if self.ends or self.call is not None or self.process != call.process:
            return False
        self.call, call.keeper, call.thread = call, self, self.thread
        self.wakes.release()
        return True

    def __call__(self):
        cdef BackgroundCall call = self.call
        while call is not None:
            call()
            call = None  # dropped before the wait
            call = self.next_call()
        self.ends = True  # no other thread ran since the last look at `call`

    cdef BackgroundCall next_call(self):
        """Waits for the next call; returns None if none comes, or if there is no memory to wait."""
        try:
            # In a forked child, no call ever comes.
            if self.process == getpid() and self.wakes.acquire(True, IDLE_SECONDS):
                return self.call
        except MemoryError:
            pass
        if self.call is not None:  # handed over just then
            self.wakes.acquire()
        return self.call


cdef KeptThread kept = None


cdef BackgroundCall start_kept(function):
    """Runs `function()` like `start`, on the kept thread. For the main thread alone."""
    global kept
    cdef BackgroundCall call
    cdef KeptThread thread
    try:
        call = BackgroundCall.__new__(BackgroundCall, function, False)
        if kept is not None and kept.takes(call):
            return call
        thread = KeptThread.__new__(KeptThread)
        thread.begin(call)
    except RuntimeError as error:
        raise no_thread(error) from error
    thread.older, kept = kept, thread
    while thread.older is not None and thread.older.ends:
        thread.older = thread.older.older
    return call


cdef bint is_kept(unsigned long ident) noexcept:
    """Returns whether this is a kept thread, whose calls can be interrupted."""
    cdef KeptThread thread = kept
    while thread is not None and (thread.thread != ident or thread.ends):
        thread = thread.older
    return thread is not None


def start(function):
    """Starts a thread that runs `function()`. Raises `StorageError`, with nothing done, if no thread can be started."""
    try:
        return BackgroundCall(function)
    except RuntimeError as error:
        raise no_thread(error) from error


def pause_for_memory():
    """Lets other threads run, and free memory, before something is tried again. Needs no memory itself."""
    with nogil:
        usleep(NO_MEMORY_PAUSE)


def until_done(function):
    """Returns the result of `function()`, which is called again, after a pause, whenever it raises `MemoryError`.

    For threads that others wait for: a thread that ended for lack of memory would never tell them. Compiled, because a
    Python function that handles a `MemoryError` may itself find no memory to run in.
    """
    while True:
        try:
            return function()
        except MemoryError:
            pass
        pause_for_memory()


def no_thread(error):
    return StorageError(errno.EAGAIN, f"no thread can be started ({error}): nothing was done; try again", "")


cdef class LastingThread:
    """A thread that is started once, when it is first needed. Thread safe.

    Compiled, because if a signal handler raised between starting and recording the thread, another would be started.
    """
    cdef readonly BackgroundCall call  # None: not started

    def start(self, function):
        """Runs `function()` on the thread, unless it was started. Raises like `start`; a later call tries again."""
        cdef BackgroundCall call
        if self.call is not None:
            return
        call = BackgroundCall.__new__(BackgroundCall, function, False)
        if self.call is not None:  # a finalizer may have started it during the allocation
            return
        self.call = call
        try:
            call.begin()
        except BaseException as error:
            self.call = None
            if isinstance(error, RuntimeError):
                raise no_thread(error) from error
            raise

    def wait(self, timeout=-1):
        """Waits like `BackgroundCall.wait`; returns immediately if it was never started, or is the calling thread."""
        cdef BackgroundCall call = self.call
        return call is None or call.is_this_thread() or call.wait(timeout)


cdef class Outcome:
    """The outcome of a function that runs on another thread, where calling this object calls the function, once."""
    cdef object function
    cdef readonly object value, error

    def __cinit__(self, function):
        self.function = function

    @property
    def begun(self):
        """Whether the function was called."""
        return self.function is None

    def __call__(self):
        function, self.function = self.function, None
        if function is None:
            return
        try:
            self.value = function()
        except BaseException as error:
            self.error = error


def undisturbed(function, interrupt=None, bint needs_thread=True, bint often=False):
    """Returns what `function()` returns. No signal handler interrupts it: on the main thread, another thread runs it.

    The same is done on a kept thread, which a handler's exception could interrupt. Handlers run while this call waits.
    What the first one raises is raised at the end, in place of the function's own outcome; `interrupt(call)` is called
    as soon as it was raised. Without `needs_thread`, the function runs here if no thread can be had; with it, that is a
    `StorageError`, and nothing is done. `often` keeps the thread for the next such call.
    An interpreter that is ending runs no handlers.
    """
    cdef Outcome outcome
    cdef BackgroundCall call
    cdef unsigned long ident = PyThread_get_thread_ident()
    if sys.is_finalizing() or not (ident == threading.main_thread().ident or is_kept(ident)):
        return function()
    outcome = Outcome(function)
    try:
        call = start_kept(outcome) if often else start(outcome)
    except (StorageError, MemoryError):
        if needs_thread:
            raise
        return function()
    interruption = None
    while True:
        try:
            if call.wait(LOOK_SECONDS):
                break
            PyErr_CheckSignals()
        except BaseException as error:
            interruption = error if interruption is None else interruption
            if interrupt is not None:
                try:
                    interrupt(call)
                except MemoryError:  # leaving now, while the call goes on, would be worse than not to interrupt it
                    pass
            if not call.over.locked():
                break
            with nogil:  # without memory, every wait may fail immediately
                pass
    error, outcome.error = outcome.error, None
    if not call.is_of_this_process():
        error = NotRunningError("this is a forked child: the call goes on in its parent")
    if interruption is not None:  # even in a forked child, what its handler raised must take effect: `sys.exit` ends it
        if error is None or interruption.__cause__ is not None:  # the handler's own cause
            raise interruption
        raise interruption from error
    if error is not None:
        raise error
    return outcome.value
