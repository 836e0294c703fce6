"""``RaftLog``: the crash-safe log, term and vote of a Raft node."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastsm.arguments import at_least_zero
from fastsm.core.coroutine_order import Waiters
from fastsm.disk.files import Directory, absolute_path, hides_seam, storage_errors
from fastsm.errors import StorageError
from fastsm.journal.checking import check_segments
from fastsm.journal.engine import LogEngine
from fastsm.journal.journal import Journal
from fastsm.types import Recovery, flattened
from fastsm.units import count_text, size_text, time_text

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger("fastsm")

SEGMENT_BYTES = 64 << 20  # once a segment has reached this size, another one is begun


@dataclass(frozen=True, slots=True)
class RaftLogStats:
    """The figures of a log at one moment, as returned by :meth:`fastsm.RaftLog.stats`. Sizes are in bytes.

    ``print`` shows them in human units; :meth:`as_dict` is for metrics.
    """

    first_index: int
    last_index: int
    last_term: int
    durable_index: int
    entries: int
    log_bytes: int
    segments: int
    sync_count: int
    sync_seconds: float
    recovery: Recovery

    def __str__(self) -> str:
        syncs = count_text(self.sync_count, "sync", "syncs")
        held = f"{self.first_index:,} to {self.last_index:,}" if self.entries else f"none, after {self.last_index:,}"
        rows = {
            "entries": f"{held}, the last of term {self.last_term:,}",
            "durable": f"up to entry {self.durable_index:,}",
            "files": f"{count_text(self.segments, 'segment')}, {size_text(self.log_bytes)}",
            "syncs": syncs + (f" in {time_text(self.sync_seconds)}" if self.sync_count else ""),
            "recovery": str(self.recovery),
        }
        return "\n".join(f"{label:12}  {text}" for label, text in rows.items())

    def as_dict(self) -> dict[str, Any]:
        """Returns these figures as a flat dict of numbers, as metrics libraries expect."""
        return flattened(self)


class RaftLog(LogEngine):
    """The persistent state of Raft itself: a node's entries, current term and vote, in a directory of their own.

    ``directory`` is created (0700) if needed, locked, and recovered. After a kill, everything appended is still
    there; after a power loss, everything synced, and a prefix of the rest. A torn tail is cut and logged.

    - ``lock_timeout``: seconds to wait for another process that has the directory open, before ``LockedError``.

    Raises ``LockedError``, ``CorruptionError`` (also for a directory that lost one of its files),
    ``FormatVersionError``, ``StorageError``. Thread safe: writers take turns; reads and syncs run concurrently. After a
    failed sync the log is poisoned: reads still work, writes raise until the directory is opened again. In a forked
    child, and after a close, every call raises ``NotRunningError``.

    >>> import fastsm, tempfile
    >>> with fastsm.RaftLog(tempfile.mkdtemp()) as log:
    ...     log.save_hard_state(1, b"node-1")
    ...     log.append([(1, 1, b"x=1"), (2, 1, b"x=2")])
    ...     log.sync()
    ...     log.entries(2, 9)
    [Entry(index=2, term=1, command=b'x=2')]
    """

    __slots__ = ("__weakref__", "_absolute_path", "_late_error", "_recovery", "_waiters", "path")

    path: str

    @hides_seam
    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        lock_timeout: float = 0,
        _files: type[Directory] = Directory,
    ) -> None:
        self._late_error: StorageError | None = None  # of a close that was put off; the next close raises it
        self.path = os.fsdecode(directory)
        self._absolute_path = absolute_path(self.path)
        self._waiters = Waiters()
        at_least_zero("lock_timeout", lock_timeout, " seconds")
        started = time.perf_counter()
        log = Journal(directory, durable=True, lock_timeout=lock_timeout, _files=_files)
        try:
            found = self._attach(log, SEGMENT_BYTES)
        except BaseException:
            log.abandon()
            raise
        self._recovery = Recovery(*found, time.perf_counter() - started)
        logger.info("%s: open, %s", self.path, self._recovery)

    def __repr__(self) -> str:
        if self._is_closed():
            return f"<RaftLog {self.path!r}: not open>"
        return f"<RaftLog {self.path!r}: entries {self.first_index} to {self.last_index}>"

    # ---- sync ------------------------------------------------------------------------------------------

    async def sync_async(self) -> None:
        """Runs :meth:`sync` without blocking the event loop; what it covers is determined when the task starts.

        However many coroutines wait, at most one sync is running and one more is queued. Cancelling the wait does
        not stop the sync.
        """
        await self._waiters.flush(self._sync_to, self._mark())

    # ---- look ------------------------------------------------------------------------------------------

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads every byte on disk again and checks it; ``progress(done, total)`` reports bytes.

        Raises ``CorruptionError``, which names file and offset, for damage. O(bytes); reads and writes go on meanwhile.
        """
        segments = self._files()
        with storage_errors(self.path, "opening the directory to verify"):
            directory = Directory(self._absolute_path, create=False)
        try:
            check_segments(
                directory, segments, lambda name: any(name == needed for needed, *_ in self._files()), progress)
        finally:
            directory.close()

    def stats(self) -> RaftLogStats:
        """Returns counts, sizes, and what recovery found. O(segments)."""
        return RaftLogStats(*self._counts(), self._recovery)

    # ---- close -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Makes everything durable, ends the log cleanly, and releases files and lock. Idempotent.

        Everything is released even if the last sync fails; the ``StorageError`` is raised afterwards.

        A signal handler or a finalizer may call it at any time. If its own thread is in the middle of a write or a sync
        of this log, that completes first, and then the log is closed; an error of that close is raised by the next call
        of ``close``. An interrupted call that is waiting for its turn gets a ``NotRunningError``.
        """
        if self._is_closed():
            error, self._late_error = self._late_error, None
            if error is not None:
                raise error
            return
        if self._turns.step_aside(self._close_late):
            return
        self._waiters.close()
        with self._turns:
            if not self._is_closed():
                self._finish()

    def _close_late(self) -> None:
        """Closes the log, after the interrupted calls that the close had to wait for; their results do not change.

        An error of the close is raised by the next call of :meth:`close`.
        """
        try:
            self.close()
        except StorageError as error:
            logger.exception(
                "%s: closed after the interrupted call, with an error that the next close raises", self.path)
            self._late_error = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._is_closed():
            try:
                warnings.warn(f"{self!r} was never closed: what was not synced may be lost", ResourceWarning, 2)
            finally:
                self._waiters.abandon()
                self._abandon()
