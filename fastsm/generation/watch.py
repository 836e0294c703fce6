"""``Watch``: changes as they are applied, one by one or many at a time, on threads and event loops.

Subclasses define how to wait for a change: one for machines, one for readers in other processes.
"""

from __future__ import annotations

import operator
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from fastsm.arguments import end_of_wait
from fastsm.errors import NotRunningError
from fastsm.event_loops import event_loops
from fastsm.generation.changes import Changes

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastsm.generation.changes import Source
    from fastsm.types import Change

LIMIT = 1024
MAX_BYTES = 16 << 20
IN_A_ROW = 1024  # changes, or reads, on an event loop before other tasks run


class Reads:
    """Reading a watch, on threads and event loops; also used by the watches of the in-memory model.

    Subclasses define what there is to read, and how to wait for more.
    """

    if not TYPE_CHECKING:
        __slots__ = ()  # those below are slots of the subclasses

    if TYPE_CHECKING:
        _closed: bool
        _in_a_row: int  # changes that were returned, and reads that were made, since other tasks last ran

        def _begin(self) -> None: ...
        def _end(self) -> None: ...
        def _look(self) -> None: ...
        def _collect(self, found: list[Change], limit: int, max_bytes: int, may_pause: bool) -> bool: ...
        def _hand_over(self) -> None: ...
        def _is_over(self) -> bool: ...
        def _close(self) -> None: ...

    def read(
        self, limit: int = LIMIT, *, max_bytes: int = MAX_BYTES, timeout: float | None = None
    ) -> list[Change]:
        """Returns up to ``limit`` changes as soon as there is one, or an empty list after ``timeout`` seconds.

        Their keys and values add up to at most ``max_bytes``, except that one larger change is returned alone. A read
        may end between two changes of one entry; the next read continues there. Raises ``CompactedError`` if the next
        entries no longer exist, and ``NotRunningError`` if the machine is stopped or closed or the watch is closed,
        even during the wait.
        """
        limit, max_bytes, end = checked_read(limit, max_bytes, timeout)
        self._begin()
        try:
            while True:
                found: list[Change] = []
                self._look()
                self._collect(found, limit, max_bytes, False)
                self._hand_over()
                if found or not limit or not self._wait_for_change(seconds_left(end)):
                    return found
        finally:
            self._end()

    async def read_async(
        self, limit: int = LIMIT, *, max_bytes: int = MAX_BYTES, timeout: float | None = None
    ) -> list[Change]:
        """Does what :meth:`read` does, for coroutines.

        If it is cancelled, nothing is lost: the next read returns those changes. Other tasks run every now and then,
        even if there are always changes to return.
        """
        limit, max_bytes, end = checked_read(limit, max_bytes, timeout)
        self._begin()
        try:
            if self._in_a_row >= IN_A_ROW:
                self._in_a_row = 0
                await event_loops().sleep(0)
            while True:
                found: list[Change] = []
                await self._look_async()
                while self._collect(found, limit, max_bytes, True):
                    await event_loops().sleep(0)
                self._hand_over()
                if found or not limit or not await self._wait_for_change_async(seconds_left(end)):
                    self._in_a_row += 1 + len(found)
                    return found
        finally:
            self._end()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        try:
            return (await self.read_async(1))[0]
        except NotRunningError:
            if self._closed or self._is_over():
                raise StopAsyncIteration from None
            raise

    def close(self) -> None:
        """Ends the watch: iterations end, and a waiting read raises ``NotRunningError``. Idempotent."""
        self._close()
        self._wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def _look_async(self) -> None:
        """Does what `_look` does, for coroutines: work that takes long is done on another thread."""
        self._look()

    @abstractmethod
    def _wait_for_change(self, timeout: float | None) -> bool:
        """Waits up to ``timeout`` seconds until a look may find more; returns whether it is worth looking."""

    @abstractmethod
    async def _wait_for_change_async(self, timeout: float | None) -> bool:
        """Does what :meth:`_wait_for_change` does, on an event loop."""

    @abstractmethod
    def _wake(self) -> None:
        """Wakes a waiting reader, so that it looks again."""


class Watch(Reads, Changes):
    """The changes of the keys with a prefix, from a place in the log on: in order, without gaps or duplicates.

    An iterator, for threads and event loops, that waits for further changes; :meth:`read` and :meth:`read_async` return
    many at a time. A watch keeps no changes in memory, and never delays compaction: if its next entries are compacted,
    every later read raises ``CompactedError``. A watch has one consumer: a second concurrent read is a
    ``ReentryError``. ``position`` and ``close`` may be used from any thread.

    >>> import fastsm, tempfile
    >>> with fastsm.FastStateMachine(tempfile.mkdtemp()) as machine, machine.watch(b"color/") as watch:
    ...     machine.apply([(1, 1, fastsm.put(b"color/sky", b"blue")), (2, 1, fastsm.delete(b"shape/sun"))])
    ...     watch.read()
    ...     watch.position
    [True, True]
    [Change(index=1, term=1, key=b'color/sky', value=b'blue')]
    Position(index=2, term=1, offset=0)
    """

    __slots__ = ("_in_a_row",)

    def __init__(self, source: Source, prefix: Any, start: tuple[int, int | None, int] | int | None) -> None:
        self._in_a_row = 0
        Changes.__init__(self, source, prefix, start)

    def _is_over(self) -> bool:
        return bool(self._source.is_over())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._prefix!r} at {tuple(self.position)}>"


def checked_read(limit: int, max_bytes: int, timeout: float | None) -> tuple[int, int, float | None]:
    """Returns the checked arguments of a read, and the time at which it ends."""
    limit, max_bytes = operator.index(limit), operator.index(max_bytes)
    if limit < 0 or max_bytes < 0:
        raise ValueError(f"limit={limit}, max_bytes={max_bytes}: expected 0 or more")
    return min(limit, 2**63), min(max_bytes, 2**63), end_of_wait(timeout)


def seconds_left(end: float | None) -> float | None:
    """Returns how many seconds a read may still wait."""
    return None if end is None else max(end - time.monotonic(), 0)
