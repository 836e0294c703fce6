"""Snapshots and compaction of a state machine: how the state leaves its log, comes back, and is made small.

    write     capture the state as of an entry, write it to a file; nobody waits
    install   copy a file in, check it, index it; then the step to a generation with it as the base
    compact   capture the state as of a chunk's end as the next base, carry the frames behind it over, index both; then
              the same step

All work is done beside the state in use. Only the step itself is in the writer's turn, and readers never wait.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from fastsm.core.engine import Engine, append_metadata
from fastsm.core.group_commit import GroupCommit
from fastsm.core.jobs import Job, Jobs, Progress
from fastsm.core.policy import Policy
from fastsm.core.turns import Turns
from fastsm.disk import format
from fastsm.disk.base import Base, base_name
from fastsm.disk.files import Directory, storage_errors
from fastsm.disk.mapping import Mapping
from fastsm.errors import (
    CorruptionError,
    FastsmError,
    OrderError,
    SnapshotError,
    SnapshotFormatError,
    SnapshotRangeError,
    StaleSnapshotError,
    StorageError,
)
from fastsm.generation import current as generation
from fastsm.generation.log import Log
from fastsm.generation.saved_table import save_table
from fastsm.generation.verification import BackgroundVerification, Verification
from fastsm.lookup.index import Index
from fastsm.snapshot.file import check_metadata, copy_checked, open_snapshot
from fastsm.snapshot.incoming import copy_in
from fastsm.snapshot.writer import prepare, write_snapshot_into
from fastsm.types import LogId, SnapshotMetadata

Attachment = bytes | Callable[[LogId], bytes] | None

SAVE_TABLE_ABOVE = 4 << 20  # bytes of base and log: reading fewer takes no longer than reading a table
CATCH_UPS = 8

logger = logging.getLogger("fastsm")


class Snapshots(Engine):
    """The half of ``FastStateMachine`` that writes snapshots, installs them, and compacts.

    Thread safety: every method, from any thread. What works for long releases the GIL, and serves signals.
    """

    __slots__ = (
        "_attachment", "_clean_end", "_compacting", "_compress", "_directory", "_generations", "_jobs", "_policy",
        "_retain", "_retain_bytes", "_retired", "_verification", "path",
    )  # fmt: skip

    path: str
    _directory: Directory
    _attachment: Attachment
    _compress: str
    _policy: Policy
    _retain: int
    _retain_bytes: int
    _verification: BackgroundVerification | None

    def _begin(self, generation_number: int) -> None:
        self._jobs = Jobs()
        self._compacting = Turns()
        self._generations = itertools.count(generation_number + 1)  # of files: no two steps prepare the same ones
        self._retired: list[weakref.ref[Mapping]] = []  # alive while views hold them; replaced, never changed
        self._verification = None

    # ---- verify ----------------------------------------------------------------------------------------

    def _verify_in_background(self) -> None:
        """Checks all bytes beside everything else; damage is raised by the next call."""
        epoch, log, _, _ = self._standing()
        machine = weakref.ref(self)

        def report(error: Exception | None) -> None:
            found = machine()
            if found is not None and found._settle_verification(epoch, error) and error is not None:
                log.poison(error)

        self._verification = BackgroundVerification(Verification(log), report)

    def _ensure_verified(self, job: Job) -> None:
        """A snapshot of unverified bytes would give damage a right checksum."""
        if self._verified:
            return
        if self._verification is not None:
            self._verification.wait(job.tick)
            self._require()
        if not self._verified:
            with self._turns:  # no step to another generation closes the files meanwhile
                self._require(True)
                epoch, log, _, _ = self._standing()
                verification = Verification(log)
            verification.run(lambda done, total: job.tick())
            self._settle_verification(epoch)

    # ---- write -----------------------------------------------------------------------------------------

    def write_snapshot(
        self,
        directory: str | os.PathLike[str],
        last_included: LogId | tuple[int, int] | None = None,
        *,
        compress: str | None = None,
        attachment: bytes | None = None,
        progress: Progress | None = None,
    ) -> SnapshotMetadata:
        """Writes the state exactly as of an entry to ``directory/snapshot.fsm``; records and returns its metadata.

        ``last_included``: any id from the base to ``last_applied()`` (the default), also one in the middle of a
        chunk; one that was never seen, between two terms, stands for the entry before it. Others, and those whose
        term cannot be that entry's: ``SnapshotRangeError``. ``compress``: ``"none"`` or ``"zstd"``;
        ``attachment``: bytes of the embedder that travel along; by default what the machine was opened with.
        ``progress(done, total)`` is told now and then, in bytes of records; the total is an estimate.

        The file is there whole or not at all. On return it is durable, and so is everything up to ``last_included``
        in the state's own directory, with the metadata if it is newer than what is known: the host may drop its log
        up to there. Replicas at the same entry write equal files, attachments and codec "none" being equal.

        O(bytes of base and log), beside apply and get: nobody waits. Memory: a bit for each 16 bytes of them, and a
        piece of at most 8 MiB; if entries were applied behind ``last_included``, some 20 bytes for each key that these
        wrote. Raises ``StorageError``; ``SnapshotError`` when a reset, an install or a close comes between.
        """
        self._require()
        self._turns.check()
        return self._write_captured(self._capture(last_included), directory, compress, attachment, progress)

    def _write_captured(
        self,
        capture: Any,
        directory: str | os.PathLike[str],
        compress: str | None,
        attachment: bytes | None,
        progress: Progress | None = None,
    ) -> SnapshotMetadata:
        compress = self._compress if compress is None else compress
        with self._jobs.run("snapshot", capture.last_included, progress) as job:
            job.total = capture.estimated_size
            self._refuse_replaced(capture.epoch, job.what)
            self._ensure_verified(job)
            capture.find(job.tick)
            if attachment is None:
                attachment = self._attachment(capture.last_included) if callable(self._attachment) else self._attachment
            files = type(self._directory)
            prepared = prepare(
                directory, capture, compress=compress, attachment=attachment or b"", tick=job.tick, files=files
            )
            with prepared:
                with self._turns.waited_for(), self._jobs.committing(job):
                    self._require(True)
                    self._refuse_replaced(capture.epoch, job.what)
                    if not self._log.read_only:
                        self._log.check_writable()
                    prepared.commit()
                with self._turns:
                    if not self._is_same_state(capture.epoch):
                        return prepared.metadata  # it was whole before a reset or an install came
                    self._record(prepared.metadata)
                    mark = self._position()
        self._sync_to(mark)
        logger.info("%s: wrote %s as of %s", self.path, prepared.path, tuple(capture.last_included))
        return prepared.metadata

    def _record(self, metadata: SnapshotMetadata) -> None:
        """In the writer's turn: a frame of a snapshot's metadata, if it is newer, and of all that no frame carries."""
        if self._log.read_only:
            return
        known = self.snapshot_metadata()
        if known is None or known.last_included < metadata.last_included:
            self._note_metadata(metadata)
        self._write_state(True)

    def _sync_to(self, mark: tuple[Any, int, LogId]) -> None:
        """Makes a log durable up to a position; nothing to do when the state has gone on to another log."""
        log, offset, applied = mark
        commit = self._group_commit
        if commit.log is log and not log.read_only:
            commit.sync_up_to(offset)
            if log.durable < offset and self._group_commit is commit:  # a close came first, and did not sync
                log.check_writable()
                self._require()
            self._note_synced(log, applied)

    # ---- the step to a next generation -----------------------------------------------------------------

    def _take_next(
        self, log: Log, index: Index, state_of_its_own: tuple[LogId, SnapshotMetadata | None] | None = None
    ) -> Log:
        """In the writer's turn: the step to a generation that is prepared. See ``Engine._switch``.

        Returns the old log, for ``_end_step``: a turn in which a large file is unlinked is long.
        """
        old, old_commit = self._log, self._group_commit
        self._retired = [ref for ref in self._retired if ref() is not None] + [weakref.ref(old.mapping)]
        self._clean_end = -1
        name_next = partial(generation.name_next, self._directory, old, log)
        self._switch(name_next, log, index, GroupCommit(log, self._turns), state_of_its_own)
        try:
            self._set_verified(True)
            old_commit.close()
            if not self._is_called_for():  # else whoever was called does so at its end
                self._renew_policy()
        except (StorageError, MemoryError) as error:
            self._go_on_behind_the_step(error)
        return old

    def _end_step(self, old: Log, what: str) -> None:
        """Behind the step: removes the old log, and says what it was. A job or the turn keeps the directory open."""
        before = old.end
        try:
            with storage_errors(self.path, "removing the old generation"):
                old.close()
                generation.remove_generation(self._directory, old.head.generation)
            logger.info(
                "%s: %s: a log of %d bytes became a base of %d and a log of %d", self.path, what, before,
                self._log.base_bytes, self._log.end)
        except (StorageError, MemoryError) as error:
            self._go_on_behind_the_step(error)

    def _go_on_behind_the_step(self, error: Exception) -> None:
        """What fails behind the step to another generation is no error of that step."""
        try:  # noqa: SIM105  # `suppress` would need memory itself
            logger.warning("%s: left over until the next opening: %r", self.path, error)
        except MemoryError:
            pass  # then nobody can be told

    def _discard(self, log: Log | None, number: int) -> None:
        """Removes what was prepared of a generation, unless that has become the state."""
        if log is None or log is not self._log:
            generation.discard(self._directory, log, number)

    def _clear_in_turn(self) -> None:
        self._require(True)
        self._log.check_writable()
        number = next(self._generations)
        log = None
        try:
            log = Log.create(self._directory, number)
            index = Index()
            self._order_next(index, log.mapping)
            generation.prepare_next(self._directory, log)
            with self._jobs.replacing("a reset"):
                old = self._take_next(log, index, (LogId(), None))
        except BaseException:
            self._discard(log, number)
            raise
        self._end_step(old, "reset")

    # ---- install ---------------------------------------------------------------------------------------

    def install_snapshot(
        self,
        metadata: SnapshotMetadata | None,
        path: str | os.PathLike[str],
        *,
        allow_older: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Replaces state, log, terms, membership and metadata by a snapshot's, in one atomic step; durable on return.

        ``path``: the file, which is left as it was, or the directory that holds it. ``metadata``: what the host was
        told of it; None takes the file's own. Checked are, in this order: format and version
        (``SnapshotFormatError``, ``FormatVersionError``), the checksum against the file and against ``metadata``
        (``ChecksumMismatchError``), and that it is not older than ``last_applied()`` (``StaleSnapshotError``, unless
        ``allow_older``). After any error or crash the old state is whole.

        Views and iterators taken before stay valid and unchanged. Ends running snapshots and compactions. O(size);
        reads and writes go on until the step. ``progress(done, total)`` is told of the copying, in bytes.
        """
        self._require()
        self._turns.check()
        self._install(metadata, path, allow_older, progress, self._turns)

    def _install_now(
        self, metadata: SnapshotMetadata | None, path: str | os.PathLike[str], allow_older: bool = False
    ) -> None:
        """``install_snapshot``, for whoever has the writer's turn already."""
        self._install(metadata, path, allow_older, None, nullcontext())

    def _install(
        self,
        metadata: SnapshotMetadata | None,
        path: str | os.PathLike[str],
        allow_older: bool,
        progress: Progress | None,
        turn: Turns | nullcontext[None],
    ) -> None:
        """Prepares the next generation, and takes it in ``turn``."""
        self._require()
        self._log.check_writable()
        with self._jobs.run("install", of_this_state=False) as job:
            number, log, index, told = self._prepare_install(job, metadata, path, allow_older, progress)
            try:
                what = f"installed a snapshot as of {tuple(told.last_included)}"
                with turn:
                    old = self._install_in_turn(job, log, index, told, allow_older)
            except BaseException:
                self._discard(log, number)
                raise
            self._end_step(old, what)

    def _prepare_install(
        self,
        job: Job,
        metadata: SnapshotMetadata | None,
        path: str | os.PathLike[str],
        allow_older: bool,
        progress: Progress | None,
    ) -> tuple[int, Log, Index, SnapshotMetadata]:
        """The next generation, made of a snapshot's file: checked, indexed and synced."""
        number = next(self._generations)
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
                if not allow_older and told.last_included < self.last_applied():
                    copy_checked(snapshot.descriptor, snapshot.head, snapshot.path, progress=tell)
                    self._refuse_stale(told)
                base = copy_in(self._directory, number, snapshot, tell)
            log = Log.create(self._directory, number, base)
            index = Index()
            if base is not None:
                try:
                    index.read_base(log.mapping, base)
                except CorruptionError as error:
                    raise SnapshotFormatError(f"{os.fsdecode(path)}: {error}") from error
            append_metadata(log, told)
            log.sync()
            index.read_log(log.mapping, generation.EMPTY_LOG_BYTES, log.end)
            self._order_next(index, log.mapping, job.tick)
            self._save_table(log, index, job.tick)
            generation.prepare_next(self._directory, log)
        except BaseException:
            if base is not None and log is None:
                base.close()
            self._discard(log, number)
            raise
        return number, log, index, told

    def _refuse_stale(self, told: SnapshotMetadata) -> None:
        applied = self.last_applied()
        if told.last_included < applied:
            raise StaleSnapshotError(
                f"{self.path}: expected a snapshot as of last applied, {applied}, or later, found one as of "
                f"{told.last_included}; allow_older=True installs it all the same")

    def _refuse_contradiction(self, told: SnapshotMetadata) -> None:
        """What ``apply`` refuses of an entry: another term than is known of it, or a falling one."""
        applied, included = self.last_applied(), told.last_included
        later = included.index > applied.index
        if not (included.term >= applied.term if later else self._terms.allows(*included)):
            raise OrderError(
                f"{self.path}: a snapshot as of {included} contradicts what is applied here, up to {applied}: an entry "
                "of another term, or terms that fall. One of the two is of another history; to take the snapshot "
                "nevertheless, call clear() first", index=included.index)

    def _install_in_turn(
        self, job: Job, log: Log, index: Index, told: SnapshotMetadata, allow_older: bool
    ) -> Log:
        job.check()
        self._require()
        self._log.check_writable()
        if not allow_older:
            self._refuse_stale(told)
        self._refuse_contradiction(told)
        with self._jobs.replacing("an install"):
            return self._take_next(log, index, (told.last_included, told))

    # ---- compact ---------------------------------------------------------------------------------------

    def compact(
        self, up_to: LogId | int | None = None, *, progress: Progress | None = None
    ) -> None:
        """Gives the space of overwritten and deleted values back, on disk and in memory.

        The state as of ``up_to`` (an id or an index, rounded down to a chunk's end) becomes the new base; snapshots as
        of earlier entries can no longer be taken. By default that is ``retain_entries`` or ``retain_bytes`` before
        ``last_applied()``, whichever retains less, or what a running snapshot needs, if that is earlier. When that is
        the base already, nothing is done at all.

        One atomic step, durable on return with everything applied; reads and applies go on, views stay valid.
        O(bytes of base and log). Raises ``SnapshotRangeError``, ``StorageError``; ``SnapshotError`` when a reset, an
        install or a close comes between.
        """
        self._require()
        self._log.check_writable()
        index = up_to if up_to is None or isinstance(up_to, int) else up_to[0]
        epoch, _, base, applied = self._standing()
        if index is not None and not base <= index <= applied:
            raise SnapshotRangeError(
                f"{self.path}: cannot compact up to entry {index}: expected one from {base}, the base, to {applied}, "
                "last applied")
        self._turns.check()
        with self._jobs.run("compaction", None, progress) as job, self._compacting:
            job.check()
            self._refuse_replaced(epoch, job.what)
            self._compact(job, index)

    def _compact(self, job: Job, up_to: int | None) -> None:
        self._ensure_verified(job)
        epoch, old, base_index, applied = self._standing()
        carried, last_included = self._last_compacted(old, applied, up_to)
        if last_included.index <= base_index:
            return
        number = next(self._generations)
        log: Log | None = None
        started = time.perf_counter()
        try:
            base = self._write_base(number, last_included, job, epoch)
            log, index, carried = self._build_next(number, base, old, carried, job)
            what = f"compacted up to {tuple(last_included)} in {time.perf_counter() - started:.3f} s"
            with self._turns:
                job.check()
                self._require(True)
                self._refuse_moved(epoch, job.what)
                old.check_writable()  # a failed sync may have left frames there that were never applied
                prepared = log.end
                self._write_state(True)
                self._carry_over(log, index, old, carried)
                metadata = self.snapshot_metadata()
                if metadata is not None:
                    append_metadata(log, metadata)
                log.sync()
                if log.end > prepared:  # else a later look could take what was carried over for a torn tail
                    generation.write_next(self._directory, log)
                self._take_next(log, index)
        except BaseException:
            self._discard(log, number)
            raise
        self._end_step(old, what)

    def _last_compacted(self, log: Log, applied: int, up_to: int | None) -> tuple[int, LogId]:
        """Where the last frame ends that goes into the base, and its last entry.

        By default as many entries stay in the log as ``retain_entries`` or ``retain_bytes`` says, whichever is less,
        and what a running snapshot reads.
        """
        if up_to is not None:
            return log.last_frame_up_to(up_to)
        found = log.last_frame_up_to(max(applied - self._retain, 0), max(log.end - self._retain_bytes, 0))
        needed = self._jobs.least_needed()
        return found if needed is None or found[1].index <= needed else log.last_frame_up_to(needed)

    def _write_base(self, number: int, last_included: LogId, job: Job, epoch: int) -> Base:
        """The state as of an entry as a base, synced."""
        capture = self._capture(last_included)
        if capture.epoch != epoch:
            self._refuse_moved(epoch, job.what)
        job.total = capture.estimated_size
        capture.find(job.tick)
        name = base_name(number)
        with storage_errors(self._directory.path_of(name), "writing a base"):
            descriptor = self._directory.create_file(name)
            try:
                head = write_snapshot_into(self._directory, descriptor, capture, b"", job.tick)
            except BaseException:
                self._directory.close_file(descriptor)
                raise
        return Base(self._directory, name, descriptor, head)

    def _build_next(
        self, number: int, base: Base, old: Log, carried: int, job: Job
    ) -> tuple[Log, Index, int]:
        """The next generation, synced up to most of what is applied now, and how far that is in the old log."""
        try:
            log = Log.create(self._directory, number, base)
        except BaseException:
            base.close()
            raise
        try:
            index = Index()
            index.read_base(log.mapping, base)
            for _ in range(CATCH_UPS):
                job.tick()
                behind = old.end
                self._carry_over(log, index, old, carried, behind)
                carried = behind
                if old.end - carried < format.LARGE_BYTES:
                    break
            log.sync()
            self._order_next(index, log.mapping, job.tick)
            self._save_table(log, index, job.tick)
            generation.prepare_next(self._directory, log)
        except BaseException:
            log.close()
            raise
        return log, index, carried

    def _carry_over(self, log: Log, index: Index, old: Log, first: int, stop: int | None = None) -> None:
        """Copies frames of the old log to the new one, and indexes them there."""
        copied = log.end
        log.copy_from(old, first, old.end if stop is None else stop)
        index.read_log(log.mapping, copied, log.end, True)

    def _save_table(self, log: Log, index: Index, tick: Callable[[], object] = lambda: None) -> None:
        """Saves the table of a log that is synced, when that is worth it. When it cannot be saved, there is none."""
        if log.start + log.end < SAVE_TABLE_ABOVE:
            return
        try:
            with storage_errors(self.path, "saving the table"):
                save_table(self._directory, log, index, tick)
        except StorageError as error:  # base and log are durable, and say all that it says
            logger.warning("%s: without a saved table opening will take longer: %s", self.path, error)

    # ---- the policy ------------------------------------------------------------------------------------

    def _renew_policy(self, dead_bytes: int | None = None) -> None:
        """Compaction by itself comes next when so much more is dead than now, or than ``dead_bytes``."""
        _, _, live, dead = self._bytes()
        self._compact_above(self._policy.threshold(live, dead if dead_bytes is None else dead_bytes))

    def _compact_by_itself(self) -> None:
        """On a thread that ``apply`` starts, once, when more is dead than the policy bears."""
        try:
            self.compact()
        except FastsmError as error:
            if self.is_running() and not isinstance(error, SnapshotError):
                logger.warning("%s: compaction failed, it is tried again later: %s", self.path, error)
        finally:
            if not self._closed():
                self._renew_policy()
