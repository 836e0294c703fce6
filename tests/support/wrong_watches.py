"""State machines whose watches are wrong.

pytest runs the suite on them if it is given this file by name; each class fails at least one test.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastsm import Change, CompactedError, MemoryStateMachine, NotRunningError
from fastsm.model.watch import MemoryWatch
from support.wrong_suites import collect

found_by, suites = collect(beyond_the_trait=True)


class Watched(MemoryStateMachine):
    """The model, with watches of another class."""

    kind: type[MemoryWatch] = MemoryWatch

    def watch(self, prefix: Any = b"", *, start: Any = None, durable: bool = False) -> MemoryWatch:
        self._require()
        return self.kind(self._history, prefix, start, durable)


def watched(*tests: str) -> Any:
    """Register a machine whose watches are of the decorated class."""

    def note(kind: type[MemoryWatch]) -> type[MemoryWatch]:
        found_by(*tests)(type(kind.__name__, (Watched,), {"kind": kind}))
        return kind

    return note


@watched("a_watch_tells_every_write_and_nothing_else", "chunks_do_not_matter_to_watches")
class TellsNoDeletes(MemoryWatch):
    def _changes(self) -> Any:
        return (change for change in super()._changes() if change.value is not None)


@watched("a_watch_tells_terms")
class TellsTheFirstTerm(MemoryWatch):
    def read(self, *limits: Any, **options: Any) -> Any:
        return [Change(found.index, 3, found.key, found.value) for found in super().read(*limits, **options)]


@watched("a_watch_tells_its_prefix_alone", "a_coroutine_waits_for_a_change")
class TellsAllKeys(MemoryWatch):
    def __init__(self, history: Any, prefix: Any, start: Any, durable: bool) -> None:
        super().__init__(history, b"", start, durable)


@watched("a_watch_goes_on_at_its_position")
class GoesOnWithTheNextEntry(MemoryWatch):
    def _start_at(self, start: Any) -> None:
        super()._start_at(start)
        self._whole = True


@watched("a_read_has_limits")
class HasNoLimitOfBytes(MemoryWatch):
    def _take(self, limit: int, max_bytes: int) -> Any:
        return super()._take(limit, 1 << 40)


@watched("other_histories_are_refused")
class TakesAnyTermToStartAt(MemoryWatch):
    def _start_at(self, start: Any) -> None:
        super()._start_at(start)
        self._checked = True


@watched("a_reset_ends_watches", "an_install_ends_watches")
class GoesOnAfterReplacements(MemoryWatch):
    def _look(self) -> None:
        self._state = self._history.state
        super()._look()


@watched("other_histories_are_refused", "an_install_ends_watches")
class SaysTheOldestWrong(MemoryWatch):
    def _gone(self, what: str) -> Any:
        raise CompactedError(what, oldest=self._index)


@watched("durable_watches_tell_what_is_durable")
class TellsWhatIsNotDurable(MemoryWatch):
    def __init__(self, history: Any, prefix: Any, start: Any, durable: bool) -> None:
        super().__init__(history, prefix, start, False)


@found_by("a_stopped_state_machine_tells_nothing")
class TellsWhenStopped(MemoryStateMachine):
    def _moment(self) -> Any:
        running, self._running = self._running, True
        try:
            return super()._moment()
        finally:
            self._running = running


@watched("a_coroutine_waits_for_a_change")
class LosesWhatACancelledWaitWasToldOf(MemoryWatch):
    async def read_async(self, *limits: Any, **options: Any) -> Any:
        try:
            return await super().read_async(*limits, **options)
        except asyncio.CancelledError:
            self._index += 1
            raise


@watched("a_coroutine_waits_for_a_change")
class IsNoIterationAfterItsEnd(MemoryWatch):
    async def __anext__(self) -> Any:
        try:
            return await super().__anext__()
        except StopAsyncIteration:
            raise NotRunningError("closed") from None


globals().update(suites())
