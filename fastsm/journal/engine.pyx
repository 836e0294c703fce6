"""The compiled half of `RaftLog`: one writer at a time, concurrent with reads and syncs.

Compiled, because signal handlers run between any two steps of Python code, and must not run between a decision and what
depends on it. Appended bytes never change or move, so a read takes the places of its entries in one step and copies
them afterwards, whatever happens to the log in the meantime.
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
    """Entries to append, held so that no code that runs later can change or free them."""

    def __cinit__(self, entries):
        cdef tuple held = hold_entries(entries)
        cdef Py_ssize_t i
        cdef Item *item
        self.held = held
        self.copies = []
        self.items = <Item *>malloc(max(1, len(held)) * sizeof(Item))
        if self.items == NULL:
            raise MemoryError(f"not enough memory for {len(held)} entries")
        for i in range(len(held)):
            entry = held[i]
            # The items of the tuple itself, even if a subclass overrides access: only those are kept alive.
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
                    f"entry {item.index} has {item.size} bytes: expected at most {LARGEST_SIZE}", index=item.index)
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
        """Takes over a recovered log; returns whether its end was clean, frames, bytes, torn bytes, suspect bytes.

        A vote that no known sync has covered is synced here, because the caller may act on it again. So is a
        border that no known sync has covered, unless an entry after it is known to be durable; otherwise it would be
        unknown what survives a power loss. A log opened for tools is not synced; then nothing counts as durable.
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
        """The first kept entry, or the next one if there is none: 1 at first, i + 1 after `compact((i, t))`."""
        self.require()
        return self._log.first

    @property
    def last_index(self):
        """The last entry; in an empty log, the index after which it begins (0 at first)."""
        self.require()
        return self._log.last()

    @property
    def last_term(self):
        """The term of the last entry; in an empty log, of the entry after which it begins (0 at first)."""
        self.require()
        return self._log.last_term()

    @property
    def durable_index(self):
        """The last entry that would survive a power loss now.

        It falls only with a truncation, or when `compact` drops entries of another history.
        """
        self.require()
        return min(self._log.synced, self._log.last())

    def term(self, index, /):
        """Returns the term of an entry, or None if the log does not have it.

        The log has the terms of its entries, and of the entry after which it begins: the last compacted one, or at
        first index 0, of term 0. So the entry before any entry of the log has a known term. O(1).
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
        """Returns the existing entries from `first` to `last`, both included, as a list of `Entry`.

        `max_bytes`: only as many entries as have commands of at most this size in total, but at least one. Raises
        `CompactedError` if `first` is before `first_index`; its `oldest` is the first entry that can be read. All
        entries are from one moment of the log, which other threads may change meanwhile. O(what is returned).
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
                raise ValueError(f"max_bytes {limit}: expected None, or 0 or more")
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
        """Returns `(term, voted_for)` as last saved and durable; `(0, None)` at first."""
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
        that never fall. Entries that the log has already, with the same term, are skipped, without comparing their
        commands. An `OrderError`, whose `index` names the entry, is raised for an entry that the log has with another
        term, a gap after `last_index`, a term below `last_term`, or an index below `first_index`: a follower truncates
        first. A command is bytes-like.

        Raises `CommandError` for a command of more than 2**32 - 1 bytes, and `StorageError`; then nothing has changed.
        After a crash, a prefix of what was not synced may remain.
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
        """Checks a batch; returns how many of its entries the log has already."""
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
                    f"{log.path}: entry {item.index} of term {item.term} exists with term {term}: "
                    f"truncate_after({item.index - 1}) first", index=item.index)
            known += 1
        if known < batch.count:
            item = &batch.items[known]
            if item.index != last + 1 or item.index < log.first:
                raise OrderError(
                    f"{log.path}: expected entry {last + 1}, found {item.index}: entries must be consecutive",
                    index=item.index)
            if item.term < log.last_term():
                raise OrderError(
                    f"{log.path}: entry {item.index} of term {item.term} after {LogId(last, log.last_term())}: "
                    "terms never fall", index=item.index)
        return known

    def truncate_after(self, index):
        """Removes the entries after `index`; does nothing if there are none. O(segments), durable after `sync`.

        `index` may be the one after which the log begins: then no entries are left. Below that: `OrderError`.
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
        """Drops the entries up to `up_to`, a `LogId`, which a snapshot contains. O(segments), durable after `sync`.

        If the log does not have that very entry (a snapshot was installed), all entries are dropped, and the log begins
        after it. Does nothing if entries up to there were compacted already; a term below that of the last compacted
        entry is an `OrderError`. Reads see the change immediately. Files of segments that are no longer needed are
        removed by a later `sync`.
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
                    f"{log.path}: cannot compact up to {LogId(place, term)}, since the log begins after "
                    f"{LogId(log.first - 1, log.border_term)}: terms never fall", index=place)
            if place <= log.last() and item_term(log.frame_at(place - log.first)) == term:
                log.remove_up_to(place)
                return
            before = log.last()
            log.begin_after(place, term)
            if place <= before:  # of another term: what was durable after it belongs to another history
                log.synced = min(log.synced, place - 1)
                self.cuts += 1
        finally:
            self._turns.leave()

    def save_hard_state(self, term, voted_for=None):
        """Saves the current term, and who got this node's vote in it (bytes or None); durable on return.

        `voted_for`: at most 65,535 bytes, else a `ValueError`: each new segment of the log begins with a copy of it.
        The term never falls, and a vote cannot be changed within its term: anything else is an `OrderError`. If this
        raises `StorageError` because the disk is full, nothing has changed.
        """
        cdef Journal log = self._log
        cdef uint64_t number = number_of(term, "term")
        cdef bytes vote = None if voted_for is None else bytes_of(voted_for, "voted_for")
        if vote is not None and len(vote) > LARGEST_VOTE:
            raise ValueError(f"voted_for has {len(vote)} bytes: expected at most {LARGEST_VOTE}, the name of a node")
        self.require()
        self._turns.enter()
        try:
            self.require()
            if number < log.current_term:
                raise OrderError(f"{log.path}: the current term cannot fall from {log.current_term} to {number}")
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
                return  # everything before the newest segment is durable
        finally:
            self._turns.leave()
        self._sync_to((commit, (0, end), covered))

    cdef int rotate_if_full(self) except -1:
        """Begins a new segment, in the writer's turn, if the newest is large, so that files can be removed later."""
        cdef Journal log = self._log
        cdef GroupCommit commit
        if log.newest.end < self.segment_bytes:
            return 0
        self.commit.sync_up_to(log.newest.end)
        commit = GroupCommit(log.newest, self._turns)  # made first: once the new segment counts, nothing may fail
        log.go_on(log.first, log.border_term)
        if log.newest is not None:  # otherwise this is a forked child
            commit.log = log.newest
            self.commit = commit
        return 0

    # ---- sync ------------------------------------------------------------------------------------------

    def _mark(self):
        """Returns, as of one moment, what a sync must reach, and which entries that makes durable."""
        cdef Journal log = self._log
        cdef uint64_t end, last
        self.require()
        end, last = log.newest.end, log.last()
        return self.commit, (log.newest.head.generation, end), (last, self.cuts, log.retired[:])

    def _sync_to(self, mark):
        """Makes durable what was in the log when the mark was taken."""
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

        Overlapping calls share one sync of the file. If it fails, raises `StorageError`, and the log is poisoned: reads
        still work, writes raise until the directory is opened again.
        """
        self._sync_to(self._mark())

    def _remove(self, retired):
        """Removes files that are durably unneeded. If the system refuses, a later sync tries again."""
        self._turns.begin()  # a close waits for this, so one on top of it must be put off
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
        """Returns each segment in use: its file's name, its header, the end of its frames, the last one's checksum."""
        cdef Segment segment
        cdef list found = []
        cdef list segments
        self.require()
        segments = self._log.segments[:]
        for segment in segments:
            found.append((segment.name, segment.head, segment.end, segment.chain))
        return found

    def _counts(self):
        """Returns, as of one moment: first, last, its term, last durable; count, bytes, segments, syncs, seconds."""
        cdef Journal log = self._log
        cdef Segment segment
        cdef list segments
        cdef uint64_t first, last, term, durable, size, syncs
        cdef size_t count
        cdef double seconds
        self.require()
        segments = log.segments[:]
        first, last, term, count = log.first, log.last(), log.last_term(), log.count
        durable = min(log.synced, last)
        size, syncs, seconds = 0, log.retired_syncs, log.retired_seconds
        for segment in segments:
            size += segment.end
            syncs += segment.sync_count
            seconds += segment.sync_seconds
        return first, last, term, durable, count, size, len(segments), syncs, seconds

    def _is_closed(self):
        return self._log is None or self._log.newest is None

    def _is_poisoned(self):
        return not self._is_closed() and self._log.newest.failed

    def _finish(self):
        """Makes everything durable, in the writer's turn; releases files and lock even if that fails."""
        cdef bint held = False
        cdef Journal log = self._log
        try:
            if not log.newest.failed:
                self.commit.sync_up_to(log.newest.end)  # before closing, since other callers may wait for this sync
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
        """Takes the lock for removing files, unless its holder no longer runs."""
        while not self.removing.acquire(True, CHECK_SECONDS):
            if sys.is_finalizing():
                return False
        return True

    def _abandon(self):
        """Releases files and lock, without another write or sync."""
        if self._log is not None:
            self._log.abandon()
