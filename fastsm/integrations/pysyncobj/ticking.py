"""Time in the log: the node that leads proposes ticks, by a ``fastsm.Clock``."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fastsm.clock import Clock
from fastsm.machine import FastStateMachine

logger = logging.getLogger("fastsm")

PAUSE = 10.0  # seconds until the clock is asked again after it raised

MakeClock = Callable[[FastStateMachine], Clock]


class LeadersClock:
    """Asks a ``Clock``, no more often than that wants to be asked. What it raises is logged once, until it ticks again.

    That is a leap that it refuses, or an error in the ``now`` of the user's: no reason for a node to stop.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._not_before = 0.0
        self._raised = False

    def tick(self, now: float) -> bytes | None:
        """The tick to propose at this moment of PySyncObj's time, or None."""
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
