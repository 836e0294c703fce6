"""Recovery of a Raft log: its segments are read back, from the newest to the one with the first kept entry.

A torn tail is cut, and segments are removed that were never begun, or that continue what was torn. NEWEST, the numbers
of the segments, and the first frame of each of them show what was promised; if it is gone, that is a `CorruptionError`.
"""

import logging
import os

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.disk.format cimport (
    LARGE, LOG_HEADER_SIZE, VALID, frame_checksum, frame_length, frame_watermark, look_at_frame,
)
from fastsm.journal.format cimport (
    ITEM_BASE, ITEM_BORDER, ITEM_COMMIT, ITEM_CUT, ITEM_ENTRY, ITEM_START, ITEM_STATE, ITEM_VOTE,
    item_data, item_index, item_kind, item_length, item_size, item_term, look_at_item,
)
from fastsm.journal.segment cimport Segment
from fastsm.journal.segments cimport Segments

from fastsm.disk import format
from fastsm.disk.files import storage_errors
from fastsm.disk.torn_tail import data_ranges
from fastsm.errors import CorruptionError
from fastsm.generation.names import LOG_NAMES, NEWEST, holds_state
from fastsm.journal.format import NEWEST_BYTES, STATE_STRUCT, SegmentState, unpack_newest
from fastsm.journal.segment import segment_name

logger = logging.getLogger("fastsm")

LOST = "a file of this directory is gone: restore all of it from a replica"
cdef uint64_t LARGEST = format.MAX_INDEX

cdef enum:
    SLICE = 16 << 20         # bytes between two checks for signals: a few milliseconds


cdef inline void step_over(Walk *walk, const uint8_t *frame) noexcept nogil:
    walk.watermark = max(walk.watermark, frame_watermark(frame, walk.end))
    walk.frames += 1
    walk.last_frame, walk.chain = walk.end, frame_checksum(frame)
    walk.end += frame_length(frame)


