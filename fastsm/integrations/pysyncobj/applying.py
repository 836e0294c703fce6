"""From committed entries to the state machine, and from a caller's command to its result."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from pysyncobj import FAIL_REASON
from pysyncobj import monotonic as clock
from pysyncobj.pickle import loads
from pysyncobj.syncobj import AsyncResult

from fastsm.command import noop
from fastsm.errors import CommandError, NotRunningError, ProcedureError, UnknownCommandError
from fastsm.integrations.pysyncobj.changes import Change, Place
from fastsm.integrations.pysyncobj.errors import SubmitError, UnreadableItemError
from fastsm.integrations.pysyncobj.places import MARK, SENTINEL
from fastsm.integrations.pysyncobj.replication import Replication
from fastsm.integrations.pysyncobj.waiting import Callback, Outcome, Pending, Waiting, is_interrupt
from fastsm.machine import FastStateMachine
from fastsm.types import Result

logger = logging.getLogger("fastsm")

FILLER = noop()  # replaces PySyncObj's own entries: every index has an entry, and replicas stay equal
CHUNK_ENTRIES = 2000
CHUNK_BYTES = 1 << 20
LAST_KIND = 3  # the highest kind of PySyncObj's own entries
TURN = 0.03  # seconds for which entries are applied before the tick continues
# Errors specific to this replica, not due to the entry
NOT_THE_ENTRYS = (OSError, MemoryError, RecursionError, ImportError, SystemError)
LARGEST_COMMAND = 8 << 20  # bytes; larger ones keep a follower busy for longer than PySyncObj's default timeouts


class Raised(NamedTuple):
    """Stands for a missing result: the exception raised instead. Callers get ``UNKNOWN_OUTCOME``."""

    error: BaseException


NOT_APPLIED = Raised(NotRunningError("skipped"))


class Denied(Exception):  # never leaves this package
    """Raised by a ``take``: the command was impossible and changed nothing; ``error`` is for its caller."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _taking(take: Callable[[Any], Any], callback: Callback) -> Callback:
    """Returns a callback that receives a result, and calls ``callback`` with the return value of ``take(result)``."""

    def called(result: Any, reason: Any) -> None:
        if reason == FAIL_REASON.SUCCESS:
            try:
                result = take(result)
            except Denied:
                result, reason = None, FAIL_REASON.REQUEST_DENIED
            except Exception:
                logger.exception("a result cannot be read")
                result, reason = None, FAIL_REASON.UNKNOWN_OUTCOME
        callback(result, reason)

    return called


