"""The order of coroutines: one thread applies their chunks in the order in which the tasks started.

A coroutine takes its place in the writers' queue, shared with plain calls from other threads, when its task starts.
The wait for the turn then happens on this module's thread, never on the event loop.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from fastsm.background import BackgroundCall, LastingThread, Outcome, until_done
from fastsm.core.batches import BatchThread
from fastsm.core.engine import Engine
from fastsm.core.turns import CHECK_SECONDS, Place, Turns
from fastsm.errors import OrderError
from fastsm.event_loops import Called, call, event_loops, set_error, set_result, tell

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

SMALL_ENTRIES = 64
SMALL_BYTES = 64 * 1024
TAKE_LONG = frozenset(range(8, 256))  # kinds of commands that read, walk over keys, or run a procedure
WAITS, HAS_TURN, HAS_RUN, HAS_LEFT = range(4)  # steps of a job
OVERHEAD = 64  # bytes of a frame or a record, at most, in addition to the commands


def room_if_small(chunk: Any) -> int | None:
    """Returns the most log space that a chunk takes; None if it may take long, so another thread applies it."""
    if not isinstance(chunk, (list, tuple)) or len(chunk) > SMALL_ENTRIES:
        return None
    try:
        size = sum(len(entry[2]) for entry in chunk)
        if any(entry[2][1] in TAKE_LONG for entry in chunk):
            return None
    except (TypeError, IndexError):
        return 0  # malformed: applying it right away finds the error
    return size + OVERHEAD * (len(chunk) + 1) if size <= SMALL_BYTES else None


class Job(Called):
    """Work with a place in the writers' queue; if it is cancelled before it begins, the place is passed on."""

    __slots__ = ("abandoned", "applies", "doomed_by", "machine", "place", "step")

    def __init__(self, machine: Engine, function: Callable[[], Any], applies: bool) -> None:
        loop = event_loops().get_running_loop()
        super().__init__(loop, loop.create_future(), function)
        self.machine = machine
        self.applies = applies
        self.abandoned = False  # the waiting caller has the outcome, or will never look at it
        self.doomed_by: Job | None = None  # a failed job after which this one was queued
        self.place = Place()
        self.step = WAITS


class OrderedWorker:
    """Runs writes of coroutines, one by one, on a thread of its own.

    After a chunk has failed, chunks queued after it fail too, with ``OrderError``, until the caller of the failed
    chunk has seen the failure: they were queued on the assumption that it would be applied.
    """

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.queue: SimpleQueue[Job | None] = SimpleQueue()
        self.job: Job | None = None  # the one that the thread is at
        self.failed: Job | None = None  # a job whose failure its caller has not seen yet
        self.closed = False
        self._ended = False
        self._lock = threading.RLock()  # guards `failed`, `abandoned` and the start; reentrant for signal handlers
        self._thread = LastingThread()

    @property
    def idle(self) -> bool:
        """Whether nothing is queued and no failure is still unseen."""
        return not self.jobs and self._unseen() is None

    def _unseen(self) -> Job | None:
        """Returns the job whose failure its caller has not seen yet, unless the caller's event loop no longer runs."""
        failed = self.failed
        return failed if failed is not None and failed.loop.is_running() else None

    async def run(self, machine: Engine, function: Callable[[], T], *, applies: bool = False) -> T:
        """Takes the next place among the machine's writers, and awaits the result of ``function`` in that place."""
        job = Job(machine, function, applies)
        with machine._turns.waited_for(), self._lock:  # no signal handler may close while we hold it
            self._start(machine)
            job.doomed_by = self._unseen()
            try:
                self.jobs.append(job)
                machine._turns.enqueue(job.place, self.queue.put, job)
            except BaseException:
                self._forget(job)
                raise
        try:
            result: T = await job.future
        except BaseException:
            with self._lock:
                job.abandoned = True
                if self.failed is job:
                    self.failed = None
            raise
        return result

    def _start(self, machine: Engine) -> None:
        """Starts the thread, once. If no thread can be started, nothing has changed and the next call tries again."""
        if not self.closed:
            self._thread.start(partial(until_done, partial(self._work, machine._turns)))

    def close(self, machine: Engine) -> None:
        """Ends the thread once its work is done. The caller must not hold the writer's turn."""
        machine._turns.refuse_places()
        self.abandon()
        self._thread.wait()

    def abandon(self) -> None:
        """Refuses further work, without waiting for the thread."""
        self.closed = True
        self.queue.put(None)

    def _work(self, turns: Turns) -> None:
        """Runs jobs until told to end. Called again after a ``MemoryError``, to go on where it was."""
        turns.keep()
        while not self._ended:
            if self.job is None:
                self.job = self.queue.get()
            if self.job is None:
                self._ended = True
            else:
                self._serve(turns, self.job)
                self.job = None  # an idle thread must not keep the machine alive
        turns.keep_no_more()

    def _serve(self, turns: Turns, job: Job) -> None:
        """Takes the remaining steps of a job. A step that finds no memory is repeated."""
        if job.step == WAITS:
            turns.serve(job.place)
            job.step = HAS_TURN
        if job.step == HAS_TURN:
            self._run(job)
            job.step = HAS_RUN
        if job.step == HAS_RUN:
            turns.__exit__()
            job.step = HAS_LEFT
        self._forget(job)
        if job.outcome.begun:
            tell(job.loop, job.answer)  # after the turn was left: the next chunk may then be applied on the event loop

    def _forget(self, job: Job) -> None:
        with suppress(ValueError):
            self.jobs.remove(job)

    def _run(self, job: Job) -> None:
        """Runs the job, unless it was cancelled or is doomed."""
        if not job.outcome.begun:
            if job.future.cancelled():
                return
            if job.applies and job.doomed_by is not None:
                job.outcome = Outcome(partial(refuse_doomed, job.doomed_by))
            job.outcome()
        if job.outcome.error is not None and job.applies and job.doomed_by is None:
            self._doom_later_jobs(job)

    def _doom_later_jobs(self, failed: Job) -> None:
        """Marks all queued jobs as failed too: they were queued on the assumption that the failed one would succeed."""
        with self._lock:
            self.failed = None if failed.abandoned else failed
            for job in list(self.jobs):
                if job is not failed:
                    job.doomed_by = failed


