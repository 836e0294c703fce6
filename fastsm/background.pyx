"""A call on a thread of its own, beside whatever its caller goes on with."""

from cpython.pythread cimport PyThread_get_thread_ident

import os
from _thread import allocate_lock, start_new_thread

cdef extern from "Python.h":
    int PyThreadState_SetAsyncExc(unsigned long thread, object error)


cdef class BackgroundCall:
    """Runs `function()` on a new thread; raises `RuntimeError` where none can be had.

    `threading.Thread.start` waits for a thread that died for lack of memory for ever (CPython before 3.15). A thread
    that begins here needs no frame of Python code before its end is certain to be told.

    Thread safety: every method, from any thread.
    """
    cdef object function
    cdef object over         # locked until the end
    cdef object error
    cdef unsigned long thread
    cdef object process      # whose thread it is: a forked child has none

    def __cinit__(self, function):
        self.function = function
        self.over = allocate_lock()
        self.over.acquire()
        self.process = os.getpid()
        self.thread = start_new_thread(self, ())

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
        if self.process != os.getpid():
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

    def is_this_thread(self):
        """Whether it is the caller's own thread."""
        return self.thread == PyThread_get_thread_ident()