class Applying(Replication):
    """A ``SyncObj`` whose committed entries go to a state machine in chunks, each with its index and term."""

    _fastsm_machine: FastStateMachine
    _fastsm_installing: Any
    _fastsm_on_change: Callable[[list[Change] | None], object] | None

    def _fastsm_begin_applying(self, machine: FastStateMachine) -> None:
        self._fastsm_machine = machine
        self._fastsm_failure: BaseException | None = None
        self._fastsm_waiting = Waiting()
        self._fastsm_ticker: int | None = None  # the thread of the latest tick

    # ---- commands --------------------------------------------------------------------------------------

    def submit(
        self,
        command: bytes,
        *,
        sync: bool = False,
        callback: Callback | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Submits a command (made by ``fastsm.put`` or the like) to be applied by the whole cluster, from any node.

        Without ``sync`` it returns immediately, and ``callback(result, reason)`` is called in the tick thread: with the
        result of ``apply`` (True, False or an ``Answer``) and ``FAIL_REASON.SUCCESS``, or with None and another reason;
        after ``timeout`` seconds, if given, with ``UNKNOWN_OUTCOME``. (Give one: a message to a leader that dies is
        lost without notice.) With ``sync`` it waits for the result, and raises :class:`SubmitError` if there is none.
        (A callback takes precedence, as in PySyncObj.)

        The command is checked first: ``CommandError``, and ``UnknownCommandError`` for a procedure that this node does
        not have. Raises ``NotRunningError`` once the node has stopped. On success a majority of the nodes has the entry
        (on disk, with ``durable=True``). O(size). Thread safe.
        """
        self._fastsm_require_running()
        self._fastsm_machine.check(command)
        result: Result = self._fastsm_submit(bytes(command), MARK, sync, callback, timeout)
        return result

    def _fastsm_submit(
        self, content: bytes, mark: int, sync: bool = False, callback: Callback | None = None,
        timeout: float | None = None, take: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Does what :meth:`submit` does, for any entry. ``take`` converts the result of ``apply`` for the caller.

        If it raises ``Denied``, a callback receives ``REQUEST_DENIED``, and a waiting caller gets the error.
        """
        self._fastsm_require_running()
        outcome = None
        if callback is None and sync:
            self._fastsm_require_other_thread()
            outcome = Outcome()
            callback = outcome.set
        elif callback is not None and take is not None:
            callback = _taking(take, callback)
        pending = None
        if callback is not None:
            pending = self._fastsm_waiting.add(callback, None if outcome else timeout)
        try:
            self._applyCommand(content, pending, mark)
            result = None if outcome is None else outcome.wait(timeout)
        except BaseException:
            if pending is not None:
                pending.forget()
            raise
        if outcome is None or take is None:
            return result
        try:
            return take(result)
        except Denied as denied:
            raise denied.error from None

    def _applyCommand(self, command: bytes, callback: Any, commandType: int | None = None) -> None:
        """Queues a command of any kind: from ``submit``, a replicated method, PySyncObj itself, or another node.

        A waiting caller is told exactly once, even if the node ends.
        """
        # From a caller on this node; commands that another node forwards were checked there
        if commandType is not None:
            self._fastsm_require_running()
            if len(command) > LARGEST_COMMAND:
                raise CommandError(
                    f"expected a command of at most {LARGEST_COMMAND} bytes, found one of {len(command)}: while "
                    "PySyncObj sends a larger one, followers give up their leader; split it")
            if callback is not None and type(callback) is not Pending:
                if isinstance(getattr(callback, "__self__", None), AsyncResult):
                    self._fastsm_require_other_thread()
                callback = self._fastsm_waiting.add(callback)
            command = bytes([commandType]) + command
        elif not isinstance(command, bytes) or not command:
            raise ValueError(f"expected a command from another node, found {command!r:.50}")
        try:
            self._SyncObj__commandsQueue.put_nowait((command, callback))
        except queue.Full:
            self._SyncObj__callErrCallback(FAIL_REASON.QUEUE_FULL, callback)
        else:
            if commandType is not None:  # a forwarded command arrives in the tick thread, right before the next tick
                self._fastsm_wake()
        if (self._fastsm_over or self._fastsm_failure is not None) and isinstance(callback, Pending):
            callback(None, FAIL_REASON.UNKNOWN_OUTCOME)  # the node has just ended, and nothing else will call it

    def _fastsm_require_running(self) -> None:
        if self._fastsm_failure is not None:
            raise NotRunningError(f"this node has stopped: {self._fastsm_failure}") from self._fastsm_failure
        if self._SyncObj__destroying:
            raise NotRunningError("this node was destroyed")
        # On the thread of a procedure, each replica would submit it, and wait for itself
        self._fastsm_machine._require()

    def _fastsm_require_other_thread(self) -> None:
        if threading.get_ident() == self._fastsm_ticker:
            raise SubmitError("sync=True in the tick thread would wait for itself; give a callback")

    # ---- entries ---------------------------------------------------------------------------------------

    def _SyncObj__applyLogEntries(self) -> bool:
        """Applies committed entries, as long as there is time."""
        stop = clock.monotonic() + TURN
        applied = False
        while self._fastsm_behind and clock.monotonic() < stop:
            self._fastsm_apply_some(self._SyncObj__raftLastApplied + 1, stop)
            applied = True
        return applied and not self._SyncObj__conf.appendEntriesUseBatch

    @property
    def _fastsm_behind(self) -> bool:
        """Whether there is something to apply."""
        return (
            self._fastsm_failure is None
            and not self._SyncObj__destroying
            and self._fastsm_installing is None
            and self._SyncObj__raftCommitIndex > self._SyncObj__raftLastApplied
        )

    def _fastsm_apply_some(self, first: int, stop: float) -> None:
        """Applies the next entries: those of the state machine in chunks, PySyncObj's own one by one.

        When user code is called for an entry, all earlier entries were applied and their callers told, no later one was
        applied, and ``raftLastApplied`` is the index before the entry's own: as in PySyncObj, and so on every replica.
        """
        count = min(self._SyncObj__raftCommitIndex + 1 - first, CHUNK_ENTRIES)
        journal = self._fastsm_journal
        entries, others = journal.marked(first, count, CHUNK_BYTES, MARK, FILLER)
        if not entries:
            raise NotRunningError(f"{journal.path}: entry {first} is committed, but not in the journal")
        start = place = 0
        while start < len(entries):
            if place == len(others) or others[place] > start:
                end = others[place] if place < len(others) else len(entries)
                self._fastsm_apply_run(entries[start:end])
            else:
                end = start + 1
                while place + end - start < len(others) and others[place + end - start] == end:
                    end += 1
                end = start + self._fastsm_apply_others(entries[start:end], stop)
                place += end - start
            start = end
            if clock.monotonic() > stop or not self._fastsm_behind:
                return

    def _fastsm_apply_run(self, entries: list[tuple[int, int, bytes]]) -> None:
        """Applies entries of the state machine."""
        if self._fastsm_on_change is None:
            results = self._fastsm_apply_chunk(entries)
        else:
            place = Place(self._fastsm_machine)
            results = self._fastsm_apply_chunk(entries)
            changes = place.changes(entries)
            if changes is None or changes:
                self._fastsm_on_change(changes)
        if self._SyncObj__commandsWaitingCommit:
            if None in results:  # skipped: the state machine has other entries there, from before a power loss
                results = [NOT_APPLIED if result is None else result for result in results]
            self._fastsm_tell(entries, results)
        self._SyncObj__raftLastApplied = entries[-1][0]

    def _fastsm_apply_others(self, entries: list[tuple[int, int, bytes]], stop: float) -> int:
        """Applies entries of PySyncObj's own one by one, as long as there is time; returns how many.

        The state machine gets them as entries without effect; the entry of a method is applied there before the call.
        """
        commands = self._fastsm_journal.entries(entries[0][0], len(entries))
        waiting = self._SyncObj__commandsWaitingCommit
        done = 0
        for entry, (command, index, _) in zip(entries, commands, strict=True):
            done += 1
            self._fastsm_machine.apply([entry])
            self._SyncObj__raftLastApplied = index - 1
            result = self._fastsm_apply_other(command)
            subscribers = waiting.pop(index, None)
            if subscribers:
                self._fastsm_answer(subscribers, entry[1], result)
            self._SyncObj__raftLastApplied = index
            if self._SyncObj__destroying or clock.monotonic() > stop:
                break
        return done

    def _fastsm_apply_chunk(self, entries: list[tuple[int, int, bytes]]) -> list[Any]:
        """Applies all entries; a malformed one has the result False, on every replica."""
        results: list[Any] = []
        while len(results) < len(entries):
            rest = entries[len(results) :] if results else entries
            try:
                results += self._fastsm_machine.apply(rest)
            except UnknownCommandError:
                raise
            except ProcedureError as error:
                if isinstance(error.__cause__, UnreadableItemError):
                    raise UnreadableItemError(str(error.__cause__)) from error
                raise
            except CommandError as error:
                if error.index is None:
                    raise
                good = error.index - rest[0][0]
                if good:
                    results += self._fastsm_machine.apply(rest[:good])
                index, term, _ = rest[good]
                self._fastsm_machine.apply([(index, term, FILLER)])
                results.append(False)
                logger.warning("entry %d is malformed and changes nothing: %s", index, error)
        return results

    def _fastsm_apply_other(self, command: bytes) -> Any:
        """Applies an entry of PySyncObj's own, or of one of its consumers."""
        if command == SENTINEL:
            return None
        if command[0] > LAST_KIND:
            raise UnknownCommandError(
                f"expected an entry of kind 0 to {LAST_KIND}, found one of kind {command[0]}, from another release; "
                "run that release on this node")
        if command[0] != 0:
            return self._SyncObj__doApplyCommand(command)
        reading = True
        try:
            method, arguments, keywords = self._fastsm_call_of(command)
            reading = False
            return method(*arguments, **keywords, _doApply=True)
        except NOT_THE_ENTRYS:
            raise  # other replicas may well apply it: skipping it here would make this one differ
        except BaseException as error:
            if is_interrupt(error) or (reading and isinstance(error, UnknownCommandError)):
                raise
            # The same happens on every replica: stopping or retrying would end the cluster.
            logger.exception("a replicated method raised; its entry is skipped")
            return Raised(error)

    def _fastsm_call_of(self, command: bytes) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
        """Returns the replicated method that an entry calls, and its arguments.

        Raises ``UnknownCommandError`` if this node lacks the method or a class that other nodes may have.
        """
        try:
            content = loads(command[1:])
        except AttributeError as error:
            raise UnknownCommandError(
                f"an entry calls a replicated method with an object that this node cannot read: {error}; all nodes "
                "need the classes of replicated methods' arguments, where pickle finds them by name") from error
        arguments: Any = ()
        keywords: dict[str, Any] = {}
        if not isinstance(content, tuple):
            number = content
        elif len(content) == 2:
            number, arguments = content
        else:
            number, arguments, keywords = content
        method = self._idToMethod.get(number)
        if method is None:
            raise UnknownCommandError(
                f"an entry calls replicated method {number!r}, but this node has only {len(self._idToMethod)}: it "
                "comes from another release; mark an added method with @replicated(ver=N), and call setCodeVersion(N) "
                "once all nodes run that release")
        return method, arguments, keywords

    def _fastsm_tell(self, entries: list[tuple[int, int, bytes]], results: list[Any]) -> None:
        """Calls the callbacks for these entries."""
        waiting = self._SyncObj__commandsWaitingCommit
        for (index, term, _), result in zip(entries, results, strict=True):
            subscribers = waiting.pop(index, ())
            if not subscribers:
                continue
            self._SyncObj__raftLastApplied = index - 1
            self._fastsm_answer(subscribers, term, result)

    def _fastsm_answer(self, subscribers: list[tuple[int, Callback]], term: int, result: Any) -> None:
        """Calls the callbacks for an entry of a term."""
        for submitted_term, callback in subscribers:
            if submitted_term != term:
                callback(None, FAIL_REASON.DISCARDED)
            elif isinstance(result, Raised):
                callback(None, FAIL_REASON.UNKNOWN_OUTCOME)
            else:
                callback(result, FAIL_REASON.SUCCESS)

    def _fastsm_pass_over_waiting(self, index: int) -> None:
        """Tells callers, after an install, that the outcome of their commands up to ``index`` is unknown."""
        waiting = self._SyncObj__commandsWaitingCommit
        for known in [number for number in waiting if number <= index]:
            for _, callback in waiting.pop(known):
                callback(None, FAIL_REASON.UNKNOWN_OUTCOME)
