"""Callers that wait for the answer to a command, and functions of the user that PySyncObj calls in its tick.

Each caller is told exactly once, whatever happens to the command and the node. Exceptions of a user's function are
logged, even a ``SystemExit``; they never reach PySyncObj, which would leave its tick halfway, or end its thread. Only a
``KeyboardInterrupt`` in the main thread is passed on, since it is meant for that thread.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any

from pysyncobj import FAIL_REASON
from pysyncobj import monotonic as clock

from fastsm.integrations.pysyncobj.errors import SubmitError

logger = logging.getLogger("fastsm")

FEW = 64  # deadlines of answered commands that need not be removed yet

Callback = Callable[[Any, Any], None]


def is_interrupt(error: BaseException) -> bool:
    """Returns whether an error is Ctrl-C, which arrives only in the main thread; elsewhere it is like any other."""
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


class Guarded:
    """A function whose exceptions are logged. It equals the function itself, so that PySyncObj finds it in a list."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> None:
        try:
            self._function(*arguments)
        except BaseException as error:
            if is_interrupt(error):
                raise
            logger.exception("%r raised; the node goes on", self._function)

    def __eq__(self, other: object) -> bool:
        return bool(self._function == (other._function if isinstance(other, Guarded) else other))

    def __hash__(self) -> int:
        return hash(self._function)


class Pending:
    """A command that waits for its answer. The first call with result and reason counts; later ones do nothing."""

    __slots__ = ("_callback", "_waiting", "deadline")

    def __init__(self, waiting: Waiting, callback: Callback, timeout: float | None) -> None:
        self._waiting = waiting
        self._callback: Callback | None = callback
        self.deadline = None if timeout is None else clock.monotonic() + timeout

    def __call__(self, result: Any, reason: Any) -> None:
        callback, self._callback = self._callback, None
        if callback is None:
            return
        self._waiting.remove(self)
        try:
            callback(result, reason)
        except BaseException as error:
            if is_interrupt(error):
                raise
            logger.exception("a callback raised")

    def forget(self) -> None:
        """Removes the command without calling its callback: no caller waits for the result any more."""
        if self._callback is not None:
            self._callback = None
            self._waiting.remove(self)

    @property
    def answered(self) -> bool:
        return self._callback is None


class Waiting:
    """All commands of a node that wait for their answers; also the deadlines of some answered ones. Thread safe."""

    def __init__(self) -> None:
        # Guards the deadlines; reentrant: a signal handler may submit in the middle of `add`
        self._lock = threading.RLock()
        self._pending: set[Pending] = set()
        self._deadlines: list[tuple[float, int, Pending]] = []
        self._timed = 0  # pending commands that have a deadline
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def deadlines(self) -> int:
        """The number of deadlines that are kept: those of pending commands, and of some answered ones."""
        return len(self._deadlines)

    def add(self, callback: Callback, timeout: float | None = None) -> Pending:
        """Adds a command; after ``timeout`` seconds its answer is ``UNKNOWN_OUTCOME``. O(log n)."""
        pending = Pending(self, callback, timeout)
        self._pending.add(pending)  # atomic; a lock would cost a wait for each command
        if pending.deadline is not None:
            with self._lock:
                self._timed += 1
                heapq.heappush(self._deadlines, (pending.deadline, next(self._numbers), pending))
        return pending

    def remove(self, pending: Pending) -> None:
        """Removes a command that was answered. O(1)."""
        try:
            self._pending.remove(pending)
        except KeyError:
            return
        if pending.deadline is not None:
            with self._lock:
                self._timed -= 1

    def expire(self) -> None:
        """Answers the commands whose time is over, and drops the deadlines of answered ones."""
        now = clock.monotonic()
        while True:
            with self._lock:
                if not self._deadlines or self._deadlines[0][0] > now:
                    break
                pending = heapq.heappop(self._deadlines)[2]
            pending(None, FAIL_REASON.UNKNOWN_OUTCOME)
        with self._lock:
            if len(self._deadlines) > 2 * self._timed + FEW:
                old, self._deadlines = self._deadlines, []
                for each in old:
                    if not each[2].answered:
                        heapq.heappush(self._deadlines, each)

    def give_up_all(self) -> None:
        """Tells all callers that the outcome is unknown."""
        for each in list(self._pending):
            each(None, FAIL_REASON.UNKNOWN_OUTCOME)


class Outcome:
    """The outcome that a thread waits for. Uses one lock: an ``Event`` takes three, and thrice the system calls."""

    __slots__ = ("_reason", "_result", "_until")

    def __init__(self) -> None:
        self._until = threading.Lock()
        self._until.acquire()
        self._result: Any = None
        self._reason: Any = None

    def set(self, result: Any, reason: Any) -> None:
        """Sets the outcome. To be called once, from any thread."""
        self._result, self._reason = result, reason
        self._until.release()

    def wait(self, timeout: float | None) -> Any:
        if not self._until.acquire(timeout=-1 if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX)):
            raise SubmitError("Timeout")
        if self._reason != FAIL_REASON.SUCCESS:
            raise SubmitError(self._reason)
        return self._result
