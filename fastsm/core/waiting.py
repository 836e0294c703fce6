"""Waiting until an entry is applied, for reads that must not be older than that entry."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

from fastsm.arguments import check_timeout
from fastsm.core.awaited import Ticket
from fastsm.core.batches import BatchThread
from fastsm.core.engine import Engine
from fastsm.errors import NotRunningError, OrderError
from fastsm.event_loops import event_loops, set_result

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator


def wait_applied(engine: Engine, index: int, timeout: float | None) -> None:
    """Returns once an entry is applied; raises ``TimeoutError`` after ``timeout`` seconds."""
    check_timeout(timeout)
    ticket = engine._await_applied(index, None, None, True)
    if ticket is None:
        return
    try:
        told = ticket.wait(-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        if not told and not ticket.outcome:  # otherwise it was told at the last moment
            raise TimeoutError(
                f"entry {index} was not applied within {timeout} s: last applied is {engine.last_applied()}")
    finally:
        engine._wait_no_more(ticket)
    judge(engine, ticket)


def judge(engine: Engine, ticket: Ticket) -> None:
    """Returns if the entry was applied, and otherwise raises the reason why the wait ended."""
    if ticket.is_applied:
        return
    if ticket.is_replaced:
        raise OrderError(
            f"the wait for entry {ticket.index} ended because an empty or an older state has replaced the state: if "
            "the new state will apply this entry, wait again",
            index=ticket.index)
    if ticket.is_poisoned:
        engine._log.check_writable()
    engine._require()
    raise NotRunningError(f"the state machine was stopped during the wait for entry {ticket.index}: wait again")


class AppliedWaiters(BatchThread[Ticket]):
    """Coroutines that wait for entries: one thread tells all of their event loops. Thread safe."""

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

    def _outcomes(self, batch: list[Ticket]) -> Iterator[tuple[asyncio.AbstractEventLoop, Callable[[], None]]]:
        for ticket in batch:
            loop, future = ticket.owner
            yield loop, partial(set_result, future, None)
