"""Waiting until an entry is applied, for reads that must not be older than it."""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from fastsm.core.awaited import Ticket
from fastsm.core.engine import Engine
from fastsm.core.turns import CLOSED
from fastsm.errors import NotRunningError, OrderError
from fastsm.event_loops import event_loops, run_all, set_result, start, tell

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from fastsm.background import BackgroundCall


def wait_applied(engine: Engine, index: int, timeout: float | None) -> None:
    """Returns once an entry is applied; a ``TimeoutError`` after so many seconds."""
    if timeout is not None and not timeout >= 0:  # NaN, too
        raise ValueError(f"timeout={timeout!r}: expected 0 or more seconds, or None")
    queue: SimpleQueue[Ticket] = SimpleQueue()
    ticket = engine._await_applied(index, queue, None, True)
    if ticket is None:
        return
    try:
        queue.get(timeout=None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
    except Empty:
        if not ticket.outcome:  # else it was told at the last moment
            raise TimeoutError(
                f"entry {index} was not applied within {timeout} s: last applied is {engine.last_applied()}") from None
    finally:
        engine._wait_no_more(ticket)
    judge(engine, ticket)


def judge(engine: Engine, ticket: Ticket) -> None:
    """Returns where the entry was applied, and raises what else ended the wait."""
    if ticket.is_applied:
        return
    if ticket.is_replaced:
        raise OrderError(
            f"entry {ticket.index} was waited for, and the state was replaced by an empty or an older one meanwhile",
            index=ticket.index)
    engine._require()
    raise NotRunningError(f"the state machine was stopped while entry {ticket.index} was waited for")


class AppliedWaiters:
    """Coroutines that wait for entries, however many, with one thread that tells their event loops. Thread safe."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Ticket | None] = SimpleQueue()
        self._lock = threading.RLock()  # of the first start and `_closed`
        self._thread: BackgroundCall | None = None
        self._closed = False

    async def wait(self, engine: Engine, index: int) -> None:
        """Returns once an entry is applied."""
        loop = event_loops().get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        ticket = engine._await_applied(index, self._queue, (loop, future), False)
        if ticket is None:
            return
        try:
            self._start()
            await future
        finally:
            engine._wait_no_more(ticket)
        judge(engine, ticket)

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise NotRunningError(CLOSED)
            if self._thread is None:
                self._thread = start(self._work)

    def close(self) -> None:
        """Ends the thread once everybody was told."""
        self.abandon()
        if self._thread is not None and not self._thread.is_this_thread():
            self._thread.wait()

    def abandon(self) -> None:
        """Takes no more waiters, and waits for nothing."""
        with self._lock:
            self._closed = True
            self._queue.put(None)

    def _work(self) -> None:
        ended = False
        while not ended:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            answers: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
            for ticket in batch:
                if ticket is None:
                    ended = True
                else:
                    answers.setdefault(ticket.owner[0], []).append(answer(ticket.owner[1]))
            for loop, those in answers.items():
                tell(loop, lambda those=those: run_all(those))  # type: ignore[misc]
            del batch, answers  # while waiting for the next ones, nothing is held


def answer(future: Any) -> Callable[[], None]:
    return lambda: set_result(future, None)
