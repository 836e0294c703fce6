"""The state as of an entry, held still: what a snapshot writes, and what compaction keeps.

Nothing is copied while the GIL is held, and no other call waits. Records never move, so the state as of entry L
consists of the put records up to L that are not followed, up to L, by another record of their key. The dead map marks
the records that another one has followed by now. The marks due to entries after L are undone: the keys that those
entries wrote are gathered in a private table, and for each key the last record up to L is found among the dead ones.
All other records are decided by a single bit.

    arena   | base … | frames up to L …           | frames after L … |
    pass 1                                        | gather keys       |      only if there are any
    pass 2  | the dead ones among them: revive    |                          only then
    pass 3  | write what is not dead              |

The end of the index is read after the map is copied, so whatever was marked in the meantime comes from a frame that
pass 1 sees. For records in those frames, the copy may lack marks. So pass 2 consults the map itself, which has them
all: otherwise it could revive a record whose successor, also up to L, is not marked in the copy.

A touch is live until a later touch, put or delete of its key. So it is revived if it is the last record of all three
kinds up to L; a put, if it is the last put or delete.
"""

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from fastsm.disk.descriptors cimport pace, write_all
from fastsm.lookup.dead cimport is_marked, unmark
from fastsm.disk.format cimport (
    FRAME_RUNS, LOG_HEADER_SIZE, NO_DEADLINE, RECORD_CLOCK, RECORD_CONFIG, RECORD_DELETE, RECORD_PUT, RECORD_SESSION,
    RECORD_TOUCH, is_of_entry, is_of_session, may_be_live, record_deadline,
    frame_length, frame_run_count, record_index, record_key, record_key_size, record_length,
    record_operation, record_value_size,
)
from fastsm.disk.hashing cimport load64
from fastsm.lookup.index cimport Index
from fastsm.generation.log cimport Log
from fastsm.lookup.table cimport FAILED, Table
from fastsm.lookup.terms cimport Run
from fastsm.disk.walk cimport Walk, next_record, walk_frames
from fastsm.long_work cimport Work

import os

from fastsm.disk.descriptors import pace_writeback, write_at
from fastsm.errors import SnapshotError
from fastsm.types import LogId

cdef enum:
    SLICE = 64 << 20          # bytes of the arena between two checks for signals: about 10 ms
    SMALLEST_PIECE = 256 << 10
    LARGEST_PIECE = 8 << 20   # bytes that are written at a time
    PACED_BEHIND = 64 << 20   # bytes that the disk may still have to write while the checksums are computed
    HELD_FOR = 256 << 20      # bytes of the arena whose map is copied in 0.2 ms, without releasing the GIL


