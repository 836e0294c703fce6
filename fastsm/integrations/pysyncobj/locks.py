"""``FastLockManager``: PySyncObj's locks, with a time that is counted in the log."""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from pysyncobj import FAIL_REASON

from fastsm.errors import NotRunningError
from fastsm.integrations.pysyncobj import operations
from fastsm.integrations.pysyncobj.battery import Battery, same
from fastsm.integrations.pysyncobj.codecs import KEYS
from fastsm.integrations.pysyncobj.ticking import LocksTimer
from fastsm.integrations.pysyncobj.waiting import Callback

if TYPE_CHECKING:
    from fastsm.machine import FastStateMachine

# A holder's own clock, which continues while its machine is suspended.
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
GIVEN_BACK = -1.0


class Held(NamedTuple):
    """Until when a lock is certainly held, by this process's clock, or GIVEN_BACK; and the entry that took it."""

    until: float = 0.0
    token: int = 0


def now() -> float:
    return time.clock_gettime(CLOCK)


class _Locks(Battery):
    """The battery that has the locks."""

    ordered = timed = True

    def __init__(self, autoUnlockTime: float, name: str | None) -> None:
        super().__init__(name, "locks")
        self.seconds = float(autoUnlockTime)
        # The longest time between two entries that counts; it is added to each lease, which may have begun late.
        most = max(1, int(250 * self.seconds))
        self._most, self._lease = b"%d" % most, b"%d" % (int(1000 * self.seconds) + most)

    def timer(self, machine: FastStateMachine) -> LocksTimer:
        def has_locks() -> bool:
            return any(key != self.prefix for key, _ in machine.scan(prefix=self.prefix, limit=2).entries)

        def passed(term: int, counted: int) -> bytes:
            return operations.encode(operations.locks_pass, self.prefix, b"%d" % term, b"%d" % counted, self._most)

        return LocksTimer(has_locks, passed, self.seconds / 8)

    def key(self, lock: Any) -> bytes:
        return self.prefix + KEYS.encode(lock)

    def take(self, lock: Any, holder: str, **options: Any) -> Any:
        arguments = self.prefix, self.key(lock), holder.encode(), self._lease
        return self._operate(operations.lock_take, *arguments, options=options, take=same)

    def keep(self, holder: str, **options: Any) -> None:
        self._operate(operations.locks_keep, self.prefix, holder.encode(), self._lease, options=options)

    def give_back(self, key: bytes, holder: str, token: int, **options: Any) -> None:
        arguments = key, holder.encode(), b"%d" % token
        self._operate(operations.lock_give_back, *arguments, options=options)

    def holder_of(self, key: bytes) -> str | None:
        """Returns the holder of a lock in the state that this node has applied, or None."""
        found = self._machine().get(key)
        return None if found is None else operations.lock_of(found).holder.decode()

    def has_any(self, holder: str) -> bool:
        own = holder.encode()
        return any(key and operations.lock_of(data).holder == own for key, data in self._pairs())


