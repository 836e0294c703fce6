"""The journal: a Raft library's own log of entries, with its term and vote, in segments of a directory.

Every step is one frame appended to the newest segment, a removal at either end too: so each takes effect whole or
not at all, in time that does not depend on what is there. A new segment is begun when the front is cut; one whose
entries are all behind the front is removed. Entries stay in the mapped files; memory holds eight bytes for each.
"""

import logging
import os
import re
import threading

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.disk.format cimport LOG_HEADER_SIZE, frame_checksum, frame_length, frame_watermark
from fastsm.journal.format cimport (
    ITEM_BASE, ITEM_COMMIT, ITEM_CUT, ITEM_ENTRY, ITEM_START, ITEM_STATE, ITEM_VOTE,
    item_data, item_index, item_kind, item_size, item_term,
)
from fastsm.journal.entries cimport Entries
from fastsm.journal.segment cimport Segment

from fastsm.disk import format
from fastsm.errors import CorruptionError, NotRunningError, OrderError
from fastsm.disk.files import Directory, left_by_children, make_directory, storage_errors
from fastsm.journal.format import STATE_STRUCT, SegmentState
from fastsm.journal.segment import segment_name

logger = logging.getLogger("fastsm")

NAMES = re.compile(r"journal-([1-9][0-9]*)")
cdef uint64_t LARGEST = format.MAX_INDEX
cdef uint64_t LARGEST_COMMAND = 0xFFFFFFFF
cdef enum:
    SMALL_SEGMENT = 1 << 20      # not worth a new one when the front is cut


