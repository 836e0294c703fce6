"""A holder of the lock in ``examples/recipes``, which believes its own clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

import fastsm

DATA = b"disk/data"  # what is written under the lock


class Holder(ABC):
    """Counts the outcomes of its attempts. ``until`` is when it believes that its lease ends; 0 without a lease."""

    lock: Any
    counts: Counter[str]

    def __init__(self, lease: int) -> None:
        self.lease = lease
        self.until = 0  # by its own clock

    @property
    @abstractmethod
    def now(self) -> int:
        """The time of its own clock, in milliseconds."""

    def acquire(self, *, again: bool) -> None:
        acquired = self.lock.acquire(self.lease, now=self.now, again=again)
        self.counts["granted" if acquired else "held by another"] += 1
        self.until = self.now + self.lease if acquired else 0

    def write(self) -> None:
        done = self.lock.write(fastsm.put(DATA, b"%d" % self.lock.token))
        self.counts["written" if done else "fenced off"] += 1
        self.until = self.until if done else 0

    def keep_alive(self) -> None:
        kept = self.lock.keep_alive(self.lease, now=self.now)
        self.counts["kept alive" if kept else "kept too late"] += 1
        self.until = self.now + self.lease if kept else 0

    def release(self) -> None:
        self.counts["released" if self.lock.release() else "released too late"] += 1
        self.until = 0
