"""Time in the log: the node that leads proposes ticks, by a ``fastsm.Clock``."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fastsm.clock import Clock
from fastsm.errors import ClockJumpError
from fastsm.machine import FastStateMachine

logger = logging.getLogger("fastsm")

PAUSE = 10.0  # seconds until the clock is asked again after it refused

MakeClock = Callable[[FastStateMachine], Clock]


class LeadersClock:
    """Asks a ``Clock``, no more often than that wants to be asked. A leap that it refuses is logged once."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._not_before = 0.0
        self._refused = False

    def tick(self, now: float) -> bytes | None:
        """The tick to propose at this moment of PySyncObj's time, or None."""
        if now < self._not_before:
            return None
        try:
            command = self._clock.poll()
        except ClockJumpError:
            if not self._refused:
                logger.exception("no tick is proposed, nothing expires")
            self._refused, self._not_before = True, now + PAUSE
            return None
        self._refused, self._not_before = False, now + self._clock.delay()
        return command
