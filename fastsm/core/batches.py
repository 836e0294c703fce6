"""A thread that answers coroutines: as many at a time as have come meanwhile, each on its own event loop."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

from fastsm.background import LastingThread
from fastsm.core.turns import CLOSED
from fastsm.errors import NotRunningError
from fastsm.event_loops import run_all, tell

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

T = TypeVar("T")


class BatchThread(ABC, Generic[T]):
    """Serves what was put into its queue; the thread is started once, when it is first needed. Thread safe.

    A subclass says what a batch comes to.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[T | None] = SimpleQueue()
        self._lock = threading.RLock()  # of `_closed` and what is queued; the thread never takes it
        self._thread = LastingThread()
        self._closed = False

    @abstractmethod
    def _outcomes(self, batch: list[T]) -> Iterable[tuple[asyncio.AbstractEventLoop, Callable[[], None]]]:
        """Returns each answer, with the event loop that is to run it."""

    def _start(self) -> None:
        """Where no thread can be had nothing has changed, and the next call tries again."""
        with self._lock:
            self._require_open()
            self._thread.start(self._work)

    def _require_open(self) -> None:
        if self._closed:
            raise NotRunningError(CLOSED)

    def close(self) -> None:
        """Ends the thread once everything in the queue was answered."""
        self.abandon()
        self._thread.wait()

    def abandon(self) -> None:
        """Takes nothing more, and waits for nothing."""
        with self._lock:
            self._closed = True
            self._queue.put(None)

    def _work(self) -> None:
        ended = False
        while not ended:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            ended = None in batch
            answers: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
            for loop, answer in self._outcomes([one for one in batch if one is not None]):
                answers.setdefault(loop, []).append(answer)
            for loop, those in answers.items():
                tell(loop, partial(run_all, those))
            del batch, answers  # while waiting for the next ones, the machine is not held
            loop = answer = those = None  # type: ignore[assignment]
