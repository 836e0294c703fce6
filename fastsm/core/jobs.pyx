"""Snapshots, compactions and installs under way: work next to everything else, which ends before the machine does.

Compiled, because signal handlers run between any two steps of Python code, and one that raises there (Ctrl-C does)
must not leave a job that never ends, or a lock held: a `close` would wait for it. Between two steps of C code none
runs.
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
    """One piece of work under way.

    `needs`: the entry as of which it reads, if it does. `of_this_state`: a reset or an install ends it. `done`: bytes
    of the state that were written, of `total`, as far as is known.
    """
    cdef readonly str what
    cdef readonly object needs
    cdef readonly bint of_this_state
    cdef readonly object ended_by
    cdef public uint64_t total
    cdef readonly uint64_t done
    cdef object progress
    cdef object over             # a lock that is held until the end
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
        """Raises `SnapshotError` once the job was ended from outside."""
        if self.ended_by is not None:
            raise SnapshotError(f"the {self.what} was ended by {self.ended_by}: nothing is left of it")

    def tick(self, uint64_t done=0):
        """Called between pieces of the work: the place where it may be ended, and where progress is told."""
        self.check()
        self.done = max(self.done, done)
        if self.progress is not None:
            self.progress(self.done, max(self.done, self.total))
            self.check()  # what is told may end it


cdef class Jobs:
    """All jobs of one state machine.

    Ending a job stops its work early; it is not what keeps it from taking effect. A job compares the state's epoch
    with the one that it captured where it takes effect: in the writer's turn, or, for a file that gets its name (for
    which writers should not wait), `committing`. A reset or an install changes the epoch in the writer's turn and
    `replacing`, which excludes commits. A close ends jobs before it has its turn, and waits for them: none outlives the
    directory. Thread safe.
    """
    cdef readonly object named       # metadata of the last snapshot that was given its name, or is about to be
    cdef readonly bint closed
    cdef set running
    cdef list closers                # threads that are in a close, once for each
    cdef object lock                 # of commits; a signal handler may reset in the middle of one

    def __cinit__(self):
        self.running = set()
        self.closers = []
        self.lock = RLock()

    def run(self, str what, needs=None, progress=None, *, bint of_this_state=True):
        """A context: a job for as long as the block runs."""
        return Running(self, Job(what, needs, progress, of_this_state))

    def committing(self, Job job, named):
        """A context in which a snapshot gets its name, outside the writer's turn: no reset or install comes between."""
        return Committing(self, job, named)

    def replacing(self, str cause):
        """A context, in the writer's turn, in which another state takes the place of this one.

        When it succeeds, all jobs of the replaced state are ended: each raises at its next tick.
        """
        return Replacing(self, cause)

    def leave(self):
        """In a forked child: ends all jobs of its copy. They are its parent's."""
        self.end_all("a fork, for it is the parent's")

    cdef int end_all(self, str cause, bint of_this_state=False) except -1:
        cdef Job job
        for job in tuple(self.running):
            if job.of_this_state or not of_this_state:
                job.ended_by = cause
        return 0

    def closing(self):
        """A context in which the caller's thread closes the machine."""
        return Closing(self)

    def close(self):
        """Ends all jobs for good, and waits until they are over, but for those that `is_excused`, and this thread's."""
        cdef Job job
        self.closed = True
        self.end_all("a close")
        for job in tuple(self.running):
            while not (
                job.thread == PyThread_get_thread_ident() or self.is_excused(job.thread)
                or sys.is_finalizing()  # no other thread goes on
            ):
                if job.over.acquire(True, CHECK_SECONDS):
                    job.over.release()
                    break

    def is_excused(self, unsigned long thread):
        """Whether the caller, closing, must not wait for a thread: each is in a job, whose callback closes the machine.

        Each of the two would wait for the other.
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
        """The least index as of which a job reads, or None."""
        cdef Job job
        least = None
        for job in tuple(self.running):
            if job.needs is not None and (least is None or job.needs.index < least):
                least = job.needs.index
        return least


cdef class Running:
    """The context of `Jobs.run`."""
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
            self.job.check()  # whatever went wrong, it did because the job was ended


cdef class Committing:
    """The context of `Jobs.committing`."""
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
    """The context of `Jobs.replacing`."""
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
    """The context of `Jobs.closing`."""
    cdef Jobs jobs

    def __cinit__(self, Jobs jobs):
        self.jobs = jobs

    def __enter__(self):
        self.jobs.closers.append(PyThread_get_thread_ident())

    def __exit__(self, kind, error, traceback):
        self.jobs.closers.remove(PyThread_get_thread_ident())
