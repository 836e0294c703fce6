"""State machines that are wrong about what the trait does not have: waits, checksums and reads in order.

pytest runs the suite on them when it is given this file by name; each class fails it somewhere.
"""

from __future__ import annotations

import contextlib
from typing import Any

from fastsm import MemoryStateMachine
from fastsm.model.waiting import Waiters
from support.wrong_suites import collect

found_by, suites = collect(beyond_the_trait=False)


@found_by("what_is_applied_is_not_waited_for")
class WaitsForTheNextEntry(MemoryStateMachine):
    def wait_applied(self, index: int, timeout: float | None = None) -> None:
        super().wait_applied(index + 1, timeout)


@found_by("what_is_not_applied_in_time_is_a_timeout")
class TimesOutInSilence(MemoryStateMachine):
    def wait_applied(self, index: int, timeout: float | None = None) -> None:
        with contextlib.suppress(TimeoutError):
            super().wait_applied(index, timeout)


@found_by("a_wait_ends_when_the_entry_is_applied")
class EndsWaitsWithAnyEntry(MemoryStateMachine):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._waiters = Waiters(lambda: 99 if self.last_applied().index else 0)


@found_by("a_stop_ends_a_wait", "a_reset_ends_a_wait")
class EndsWaitsAsIfApplied(MemoryStateMachine):
    class Deaf(Waiters):
        def end(self, error: Any) -> None:
            for waiting in self.waiting:
                waiting.tell()

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._waiters = self.Deaf(lambda: self.last_applied().index)


@found_by("the_state_checksum_is_a_function_of_the_entries")
class ChecksumsCountChunks(MemoryStateMachine):
    chunks = 0

    def apply(self, chunk: Any) -> list[bool | None]:
        self.chunks += 1
        return super().apply(chunk)

    def state_checksum(self, last_included: Any = None) -> Any:
        log_id, checksum = super().state_checksum(last_included)
        return log_id, checksum + bytes([self.chunks % 256])


@found_by("the_state_checksum_writes_and_records_nothing")
class ChecksumsOfThePresentOnly(MemoryStateMachine):
    def state_checksum(self, last_included: Any = None) -> Any:
        log_id, _ = super().state_checksum(last_included)
        return log_id, super().state_checksum()[1]


@found_by("a_scan_gives_the_range_in_order")
class ScansTheEndToo(MemoryStateMachine):
    def scan(self, start: Any = None, end: Any = None, **options: Any) -> Any:
        return super().scan(start, None if end is None else end + b"\x00", **options)


@found_by("a_scan_gives_the_range_in_order", "ordered_stays_at_its_moment")
class SortsByLength(MemoryStateMachine):
    def _range(self, start: Any, end: Any, prefix: Any, reverse: bool = False) -> Any:
        found = super()._range(start, end, prefix)
        return sorted(found, key=lambda pair: (len(pair[0]), pair), reverse=bool(reverse))


@found_by("a_limit_cuts_a_scan")
class TakesAnyLimit(MemoryStateMachine):
    def scan(self, *bounds: Any, limit: Any = None, **options: Any) -> Any:
        return super().scan(*bounds, limit=None if limit is None or limit < 0 else limit, **options)


@found_by("a_prefix_is_scanned_in_pages")
class StartsAtTheLastKeyAgain(MemoryStateMachine):
    def scan_prefix(self, prefix: Any, *, limit: Any = None, start_after: Any = None) -> Any:
        if start_after is None:
            return super().scan_prefix(prefix, limit=limit)
        return super().scan_prefix(prefix, limit=limit, start_after=start_after + b"\x00")


@found_by("a_count_is_that_of_the_scan")
class CountsAllKeys(MemoryStateMachine):
    def count(self, *bounds: Any, **options: Any) -> int:
        super().count(*bounds, **options)
        return self.len()


@found_by("ordered_stays_at_its_moment")
class OrderedIsAtTheFirstStep(MemoryStateMachine):
    def ordered(self, *bounds: Any, **options: Any) -> Any:
        self._require()
        return (pair for _ in (0,) for pair in self._range(*(bounds or (None, None)), None, **options))


@found_by("a_stopped_one_reads_nothing_in_order")
class ScansWhenStopped(MemoryStateMachine):
    def scan(self, *bounds: Any, **options: Any) -> Any:
        running, self._running = self._running, True
        try:
            return super().scan(*bounds, **options)
        finally:
            self._running = running


@found_by("ordered_reads_follow_a_random_history")
class ScansEmptyValuesNot(MemoryStateMachine):
    def _range(self, *bounds: Any, **options: Any) -> Any:
        return [pair for pair in super()._range(*bounds, **options) if pair[1]]


globals().update(suites())
