"""From committed entries to the state machine, and from a caller's command to its result."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any

from pysyncobj import FAIL_REASON
from pysyncobj import monotonic as clock

from fastsm.command import check, noop
from fastsm.errors import CommandError, NotRunningError, UnknownCommandError
from fastsm.integrations.pysyncobj.errors import SubmitError
from fastsm.integrations.pysyncobj.places import MARK, SENTINEL
from fastsm.integrations.pysyncobj.replication import Replication
from fastsm.machine import FastStateMachine

logger = logging.getLogger("fastsm")

FILLER = noop()  # for an entry of PySyncObj's own: so every index has an entry, and replicas stay equal
CHUNK_ENTRIES = 2000
CHUNK_BYTES = 1 << 20
TURN = 0.03  # seconds in which entries are applied before the tick goes on

Callback = Callable[[Any, Any], None]


class Pending:
    """A command whose result is waited for. Called once, with result and reason; what comes later is passed over."""

    __slots__ = ("_callback", "_node", "deadline")

    def __init__(self, node: Applying, callback: Callback, timeout: float | None) -> None:
        self._node = node
        self._callback: Callback | None = callback
        self.deadline = None if timeout is None else clock.monotonic() + timeout
        node._pending.add(self)

    def __call__(self, result: Any, reason: Any) -> None:
        self._node._pending.discard(self)
        callback, self._callback = self._callback, None
        if callback is None:
            return
        try:
            callback(result, reason)
        except Exception:
            logger.exception("a callback raised")


class Outcome:
    """What a thread waits for."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._result: Any = None
        self._reason: Any = None

    def set(self, result: Any, reason: Any) -> None:
        self._result, self._reason = result, reason
        self._event.set()

    def wait(self, timeout: float | None) -> Any:
        if not self._event.wait(timeout):
            raise SubmitError("Timeout")
        if self._reason != FAIL_REASON.SUCCESS:
            raise SubmitError(self._reason)
        return self._result


