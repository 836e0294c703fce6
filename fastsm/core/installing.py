"""Installing a snapshot: its file is copied in, checked and indexed, and then replaces the state."""

from __future__ import annotations

import os
from contextlib import nullcontext

from fastsm.core.engine import Engine
from fastsm.core.generations import Generations
from fastsm.core.hard_state import append_metadata
from fastsm.core.jobs import Job, Progress
from fastsm.core.turns import Turns
from fastsm.errors import CorruptionError, OrderError, SnapshotFormatError, StaleSnapshotError
from fastsm.generation import current
from fastsm.generation.log import Log
from fastsm.lookup.index import Index
from fastsm.snapshot.file import check_metadata, copy_checked, open_snapshot
from fastsm.snapshot.incoming import copy_in
from fastsm.types import LogId, SnapshotMetadata


class Installing:
    """Installs snapshots in one machine, whose engine is passed to each call. Thread safe."""

    __slots__ = ("_generations",)

    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    def install(
        self,
        engine: Engine,
        metadata: SnapshotMetadata | None,
        path: str | os.PathLike[str],
        *,
        allow_older: bool = False,
        progress: Progress | None = None,
        has_turn: bool = False,
    ) -> None:
        """Prepares the next generation, and takes the step to it in the writer's turn.

        ``has_turn``: the caller has the turn already.
        """
        engine._require()
        engine._log.check_writable()
        turn: Turns | nullcontext[None] = nullcontext() if has_turn else engine._turns
        with self._generations.jobs.run("install", of_this_state=False) as job:
            number, log, index, told = self._prepare(engine, job, metadata, path, allow_older, progress)
            old = engine._log
            what = f"installed a snapshot as of {tuple(told.last_included)}"
            try:
                with turn:
                    old = engine._log  # this may have changed since the call
                    self._take(engine, job, log, index, told, allow_older)
            except BaseException as error:
                if self._generations.undo(engine, old, log, number, error, what):
                    raise
            self._generations.end(engine, old, what)

    def _prepare(
        self,
        engine: Engine,
        job: Job,
        metadata: SnapshotMetadata | None,
        path: str | os.PathLike[str],
        allow_older: bool,
        progress: Progress | None,
    ) -> tuple[int, Log, Index, SnapshotMetadata]:
        """Returns the next generation, made from a snapshot's file: checked, indexed and synced."""
        directory = self._generations.directory
        number = self._generations.next_number()
        log = base = None

        def tell(done: int, total: int) -> None:
            job.tick()
            if progress is not None:
                progress(done, total)
                job.check()

        try:
            with open_snapshot(path) as snapshot:
                told = snapshot.metadata
                if metadata is not None:
                    check_metadata(metadata, snapshot.head, snapshot.path)
                if not allow_older and told.last_included < engine.last_applied():
                    copy_checked(snapshot.descriptor, snapshot.head, snapshot.path, progress=tell)
                    self._refuse_stale(engine, told)
                base = copy_in(directory, number, snapshot, tell)
            log = Log.create(directory, number, base)
            index = Index()
            if base is not None:
                try:
                    index.read_base(log.mapping, base)
                except CorruptionError as error:
                    raise SnapshotFormatError(f"{os.fsdecode(path)}: {error}") from error
            append_metadata(log, told)
            log.sync()
            index.read_log(log.mapping, current.EMPTY_LOG_BYTES, log.end)
            engine._order_next(index, log.mapping, job.tick)
            self._generations.save_table(log, index, job.tick)
            current.prepare_next(directory, log)
        except BaseException:
            if base is not None and log is None:
                base.close()
            self._generations.discard(engine, log, number)
            raise
        return number, log, index, told

    def _take(
        self, engine: Engine, job: Job, log: Log, index: Index, told: SnapshotMetadata, allow_older: bool
    ) -> None:
        """Takes the step, in the writer's turn, if the snapshot still fits what is applied by now."""
        job.check()
        engine._require()
        engine._log.check_writable()
        if not allow_older:
            self._refuse_stale(engine, told)
        self._refuse_contradiction(engine, told.last_included, index)
        with self._generations.jobs.replacing("an install"):
            self._generations.take(engine, log, index, (told.last_included, told))

    def _refuse_stale(self, engine: Engine, told: SnapshotMetadata) -> None:
        applied = engine.last_applied()
        if told.last_included < applied:
            raise StaleSnapshotError(
                f"{self._generations.path}: expected a snapshot as of {applied} (last applied) or later, found one as "
                f"of {told.last_included}; allow_older=True installs it anyway")

    def _refuse_contradiction(self, engine: Engine, included: LogId, index: Index) -> None:
        """Refuses a snapshot that contradicts the log: its entry has another term here, or terms would fall.

        If the snapshot goes further than what is applied, it must contain the last applied entry. Then, by Raft's log
        matching property, all earlier entries are the same too.
        """
        applied = engine.last_applied()
        if included.index > applied.index:
            fits = included.term >= applied.term and index.terms.allows(*applied)
        else:
            fits = engine._terms.allows(*included)
        if not fits:
            raise OrderError(
                f"{self._generations.path}: a snapshot as of {included} contradicts what is applied here, up to "
                f"{applied}: an entry has another term, or terms would fall, so one of the two belongs to another "
                "history; to install the snapshot nevertheless, call clear() first", index=included.index)
