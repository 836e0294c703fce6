"""How entries get from the leader's journal to those of its followers.

It works as in PySyncObj, with these differences:

- If a follower's journal does not match, the leader continues after what the follower has applied: that part is equal.
- Entries that a follower already has are not removed and rewritten, so entries that it has acknowledged stay.
- A follower's commit index never goes beyond the entries that it has compared with its leader's.
- A reply counts only in the term in which it was made, and a reply to an older message does not move the leader back.
- Entries of any size arrive complete.
- All commands that are queued when a tick begins are sent together, instead of in a message each; a follower does not
  repeat itself within a moment; and a thread that submits wakes the tick thread only once.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from typing import Any

from pysyncobj import FAIL_REASON, SyncObj
from pysyncobj import monotonic as clock
from pysyncobj.fast_queue import FastQueue

from fastsm.integrations.pysyncobj.errors import DivergedError
from fastsm.integrations.pysyncobj.journal import FastJournal
from fastsm.integrations.pysyncobj.transport import FastTransport

LEADER = 2
ALL = 2**62
PART = 1 << 20  # of a larger entry, in one message
GATHERING = 0.002  # seconds for which commands are gathered, at most
BACKLOG = 4 << 20  # unread bytes after which a follower is given time to catch up


class _OwnJournal:
    """Installs the node's own journal where PySyncObj's constructor stores the one that it made."""

    def __set__(self, node: Replication, made: Any) -> None:
        node.__dict__["_SyncObj__raftLog"] = node._fastsm_journal


class _OwnLock:
    """Installs a reentrant lock where PySyncObj's constructor stores one for its tick callbacks.

    PySyncObj holds it while it calls them: a callback that removes itself would wait for itself.
    """

    def __set__(self, node: Replication, made: Any) -> None:
        node.__dict__["_SyncObj__onTickCallbacksLock"] = threading.RLock()


class _OwnQueue:
    """Installs a queue without a lock where PySyncObj's constructor stores one of its own."""

    def __set__(self, node: Replication, made: Any) -> None:
        node.__dict__["_SyncObj__commandsQueue"] = CommandQueue(made._FastQueue__maxSize)


class CommandQueue(FastQueue):  # type: ignore[misc]  # PySyncObj has no types
    """PySyncObj's queue of commands. It holds no lock, so a signal handler may submit at any point.

    Threads that submit at the same moment may exceed its size, each by one.
    """

    def put_nowait(self, value: Any) -> None:
        commands = self._FastQueue__queue
        if 0 < self._FastQueue__maxSize <= len(commands):
            raise queue.Full
        commands.append(value)

    def get_nowait(self) -> Any:
        try:
            return self._FastQueue__queue.popleft()
        except IndexError:
            raise queue.Empty from None


