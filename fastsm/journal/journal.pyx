"""A Raft log in a directory: its entries, term and vote, in segments that are cut at both ends.

Each step appends one frame to the newest segment, even a removal at either end: so it takes effect completely or not at
all, in time that does not depend on the log's size. Segments without kept entries are set aside, and their files are
removed once a sync has made that durable. Entries stay in the mapped files; memory has eight bytes for each.
"""

import logging
import os
import threading

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.disk.format cimport frame_length
from fastsm.journal.format cimport (
    ITEM_BASE, ITEM_BORDER, ITEM_COMMIT, ITEM_CUT, ITEM_START, ITEM_VOTE, Item, item_term,
)
from fastsm.journal.recovery cimport RecoveredSegments
from fastsm.journal.segment cimport Segment

from fastsm.disk import format
from fastsm.disk.files import NO_ROOM, Directory, make_directory, storage_errors
from fastsm.disk.forks import left_by_children
from fastsm.errors import NotRunningError, ReentryError, StorageError

logger = logging.getLogger("fastsm")

LARGEST_INDEX = format.MAX_INDEX
LARGEST_COMMAND = 0xFFFFFFFF


cdef object close_one(one, error):
    """Closes an object that may be None; returns the first error so far."""
    try:
        if one is not None:
            one.close()
    except BaseException as refused:
        return refused if error is None else error
    return error


