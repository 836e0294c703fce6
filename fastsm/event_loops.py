"""Calls that take long, awaited: each runs on a thread of its own, and an event loop hears of its end."""

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
    """Returns asyncio. Who awaits has it already; who runs on threads is spared its import, a third of all."""
    import asyncio  # noqa: PLC0415 (see above)

    return asyncio


def call(function: Callable[[], T]) -> tuple[asyncio.Future[T], BackgroundCall]:
    """Starts ``function()`` on a thread of its own; the future of the running event loop gets its outcome."""
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
    """Has an event loop run ``answer()``; nobody waits for it on a loop that was closed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(answer)


def run_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()


def set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():  # it was cancelled meanwhile
        future.set_result(result)


def set_error(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
