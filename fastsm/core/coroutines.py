"""The order of coroutines: one thread that applies in the order in which tasks started.

A coroutine takes its place in the writers' queue when its task starts, together with plain calls from other
threads. Its work then waits on this module's thread, never on the event loop.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import ModuleType
from typing import Any, TypeVar

from fastsm.core.engine import Engine
from fastsm.errors import OrderError

T = TypeVar("T")

SMALL_ENTRIES = 64
SMALL_BYTES = 64 * 1024
FLUSH_THREADS = 4


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


class Job:
    """Work in its place of the writers' queue; the place is passed on when it was cancelled before it began."""

    __slots__ = ("abandoned", "applies", "doomed_by", "function", "future", "machine", "turn")

    def __init__(self, machine: Engine, function: Callable[[], Any], applies: bool) -> None:
        self.machine = machine
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
        self._lock = threading.Lock()  # of `failed` and `abandoned`
        self._thread: threading.Thread | None = None
        self._waiters: ThreadPoolExecutor | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is queued and no failure waits to be seen."""
        return not self.jobs and self.failed is None

    async def run(self, machine: Engine, function: Callable[[], T], *, applies: bool = False) -> T:
        """Takes the next place among the machine's writers; awaits the result of ``function`` there."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="fastsm-apply", daemon=True)
            self._thread.start()
        job = Job(machine, function, applies)
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

    async def wait(self, function: Callable[[], T]) -> T:
        """Awaits ``function``, which waits for the disk, on a thread that no write needs."""
        if self._waiters is None:
            self._waiters = ThreadPoolExecutor(FLUSH_THREADS, thread_name_prefix="fastsm-flush")
        done: T = await event_loops().get_running_loop().run_in_executor(self._waiters, function)
        return done

    def close(self) -> None:
        """Ends the threads once their work is done. The caller does not hold the writer's turn."""
        self.abandon()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self._waiters is not None:
            self._waiters.shutdown()

    def abandon(self) -> None:
        """Takes no more work, and waits for nothing."""
        self.closed = True
        self.queue.put(None)

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
            self.failed = None if failed.abandoned else failed
        for job in list(self.jobs):
            if job is not failed:
                job.doomed_by = failed
