"""Time in the log: the leader proposes ticks, by a ``fastsm.Clock``, and counts the time of locks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from fastsm.clock import Clock
from fastsm.machine import FastStateMachine

logger = logging.getLogger("fastsm")

PAUSE = 10.0  # seconds before the clock is used again after it has raised

MakeClock = Callable[[FastStateMachine], Clock]


class Timer(Protocol):
    """What the leader calls in each of its ticks."""

    def tick(self, now: float, term: int) -> bytes | None:
        """Returns a command to propose at this time (of PySyncObj's clock), in the leader's term, or None."""


class LeadersClock:
    """Polls a ``Clock`` no more often than the clock requests. Logs the first of its exceptions in a row.

    An exception means that the clock refuses a leap, or that the user's ``now`` fails: no reason for a node to stop.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._not_before = 0.0
        self._raised = False

    def tick(self, now: float, term: int) -> bytes | None:
        if now < self._not_before:
            return None
        try:
            command, pause = self._clock.poll(), self._clock.delay()
        except Exception:
            if not self._raised:
                logger.exception("no tick is proposed, so nothing expires")
            self._raised, self._not_before = True, now + PAUSE
            return None
        self._raised, self._not_before = False, now + pause
        return command


class LocksTimer:
    """Counts the time that passes while this node is the leader, and reports it to the log while there are locks.

    ``command`` makes an entry from a term and the milliseconds counted in it; ``pause``: seconds between two entries.
    """

    def __init__(self, has_locks: Callable[[], bool], command: Callable[[int, int], bytes], pause: float) -> None:
        self._has_locks, self._command, self._pause = has_locks, command, pause
        self._term: int | None = None
        self._began = self._not_before = 0.0

    def tick(self, now: float, term: int) -> bytes | None:
        if term != self._term:
            self._term, self._began, self._not_before = term, now, 0.0
        if now < self._not_before or not self._has_locks():
            return None
        self._not_before = now + self._pause
        return self._command(term, int(1000 * (now - self._began)))