class Replication(SyncObj):  # type: ignore[misc]  # PySyncObj has no types
    """A ``SyncObj`` on a :class:`FastJournal` and a :class:`FastTransport`. Runs entirely in the tick thread."""

    _SyncObj__raftLog = _OwnJournal()
    _SyncObj__onTickCallbacksLock = _OwnLock()
    _SyncObj__commandsQueue: Any = _OwnQueue()

    _fastsm_journal: FastJournal
    _fastsm_over: bool
    _SyncObj__raftCommitIndex: int
    _SyncObj__commandsWaitingReply: dict[int, Any]

    def _fastsm_begin_replication(self, journal: FastJournal) -> None:
        self._fastsm_journal = journal
        self._fastsm_keep_tail = False  # while a message is handled: keep entries after those in the message
        self._fastsm_pieces: list[bytes] | None = None  # of an entry that arrives in several messages
        self._fastsm_batch: tuple[Any, dict[str, Any]] = None, {}  # the last one, and what it depended on
        self._fastsm_gathers_until: float | None = None  # while commands are gathered; 0.0: none has come yet
        self._fastsm_woken = False  # whether the tick thread was woken since it last looked at the queue
        self._fastsm_waking = threading.RLock()  # held while the pipe to the tick thread is written to, or closed
        self._fastsm_wakes = False  # whether the pipe is being written to
        self._fastsm_said: dict[Any, tuple[Any, float]] = {}  # to each node: the last reply, and when

    @property
    def _fastsm_transport(self) -> FastTransport:
        transport: FastTransport = self._SyncObj__transport
        return transport

    # ---- commands --------------------------------------------------------------------------------------

    def _checkCommandsToApply(self) -> None:
        """Takes the queued commands, and sends what results from them together."""
        self._fastsm_woken = False  # before looking at the queue: later commands wake the thread again
        leader, transport = self._SyncObj__raftLeader, self._fastsm_transport
        if self._SyncObj__conf.commandsWaitLeader and not (
            leader is None or self._SyncObj__raftState == LEADER or transport.reaches(leader)
        ):
            return  # commands wait here for the connection: without one, they would be lost without notice
        began = clock.monotonic()
        transport.gather()
        self._fastsm_gathers_until = 0.0
        try:
            super()._checkCommandsToApply()
        finally:
            due, self._fastsm_gathers_until = self._fastsm_gathers_until, None
            if due:
                self._SyncObj__sendAppendEntries()
            transport.send_gathered()
        if clock.monotonic() - began >= self._SyncObj__conf.appendEntriesPeriod:
            self._fastsm_wake()  # it took as many commands as there was time for

    def _fastsm_wake(self) -> None:
        """Makes the tick thread look at the queue now, if it is sleeping."""
        notifier = getattr(self, "_SyncObj__pipeNotifier", None)  # None with conf.appendEntriesUseBatch
        if self._fastsm_woken or notifier is None:
            return
        with self._fastsm_waking:
            if not self._fastsm_over:
                self._fastsm_woken = self._fastsm_wakes = True
                try:
                    with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups already
                        notifier.notify()
                finally:
                    self._fastsm_wakes = False

    def _fastsm_end_waking(self) -> None:
        """Closes the pipe, which PySyncObj would leave open."""
        notifier = getattr(self, "_SyncObj__pipeNotifier", None)
        with self._fastsm_waking:
            if notifier is None or self._fastsm_wakes:
                return  # the interrupted frame is about to write to the pipe, so it stays open
            ends = notifier._PipeNotifier__pipeR, notifier._PipeNotifier__pipeW
            notifier._PipeNotifier__pipeR = notifier._PipeNotifier__pipeW = -1
            self._poller.unsubscribe(ends[0])
            for end in ends:
                os.close(end)

    # ---- a follower ------------------------------------------------------------------------------------

    def _fastsm_take_message(self, node: Any, message: dict[str, Any]) -> None:
        """Does what ``SyncObj.__onMessageReceived`` does, with the differences named above."""
        kind = message["type"]
        if kind == "append_entries":
            if message["term"] >= self._SyncObj__raftCurrentTerm:
                self._fastsm_take_entries(node, message)
        elif kind == "next_node_idx":
            self._fastsm_take_reply(node, message)
        else:
            super()._SyncObj__onMessageReceived(node, message)

    def _fastsm_take_entries(self, node: Any, message: dict[str, Any]) -> None:
        entry = message.pop("entry", None)
        if entry is not None:
            whole = self._fastsm_whole_entry(*entry)
            if whole is None:
                self._fastsm_hear(node, message)
                return
            message["entries"] = [whole]
        if "prevLogIdx" not in message:
            self._fastsm_hear(node, message)
            return
        commit_index = message["commit_index"]
        try:
            super()._SyncObj__onMessageReceived(node, self._fastsm_without_known(message))
        finally:
            self._fastsm_keep_tail = False
        self._SyncObj__leaderCommitIndex = commit_index

    def _fastsm_hear(self, node: Any, message: dict[str, Any]) -> None:
        """Notes that the leader is alive, and takes only its term. Replies, so that the leader keeps this node."""
        known = self._SyncObj__leaderCommitIndex
        heard = {"type": "append_entries", "term": message["term"], "commit_index": 0}
        super()._SyncObj__onMessageReceived(node, heard)
        self._SyncObj__leaderCommitIndex = known
        self._SyncObj__sendNextNodeIdx(node)

    def _fastsm_without_known(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns the message without the entries that this node has already, so that it starts where these end."""
        journal, previous, entries = self._fastsm_journal, message["prevLogIdx"], message["entries"]
        term = journal.term_at(previous)
        if term != message["prevLogTerm"]:
            if term is not None and previous <= self._SyncObj__raftLastApplied:
                self._fastsm_diverged(previous, term, message["prevLogTerm"])
            return message
        verified = previous + len(entries)
        known = 0
        if journal.last_index > previous:
            while known < len(entries) and journal.term_at(entries[known][1]) == entries[known][2]:
                known += 1
            if known < len(entries):
                found = journal.term_at(entries[known][1])
                if found is not None and entries[known][1] <= self._SyncObj__raftLastApplied:
                    self._fastsm_diverged(entries[known][1], found, entries[known][2])
        self._fastsm_keep_tail = known == len(entries)
        return {
            **message,
            "entries": entries[known:],
            "prevLogIdx": previous + known,
            "prevLogTerm": entries[known - 1][2] if known else term,
            "commit_index": min(message["commit_index"], verified),
        }

    def _fastsm_diverged(self, index: int, here: int, there: int) -> None:
        raise DivergedError(
            f"{self._fastsm_journal.path}: expected entry {index} of term {there}, as the leader has it, found one of "
            f"term {here}, which was applied here; remove this node's directory and start it again"
        )

    def _fastsm_whole_entry(
        self, index: int, term: int, part: bytes, first: bool, last: bool
    ) -> tuple[bytes, int, int] | None:
        """Returns an entry that arrives in parts, once it is complete."""
        if first:
            self._fastsm_pieces = []
        if self._fastsm_pieces is None:
            return None
        self._fastsm_pieces.append(part)
        if not last:
            return None
        command, self._fastsm_pieces = b"".join(self._fastsm_pieces), None
        return command, index, term

    def _SyncObj__getEntries(
        self, fromIDx: int | None, count: int | None = None, maxSizeBytes: int | None = None
    ) -> list[tuple[bytes, int, int]]:
        if fromIDx is None or fromIDx < 0:
            return []
        if count is None and maxSizeBytes is None:
            # A follower reads the previous entry, and whether there are others after it, to remove these.
            count = 1 if self._fastsm_keep_tail else ALL if self._SyncObj__conf.dynamicMembershipChange else 2
        most_bytes = ALL if maxSizeBytes is None else maxSizeBytes
        return self._fastsm_journal.entries(fromIDx, ALL if count is None else count, most_bytes)

    def _SyncObj__sendNextNodeIdx(
        self, node: Any, reset: bool = False, nextNodeIdx: int | None = None, success: bool = False
    ) -> None:
        if reset:
            # Later entries may not be the leader's. Going back one step for each message that does not match would be
            # undone by the reply to the next message, which says where this journal ends: endlessly.
            nextNodeIdx = self._SyncObj__raftLastApplied + 1
        reply = {
            "type": "next_node_idx",
            "term": self._SyncObj__raftCurrentTerm,
            "next_node_idx": self._fastsm_journal.last_index + 1 if nextNodeIdx is None else nextNodeIdx,
            "reset": reset,
            "success": success,
        }  # fmt: skip
        said, at = self._fastsm_said.get(node, (None, 0.0))
        now = clock.monotonic()
        if said != reply or now - at >= self._fastsm_moment:  # otherwise it would only repeat the last one
            self._fastsm_said[node] = reply, now
            self._fastsm_transport.send(node, reply)

    @property
    def _fastsm_moment(self) -> float:
        """Seconds for which a leader need not be told again that this node is alive."""
        conf = self._SyncObj__conf
        moment: float = min(conf.appendEntriesPeriod, conf.leaderFallbackTimeout - conf.appendEntriesPeriod) / 2
        return moment

    def _SyncObj__onNodeConnected(self, node: Any) -> None:
        """Answers callers whose messages to this leader were in flight when the last connection ended."""
        super()._SyncObj__onNodeConnected(node)
        if node == self._SyncObj__raftLeader:
            waiting, self._SyncObj__commandsWaitingReply = self._SyncObj__commandsWaitingReply, {}
            for number in sorted(waiting):
                waiting[number](None, FAIL_REASON.UNKNOWN_OUTCOME)

    def _SyncObj__onNodeDisconnected(self, node: Any) -> None:
        super()._SyncObj__onNodeDisconnected(node)
        self._fastsm_said.pop(node, None)  # the last reply may not have arrived

    # ---- the leader ------------------------------------------------------------------------------------

    def _fastsm_commit(self) -> None:
        """Commits what a majority has, in one step, so that PySyncObj does not have to check entry by entry."""
        journal = self._fastsm_journal
        matching = [self._SyncObj__raftMatchIndex[node] for node in self._SyncObj__otherNodes]
        matching.append(journal.last_index)
        matching.sort(reverse=True)
        index = min(matching[len(matching) // 2], journal.last_index)
        if index > self._SyncObj__raftCommitIndex and journal.term_at(index) == self._SyncObj__raftCurrentTerm:
            self._SyncObj__raftCommitIndex = index
            journal.setRaftCommitIndex(index)

    def _fastsm_take_reply(self, node: Any, message: dict[str, Any]) -> None:
        following = self._SyncObj__raftNextIndex
        is_leader = self._SyncObj__raftState == LEADER
        if not is_leader or message["term"] != self._SyncObj__raftCurrentTerm or node not in following:
            return
        before = following[node]
        super()._SyncObj__onMessageReceived(node, message)
        if message["success"] and not message["reset"]:
            following[node] = max(before, following[node])

    def _SyncObj__sendAppendEntries(self) -> None:
        if self._fastsm_gathers_until is not None:
            now = clock.monotonic()
            self._fastsm_gathers_until = self._fastsm_gathers_until or now + GATHERING
            if now < self._fastsm_gathers_until:
                return
            self._fastsm_gathers_until = 0.0
        period = self._SyncObj__conf.appendEntriesPeriod
        self._SyncObj__newAppendEntriesTime = deadline = clock.monotonic() + period
        for node in self._SyncObj__otherNodes | self._SyncObj__readonlyNodes:
            if node in self._SyncObj__connectedNodes:
                self._fastsm_send_to(node, deadline)

    def _fastsm_send_to(self, node: Any, deadline: float) -> None:
        """Sends a follower what it lacks, as long as there is time; at least a heartbeat."""
        journal, transport = self._fastsm_journal, self._fastsm_transport
        following = min(self._SyncObj__raftNextIndex[node], journal.last_index + 1)
        sent = False
        while not sent or following <= journal.last_index:
            if following <= journal.first_index:
                self._fastsm_send_snapshot(node)
                return
            if transport.backlog(node) > BACKLOG or node not in self._SyncObj__connectedNodes:
                return
            following = self._fastsm_send_batch(node, following)
            sent = True
            if clock.monotonic() > deadline:
                return

    def _fastsm_send_batch(self, node: Any, following: int) -> int:
        message = self._fastsm_batch_from(following)
        entries = message["entries"]
        if len(entries) == 1 and len(entries[0][0]) > PART:
            self._fastsm_send_parts(node, message, entries[0])
        else:
            self._fastsm_transport.send(node, message)
        following += len(entries)
        self._SyncObj__raftNextIndex[node] = following
        return following

    def _fastsm_batch_from(self, following: int) -> dict[str, Any]:
        """Returns a message with the next entries for a follower; the previous message if it has the same entries."""
        journal, term = self._fastsm_journal, self._SyncObj__raftCurrentTerm
        commit_index = self._SyncObj__raftCommitIndex
        told = following, journal.last_index, term, commit_index
        if self._fastsm_batch[0] != told:
            entries = journal.entries(following, ALL, self._SyncObj__conf.appendEntriesBatchSizeBytes)
            if len(entries) > 1 and len(entries[-1][0]) > PART:
                entries.pop()  # it comes next, by itself
            self._fastsm_batch = told, {
                "type": "append_entries",
                "term": term,
                "commit_index": commit_index,
                "prevLogIdx": following - 1,
                "prevLogTerm": journal.term_at(following - 1),
                "entries": entries,
            }
        return self._fastsm_batch[1]

    def _fastsm_send_parts(self, node: Any, message: dict[str, Any], entry: tuple[bytes, int, int]) -> None:
        """Sends a large entry in several messages, each of which is also a heartbeat."""
        command, index, term = entry
        for start in range(0, len(command), PART):
            part = (index, term, command[start : start + PART], start == 0, start + PART >= len(command))
            if not self._fastsm_transport.send(node, {**message, "entries": [], "entry": part}):
                return

    def _fastsm_send_snapshot(self, node: Any) -> None:
        """Sends a snapshot to a follower that lacks entries which the journal no longer has."""
        raise NotImplementedError
