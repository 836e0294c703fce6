"""The compiled half of `RaftLog`: one writer at a time, reads and syncs next to it.

Compiled, because signal handlers run between any two steps of Python code: what is decided here and what follows from
it stand together. Bytes that were appended never change or move, so a read takes the places of its entries in one step
and copies them out afterwards, whatever happens to the log meanwhile.
"""

import logging
import operator
import sys
import threading

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_GET_SIZE
from cpython.tuple cimport PyTuple_Check, PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc

from fastsm.core.chunk cimport hold_entries
from fastsm.core.group_commit cimport GroupCommit
from fastsm.core.turns cimport Turns
from fastsm.journal.entries cimport Reading
from fastsm.journal.format cimport ITEM_COMMIT, ITEM_ENTRY, Item, item_kind, item_term
from fastsm.journal.journal cimport Journal
from fastsm.journal.segment cimport Segment

from fastsm.arguments import bytes_of, not_an_entry, pair_of
from fastsm.core.turns import CHECK_SECONDS, CLOSED
from fastsm.disk import format
from fastsm.errors import CommandError, CompactedError, NotRunningError, OrderError, StorageError
from fastsm.journal.journal import LARGEST_COMMAND
from fastsm.types import LogId

logger = logging.getLogger("fastsm")

cdef uint64_t LARGEST = format.MAX_INDEX
cdef uint64_t LARGEST_SIZE = LARGEST_COMMAND
LARGEST_VOTE = 0xFFFF
cdef uint64_t ALL_BYTES = <uint64_t>-1


cdef uint64_t number_of(object value, str what) except? <uint64_t>-1:
    number = operator.index(value)
    if not 0 <= number <= LARGEST:
        raise OrderError(f"{what} {number}: expected 0 to {LARGEST}")
    return number


cdef class Batch:
    """Entries to be appended, taken over from a caller: no code that runs later can change or free them."""

    def __cinit__(self, entries):
        cdef tuple held = hold_entries(entries)
        cdef Py_ssize_t i
        cdef Item *item
        self.held = held
        self.copies = []
        self.items = <Item *>malloc(max(1, len(held)) * sizeof(Item))
        if self.items == NULL:
            raise MemoryError(f"no memory for {len(held)} entries")
        for i in range(len(held)):
            entry = held[i]
            # The tuple's own items, whatever a subclass says of them: only those are held for as long as it is.
            if not PyTuple_Check(entry) or PyTuple_GET_SIZE(entry) != 3:
                raise not_an_entry(entry, i)
            item = &self.items[i]
            item.kind = ITEM_ENTRY
            item.index = number_of(<object>PyTuple_GET_ITEM(entry, 0), "index")
            item.term = number_of(<object>PyTuple_GET_ITEM(entry, 1), "term")
            command = <object>PyTuple_GET_ITEM(entry, 2)
            if not PyBytes_Check(command):
                command = bytes_of(command, "command")
                self.copies.append(command)
            item.data = <const uint8_t *>PyBytes_AS_STRING(command)
            item.size = PyBytes_GET_SIZE(command)
            if item.size > LARGEST_SIZE:
                raise CommandError(
                    f"entry {item.index} is of {item.size} bytes: expected at most {LARGEST_SIZE}", index=item.index)
            if i and (item.index != self.items[i - 1].index + 1 or item.term < self.items[i - 1].term):
                raise OrderError(
                    f"entry {item.index} of term {item.term} after entry {self.items[i - 1].index} of term "
                    f"{self.items[i - 1].term}: expected the next index, and no lower term", index=item.index)
        self.count = len(held)

    def __dealloc__(self):
        free(self.items)


