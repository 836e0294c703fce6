"""How entries get from the leader's journal into those of its followers.

PySyncObj's way is kept, but for these differences:

- A follower whose journal does not fit has the leader go on after what it has applied: up to there all are the same.
- Entries that a follower has already are not removed and written again, so what it acknowledged once stays.
- A follower's commit index never passes what it has compared with its leader.
- A reply counts only for the term that it was made in, and a reply to an older message does not move the leader back.
- Entries of any size arrive whole.
- All commands that wait when a tick begins go out together, not each in a message of its own; a follower does not say
  the same thing twice in a moment; and a thread that submits wakes the tick thread only once.
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
PART = 1 << 20  # of an entry that is larger, in one message
GATHERING = 0.002  # seconds for which commands are gathered at most
BACKLOG = 4 << 20  # bytes that a follower is behind in reading: it is given time


class _OwnJournal:
    """Puts the node's own journal where PySyncObj's constructor puts the one that it made."""

    def __set__(self, node: Replication, made: Any) -> None:
        node.__dict__["_SyncObj__raftLog"] = node._fastsm_journal


class _OwnLock:
    """Puts a lock that its own thread may take again where PySyncObj's constructor puts one for its tick callbacks.

    PySyncObj calls them under it: one that takes itself away would wait for itself.
    """

    def __set__(self, node: Replication, made: Any) -> None:
        node.__dict__["_SyncObj__onTickCallbacksLock"] = threading.RLock()


class _OwnQueue:
    """Puts a queue without a lock where PySyncObj's constructor puts one of its own."""

    def __set__(self, node: Replication, made: Any) -> None:
        node.__dict__["_SyncObj__commandsQueue"] = CommandQueue(made._FastQueue__maxSize)


