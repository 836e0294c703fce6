"""The segments of a Raft log: how they come and go, and what the steps of a log do to the entries in memory.

A separate file, NEWEST, names the newest segment that was made, and is durable before that segment is used. So a
directory that lost its last segment, or all of them, is distinguished from a log that never had them. The loss of the
first segment, or of one in the middle, shows in the numbers and in what segments record about earlier ones.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint64_t

from fastsm.disk.format cimport LOG_HEADER_SIZE
from fastsm.journal.entries cimport Entries
from fastsm.journal.format cimport ITEM_STATE, Item, item_index, item_term
from fastsm.journal.segment cimport Segment

from fastsm.disk.files import storage_errors
from fastsm.errors import NotRunningError
from fastsm.generation.names import NEWEST
from fastsm.journal.format import STATE_STRUCT, Newest, SegmentState, pack_newest


cdef class Segments(Entries):
    """Entries in the files of a directory, with a term, a vote and a commit index. For one thread at a time."""

    # ---- segments come and go --------------------------------------------------------------------------

    def make_spare(self):
        """Makes the file of the next segment in advance, durably. For any thread; at most one is made in advance."""
        with self.creating:
            if self.spare is None:
                number = 1 if self.newest is None else self.newest.head.generation + 1
                self.spare = Segment.create(self.directory, number)
            if self.newest is not None and self.named.number < self.spare.head.generation:
                self.name_newest(self.spare, 0)

    def name_newest(self, segment, given_up):
        """Records which segment is the newest; durable on return."""
        named = Newest(segment.head.generation, segment.head.identity, given_up)
        with storage_errors(self.directory.path_of(NEWEST), "naming the newest segment of the log"):
            self.directory.replace_file(NEWEST, pack_newest(named))
        self.named = named

    cdef int begin_segment(self, uint64_t first, uint64_t border_term) except -1:
        """Continues in a new segment, which records that the entries from `first` on are kept."""
        cdef Segment old = self.newest
        cdef Segment segment
        cdef list following
        cdef bytes state
        cdef Item item
        self.make_spare()
        segment = self.spare
        self.require_newest(old)
        following = self.segments + [segment]  # made first: once the frame below is written, nothing may fail
        state = self.state_before(first, border_term)
        item = Item(first, 0, <const uint8_t *>PyBytes_AS_STRING(state), PyBytes_GET_SIZE(state), ITEM_STATE)
        try:
            segment.append(&item, 1)
            if self.durable or self.named is None:
                segment.sync()
            if self.named is None:
                self.name_newest(segment, 0)
        except BaseException as error:
            if segment.end > LOG_HEADER_SIZE and old is not None:
                old.poison(error)  # it must not grow: the next segment has recorded where it ended
            raise
        self.require_newest(old)
        segment.begin = self.first + self.count if self.first + self.count > first else first
        self.segments = following
        self.newest, self.spare = segment, None
        if old is not None and old.durable == old.end and not old.syncing:
            old.rest()
        self.written_commit = self.committed
        self.drop_before(first)
        self.border_term = border_term
        self.retire()
        return 0

    cdef int require_newest(self, Segment segment) except -1:
        """Raises if the step continues in a forked child, which has left the log meanwhile."""
        if self.newest is not segment:
            raise NotRunningError(f"{self.path}: this log was forked in the middle of a step: it belongs to the parent")
        return 0

    cdef bytes state_before(self, uint64_t first, uint64_t border_term):
        """Returns the summary of all segments so far, with which the next one starts."""
        cdef Segment old = self.newest
        last = max(self.last(), first - 1)
        return STATE_STRUCT.pack(*SegmentState(
            first, last, self.current_term, self.current_vote is not None, self.committed,
            0 if old is None else old.end, 0 if old is None else old.durable,
            self.last_term() if last >= first else border_term,
            0 if old is None else old.chain, border_term,
        )) + (self.current_vote or b"")

    cdef uint64_t last_term(self) noexcept:
        """Returns the term of the last entry, or of the one before the first."""
        return item_term(self.frame_at(self.count - 1)) if self.count else self.border_term

    cdef int retire(self) except -1:
        """Sets aside segments in which there are no entries any more."""
        cdef Segment second
        cdef list retired
        cdef Py_ssize_t position
        cdef Py_ssize_t count = 0
        while count + 1 < len(self.segments):
            second = self.segments[count + 1]
            if second.begin > self.first:
                break
            count += 1
        if count:
            retired = self.retired + self.segments[:count]
            for position in range(count):
                second = self.segments[position]
                self.retired_syncs += second.sync_count
                self.retired_seconds += second.sync_seconds
            del self.segments[:count]
            self.retired = retired  # all at once: if memory fails, no segment is missing from both lists
        return 0

    def remove_files(self, going):
        """Removes the files of segments set aside, after it was made durable that they are not needed."""
        for segment in going:
            with storage_errors(segment.path, "removing a segment of the log"):
                segment.close()
                self.directory.unlink(segment.name)
                self.directory.sync_directory()  # one at a time, so that their numbers never have a gap
            if segment in self.retired:  # another thread may have removed it too
                self.retired.remove(segment)

    # ---- steps, now or read back ------------------------------------------------------------------------

    cdef int forget_from(self, uint64_t index) except -1:
        """Drops the entries from `index` on."""
        cdef Segment segment
        self.drop_from(index)
        self.synced = min(self.synced, index - 1)
        self.committed = min(self.committed, index - 1)
        self.written_commit = min(self.written_commit, self.committed)
        for segment in self.segments:
            segment.begin = min(segment.begin, index)
        return 0

    cdef int start_after(self, uint64_t index, uint64_t term) except -1:
        """Drops all entries; the next one comes after `index` of `term`."""
        cdef Segment segment
        self.start_over(index + 1)
        self.border_term = term
        self.declared = index + 1
        self.committed = min(self.committed, index)
        self.written_commit = min(self.written_commit, self.committed)
        for segment in self.segments:
            segment.begin = index + 1
        return 0

    cdef int take_base(self, const uint8_t *frame) except -1:
        self.start_after(item_index(frame) - 1, item_term(frame))
        self.synced = min(self.synced, self.first - 1)
        self.push(frame)
        self.committed = self.first
        return 0