class FastLockManager:
    """``pysyncobj.batteries.ReplLockManager``, in fastsm: locks that end if their holder is silent for a while.

    Unlike in PySyncObj, clocks of different nodes are never compared. The leader counts time in the log, and a holder
    counts the time since its own request: ``isAcquired`` is True only if both agree. So two managers never have a lock
    at the same time, however far the nodes' clocks differ, even if a node is suspended or cut off. (What a process does
    after it has called ``isAcquired`` is at its own risk: it may be suspended right then.) The lock of a manager that
    has died becomes free between one and one and a half times ``autoUnlockTime`` after it was last renewed; time
    without a leader does not count.

    All managers of one name must have the same ``autoUnlockTime``. Without ``selfID`` a manager gets a unique id. Its
    thread ends with :meth:`destroy`, with the manager, and with the thread that made it.
    """

    def __init__(self, autoUnlockTime: float, selfID: str | None = None, *, name: str | None = None) -> None:
        self._locks = _Locks(autoUnlockTime, name)
        self._own = f"{socket.gethostname()}:{os.getpid()}:{id(self)}" if selfID is None else selfID
        self._time = autoUnlockTime
        self._kept_until = 0.0  # by this process's clock: until when all its locks are certainly held
        self._held: dict[bytes, Held] = {}  # locks taken or given back since, by key
        self._end = threading.Event()
        arguments = weakref.ref(self), self._end, threading.current_thread()
        threading.Thread(target=_prolongate, args=arguments, name="fastsm locks", daemon=True).start()

    def _consumer(self) -> _Locks:
        return self._locks

    def destroy(self) -> None:
        """Ends the manager's thread, which renews its locks; they then expire."""
        self._end.set()

    def __del__(self) -> None:
        end = getattr(self, "_end", None)
        if end is not None:
            end.set()

    def _prolongate_now(self) -> bool:
        """Submits a renewal of the manager's locks, if it has any; returns False if the node cannot submit now."""
        node = self._locks._syncObj
        if node is None or node._getLeader() is None:
            return False
        began = now()

        def told(_: Any, reason: Any) -> None:
            if reason == FAIL_REASON.SUCCESS:
                self._kept_until = max(self._kept_until, began + self._time)

        try:
            for key, held in list(self._held.items()):
                if GIVEN_BACK < held.until <= self._kept_until or self._locks.holder_of(key) != self._own:
                    self._held.pop(key, None)
                elif held.until == GIVEN_BACK:  # the report of its release may be lost
                    self._locks.give_back(key, self._own, held.token)
            if self._locks.has_any(self._own):
                self._locks.keep(self._own, callback=told, timeout=self._time)
        except NotRunningError:
            return False
        return True

    def tryAcquire(
        self, lockID: Any, callback: Callback | None = None, sync: bool = False, timeout: float | None = None
    ) -> Any:
        """Tries to take a lock: with ``sync`` returns the result; otherwise ``callback(result, reason)`` gets it."""
        key, began = self._locks.key(lockID), now()

        def had(token: Any) -> bool:
            """Notes how long the lock is certainly held. Gives it back if it came too late to be relied on."""
            if not token:
                return False
            self._held[key] = Held(began + self._time, token)
            if now() - began > self._time / 2.0:
                self.release(lockID)
                return False
            return True

        if callback is None and sync:
            return had(self._locks.take(lockID, self._own, sync=True, timeout=timeout))

        def told(token: Any, reason: Any) -> None:
            acquired = had(token) if reason == FAIL_REASON.SUCCESS else None
            if callback is not None:
                callback(acquired, reason)

        return self._locks.take(lockID, self._own, callback=told, timeout=timeout)

    def isAcquired(self, lockID: Any) -> bool:
        """Returns whether this manager certainly has the lock."""
        key = self._locks.key(lockID)
        if self._locks.holder_of(key) != self._own:
            return False
        until = self._held.get(key, Held()).until
        return until != GIVEN_BACK and now() < max(self._kept_until, until)

    def release(
        self, lockID: Any, callback: Callback | None = None, sync: bool = False, timeout: float | None = None
    ) -> None:
        """Gives a lock back. From here on ``isAcquired`` returns False."""
        key = self._locks.key(lockID)
        token = self._held.get(key, Held()).token
        self._held[key] = Held(GIVEN_BACK, token)
        self._locks.give_back(key, self._own, token, callback=callback, sync=sync, timeout=timeout)


def _prolongate(manager: weakref.ref[FastLockManager], end: threading.Event, maker: threading.Thread) -> None:
    """Renews a manager's locks until the manager, or the thread that made it, has ended. Runs in its own thread."""
    not_before = 0.0
    while not end.wait(0.1) and maker.is_alive():
        found = manager()
        if found is None:
            return
        at = now()
        if at >= not_before and found._prolongate_now():
            not_before = at + found._time / 4.0
        del found
