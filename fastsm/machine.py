"""``FastStateMachine``: life cycle, durability and policy around the compiled engine."""

from __future__ import annotations

import errno
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from fastsm.core.coroutines import OrderedWorker, Waiters, room_if_small
from fastsm.core.group_commit import GroupCommit
from fastsm.core.policy import Policy
from fastsm.core.snapshots import Attachment, Snapshots
from fastsm.disk.files import Directory, left_by_children, storage_errors
from fastsm.errors import CorruptionError, StorageError
from fastsm.generation import current as generation
from fastsm.generation.verification import Verification
from fastsm.procedures import check_calls, registry
from fastsm.trait import StateMachine
from fastsm.types import Entry, LogId, Result, SnapshotMetadata, Stats

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger("fastsm")


class FastStateMachine(Snapshots, StateMachine):
    """A durable key-value state machine in a directory: an append-only log, and a table into it.

    ``directory`` is created (0700) when needed, locked, recovered; the machine runs at once.

    - ``contiguous``: every entry is handed over, so the next one is always ``last_applied().index + 1``.
      ``False`` for hosts that hand over only some.
    - ``sync``: ``"flush"``, durable at :meth:`flush`; ``"apply"``, durable when :meth:`apply` returns.
    - ``verify_on_open``: ``"full"`` returns after every byte was checked; ``"background"`` checks headers, table and
      terms, and the rest on a thread beside everything else: until ``stats().verified`` a value is as good as the
      disk, and damage makes the next call a ``CorruptionError``; ``"off"`` leaves it to :meth:`verify`. After an
      unclean end, what lies behind the last known sync is always checked.
    - ``expect_applied``: the last entry that the embedder knows was durable here. Recovering less, or another
      known term there, is a ``CorruptionError``, raised before anything is cut.
    - ``read_only``: for tools. No lock, nothing written, safe beside a living owner; shows the state at the time of
      the call. Writes raise ``ReadOnlyError``. A snapshot may be written elsewhere; nothing is recorded here then.
    - ``retain_entries``, ``retain_bytes``: snapshots can be taken as of so many entries back, or as many as take so
      many bytes of log, whichever is less: compaction by itself goes no further. ``stats().base`` is the oldest.
    - ``auto_compact``: compaction by itself, when the dead bytes exceed ``compact_ratio`` times the live ones, and
      ``compact_floor`` bytes.
    - ``lock_timeout``: seconds to wait for another process that has the directory open, before ``LockedError``.
    - ``mode``: the permissions of the directory when it is created, whatever the umask says, and of the files in it,
      without those to execute. With ``0o770`` the users of a group can take turns.
    - ``snapshot_compress``, ``snapshot_attachment``: for snapshots that say nothing else, so those of the trait's
      ``generate_snapshot_data``: ``"none"`` or ``"zstd"``; bytes, or a function from the last included id to bytes.

    - ``procedures``: functions marked with :func:`fastsm.procedure`, for :func:`fastsm.call`, the same on every
      replica. ``check_procedures``, for tests, runs each call twice: what the two come to must be equal, else
      ``ProcedureError``.

    Raises ``LockedError``, ``CorruptionError``, ``FormatVersionError``, ``StorageError``. Thread safe. After a
    failed sync the machine is poisoned: reads go on, writes raise until the directory is opened again.

    >>> import fastsm, tempfile
    >>> with fastsm.FastStateMachine(tempfile.mkdtemp()) as machine:
    ...     machine.apply([(1, 1, fastsm.put(b"color", b"blue"))])
    ...     machine.get(b"color")
    [True]
    b'blue'
    """

    __slots__ = ("_late_error", "_recovery", "_waiters", "_worker")

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        contiguous: bool = True,
        sync: Literal["flush", "apply"] = "flush",
        verify_on_open: Literal["full", "background", "off"] = "background",
        expect_applied: LogId | tuple[int, int] | None = None,
        read_only: bool = False,
        retain_entries: int = 10_000,
        retain_bytes: int = 256 << 20,
        auto_compact: bool = True,
        compact_ratio: float = 1.0,
        compact_floor: int = 64 << 20,
        lock_timeout: float = 0,
        mode: int = 0o700,
        snapshot_compress: Literal["none", "zstd"] = "none",
        snapshot_attachment: Attachment = None,
        procedures: Iterable[Callable[[Any, bytes], Any]] = (),
        check_procedures: bool = False,
        _files: type[Directory] = Directory,
    ) -> None:
        self._set_status("closed")
        self._late_error: StorageError | None = None  # of a close that was put off: the next one raises it
        if sync not in ("flush", "apply"):
            raise ValueError(f'sync={sync!r}: expected "flush" or "apply"')
        if verify_on_open not in ("full", "background", "off"):
            raise ValueError(f'verify_on_open={verify_on_open!r}: expected "full", "background" or "off"')
        if snapshot_compress not in ("none", "zstd"):
            raise ValueError(f'snapshot_compress={snapshot_compress!r}: expected "none" or "zstd"')
        if min(retain_entries, retain_bytes, compact_ratio, compact_floor) < 0:
            raise ValueError("retain_entries, retain_bytes, compact_ratio and compact_floor: expected 0 or more")
        if not lock_timeout >= 0:  # NaN, too
            raise ValueError(f"lock_timeout={lock_timeout!r}: expected 0 or more seconds")
        if mode & 0o700 != 0o700 or mode & ~0o777:
            raise ValueError(f"mode={mode:#o}: expected permissions that let the owner in, such as 0o700 or 0o770")
        self._set_procedures(registry(procedures), check_procedures)
        self.path = os.fsdecode(directory)
        self._retain, self._compress, self._attachment = retain_entries, snapshot_compress, snapshot_attachment
        self._retain_bytes = retain_bytes
        self._policy = Policy(auto_compact and not read_only, compact_ratio, compact_floor)
        expected = None if expect_applied is None else LogId(*expect_applied)
        with storage_errors(self.path, "opening the directory"):
            self._directory = _files(directory, create=not read_only, mode=mode)
        verify = verify_on_open == "full"
        try:
            if read_only:
                opened = generation.open_read_only(self._directory, expected, verify)
            else:
                with storage_errors(self.path, "locking the directory"):
                    self._directory.lock(lock_timeout)
                opened = generation.open_current(self._directory, expected, verify)
        except BaseException:
            self._directory.close()
            raise
        log, verified, self._recovery = opened.log, opened.verified, opened.recovery
        try:
            self._attach(log, opened.index, GroupCommit(log, self._turns), opened.durable, contiguous, sync == "apply")
        except BaseException:
            log.close()
            self._directory.close()
            raise
        self._set_verified(verified)
        self._begin(log.head.generation)
        self._clean_end = log.end if self._recovery.clean else -1
        self._renew_policy(0)
        self._worker, self._waiters = OrderedWorker(), Waiters()
        self._set_status("running")
        _machines.add(self)
        logger.info("%s: open at %s, %s", self.path, self.last_applied(), self._recovery)
        if verify_on_open == "background" and not verified:
            self._verify_in_background()  # last, since from here on any call may say that it has found damage

    def __repr__(self) -> str:
        if self._corrupt() or not self.is_running():
            return f"<FastStateMachine {self.path!r}: {'corrupt' if self._corrupt() else 'not running'}>"
        return f"<FastStateMachine {self.path!r}: {self.len()} keys, applied {tuple(self.last_applied())}>"

    # ---- life cycle ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Runs again after :meth:`stop`. Idempotent."""
        self._run_again()

    def stop(self) -> None:
        """Makes everything applied durable, then stops: reads and writes are refused until :meth:`start`.

        Idempotent. When the sync fails, ``StorageError`` is raised and the machine runs on, poisoned.
        """
        self._require(True)
        self._turns.check()
        self.save_hard_state()  # most of it, while others may still write
        with self._turns:
            self._require(True)
            self._write_state(True)
            self._sync_to(self._position())
            self._set_status("stopped")

    def close(self) -> None:
        """Makes everything durable, ends the log cleanly, and gives back files, memory and lock. Idempotent.

        Everything is given back even when the last sync fails; the ``StorageError`` is raised afterwards.

        A signal handler, a finalizer or a callback may call it at any time. Where its own thread is in the middle of
        a write or a sync of this machine, that goes on first, and the machine is closed at its end; an error of that
        close is raised by the next one. A call that waits for its turn below the handler is a ``NotRunningError``.
        """
        self._refuse_procedure()
        if self._closed():
            error, self._late_error = self._late_error, None
            if error is not None:
                raise error
            return
        if self._forked():
            self._release()  # the files are the parent's to end
            return
        if self._turns.step_aside(self._close_late):
            return
        self._jobs.close()
        self._worker.close(self)
        self._waiters.close()
        with self._turns:
            if self._closed():
                return
            if self._verification is not None:
                self._verification.stop()
            try:
                if not self._corrupt():
                    self._end_log()
            finally:
                self._group_commit.close()
                self._release()

    def _close_late(self) -> None:
        """A close that had to wait for the frames below it. What they came to is theirs: its error waits."""
        try:
            self.close()
        except StorageError as error:
            logger.exception("%s: closed after the call below it, with an error that the next close raises", self.path)
            self._late_error = error

    def _release(self) -> None:
        self._set_status("closed")
        try:
            with storage_errors(self.path, "closing the files"):
                try:
                    self._log.close()
                finally:
                    self._directory.close()
        finally:
            self._let_go()
            _machines.discard(self)

    def _end_log(self) -> None:
        """The last frames; afterwards CURRENT says how long the log is, so that a cut tail is noticed."""
        log = self._log
        if log.read_only:
            return
        if log.end == self._clean_end and not self._has_unwritten(True):
            if not self._index.loaded:  # the opening had to read everything: the next one need not
                self._save_table(log, self._index)
            return
        self._write_state(True)
        self._group_commit.sync_up_to(log.end)  # never two syncs at the same time
        try:
            self._write_state(False, True)
            self._group_commit.sync_up_to(log.end)
            log.trim()
            self._save_table(log, self._index)
            generation.write_current(self._directory, log)
        except StorageError as error:
            if error.errno not in NO_ROOM:
                raise
            # All data is durable: without room for the last frame, the next opening just takes longer.
            logger.warning("%s: closed without a final frame: %s", self.path, error)

    def __enter__(self) -> FastStateMachine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed() and not self._forked():
            warnings.warn(f"{self!r} was never closed: what was not flushed may be lost", ResourceWarning, 2)
            self._worker.abandon()
            self._waiters.abandon()
            self._release()

    def _after_fork_in_child(self) -> None:
        """Marks the child's copy, and ends the jobs in it, should one of them have forked."""
        self._set_status("forked")
        self._jobs.leave()

    # ---- apply and flush -------------------------------------------------------------------------------

    def check(self, command: bytes) -> None:
        """Raises what :meth:`apply` would raise for this command: as ``fastsm.check``, and for unknown procedures."""
        check_calls(command, self._procedures())

    async def apply_chunk(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> list[Result]:
        """:meth:`apply` for coroutines: in the order in which tasks start, and not on the event loop.

        A small chunk is applied at once when nothing is queued. A cancelled call is dropped if it has not begun,
        else it goes on; ``last_applied()`` tells. Behind a chunk that failed, queued chunks fail with
        ``OrderError`` (its cause is the failure) until the caller of the failed one has seen it.
        """
        self._require()  # a forked child has no worker thread
        free = self._turns.is_free() and self._worker.idle
        if free and not self._syncs_on_apply():
            room = room_if_small(chunk)
            if room is not None and self._log.has_room(room):
                return self.apply(chunk)
        entries = self._hold(chunk)  # the caller's list may be changed before its turn comes
        return await self._worker.run(self, lambda: self._apply_in_turn(entries), applies=True)

    def flush(self) -> None:
        """Makes everything applied before the call durable. One sync serves all flushes that overlap.

        Raises ``StorageError`` when the sync fails; the machine is poisoned then.
        """
        self._require(True)
        self._sync_to(self._mark(False))

    async def flush_async(self) -> None:
        """:meth:`flush`, without blocking the event loop; its point is fixed when the task starts."""
        self._require(True)
        mark = None if self._has_unwritten(False) else self._position()
        await self._waiters.flush(self._flush_to, mark)

    def _flush_to(self, mark: tuple[Any, int, LogId] | None) -> None:
        """Makes durable what was applied when the mark was taken; None: now."""
        if mark is None:
            self._require(True)
            mark = self._mark(False)
        self._sync_to(mark)

    def save_hard_state(self) -> None:
        """Makes last applied and snapshot metadata durable, and with them everything applied."""
        self._require(True)
        self._sync_to(self._mark(True))

    def _mark(self, with_metadata: bool) -> tuple[Any, int, LogId]:
        """Now: the log, its end, and the last applied entry, which is in it."""
        if self._has_unwritten(with_metadata):
            with self._turns:
                self._require(True)
                self._write_state(with_metadata)
        return self._position()

    # ---- hard state ------------------------------------------------------------------------------------

    def update_last_applied(self, log_id: LogId | tuple[int, int]) -> None:
        """Moves last applied forward, for an entry that carries no command (or that the host passes over).

        Carried by the next frame that is written, and durable after the next :meth:`flush`. Equal to last
        applied: nothing happens. Back, another term at its index, or a falling term: ``OrderError``.
        """
        self._require()
        with self._turns:
            self._require()
            self._log.check_writable()
            self._note_applied(log_id)

    def persist_last_applied(self, log_id: LogId | tuple[int, int]) -> None:
        """:meth:`update_last_applied`, durable on return."""
        self.update_last_applied(log_id)
        self.flush()

    def update_last_snapshot_metadata(self, metadata: SnapshotMetadata) -> None:
        """Remembers the latest snapshot, in memory; :meth:`save_hard_state` makes it durable."""
        self._require()
        with self._turns:
            self._require()
            self._log.check_writable()
            self._note_metadata(metadata)

    def persist_last_snapshot_metadata(self, metadata: SnapshotMetadata) -> None:
        """:meth:`update_last_snapshot_metadata`, durable on return."""
        self.update_last_snapshot_metadata(metadata)
        self.save_hard_state()

    # ---- reset -----------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Back to the initial empty state, on disk too, in one atomic step that is durable on return.

        After an error the old state is whole. Whether the machine is running stays as it was.
        """
        self._require(True)
        with self._turns:
            self._clear_in_turn()

    async def reset(self) -> None:
        """:meth:`clear` for coroutines, in order with ``apply_chunk``."""
        self._require(True)
        await self._worker.run(self, self._clear_in_turn)

    # ---- snapshots, for coroutines ---------------------------------------------------------------------

    async def generate_snapshot_data(
        self, new_snapshot_dir: str | os.PathLike[str], last_included: LogId | tuple[int, int] | None
    ) -> bytes:
        """:meth:`write_snapshot`, off the event loop; its point is fixed when the task starts. Returns the checksum."""
        self._require()
        capture = self._capture(last_included)
        metadata = await self._waiters.call(lambda: self._write_captured(capture, new_snapshot_dir, None, None))
        return metadata.checksum

    async def apply_snapshot_from_file(
        self, metadata: SnapshotMetadata | None, snapshot_path: str | os.PathLike[str]
    ) -> None:
        """:meth:`install_snapshot` for coroutines, in order with ``apply_chunk``."""
        self._require()
        await self._worker.run(self, lambda: self._install_now(metadata, snapshot_path))

    # ---- statistics ------------------------------------------------------------------------------------

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads every byte on disk again and checks it; ``progress(done, total)`` is told, in bytes.

        Damage is a ``CorruptionError`` that names file and offset. O(bytes); reads and writes go on meanwhile.
        """
        self._require()
        with self._turns:
            self._require()
            if generation.read_current(self._directory) is None:
                raise CorruptionError(self._directory.path_of(generation.CURRENT), None, "CURRENT", "no file")
            epoch, log, _, _ = self._standing()
            with storage_errors(log.path, "reading the log"):
                verification = Verification(log)
        verification.run(progress)
        self._settle_verification(epoch)

    def stats(self) -> Stats:
        """Counts, sizes, and what recovery found. O(1)."""
        self._require(True)
        (
            log, table_bytes, table_load, keys, live_bytes, dead_bytes, log_bytes, term_runs, applied_index,
            applied_term, durable_index, durable_term, verified, sync_count, sync_seconds,
        ) = self._figures()  # fmt: skip
        return Stats(
            keys=keys,
            live_bytes=live_bytes,
            dead_bytes=dead_bytes,
            pinned_bytes=sum(pages.mapped for ref in self._retired if (pages := ref()) not in (None, log.mapping)),
            log_bytes=log_bytes,
            base_bytes=log.base_bytes,
            generation=log.head.generation,
            base=LogId(log.head.base_index, log.head.base_term),
            table_bytes=table_bytes,
            table_load=table_load,
            term_runs=term_runs,
            last_applied=LogId(applied_index, applied_term),
            durable=LogId(durable_index, durable_term),
            verified=verified,
            flush_count=sync_count,
            flush_seconds=sync_seconds,
            recovery=self._recovery,
        )


_machines = left_by_children(FastStateMachine._after_fork_in_child)
