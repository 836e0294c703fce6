"""Slow calls for coroutines: each runs on a thread of its own, which tells the event loop when it ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from fastsm.background import BackgroundCall, Outcome, start, until_done

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")


def event_loops() -> ModuleType:
    """Returns asyncio, imported on first use: callers without coroutines save a third of the import time."""
    import asyncio  # noqa: PLC0415 (see above)

    return asyncio


def call(function: Callable[[], T]) -> tuple[asyncio.Future[T], BackgroundCall]:
    """Starts ``function()`` on a thread of its own; returns a future of the running event loop for its outcome."""
    loop = event_loops().get_running_loop()
    called = Called(loop, loop.create_future(), function)
    return called.future, start(partial(until_done, called.run))


class Called:
    """A call on behalf of a coroutine, whose event loop is told of its outcome."""

    __slots__ = ("future", "loop", "outcome")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], function: Callable[[], Any]
    ) -> None:
        self.loop = loop
        self.future = future
        self.outcome = Outcome(function)

    def run(self) -> None:
        """Calls the function, and tells the event loop. If that finds no memory, it is to be repeated."""
        self.outcome()
        tell(self.loop, self.answer)

    def answer(self) -> None:
        """Passes the outcome on; run by the event loop, perhaps twice."""
        error = self.outcome.error
        if error is None:
            set_result(self.future, self.outcome.value)
        else:
            set_error(self.future, error)


def tell(loop: asyncio.AbstractEventLoop, answer: Callable[[], None]) -> None:
    """Makes an event loop run ``answer()``; does nothing if the loop was closed.

    After a ``MemoryError`` it may be repeated, although the loop may then run ``answer()`` twice.
    """
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(answer)


def run_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()


def set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():  # it may have been cancelled
        future.set_result(result)


def set_error(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
