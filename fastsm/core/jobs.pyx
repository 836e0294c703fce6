"""Jobs: snapshots, compactions and installs that run next to other calls, and must end before the machine does.

Compiled, because signal handlers run between any two steps of Python code, and one that raises there (as Ctrl-C does)
must not leave a job that never ends, or a held lock: a `close` would wait for it forever. No handler runs between two
steps of C code.
"""

import sys
from _thread import RLock, allocate_lock
from collections.abc import Callable

from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport uint64_t

from fastsm.core.turns import CHECK_SECONDS
from fastsm.errors import SnapshotError

Progress = Callable[[int, int], object]  # bytes done, bytes in all


cdef class Job:
    """One running snapshot, compaction or other long task.

    `needs`: the entry whose state the job reads, or None. `of_this_state`: whether a reset or an install ends the job.
    `done`: bytes of the state written so far, of `total`, as far as that is known.
    """
    cdef readonly str what
    cdef readonly object needs
    cdef readonly bint of_this_state
    cdef readonly object ended_by
    cdef public uint64_t total
    cdef readonly uint64_t done
    cdef object progress
    cdef object over             # a lock that is held until the job is over
    cdef unsigned long thread

    def __cinit__(self, str what, needs, progress, bint of_this_state):
        self.what = what
        self.needs = needs
        self.of_this_state = of_this_state
        self.progress = progress
        self.thread = PyThread_get_thread_ident()
        self.over = allocate_lock()
        self.over.acquire()

    def check(self):
        """Raises `SnapshotError` if the job was ended from outside."""
        if self.ended_by is not None:
            raise SnapshotError(f"the {self.what} was ended by {self.ended_by}, and has left no files")

    def tick(self, uint64_t done=0):
        """Reports progress, and raises if the job was ended. To be called between pieces of the work."""
        self.check()
        self.done = max(self.done, done)
        if self.progress is not None:
            self.progress(self.done, max(self.done, self.total))
            self.check()  # the progress callback may have ended the job


cdef class Jobs:
    """All jobs of one state machine.

    Ending a job only stops its work early; what keeps an ended job from taking effect is the epoch. At the point where
    a job takes effect, it compares the state's epoch with the one it captured: in the writer's turn, or, when a
    snapshot file is given its name (for which writers should not wait), within `committing`. A reset or an install
    changes the epoch in the writer's turn and within `replacing`, which excludes `committing`. A close ends all jobs
    before it takes the turn and waits for them, so none outlives the directory. Thread safe.
    """
    cdef readonly object named       # metadata of the snapshot that was, or is just being, given its name last
    cdef readonly bint closed
    cdef set running
    cdef list closers                # threads in a close; a thread may be in here more than once
    cdef object lock                 # held while committing; reentrant: a signal handler may reset during a commit

    def __cinit__(self):
        self.running = set()
        self.closers = []
        self.lock = RLock()

    def run(self, str what, needs=None, progress=None, *, bint of_this_state=True):
        """Returns a context manager that starts a job, and ends it with the block."""
        return Running(self, Job(what, needs, progress, of_this_state))

    def committing(self, Job job, named):
        """Returns a context manager in which a snapshot file gets its name; excludes resets and installs."""
        return Committing(self, job, named)

    def replacing(self, str cause):
        """Returns a context manager, for use in the writer's turn, in which another state replaces this one.

        If the block succeeds, all jobs of the replaced state are ended: each raises at its next tick.
        """
        return Replacing(self, cause)

    def leave(self):
        """Ends this copy of the jobs, in a forked child; they run in the parent."""
        self.end_all("a fork (it goes on in the parent process)")

    cdef int end_all(self, str cause, bint of_this_state=False) except -1:
        cdef Job job
        for job in tuple(self.running):
            if job.of_this_state or not of_this_state:
                job.ended_by = cause
        return 0

    def closing(self):
        """Returns a context manager in which the calling thread closes the machine."""
        return Closing(self)

    def close(self):
        """Ends all jobs for good, and waits until they are over, except those of this thread and excused ones."""
        cdef Job job
        self.closed = True
        self.end_all("a close")
        for job in tuple(self.running):
            while not (
                job.thread == PyThread_get_thread_ident() or self.is_excused(job.thread)
                or sys.is_finalizing()  # no other thread runs any more
            ):
                if job.over.acquire(True, CHECK_SECONDS):
                    job.over.release()
                    break

    def is_excused(self, unsigned long thread):
        """Returns whether the caller, which closes the machine, must not wait for a thread that closes it too.

        That is so if both threads close it from a callback of a job: each would wait for the other's job.
        """
        cdef Job job
        cdef unsigned long own = PyThread_get_thread_ident()
        if thread not in self.closers:
            return False
        for job in tuple(self.running):
            if job.thread == own:
                return True
        return False

    def least_needed(self):
        """Returns the lowest index whose state a job reads, or None."""
        cdef Job job
        least = None
        for job in tuple(self.running):
            if job.needs is not None and (least is None or job.needs.index < least):
                least = job.needs.index
        return least


cdef class Running:
    """The context manager of `Jobs.run`."""
    cdef Jobs jobs
    cdef Job job

    def __cinit__(self, Jobs jobs, Job job):
        self.jobs = jobs
        self.job = job

    def __enter__(self):
        if self.jobs.closed:
            self.job.ended_by = "a close"
        self.job.check()
        self.jobs.running.add(self.job)
        return self.job

    def __exit__(self, kind, error, traceback):
        self.jobs.running.discard(self.job)
        self.job.over.release()
        if isinstance(error, Exception) and not isinstance(error, SnapshotError):
            self.job.check()  # the error was caused by the end of the job, if that was ended


cdef class Committing:
    """The context manager of `Jobs.committing`."""
    cdef Jobs jobs
    cdef Job job
    cdef object named

    def __cinit__(self, Jobs jobs, Job job, named):
        self.jobs = jobs
        self.job = job
        self.named = named

    def __enter__(self):
        self.jobs.lock.acquire()
        if self.job.ended_by is not None:
            self.jobs.lock.release()
            self.job.check()
        self.jobs.named = self.named

    def __exit__(self, kind, error, traceback):
        self.jobs.lock.release()


cdef class Replacing:
    """The context manager of `Jobs.replacing`."""
    cdef Jobs jobs
    cdef str cause

    def __cinit__(self, Jobs jobs, str cause):
        self.jobs = jobs
        self.cause = cause

    def __enter__(self):
        self.jobs.lock.acquire()

    def __exit__(self, kind, error, traceback):
        try:
            if error is None:
                self.jobs.end_all(self.cause, True)
        finally:
            self.jobs.lock.release()


cdef class Closing:
    """The context manager of `Jobs.closing`."""
    cdef Jobs jobs

    def __cinit__(self, Jobs jobs):
        self.jobs = jobs

    def __enter__(self):
        self.jobs.closers.append(PyThread_get_thread_ident())

    def __exit__(self, kind, error, traceback):
        self.jobs.closers.remove(PyThread_get_thread_ident())