cdef class Capture:
    """What is live as of `last_included`, in the order in which it was written.

    Made under the GIL in O(runs of terms). `find` and `write_records` do the work, without the GIL, concurrently with
    any other use of the machine; they need only what the capture holds. Used by one thread.
    """

    cdef void hold(
        self, Log log, Index index, uint64_t epoch, uint64_t last_index, uint64_t last_term, bint newest
    ) noexcept:
        """Captures the state at this moment. Runs no Python code, so everything is from one state."""
        self.log = log
        self.index = index
        self.epoch = epoch
        self.last_index, self.last_term = last_index, last_term
        self.first = log.start + LOG_HEADER_SIZE
        self.stop = self.next_frame = index.end
        self.newest = newest
        self.config_place = index.config_place
        self.clock, self.clock_place = index.clock, index.clock_place
        self.estimated_size = index.live_bytes

    cdef int name_id(self) except -1:
        """Sets the fields that need Python code: they describe past entries, so they have not changed since `hold`."""
        base = self.log.base
        if base is not None:
            self.base_first, self.base_stop = base.records_offset, base.size
            self.base_config = base.membership_offset
            self.base_clock = base.head.clock
        self.last_included = LogId(self.last_index, self.last_term)
        self.runs = self.index.terms.pack(self.last_index, self.last_term)
        self.membership = b""
        return 0

    def __dealloc__(self):
        free(self.dead)
        free(self.piece)

    def __repr__(self):
        return f"<Capture as of {tuple(self.last_included)}>"

    def find(self, tick):
        """Decides what is live, once. `tick()` is called between slices of the work, and may raise. O(bytes)."""
        if self.dead != NULL:
            return
        if self.stop <= HELD_FOR:
            self.dead = self.index.dead.copy(self.stop)
        else:
            with nogil:
                self.dead = self.index.dead.copy(self.stop)
        if self.dead == NULL:
            raise MemoryError("not enough memory for a copy of the map of dead records")
        self.mapping = self.log.mapping
        if self.mapping is None:
            raise SnapshotError("the state machine was closed in the meantime: open the directory again")
        self.arena = self.mapping.address
        self.end = self.index.end
        self.touched = self.index.touch_place > 0
        if not self.newest:
            with nogil:
                self.find_stop()
        self.touched_after = self.touched and self.index.touch_place >= self.stop
        if self.stop < self.end:
            self.revive(tick)
        if self.config_place:
            self.membership = self.record_bytes(self.config_place)

    cdef bytes record_bytes(self, uint64_t place):
        return (<const char *>self.arena + place)[:record_length(self.arena + place)]

    cdef void find_stop(self) noexcept nogil:
        """Finds the place after the last included record, and where the next frame after it starts."""
        cdef const uint8_t *record
        cdef Walk walk
        self.next_frame = self.first
        while self.next_frame < self.end and self.includes_frame(self.next_frame):
            self.next_frame += frame_length(self.arena + self.next_frame)
        self.stop = self.next_frame
        if self.stop == self.end:
            return
        walk = walk_frames(self.arena, self.stop, self.stop + frame_length(self.arena + self.stop))
        self.next_frame = walk.end
        record = next_record(&walk)
        while record != NULL:
            if is_of_entry(record_operation(record)) and record_index(record) > self.last_index:
                self.stop = record - self.arena
                return
            record = next_record(&walk)
        self.stop = self.next_frame

    cdef bint includes_frame(self, uint64_t place) noexcept nogil:
        cdef const uint8_t *frame = self.arena + place
        cdef uint32_t count = frame_run_count(frame)
        return count == 0 or (<const Run *>(frame + FRAME_RUNS))[count - 1].last <= self.last_index

    # ---- what later entries have hidden ----------------------------------------------------------------

    cdef int revive(self, tick) except -1:
        """Clears marks in the map's copy that are only due to entries after the last included one."""
        cdef Table written = Table()
        cdef Walk later = walk_frames(self.arena, self.next_frame, self.end)
        cdef Walk before = self.walk()
        self.written_sessions = Table()
        self.written_touches = Table()
        later.place, later.stop = self.stop, self.next_frame
        self.config_was_later = self.config_place and record_index(self.arena + self.config_place) > self.last_index
        if self.config_was_later:
            self.config_place = self.base_config
        self.clock_was_later = self.clock_place and record_index(self.arena + self.clock_place) > self.last_index
        if self.clock_was_later:
            self.clock = self.base_clock
        self.pass_over(&later, written, True, tick)
        self.pass_over(&before, written, False, tick)
        self.unmark_all(written, False)
        self.unmark_all(self.written_sessions, False)
        self.unmark_all(self.written_touches, True)
        return 0

    cdef int unmark_all(self, Table written, bint touches) except -1:
        """Clears the marks of the places in `written` up to the last included entry: touches or other records."""
        cdef uint64_t *places = <uint64_t *>malloc((written.count + 1) * sizeof(uint64_t))
        cdef uint64_t i
        if places == NULL:
            raise MemoryError(f"not enough memory to look at {written.count} keys that later entries wrote")
        with nogil:
            written.gather(places)
            for i in range(written.count):
                if places[i] >= self.stop or not may_be_live(record_operation(self.arena + places[i])):
                    continue
                if (record_operation(self.arena + places[i]) == RECORD_TOUCH) == touches:
                    unmark(self.dead, places[i])
            free(places)
        return 0

    cdef int pass_over(self, Walk *walk, Table written, bint gather, tick) except -1:
        cdef Work work = tick if isinstance(tick, Work) else Work(tick)
        cdef int failed = 0
        cdef bint more = True
        while more and not failed:
            with nogil:
                more = self.pass_over_slice(walk, written, gather, &failed)
                while more and not failed and work.goes_on(0):
                    more = self.pass_over_slice(walk, written, gather, &failed)
            work()
        if failed:
            raise MemoryError("not enough memory for a table of the keys that later entries wrote")
        return 0

    cdef bint pass_over_slice(self, Walk *walk, Table written, bint gather, int *failed) noexcept nogil:
        """Passes over a slice; returns whether there is more. `gather`: adds each key; otherwise updates known keys."""
        cdef uint64_t pause = walk.place + SLICE
        cdef const uint8_t *record
        cdef uint64_t place
        cdef int operation
        cdef bint dead, done
        while walk.place < pause:
            record = next_record(walk)
            if record == NULL:
                return False
            place = record - self.arena
            operation = record_operation(record)
            if operation == RECORD_CONFIG and self.config_was_later and not gather:
                self.config_place = place
            if operation == RECORD_CLOCK and self.clock_was_later and not gather:
                self.clock = load64(record_key(record))
            if RECORD_DELETE < operation < RECORD_SESSION or operation == RECORD_CLOCK:
                continue
            dead = gather or not may_be_live(operation) or self.index.dead.is_dead(place)
            if is_of_session(operation):
                done = not dead or self.note(self.written_sessions, record, place, gather)
            else:
                done = operation == RECORD_TOUCH or not dead or self.note(written, record, place, gather)
                # If a touch was hidden by another touch, its key's put is not dead, but follows older touches.
                if done and self.touched and (dead or (self.touched_after and operation == RECORD_PUT)):
                    done = self.note(self.written_touches, record, place, gather)
            if not done:
                failed[0] = 1
                return False
        return True

    cdef bint note(self, Table written, const uint8_t *record, uint64_t place, bint gather) noexcept nogil:
        """Adds or updates a record in `written` (see `pass_over_slice`); returns False if there is no memory."""
        cdef const uint8_t *key = record_key(record)
        cdef uint64_t hashed = written.hash(key, record_key_size(record))
        if not gather and written.find(self.arena, hashed, key, record_key_size(record)) == 0:
            return True
        return written.put(self.arena, hashed, key, record_key_size(record), place) != FAILED

    cdef Walk walk(self) noexcept nogil:
        """Returns a walk over all records up to the last included entry."""
        cdef Walk walk = walk_frames(self.arena, self.first, self.stop)
        if self.base_stop:
            walk.place, walk.stop = self.base_first, self.base_stop
        return walk

    # ---- read, for tools -------------------------------------------------------------------------------

    def records(self):
        """Yields the live keys as (index, key, value), in the order in which `write_records` writes them."""
        return (
            (index, key, value) for operation, index, key, value, _ in self.all_records() if operation == RECORD_PUT)

    def all_records(self):
        """Yields live records of all kinds: operation, index, key, value, deadline; in the order of `write_records`."""
        cdef Walk walk = self.walk()
        cdef const uint8_t *record = next_record(&walk)
        cdef const char *key
        while record != NULL:
            if may_be_live(record_operation(record)) and not is_marked(self.dead, record - self.arena):
                key = <const char *>record_key(record)
                yield (
                    record_operation(record), record_index(record), key[:record_key_size(record)],
                    key[record_key_size(record):record_key_size(record) + record_value_size(record)],
                    None if record_deadline(record) == NO_DEADLINE else record_deadline(record))
            record = next_record(&walk)

    # ---- write -----------------------------------------------------------------------------------------

    def write_records(self, directory, descriptor, uint64_t offset, tick):
        """Writes the live records to a file, starting at `offset`; returns the numbers of keys and bytes.

        Also counts `sessions`. O(bytes of the arena). `tick`: a `Work`, or a function that is called with the bytes so
        far between pieces. All but the last bytes are handed to the disk at its own pace.
        """
        cdef Walk walk = self.walk()
        cdef uint64_t room = min(max(<uint64_t>SMALLEST_PIECE, self.estimated_size / 8), <uint64_t>LARGEST_PIECE)
        cdef Work work = tick if isinstance(tick, Work) else Work(tick)
        cdef uint64_t filled
        free(self.piece)
        self.piece = <uint8_t *>malloc(room)
        if self.piece == NULL:
            raise MemoryError(f"not enough memory for pieces of {room} bytes")
        self.keys = self.left = self.sessions = self.size = 0
        self.done = False
        if directory.write is write_at and directory.pace_writeback is pace_writeback:
            self.write_pieces(&walk, room, descriptor.number, offset, work)
        else:  # a custom directory class gets each piece
            while not self.done:
                with nogil:
                    filled = self.fill(&walk, room, walk.place + SLICE)
                if filled:
                    piece = PyMemoryView_FromMemory(<char *>self.piece, filled, PyBUF_READ)
                    directory.write(descriptor, piece, offset + self.size)
                    self.size += filled
                work(self.size)
        free(self.piece)
        self.piece = NULL
        return self.keys, self.size

    cdef int write_pieces(self, Walk *walk, uint64_t room, int descriptor, uint64_t offset, Work work) except -1:
        """Fills and writes pieces one after another, without the GIL as long as the work goes on."""
        cdef int failure = 0
        while not self.done:
            with nogil:
                failure = self.write_piece(walk, room, descriptor, offset)
                while not (failure or self.done) and work.goes_on(self.size):
                    failure = self.write_piece(walk, room, descriptor, offset)
            if failure:
                raise OSError(failure, os.strerror(failure))
            work(self.size)
        return 0

    cdef int write_piece(self, Walk *walk, uint64_t room, int descriptor, uint64_t offset) noexcept nogil:
        """Fills and writes one piece; returns 0, or the system's error."""
        cdef uint64_t filled = self.fill(walk, room, walk.place + SLICE)
        cdef uint64_t stop
        cdef int failure = 0
        if filled:
            failure = write_all(descriptor, self.piece, filled, offset + self.size)
            self.size += filled
        stop = offset + self.size
        if not failure and stop > self.paced + PACED_BEHIND:
            failure = pace(descriptor, self.paced, stop - PACED_BEHIND)
            self.paced = stop - PACED_BEHIND
        return failure

    cdef uint64_t fill(self, Walk *walk, uint64_t room, uint64_t pause) noexcept nogil:
        """Copies live records until `room` bytes are filled, or the place `pause` or the end (`done`) is reached."""
        cdef uint64_t filled = 0
        cdef uint64_t part
        cdef const uint8_t *record
        while True:
            if self.left:
                part = min(self.left, room - filled)
                memcpy(self.piece + filled, self.source, part)
                self.source += part
                self.left -= part
                filled += part
                if self.left:
                    return filled  # the piece is full
            if walk.place > pause:
                return filled
            record = next_record(walk)
            if record == NULL:
                self.done = True
                return filled
            if may_be_live(record_operation(record)) and not is_marked(self.dead, record - self.arena):
                self.source = record
                self.left = record_length(record)
                self.keys += record_operation(record) == RECORD_PUT
                self.sessions += record_operation(record) == RECORD_SESSION
