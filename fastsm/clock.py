"""When to move a state machine's clock: for hosts, when a tick is worth proposing.

A tick is an entry of the log, proposed by the leader. The clock that it moves is part of the state, and never goes
back. So a leader whose own clock is slow does no harm, but one whose clock is far ahead would end every deadline
immediately, on all replicas and permanently. `Clock` therefore refuses such a tick before it is proposed.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from typing import Protocol, SupportsIndex

from fastsm.answering import tick
from fastsm.errors import ClockJumpError

DAY_MS = 24 * 60 * 60 * 1000
PAUSES_OF_A_BACKLOG = 20  # pauses per interval, while a limit leaves due keys


class HasTime(Protocol):
    """What :class:`Clock` needs from a state machine."""

    def clock(self) -> int: ...
    def next_deadline(self) -> int | None: ...


class Clock:
    """Decides when a tick is worth proposing, and makes its command. For the leader: a follower proposes nothing.

    - ``interval_ms``: at most one tick in this time, so a due key may live that much longer, plus the time to commit.
    - ``limit``: how many keys and sessions one tick removes at most. While more are due, ticks follow one another
      after a twentieth of the interval.
    - ``max_jump_ms``: the largest leap that is proposed, by default one day; None: any.
    - ``idle_ms``: if something has a deadline but nothing is due, the clock is moved this often, so that procedures
      that read it see a recent time. If nothing has a deadline, no tick is proposed at all.
    - ``now``: the host's clock, in milliseconds since 1970.

    Thread safety: none; use it from one task or thread.

    >>> import fastsm
    >>> machine = fastsm.MemoryStateMachine()
    >>> clock = fastsm.Clock(machine, now=lambda: 5_000)
    >>> clock.poll()                                                # nothing has a deadline
    >>> machine.apply([(1, 1, fastsm.put(b"lease", b"", expires=4_000))])
    [True]
    >>> machine.apply([(2, 1, clock.poll())]), machine.get(b"lease")
    ([Answer(ok=True, value=1, reason=None)], None)
    """

    __slots__ = ("_followed", "_idle_ms", "_interval_ms", "_limit", "_machine", "_max_jump_ms", "_now", "_proposed")

    def __init__(
        self,
        machine: HasTime,
        *,
        interval_ms: SupportsIndex = 1_000,
        limit: SupportsIndex = 10_000,
        max_jump_ms: SupportsIndex | None = DAY_MS,
        idle_ms: SupportsIndex = 60_000,
        now: Callable[[], int] | None = None,
    ) -> None:
        self._machine = machine
        self._interval_ms = _positive(interval_ms, "interval_ms")
        self._limit = _positive(limit, "limit")
        self._max_jump_ms = None if max_jump_ms is None else _positive(max_jump_ms, "max_jump_ms")
        self._idle_ms = _positive(idle_ms, "idle_ms")
        self._now = _milliseconds if now is None else now
        self._proposed: int | None = None  # when, by the host's clock
        self._followed = 0  # the host's clock at the last poll, if it got there from the machine's clock without a leap

    def __repr__(self) -> str:
        return f"<Clock of {self._machine!r}: every {self._interval_ms} ms>"

    def poll(self) -> bytes | None:
        """Returns the tick to propose now, or None if none is worth it. O(1); does not block.

        A tick is worth it if a key or a session is due, or if something has a deadline and the clock is ``idle_ms``
        late; but not if one was made less than ``interval_ms`` ago (a twentieth of that, while a limit leaves due
        keys). What became of that one does not matter: a lost tick is followed by the next, and one that is applied
        twice does nothing.

        Raises ``ClockJumpError`` instead of returning a tick that would move the clock by more than ``max_jump_ms``,
        relative to the machine's clock, the earliest deadline, or the time of an earlier ``poll`` that was no leap,
        whichever is latest; ``NotRunningError`` if the machine is stopped.
        """
        now = max(0, operator.index(self._now()))
        clock, deadline = self._machine.clock(), self._machine.next_deadline()
        if clock and not self._is_leap(now, max(clock, self._followed)):
            self._followed = now
        if deadline is None:
            return None
        if self._proposed is not None and abs(now - self._proposed) < self._pause(clock, deadline):
            return None  # if the host's clock was set back, the pause is over
        if deadline <= max(now, clock):
            if self._is_leap(now, max(clock, deadline, self._followed)):
                raise ClockJumpError(now, clock, deadline, self._max_jump_ms or 0)
        elif not self._is_behind(now, clock):
            return None
        self._proposed = now
        return tick(now, limit=self._limit)

    def delay(self) -> float:
        """Returns after how many seconds to call :meth:`poll` again: at most the interval."""
        clock, deadline = self._machine.clock(), self._machine.next_deadline()
        pause = self._pause(clock, deadline)
        if self._proposed is not None:
            passed = operator.index(self._now()) - self._proposed
            if 0 <= passed < pause:
                pause -= passed
        return pause / 1_000

    def _pause(self, clock: int, deadline: int | None) -> int:
        """Returns how long to wait after a tick: shorter if it left something due by the machine's own clock."""
        is_backlog = deadline is not None and deadline <= clock
        return max(1, self._interval_ms // PAUSES_OF_A_BACKLOG) if is_backlog else self._interval_ms

    def _is_behind(self, now: int, clock: int) -> bool:
        """Returns whether to move the clock although nothing is due; only before the first tick may that be a leap."""
        return now - clock >= self._idle_ms and (clock == 0 or not self._is_leap(now, max(clock, self._followed)))

    def _is_leap(self, now: int, known: int) -> bool:
        return self._max_jump_ms is not None and now - known > self._max_jump_ms


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000


def _positive(number: SupportsIndex, name: str) -> int:
    found = operator.index(number)
    if found < 1:
        raise ValueError(f"{name}={found}: expected 1 or more")
    return found
