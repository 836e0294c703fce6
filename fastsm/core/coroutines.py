"""The order of coroutines: one thread that applies in the order in which tasks started.

A coroutine takes its place in the writers' queue when its task starts, together with plain calls from other
threads. Its work then waits on this module's thread, never on the event loop.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from types import ModuleType
from typing import Any, Protocol, TypeVar

from fastsm.background import BackgroundCall
from fastsm.core.engine import Engine
from fastsm.errors import NotRunningError, OrderError, StorageError

T = TypeVar("T")

SMALL_ENTRIES = 64
SMALL_BYTES = 64 * 1024


def is_small(chunk: Any) -> bool:
    """Whether applying it takes less time than handing it to another thread would."""
    if not isinstance(chunk, (list, tuple)) or len(chunk) > SMALL_ENTRIES:
        return False
    try:
        return sum(len(entry[2]) for entry in chunk) <= SMALL_BYTES
    except (TypeError, IndexError):
        return True  # malformed: the error is found at once


def event_loops() -> ModuleType:
    """asyncio. Whoever awaits has it already; whoever runs on threads is spared its import, a third of all."""
    import asyncio  # noqa: PLC0415 (see above)

    return asyncio


class Flushable(Protocol):
    """What a flush is asked of."""

    def flush(self) -> None: ...


def start_thread(function: Callable[[], object]) -> BackgroundCall:
    """Calls ``function`` on a thread of its own; ``StorageError`` (EAGAIN) where none can be had."""
    try:
        return BackgroundCall(function)
    except (RuntimeError, MemoryError) as error:
        raise StorageError(errno.EAGAIN, "no thread can be started: nothing was done; try again") from error


class Job:
    """Work in its place of the writers' queue; the place is passed on when it was cancelled before it began."""

    __slots__ = ("abandoned", "applies", "doomed_by", "function", "future", "loop", "machine", "turn")

    def __init__(self, machine: Engine, function: Callable[[], Any], applies: bool, loop: Any) -> None:
        self.machine = machine
        self.loop = loop  # of its caller
        self.function = function
        self.applies = applies
        self.future: Future[Any] = Future()
        self.abandoned = False  # whoever waited for it has its outcome, or will never look
        self.doomed_by: Job | None = None  # a failed job that this one was queued behind
        self.turn: threading.Lock | None = None


class OrderedWorker:
    """Runs writes of coroutines, one by one, on a thread of its own.

    After a chunk failed, chunks queued behind it fail too, with ``OrderError``, until the caller of the failed
    one has seen the failure: they were sent in the belief that it would be applied.
    """

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.queue: SimpleQueue[Job | None] = SimpleQueue()
        self.failed: Job | None = None  # its caller has not seen it yet
        self.closed = False
        self._lock = threading.RLock()  # of all of this but `jobs` and `queue`; a finalizer may come back to it
        self._thread: BackgroundCall | None = None
        self._flushes: SimpleQueue[tuple[Flushable, Future[None]] | None] = SimpleQueue()
        self._flusher: BackgroundCall | None = None
        self._calls: set[BackgroundCall] = set()

    @property
    def idle(self) -> bool:
        """Whether nothing is queued and no failure waits to be seen."""
        return not self.jobs and self.failed is None

    async def run(self, machine: Engine, function: Callable[[], T], *, applies: bool = False) -> T:
        """Takes the next place among the machine's writers; awaits the result of ``function`` there."""
        self._start()
        job = Job(machine, function, applies, event_loops().get_running_loop())
        self._forget_unseen()
        machine._turns.enqueue(self, job)
        try:
            result: T = await event_loops().wrap_future(job.future)
        except BaseException:
            with self._lock:
                job.abandoned = True
                if self.failed is job:
                    self.failed = None
            raise
        return result

    def _start(self) -> None:
        """Starts the worker once, however many loops ask. It counts as started only when it is."""
        with self._lock:
            if self._thread is None:
                self._thread = start_thread(self._work)

    def _forget_unseen(self) -> None:
        """A failure whose event loop is closed will never be seen."""
        with self._lock:
            if self.failed is not None and self.failed.loop.is_closed():
                self.failed = None

    async def wait(self, function: Callable[[], T]) -> T:
        """Awaits ``function``, which waits for the disk, on a thread of its own, which no write and no flush needs."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        call = start_thread(work)
        self._calls.add(call)
        future.add_done_callback(lambda _: self._calls.discard(call))
        return await event_loops().wrap_future(future)

    async def flush(self, machine: Flushable) -> None:
        """Awaits a flush that begins after this call: one is under way, one is to come, however many wait for it."""
        future: Future[None] = Future()
        with self._lock:
            if self.closed:
                raise NotRunningError("this state machine is closed: open the directory again")
            if self._flusher is None:
                self._flusher = start_thread(self._flush_for_all)
            self._flushes.put((machine, future))
        await event_loops().wrap_future(future)

    def _flush_for_all(self) -> None:
        while (first := self._flushes.get()) is not None:
            machine, waiting, last = first[0], [first[1]], False
            while not self._flushes.empty():
                more = self._flushes.get()
                if more is None:
                    last = True
                    break
                waiting.append(more[1])
            waiting = [future for future in waiting if future.set_running_or_notify_cancel()]
            try:
                if waiting:
                    machine.flush()
            except BaseException as error:
                for future in waiting:
                    future.set_exception(error)
            else:
                for future in waiting:
                    future.set_result(None)
            del first, machine, waiting  # while waiting for the next one, the machine is not held
            if last:
                return

    def close(self) -> None:
        """Ends the threads once their work is done. The caller does not hold the writer's turn."""
        self.abandon()
        for thread in (self._thread, self._flusher, *self._calls):
            if thread is not None and not thread.is_this_thread():
                thread.wait()

    def abandon(self) -> None:
        """Takes no more work, and waits for nothing."""
        with self._lock:
            self.closed = True
            self.queue.put(None)
            self._flushes.put(None)

    def _work(self) -> None:
        while (job := self.queue.get()) is not None:
            if job.turn is not None:
                job.turn.acquire()
            job.machine._turns.own()
            try:
                if job.future.set_running_or_notify_cancel():
                    self._run(job)
            finally:
                job.machine._turns.__exit__()
                self.jobs.remove(job)
            del job  # while waiting for the next one, the machine is not held

    def _run(self, job: Job) -> None:
        try:
            if job.applies and job.doomed_by is not None:
                cause = job.doomed_by.future.exception()
                raise OrderError("a chunk queued before this one failed, see the cause") from cause
            result = job.function()
        except BaseException as error:
            if job.applies and job.doomed_by is None:
                self._doom_those_behind(job)
            job.future.set_exception(error)
        else:
            job.future.set_result(result)

    def _doom_those_behind(self, failed: Job) -> None:
        """What is queued now, and what comes until the failure was seen, was sent in the belief that it succeeds."""
        with self._lock:
            self.failed = None if failed.abandoned or failed.loop.is_closed() else failed
        for job in list(self.jobs):
            if job is not failed:
                job.doomed_by = failed
