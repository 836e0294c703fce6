"""Group commit: overlapping flushes share one sync.

Compiled, because signal handlers run between any two steps of Python code, and one that raises there (as Ctrl-C does)
must not leave a flag set or a lock held. No handler runs between two steps of C code.
"""

import sys
from _thread import allocate_lock

from libc.stdint cimport uint64_t

from fastsm.core.turns cimport PyThread_get_thread_ident, Turns
from fastsm.generation.framefile cimport FrameFile

from fastsm.core.turns import ENDING, REENTERED
from fastsm.errors import NotRunningError, ReentryError


cdef class GroupCommit:
    """Makes a log durable up to an offset, with as few syncs as overlapping callers allow.

    The first caller syncs, without the GIL. A caller that arrives during the sync waits, and syncs only if the running
    sync began too early to cover its offset. (DeWitt et al., "Implementation Techniques for Main Memory Database
    Systems", SIGMOD 1984.) Thread safe.
    """

    def __cinit__(self, FrameFile log, Turns turns):
        self.log = log
        self.turns = turns
        self.waiting = []

    def sync_up_to(self, uint64_t offset):
        """Returns once the log is durable up to `offset`; raises `StorageError` if the sync failed.

        Raises `ReentryError` if called on top of a sync by the same thread.
        """
        if self.turns.is_amid(PyThread_get_thread_ident()):
            raise ReentryError(REENTERED)
        while self.syncing and not self.closed:
            self.wait()
            if self.log.durable >= offset:
                return
        if self.closed:
            return  # the closing thread has synced everything, or raises the error itself
        if self.log.durable >= offset and not self.log.failed:
            return
        self.turns.begin()
        self.syncing = True
        try:
            self.log.sync()
        finally:
            self.syncing = False
            try:
                self.wake()
            finally:
                self.turns.end()

    def close(self):
        """Waits for a running sync; no sync starts afterwards."""
        self.closed = True
        while self.syncing and not sys.is_finalizing():
            self.wait()
        self.wake()

    cdef int wait(self) except -1:
        """Waits for the end of a running sync. On the main thread, signal handlers may run meanwhile, and raise."""
        turn = allocate_lock()
        turn.acquire()
        if sys.is_finalizing():
            raise NotRunningError(ENDING)
        if not self.syncing:  # it may have ended during the allocation: a collection may run Python code
            return 0
        self.waiting.append(turn)
        try:
            turn.acquire()
        finally:
            if turn in self.waiting:
                self.waiting.remove(turn)
        return 0

    cdef int wake(self) except -1:
        while self.waiting:  # allocates nothing, so all are woken even if there is no memory
            self.waiting.pop().release()
        return 0
