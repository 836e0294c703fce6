"""Calls on threads of their own: next to whatever their caller goes on with, or where no signal handler runs."""

from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport PyThread_get_thread_ident

import errno
import os
import sys
import threading
from _thread import allocate_lock, start_new_thread

from fastsm.errors import NotRunningError, StorageError

LOOK_SECONDS = 0.1    # between two looks at signals: one that another thread took does not wake the main thread

cdef extern from "Python.h":
    int PyThreadState_SetAsyncExc(unsigned long thread, object error)


cdef class BackgroundCall:
    """Runs `function()` on a new thread; raises `RuntimeError` where none can be had.

    `threading.Thread.start` waits for a thread that died for lack of memory for ever (CPython before 3.15). A thread
    that begins here needs no frame of Python code before its end is certain to be told.

    An interpreter that ends lets no other thread go on: it gets no new ones, and nobody waits for those it had.

    Thread safety: every method, from any thread.
    """
    cdef object function
    cdef object over         # locked until the end
    cdef object error
    cdef unsigned long thread
    cdef object process      # whose thread it is: a forked child has none

    def __cinit__(self, function, bint begins=True):
        self.function = function
        self.over = allocate_lock()
        self.over.acquire()
        self.process = os.getpid()
        if begins:
            self.begin()

    cdef int begin(self) except -1:
        if sys.is_finalizing():
            raise RuntimeError("the interpreter ends")  # as CPython says itself since 3.12
        self.thread = start_new_thread(self, ())
        return 0

    def __call__(self):
        self.thread = PyThread_get_thread_ident()
        try:
            self.function()
        except BaseException as error:
            self.error = error
        finally:
            self.function = None
            self.over.release()

    def wait(self, timeout=-1):
        """Whether it is over, after so many seconds at the latest (-1: no end). Raises what the call raised, once."""
        if self.process != os.getpid() or (sys.is_finalizing() and self.over.locked()):
            return True
        if not self.over.acquire(timeout=timeout):
            return False
        self.over.release()
        error, self.error = self.error, None
        if error is not None:
            raise error
        return True

    def interrupt(self):
        """Raises `KeyboardInterrupt` in the call, at its next step of Python code, unless it is over."""
        # A call that is over has unlocked it, under the GIL: so the thread is still there, and no other has its number.
        if self.over.locked():
            PyThreadState_SetAsyncExc(self.thread, KeyboardInterrupt)

    def is_of_this_process(self):
        """Whether it was started by this process, and not by the one that forked it."""
        return self.process == os.getpid()

    def is_this_thread(self):
        """Whether it is the caller's own thread."""
        return self.thread == PyThread_get_thread_ident()

    def is_excused(self, excuses):
        """Returns `excuses(thread)` for the number of its thread."""
        return excuses(self.thread)


def start(function):
    """Starts a thread that runs `function()`. Where none can be had it is a `StorageError`, and nothing was done."""
    try:
        return BackgroundCall(function)
    except RuntimeError as error:
        raise no_thread(error) from error


def no_thread(error):
    return StorageError(errno.EAGAIN, f"no thread can be started ({error}): nothing was done; try again", "")


cdef class LastingThread:
    """A thread that is started once, when it is first needed. Thread safe.

    Compiled: what a signal handler raises between the start and its note would have another one started next time.
    """
    cdef readonly BackgroundCall call  # None: not started

    def start(self, function):
        """Runs `function()` there, unless it was started. Raises as `start`; a later call tries again then."""
        cdef BackgroundCall call
        if self.call is not None:
            return
        call = BackgroundCall.__new__(BackgroundCall, function, False)
        if self.call is not None:  # a finalizer has started it meanwhile
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
        """`BackgroundCall.wait`; nobody waits where it was never started, or is the caller's own thread."""
        cdef BackgroundCall call = self.call
        return call is None or call.is_this_thread() or call.wait(timeout)


cdef class Outcome:
    """What a function comes to, on another thread."""
    cdef object function, value, error

    def __cinit__(self, function):
        self.function = function

    def __call__(self):
        try:
            self.value = self.function()
        except BaseException as error:
            self.error = error


def undisturbed(function, interrupt=None, bint needs_thread=True):
    """Returns what `function()` returns. No signal handler runs within it: in the main thread it gets another one.

    Handlers run on top of this call meanwhile. What the first one raises is raised at the end, in place of the
    function's own outcome; `interrupt(call)` is told at once. Without `needs_thread` it runs here where no thread can
    be had; with it that is a `StorageError`, and nothing was done. An interpreter that ends runs no handlers.
    """
    cdef Outcome outcome
    if PyThread_get_thread_ident() != threading.main_thread().ident or sys.is_finalizing():
        return function()
    outcome = Outcome(function)
    try:
        call = start(outcome)
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
                interrupt(call)
    error, outcome.error = outcome.error, None
    if not call.is_of_this_process():
        error = NotRunningError("this is a forked child: the call goes on in its parent")
    if interruption is not None:  # a forked child, too, sees what its handler raised: `sys.exit` has to end it
        raise interruption from error
    if error is not None:
        raise error
    return outcome.value