class Applying(Replication):
    """A ``SyncObj`` whose committed entries go to a state machine in chunks, each with its index and term."""

    machine: FastStateMachine
    _installing: Any
    _over: bool

    def _begin_applying(self, machine: FastStateMachine) -> None:
        self.machine = machine
        self._failure: BaseException | None = None
        self._pending: set[Pending] = set()
        self._deadlines: list[tuple[float, int, Pending]] = []
        self._numbers = itertools.count()

    # ---- commands --------------------------------------------------------------------------------------

    def submit(
        self,
        command: bytes,
        *,
        sync: bool = False,
        callback: Callback | None = None,
        timeout: float | None = None,
    ) -> bool | None:
        """Has a command (``fastsm.put`` and the others make them) applied by the whole cluster, from any node.

        Without ``sync`` it returns at once, and ``callback(result, reason)`` is called in the tick thread: with what
        ``apply`` said and ``FAIL_REASON.SUCCESS``, or with None and another reason; after ``timeout`` seconds, if
        given, with ``UNKNOWN_OUTCOME``. (Give one: a message to a leader that dies is lost without a word.) With
        ``sync`` it waits for the result, and raises :class:`SubmitError` where there is none. (A callback takes
        precedence, as in PySyncObj.)

        The command is checked first: ``CommandError``. Raises ``NotRunningError`` once the node has stopped. On
        success a majority of the nodes has the entry (on their disks, with ``durable=True``). O(size). Thread safe.
        """
        check(command)
        self._require_running()
        outcome = None
        if callback is None and sync:
            if threading.current_thread() is self._SyncObj__thread:
                raise SubmitError("sync=True in the tick thread would wait for itself")
            outcome = Outcome()
            callback = outcome.set
        pending = None
        if callback is not None:
            pending = Pending(self, callback, None if outcome else timeout)
            if pending.deadline is not None:
                heapq.heappush(self._deadlines, (pending.deadline, next(self._numbers), pending))
        self._applyCommand(bytes(command), pending, MARK)
        if pending is not None and (self._failure is not None or self._over):
            pending(None, FAIL_REASON.UNKNOWN_OUTCOME)  # it ended meanwhile: nobody else will say so
        return None if outcome is None else outcome.wait(timeout)

    def _require_running(self) -> None:
        if self._failure is not None:
            raise NotRunningError(f"this node has stopped: {self._failure}") from self._failure
        if self._SyncObj__destroying:
            raise NotRunningError("this node was destroyed")

    def _expire(self) -> None:
        """Gives up on commands whose time is over."""
        now = clock.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            heapq.heappop(self._deadlines)[2](None, FAIL_REASON.UNKNOWN_OUTCOME)

    def _give_up_all(self) -> None:
        for pending in list(self._pending):
            pending(None, FAIL_REASON.UNKNOWN_OUTCOME)

    # ---- entries ---------------------------------------------------------------------------------------

    def _SyncObj__applyLogEntries(self) -> bool:
        """Applies what is committed, for as long as there is time."""
        stop = clock.monotonic() + TURN
        applied = False
        while self._behind and clock.monotonic() < stop:
            self._apply_some(self._SyncObj__raftLastApplied + 1)
            applied = True
        return applied and not self.conf.appendEntriesUseBatch

    @property
    def _behind(self) -> bool:
        """Whether there is something to apply."""
        return (
            self._failure is None
            and self._installing is None
            and self._SyncObj__raftCommitIndex > self._SyncObj__raftLastApplied
        )

    def _apply_some(self, first: int) -> None:
        """The next chunk; with it one entry of PySyncObj's own at most, the last one."""
        count = min(self._SyncObj__raftCommitIndex + 1 - first, CHUNK_ENTRIES)
        entries, others = self.journal.marked(first, count, CHUNK_BYTES, MARK, FILLER)
        if not entries:
            raise NotRunningError(f"{self.journal.path}: entry {first} is committed, but not in the journal")
        if others:
            del entries[others[0] + 1 :]
        results = self._apply_chunk(entries)
        if others:
            index = entries[-1][0]
            results[-1] = self._apply_other(self.journal.entries(index, 1)[0][0])
        self._SyncObj__raftLastApplied = entries[-1][0]
        if self._SyncObj__commandsWaitingCommit:
            self._tell(entries, results)

    def _apply_chunk(self, entries: list[tuple[int, int, bytes]]) -> list[Any]:
        """All entries; a malformed one has the result False, on every replica."""
        results: list[Any] = []
        while len(results) < len(entries):
            rest = entries[len(results) :] if results else entries
            try:
                results += self.machine.apply(rest)
            except UnknownCommandError:
                raise
            except CommandError as error:
                if error.index is None:
                    raise
                good = error.index - rest[0][0]
                if good:
                    results += self.machine.apply(rest[:good])
                index, term, _ = rest[good]
                self.machine.apply([(index, term, FILLER)])
                results.append(False)
                logger.warning("entry %d is malformed and changes nothing: %s", index, error)
        return results

    def _apply_other(self, command: bytes) -> Any:
        """An entry of PySyncObj's own, or of a consumer of it."""
        if command == SENTINEL:
            return None
        if command[0] == 0:
            try:
                return self._SyncObj__doApplyCommand(command)
            except Exception as error:
                # Every replica comes by here: to stop or to try again would end the cluster.
                logger.exception("a replicated method raised; its entry is passed over")
                return error
        return self._SyncObj__doApplyCommand(command)

    def _tell(self, entries: list[tuple[int, int, bytes]], results: list[Any]) -> None:
        """Calls those who wait for these entries."""
        waiting = self._SyncObj__commandsWaitingCommit
        for (index, term, _), result in zip(entries, results, strict=True):
            for submitted_term, callback in waiting.pop(index, ()):
                if submitted_term != term:
                    answer = None, FAIL_REASON.DISCARDED
                elif isinstance(result, Exception):
                    answer = None, FAIL_REASON.UNKNOWN_OUTCOME
                else:
                    answer = result, FAIL_REASON.SUCCESS
                try:
                    callback(*answer)
                except Exception:
                    logger.exception("a callback raised")

    def _pass_over_waiting(self, index: int) -> None:
        """Behind an install: what became of the commands up to there is not known."""
        waiting = self._SyncObj__commandsWaitingCommit
        for known in [number for number in waiting if number <= index]:
            for _, callback in waiting.pop(known):
                callback(None, FAIL_REASON.UNKNOWN_OUTCOME)