cdef class Journal(Entries):
    """Entries `first_index` to `last_index` of a Raft log, the current term, the vote in it, the commit index.

    Opening creates the directory (0700) when needed, locks it, and recovers: what was appended before a kill is
    there; behind a power loss, all that was synced and a prefix of the rest. A torn tail is cut and logged.

    - `durable`: what is appended is synced by the caller before it is promised to anybody, so nothing that a
      segment was continued behind may be torn: that is a `CorruptionError`.

    Raises `LockedError`, `CorruptionError`, `FormatVersionError`, `StorageError`. After a failed sync nothing more is
    written. Thread safety: one thread at a time, but for `prepare` and `remove_retired`, which any other may call
    meanwhile.
    """

    def __init__(self, directory, *, bint durable=False, _files=Directory):
        self.durable = durable
        self.segments = []
        self.retired = []
        self.current_vote = None
        self.creating = threading.Lock()
        with storage_errors(os.fsdecode(directory), "opening the journal"):
            self.directory = make_directory(directory, _files)
            try:
                self.directory.lock()
                self.path = self.directory.path
                self.recover()
            except BaseException:
                self.close_files()
                raise
        _journals.add(self)

    def __repr__(self):
        return f"<{type(self).__name__} {self.path!r}: {self.count} entries from {self.first}>"

    # ---- what is there ---------------------------------------------------------------------------------

    @property
    def term(self):
        """The current term, as `set_vote` was told; 0 at first."""
        return self.current_term

    @property
    def vote(self):
        """Who was voted for in the current term, or None."""
        return self.current_vote

    @property
    def commit_index(self):
        """What `set_commit_index` was told last, at most `last_index`."""
        return self.committed

    @property
    def dirty(self):
        """Whether something was appended that no sync has covered yet."""
        return any(segment.durable < segment.end for segment in self.segments)

    @property
    def synced_index(self):
        """The last entry that a sync has covered, 0 when there is none: it survives a power loss."""
        return min(self.synced, self.last_index)

    @property
    def size(self):
        """Bytes of all segments."""
        return sum(segment.end for segment in self.segments)

    @property
    def newest_size(self):
        """Bytes of the newest segment: about what came since the front was last cut."""
        return self.newest.end

    # ---- append ----------------------------------------------------------------------------------------

    cpdef add(self, bytes command, uint64_t index, uint64_t term):
        """Appends the entry behind the last one. O(size); durable after `sync`.

        Raises `OrderError` for another index or a falling term, `StorageError`; then nothing has changed.
        """
        cdef const uint8_t *frame
        self.check_open()
        if self.count and index != self.first + self.count:
            raise OrderError(f"{self.path}: expected entry {self.first + self.count}, found {index}", index=index)
        if self.count and term < item_term(self.frame_at(self.count - 1)):
            raise OrderError(f"{self.path}: the term of entry {index} falls to {term}", index=index)
        if index > LARGEST or term > LARGEST:
            raise OrderError(f"{self.path}: expected an index and a term of at most {LARGEST}", index=index)
        if <uint64_t>PyBytes_GET_SIZE(command) > LARGEST_COMMAND:
            raise OrderError(f"{self.path}: entry {index} is of more than {LARGEST_COMMAND} bytes", index=index)
        self.reserve()
        frame = self.newest.append(
            ITEM_ENTRY, index, term, <const uint8_t *>PyBytes_AS_STRING(command), PyBytes_GET_SIZE(command))
        if not self.count:
            self.first = index
            self.first_entry = None
        self.push(frame)
        self.last_entry = (command, index, term)

    cdef int note(self, uint32_t kind, uint64_t index, uint64_t term=0, bytes data=b"") except -1:
        """Appends a frame that is no entry."""
        self.check_open()
        self.newest.append(kind, index, term, <const uint8_t *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        return 0

    def cut(self, uint64_t index):
        """Removes the entries from `index` on, in one step. O(segments)."""
        if not self.count or index >= self.first + self.count:
            return
        self.note(ITEM_CUT, index)
        self.forget_from(index)

    cdef int forget_from(self, uint64_t index) except -1:
        cdef Segment segment
        index = max(index, self.first)
        self.drop_from(index)
        self.synced = min(self.synced, index - 1)
        self.committed = min(self.committed, self.last_index)
        self.written_commit = min(self.written_commit, self.committed)
        for segment in self.segments:
            segment.begin = min(segment.begin, index)
        return 0

    def clear(self):
        """Removes all entries, in one step; the next one may have any index."""
        self.cut(0)

    def rebase(self, bytes command, uint64_t index, uint64_t term):
        """Puts one entry in the place of all, in one step: where a snapshot was installed. O(segments)."""
        cdef const uint8_t *frame
        self.check_open()
        self.reserve()
        frame = self.newest.append(
            ITEM_BASE, index, term, <const uint8_t *>PyBytes_AS_STRING(command), PyBytes_GET_SIZE(command))
        self.take_base(frame)
        self.retire()

    cdef int take_base(self, const uint8_t *frame) except -1:
        cdef Segment segment
        self.start_over(item_index(frame))
        self.push(frame)
        self.synced = min(self.synced, self.first - 1)
        self.committed = self.first
        for segment in self.segments:
            segment.begin = self.first
        return 0

    def rotate(self):
        """Begins a new segment when the newest is large, so that files can be given back once the front is cut.

        `prepare` makes the file ahead, in another thread. O(1).
        """
        self.check_open()
        if self.count and self.newest.end >= SMALL_SEGMENT:
            self.begin_segment(self.first)
            self.retire()

    def truncate_before(self, uint64_t index):
        """Removes the entries before `index`, which stays, in one step, as `rotate` with a new segment. O(segments).

        Files that are not needed any more go with `remove_retired`.
        """
        if not self.count or index <= self.first:
            return
        if index >= self.first + self.count:
            raise OrderError(f"{self.path}: cannot remove all entries up to {index}: one must stay", index=index)
        self.check_open()
        if self.newest.end < SMALL_SEGMENT:
            self.note(ITEM_START, index)
            self.drop_before(index)
        else:
            self.begin_segment(index)
        self.retire()

    def set_vote(self, uint64_t term, vote):
        """The current term, and who is voted for in it: a str, or None for nobody yet. Durable after `sync`."""
        self.note(ITEM_VOTE, vote is not None, term, b"" if vote is None else vote.encode())
        self.current_term, self.current_vote = term, vote

    def set_commit_index(self, uint64_t index):
        """Remembers the commit index, in memory; `write_commit_index` appends it."""
        self.committed = min(index, self.last_index)

    def write_commit_index(self):
        """Appends the commit index, if it is new."""
        if self.committed > self.written_commit:
            self.note(ITEM_COMMIT, self.committed)
            self.written_commit = self.committed

    # ---- segments --------------------------------------------------------------------------------------

    def prepare(self):
        """Makes the file of the next segment ahead, durable. For any thread; at most one is ahead."""
        with self.creating:
            if self.spare is None and self.newest is not None:
                self.spare = Segment.create(self.directory, self.newest.head.generation + 1)

    cdef int begin_segment(self, uint64_t first) except -1:
        """Goes on in a new segment, which says that the entries from `first` on are kept."""
        cdef Segment segment
        if self.durable and self.newest is not None:
            self.sync()
        with self.creating:
            segment = self.spare
            if segment is None:
                number = 1 if self.newest is None else self.newest.head.generation + 1
                segment = Segment.create(self.directory, number)
            state = self.state_behind(first)
            try:
                segment.append(
                    ITEM_STATE, first, 0, <const uint8_t *>PyBytes_AS_STRING(state), PyBytes_GET_SIZE(state))
                if self.durable:
                    segment.sync()
            except BaseException as error:
                if segment.end > LOG_HEADER_SIZE and self.newest is not None:
                    self.newest.poison(error)  # it cannot go on: the next segment says already where it ended
                if segment is not self.spare:
                    segment.close()
                raise
            segment.begin = self.first + self.count if self.count else first
            self.segments.append(segment)
            self.newest, self.spare = segment, None
        self.written_commit = self.committed
        self.drop_before(first)
        return 0

    cdef bytes state_behind(self, uint64_t first):
        """What the segments so far came to, for the one that goes on behind them."""
        cdef Segment old = self.newest
        last = self.first + self.count - 1 if self.count else first - 1
        return STATE_STRUCT.pack(*SegmentState(
            first, last, self.current_term, self.current_vote is not None, self.committed,
            0 if old is None else old.end, 0 if old is None else old.durable,
            item_term(self.frame_at(self.count - 1)) if self.count else 0,
            0 if old is None else old.chain,
        )) + (self.current_vote or "").encode()

    cdef int retire(self) except -1:
        """Sets segments aside in which no entry lies any more."""
        cdef Segment second
        while len(self.segments) > 1:
            second = self.segments[1]
            if second.begin > self.first:
                break
            self.retired.append(self.segments.pop(0))
        return 0

    def remove_retired(self):
        """Removes the files of segments that are not needed, when it is durable that they are not. For any thread."""
        if not self.retired or self.newest is None:
            return
        going = list(self.retired)  # what is set aside from here on is replaced by frames that no sync below covers
        for segment in list(self.segments):  # in order: what one goes on from is never torn when it is durable
            segment.sync()
        for segment in going:
            segment.close()
            with storage_errors(segment.path, "removing a segment of the journal"):
                self.directory.unlink(segment.name)
                self.directory.sync_directory()  # one after the other: never is there a gap in their numbers
            if segment in self.retired:  # another thread may have removed it as well
                self.retired.remove(segment)

    # ---- recover ---------------------------------------------------------------------------------------

    def recover(self):
        """Reads as many segments, from the newest back, as hold all that is kept; cuts what is torn, removes the rest.

        So a segment that was set aside, but is still there, plays no part, torn or not.
        """
        self.open_segments()
        start = len(self.segments) - 1
        while start >= 0:
            torn = self.take_segments(start)
            if torn is not None:
                self.end_at(torn)
                start = len(self.segments) - 1
            elif self.declared < self.first:
                start -= 1
            else:
                break
        if not self.segments:
            self.begin_segment(1)
            return
        if start < 0:
            raise CorruptionError(
                self.path, None, f"entries from {self.declared} on", f"entries from {self.first} on: a segment is gone")
        self.end_at(len(self.segments) - 1)
        self.retired = self.segments[:start]
        self.segments = self.segments[start:]
        self.newest = self.segments[-1]
        self.committed = self.written_commit = min(self.committed, self.last_index)
        self.retire()
        self.remove_retired()

    def take_segments(self, start):
        """Takes over what the segments from `start` on say. The position of the one that is to be the last, or None."""
        cdef Segment segment
        self.start_over(0)
        for position in range(start, len(self.segments)):
            segment = self.segments[position]
            self.take_frames(segment, position == start)
            if segment.end == LOG_HEADER_SIZE:
                return position
            if position + 1 < len(self.segments) and not self.continues(segment, self.segments[position + 1]):
                return position
        return None

    def open_segments(self):
        """The segments in order; a missing number between two is damage."""
        cdef list numbers = []
        for name in self.directory.names():
            found = NAMES.fullmatch(name)
            if found is not None:
                numbers.append(int(found[1]))
        numbers.sort()
        for number in numbers:
            if number != numbers[0] + len(self.segments):
                raise CorruptionError(self.directory.path_of(segment_name(number - 1)), None, "a segment", "no file")
            segment = Segment.open(self.directory, number)
            if segment is not None:
                self.segments.append(segment)
            elif number == numbers[-1]:
                self.directory.unlink(segment_name(number))
            else:
                raise CorruptionError(self.directory.path_of(segment_name(number)), 0, "a header", "zeros")

    def take_frames(self, Segment segment, bint is_first):
        """Takes over what the frames of a segment say, up to where they end."""
        cdef uint64_t end = LOG_HEADER_SIZE
        cdef uint64_t watermark = 0
        cdef uint64_t frames = 0
        cdef uint64_t last = 0
        cdef uint64_t chain = segment.known_chain
        cdef const uint8_t *frame = segment.frame_of(end, chain)
        while frame != NULL:
            try:
                sound = self.take_frame(segment, frame, is_first)
            except UnicodeDecodeError:  # the name of the node that was voted for
                sound = False
            if not sound:
                raise CorruptionError(
                    segment.path, end, "a frame that goes on with what is before it",
                    f"one of kind {item_kind(frame)}, index {item_index(frame)}, term {item_term(frame)}")
            watermark = max(watermark, frame_watermark(frame, end))
            frames += 1
            last, chain = end, frame_checksum(frame)
            end += frame_length(frame)
            frame = segment.frame_of(end, chain) if end < segment.allocated else NULL
        segment.found(end, watermark)
        segment.frames, segment.last_frame, segment.chain = frames, last, chain

    def continues(self, Segment segment, Segment following):
        """Whether the next segment was begun where this one ends. `CorruptionError` when that was promised."""
        cdef const uint8_t *frame = following.frame_of(LOG_HEADER_SIZE, following.known_chain)
        if frame == NULL:
            following.look_behind(LOG_HEADER_SIZE)
            return False
        state = SegmentState(*STATE_STRUCT.unpack(item_data(frame)[:STATE_STRUCT.size]))
        if segment.end == state.previous_end:
            if segment.chain != state.previous_checksum:
                raise CorruptionError(
                    segment.path, segment.last_frame,
                    f"the frame of checksum {state.previous_checksum:#018x}, which {following.name} goes on from",
                    "another one: the two segments are of different histories")
            segment.found(segment.end, max(segment.durable, state.previous_durable))
            return True
        if self.durable or not state.previous_durable <= segment.end < state.previous_end:
            raise segment.corrupt(
                segment.end, f"frames up to offset {state.previous_end}, where {following.name} goes on")
        return False

    def end_at(self, position):
        """Makes a segment the newest: what is behind its last frame was torn, and goes."""
        cdef Segment segment = self.segments[position]
        cdef uint64_t torn_end = segment.look_behind(segment.end)
        if segment.end == LOG_HEADER_SIZE:
            if position == 0 and segment.head.generation > 1:  # those before it went when it was durable
                raise CorruptionError(
                    segment.path, LOG_HEADER_SIZE, "a frame that says what the segments before it came to", "none")
            position -= 1  # made ahead, or begun and torn: nobody was promised anything of it
        while len(self.segments) > position + 1:
            left_over = self.segments.pop()
            left_over.close()
            logger.warning("%s: removed, it was not begun, or goes on behind frames that were torn", left_over.path)
            self.directory.unlink(left_over.name)
            self.directory.sync_directory()  # one after the other: never is there a gap in their numbers
        if segment.end > LOG_HEADER_SIZE:
            segment.finish_recovery(segment.end, segment.durable, torn_end)

    cdef bint take_frame(self, Segment segment, const uint8_t *frame, bint is_first) except -1:
        """Takes over one frame; False when it makes no sense behind those before it."""
        cdef uint32_t kind = item_kind(frame)
        cdef uint64_t index = item_index(frame)
        if index > LARGEST or item_term(frame) > LARGEST:
            return False
        if kind == ITEM_STATE:
            return self.take_state(segment, frame, is_first)
        if kind == ITEM_ENTRY:
            return self.take_entry(frame, index)
        if kind == ITEM_BASE:
            self.reserve()
            self.take_base(frame)
            self.declared, self.next_index = index, index + 1
        elif kind == ITEM_CUT:
            return self.take_cut(index)
        elif kind == ITEM_START:
            if index >= self.first + self.count:  # one must stay
                return False
            self.declared = max(self.declared, index)
            self.drop_before(index)
        elif kind == ITEM_VOTE:
            self.current_term = item_term(frame)
            self.current_vote = item_data(frame)[:item_size(frame)].decode() if index else None
        elif kind == ITEM_COMMIT:
            self.committed = index
        return True

    cdef bint take_entry(self, const uint8_t *frame, uint64_t index) except -1:
        if self.next_index and index != self.next_index:
            return False
        if self.count and item_term(frame) < item_term(self.frame_at(self.count - 1)):
            return False
        self.reserve()
        if not self.next_index:
            self.first = self.declared = index
        self.push(frame)
        self.next_index = index + 1
        return True

    cdef bint take_cut(self, uint64_t index) except -1:
        if index > self.first + self.count:
            return False
        if index <= self.declared:
            index = 0
        if index < self.first:      # 0, or among entries whose segment is gone: `declared` tells
            self.forget_from(self.first)
            self.first = index
            if not index:
                self.declared = 0
        else:
            self.forget_from(index)
        self.next_index = index
        return True

    cdef bint take_state(self, Segment segment, const uint8_t *frame, bint is_first) except -1:
        if item_size(frame) < STATE_STRUCT.size:
            return False
        state = SegmentState(*STATE_STRUCT.unpack(item_data(frame)[:STATE_STRUCT.size]))
        if max(state.first, state.last, state.term, state.commit) > LARGEST or state.first > state.last + 1:
            return False
        vote = item_data(frame)[STATE_STRUCT.size:item_size(frame)].decode() if state.voted else None
        if is_first:
            self.first = state.last + 1
            self.next_index = state.last + 1 if state.last >= state.first else 0
            self.current_term, self.current_vote = state.term, vote
        elif (state.last, state.term, vote) != (self.first + self.count - 1, self.current_term, self.current_vote):
            return False
        else:
            self.drop_before(state.first)
        self.declared = state.first
        self.committed = state.commit
        segment.begin = state.last + 1
        return True

    # ---- sync and close --------------------------------------------------------------------------------

    def sync(self):
        """Makes all that was appended before the call durable. On failure nothing more is written to the journal."""
        cdef uint64_t last = self.last_index
        cdef Segment segment
        self.check_open()
        for segment in self.segments:
            if segment.durable < segment.end:
                segment.sync()
        self.synced = last

    cdef int check_open(self) except -1:
        if self.newest is None:
            raise NotRunningError(f"{self.path}: the journal is closed, or a forked child's copy")
        return 0

    def close(self):
        """Makes everything durable and gives files and lock back, always. Idempotent."""
        if self.newest is None:
            return
        try:
            if self.newest.poisoned is None:
                self.remove_retired()
                self.write_commit_index()
                self.sync()
                self.note(ITEM_COMMIT, self.committed)  # it says that all before it was durable
                self.sync()
                self.newest.trim()
        finally:
            self.close_files()

    def abandon(self):
        """Gives files and lock back without another write or sync, as a killed process would. Idempotent."""
        self.close_files()

    cdef int close_files(self) except -1:
        cdef Segment segment
        _old = self.segments, self.retired, self.newest, self.spare  # until all is changed: their end lets threads run
        for segment in self.segments + self.retired + [self.spare]:
            if segment is not None:
                segment.close()
        self.start_over(0)
        self.segments, self.retired = [], []
        self.newest = self.spare = None
        if self.directory is not None:
            self.directory.close()
        return 0


_journals = left_by_children(Journal.abandon)
