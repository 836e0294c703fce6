"""Compaction: the state as of the end of a chunk becomes the next base, and later frames are carried over."""

from __future__ import annotations

import logging
import operator
import time

from fastsm.core.engine import Engine
from fastsm.core.generations import Generations
from fastsm.core.hard_state import append_metadata
from fastsm.core.jobs import Job, Progress
from fastsm.core.policy import Policy
from fastsm.core.turns import Turns
from fastsm.core.verifying import Verifying
from fastsm.disk import format
from fastsm.disk.base import Base, base_name
from fastsm.disk.files import storage_errors
from fastsm.errors import FastsmError, SnapshotError, SnapshotRangeError
from fastsm.generation import current
from fastsm.generation.changes import changes_of
from fastsm.generation.log import Log
from fastsm.lookup.index import Index
from fastsm.snapshot.writer import write_snapshot_into
from fastsm.types import LogId

CATCH_UPS = 8

logger = logging.getLogger("fastsm")


class Compaction:
    """Compacts one machine, whose engine is passed to each call; one compaction at a time.

    The last ``retain_entries`` entries or ``retain_bytes`` bytes stay in the log, whichever is less. Thread safe.
    """

    __slots__ = ("_generations", "_one_at_a_time", "_policy", "_retain_bytes", "_retain_entries", "_verifying")

    def __init__(
        self, generations: Generations, verifying: Verifying, policy: Policy, retain_entries: int, retain_bytes: int
    ) -> None:
        self._generations = generations
        self._verifying = verifying
        self._policy = policy
        self._retain_entries = retain_entries
        self._retain_bytes = retain_bytes
        self._one_at_a_time = Turns()

    def compact(self, engine: Engine, up_to: LogId | int | None, progress: Progress | None) -> None:
        """Compacts up to an entry, or as far as the retention options allow."""
        engine._require()
        engine._log.check_writable()
        index = None if up_to is None else operator.index(up_to[0] if isinstance(up_to, tuple) else up_to)
        epoch, _, base, applied = engine._standing()
        if index is not None and not base <= index <= applied:
            raise SnapshotRangeError(
                f"{self._generations.path}: cannot compact up to entry {index}: expected an index from {base} "
                f"(the base) to {applied} (last applied)")
        engine._turns.check()
        # A close that ends the compaction this call waits for must end this call as well, hence `checking`.
        run = self._generations.jobs.run("compaction", None, progress)
        with run as job, self._one_at_a_time.checking(job.check):
            job.check()
            engine._refuse_replaced(epoch, job.what)
            self._run(engine, job, index)

    def compact_by_itself(self, engine: Engine) -> None:
        """Compacts once, on a thread that ``apply`` starts when the dead bytes exceed the policy's threshold."""
        try:
            self.compact(engine, None, None)
        except FastsmError as error:
            if engine.is_running() and not isinstance(error, SnapshotError):
                logger.warning(
                    "%s: compaction failed and will be tried again later: %s", self._generations.path, error)
        finally:
            if not engine._closed():
                self._policy.renew(engine)

    def _run(self, engine: Engine, job: Job, up_to: int | None) -> None:
        self._verifying.ensure(engine, job)
        epoch, old, base_index, applied = engine._standing()
        carried, last_included = self._last_compacted(old, applied, up_to)
        if last_included.index <= base_index:
            return
        number = self._generations.next_number()
        log: Log | None = None
        started = time.perf_counter()
        what = f"compacted up to {tuple(last_included)}"
        try:
            base = self._write_base(engine, number, last_included, job, epoch)
            log, index, carried = self._build_next(engine, number, base, old, carried, job)
            what += f" in {time.perf_counter() - started:.3f} s"
            with engine._turns:
                job.check()
                engine._require(True)
                engine._refuse_moved(epoch, job.what)
                self._take(engine, log, index, old, carried)
        except BaseException as error:
            if self._generations.undo(engine, old, log, number, error, what):
                raise
        self._generations.end(engine, old, what)

    def _last_compacted(self, log: Log, applied: int, up_to: int | None) -> tuple[int, LogId]:
        """Returns the end of the last frame that goes into the base, and the last entry of that frame.

        By default the last ``retain_entries`` entries or ``retain_bytes`` bytes stay in the log, whichever is less, and
        so does everything that a running snapshot reads.
        """
        if up_to is not None:
            return log.last_frame_up_to(up_to)
        found = log.last_frame_up_to(max(applied - self._retain_entries, 0), max(log.end - self._retain_bytes, 0))
        needed = self._generations.jobs.least_needed()
        return found if needed is None or found[1].index <= needed else log.last_frame_up_to(needed)

    def _write_base(self, engine: Engine, number: int, last_included: LogId, job: Job, epoch: int) -> Base:
        """Writes the state as of an entry to a base file, syncs it, and returns the base."""
        directory = self._generations.directory
        capture = engine._capture(last_included)
        if capture.epoch != epoch:
            engine._refuse_moved(epoch, job.what)
        job.total = capture.estimated_size
        job.tick()  # a job that is ended here leaves no file
        name = base_name(number)
        with storage_errors(directory.path_of(name), "writing a base"):
            descriptor = directory.create_file(name)
            try:
                head = write_snapshot_into(directory, descriptor, capture, b"", job.tick)
            except BaseException:
                directory.close_file(descriptor)
                raise
        return Base(directory, name, descriptor, head)

    def _build_next(
        self, engine: Engine, number: int, base: Base, old: Log, carried: int, job: Job
    ) -> tuple[Log, Index, int]:
        """Returns the next generation, synced, and the offset in the old log up to which frames were carried over."""
        try:
            changes = changes_of(old.mapping, carried, base.last_included.index)
            log = Log.create(self._generations.directory, number, base, changes)
        except BaseException:
            base.close()
            raise
        try:
            index = Index()
            index.read_base(log.mapping, base)
            for _ in range(CATCH_UPS):
                job.tick()
                end = old.end
                carry_over(log, index, old, carried, end)
                carried = end
                if old.end - carried < format.LARGE_BYTES:
                    break
            log.sync()
            engine._order_next(index, log.mapping, job.tick)
            self._generations.save_table(log, index, job.tick)
            current.prepare_next(self._generations.directory, log)
        except BaseException:
            log.close()
            raise
        return log, index, carried

    def _take(self, engine: Engine, log: Log, index: Index, old: Log, carried: int) -> None:
        """Carries over what was applied in the meantime, syncs it, and takes the step; in the writer's turn."""
        old.check_writable()  # after a failed sync, the log may hold frames that were never applied
        prepared = log.end
        engine._write_state(True)
        carry_over(log, index, old, carried)
        metadata = engine.snapshot_metadata()
        if metadata is not None:
            append_metadata(log, metadata)
        log.sync()
        if log.end > prepared:  # otherwise a later recovery could take the carried-over frames for a torn tail
            current.write_next(self._generations.directory, log)
        self._generations.take(engine, log, index)


def carry_over(log: Log, index: Index, old: Log, first: int, stop: int | None = None) -> None:
    """Copies frames of the old log to the new one, and adds them to the new index."""
    copied = log.end
    log.copy_from(old, first, old.end if stop is None else stop)
    index.read_log(log.mapping, copied, log.end, True)
