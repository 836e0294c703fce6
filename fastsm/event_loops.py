"""Slow calls for coroutines: each runs on a thread of its own, which tells the event loop when it ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from fastsm.background import BackgroundCall, start

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
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            answer = partial(set_result, future, function())
        except BaseException as error:
            answer = partial(set_error, future, error)
        tell(loop, answer)

    return future, start(run)


def tell(loop: asyncio.AbstractEventLoop, answer: Callable[[], None]) -> None:
    """Makes an event loop run ``answer()``; does nothing if the loop was closed."""
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
