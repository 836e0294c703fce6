"""Snapshots and compactions under way: work beside everything else, which a reset, an install or a close ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastsm.errors import SnapshotError
from fastsm.types import LogId


class Job:
    """One snapshot or compaction under way. ``needs``: the entry as of which it reads, None for a compaction."""

    def __init__(self, what: str, needs: LogId | None, progress: Callable[[], object] | None) -> None:
        self.what = what
        self.needs = needs
        self.ended_by: str | None = None
        self.thread = threading.get_ident()
        self.over = threading.Event()
        self._progress = progress

    def check(self) -> None:
        """Raises ``SnapshotError`` once the job was ended from outside."""
        if self.ended_by is not None:
            raise SnapshotError(f"the {self.what} was ended by {self.ended_by}: nothing is left of it")

    def tick(self) -> None:
        """Called between pieces of the work: the place where it may be ended, and where progress is told."""
        self.check()
        if self._progress is not None:
            self._progress()


class Jobs:
    """All jobs of one state machine.

    A job takes effect in the writer's turn, after a last :meth:`Job.check` there; whoever ends jobs has that turn,
    too. So a job has taken effect, or never will. Thread safe.
    """

    def __init__(self) -> None:
        self._running: set[Job] = set()

    @contextmanager
    def run(
        self, what: str, needs: LogId | None = None, progress: Callable[[], object] | None = None
    ) -> Iterator[Job]:
        """A job for as long as the block runs."""
        job = Job(what, needs, progress)
        self._running.add(job)
        try:
            yield job
        except SnapshotError:
            raise
        except Exception:
            job.check()  # whatever went wrong, it did because the job was ended
            raise
        finally:
            self._running.discard(job)
            job.over.set()

    def end_all(self, cause: str) -> None:
        """Ends all jobs: each raises at its next tick. Does not wait for them."""
        for job in tuple(self._running):
            job.ended_by = cause

    def wait(self) -> None:
        """Waits until all jobs that were ended are over, but for one that this very thread is in."""
        for job in tuple(self._running):
            while job.thread != threading.get_ident() and not job.over.wait(0.05):
                pass

    def least_needed(self) -> int | None:
        """The least index as of which a job reads."""
        return min((job.needs.index for job in tuple(self._running) if job.needs is not None), default=None)
