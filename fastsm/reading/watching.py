"""Watches of a reader: they follow the owner's log by themselves, whether or not the reader is refreshed."""

from __future__ import annotations

import time
from threading import RLock
from typing import TYPE_CHECKING, Any

from fastsm.disk.files import Directory, storage_errors
from fastsm.disk.published import state_number
from fastsm.errors import NotRunningError
from fastsm.event_loops import call, event_loops
from fastsm.generation.watch import Watch
from fastsm.reading.change_source import TailSource, TailState
from fastsm.reading.frames import is_in
from fastsm.reading.news import Following
from fastsm.reading.opening import recover_frames

if TYPE_CHECKING:
    from fastsm.disk.published import Publication
    from fastsm.reading.opening import Opened

SIGNAL_SECONDS = 0.1  # at most this many seconds without a check for signals
FIRST_STEP = 0.0002  # on event loops, in seconds
LAST_STEP = 0.003


class Tail(Following, TailState):
    """The log of a directory as its owner writes it, for all watches of one reader."""

    __slots__ = ("_close_late", "_closed", "_directory", "_following", "_lock", "_missing", "path")

    _recover = staticmethod(recover_frames)

    def __init__(self, path: str) -> None:
        self.path = path
        self._directory: Directory | None = None
        self._closed = False
        self._begin_following(RLock())
        self._open_files()

    def _require_open(self) -> None:
        if self._closed:
            raise NotRunningError(f"{self.path}: this reader is closed: open another one")

    def _take_opened(self, opened: Opened, publication: Publication | None) -> None:
        self._show(
            opened.generation.log, opened.generation.index.terms, opened.applied, opened.durable, opened.incarnation,
            publication, self._directory is None or self._continues(opened, publication))

    def _continues(self, opened: Opened, publication: Publication | None) -> bool:
        """Returns whether a state continues the one that is shown: by its log, or by its incarnation."""
        if opened.generation.log.head.identity == self._log.head.identity:
            return is_in(self._log, opened.generation.log)
        before = self._lookout.publication
        if before is None or not before.is_same(publication) or not (self._incarnation and opened.incarnation):
            return False
        return state_number(opened.incarnation) == state_number(self._incarnation)

    def close(self) -> None:
        """Ends all watches, and closes the files. Idempotent."""
        self._end()  # without waiting for watches that are waiting
        with self._lock:
            if self._following:
                self._close_late = True
            elif not self._closed:
                self._release()

    def _release(self) -> None:
        self._close_late, self._closed = False, True
        self._end()
        directory, self._directory = self._directory, None
        self._lookout.turn_to(None)
        with storage_errors(self.path, "closing the files"):
            self._log.close()
            if directory is not None:
                directory.close()

    def after_fork(self) -> None:
        """Resets the lock in a forked child, where threads that were working, or held it, are gone."""
        self._begin_following(RLock())


class ReaderWatch(Watch):
    """A watch that a reader has opened."""

    __slots__ = ("__weakref__", "_tail")

    def __init__(
        self, tail: Tail, prefix: Any, start: tuple[int, int | None, int] | int | None, durable: bool
    ) -> None:
        self._tail = tail
        super().__init__(TailSource(tail, durable), prefix, start)

    def _wait_for_change(self, timeout: float | None) -> bool:
        source: Any = self._source
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = SIGNAL_SECONDS if end is None else end - time.monotonic()
            if left <= 0:
                return False
            if source.await_changes(min(left, SIGNAL_SECONDS)):
                return True

    async def _wait_for_change_async(self, timeout: float | None) -> bool:
        source: Any = self._source
        sleep = event_loops().sleep
        end = None if timeout is None else time.monotonic() + timeout
        step = FIRST_STEP
        while True:
            left = step if end is None else end - time.monotonic()
            if left <= 0:
                return False
            await sleep(min(left, step))
            if source.may_have_changes():
                return True
            step = min(1.5 * step, LAST_STEP)

    async def _look_async(self) -> None:
        if self._tail._has_much_to_take():
            await call(self._tail._follow)[0]
        self._look()

    def _wake(self) -> None:
        source: Any = self._source
        source.wake()

    def _after_fork(self) -> None:
        """Ends, in a forked child, the reads of other threads, which are gone."""
        if not self._is_read_here():
            self._end()