cdef class Journal(RecoveredSegments):
    """What a Raft log consists of: the entries after a border, the current term, the vote in it, a commit index.

    Opening creates the directory (0700) if needed, locks it, and recovers the log: after a kill, everything that was
    appended; after a power loss, everything that was synced, and a prefix of the rest. A torn tail is cut and logged.

    - `durable`: the caller syncs what it appends before promising it to anyone, so no frames after which a later
      segment was begun can be torn: a torn one is a `CorruptionError`.
    - `read_only`: for tools. Takes no lock, writes nothing, and is safe next to a running owner; shows the log as of
      the call. If no log was begun in the directory, `is_begun` is False.

    Raises `LockedError`, `CorruptionError`, `FormatVersionError`, `StorageError`. After a failed sync nothing more is
    written. Thread safety: one thread at a time may change it, except that `prepare` and `remove_retired` may be called
    by another thread meanwhile. In a signal handler or a finalizer in the middle of a step, calls are refused, except
    `close`, which is put off until the end of the step. What was read stays unchanged as long as it is held.
    """

    def __init__(
        self, directory, *, bint durable=False, double lock_timeout=0, bint read_only=False, _files=Directory
    ):
        self.durable = durable
        self.read_only = read_only
        self.retired = []
        self.current_vote = None
        self.creating = threading.Lock()
        with storage_errors(os.fsdecode(directory), "opening the log"):
            self.directory = _files(directory, create=False) if read_only else make_directory(directory, _files)
            try:
                if not read_only:
                    self.directory.lock(lock_timeout)
                self.path = self.directory.path
                self.recover()
                if self.retired and not read_only:
                    self.remove_retired()
            except BaseException:
                self.close_files()
                raise
        _journals.add(self)

    def __repr__(self):
        return f"<{type(self).__name__} {self.path!r}: {self.count} entries from {self.first}>"

    # ---- properties ------------------------------------------------------------------------------------

    @property
    def commit_index(self):
        """The value last passed to `set_commit_index`, or the last index if that is lower."""
        return self.committed

    @property
    def is_begun(self):
        """Whether there is a segment: a directory opened with `read_only` may not have one yet."""
        return self.newest is not None

    @property
    def dirty(self):
        """Whether something was appended that no sync has covered yet."""
        return any(segment.durable < segment.end for segment in self.segments)

    @property
    def size(self):
        """The size of all segments, in bytes."""
        return sum(segment.end for segment in self.segments)

    @property
    def newest_size(self):
        """The size of the newest segment, in bytes."""
        return self.newest.end

    # ---- steps -----------------------------------------------------------------------------------------

    cdef int check_open(self) except -1:
        if self.newest is None:
            raise NotRunningError(f"{self.path}: the log is closed, or a forked child's copy")
        return 0

    cdef int begin_step(self) except -1:
        self.check_open()
        if self.busy:
            raise ReentryError(
                f"{self.path}: this log is in the middle of a step, below this signal handler or finalizer, or in "
                "another thread. Nothing was changed; try again after that step")
        self.busy = True
        return 0

    cdef int end_step(self) except -1:
        self.busy = False
        if self.closes:
            self.closes = False
            self.close()
        return 0

    cdef int append_entries(self, const Item *items, size_t count) except -1:
        """Appends checked entries: all of them, or none on an error; after a crash, a prefix may remain."""
        cdef Segment newest = self.newest  # held: a forked child that continues here has dropped it
        cdef const uint8_t *frame
        cdef size_t _i
        self.begin_step()
        try:
            self.reserve(count)
            frame = newest.append(items, count)
            self.require_newest(newest)
            for _i in range(count):
                self.push(frame)
                frame += frame_length(frame)
        finally:
            self.end_step()
        return 0

    cdef const uint8_t *note(self, uint32_t kind, uint64_t index, uint64_t term=0, bytes data=b"") except NULL:
        """Appends, within a step, a frame that is not an entry."""
        cdef Segment newest = self.newest
        cdef Item item = Item(index, term, <const uint8_t *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), kind)
        cdef const uint8_t *frame = newest.append(&item, 1)
        self.require_newest(newest)
        return frame

    cdef int remove_from(self, uint64_t index) except -1:
        """Removes the entries from `index` on, which may be the first one. O(segments)."""
        self.begin_step()
        try:
            self.note(ITEM_CUT, index)
            self.forget_from(index)
        finally:
            self.end_step()
        return 0

    cdef int remove_up_to(self, uint64_t index) except -1:
        """Removes the entries up to `index`, which must exist; none may be left. O(segments)."""
        cdef uint64_t term = item_term(self.frame_at(index - self.first))
        self.begin_step()
        try:
            self.note(ITEM_START, index, term)
            self.drop_before(index + 1)
            self.declared, self.border_term = index + 1, term
            self.retire()
        finally:
            self.end_step()
        return 0

    cdef int begin_after(self, uint64_t index, uint64_t term) except -1:
        """Removes all entries: the next one comes after `index` of `term`. O(segments)."""
        self.begin_step()
        try:
            self.note(ITEM_BORDER, index, term)
            self.start_after(index, term)
            self.retire()
        finally:
            self.end_step()
        return 0

    cdef int replace_all(self, uint64_t index, uint64_t term, bytes command) except -1:
        """Replaces all entries with one. O(segments)."""
        self.begin_step()
        try:
            self.reserve(1)
            self.take_base(self.note(ITEM_BASE, index, term, command))
            self.retire()
        finally:
            self.end_step()
        return 0

    cdef int go_on(self, uint64_t first, uint64_t border_term) except -1:
        """Continues in a new segment, keeping entries from `first` on. `prepare` makes the file in advance.

        O(segments); with `durable`, what no sync covers yet is synced first.
        """
        self.begin_step()
        try:
            if self.durable:
                self.sync()
            self.begin_segment(first, border_term)
            self.declared = first
        finally:
            self.end_step()
        return 0

    cdef int note_vote(self, uint64_t term, bytes vote) except -1:
        """Appends the current term, and the vote in it; None: no vote yet."""
        self.begin_step()
        try:
            self.note(ITEM_VOTE, vote is not None, term, b"" if vote is None else vote)
            self.current_term, self.current_vote = term, vote
        finally:
            self.end_step()
        return 0

    cdef int note_commit(self) except -1:
        """Appends the commit index, even if it is not new: the frame says that everything before it was durable."""
        self.begin_step()
        try:
            self.note(ITEM_COMMIT, self.committed)
            self.written_commit = self.committed
        finally:
            self.end_step()
        return 0

    def set_commit_index(self, uint64_t index):
        """Sets the commit index, in memory only; `write_commit_index` appends it."""
        self.committed = min(index, self.last())

    def write_commit_index(self):
        """Appends the commit index, if it is new."""
        if self.committed > self.written_commit:
            self.note_commit()

    # ---- files -----------------------------------------------------------------------------------------

    def prepare(self):
        """Makes the file of the next segment in advance, durably. For any thread."""
        if self.newest is not None:
            self.make_spare()

    def remove_retired(self):
        """Removes files of unneeded segments, after making it durable that they are unneeded. For any thread."""
        if not self.retired or self.newest is None:
            return
        going = self.retired[:]  # segments set aside later depend on frames that the sync below does not cover
        self.sync_segments()
        self.remove_files(going)

    # ---- sync and close --------------------------------------------------------------------------------

    def sync(self):
        """Makes everything appended before the call durable. If that fails, nothing more is written to the log."""
        cdef uint64_t last = self.last()
        self.check_open()
        self.sync_segments()
        self.synced = min(last, self.last())

    cdef int sync_segments(self) except -1:
        """Syncs in order: if a segment is durable, so is everything before it."""
        cdef Segment segment
        for segment in self.segments[:]:
            if segment.durable < segment.end:
                segment.wake()
                segment.sync()
        return 0

    def close(self):
        """Makes everything durable, then releases files and lock, even if that fails. Idempotent."""
        if self.newest is None:
            return
        if self.busy:
            self.closes = True  # this is a signal handler or a finalizer in the middle of a step, which ends first
            return
        try:
            if not self.newest.failed and not self.read_only:
                self.remove_retired()
                self.sync()
                self.end_cleanly()
        finally:
            self.close_files()

    cdef int end_cleanly(self) except -1:
        """Appends a last frame, which says that everything before it was durable."""
        try:
            self.note_commit()
            self.sync()
            self.newest.trim()
        except StorageError as error:
            if error.errno not in NO_ROOM:
                raise
            logger.warning("%s: closed without a final frame, so the next opening takes longer: %s", self.path, error)
        return 0

    def abandon(self):
        """Releases files and lock without another write or sync, as if the process were killed. Idempotent."""
        self.close_files()

    cdef int close_files(self) except -1:
        """Releases everything, even if the system fails to close a file: that is raised at the end."""
        cdef Segment segment
        cdef Segment spare = self.spare
        cdef list segments = self.segments
        cdef list retired = self.retired
        error = None
        self.start_over(1)
        self.newest = self.spare = None  # first: closing lets other threads run
        for going in (segments, retired):
            for segment in going:
                error = close_one(segment, error)
        error = close_one(spare, error)
        error = close_one(self.directory, error)
        segments.clear()
        retired.clear()
        if isinstance(error, OSError):
            raise StorageError.wrap(error, self.path or "", "closing the files of the log") from error
        if error is not None:
            raise error
        return 0


_journals = left_by_children(Journal.abandon)
