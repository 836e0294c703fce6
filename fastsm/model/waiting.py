"""The model's waits: a list of callers that wait for an entry to be applied; deliberately plain."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fastsm.errors import FastsmError
from fastsm.event_loops import event_loops


class Waiter:
    """A caller that waits for an entry; ``tell()`` is called at the end. ``error``: why the entry is not applied."""

    def __init__(self, index: int, tell: Callable[[], object]) -> None:
        self.index = index
        self.tell = tell
        self.error: FastsmError | None = None


class Waiters:
    """All waiting callers of one state machine; ``applied`` returns the last applied index."""

    def __init__(self, applied: Callable[[], int]) -> None:
        self._applied = applied
        self.waiting: list[Waiter] = []

    def wait(self, index: int, timeout: float | None) -> None:
        """Blocks until another thread calls :meth:`tell` after the entry is applied, or :meth:`end`."""
        over = threading.Event()
        waiter = self._add(index, over.set)
        if not over.wait(None if timeout is None else min(timeout, threading.TIMEOUT_MAX)):
            self._remove(waiter)
            raise TimeoutError(
                f"entry {index} was not applied within {timeout} s: last applied is entry {self._applied()}")
        if waiter.error is not None:
            raise waiter.error

    async def wait_async(self, index: int) -> None:
        """Does the same as :meth:`wait`, for coroutines."""
        asyncio = event_loops()
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        waiter = self._add(index, lambda: loop.call_soon_threadsafe(over.set))
        try:
            await over.wait()
        finally:
            self._remove(waiter)
        if waiter.error is not None:
            raise waiter.error

    def tell(self) -> None:
        """Tells the callers whose entry is applied."""
        index = self._applied()
        told = [waiter for waiter in self.waiting if waiter.index <= index]
        self.waiting = [waiter for waiter in self.waiting if waiter.index > index]
        for waiter in told:
            waiter.tell()

    def end(self, error: FastsmError) -> None:
        """Tells all callers that their entry will not be applied, and why."""
        ended, self.waiting = self.waiting, []
        for waiter in ended:
            waiter.error = error
            waiter.tell()

    def _add(self, index: int, tell: Callable[[], object]) -> Waiter:
        waiter = Waiter(index, tell)
        self.waiting.append(waiter)
        self.tell()  # the entry may have been applied just before
        return waiter

    def _remove(self, waiter: Waiter) -> None:
        self.waiting = [other for other in self.waiting if other is not waiter]
