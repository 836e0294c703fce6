"""Time in the log: the node that leads proposes ticks, by a ``fastsm.Clock``, and counts the time of locks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from fastsm.clock import Clock
from fastsm.machine import FastStateMachine

logger = logging.getLogger("fastsm")

PAUSE = 10.0  # seconds until the clock is asked again after it raised

MakeClock = Callable[[FastStateMachine], Clock]


class Timer(Protocol):
    """What the node that leads asks in each of its ticks."""

    def tick(self, now: float, term: int) -> bytes | None:
        """The command to propose at this moment of PySyncObj's time, in the term in which the node leads, or None."""


class LeadersClock:
    """Asks a ``Clock``, no more often than that wants to be asked. What it raises is logged once, until it ticks again.

    That is a leap that it refuses, or an error in the ``now`` of the user's: no reason for a node to stop.
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
    """Counts the time that passes while this node leads, and tells the log of it while there are locks.

    ``command`` makes an entry of a term and of the milliseconds counted in it; ``pause``: seconds between two of them.
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