cdef class RecoveredSegments(Segments):
    """Segments that are read back from the files of a directory."""

    def recover(self):
        """Reads segments backwards from the newest until all kept entries are found; cuts what is torn.

        So a segment that was set aside, but still exists, is not read, torn or not.
        """
        self.open_segments()
        if not self.segments:
            self.start_over(1)
            if not self.read_only:
                self.begin_segment(1, 0)
            return
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
        if start < 0:
            raise CorruptionError(
                self.path, None, f"entries from {self.declared} on", f"entries from {self.first} on: a segment is gone")
        self.end_at(len(self.segments) - 1)
        self.retired = self.segments[:start]
        self.segments = self.segments[start:]
        self.newest = self.segments[-1]
        self.committed = self.written_commit = min(self.committed, self.last())
        self.note_durable_entries()
        self.retire()

    def open_segments(self):
        """Opens the segments in order; a missing one is damage, unless it was never used."""
        cdef list numbers = []
        cdef Segment segment
        # Read before the listing: an owner makes a segment before it names it
        content = self.directory.read_file(NEWEST, NEWEST_BYTES + 1)
        if content is not None and not self.read_only:
            with storage_errors(self.directory.path, "making the names in the directory durable"):
                self.directory.sync_directory()  # the process that renamed NEWEST may have died before this sync
        for name in self.directory.names():
            found = LOG_NAMES.fullmatch(name)
            if found is not None:
                numbers.append(int(found[1]))
        numbers.sort()
        if content is None:
            self.refuse_unnamed(numbers)
            return
        path = self.directory.path_of(NEWEST)
        self.named = unpack_newest(content, path)
        while numbers and numbers[-1] > self.named.number:
            self.remove_unnamed(numbers.pop())  # or ignores it
        if not numbers or numbers[-1] != self.named.number:
            raise CorruptionError(
                self.directory.path_of(segment_name(self.named.number)), None,
                "the segment that NEWEST names as the newest", "no file", LOST)
        for number in numbers:
            if number != numbers[0] + len(self.segments):
                raise CorruptionError(
                    self.directory.path_of(segment_name(number - 1)), None, "a segment", "no file", LOST)
            segment = Segment.open(self.directory, number, self.read_only)
            if segment is None:
                raise CorruptionError(self.directory.path_of(segment_name(number)), 0, "a header", "zeros")
            self.segments.append(segment)
            if number != numbers[-1]:
                segment.rest()
        if self.segments[-1].head.identity != self.named.identity:
            raise CorruptionError(
                path, 24, f"the identity of {segment_name(self.named.number)}", "that of another log")

    def refuse_unnamed(self, numbers):
        """Raises, if there is no NEWEST, unless the creation of the log was cut short: nothing in it was promised."""
        cdef uint64_t used = LOG_HEADER_SIZE + item_length(STATE_STRUCT.size)
        if not numbers and holds_state(self.directory):
            raise CorruptionError(
                self.directory.path, None, "a directory of a Raft log, or an empty one", "the files of a state machine",
                "give log and state a directory each")
        if numbers and (numbers != [1] or not self.is_blank(1, used)):
            raise CorruptionError(
                self.directory.path_of(NEWEST), None, "the name of the newest segment", "no file", LOST)

    def remove_unnamed(self, number):
        """Removes a segment after the one that NEWEST names: made but not used, or given up according to NEWEST."""
        if self.read_only and self.directory.owner() is not None:
            return
        if number > self.named.given_up and not self.is_blank(number, LOG_HEADER_SIZE):
            raise CorruptionError(
                self.directory.path_of(NEWEST), 16, f"segment {number} or a later one, since that one is in use",
                f"segment {self.named.number}")
        if self.read_only:
            return
        self.directory.unlink(segment_name(number))
        self.directory.sync_directory()

    def is_blank(self, number, start):
        """Returns whether a segment's file has only zeros from an offset on."""
        name = segment_name(number)
        with storage_errors(self.directory.path_of(name), "reading a segment of the log"):
            descriptor = self.directory.open_file(name)
            try:
                size = self.directory.size(descriptor)
                return start >= size or not any(
                    os.pread(descriptor, min(stop, offset + (1 << 20)) - offset, offset).strip(b"\0")
                    for begin, stop in data_ranges(descriptor, start, size)
                    for offset in range(begin, stop, 1 << 20))
            finally:
                self.directory.close_file(descriptor)

    def take_segments(self, start):
        """Takes over the segments from `start` on.

        Returns the position of the segment that has to become the last one, or None if that is the last one already.
        """
        cdef Segment segment
        self.start_over(1)
        for position in range(start, len(self.segments)):
            segment = self.segments[position]
            self.take_frames(segment, position == start)
            if segment.end == LOG_HEADER_SIZE:
                return position
            if position + 1 < len(self.segments) and not self.continues(segment, self.segments[position + 1]):
                return position
        return None

    def take_frames(self, Segment segment, bint is_first):
        """Takes over the frames of a segment, up to their end. Long runs of entries are read without the GIL."""
        cdef Walk walk = Walk(LOG_HEADER_SIZE, segment.known_chain, 0, 0, 0)
        cdef const uint8_t *frame = segment.frame_of(walk.end, walk.chain)
        cdef uint64_t pause = LARGE
        while frame != NULL:
            if not self.take_frame(segment, frame, is_first):
                raise CorruptionError(
                    segment.path, walk.end, "a frame that continues the ones before it",
                    f"one of kind {item_kind(frame)}, index {item_index(frame)}, term {item_term(frame)}")
            step_over(&walk, frame)
            self.take_entries(segment, &walk, pause)
            if walk.end >= pause:
                with nogil:
                    self.take_entries(segment, &walk, pause + SLICE)
                PyErr_CheckSignals()
                pause = walk.end + LARGE
            frame = segment.frame_of(walk.end, walk.chain) if walk.end < segment.allocated else NULL
        segment.found(walk.end, walk.watermark)
        segment.frames, segment.last_frame, segment.chain = walk.frames, walk.last_frame, walk.chain

    cdef void take_entries(self, Segment segment, Walk *walk, uint64_t stop) noexcept nogil:
        """Takes over consecutive entries as `take_frame` does, up to `stop` or to a frame that needs `take_frame`."""
        cdef const uint8_t *frame
        cdef uint64_t term, available
        if not self.count:
            return
        term = item_term(self.frame_at(self.count - 1))
        while walk.end < stop and walk.end < segment.allocated and self.head + self.count < self.room:
            frame = segment.address + walk.end
            available = segment.allocated - walk.end
            if (
                look_at_frame(frame, available, segment.identity, walk.end, walk.chain) != VALID
                or look_at_item(frame, available) != VALID or item_kind(frame) != ITEM_ENTRY
                or item_index(frame) != self.first + self.count or item_index(frame) > LARGEST
                or not term <= item_term(frame) <= LARGEST
            ):
                return
            term = item_term(frame)
            self.push(frame)
            step_over(walk, frame)

    def continues(self, Segment segment, Segment following):
        """Returns whether the next segment was begun where this one ends; if not, frames of this one are lost.

        `CorruptionError` if these were durable, or if the two segments belong to different histories.
        """
        cdef const uint8_t *frame = following.frame_of(LOG_HEADER_SIZE, following.known_chain)
        if frame == NULL:
            following.end_of_torn_tail(LOG_HEADER_SIZE)
            return False
        if item_size(frame) < STATE_STRUCT.size:
            raise following.corrupt(LOG_HEADER_SIZE, "a frame that summarizes earlier segments")
        state = SegmentState(*STATE_STRUCT.unpack(item_data(frame)[:STATE_STRUCT.size]))
        if segment.end == state.previous_end:
            if segment.chain != state.previous_checksum:
                raise CorruptionError(
                    segment.path, segment.last_frame,
                    f"the frame of checksum {state.previous_checksum:#018x}, which {following.name} continues",
                    "another one: the two segments belong to different histories")
            segment.found(segment.end, max(segment.durable, state.previous_durable))
            return True
        if self.durable or not state.previous_durable <= segment.end < state.previous_end:
            raise segment.corrupt(
                segment.end, f"frames up to offset {state.previous_end}, where {following.name} continues")
        return False

    def end_at(self, position):
        """Makes a segment the newest: what follows its last frame is torn, and is removed."""
        cdef Segment segment = self.segments[position]
        cdef uint64_t torn_end
        segment.wake()
        torn_end = segment.end_of_torn_tail(segment.end)
        if segment.end == LOG_HEADER_SIZE:
            # Earlier segments were removed only once this one was durable; the first one is durable before it is named
            if position == 0:
                raise CorruptionError(
                    segment.path, LOG_HEADER_SIZE, "a frame that summarizes earlier segments", "none")
            position -= 1  # made in advance, or begun and torn: nothing in it was promised
        if self.read_only:
            if segment.end > LOG_HEADER_SIZE:
                self.torn_bytes += torn_end - segment.end
            while len(self.segments) > position + 1:
                self.segments.pop().close()
            return
        if self.segments[position].head.generation != self.named.number:
            # Before the later ones are removed, so that none seems missing
            self.name_newest(self.segments[position], self.named.number)
        while len(self.segments) > position + 1:
            left_over = self.segments.pop()
            left_over.close()
            logger.info("%s: removed, since it was not begun, or continues frames that were torn", left_over.path)
            self.directory.unlink(left_over.name)
            self.directory.sync_directory()  # one at a time, so that their numbers never have a gap
        if segment.end > LOG_HEADER_SIZE:
            self.torn_bytes += torn_end - segment.end
            segment.finish_recovery(segment.end, segment.durable, torn_end)

    cdef int note_durable_entries(self) except -1:
        """Finds the last entry that was synced, as far as frames tell; unknown without `durable`, except to tools.

        O(log entries): the entries of the newest segment are in order.
        """
        cdef Segment newest = self.newest
        cdef uint64_t low, high, middle
        cdef const uint8_t *frame
        if not self.durable and not self.read_only:
            return 0
        low, high = max(newest.begin, self.first), self.last() + 1
        while low < high:
            middle = low + (high - low) // 2
            frame = self.frame_at(middle - self.first)
            if <uint64_t>(frame - newest.address) + frame_length(frame) <= newest.durable:
                low = middle + 1
            else:
                high = middle
        self.synced = low - 1
        return 0

    cdef bint is_in_doubt(self, const uint8_t *frame) noexcept:
        """Returns whether, after recovery, a frame is in the newest segment, and no known sync has covered it."""
        return frame != NULL and <uint64_t>(frame - self.newest.address) >= self.newest.durable

    # ---- the effect of one frame: False if it cannot follow those before it ----------------------------------

    cdef bint is_vote(self, bytes vote) except -1:
        """Returns whether this can be the name of a node, or None for no vote."""
        return True

    cdef bint take_frame(self, Segment segment, const uint8_t *frame, bint is_first) except -1:
        cdef uint32_t kind = item_kind(frame)
        cdef uint64_t index = item_index(frame)
        cdef uint64_t term = item_term(frame)
        if index > LARGEST or term > LARGEST:
            return False
        if kind == ITEM_STATE:
            return self.take_state(segment, frame, is_first)
        if kind == ITEM_ENTRY:
            return self.take_entry(frame, index)
        if kind == ITEM_START or kind == ITEM_BASE or kind == ITEM_BORDER:
            self.border_frame = frame
        if kind == ITEM_START:
            return self.take_start(index, term)
        if kind == ITEM_BASE:
            if index == 0:
                return False
            self.reserve(1)
            self.take_base(frame)
        elif kind == ITEM_BORDER:
            self.start_after(index, term)
        elif kind == ITEM_CUT:
            if not self.declared <= index <= self.last() + 1:
                return False
            if index < self.first:      # the cut reaches into earlier segments
                self.forget_from(self.first)
                self.first, self.least_term = index, 0
            self.forget_from(index)
        elif kind == ITEM_VOTE:
            self.current_term, self.vote_frame = term, frame
            self.current_vote = item_data(frame)[:item_size(frame)] if index else None
            return self.is_vote(self.current_vote)
        elif kind == ITEM_COMMIT:
            self.committed = index
        return True

    cdef bint take_entry(self, const uint8_t *frame, uint64_t index) except -1:
        cdef uint64_t least
        if index != self.last() + 1:
            return False
        if self.count:
            least = item_term(self.frame_at(self.count - 1))
        else:
            least = self.border_term if self.first == self.declared else self.least_term
        if item_term(frame) < least:
            return False
        self.reserve(1)
        self.push(frame)
        return True

    cdef bint take_start(self, uint64_t index, uint64_t term) except -1:
        if not self.declared <= index <= self.last():
            return False
        if index >= self.first:
            if item_term(self.frame_at(index - self.first)) != term:
                return False
            self.drop_before(index + 1)
        self.declared, self.border_term = index + 1, term
        return True

    cdef bint take_state(self, Segment segment, const uint8_t *frame, bint is_first) except -1:
        if item_size(frame) < STATE_STRUCT.size:
            return False
        state = SegmentState(*STATE_STRUCT.unpack(item_data(frame)[:STATE_STRUCT.size]))
        if max(state.last, state.term, state.commit, state.border_term, state.last_term) > LARGEST:
            return False
        if not 1 <= state.first <= state.last + 1:
            return False
        vote = item_data(frame)[STATE_STRUCT.size:item_size(frame)] if state.voted else None
        if not self.is_vote(vote):
            return False
        if is_first:
            self.first = state.last + 1
            self.current_term, self.current_vote = state.term, vote
        elif (state.last, state.term, vote) != (self.last(), self.current_term, self.current_vote):
            return False
        elif state.first < self.declared:
            return False
        else:
            self.drop_before(state.first)
        if not self.count:  # otherwise it is the term of an entry after `first`, which a cut may still remove
            self.least_term = state.last_term
        self.declared, self.border_term = state.first, state.border_term
        self.vote_frame = self.border_frame = NULL
        self.committed = state.commit
        segment.begin = state.last + 1
        return True
