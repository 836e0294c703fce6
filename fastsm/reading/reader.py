"""``Reader``: the live state of a directory, from any process."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastsm.arguments import at_least_zero, end_of_wait, index_of, pair_of
from fastsm.disk.files import Directory, absolute_path, storage_errors
from fastsm.disk.forks import left_by_children
from fastsm.disk.published import Publication, steps_back
from fastsm.errors import ReentryError, SnapshotRangeError, StorageError
from fastsm.event_loops import call, event_loops
from fastsm.generation.watch import Watch
from fastsm.reading.following import Follower
from fastsm.reading.frames import is_in
from fastsm.reading.news import Following
from fastsm.reading.opening import Opened, open_directory, recover_state
from fastsm.reading.watching import ReaderWatch, Tail
from fastsm.snapshot.writer import state_checksum
from fastsm.types import LogId, flattened, log_id_text
from fastsm.units import count_text, size_text

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastsm.snapshot.capture import Capture

OPENING_PAUSE = 0.01  # seconds between two looks for a state that does not exist yet
SIGNAL_SECONDS = 0.1  # at most this many seconds without a check for signals
FIRST_STEP = 0.0002  # of `wait_async`, in seconds
LAST_STEP = 0.003

logger = logging.getLogger("fastsm")


@dataclass(frozen=True, slots=True)
class ReaderStats:
    """A moment of a reader, as returned by :meth:`fastsm.Reader.stats`. Sizes are in bytes.

    ``rebuilt`` counts how often the state went back: a reset, an older snapshot, a restored directory, a recovery that
    found less. ``opened`` counts the generations that were opened, including the first. ``table_bytes`` is memory of
    this process; base and log are shared by all processes that have them mapped.
    """

    keys: int
    live_bytes: int
    dead_bytes: int
    log_bytes: int
    base_bytes: int
    generation: int
    base: LogId
    table_bytes: int
    table_load: float
    term_runs: int
    last_applied: LogId
    durable: LogId
    opened: int
    rebuilt: int

    def __str__(self) -> str:
        rows = {
            "keys": f"{self.keys:,}, {size_text(self.live_bytes)} live, {size_text(self.dead_bytes)} dead",
            "last applied": log_id_text(self.last_applied),
            "durable": log_id_text(self.durable),
            "files": f"log {size_text(self.log_bytes)}, base {size_text(self.base_bytes)} as of "
            f"{log_id_text(self.base)}, generation {self.generation}",
            "table": f"{size_text(self.table_bytes)}, {self.table_load:.0%} full",
            "terms": count_text(self.term_runs, "run"),
            "opened": count_text(self.opened, "generation"),
            "rebuilt": count_text(self.rebuilt, "time"),
        }
        return "\n".join(f"{label:12}  {text}" for label, text in rows.items())

    def as_dict(self) -> dict[str, Any]:
        """Returns the same as a flat dict of numbers, as metrics libraries expect."""
        return flattened(self)


class Reader(Following, Follower):
    """The live state of a directory that another process owns: all its reads, without calls to the owner.

    Takes no lock and writes nothing; the directory may be on a read-only mount, or belong to another user if its
    ``mode`` lets the reader's user read it. The owner neither tracks readers nor waits for them. A reader also works
    without a running owner, and continues when one starts.

    The state does not change between two calls of :meth:`refresh`; each chunk becomes visible as a whole. It shows what
    is applied, as reads in the owner do; :meth:`durable` says what would survive a power loss. It follows everything
    that an owner does, and goes back only if the owner's state does, which ``stats().rebuilt`` counts.

    - ``ordered``: keeps the keys in order from the start, for ``scan``, ``count`` and ``ordered``; otherwise the first
      of these calls builds the order.
    - ``wait_for_owner``: seconds to wait for a directory that does not exist, or has no state yet, before a
      ``StorageError`` (ENOENT).

    A reader that is not refreshed keeps its generation's files, and so their disk space. Its own memory is the table,
    about 20 bytes per key; keys and values are shared. Any thread may use it, and a reader made before a fork works in
    the child.

    Opening is O(keys) from a saved table (a few milliseconds per million), otherwise O(bytes of base and log). Raises
    ``StorageError``, ``CorruptionError``, ``FormatVersionError``.

    >>> import fastsm, tempfile
    >>> directory = tempfile.mkdtemp()
    >>> with fastsm.FastStateMachine(directory) as machine, fastsm.Reader(directory) as reader:
    ...     machine.apply([(1, 1, fastsm.put(b"color", b"blue"))])
    ...     reader.get(b"color")
    ...     reader.refresh()
    ...     reader.get(b"color")
    [True]
    LogId(index=1, term=1)
    b'blue'
    """

    __slots__ = (
        "__weakref__", "_close_late", "_directory", "_following", "_lock", "_missing", "_ordered", "_tail", "_watches",
        "path",
    )  # fmt: skip

    path: str
    _recover = staticmethod(recover_state)

    def __init__(
        self, directory: str | os.PathLike[str], *, ordered: bool = False, wait_for_owner: float = 0.0
    ) -> None:
        at_least_zero("wait_for_owner", wait_for_owner, " seconds")
        self.path = absolute_path(directory)
        self._directory: Directory | None = None
        self._begin_following(threading.RLock())
        self._tail: Tail | None = None  # made by the first watch
        self._watches: weakref.WeakSet[ReaderWatch] = weakref.WeakSet()
        self._ordered = ordered
        deadline = time.monotonic() + wait_for_owner
        while True:
            try:
                self._open_files()
                break
            except StorageError as error:
                left = deadline - time.monotonic()
                if error.errno != errno.ENOENT or left <= 0:
                    raise
                time.sleep(min(left, OPENING_PAUSE))
        _readers.add(self)
        self._set_status("running")
        self._follow()

    def __repr__(self) -> str:
        if self._closed():
            return f"<Reader {self.path!r}: closed>"
        return f"<Reader {self.path!r}: {self.len()} keys, applied {tuple(self.last_applied())}>"

    def __len__(self) -> int:
        return self.len()

    def __bool__(self) -> bool:
        return True  # a reader counts as true even if the state is empty

    def is_empty(self) -> bool:
        """Returns whether there are no live keys."""
        return self.len() == 0

    # ---- waiting ---------------------------------------------------------------------------------------

    def wait(self, index: int, timeout: float | None = None) -> LogId:
        """Refreshes until the entry at an index is applied; returns last applied. Waits without the GIL.

        ``TimeoutError`` after ``timeout`` seconds, and what :meth:`refresh` raises. It sees an entry within 1.5 ms.
        """
        index, deadline = index_of(index), end_of_wait(timeout)
        while True:
            position = self.refresh()
            if position.index >= index:
                return position
            left = SIGNAL_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise too_late(index, timeout, position)
            self._await_news(min(left, SIGNAL_SECONDS))

    async def wait_async(self, index: int, timeout: float | None = None) -> LogId:
        """Does what :meth:`wait` does, for coroutines. It sees an entry within 5 ms.

        Slow work, such as the first refresh after a compaction, is done on another thread. Other tasks run between any
        two refreshes, however fast the owner is.
        """
        index, deadline = index_of(index), end_of_wait(timeout)
        sleep = event_loops().sleep
        while True:
            self._require()
            position = await call(self.refresh)[0] if self._has_much_to_take() else self.refresh()
            step = 0.0
            while position.index < index:
                left = LAST_STEP if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    raise too_late(index, timeout, position)
                await sleep(min(step, left))
                if self._position.index >= index or self._closed() or self._lookout.is_worth_a_look():
                    break
                step = min(1.5 * step, LAST_STEP) or FIRST_STEP
            else:
                return position

    # ---- following -------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._closed() or not self._broken:
            self._require()

    def _take_opened(self, opened: Opened, publication: Publication | None) -> None:
        self._order_for(opened)
        continued = self._opened == 0 or self._continues(opened, publication)
        generation = opened.generation
        if not continued:
            logger.info(
                "%s: the state went back, or is another one: from %s to %s (generation %d)", self.path,
                self._position, opened.applied, generation.log.head.generation)
        self._show(
            generation.log, generation.index, opened.applied, opened.durable, generation.verified, opened.incarnation,
            publication, continued)

    def _order_for(self, opened: Opened) -> None:
        if self._ordered:
            self._want_order()
        self._order_next(opened.generation.index, opened.generation.log.mapping)

    def _continues(self, opened: Opened, publication: Publication | None) -> bool:
        """Returns whether a state continues the one that is shown: by its log, its incarnation, or its ids."""
        log, index = opened.generation.log, opened.generation.index
        before = self._lookout.publication
        if self._position.index == 0:
            return True  # nothing to go back from
        if log.head.identity == self._log.head.identity and not self._broken:
            return is_in(self._log, log)
        if before is not None and before.is_same(publication) and self._incarnation and opened.incarnation:
            same = steps_back(opened.incarnation) == steps_back(self._incarnation)
            return same and opened.applied.index >= self._position.index
        return self._is_continued_by(log, index, opened.applied)

    # ---- changes ---------------------------------------------------------------------------------------

    def watch(
        self, prefix: Any = b"", *, start: tuple[int, int | None, int] | int | None = None, durable: bool = False
    ) -> Watch:
        """Returns the changes of all keys with ``prefix``, as the owner applies them, starting at a place in the log.

        Works like :meth:`fastsm.FastStateMachine.watch`, with the same arguments. It proceeds by itself, whether or not
        this reader is refreshed, and may be ahead of what the reader shows: by default it returns what is applied after
        this call. A ``start`` may come from a watch of the owner, or of another process.

        It continues through compactions, restarts and kills of the owner. Raises ``CompactedError``, now or from a
        read, if entries are gone, or the state was replaced by a reset, an install or another directory. It ends when
        the reader is closed. A waiting watch sees a change within 1.5 ms, on an event loop within 5 ms.

        O(bytes of the log) for a reader's first watch and after each compaction, without the GIL; then O(1) without a
        start, otherwise O(chunks in the log). Thread safe.
        """
        self._require()
        with self._lock:
            if self._following:
                raise ReentryError(f"{self.path}: this thread is already refreshing this reader; call again later")
            self._require()
            if self._tail is None:
                self._tail = Tail(self.path)
            tail = self._tail
        watch = ReaderWatch(tail, prefix, start, bool(durable))
        self._watches.add(watch)
        return watch

    # ---- facts ----------------------------------------------------------------------------------------

    def owner(self) -> int | None:
        """Returns the process id of the owner that has the directory open, or None.

        Queries the owner's lock; returns 0 if there is an owner whose id cannot be read.
        """
        self._require()
        directory = open_directory(self.path)
        try:
            with storage_errors(self.path, "looking for the directory's owner"):
                holder = directory.owner()
        finally:
            directory.close()
        return None if holder is None else holder.pid or 0

    def state_checksum(self, last_included: LogId | tuple[int, int] | None = None) -> tuple[LogId, bytes]:
        """Returns the id and the 32-byte state checksum that a snapshot would have; equal on all replicas.

        ``last_included``: an id from ``stats().base`` to ``last_applied()``; others are a ``SnapshotRangeError``. An
        entry that the owner noted by ``update_last_applied``, in a new term and after a gap, counts once an entry with
        a command follows it, or a flush; by default it is left out until then. O(bytes of base and log); other threads
        can keep reading.
        """
        self._require()
        return self._checksum_of(self._captured(last_included))

    async def state_checksum_async(
        self, last_included: LogId | tuple[int, int] | None = None
    ) -> tuple[LogId, bytes]:
        """Does what :meth:`state_checksum` does, off the event loop; the entry is determined when the task starts."""
        self._require()
        return await call(partial(self._checksum_of, self._captured(last_included)))[0]

    def _captured(self, last_included: LogId | tuple[int, int] | None) -> Capture:
        certain, applied = self._last_certain(), self.last_applied()
        if last_included is None:
            return self._capture(None if certain == applied else certain)
        if certain.index < pair_of(last_included, "last_included")[0] <= applied.index:
            raise SnapshotRangeError(
                f"{self.path}: the terms after {certain} are not certain: the owner has noted {applied}, "
                "and no frame has it yet; ask again after the owner has applied an entry, or flushed")
        return self._capture(last_included)

    def _checksum_of(self, capture: Capture) -> tuple[LogId, bytes]:
        def tick(_done: int = 0) -> None:
            self._require()

        return capture.last_included, state_checksum(capture, tick)

    def stats(self) -> ReaderStats:
        """Returns counts and sizes, and how often the state went back. O(1)."""
        (
            log, table_bytes, table_load, keys, live_bytes, dead_bytes, log_bytes, term_runs, applied_index,
            applied_term, durable_index, durable_term, *_,
        ) = self._figures()  # fmt: skip
        return ReaderStats(
            keys=keys,
            live_bytes=live_bytes,
            dead_bytes=dead_bytes,
            log_bytes=log_bytes,
            base_bytes=log.base_bytes,
            generation=log.head.generation,
            base=LogId(log.head.base_index, log.head.base_term),
            table_bytes=table_bytes,
            table_load=table_load,
            term_runs=term_runs,
            last_applied=LogId(applied_index, applied_term),
            durable=LogId(durable_index, durable_term),
            opened=self._opened,
            rebuilt=self._rebuilt,
        )

    # ---- the end ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Releases memory and files. Idempotent; views and iterators stay valid.

        In a signal handler on top of a refresh of the same thread, it takes effect when the refresh ends.
        """
        if self._closed():
            return
        with self._lock:
            if self._following:
                self._close_late = True
            elif not self._closed():
                self._release()

    def _release(self) -> None:
        self._close_late = False
        self._set_status("closed")
        _readers.discard(self)
        directory, self._directory = self._directory, None
        tail, self._tail = self._tail, None
        with storage_errors(self.path, "closing the files"), ExitStack() as rest:
            rest.callback(self._let_go)
            rest.callback(self._lookout.turn_to, None)
            if directory is not None:
                rest.callback(directory.close)
            rest.callback(self._log.close)
            if tail is not None:
                rest.callback(tail.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _after_fork_in_child(self) -> None:
        """Resets the lock in a forked child, where threads that were working, or held it, are gone."""
        self._begin_following(threading.RLock())
        self._after_fork()
        if self._tail is not None:
            self._tail.after_fork()
        for watch in list(self._watches):
            watch._after_fork()


def too_late(index: int, timeout: float | None, position: LogId) -> TimeoutError:
    return TimeoutError(f"entry {index} was not applied within {timeout} s: last applied is {position}")


_readers = left_by_children(Reader._after_fork_in_child, go_on=True)
