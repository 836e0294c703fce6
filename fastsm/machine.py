"""``FastStateMachine``: life cycle, durability and policy around the compiled engine."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from fastsm.arguments import plain_id
from fastsm.background import undisturbed
from fastsm.core.compaction import Compaction
from fastsm.core.coroutine_order import OrderedWorker, Waiters, room_if_small
from fastsm.core.engine import Engine
from fastsm.core.generations import Generations
from fastsm.core.group_commit import GroupCommit
from fastsm.core.installing import Installing
from fastsm.core.jobs import Jobs, Progress
from fastsm.core.opening import Opening, check_options, close_off_loop, recover
from fastsm.core.policy import Policy
from fastsm.core.snapshots import Attachment, Snapshots
from fastsm.core.statistics import stats_of
from fastsm.core.verifying import Verifying
from fastsm.core.waiting import AppliedWaiters, wait_applied
from fastsm.core.watching import MachineWatch, Watching
from fastsm.disk.files import Directory, hides_seam, storage_errors
from fastsm.disk.forks import left_by_children
from fastsm.errors import ReentryError, StorageError
from fastsm.generation import current
from fastsm.generation.watch import Watch
from fastsm.procedures import check_calls, registry
from fastsm.trait import StateMachine
from fastsm.types import Entry, LogId, Result, SnapshotMetadata, Stats

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger("fastsm")


class FastStateMachine(Engine, StateMachine):
    """A durable key-value state machine in a directory: an append-only log, and a table that indexes it.

    ``directory`` is created (0700) if needed, locked, and recovered; the machine runs immediately.

    - ``contiguous``: the host hands over every entry, so the next one is always ``last_applied().index + 1``. ``False``
      for hosts that hand over only some entries.
    - ``sync``: ``"flush"``: durable after :meth:`flush`; ``"apply"``: durable when :meth:`apply` returns.
    - ``verify_on_open``: ``"full"`` checks every byte before returning; ``"background"`` checks headers, table and
      terms, and the rest on a thread, concurrently with other calls: until ``stats().verified`` is True, a read may
      return a value that was damaged on disk, and the next call after damage is found raises ``CorruptionError``;
      ``"off"`` leaves the check to :meth:`verify`.
      After an unclean end, everything after the last known sync is always checked.
    - ``expect_applied``: the last entry that the embedder knows was durable here. If recovery finds less, or
      that entry with another term, that is a ``CorruptionError``, raised before anything is cut.
    - ``read_only``: for tools. Takes no lock, writes nothing, and is safe next to a running owner; shows the state as
      of its opening. Writes raise ``ReadOnlyError``. A snapshot may be written to another directory; this one does not
      record it.
    - ``retain_entries``, ``retain_bytes``: compaction keeps, by default, this many entries or this many bytes of
      log, whichever is less, so that snapshots can be taken as of any of these entries. ``stats().base`` is the oldest.
    - ``auto_compact``: compacts automatically when the dead bytes exceed both ``compact_ratio`` times the live bytes
      and ``compact_floor`` bytes.
    - ``lock_timeout``: seconds to wait for another process that has the directory open, before ``LockedError``.
    - ``ordered``: keeps the keys in order from the start, for ``scan``, ``count`` and ``ordered``; otherwise the first
      of these calls builds the order, which costs nothing until then. If the order was in use at the last close, it is
      loaded.
    - ``mode``: the permissions of the directory when it is created, whatever the umask is, and of the files in it,
      except execute permissions. With ``0o770`` the users of a group can take turns.
    - ``snapshot_compress``, ``snapshot_attachment``: defaults for snapshots that specify none, such as those of the
      trait's ``generate_snapshot_data``: ``"none"`` or ``"zstd"``; bytes, or a function from the last included id to
      bytes.

    - ``procedures``: functions marked with :func:`fastsm.procedure`, for :func:`fastsm.call`, the same on every
      replica. ``check_procedures``, for tests, runs each call twice: if the two results, or the writes, differ, that
      is a ``ProcedureError``.

    Raises ``LockedError``, ``CorruptionError``, ``FormatVersionError``, ``StorageError``; ``SnapshotError`` for
    ``snapshot_compress="zstd"`` without Zstandard. Thread safe. After a failed sync the machine is poisoned: reads
    still work, writes raise until the directory is opened again.

    >>> import fastsm, tempfile
    >>> with fastsm.FastStateMachine(tempfile.mkdtemp()) as machine:
    ...     machine.apply([(1, 1, fastsm.put(b"color", b"blue"))])
    ...     machine.get(b"color")
    [True]
    b'blue'
    """

    __slots__ = (
        "_applied", "_compaction", "_directory", "_generations", "_installing", "_jobs", "_late_error", "_recovery",
        "_snapshots", "_verifying", "_waiters", "_was_opened", "_watching", "_worker", "path",
    )  # fmt: skip

    path: str

    @hides_seam
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
        ordered: bool = False,
        mode: int = 0o700,
        snapshot_compress: Literal["none", "zstd"] = "none",
        snapshot_attachment: Attachment = None,
        procedures: Iterable[Callable[[Any, bytes], Any]] = (),
        check_procedures: bool = False,
        _files: type[Directory] = Directory,
    ) -> None:
        if getattr(self, "_was_opened", False):
            raise RuntimeError(f"{self!r} was opened already: make another one")
        self._late_error: StorageError | None = None  # of a close that was put off; the next close raises it
        sizes = {
            "retain_entries": retain_entries, "retain_bytes": retain_bytes, "compact_ratio": compact_ratio,
            "compact_floor": compact_floor,
        }  # fmt: skip
        check_options(sync, verify_on_open, snapshot_compress, snapshot_attachment, sizes, lock_timeout, mode)
        self._set_procedures(registry(procedures), check_procedures)
        self.path = os.fsdecode(directory)
        expected = None if expect_applied is None else LogId(*plain_id(expect_applied, "expect_applied"))
        with storage_errors(self.path, "opening the directory"):
            self._directory = _files(directory, create=not read_only, mode=mode)
        policy = Policy(auto_compact and not read_only, compact_ratio, compact_floor)
        try:
            opened, publisher = recover(
                self._directory, read_only, expected, verify_on_open == "full", lock_timeout)
            try:
                self._take(opened, contiguous, sync == "apply")
                self._publish_by(publisher)
                self._jobs = Jobs()
                self._generations = Generations(
                    self._directory, self.path, opened.log, policy, self._jobs, clean=opened.recovery.clean)
                self._verifying = Verifying(self._directory)
                self._snapshots = Snapshots(
                    self.path, type(self._directory), self._jobs, self._verifying, snapshot_compress,
                    snapshot_attachment)
                self._installing = Installing(self._generations)
                self._compaction = Compaction(self._generations, self._verifying, policy, retain_entries, retain_bytes)
                self._worker, self._waiters, self._applied = OrderedWorker(), Waiters(), AppliedWaiters()
                self._watching = Watching(self._watchers)
                policy.renew(self, 0)
                _machines.add(self)
                self._set_status("running")
                if ordered:
                    self._ask_for_order()
                logger.info("%s: open at %s, %s", self.path, self.last_applied(), self._recovery)
                if verify_on_open == "background" and not opened.verified:
                    self._verifying.start(self)  # last, since from here on any call may raise the damage that it finds
                self._was_opened = True
            except BaseException:
                self._set_status("closed")
                _machines.discard(self)
                self._publish_by(None)
                opened.log.close()
                raise
        except BaseException:
            self._directory.close()
            raise

    @classmethod
    def open_async(cls, directory: str | os.PathLike[str], **options: Any) -> Opening[Self]:
        """Opens a machine off the event loop: ``await open_async(…)``, or ``async with open_async(…) as machine``.

        Takes the arguments of the constructor. Nothing is opened before the result is awaited or entered. As a
        context manager, it also closes the machine off the event loop.
        """
        return Opening(lambda: cls(directory, **options))

    def _take(self, opened: current.Generation, contiguous: bool, sync_on_apply: bool) -> None:
        """Makes the recovered generation the state."""
        commit = GroupCommit(opened.log, self._turns)
        self._attach(opened.log, opened.index, commit, opened.durable, contiguous, sync_on_apply)
        self._set_verified(opened.verified)
        self._recovery = opened.recovery

    def __repr__(self) -> str:
        if self._corrupt() or not self.is_running():
            return f"<FastStateMachine {self.path!r}: {'corrupt' if self._corrupt() else 'not running'}>"
        return f"<FastStateMachine {self.path!r}: {self.len()} keys, applied {tuple(self.last_applied())}>"

    # ---- life cycle ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Resumes after :meth:`stop`. Idempotent."""
        self._run_again()

    def stop(self) -> None:
        """Makes everything applied durable, then stops: reads and writes are refused until :meth:`start`.

        Idempotent. If the sync fails, ``StorageError`` is raised, and the machine keeps running, poisoned.
        """
        self._require(True)
        self._turns.check()
        self.save_hard_state()  # most of it, while other threads may still write
        with self._turns:
            self._require(True)
            self._write_state(True)
            self._sync_to(self._position())
            self._set_status("stopped")

    def close(self) -> None:
        """Makes everything durable, ends the log cleanly, and releases files, memory and lock. Idempotent.

        Everything is released even if the last sync fails; the ``StorageError`` is raised afterwards.

        A signal handler, a finalizer or a callback may call it at any time. If its own thread is in the middle of a
        write or a sync of this machine, that completes first, and then the machine is closed; an error of that close is
        raised by the next call of ``close``. An interrupted call that is waiting for its turn gets a
        ``NotRunningError``.
        """
        self._refuse_procedure()
        if self._closed():
            error, self._late_error = self._late_error, None
            if error is not None:
                raise error
            return
        if self._forked():
            self._release()  # the files belong to the parent
            return
        if self._turns.step_aside(self._close_late):
            return
        with self._jobs.closing():
            self._jobs.close()
            self._worker.close(self)
            self._waiters.end(self._jobs.is_excused)
            with self._turns:
                if not self._closed():
                    undisturbed(self._turns.lent(self._end), needs_thread=False)

    def _end(self) -> None:
        """Takes the last steps of a close, in the writer's turn; no signal handler interrupts them."""
        try:
            self._verifying.stop()
            if not self._corrupt():
                self._generations.end_log(self)
        finally:
            self._group_commit.close()
            self._release()
            self._applied.close()
            self._watching.close()

    async def close_async(self) -> None:
        """Runs :meth:`close` off the event loop. Once begun, it completes even if the wait is cancelled."""
        self._refuse_procedure()  # otherwise the other thread would wait for the chunk that this procedure belongs to
        await close_off_loop(self)

    def _close_late(self) -> None:
        """Closes the machine once the calls that `close` interrupted have ended.

        An error of the close does not change their results; the next call of :meth:`close` raises it.
        """
        try:
            self.close()
        except StorageError as error:
            logger.exception(
                "%s: closed after the interrupted call, with an error that the next close raises", self.path)
            self._late_error = error

    def _release(self) -> None:
        self._set_status("closed")
        try:
            with storage_errors(self.path, "closing the files"):
                try:
                    self._publish_by(None)
                    self._log.close()
                finally:
                    self._directory.close()
        finally:
            self._let_go()
            _machines.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close_async()

    def __del__(self) -> None:
        if not self._closed() and not self._forked():
            warnings.warn(f"{self!r} was never closed: what was not flushed may be lost", ResourceWarning, 2)
            self._worker.abandon()
            self._waiters.abandon()
            self._applied.abandon()
            self._watching.abandon()
            self._release()

    def _after_fork_in_child(self) -> None:
        """Marks the child's copy as forked, and ends its jobs."""
        self._set_status("forked")
        self._jobs.leave()

    # ---- apply and flush -------------------------------------------------------------------------------

    def check(self, command: bytes) -> None:
        """Raises what :meth:`apply` would raise for this command, as ``fastsm.check`` does.

        Also raises ``UnknownCommandError`` for a procedure that this machine does not have.
        """
        self._require()
        check_calls(command, self._procedures())

    async def apply_chunk(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> list[Result]:
        """Does the same as :meth:`apply`, for coroutines: in the order in which tasks start, and off the event loop.

        A small chunk is applied immediately, on the event loop, if nothing is queued. A cancelled call is dropped if it
        has not begun, otherwise it completes; ``last_applied()`` tells which. After a chunk has failed, chunks queued
        after it fail with ``OrderError`` (whose cause is that failure) until the caller of the failed one has seen it.
        """
        self._require()  # a forked child has no worker thread
        room = room_if_small(chunk) if self._worker.idle else None
        if room is not None:
            results = self._apply_if_free(chunk, room)
            if results is not None:
                return results
        entries = self._hold(chunk)  # the caller may change its list before the chunk's turn
        return await self._worker.run(self, lambda: self._apply_in_turn(entries), applies=True)

    def flush(self) -> None:
        """Makes everything applied before the call durable. Overlapping flushes share one sync.

        Raises ``StorageError`` if the sync fails; the machine is then poisoned.
        """
        self._require(True)
        self._flush_to(self._mark(False))

    async def flush_async(self) -> None:
        """Runs :meth:`flush` without blocking the event loop; what it covers is determined when the task starts."""
        self._require(True)
        mark = None if self._has_unwritten(False) else self._position()
        await self._waiters.flush(self._flush_to, mark)

    def _flush_to(self, mark: tuple[Any, int, LogId] | None) -> None:
        """Makes durable what was applied when the mark was taken; None: what is applied now."""
        if mark is None:
            self._require(True)
            mark = self._mark(False)
        if self._sync_to(mark):
            self._end_suspicion()

    def _end_suspicion(self) -> None:
        """Records that a first sync has made durable what an unclean end had left.

        In a signal handler that has interrupted a write of its own thread, that is left to the next flush.
        """
        held = None
        with suppress(ReentryError), self._turns:
            held = self._generations.note_durable(self) if self.is_running() else None
        if held is not None:
            self._generations.save_held(self, held)

    def save_hard_state(self) -> None:
        """Makes last applied and snapshot metadata durable, and everything applied with them."""
        self._require(True)
        self._flush_to(self._mark(True))

    def wait_applied(self, index: int, timeout: float | None = None) -> None:
        """Returns once the entry at an index is applied, so that reads show it, as linearizable reads require.

        Raises ``TimeoutError`` after ``timeout`` seconds; ``NotRunningError`` if the machine is stopped or closed
        first; ``OrderError`` if it is reset first, or an older state is installed.
        """
        wait_applied(self, index, timeout)

    async def wait_applied_async(self, index: int) -> None:
        """Does the same as :meth:`wait_applied`, for any number of coroutines.

        Use ``asyncio.wait_for`` for a time limit.
        """
        await self._applied.wait(self, index)

    def watch(
        self, prefix: Any = b"", *, start: tuple[int, int | None, int] | int | None = None, durable: bool = False
    ) -> Watch:
        """Returns the changes of all keys with ``prefix``, as they are applied, starting at a place in the log.

        Every put and every delete is a ``Change``, even of an absent key, in the order in which they took effect,
        without gaps or duplicates. ``start``: a :class:`Position` at which to continue, or the index of the entry to
        begin with, which may be a future one; by default, the watch begins with what is applied after this call.
        ``durable``: returns only what would survive a power loss.

        A watch is a place in the log: it costs ``apply`` nothing, and delays nothing. Raises ``CompactedError`` if
        entries from ``start`` on are gone. O(1) without a start, otherwise O(chunks in the log), without the GIL.
        """
        self._require()
        return MachineWatch(self, self._watching, prefix, start, bool(durable))

    # ---- hard state ------------------------------------------------------------------------------------

    def update_last_applied(self, log_id: LogId | tuple[int, int]) -> None:
        """Moves last applied forward, for an entry without a command (or one that the host skips).

        The change is recorded by the next frame, and durable after the next :meth:`flush`. Does nothing if ``log_id``
        equals last applied. Raises ``OrderError`` if ``log_id`` has a lower index or term than last applied, or another
        term at the same index.
        """
        self._require()
        with self._turns:
            self._require()
            self._log.check_writable()
            self._note_applied(log_id)

    def persist_last_applied(self, log_id: LogId | tuple[int, int]) -> None:
        """Calls :meth:`update_last_applied`, then :meth:`flush`: durable on return."""
        self.update_last_applied(log_id)
        self.flush()

    def update_last_snapshot_metadata(self, metadata: SnapshotMetadata) -> None:
        """Sets the metadata of the latest snapshot, in memory; :meth:`save_hard_state` makes it durable."""
        self._require()
        with self._turns:
            self._require()
            self._log.check_writable()
            self._note_metadata(metadata)

    def persist_last_snapshot_metadata(self, metadata: SnapshotMetadata) -> None:
        """Calls :meth:`update_last_snapshot_metadata`, then :meth:`save_hard_state`: durable on return."""
        self.update_last_snapshot_metadata(metadata)
        self.save_hard_state()

    # ---- reset -----------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Returns to the initial empty state, on disk too, in one atomic step that is durable on return.

        After an error the old state is intact. A stopped machine stays stopped.
        """
        self._require(True)
        with self._turns:
            self._generations.reset(self)

    async def reset(self) -> None:
        """Does the same as :meth:`clear`, for coroutines, in order with ``apply_chunk``."""
        self._require(True)
        await self._worker.run(self, lambda: self._generations.reset(self))

    # ---- snapshots and compaction ----------------------------------------------------------------------

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

        ``last_included``: any id from the base to ``last_applied()`` (the default), even in the middle of a chunk; an
        id in a gap between two terms stands for the last entry before the gap. Other ids, and terms that the entry
        cannot have, raise ``SnapshotRangeError``. ``compress``: ``"none"`` or ``"zstd"``; ``attachment``: bytes
        of the embedder to include; the defaults are options of the machine. ``progress(done, total)`` is called now and
        then, with bytes of records; the total is an estimate.

        The file is written completely or not at all. On return it is durable, and so is everything up to
        ``last_included`` in the state's own directory, with the metadata if newer than what was recorded (without room
        for it, a warning is logged instead): the host may drop its log up to there. Replicas at the same entry write
        equal files, given equal attachments and no compression.

        O(bytes of base and log), concurrent with apply and get, neither of which waits. Memory: one bit per 16 of those
        bytes, and a piece of at most 8 MiB; if entries were applied after ``last_included``, also some 20 bytes for
        each key that they wrote. Raises ``StorageError``; ``SnapshotError`` if a reset, an install or a close
        intervenes; ``StaleSnapshotError`` if a newer snapshot was put into ``directory`` in the meantime: that one
        stays.
        """
        self._require()
        self._turns.check()
        taken = self._snapshots.take(self, last_included)
        return self._snapshots.write(self, taken, directory, compress, attachment, progress)

    def install_snapshot(
        self,
        metadata: SnapshotMetadata | None,
        path: str | os.PathLike[str],
        *,
        allow_older: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Replaces state, log, terms, membership and metadata with a snapshot's, in one atomic step; durable on return.

        ``path``: the file, which is not changed, or the directory that contains it. ``metadata``: what the host was
        told about the snapshot; with None, the file's own is used. Checks, in this order: format and version
        (``SnapshotFormatError``, ``FormatVersionError``), the checksum against the file and against ``metadata``
        (``ChecksumMismatchError``), that the snapshot is not older than ``last_applied()`` (``StaleSnapshotError``,
        unless ``allow_older``), and that its terms do not contradict those of the entries applied here
        (``OrderError``). After any error or crash the old state is intact.

        Earlier views and iterators stay valid and unchanged. Ends running snapshots and compactions. O(size); reads and
        writes go on until the final step. ``progress(done, total)`` reports the copying, in bytes.
        """
        self._require()
        self._turns.check()
        self._installing.install(self, metadata, path, allow_older=allow_older, progress=progress)

    def compact(self, up_to: LogId | int | None = None, *, progress: Progress | None = None) -> None:
        """Frees the space of overwritten and deleted values, on disk and in memory.

        The state as of ``up_to`` (an id or an index, rounded down to the end of a chunk) becomes the new base;
        snapshots as of earlier entries can no longer be taken. By default that is ``retain_entries`` or
        ``retain_bytes`` before ``last_applied()``, whichever retains less, or the entry that a running snapshot needs,
        if that is earlier. If the base is already there, nothing is done.

        The new base takes effect in one atomic step, durable on return with everything applied; reads and applies go on
        meanwhile, and views stay valid. O(bytes of base and log). Raises ``SnapshotRangeError``, ``StorageError``;
        ``SnapshotError`` if a reset, an install or a close intervenes.
        """
        self._compaction.compact(self, up_to, progress)

    async def compact_async(self, up_to: LogId | int | None = None, *, progress: Progress | None = None) -> None:
        """Runs :meth:`compact`, which calls ``progress``, off the event loop."""
        self._require()
        await self._waiters.call(lambda: self.compact(up_to, progress=progress))

    def state_checksum(self, last_included: LogId | tuple[int, int] | None = None) -> tuple[LogId, bytes]:
        """Returns the id and the 32-byte state checksum that a snapshot as of an entry would have; writes nothing.

        Replicas in the same state have the same checksum: compare them to find one that has diverged. ``last_included``
        and errors: as in :meth:`write_snapshot`. O(bytes of base and log), concurrent with apply and get.
        """
        self._require()
        self._turns.check()
        return self._snapshots.state_checksum(self, self._snapshots.take(self, last_included))

    async def state_checksum_async(
        self, last_included: LogId | tuple[int, int] | None = None
    ) -> tuple[LogId, bytes]:
        """Runs :meth:`state_checksum` off the event loop; the entry is determined when the task starts."""
        self._require()
        taken = self._snapshots.take(self, last_included)
        return await self._waiters.call(lambda: self._snapshots.state_checksum(self, taken))

    def _compact_by_itself(self) -> None:
        self._compaction.compact_by_itself(self)

    # ---- snapshots, for coroutines ---------------------------------------------------------------------

    async def generate_snapshot_data(
        self,
        new_snapshot_dir: str | os.PathLike[str],
        last_included: LogId | tuple[int, int] | None = None,
        *,
        compress: str | None = None,
        attachment: bytes | None = None,
        progress: Progress | None = None,
    ) -> bytes:
        """Runs :meth:`write_snapshot` off the event loop; the entry is determined when the task starts.

        Returns the checksum.
        """
        self._require()
        taken = self._snapshots.take(self, last_included)
        metadata = await self._waiters.call(
            lambda: self._snapshots.write(self, taken, new_snapshot_dir, compress, attachment, progress))
        return metadata.checksum

    async def apply_snapshot_from_file(
        self, metadata: SnapshotMetadata | None, snapshot_path: str | os.PathLike[str]
    ) -> None:
        """Does the same as :meth:`install_snapshot`, for coroutines, in order with ``apply_chunk``."""
        self._require()
        await self._worker.run(self, lambda: self._installing.install(self, metadata, snapshot_path, has_turn=True))

    # ---- statistics ------------------------------------------------------------------------------------

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads every byte on disk again and checks it; ``progress(done, total)`` reports bytes.

        Raises ``CorruptionError``, which names file and offset, for damage. O(bytes); reads and writes go on meanwhile.
        """
        self._require()
        self._verifying.run(self, progress)

    def stats(self) -> Stats:
        """Returns counts, sizes, and what recovery found. O(1)."""
        self._require(True)
        return stats_of(self, self._generations, self._recovery)


_machines = left_by_children(FastStateMachine._after_fork_in_child)