cdef class LogEngine:
    """The entries, votes and syncs of a `RaftLog`. Thread safety: every method, from any thread; writers take turns."""

    def __cinit__(self, *args, **options):
        self._turns = Turns()
        self.removing = threading.Lock()

    def _attach(self, Journal log, segment_bytes):
        """Takes what was recovered; returns whether the end was clean, frames, bytes, torn bytes, suspect bytes.

        A vote that no sync is known to have covered is synced here: who reads it may act on it again. So is a border
        that no sync is known to have covered, unless an entry after it is known to be durable: what would survive a
        power loss is otherwise unknown. A log that is opened for tools is not synced; nothing counts as durable then.
        """
        cdef Segment newest = log.newest
        cdef Segment segment
        cdef bint clean = newest.frames == 1 or item_kind(newest.address + newest.last_frame) == ITEM_COMMIT
        cdef uint64_t suspect = newest.end - newest.durable if newest.suspect_end else 0
        cdef uint64_t frames = 0
        clean = clean and not log.torn_bytes and newest.durable >= newest.last_frame
        for segment in log.segments:
            frames += segment.frames
        if log.read_only:
            if log.is_in_doubt(log.border_frame) and log.synced < log.first:
                log.synced = 0
        elif log.is_in_doubt(log.vote_frame) or (log.is_in_doubt(log.border_frame) and log.synced < log.first):
            log.sync()
        self._log = log
        self.segment_bytes = segment_bytes
        self.commit = GroupCommit(newest, self._turns)
        self.durable_term, self.durable_vote = log.current_term, log.current_vote
        self.vote_segment = newest
        return clean, frames, log.size, log.torn_bytes, suspect

    cdef int require(self) except -1:
        if self._log is None or self._log.newest is None:
            raise NotRunningError("this log is closed, or a forked child's copy: open the directory again")
        return 0

    # ---- read ------------------------------------------------------------------------------------------

    @property
    def first_index(self):
        """The first entry that is kept, or the next one when there is none: 1 at first; i + 1 after `compact((i, t))`.
        """
        self.require()
        return self._log.first

    @property
    def last_index(self):
        """The last entry. An empty log: the one that it begins after, 0 at first."""
        self.require()
        return self._log.last()

    @property
    def last_term(self):
        """The term of the last entry. An empty log: of the one that it begins after, 0 at first."""
        self.require()
        return self._log.last_term()

    @property
    def durable_index(self):
        """The last entry that would survive a power loss now. It falls with a truncation only."""
        self.require()
        return min(self._log.synced, self._log.last())

    def term(self, index, /):
        """The term of an entry, or None when the log does not know it.

        Known are the entries that are there, and the one that the log begins after: what was compacted last, or 0, of
        term 0, at first. So the entry before any entry of the log has a term. O(1).
        """
        cdef Journal log = self._log
        cdef uint64_t place
        number = operator.index(index)  # may run code that closes the log
        self.require()
        if not 0 <= number <= LARGEST:
            return None
        place = number
        if place == log.first - 1:
            return log.border_term
        if not log.first <= place <= log.last():
            return None
        return item_term(log.frame_at(place - log.first))

    def entries(self, first, last, *, max_bytes=None):
        """The entries from `first` to `last`, both included, as a list of `Entry`: as many of them as are there.

        `max_bytes`: at most as many as have so many bytes of commands together, but at least one. What lies before
        `first_index` was compacted: `CompactedError`, whose `oldest` is the first entry that can be read. As the log
        is at one moment, next to whatever is appended, truncated or compacted. O(what is returned).
        """
        cdef Reading reading
        cdef Journal log = self._log
        cdef uint64_t start, stop
        cdef uint64_t most = ALL_BYTES
        self.require()
        begin, end = operator.index(first), operator.index(last)
        if max_bytes is not None:
            limit = operator.index(max_bytes)
            if limit < 0:
                raise ValueError(f"max_bytes {limit}: expected None or 0 and more")
            most = min(limit, ALL_BYTES - 1)
        if end < begin:
            return []
        if begin > LARGEST:
            return []
        start = max(0, begin)
        stop = min(max(0, end), LARGEST) + 1
        self.require()
        if begin < 0 or start < log.first:
            raise CompactedError(
                f"{log.path}: entry {begin} is not in the log, which begins at entry {log.first}: what is before that "
                "was compacted", oldest=log.first)
        reading = log.hold(start, stop, most)
        return reading.listed()

    def hard_state(self):
        """`(term, voted_for)` as they were last saved, and are durable; `(0, None)` at first."""
        self.require()
        if self.vote_is_durable():
            return self._log.current_term, self._log.current_vote
        return self.durable_term, self.durable_vote

    cdef bint vote_is_durable(self) noexcept:
        return self.vote_segment.durable >= self.vote_end

    # ---- write -----------------------------------------------------------------------------------------

    def append(self, entries, /):
        """Appends entries, all or none; durable after `sync`. O(bytes).

        `entries`: a sequence of `Entry` or plain tuples `(index, term, command)` with consecutive indexes and terms
        that never fall. Those that are there already, with the same term, are skipped: their command is not looked at.
        An entry that is there with another term, a gap after `last_index`, a term below `last_term`, or an index below
        `first_index` is an `OrderError`, whose `index` names it: a follower truncates first. A command is bytes-like.

        Raises `CommandError` for a command of more than 2**32 - 1 bytes, `StorageError`; then nothing has changed.
        After a crash a prefix of what was not synced is there.
        """
        cdef Batch batch = Batch(entries)
        cdef size_t known
        self.require()
        self._turns.enter()
        try:
            self.require()
            known = self.judge(batch)
            if known < batch.count:
                self.rotate_if_full()
                self._log.append_entries(batch.items + known, batch.count - known)
        finally:
            self._turns.leave()

    cdef size_t judge(self, Batch batch) except? -1:
        """How many entries of a batch are there already."""
        cdef Journal log = self._log
        cdef uint64_t last = log.last()
        cdef uint64_t term
        cdef Item *item
        cdef size_t known = 0
        while known < batch.count and batch.items[known].index <= last:
            item = &batch.items[known]
            if item.index < log.first:
                raise OrderError(
                    f"{log.path}: entry {item.index} is before the first one, {log.first}: it was compacted",
                    index=item.index)
            term = item_term(log.frame_at(item.index - log.first))
            if item.term != term:
                raise OrderError(
                    f"{log.path}: entry {item.index} of term {item.term} is there with term {term}: "
                    f"truncate_after({item.index - 1}) first", index=item.index)
            known += 1
        if known < batch.count:
            item = &batch.items[known]
            if item.index != last + 1 or item.index < log.first:
                raise OrderError(
                    f"{log.path}: expected entry {last + 1}, found {item.index}: entries follow one another",
                    index=item.index)
            if item.term < log.last_term():
                raise OrderError(
                    f"{log.path}: entry {item.index} of term {item.term} after {LogId(last, log.last_term())}: "
                    "terms never fall", index=item.index)
        return known

    def truncate_after(self, index):
        """Removes the entries after `index`; at or above `last_index` nothing happens. O(1), durable after `sync`.

        `index` may be the one that the log begins after: then no entry is left. Below that: `OrderError`.
        """
        cdef uint64_t place = number_of(index, "index")
        cdef Journal log = self._log
        self.require()
        self._turns.enter()
        try:
            self.require()
            if place >= log.last():
                return
            if place + 1 < log.first:
                raise OrderError(
                    f"{log.path}: cannot truncate after entry {place}: the log begins at entry {log.first}",
                    index=place)
            log.remove_from(place + 1)
            self.cuts += 1
        finally:
            self._turns.leave()

    def compact(self, up_to):
        """Drops the entries up to `up_to`, a `LogId`: a snapshot holds them. O(1), durable after `sync`.

        Where the log does not hold that very entry (a snapshot was installed), all entries are dropped, and the log
        begins after it. At or below what was compacted already nothing happens; a term below that one's is an
        `OrderError`. Reads see it at once. The files of segments that hold nothing any more go with a later `sync`.
        """
        cdef Journal log = self._log
        cdef uint64_t place, term, before
        index, of_term = pair_of(up_to, "up_to")
        place, term = number_of(index, "index"), number_of(of_term, "term")
        self.require()
        self._turns.enter()
        try:
            self.require()
            if place < log.first:
                return
            if term < log.border_term:
                raise OrderError(
                    f"{log.path}: cannot compact up to {LogId(place, term)}, the log begins after "
                    f"{LogId(log.first - 1, log.border_term)}: terms never fall", index=place)
            if place <= log.last() and item_term(log.frame_at(place - log.first)) == term:
                log.remove_up_to(place)
                return
            before = log.last()
            log.begin_after(place, term)
            if place <= before:  # of another term: what was durable from there on is another history's
                log.synced = min(log.synced, place - 1)
                self.cuts += 1
        finally:
            self._turns.leave()

    def save_hard_state(self, term, voted_for=None):
        """Saves the current term and who was voted for in it, bytes or None; durable on return.

        `voted_for`: at most 65,535 bytes, else a `ValueError`: each new segment of the log begins with a copy of it.
        The term never falls, and a vote that was given stays as it is in its term: anything else is an `OrderError`.
        On a `StorageError` from a full disk nothing has changed.
        """
        cdef Journal log = self._log
        cdef uint64_t number = number_of(term, "term")
        cdef bytes vote = None if voted_for is None else bytes_of(voted_for, "voted_for")
        if vote is not None and len(vote) > LARGEST_VOTE:
            raise ValueError(f"voted_for is of {len(vote)} bytes: expected at most {LARGEST_VOTE}, the name of a node")
        self.require()
        self._turns.enter()
        try:
            self.require()
            if number < log.current_term:
                raise OrderError(f"{log.path}: the current term falls from {log.current_term} to {number}")
            if number == log.current_term and log.current_vote is not None and vote != log.current_vote:
                raise OrderError(
                    f"{log.path}: in term {number} the vote was given to {log.current_vote!r} already, not to {vote!r}")
            covered = None
            if number > log.current_term or vote != log.current_vote:
                if self.vote_is_durable():
                    self.durable_term, self.durable_vote = log.current_term, log.current_vote
                log.note_vote(number, vote)
                self.vote_segment, self.vote_end = log.newest, log.newest.end
                covered = log.last(), self.cuts, None
            commit, end = self.commit, self.vote_end
            if self.vote_segment is not log.newest:
                return  # whatever is in a segment before the newest is durable
        finally:
            self._turns.leave()
        self._sync_to((commit, (0, end), covered))

    cdef int rotate_if_full(self) except -1:
        """In the writer's turn: goes on in a new segment where the newest is large, so that files can be removed."""
        cdef Journal log = self._log
        cdef GroupCommit commit
        if log.newest.end < self.segment_bytes:
            return 0
        self.commit.sync_up_to(log.newest.end)
        commit = GroupCommit(log.newest, self._turns)  # now: once the new segment counts nothing may fail in memory
        log.go_on(log.first, log.border_term)
        if log.newest is not None:  # else this is a forked child
            commit.log = log.newest
            self.commit = commit
        return 0

    # ---- sync ------------------------------------------------------------------------------------------

    def _mark(self):
        """At this moment: what a sync has to reach, and which entries it makes durable."""
        cdef Journal log = self._log
        cdef uint64_t end, last
        self.require()
        end, last = log.newest.end, log.last()
        return self.commit, (log.newest.head.generation, end), (last, self.cuts, log.retired[:])

    def _sync_to(self, mark):
        """Makes durable what was there when the mark was taken."""
        cdef GroupCommit commit
        cdef uint64_t last
        commit, (_, end), covered = mark
        commit.sync_up_to(end)
        if commit.log.durable < end:  # a close came first, and could not sync
            commit.log.check_writable()
            raise NotRunningError(CLOSED)
        if covered is None:
            return
        last, cuts, retired = covered
        if self.cuts == cuts and last > self._log.synced and self._log.newest is not None:
            self._log.synced = last
        if retired:
            self._remove(retired)

    def sync(self):
        """Makes everything that was appended, truncated and compacted before the call durable.

        One sync of the file serves all calls that overlap. Raises `StorageError` when it fails; the log is poisoned
        then: reads go on, writes raise until the directory is opened again.
        """
        self._sync_to(self._mark())

    def _remove(self, retired):
        """Removes files that are not needed, which is durable. They are tried again when the system refuses."""
        self._turns.begin()  # a close waits for it: one on top of it has to be put off
        try:
            if self.removing.acquire(False):
                try:
                    self.remove_now(retired)
                finally:
                    self.removing.release()
        finally:
            self._turns.end()

    cdef int remove_now(self, list retired) except -1:
        cdef Journal log = self._log
        cdef list going = []
        for segment in retired:
            if segment in log.retired:
                going.append(segment)
        try:
            if log.newest is not None:
                log.remove_files(going)
        except StorageError as error:
            logger.warning("%s: what was compacted takes room until the next sync: %s", log.path, error)
        return 0

    # ---- for the other half ------------------------------------------------------------------------------

    def _files(self):
        """Each segment in use, as it is now: its file's name, its header, where frames end, the last one's checksum."""
        cdef Segment segment
        cdef list found = []
        cdef list segments
        self.require()
        segments = self._log.segments[:]
        for segment in segments:
            found.append((segment.name, segment.head, segment.end, segment.chain))
        return found

    def _counts(self):
        """For statistics, in one step: first, last, its term, last durable; count, bytes, segments, syncs, seconds."""
        cdef Journal log = self._log
        cdef Segment segment
        cdef list segments
        cdef uint64_t first, last, term, durable, size, syncs
        cdef size_t count
        cdef double seconds = 0
        self.require()
        segments = log.segments[:]
        first, last, term, count = log.first, log.last(), log.last_term(), log.count
        durable = min(log.synced, last)
        size = syncs = 0
        for segment in segments:
            size += segment.end
            syncs += segment.sync_count
            seconds += segment.sync_seconds
        return first, last, term, durable, count, size, len(segments), syncs, seconds

    def _is_closed(self):
        return self._log is None or self._log.newest is None

    def _is_poisoned(self):
        return not self._is_closed() and self._log.newest.poisoned is not None

    def _finish(self):
        """In the writer's turn: everything durable, files and lock given back, always."""
        cdef bint held = False
        cdef Journal log = self._log
        try:
            if log.newest.poisoned is None:
                self.commit.sync_up_to(log.newest.end)  # while others may wait for it: what it covers is their answer
        finally:
            try:
                self.commit.close()
                held = self.await_removal()
            finally:
                try:
                    log.close()
                finally:
                    if held:
                        self.removing.release()

    cdef bint await_removal(self) except -1:
        """Takes the lock for removing files, unless a thread holds it that will not go on."""
        while not self.removing.acquire(True, CHECK_SECONDS):
            if sys.is_finalizing():
                return False
        return True

    def _abandon(self):
        """Files and lock are given back, without another write or sync."""
        if self._log is not None:
            self._log.abandon()
