"""Watches of a machine: how they wait, and the thread that tells them of changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from fastsm.background import LOOK_SECONDS
from fastsm.core.batches import ServingThread
from fastsm.core.matching import StateSource, serve
from fastsm.event_loops import event_loops, run_all, set_result, tell
from fastsm.generation.watch import Watch, seconds_left

if TYPE_CHECKING:
    import asyncio

    from fastsm.core.engine import Engine
    from fastsm.core.watchers import Waiting, Watchers


class MachineWatch(Watch):
    """A watch of a machine in this process."""

    __slots__ = ("_turns", "_watching")

    def __init__(
        self, engine: Engine, watching: Watching, prefix: Any, start: tuple[int, int | None, int] | int | None,
        durable: bool,
    ) -> None:
        self._turns = engine._turns
        self._watching = watching
        super().__init__(StateSource(engine, durable), prefix, start)

    def _wait_for_change(self, timeout: float | None) -> bool:
        if timeout == 0:
            return False
        self._watching.start()
        source: Any = self._source
        queue: SimpleQueue[Waiting] = SimpleQueue()
        waiting = source.wait(self, self._turns, queue, None)
        if waiting is None:
            return True
        end = None if timeout is None else time.monotonic() + timeout
        try:
            while not wait_a_while(queue, seconds_left(end)):
                if end is not None and time.monotonic() >= end:
                    return bool(waiting.over)  # it was told at the last moment
        finally:
            self._watching.watchers.discard(waiting)
        return True

    async def _wait_for_change_async(self, timeout: float | None) -> bool:
        if timeout == 0:
            return False
        self._watching.start()
        loop = event_loops().get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        source: Any = self._source
        waiting = source.wait(self, None, None, (loop, future))
        if waiting is None:
            await event_loops().sleep(0)  # other tasks must run, even if changes come as fast as they are read
            return True
        timer = None if timeout is None else loop.call_later(timeout, set_result, future, None)
        try:
            await future
        finally:
            if timer is not None:
                timer.cancel()
            told = waiting.over
            self._watching.watchers.discard(waiting)
        return bool(told or self._closed)

    def _wake(self) -> None:
        waiting = self._watching.watchers.of_watch(self)
        tell_all(waiting)  # first: if this fails or is interrupted, the next close still finds them
        for one in waiting:
            self._watching.watchers.discard(one)


class Watching(ServingThread):
    """The thread that tells watches of changes, at most once per millisecond. Thread safe."""

    def __init__(self, watchers: Watchers) -> None:
        super().__init__()
        self.watchers = watchers

    def start(self) -> None:
        """Starts the thread, once."""
        self._start()

    def _work(self) -> None:
        serve(self.watchers, tell_all)

    def _tell_to_end(self) -> None:
        self.watchers.silence()


def wait_a_while(queue: SimpleQueue[Waiting], seconds: float | None) -> bool:
    """Returns whether an item came within ``seconds``; may return early on the main thread, to serve signals.

    A signal that arrived at another thread does not wake the wait, hence the early return.
    """
    if threading.current_thread() is threading.main_thread():
        seconds = LOOK_SECONDS if seconds is None else min(seconds, LOOK_SECONDS)
    try:
        queue.get(timeout=None if seconds is None else min(seconds, threading.TIMEOUT_MAX))
    except Empty:
        return False
    return True


def tell_all(awake: list[Waiting]) -> None:
    """Tells threads and event loops, each once. Safe to repeat if it fails for lack of memory."""
    answers: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
    for waiting in awake:
        if waiting.owner is None:
            waiting.tell()
        else:
            loop, future = waiting.owner
            answers.setdefault(loop, []).append(partial(set_result, future, None))
    for loop, those in answers.items():
        tell(loop, partial(run_all, those))
