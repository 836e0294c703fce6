"""A Raft log in a directory: its entries, term and vote, in segments that are cut at both ends.

Every step is one frame appended to the newest segment, a removal at either end too: so each takes effect whole or
not at all, in time that does not depend on what is there. Segments without entries that are kept are set aside, and
their files removed once a sync has made that durable. Entries stay in the mapped files; memory holds eight bytes each.
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
from fastsm.journal.segment cimport Segment
from fastsm.journal.segments cimport Segments

from fastsm.disk import format
from fastsm.disk.files import NO_ROOM, Directory, left_by_children, make_directory, storage_errors
from fastsm.errors import NotRunningError, ReentryError, StorageError

logger = logging.getLogger("fastsm")

LARGEST_INDEX = format.MAX_INDEX
LARGEST_COMMAND = 0xFFFFFFFF


cdef object close_one(one, error):
    """Closes it, if it is there; returns the first error so far."""
    try:
        if one is not None:
            one.close()
    except BaseException as refused:
        return refused if error is None else error
    return error


cdef class Journal(Segments):
    """The entries after a border, the current term, the vote in it, a commit index: what a Raft log is made of.

    Opening creates the directory (0700) when needed, locks it, and recovers: what was appended before a kill is
    there; after a power loss, all that was synced and a prefix of the rest. A torn tail is cut and logged.

    - `durable`: what is appended is synced by the caller before it is promised to anybody, so nothing that a
      segment was continued after may be torn: that is a `CorruptionError`.
    - `read_only`: for tools. No lock, nothing written, safe next to a living owner; shows the log at the time of the
      call. A directory in which no log was begun has no segment.

    Raises `LockedError`, `CorruptionError`, `FormatVersionError`, `StorageError`. After a failed sync nothing more is
    written. Thread safety: one thread at a time changes it, but for `prepare` and `remove_retired`, which any other may
    call meanwhile. A signal handler or a finalizer that comes amid a step is refused, but for `close`, which is put off
    until that step is over. What was read is unchanged for as long as it is held.
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

    # ---- what is there ---------------------------------------------------------------------------------

    @property
    def commit_index(self):
        """What `set_commit_index` was told last, never above the last entry."""
        return self.committed

    @property
    def is_begun(self):
        """Whether there is a segment: a directory opened with `read_only` may have none yet."""
        return self.newest is not None

    @property
    def dirty(self):
        """Whether something was appended that no sync has covered yet."""
        return any(segment.durable < segment.end for segment in self.segments)

    @property
    def size(self):
        """Bytes of all segments."""
        return sum(segment.end for segment in self.segments)

    @property
    def newest_size(self):
        """Bytes of the newest segment."""
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
                f"{self.path}: a step of this log is under way, below this signal handler or finalizer, or in another "
                "thread. Nothing was changed; do it after that step")
        self.busy = True
        return 0

    cdef int end_step(self) except -1:
        self.busy = False
        if self.closes:
            self.closes = False
            self.close()
        return 0

    cdef int append_entries(self, const Item *items, size_t count) except -1:
        """Appends entries that were checked: all of them, or none on an error; a prefix after a crash."""
        cdef Segment newest = self.newest  # held: a forked child that goes on here has dropped it
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
        """Appends a frame that is no entry, within a step."""
        cdef Segment newest = self.newest
        cdef Item item = Item(index, term, <const uint8_t *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), kind)
        cdef const uint8_t *frame = newest.append(&item, 1)
        self.require_newest(newest)
        return frame

    cdef int remove_from(self, uint64_t index) except -1:
        """Removes the entries from `index` on, the first one or a later one. O(segments)."""
        self.begin_step()
        try:
            self.note(ITEM_CUT, index)
            self.forget_from(index)
        finally:
            self.end_step()
        return 0

    cdef int remove_up_to(self, uint64_t index) except -1:
        """Removes the entries up to `index`, which is there; all of them may go. O(segments)."""
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
        """Removes all entries: the next one comes after `index`, of `term`. O(segments)."""
        self.begin_step()
        try:
            self.note(ITEM_BORDER, index, term)
            self.start_after(index, term)
            self.retire()
        finally:
            self.end_step()
        return 0

    cdef int replace_all(self, uint64_t index, uint64_t term, bytes command) except -1:
        """Puts one entry in the place of all. O(segments)."""
        self.begin_step()
        try:
            self.reserve(1)
            self.take_base(self.note(ITEM_BASE, index, term, command))
            self.retire()
        finally:
            self.end_step()
        return 0

    cdef int go_on(self, uint64_t first, uint64_t border_term) except -1:
        """Goes on in a new segment, with the entries from `first` on. `prepare` makes the file ahead. O(1)."""
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
        """The current term, and who is voted for in it; None: nobody yet."""
        self.begin_step()
        try:
            self.note(ITEM_VOTE, vote is not None, term, b"" if vote is None else vote)
            self.current_term, self.current_vote = term, vote
        finally:
            self.end_step()
        return 0

    cdef int note_commit(self) except -1:
        """The commit index, also where it is not new: the frame says that all before it was durable."""
        self.begin_step()
        try:
            self.note(ITEM_COMMIT, self.committed)
            self.written_commit = self.committed
        finally:
            self.end_step()
        return 0

    def set_commit_index(self, uint64_t index):
        """Remembers the commit index, in memory; `write_commit_index` appends it."""
        self.committed = min(index, self.last())

    def write_commit_index(self):
        """Appends the commit index, if it is new."""
        if self.committed > self.written_commit:
            self.note_commit()

    # ---- files -----------------------------------------------------------------------------------------

    def prepare(self):
        """Makes the file of the next segment ahead, durable. For any thread."""
        if self.newest is not None:
            self.make_spare()

    def remove_retired(self):
        """Removes the files of segments that are not needed, when it is durable that they are not. For any thread."""
        if not self.retired or self.newest is None:
            return
        going = self.retired[:]  # what is set aside from here on is replaced by frames that no sync below covers
        self.sync_segments()
        self.remove_files(going)

    # ---- sync and close --------------------------------------------------------------------------------

    def sync(self):
        """Makes all that was appended before the call durable. On failure nothing more is written to the log."""
        cdef uint64_t last = self.last()
        self.check_open()
        self.sync_segments()
        self.synced = min(last, self.last())

    cdef int sync_segments(self) except -1:
        """In order: what a segment goes on from is never torn when it is durable."""
        cdef Segment segment
        for segment in self.segments[:]:
            if segment.durable < segment.end:
                segment.wake()
                segment.sync()
        return 0

    def close(self):
        """Makes everything durable and gives files and lock back, always. Idempotent."""
        if self.newest is None:
            return
        if self.busy:
            self.closes = True  # a signal handler or a finalizer, amid a step: the step goes on first
            return
        try:
            if self.newest.poisoned is None and not self.read_only:
                self.remove_retired()
                self.sync()
                self.end_cleanly()
        finally:
            self.close_files()

    cdef int end_cleanly(self) except -1:
        """Appends a last frame, which says that all before it was durable."""
        try:
            self.note_commit()
            self.sync()
            self.newest.trim()
        except StorageError as error:
            if error.errno not in NO_ROOM:
                raise
            logger.warning("%s: closed without a final frame, the next opening takes longer: %s", self.path, error)
        return 0

    def abandon(self):
        """Gives files and lock back without another write or sync, as a killed process would. Idempotent."""
        self.close_files()

    cdef int close_files(self) except -1:
        """Gives everything back, also where the system refuses to close a file: that is raised at the end."""
        cdef Segment segment
        cdef Segment spare = self.spare
        cdef list segments = self.segments
        cdef list retired = self.retired
        error = None
        self.start_over(1)
        self.newest = self.spare = None  # before anything is given back: that lets other threads run
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
