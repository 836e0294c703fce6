"""``Reader``: the living state of a directory, from any process."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fastsm.disk.files import Directory, left_by_children, storage_errors
from fastsm.disk.published import Publication, Published, may_have_readers, steps_back
from fastsm.errors import CorruptionError, ReentryError, StorageError
from fastsm.event_loops import call, event_loops
from fastsm.reading.following import Follower
from fastsm.reading.opening import Opened, open_directory, open_publication, open_state
from fastsm.snapshot.writer import state_checksum
from fastsm.types import LogId, log_id_text
from fastsm.units import count_text, size_text

if TYPE_CHECKING:
    from typing_extensions import Self

OPENING_PAUSE = 0.01  # seconds between two looks for a state that is not there yet
SIGNAL_SECONDS = 0.1  # at most so long without a look at signals
FIRST_STEP = 0.0002  # of `wait_async`, in seconds
LAST_STEP = 0.003
LARGE = 256 << 10  # bytes of frames: more are not taken on an event loop

logger = logging.getLogger("fastsm")


@dataclass(frozen=True, slots=True)
class ReaderStats:
    """A moment of a reader, as :meth:`fastsm.Reader.stats` gives it. Sizes are in bytes.

    ``rebuilt`` counts how often the state went back: a reset, an older snapshot, a restored directory, a recovery that
    found less. ``opened`` counts the generations that were opened, the first included. ``table_bytes`` is this
    process's own memory; base and log are shared by all processes that have them mapped.
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
        """The same, flat: one name, one number, as metrics libraries like it."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, LogId):
                flat[f"{name}_index"], flat[f"{name}_term"] = value
            else:
                flat[name] = value
        return flat


class Reader(Follower):
    """The living state of a directory that another process owns: every read of it, without a call to the owner.

    Takes no lock and writes nothing; the directory may be on a read-only mount, and another user's where its ``mode``
    lets this one read. The owner neither knows of readers nor waits for them. It works without a living owner, too, and
    goes on when one comes.

    The state stands still between two :meth:`refresh`; each chunk becomes visible as a whole. It shows what is applied,
    as reads in the owner do; :meth:`durable` says what would survive a power loss. It follows through everything that
    an owner does, and goes back only where the owner's state does: ``stats().rebuilt`` counts that.

    - ``ordered``: keeps the keys in order from the start, for ``scan``, ``count`` and ``ordered``; otherwise the first
      of these calls builds the order.
    - ``wait_for_owner``: seconds to wait for a directory that is not there, or has no state yet, before a
      ``StorageError`` (ENOENT).

    A reader that is not refreshed keeps its generation's disk space. Memory of its own is the table, some 20 bytes for
    each key; keys and values are shared. Any thread may use it, and one that was made before a fork works in the child.

    Opening is O(1) from a saved table, else O(bytes of base and log). Raises ``StorageError``, ``CorruptionError``,
    ``FormatVersionError``.

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
        "__weakref__", "_close_late", "_directory", "_following", "_lock", "_opened", "_ordered", "_rebuilt", "path",
    )  # fmt: skip

    path: str

    def __init__(
        self, directory: str | os.PathLike[str], *, ordered: bool = False, wait_for_owner: float = 0.0
    ) -> None:
        if not wait_for_owner >= 0:  # NaN, too
            raise ValueError(f"wait_for_owner={wait_for_owner!r}: expected 0 or more seconds")
        self.path = os.path.abspath(os.fsdecode(directory))
        self._directory: Directory | None = None
        self._lock = threading.RLock()  # one thread follows at a time
        self._following = False  # it is at it: a signal handler of that thread must not
        self._close_late = False
        self._ordered = ordered
        self._opened = self._rebuilt = 0
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
        return True  # a reader is there, however empty the state

    def is_empty(self) -> bool:
        """Returns whether there is no live key."""
        return self.len() == 0

    # ---- waiting ---------------------------------------------------------------------------------------

    def wait(self, index: int, timeout: float | None = None) -> LogId:
        """Refreshes until the entry at an index is applied; returns last applied. Waits without the GIL.

        ``TimeoutError`` after ``timeout`` seconds, and what :meth:`refresh` raises. It sees an entry within 1.5 ms.
        """
        if timeout is not None and not timeout >= 0:  # NaN, too
            raise ValueError(f"timeout={timeout!r}: expected 0 or more seconds, or None")
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            position = self.refresh()
            if position.index >= index:
                return position
            left = SIGNAL_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"entry {index} was not applied within {timeout} s: last applied is {position}")
            self._await_news(min(left, SIGNAL_SECONDS))

    async def wait_async(self, index: int) -> LogId:
        """:meth:`wait` for coroutines; a time limit is ``asyncio.wait_for``'s. It sees an entry within 5 ms.

        What takes long, as the first refresh after a compaction does, is done on another thread.
        """
        sleep = event_loops().sleep
        step = FIRST_STEP
        while True:
            position = await call(self.refresh)[0] if self._has_much_to_take() else self.refresh()
            if position.index >= index:
                return position
            await sleep(step)
            step = min(1.5 * step, LAST_STEP)

    def _has_much_to_take(self) -> bool:
        """Whether a refresh may take long."""
        self._require()
        publication = self._publication()
        if publication is None or not publication.is_news():
            return False
        published = publication.peek()
        if published is None:
            return False
        same = (published.identity, published.incarnation) == (self._log.head.identity, self._incarnation)
        return not same or published.end > self._taken_up_to() + LARGE or self._broken

    # ---- following -------------------------------------------------------------------------------------

    def _follow(self) -> LogId:
        """:meth:`refresh` where something may be new."""
        with self._lock:
            if self._following:
                raise ReentryError(f"{self.path}: this thread is refreshing this reader already; call again later")
            self._following = True
            try:
                if not self._broken:
                    self._require()
                self._take_news()
            finally:
                self._following = False
                if self._close_late:
                    self._release()
            return self._position

    def _take_news(self) -> None:
        if self._is_elsewhere():
            self._reopen()
            return
        publication = self._publication()
        if publication is None:
            return
        published = publication.read()
        if published is None or not may_have_readers(published):
            return  # what was published before the machine was started anew says nothing of what its disk kept
        if self._is_continued(published):
            self._goes_on_in(published.incarnation)
            try:
                self._take_up_to(
                    published.end, published.applied_index, published.applied_term, published.durable_index)
            except CorruptionError:
                if self.owner() is not None:
                    raise
                # What an owner has published, and the disk then lost: the next owner will not have it either.
            return
        try:
            self._reopen()
        except BaseException:
            publication.forget()  # whatever is published is to be looked at again
            raise

    def _is_elsewhere(self) -> bool:
        """Whether another file, or the first one, is where an owner publishes. Once it is there: a look a second."""
        publication = self._publication()
        if publication is not None:
            with storage_errors(publication.path, "looking whether it is the same"):
                return self._is_due() and not publication.is_at(publication.path)
        try:
            directory = open_directory(self.path)
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        try:
            return open_publication(directory) is not None
        finally:
            directory.close()

    def _is_continued(self, published: Published) -> bool:
        """Whether the published log is the one that is read here, and goes on from the frames that were taken."""
        if self._broken or published.identity != self._log.head.identity:
            return False
        if published.incarnation == self._incarnation:
            return True
        return published.end >= self._taken_up_to() and self._is_still_there()

    def _reopen(self) -> None:
        """Shows the state that is there now in the place of the one before."""
        before = self._log
        continued = self._open_files()
        if not continued:
            self._rebuilt += 1
            logger.info(
                "%s: the state went back, or is another one: %s now (generation %d)", self.path,
                self._position, self._log.head.generation)
        before.close()

    def _open_files(self) -> bool:
        """Opens what is there now, and shows it; returns whether it continues what was shown before."""
        directory = open_directory(self.path)
        try:
            publication = open_publication(directory)
            opened = open_state(directory, publication)
            try:
                self._order_for(opened)
                continued = self._opened == 0 or self._continues(opened, publication)
                generation = opened.generation
                self._show(
                    generation.log, generation.index, opened.applied, opened.durable, generation.verified,
                    opened.incarnation)
            except BaseException:
                opened.generation.log.close()
                raise
        except BaseException:
            directory.close()
            raise
        old, self._directory = self._directory, directory
        self._look_at(publication)
        self._opened += 1
        if old is not None:
            old.close()
        return continued

    def _order_for(self, opened: Opened) -> None:
        if self._ordered:
            self._want_order()
        self._order_next(opened.generation.index, opened.generation.log.mapping)

    def _continues(self, opened: Opened, publication: Publication | None) -> bool:
        """Whether a state goes on from the one that is shown: by its log, by its owner's word, or by its ids."""
        log, index = opened.generation.log, opened.generation.index
        before = self._publication()
        if self._position.index == 0:
            return True  # there is nothing to go back from
        if log.head.identity == self._log.head.identity and not self._broken:
            return self._is_in(log)
        if before is not None and before.is_same(publication) and self._incarnation and opened.incarnation:
            same = steps_back(opened.incarnation) == steps_back(self._incarnation)
            return same and opened.applied.index >= self._position.index
        return self._is_continued_by(log, index, opened.applied)

    # ---- what there is to know -------------------------------------------------------------------------

    def owner(self) -> int | None:
        """Returns the process id of the owner who has the directory open, or None.

        Asks the system for the owner's lock; 0 where an owner is there whose id cannot be read.
        """
        self._require()
        directory = open_directory(self.path)
        try:
            with storage_errors(self.path, "looking for its owner"):
                holder = directory.owner()
        finally:
            directory.close()
        return None if holder is None else holder.pid or 0

    def state_checksum(self, last_included: LogId | tuple[int, int] | None = None) -> tuple[LogId, bytes]:
        """The id and the 32-byte state checksum that a snapshot there would carry; equal on all replicas.

        ``last_included``: an id from ``stats().base`` to ``last_applied()``; others are a ``SnapshotRangeError``.
        O(bytes of base and log); other threads read on.
        """
        self._require()
        capture = self._capture(last_included)

        def tick(_done: int = 0) -> None:
            self._require()

        return capture.last_included, state_checksum(capture, tick)

    def stats(self) -> ReaderStats:
        """Counts and sizes, and how often the state went back. O(1)."""
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
        """Gives memory and files back. Idempotent; views and iterators stay valid.

        In a signal handler on top of a refresh of its own thread it takes effect when that ends.
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
        try:
            with storage_errors(self.path, "closing the files"):
                self._log.close()
                if directory is not None:
                    directory.close()
        finally:
            self._look_at(None)
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _after_fork_in_child(self) -> None:
        """A child goes on by itself. Threads that were at work are gone, and with them whoever held the lock."""
        self._lock = threading.RLock()
        self._following = False
        self._after_fork()


_readers = left_by_children(Reader._after_fork_in_child)
