"""Background threads that belong to one machine; one kind answers many coroutines at a time, on their event loops."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastsm.background import LastingThread, until_done
from fastsm.core.turns import CLOSED
from fastsm.errors import NotRunningError
from fastsm.event_loops import run_all, tell

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

T = TypeVar("T")

NOTHING = object()


class ServingThread(ABC):
    """A thread that is started once, when it is first needed, and ends with the machine. Thread safe.

    Subclasses define the work, which goes on until the thread is told to end.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards `_closed` and what is queued; the thread itself never takes it
        self._thread = LastingThread()
        self._closed = False

    @abstractmethod
    def _work(self) -> None:
        """Serves requests on the thread until told to end, after which it serves those that were queued earlier.

        Called again after a ``MemoryError``, to go on where it was.
        """

    @abstractmethod
    def _tell_to_end(self) -> None:
        """Makes `_work` return."""

    def _start(self) -> None:
        """Starts the thread, once. If no thread can be started, raises ``StorageError``; the next call tries again."""
        if self._thread.call is not None:
            return
        with self._lock:
            self._require_open()
            self._thread.start(partial(until_done, self._work))

    def _require_open(self) -> None:
        if self._closed:
            raise NotRunningError(CLOSED)

    def close(self) -> None:
        """Ends the thread once everything that was queued has been served."""
        self.abandon()
        self._thread.wait()

    def abandon(self) -> None:
        """Refuses further requests, without waiting for the thread."""
        with self._lock:
            self._closed = True
            self._tell_to_end()


class BatchThread(ServingThread, Generic[T]):
    """Serves the items that are put into its queue. Subclasses define how a batch is answered."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: SimpleQueue[T | None] = SimpleQueue()
        self._taken: Any = NOTHING  # from the queue, but not in the batch yet
        self._batch: list[T] = []
        self._ended = False

    @abstractmethod
    def _outcomes(self, batch: list[T]) -> Iterable[tuple[asyncio.AbstractEventLoop, Callable[[], None]]]:
        """Returns each answer, with the event loop that is to run it.

        If memory fails, this is called again for the same batch, and an event loop may run an answer twice.
        """

    def _tell_to_end(self) -> None:
        self._queue.put(None)

    def _take_batch(self) -> None:
        """Moves everything that is queued to the batch; waits if there is nothing yet. No failure loses an item."""
        while self._taken is not NOTHING or not (self._ended or self._batch) or not self._queue.empty():
            if self._taken is NOTHING:
                self._taken = self._queue.get()
            if self._taken is None:
                self._ended = True
            else:
                self._batch.append(self._taken)
            self._taken = NOTHING

    def _work(self) -> None:
        while not self._ended or self._batch:
            self._take_batch()
            answers: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
            for loop, answer in self._outcomes(self._batch):
                answers.setdefault(loop, []).append(answer)
            for loop, those in answers.items():
                tell(loop, partial(run_all, those))
            self._batch.clear()
            del answers  # an idle thread must not keep the machine alive
            loop = answer = those = None  # type: ignore[assignment]
