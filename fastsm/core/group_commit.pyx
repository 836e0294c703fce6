"""Group commit: overlapping flushes share one sync.

Compiled, because signal handlers run between any two steps of Python code, and one that raises there (Ctrl-C
does) must not leave a flag set or a lock held. Between two steps of C code none runs.
"""

import threading

from libc.stdint cimport uint64_t

from fastsm.generation.log cimport Log

from fastsm.errors import ReentryError


cdef class GroupCommit:
    """Makes a log durable up to an offset, with as few syncs as overlapping callers allow.

    The first caller syncs, outside the GIL. Whoever comes meanwhile waits, and syncs only if that sync began
    too early for it. (DeWitt et al., "Implementation Techniques for Main Memory Database Systems", SIGMOD 1984.)
    Thread safe.
    """

    def __cinit__(self, Log log):
        self.log = log
        self.waiting = []
        self.waiters = []

    def sync_up_to(self, uint64_t offset):
        """Returns once the log is durable up to `offset`; raises `StorageError` when that failed."""
        if self.is_here():
            raise ReentryError(
                "this call interrupted a sync of its own thread, and would wait for it for ever: expected signal "
                "handlers, finalizers and callbacks to leave flushes to the code that they interrupt")
        while self.syncing and not self.closed:
            self.wait()
            if self.log.durable >= offset:
                return
        if self.closed:
            return  # whoever closes has synced everything, or raises the error itself
        self.syncing = True
        self.owner = PyThread_get_thread_ident()
        try:
            self.log.sync()
        finally:
            self.syncing = False
            self.owner = 0
            self.wake()

    def is_here(self):
        """Whether this very thread syncs, or waits for a sync: then it is a handler that interrupted it."""
        cdef unsigned long thread = PyThread_get_thread_ident()
        return (self.syncing and self.owner == thread) or thread in self.waiters

    def close(self):
        """Waits for a sync under way; afterwards there are none."""
        self.closed = True
        while self.syncing:
            self.wait()
        self.wake()

    cdef int wait(self) except -1:
        """Until a sync ends. In the main thread, signal handlers run meanwhile, and may raise."""
        thread = PyThread_get_thread_ident()
        turn = threading.Lock()
        turn.acquire()
        self.waiting.append(turn)
        self.waiters.append(thread)
        try:
            # Looked at once more: a handler may have run above, and the sync may have ended meanwhile.
            if self.syncing:
                turn.acquire()
        finally:
            self.waiters.remove(thread)
            if turn in self.waiting:
                self.waiting.remove(turn)
        return 0

    cdef int wake(self) except -1:
        waiting, self.waiting = self.waiting, []
        for turn in waiting:
            turn.release()
        return 0
