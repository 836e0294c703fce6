"""Snapshots, compactions and installs under way: work beside everything else, which ends before the machine does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastsm.errors import SnapshotError
from fastsm.types import LogId, SnapshotMetadata

Progress = Callable[[int, int], object]  # bytes done, bytes in all


class Job:
    """One piece of work under way.

    ``needs``: the entry as of which it reads, if it does. ``of_this_state``: a reset or an install ends it.
    """

    def __init__(
        self, what: str, needs: LogId | None, progress: Progress | None, of_this_state: bool
    ) -> None:
        self.what = what
        self.needs = needs
        self.of_this_state = of_this_state
        self.ended_by: str | None = None
        self.thread = threading.get_ident()
        self.over = threading.Event()
        self.done = 0  # bytes of the state that were written
        self.total = 0  # of as many, as far as is known
        self._progress = progress

    def check(self) -> None:
        """Raises ``SnapshotError`` once the job was ended from outside."""
        if self.ended_by is not None:
            raise SnapshotError(f"the {self.what} was ended by {self.ended_by}: nothing is left of it")

    def tick(self, done: int = 0) -> None:
        """Called between pieces of the work: the place where it may be ended, and where progress is told."""
        self.check()
        self.done = max(self.done, done)
        if self._progress is not None:
            self._progress(self.done, max(self.done, self.total))
            self.check()  # what is told may end it


class Jobs:
    """All jobs of one state machine.

    Ending a job stops its work early; it is not what keeps it from taking effect. A job compares the state's epoch
    with the one that it captured where it takes effect: in the writer's turn, or, for a file that gets its name (for
    which writers should not wait), :meth:`committing`. A reset or an install changes the epoch in the writer's turn
    and :meth:`replacing`, which excludes commits. A close ends jobs before it has its turn, and waits for them: none
    outlives the directory. Thread safe.
    """

    def __init__(self) -> None:
        self._running: set[Job] = set()
        self._closed = False
        self.named: SnapshotMetadata | None = None  # the last snapshot that was given its name, or is about to be
        self._committing = threading.RLock()  # a signal handler may reset in the middle of a commit

    @contextmanager
    def run(
        self, what: str, needs: LogId | None = None, progress: Progress | None = None, *,
        of_this_state: bool = True,
    ) -> Iterator[Job]:
        """A job for as long as the block runs."""
        job = Job(what, needs, progress, of_this_state)
        self._running.add(job)
        try:
            if self._closed:
                job.ended_by = "a close"
            job.check()
            yield job
        except SnapshotError:
            raise
        except Exception:
            job.check()  # whatever went wrong, it did because the job was ended
            raise
        finally:
            self._running.discard(job)
            job.over.set()

    @contextmanager
    def committing(self, job: Job, named: SnapshotMetadata) -> Iterator[None]:
        """The block in which a snapshot gets its name, outside the writer's turn: no reset or install comes between."""
        with self._committing:
            job.check()
            self.named = named
            yield

    @contextmanager
    def replacing(self, cause: str) -> Iterator[None]:
        """The block, in the writer's turn, in which another state takes the place of this one.

        When it succeeds, all jobs of the replaced state are ended: each raises at its next tick.
        """
        with self._committing:
            yield
            for job in tuple(self._running):
                if job.of_this_state:
                    job.ended_by = cause

    def leave(self) -> None:
        """In a forked child: ends all jobs of its copy. They are its parent's."""
        for job in tuple(self._running):
            job.ended_by = "a fork, for it is the parent's"

    def close(self) -> None:
        """Ends all jobs for good, and waits until they are over, but for one that this very thread is in."""
        self._closed = True
        for job in tuple(self._running):
            job.ended_by = "a close"
        for job in tuple(self._running):
            while job.thread != threading.get_ident() and not job.over.wait(0.05):
                pass

    def least_needed(self) -> int | None:
        """The least index as of which a job reads."""
        return min((job.needs.index for job in tuple(self._running) if job.needs is not None), default=None)
