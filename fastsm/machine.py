"""``FastStateMachine``: life cycle, durability and policy around the compiled engine."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from fastsm.arguments import pair_of
from fastsm.background import undisturbed
from fastsm.core.compaction import Compaction
from fastsm.core.coroutines import OrderedWorker, Waiters, room_if_small
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
from fastsm.disk.files import Directory, hides_seam, left_by_children, storage_errors
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
    """A durable key-value state machine in a directory: an append-only log, and a table into it.

    ``directory`` is created (0700) when needed, locked, recovered; the machine runs at once.

    - ``contiguous``: every entry is handed over, so the next one is always ``last_applied().index + 1``.
      ``False`` for hosts that hand over only some.
    - ``sync``: ``"flush"``, durable at :meth:`flush`; ``"apply"``, durable when :meth:`apply` returns.
    - ``verify_on_open``: ``"full"`` returns after every byte was checked; ``"background"`` checks headers, table and
      terms, and the rest on a thread, during everything else: until ``stats().verified`` a value is as good as the
      disk, and damage makes the next call a ``CorruptionError``; ``"off"`` leaves it to :meth:`verify`. After an
      unclean end, what lies after the last known sync is always checked.
    - ``expect_applied``: the last entry that the embedder knows was durable here. Recovering less, or another
      known term there, is a ``CorruptionError``, raised before anything is cut.
    - ``read_only``: for tools. No lock, nothing written, safe next to a living owner; shows the state at the time of
      the call. Writes raise ``ReadOnlyError``. A snapshot may be written elsewhere; nothing is recorded here then.
    - ``retain_entries``, ``retain_bytes``: snapshots can be taken as of so many entries back, or as many as take so
      many bytes of log, whichever is less: compaction by itself goes no further. ``stats().base`` is the oldest.
    - ``auto_compact``: compaction by itself, when the dead bytes exceed ``compact_ratio`` times the live ones, and
      ``compact_floor`` bytes.
    - ``lock_timeout``: seconds to wait for another process that has the directory open, before ``LockedError``.
    - ``ordered``: keeps the keys in order from the start, for ``scan``, ``count`` and ``ordered``; otherwise the first
      of these calls builds the order, and until then it costs nothing. A state whose order was in use opens with it.
    - ``mode``: the permissions of the directory when it is created, whatever the umask says, and of the files in it,
      without those to execute. With ``0o770`` the users of a group can take turns.
    - ``snapshot_compress``, ``snapshot_attachment``: for snapshots that say nothing else, so those of the trait's
      ``generate_snapshot_data``: ``"none"`` or ``"zstd"``; bytes, or a function from the last included id to bytes.

    - ``procedures``: functions marked with :func:`fastsm.procedure`, for :func:`fastsm.call`, the same on every
      replica. ``check_procedures``, for tests, runs each call twice: what the two come to must be equal, else
      ``ProcedureError``.

    Raises ``LockedError``, ``CorruptionError``, ``FormatVersionError``, ``StorageError``; ``SnapshotError`` where
    ``snapshot_compress="zstd"`` finds no Zstandard. Thread safe. After a failed sync the machine is poisoned: reads go
    on, writes raise until the directory is opened again.

    >>> import fastsm, tempfile
    >>> with fastsm.FastStateMachine(tempfile.mkdtemp()) as machine:
    ...     machine.apply([(1, 1, fastsm.put(b"color", b"blue"))])
    ...     machine.get(b"color")
    [True]
    b'blue'
    """

    __slots__ = (
        "_applied", "_compaction", "_directory", "_generations", "_installing", "_jobs", "_late_error", "_recovery",
        "_snapshots", "_verifying", "_waiters", "_watching", "_worker", "path",
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
        self._set_status("closed")
        self._late_error: StorageError | None = None  # of a close that was put off: the next one raises it
        check_options(
            sync, verify_on_open, snapshot_compress, (retain_entries, retain_bytes, compact_ratio, compact_floor),
            lock_timeout, mode)
        self._set_procedures(registry(procedures), check_procedures)
        self.path = os.fsdecode(directory)
        expected = None if expect_applied is None else LogId(*pair_of(expect_applied, "expect_applied"))
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
                    self._verifying.start(self)  # last, since from here on any call may say that it has found damage
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

        Takes what the constructor takes. Nothing is opened before it is awaited or entered. The context closes the
        machine off the event loop, too.
        """
        return Opening(lambda: cls(directory, **options))

    def _take(self, opened: current.Generation, contiguous: bool, sync_on_apply: bool) -> None:
        """Makes what was recovered the state."""
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
        with self._jobs.closing():
            self._jobs.close()
            self._worker.close(self)
            self._waiters.end(self._jobs.is_excused)
            with self._turns:
                if not self._closed():
                    undisturbed(self._turns.lent(self._end), needs_thread=False)

    def _end(self) -> None:
        """In the writer's turn: the end of a close, which no signal handler interrupts."""
        self._verifying.stop()
        try:
            if not self._corrupt():
                self._generations.end_log(self)
        finally:
            self._group_commit.close()
            self._release()
            self._applied.close()
            self._watching.close()

    async def close_async(self) -> None:
        """:meth:`close`, off the event loop. Once begun it goes on, also when the wait for it is cancelled."""
        self._refuse_procedure()  # before the other thread waits for the chunk that this one is in
        await close_off_loop(self)

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
        """Marks the child's copy, and ends the jobs in it, should one of them have forked."""
        self._set_status("forked")
        self._jobs.leave()

    # ---- apply and flush -------------------------------------------------------------------------------

    def check(self, command: bytes) -> None:
        """Raises what :meth:`apply` would raise for this command: as ``fastsm.check``, and for unknown procedures."""
        self._require()
        check_calls(command, self._procedures())

    async def apply_chunk(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> list[Result]:
        """:meth:`apply` for coroutines: in the order in which tasks start, and not on the event loop.

        A small chunk is applied at once when nothing is queued. A cancelled call is dropped if it has not begun,
        else it goes on; ``last_applied()`` tells. Behind a chunk that failed, queued chunks fail with
        ``OrderError`` (its cause is the failure) until the caller of the failed one has seen it.
        """
        self._require()  # a forked child has no worker thread
        room = room_if_small(chunk) if self._worker.idle else None
        if room is not None:
            results = self._apply_if_free(chunk, room)
            if results is not None:
                return results
        entries = self._hold(chunk)  # the caller's list may be changed before its turn comes
        return await self._worker.run(self, lambda: self._apply_in_turn(entries), applies=True)

    def flush(self) -> None:
        """Makes everything applied before the call durable. One sync serves all flushes that overlap.

        Raises ``StorageError`` when the sync fails; the machine is poisoned then.
        """
        self._require(True)
        self._flush_to(self._mark(False))

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
        if self._sync_to(mark):
            self._end_suspicion()

    def _end_suspicion(self) -> None:
        """Notes what an unclean end had left and a first sync made durable.

        A signal handler on top of its own thread's write leaves that to the next flush.
        """
        held = None
        with suppress(ReentryError), self._turns:
            held = self._generations.note_durable(self) if self.is_running() else None
        if held is not None:
            self._generations.save_held(self, held)

    def save_hard_state(self) -> None:
        """Makes last applied and snapshot metadata durable, and with them everything applied."""
        self._require(True)
        self._flush_to(self._mark(True))

    def wait_applied(self, index: int, timeout: float | None = None) -> None:
        """Returns once the entry at an index is applied: then reads show it, as linearizable reads need.

        Raises ``TimeoutError`` after ``timeout`` seconds; ``NotRunningError`` when a stop or a close comes first;
        ``OrderError`` when a reset does, or the install of an older state.
        """
        wait_applied(self, index, timeout)

    async def wait_applied_async(self, index: int) -> None:
        """:meth:`wait_applied` for coroutines, however many; a time limit is ``asyncio.wait_for``'s."""
        await self._applied.wait(self, index)

    def watch(
        self, prefix: Any = b"", *, start: tuple[int, int | None, int] | int | None = None, durable: bool = False
    ) -> Watch:
        """Returns the changes of all keys below ``prefix``, as they are applied, from a place in the log on.

        Every put and every delete is a ``Change``, also of a key that is not there, in the order in which they took
        effect, none lost and none twice. ``start``: a :class:`Position`, where it goes on; the index of an entry, also
        one to come, from whose first change it tells; by default what is applied after this call. ``durable``: tells
        only what would survive a power loss.

        A watch is a place in the log: it costs ``apply`` nothing, and holds nothing back. Raises ``CompactedError``
        where entries from ``start`` on are gone. O(1) without a start, else O(chunks in the log), without the GIL.
        """
        self._require()
        return MachineWatch(self, self._watching, prefix, start, bool(durable))

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
            self._generations.reset(self)

    async def reset(self) -> None:
        """:meth:`clear` for coroutines, in order with ``apply_chunk``."""
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

        ``last_included``: any id from the base to ``last_applied()`` (the default), also one in the middle of a
        chunk; one that was never seen, between two terms, stands for the entry before it. Others, and those whose
        term cannot be that entry's: ``SnapshotRangeError``. ``compress``: ``"none"`` or ``"zstd"``;
        ``attachment``: bytes of the embedder that travel along; by default what the machine was opened with.
        ``progress(done, total)`` is told now and then, in bytes of records; the total is an estimate.

        The file is there whole or not at all. On return it is durable, and so is everything up to ``last_included``
        in the state's own directory, with the metadata if it is newer than what is known: the host may drop its log
        up to there. Replicas at the same entry write equal files, attachments and codec "none" being equal.

        O(bytes of base and log), while apply and get go on: nobody waits. Memory: a bit for each 16 bytes of them, and
        a piece of at most 8 MiB; if entries were applied after ``last_included``, some 20 bytes for each key that these
        wrote. Raises ``StorageError``; ``SnapshotError`` when a reset, an install or a close comes between;
        ``StaleSnapshotError`` when a newer snapshot was put into ``directory`` while this one was written, and stays.
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
        self._installing.install(self, metadata, path, allow_older=allow_older, progress=progress)

    def compact(self, up_to: LogId | int | None = None, *, progress: Progress | None = None) -> None:
        """Gives the space of overwritten and deleted values back, on disk and in memory.

        The state as of ``up_to`` (an id or an index, rounded down to a chunk's end) becomes the new base; snapshots as
        of earlier entries can no longer be taken. By default that is ``retain_entries`` or ``retain_bytes`` before
        ``last_applied()``, whichever retains less, or what a running snapshot needs, if that is earlier. When that is
        the base already, nothing is done at all.

        One atomic step, durable on return with everything applied; reads and applies go on, views stay valid.
        O(bytes of base and log). Raises ``SnapshotRangeError``, ``StorageError``; ``SnapshotError`` when a reset, an
        install or a close comes between.
        """
        self._compaction.compact(self, up_to, progress)

    async def compact_async(self, up_to: LogId | int | None = None, *, progress: Progress | None = None) -> None:
        """:meth:`compact`, off the event loop; ``progress`` is called there, too."""
        self._require()
        await self._waiters.call(lambda: self.compact(up_to, progress=progress))

    def state_checksum(self, last_included: LogId | tuple[int, int] | None = None) -> tuple[LogId, bytes]:
        """The id and the 32-byte state checksum that a snapshot there would carry; none is written.

        Replicas in the same state have the same: compare them to find one that diverged. ``last_included`` as for
        :meth:`write_snapshot`, whose errors these are, too. O(bytes of base and log), while apply and get go on.
        """
        self._require()
        self._turns.check()
        return self._snapshots.state_checksum(self, self._snapshots.take(self, last_included))

    async def state_checksum_async(
        self, last_included: LogId | tuple[int, int] | None = None
    ) -> tuple[LogId, bytes]:
        """:meth:`state_checksum`, off the event loop; its point is fixed when the task starts."""
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
        """:meth:`write_snapshot`, off the event loop; its point is fixed when the task starts. Returns the checksum."""
        self._require()
        taken = self._snapshots.take(self, last_included)
        metadata = await self._waiters.call(
            lambda: self._snapshots.write(self, taken, new_snapshot_dir, compress, attachment, progress))
        return metadata.checksum

    async def apply_snapshot_from_file(
        self, metadata: SnapshotMetadata | None, snapshot_path: str | os.PathLike[str]
    ) -> None:
        """:meth:`install_snapshot` for coroutines, in order with ``apply_chunk``."""
        self._require()
        await self._worker.run(self, lambda: self._installing.install(self, metadata, snapshot_path, has_turn=True))

    # ---- statistics ------------------------------------------------------------------------------------

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads every byte on disk again and checks it; ``progress(done, total)`` is told, in bytes.

        Damage is a ``CorruptionError`` that names file and offset. O(bytes); reads and writes go on meanwhile.
        """
        self._require()
        self._verifying.run(self, progress)

    def stats(self) -> Stats:
        """Counts, sizes, and what recovery found. O(1)."""
        self._require(True)
        return stats_of(self, self._generations, self._recovery)


_machines = left_by_children(FastStateMachine._after_fork_in_child)