def refuse_doomed(failed: Job) -> None:
    raise OrderError(
        "nothing of this chunk was applied, since a chunk queued before it has failed (see the cause): apply both again"
    ) from failed.outcome.error


class Waiters(BatchThread["Flush"]):
    """Runs the flushes of coroutines on one shared thread, and other slow calls on a thread each.

    The flush thread takes all flushes that wait, syncs once, answers them, and then takes those that have arrived in
    the meantime: at most one sync is under way and one more is queued, however many wait. Thread safe.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[BackgroundCall] = []  # finished calls are dropped when the next one is added

    async def flush(self, function: Callable[[Any], None], mark: Any) -> None:
        """Awaits ``function(mark)``. Marks rise with time: a later mark covers earlier ones, and None covers all."""
        loop = event_loops().get_running_loop()
        one = Flush(loop, loop.create_future(), function, mark)
        with self._lock:
            self._require_open()  # during a close, the thread has ended, so no answer would ever come
            self._start()
            self._queue.put(one)
            self._require_open()  # a signal handler may have closed it here
        await one.future

    async def call(self, function: Callable[[], T]) -> T:
        """Awaits ``function()``, on a thread of its own."""
        with self._lock:
            self._require_open()
            self._calls = [one for one in self._calls if not one.wait(0)]
            future, thread = call(function)
            self._calls.append(thread)
        return await future

    def end(self, is_excused: Callable[[int], bool]) -> None:
        """Ends the threads once their work is done, except threads that the caller must not wait for."""
        self.close()
        with self._lock:
            calls = list(self._calls)
        for thread in calls:
            while not (thread.is_this_thread() or thread.is_excused(is_excused) or thread.wait(CHECK_SECONDS)):
                pass

    def _outcomes(self, batch: list[Flush]) -> Iterator[tuple[asyncio.AbstractEventLoop, Callable[[], None]]]:
        waiting = [one for one in batch if not one.future.cancelled()]
        for one in sorted(waiting, key=Flush.reach, reverse=True):  # the sync for the furthest mark covers the others
            try:
                one.function(one.mark)
            except BaseException as error:
                yield one.loop, partial(set_error, one.future, error)
            else:
                yield one.loop, partial(set_result, one.future, None)


class Flush:
    """A coroutine that waits for a sync: the function to call, and the mark to sync up to."""

    __slots__ = ("function", "future", "loop", "mark")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[None], function: Callable[[Any], None], mark: Any
    ) -> None:
        self.loop = loop
        self.future = future
        self.function = function
        self.mark = mark

    def reach(self) -> float:
        """Returns the log offset to sync up to; infinity without a mark."""
        return float("inf") if self.mark is None else self.mark[1]
