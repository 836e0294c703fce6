"""The step from one generation to the next, as shared by resets, installs and compactions.

    prepare    the next base and log are written, indexed and synced next to the current files; no call waits
    take       in the writer's turn: CURRENT is replaced, and the state in memory continues with the new log
    end        the old log is closed and removed

Objects in this module get the engine as an argument instead of keeping a reference to it: such a cycle would keep a
machine that was never closed alive until the next garbage collection.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from functools import partial

from fastsm.background import undisturbed
from fastsm.core.engine import Engine
from fastsm.core.group_commit import GroupCommit
from fastsm.core.jobs import Jobs
from fastsm.core.policy import Policy
from fastsm.disk.files import NO_ROOM, Directory, storage_errors
from fastsm.disk.mapping import Mapping
from fastsm.errors import ReentryError, SnapshotError, StorageError
from fastsm.generation import current
from fastsm.generation.log import Log
from fastsm.generation.names import free_generations
from fastsm.generation.saved_table import HeldTable, hold_table, save_table
from fastsm.lookup.index import Index
from fastsm.types import LogId, SnapshotMetadata

SAVE_TABLE_ABOVE = 4 << 20  # bytes of base and log; below that, reading them is as fast as loading a saved table

logger = logging.getLogger("fastsm")


class Generations:
    """The generations of one directory: numbers for new ones, old ones that views still hold, and the final frame.

    Thread safety: methods that take the ``engine`` need the writer's turn, unless they say otherwise; the others may
    be called from any thread.
    """

    __slots__ = ("_clean_end", "_numbers", "_policy", "_retired", "directory", "jobs", "path")

    def __init__(self, directory: Directory, path: str, log: Log, policy: Policy, jobs: Jobs, *, clean: bool) -> None:
        self.directory = directory
        self.path = path
        self.jobs = jobs
        self._policy = policy
        self._numbers = free_generations(directory, log.head.generation + 1)  # no two steps prepare the same files
        self._retired: list[weakref.ref[Mapping]] = []  # alive while views hold them; replaced, never changed
        # The end of a log that was opened cleanly: as long as it has not grown, a close need not write.
        self._clean_end = log.end if clean else -1

    def next_number(self) -> int:
        """Returns the number of a new generation: no other call returns it, and no file's name has it."""
        return next(self._numbers)

    def pinned_bytes(self, log: Log) -> int:
        """Returns the bytes of replaced generations that views and iterators still hold."""
        held = (ref() for ref in self._retired)
        return sum(pages.mapped for pages in held if pages is not None and pages is not log.mapping)

    # ---- the step --------------------------------------------------------------------------------------

    def take(
        self,
        engine: Engine,
        log: Log,
        index: Index,
        state_of_its_own: tuple[LogId, SnapshotMetadata | None] | None = None,
    ) -> None:
        """Takes the step to a prepared generation; see ``Engine._switch``. The caller then calls :meth:`end`.

        The step is atomic: an exception from a signal handler is raised after it. The old log is not removed here,
        because unlinking a large file would make the turn long.
        """
        undisturbed(engine._turns.lent(partial(self._take, engine, log, index, state_of_its_own)))

    def _take(
        self, engine: Engine, log: Log, index: Index, state_of_its_own: tuple[LogId, SnapshotMetadata | None] | None
    ) -> None:
        old, old_commit = engine._log, engine._group_commit
        self._retired = [ref for ref in self._retired if ref() is not None] + [weakref.ref(old.mapping)]
        self._clean_end = -1
        name_next = partial(current.name_next, self.directory, old, log)
        before = engine.last_applied().index
        engine._switch(name_next, log, index, GroupCommit(log, engine._turns), state_of_its_own)
        try:
            engine._set_verified(True)
            engine._tell_waiting(before)
            old_commit.close()
            if not engine._is_called_for():  # otherwise the running compaction renews the policy at its end
                self._policy.renew(engine)
        except (StorageError, MemoryError) as error:
            self._note_leftover(error)

    def end(self, engine: Engine, old: Log, what: str) -> None:
        """Removes the old log, and logs what the step did; after the step, outside the writer's turn.

        The caller's job or turn keeps the directory open.
        """
        try:
            before = old.end
            with storage_errors(self.path, "removing the old generation"):
                old.close()
                current.remove_generation(self.directory, old.head.generation)
            logger.info(
                "%s: %s: a log of %d bytes became a base of %d and a log of %d", self.path, what, before,
                engine._log.base_bytes, engine._log.end)
        except (StorageError, MemoryError) as error:
            self._note_leftover(error)

    def _note_leftover(self, error: Exception) -> None:
        """Logs a failure that came after the step to another generation, so it is not an error of the step itself."""
        try:  # noqa: SIM105  # `suppress` would need memory itself
            # Not the error itself: a handler that keeps its records would keep the old log alive by the traceback.
            logger.warning("%s: cleaning up is left to the next opening: %s", self.path, repr(error))
        except MemoryError:
            pass  # not even a message can be made

    def discard(self, engine: Engine, log: Log | None, number: int) -> None:
        """Removes the prepared files of a generation, unless the step to it was taken."""
        if log is None or log is not engine._log:
            current.discard(self.directory, log, number)

    def undo(
        self, engine: Engine, old: Log, log: Log | None, number: int, error: BaseException, what: str
    ) -> bool:
        """Removes the prepared files of a generation, unless the step was taken; returns whether to raise the error.

        If the step was taken, an exception from a signal handler is raised after the old log's end. A MemoryError after
        the step is logged instead, and the caller continues with :meth:`end`.
        """
        if log is None or log is not engine._log:
            current.discard(self.directory, log, number)
            return True
        if isinstance(error, MemoryError):
            self._note_leftover(error)
            return False
        self.end(engine, old, what)
        return True

    # ---- reset -----------------------------------------------------------------------------------------

    def reset(self, engine: Engine) -> None:
        """Takes the step to the empty state."""
        engine._require(True)
        engine._log.check_writable()
        number = self.next_number()
        old, log = engine._log, None
        try:
            log = Log.create(self.directory, number)
            index = Index()
            engine._order_next(index, log.mapping)
            current.prepare_next(self.directory, log)
            with self.jobs.replacing("a reset"):
                self.take(engine, log, index, (LogId(), None))
        except BaseException as error:
            if self.undo(engine, old, log, number, error, "reset"):
                raise
        self.end(engine, old, "reset")

    # ---- the saved table, and the end ------------------------------------------------------------------

    def save_table(self, log: Log, index: Index, tick: Callable[[], object] = lambda: None) -> None:
        """Saves the table of a synced log if it is large enough to pay off. A failure is logged, not raised."""
        if log.start + log.end < SAVE_TABLE_ABOVE:
            return
        try:
            with storage_errors(self.path, "saving the table"):
                save_table(self.directory, log, index, tick)
        except StorageError as error:  # the base and the log are durable, and have everything that the table has
            logger.warning("%s: without a saved table opening will take longer: %s", self.path, error)

    def note_durable(self, engine: Engine) -> HeldTable | None:
        """Writes a frame, to record that a sync made durable what an unclean end had left; may return a table to save.

        The next opening after a kill then neither reads nor writes all of it again. Without room on disk, only a
        warning is logged. The returned table is a copy in memory, for :meth:`save_held` outside the writer's turn;
        None: saving one does not pay off.
        """
        log = engine._log
        if not log.unnoted:
            return None  # already recorded, or the state has moved to another log
        log.unnoted = False
        try:
            engine._write_state(False)
            engine._note_durable()
        except StorageError as error:
            if error.errno not in NO_ROOM:
                raise
            logger.warning("%s: an opening after a kill will have to read and write more: %s", self.path, error)
            return None
        if engine._index.loaded or log.start + log.end < SAVE_TABLE_ABOVE:
            return None
        return hold_table(log, engine._index)

    def save_held(self, engine: Engine, held: HeldTable) -> None:
        """Saves a table that was held still, while writers go on. A reset, install, compaction or close ends the work.

        A table may describe durable bytes only, so the log is synced up to the table's end first. A failure is logged,
        not raised.
        """
        log = held.log
        epoch, standing, _, _ = engine._standing()
        if standing is not log:
            return
        try:
            with self.jobs.run("saved table") as job, held.written(self.directory, job.tick):
                engine._sync_to((log, held.end, LogId()))
                with engine._turns:
                    job.check()
                    engine._require(True)
                    engine._refuse_moved(epoch, job.what)
                    with storage_errors(self.path, "saving the table"):
                        held.put_in_place(self.directory)
                with storage_errors(self.path, "saving the table"):
                    self.directory.sync_directory()
        except (SnapshotError, ReentryError):
            pass  # the state has moved on, or this is a handler on top of a write: a later opening reads the log
        except StorageError as error:
            logger.warning("%s: without a saved table opening will take longer: %s", self.path, error)

    def end_log(self, engine: Engine) -> None:
        """Writes the last frames, then the log's size into CURRENT, so that a cut tail is noticed."""
        log, commit = engine._log, engine._group_commit
        if log.read_only:
            return
        if log.end == self._clean_end and not engine._has_unwritten(True):
            if lacks_table(engine._index):  # this opening read or sorted everything: the next one need not
                self.save_table(log, engine._index)
            return
        engine._write_state(True)
        commit.sync_up_to(log.end)  # two syncs must never overlap
        try:
            engine._write_state(False, True)
            commit.sync_up_to(log.end)
            log.trim()
            self.save_table(log, engine._index)
            current.write_current(self.directory, log)
        except StorageError as error:
            if error.errno not in NO_ROOM:
                raise
            # All data is durable: without room for the last frame, the next opening only takes longer.
            logger.warning("%s: closed without a final frame: %s", self.path, error)


def lacks_table(index: Index) -> bool:
    """Returns whether an index that is unchanged since the opening has something that the saved table lacks."""
    return not index.loaded or (index.order is not None and not index.order.loaded)