class CommandQueue(FastQueue):  # type: ignore[misc]  # PySyncObj has no types
    """PySyncObj's queue of commands. No lock is held, so a signal handler may submit in the middle of anything.

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
    """A ``SyncObj`` on a :class:`FastJournal` and a :class:`FastTransport`. All of it runs in the tick thread."""

    _SyncObj__raftLog = _OwnJournal()
    _SyncObj__onTickCallbacksLock = _OwnLock()
    _SyncObj__commandsQueue: Any = _OwnQueue()

    _fastsm_journal: FastJournal
    _fastsm_over: bool
    _SyncObj__raftCommitIndex: int
    _SyncObj__commandsWaitingReply: dict[int, Any]

    def _fastsm_begin_replication(self, journal: FastJournal) -> None:
        self._fastsm_journal = journal
        self._fastsm_keep_tail = False  # while a message is handled: the entries after those that it names stay
        self._fastsm_pieces: list[bytes] | None = None  # of an entry that arrives in several messages
        self._fastsm_batch: tuple[Any, dict[str, Any]] = None, {}  # the last one, and what it depended on
        self._fastsm_gathers_until: float | None = None  # while commands are gathered; 0.0: none has come yet
        self._fastsm_woken = False  # whether the tick thread was woken since it last looked at the queue
        self._fastsm_waking = threading.RLock()  # held while the pipe to the tick thread is written to, or closed
        self._fastsm_wakes = False  # whether this is such a moment
        self._fastsm_said: dict[Any, tuple[Any, float]] = {}  # to each node: what was replied last, and when

    @property
    def _fastsm_transport(self) -> FastTransport:
        transport: FastTransport = self._SyncObj__transport
        return transport

    # ---- commands --------------------------------------------------------------------------------------

    def _checkCommandsToApply(self) -> None:
        """Takes the commands that wait; whatever goes out for them goes out together."""
        self._fastsm_woken = False  # before the look at the queue: what is put there later wakes again
        leader, transport = self._SyncObj__raftLeader, self._fastsm_transport
        if self._SyncObj__conf.commandsWaitLeader and not (
            leader is None or self._SyncObj__raftState == LEADER or transport.reaches(leader)
        ):
            return  # they wait here for the connection: without one they would be lost without a word
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
            self._fastsm_wake()  # it took as many as there was time for

    def _fastsm_wake(self) -> None:
        """Has the tick thread look at the queue now, if it is asleep."""
        notifier = getattr(self, "_SyncObj__pipeNotifier", None)  # there is none with conf.appendEntriesUseBatch
        if self._fastsm_woken or notifier is None:
            return
        with self._fastsm_waking:
            if not self._fastsm_over:
                self._fastsm_woken = self._fastsm_wakes = True
                try:
                    with contextlib.suppress(BlockingIOError):  # the pipe is full of calls to wake up
                        notifier.notify()
                finally:
                    self._fastsm_wakes = False

    def _fastsm_end_waking(self) -> None:
        """Closes the pipe, which PySyncObj leaves open."""
        notifier = getattr(self, "_SyncObj__pipeNotifier", None)
        with self._fastsm_waking:
            if notifier is None or self._fastsm_wakes:
                return  # the frame below this signal handler is about to write to it: it stays open
            ends = notifier._PipeNotifier__pipeR, notifier._PipeNotifier__pipeW
            notifier._PipeNotifier__pipeR = notifier._PipeNotifier__pipeW = -1
            self._poller.unsubscribe(ends[0])
            for end in ends:
                os.close(end)

    # ---- a follower ------------------------------------------------------------------------------------

    def _fastsm_take_message(self, node: Any, message: dict[str, Any]) -> None:
        """What ``SyncObj.__onMessageReceived`` does, with the differences named above."""
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
        """The leader lives: its term counts, and nothing else. It is told that this node lives, lest it give it up."""
        known = self._SyncObj__leaderCommitIndex
        heard = {"type": "append_entries", "term": message["term"], "commit_index": 0}
        super()._SyncObj__onMessageReceived(node, heard)
        self._SyncObj__leaderCommitIndex = known
        self._SyncObj__sendNextNodeIdx(node)

    def _fastsm_without_known(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message without the entries that are here already; it then goes on where they end."""
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
        """An entry that arrives in parts, once it is whole."""
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
            # A follower looks for the entry before, and whether there are others after it, to remove these.
            count = 1 if self._fastsm_keep_tail else ALL if self._SyncObj__conf.dynamicMembershipChange else 2
        most_bytes = ALL if maxSizeBytes is None else maxSizeBytes
        return self._fastsm_journal.entries(fromIDx, ALL if count is None else count, most_bytes)

    def _SyncObj__sendNextNodeIdx(
        self, node: Any, reset: bool = False, nextNodeIdx: int | None = None, success: bool = False
    ) -> None:
        if reset:
            # What lies after is not known to be the leader's. One step back for each message that does not fit would
            # be undone by the answer to the next one on its way, which says where this journal ends: for ever.
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
        if said != reply or now - at >= self._fastsm_moment:  # else it is the answer to a commit index that has moved
            self._fastsm_said[node] = reply, now
            self._fastsm_transport.send(node, reply)

    @property
    def _fastsm_moment(self) -> float:
        """Seconds for which a leader need not be told again that this node lives."""
        conf = self._SyncObj__conf
        moment: float = min(conf.appendEntriesPeriod, conf.leaderFallbackTimeout - conf.appendEntriesPeriod) / 2
        return moment

    def _SyncObj__onNodeConnected(self, node: Any) -> None:
        """Connected again, to the same leader: what was on its way when a connection ended is not answered."""
        super()._SyncObj__onNodeConnected(node)
        if node == self._SyncObj__raftLeader:
            waiting, self._SyncObj__commandsWaitingReply = self._SyncObj__commandsWaitingReply, {}
            for number in sorted(waiting):
                waiting[number](None, FAIL_REASON.UNKNOWN_OUTCOME)

    def _SyncObj__onNodeDisconnected(self, node: Any) -> None:
        super()._SyncObj__onNodeDisconnected(node)
        self._fastsm_said.pop(node, None)  # it may not have arrived

    # ---- the leader ------------------------------------------------------------------------------------

    def _fastsm_commit(self) -> None:
        """Commits what a majority has, in one step; PySyncObj then finds nothing to look at entry by entry."""
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
        """Sends a follower what it lacks, as far as there is time; at least a sign of life."""
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
        """The next entries for a follower; for one that lacks the same as the one before, the very same message."""
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
        """A large entry in several messages, each of which is also a sign of life."""
        command, index, term = entry
        for start in range(0, len(command), PART):
            part = (index, term, command[start : start + PART], start == 0, start + PART >= len(command))
            if not self._fastsm_transport.send(node, {**message, "entries": [], "entry": part}):
                return

    def _fastsm_send_snapshot(self, node: Any) -> None:
        """What a follower lacks is not in the journal any more."""
        raise NotImplementedError
