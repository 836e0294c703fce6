"""The model's watch: searches the list of all changes, starting at a position; deliberately plain."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from fastsm.arguments import bytes_of, watch_start
from fastsm.errors import CompactedError, NotRunningError, ReentryError
from fastsm.event_loops import event_loops, set_result, tell
from fastsm.generation.watch import Reads
from fastsm.types import Change, LogId, Position

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastsm.model.tx import Outcome



class Moment(NamedTuple):
    """A model at one moment: ids of entries, and the writes of each entry since the base."""

    base: LogId
    applied: LogId
    durable: LogId
    outcomes: list[Outcome]


class History:
    """What a watch needs from a model: terms, and `look`, which raises if the model is not running.

    Thread safety: none.
    """

    def __init__(self, look: Callable[[], Moment], term_of: Callable[[int], int | None]) -> None:
        self.look = look
        self.term_of = term_of
        self.state = object()  # replaced by each state that does not continue the previous one
        self.closed = False  # the model was closed
        self.wakes = 0
        self.waiting: list[Callable[[], object]] = []

    def wake(self) -> None:
        """Makes all waiting watches look again."""
        self.wakes += 1
        for wake in list(self.waiting):
            wake()

    @contextmanager
    def waking(self, wake: Callable[[], object]) -> Iterator[None]:
        """Calls `wake()`, within the block, whenever it is worth looking again."""
        self.waiting.append(wake)
        try:
            yield
        finally:
            self.waiting.remove(wake)


class MemoryWatch(Reads):
    """The changes of a model's keys with a prefix: what ``fastsm.Watch`` is for a ``FastStateMachine``."""

    def __init__(
        self, history: History, prefix: Any, start: tuple[int, int | None, int] | int | None, durable: bool
    ) -> None:
        self._history = history
        self._prefix = bytes_of(prefix, "prefix")
        self._is_durable = bool(durable)
        self._state = history.state
        self._reading = self._closed = False
        self._in_a_row = 0
        self._whole = True  # no more changes of the entry at its place will follow
        self._checked = True  # that entry's term was checked
        self._moment = history.look()
        self._index: int = self._moment.applied.index
        self._term: int | None = self._moment.applied.term
        self._offset = 0
        if start is not None:
            self._start_at(start)
        self._look()
        if self._whole:
            self._term = self._known_term() if self._term is None else self._term
            self._offset = sum(1 for change in self._changes() if change.index == self._index)

    def _start_at(self, start: Any) -> None:
        self._checked = False
        self._index, self._term, offset = watch_start(start)
        self._whole = offset is None
        self._offset = offset or 0

    @property
    def position(self) -> Position:
        """Where the watch continues."""
        return Position(self._index, self._term, self._offset)

    # ---- the history -----------------------------------------------------------------------------------

    def _known_term(self) -> int | None:
        base = self._moment.base
        return base.term if self._index == base.index else self._history.term_of(self._index)

    def _gone(self, what: str) -> NoReturn:
        raise CompactedError(
            f"the changes after entry {self._index} are gone: {what}", oldest=self._moment.base.index + 1)

    def _look(self) -> None:
        """Raises if the watch has ended."""
        if self._closed:
            raise NotRunningError("this watch is closed: open another one, from its position")
        self._wakes = self._history.wakes
        self._moment = self._history.look()
        base, applied = self._moment.base, self._moment.applied
        if self._state is not self._history.state:
            self._gone("the state was replaced")
        if self._index < base.index:
            self._gone("they are in the base")
        if not self._checked and self._index <= applied.index:
            known = self._known_term()
            if self._term not in (None, known):
                self._gone(f"that entry has term {known} here, not {self._term}")
            self._term, self._checked = known, True
        if self._index == base.index and not self._whole:
            if self._offset:
                self._gone("the rest of this entry is in the base")
            self._whole = True

    def _changes(self) -> Iterator[Change]:
        """Yields all changes of keys with the prefix since the base."""
        for outcome in self._moment.outcomes:
            for name, arguments in outcome.steps:
                if name in ("put", "delete") and arguments[0].startswith(self._prefix):
                    yield Change(*outcome.log_id, arguments[0], arguments[1] if name == "put" else None)

    def _take(self, limit: int, max_bytes: int) -> list[Change]:
        """Returns the next changes, and moves the place."""
        last = self._moment.durable if self._is_durable else self._moment.applied
        found: list[Change] = []
        size = number = at = 0
        for change in self._changes():
            number = number + 1 if change.index == at else 1  # the number of the change within its entry
            at = change.index
            if at < self._index or (at == self._index and (self._whole or number <= self._offset)):
                continue
            size += len(change.key) + len(change.value or b"")
            if at > last.index:
                break
            if len(found) == limit or (found and size > max_bytes):
                return found
            found.append(change)
            self._index, self._term, self._offset, self._whole = at, change.term, number, False
        if last.index > self._index and self._checked:
            self._index, self._term, self._offset = *last, 0
        if last.index == self._index:
            self._whole = True
        return found

    # ---- read ------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._reading:
            raise ReentryError("this watch is being read already: it has one consumer; open a watch for each consumer")
        self._reading = True

    def _end(self) -> None:
        self._reading = False

    def _collect(self, found: list[Change], limit: int, max_bytes: int, may_pause: bool) -> bool:
        if limit:
            found += self._take(limit, max_bytes)
        return False

    def _hand_over(self) -> None:
        """Does nothing: the place has moved already."""

    def _wait_for_change(self, timeout: float | None) -> bool:
        over = threading.Event()
        with self._history.waking(over.set):
            if self._history.wakes != self._wakes:
                return True
            return over.wait(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))

    async def _wait_for_change_async(self, timeout: float | None) -> bool:
        asyncio = event_loops()
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        with self._history.waking(partial(tell, loop, partial(set_result, over, None))):
            if self._history.wakes != self._wakes:
                return True
            try:
                await asyncio.wait_for(over, timeout)
            except asyncio.TimeoutError:
                return False
        return True

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change:
        try:
            return self.read(1)[0]
        except NotRunningError:
            if self._closed or self._is_over():
                raise StopIteration from None
            raise

    # ---- the end ---------------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        return self._history.closed  # a model that was stopped may start again

    def _close(self) -> None:
        self._closed = True

    def _wake(self) -> None:
        self._history.wake()
