"""The index of an arena, determined by the records in it.

    table       from a key to the place of its newest record; further tables for sessions, and for touched keys
    deadlines   which key, and which session, is due next
    dead        which records are not the newest of their key
    terms       from an entry to its term
    order       the keys in their order, once a read has needed it

`apply` updates the index record by record. Opening, compacting and installing a snapshot build a new index from base
and log, next to the one in use.
"""

import os

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fastsm.disk.format cimport (
    NO_DEADLINE, RECORD_CLOCK, RECORD_CONFIG, RECORD_DELETE, RECORD_FORGET, RECORD_KEY, RECORD_PUT, RECORD_SESSION,
    RECORD_SNAPSHOT, RECORD_TIMED, RECORD_TOUCH, VALID, is_of_entry, may_be_live,
    frame_length, look_at_record, record_deadline, record_index, record_key, record_key_size, record_length,
    record_operation, record_value_size, session_deadline,
)
from fastsm.disk.hashing cimport load64
from fastsm.disk.mapping cimport Mapping
from fastsm.long_work cimport Work
from fastsm.lookup.deadlines cimport CHILDREN
from fastsm.lookup.table cimport FAILED, place_of
from fastsm.disk.walk cimport next_record, walk_frames

from fastsm.errors import CorruptionError
from fastsm.disk.files import storage_errors
from fastsm.long_work import no_tick, run_long
from fastsm.types import LogId, SnapshotMetadata

cdef enum:
    SLICE = 4 << 20           # bytes between two checks whether to go on: a few milliseconds
    RUNS_PIECE = 24 << 15     # bytes of runs that are read at a time

cdef enum:  # results of `take`
    TAKEN = 0
    PAUSED = 1
    NO_MEMORY = 2

cdef enum:
    FEW_STALE = 64            # fewer stale deadlines are not worth a filtering
    OPERATIONS = RECORD_CLOCK + 2  # the number of operations, and one more for invalid ones


cdef class Index:
    """The tables, dead map, terms and counts of an arena.

    Thread safety: none of its own. One thread fills it; afterwards all calls are made under the GIL.
    """

    def __cinit__(self, Table table=None, Terms terms=None):
        self.table = Table() if table is None else table
        self.sessions = Table()
        self.touches = Table()
        self.deadlines = Deadlines()
        self.session_deadlines = Deadlines(True)
        self.terms = Terms() if terms is None else terms
        self.dead = DeadMap()
        self.dead.reserve(1)

    def __repr__(self):
        return f"<Index of {self.table.count} keys, {self.live_bytes} bytes live>"

    def read_base(self, Mapping mapping, base):
        """Takes a base's terms, membership and records, and checks that all lengths are within the base.

        `CorruptionError` if any of them is malformed. O(keys), without the GIL.
        """
        cdef uint64_t found[OPERATIONS]
        memset(found, 0, sizeof(found))
        for offset in range(base.runs_offset, base.records_offset, RUNS_PIECE):  # a sparse file could claim very many
            size = min(RUNS_PIECE, base.records_offset - offset)
            with storage_errors(base.path, "reading the base"):
                runs = os.pread(base.descriptor, size, offset)
            if len(runs) < size or not self.terms.unpack(runs):
                raise CorruptionError(base.path, base.runs_offset, "runs of terms in ascending order", "other bytes")
        if (self.terms.seen, self.terms.last_term()) != base.last_included:
            raise CorruptionError(
                base.path, base.runs_offset, f"runs up to {base.last_included}",
                LogId(self.terms.seen, self.terms.last_term()))
        self.dead.reserve(base.size)
        self.read_membership(mapping, base)
        bad = check_records(mapping, base.records_offset, base.size, self.terms, found)
        if bad:
            raise CorruptionError(
                base.path, bad, "a record of a key or a session, of an included entry, in order", "something else")
        self.clock = base.head.clock
        self.take_all(walk_base(mapping.address, base.records_offset, base.size))
        if self.table.count != base.head.keys:
            raise CorruptionError(base.path, None, f"{base.head.keys} keys", f"{self.table.count}")
        if self.sessions.count != base.head.sessions:
            raise CorruptionError(base.path, None, f"{base.head.sessions} sessions", f"{self.sessions.count}")
        self.base_touches = found[RECORD_TOUCH]
        for what, count, records in (
            ("key", self.table.count, found[RECORD_PUT]), ("session", self.sessions.count, found[RECORD_SESSION]),
            ("key touched after it was put", self.touches.count, found[RECORD_TOUCH]),
        ):
            if count != records:
                raise CorruptionError(base.path, None, f"one record for each {what}", f"{records} for {count}")

    cdef int read_membership(self, Mapping mapping, base) except -1:
        cdef uint64_t place = base.membership_offset
        cdef uint64_t size = base.head.membership_size
        cdef uint64_t term
        cdef const uint8_t *record = mapping.address + place
        if place == 0:
            return 0
        if (
            size < RECORD_KEY or record_length(record) != size or look_at_record(record, size) != VALID
            or record_operation(record) != RECORD_CONFIG or not self.terms.find(record_index(record), &term)
        ):
            raise CorruptionError(base.path, place, "a config record of an included entry", "something else")
        self.config_place = place
        return 0

    def read_log(self, Mapping mapping, uint64_t start, uint64_t end, bint with_terms=False):
        """Takes the records, and optionally the terms, of the frames in [start, end) of the mapped log. O(records).

        The frames must have been checked. Without the GIL.
        """
        cdef const uint8_t *log = mapping.address + mapping.start
        cdef uint64_t offset = start
        with nogil:
            while with_terms and offset < end:
                self.terms.take_frame(log + offset)
                offset += frame_length(log + offset)
        self.dead.reserve(mapping.start + end)
        self.take_all(walk_frames(mapping.address, mapping.start + start, mapping.start + end))
        self.end = mapping.start + end

    cdef int take_all(self, Walk walk) except -1:
        cdef Taking taking = Taking(self)
        taking.walk = walk
        run_long(taking, no_tick, walk.end - walk.place)
        if self.metadata_place:
            self.metadata = read_metadata(walk.arena + self.metadata_place)
            self.metadata_place = 0
        return 0

    cdef int take(self, Walk *walk, uint64_t pause) noexcept nogil:
        """Takes records up to the end of the walk, or up to the place `pause`."""
        cdef const uint8_t *records[BLOCK]
        cdef const uint8_t *record
        cdef uint32_t gathered = 0
        while walk.place < pause:
            record = next_record(walk)
            if record == NULL:
                break
            if record_operation(record) == RECORD_SNAPSHOT:
                self.metadata_place = record - walk.arena
            elif is_of_entry(record_operation(record)):
                records[gathered] = record
                gathered += 1
                if gathered == BLOCK:
                    if self.take_block(walk.arena, records, gathered) < 0:
                        return NO_MEMORY
                    gathered = 0
        else:
            return NO_MEMORY if self.take_block(walk.arena, records, gathered) < 0 else PAUSED
        return NO_MEMORY if self.take_block(walk.arena, records, gathered) < 0 else TAKEN

    cdef int take_block(self, const uint8_t *arena, const uint8_t **records, uint32_t count) noexcept nogil:
        """Takes a block of records, with overlapping cache misses; returns -1 if there is no memory."""
        cdef uint64_t hashes[BLOCK]
        cdef uint64_t rebuilds = self.table.rebuilds + self.sessions.rebuilds
        cdef uint32_t i
        cdef int failed = 0
        for i in range(count):
            hashes[i] = self.hash_of(records[i])
            self.table.prefetch_slot(hashes[i])
        for i in range(count):
            self.expect(arena, hashes[i])
        for i in range(count):
            if self.table.rebuilds + self.sessions.rebuilds != rebuilds:
                hashes[i] = self.hash_of(records[i])
            failed |= self.set_place(arena, record_operation(records[i]), hashes[i], records[i] - arena)
        return failed

    cdef int set_place(
        self, const uint8_t *arena, int operation, uint64_t hashed, uint64_t place
    ) noexcept nogil:
        """Adds the record at `place` to tables, dead map and counts; returns -1 if a table gets no memory."""
        cdef const uint8_t *record = arena + place
        cdef uint64_t old = 0
        if operation == RECORD_PUT:
            old = self.table.put(arena, hashed, record_key(record), record_key_size(record), place)
            if old == FAILED:
                return -1
            self.live_bytes += record_length(record)
        elif operation == RECORD_DELETE:
            old = self.table.remove(arena, hashed, record_key(record), record_key_size(record))
        elif operation == RECORD_CONFIG:
            self.config_place = place
        elif operation == RECORD_SESSION:
            old = self.sessions.put(arena, hashed, record_key(record), record_key_size(record), place)
            if old == FAILED:
                return -1
            self.live_bytes += record_length(record)
        elif operation == RECORD_FORGET:
            old = self.sessions.remove(arena, hashed, record_key(record), record_key_size(record))
        elif operation == RECORD_TOUCH:
            return self.note_touch(arena, hashed, place)
        elif operation == RECORD_CLOCK:
            self.clock = load64(record_key(record))
            self.clock_place = place
        if old:
            self.live_bytes -= record_length(arena + old)
            self.dead.mark(old)
        if operation <= RECORD_DELETE:
            if (self.timed or record[RECORD_TIMED]) and self.note_put(arena, record, place, old) < 0:
                return -1
        elif operation == RECORD_SESSION or operation == RECORD_FORGET:
            if self.note_session(arena, record, old) < 0:
                return -1
        if self.ordered and operation < RECORD_SESSION:
            return self.order.note(arena, operation, hashed, place, old)
        return 0

    # ---- deadlines -------------------------------------------------------------------------------------

    cdef int note_put(
        self, const uint8_t *arena, const uint8_t *record, uint64_t place, uint64_t old
    ) noexcept nogil:
        """Updates deadlines for a put or a delete; `old`: the key's previous put. Returns -1 if there is no memory."""
        if old:
            self.end_touch(arena, record, old)
        if record[RECORD_TIMED] and self.deadlines.push(arena, record_deadline(record), place) < 0:
            return -1
        self.drop_many_stale(arena, self.deadlines)
        self.timed = self.deadlines.count or self.touches.count
        return 0

    cdef void end_touch(self, const uint8_t *arena, const uint8_t *record, uint64_t old) noexcept nogil:
        """Ends the deadline of a record's key, whether set by the put `old` or by a later touch."""
        cdef uint64_t touch = 0
        if self.touches.count:
            touch = self.touches.remove(
                arena, self.touches.hash(record_key(record), record_key_size(record)), record_key(record),
                record_key_size(record))
        if touch:
            self.live_bytes -= record_length(arena + touch)
            self.dead.mark(touch)
            old = touch
        self.deadlines.stale += arena[old + RECORD_TIMED] != 0

    cdef int note_touch(self, const uint8_t *arena, uint64_t hashed, uint64_t place) noexcept nogil:
        """Takes the touch of an existing key; our logs contain no others. Returns -1 if there is no memory."""
        cdef const uint8_t *record = arena + place
        cdef const uint8_t *key = record_key(record)
        cdef uint64_t put = self.table.find(arena, hashed, key, record_key_size(record))
        cdef uint64_t old
        self.touch_place = place
        if put == 0:
            self.dead.mark(place)
            return 0
        old = self.touches.put(
            arena, self.touches.hash(key, record_key_size(record)), key, record_key_size(record), place)
        if old == FAILED:
            return -1
        self.live_bytes += record_length(record)
        if old:
            self.live_bytes -= record_length(arena + old)
            self.dead.mark(old)
        self.deadlines.stale += arena[(old if old else put) + RECORD_TIMED] != 0
        self.timed = True
        if record[RECORD_TIMED] and self.deadlines.push(arena, record_deadline(record), place) < 0:
            return -1
        self.drop_many_stale(arena, self.deadlines)
        return 0

    cdef int note_session(self, const uint8_t *arena, const uint8_t *record, uint64_t old) noexcept nogil:
        """Updates deadlines for a session's record; `old`: the previous one. Returns -1 if there is no memory."""
        cdef uint64_t deadline = NO_DEADLINE
        if old and session_deadline(arena + old) != NO_DEADLINE:
            self.session_deadlines.stale += 1
        if record_operation(record) == RECORD_SESSION:
            deadline = session_deadline(record)
        if deadline != NO_DEADLINE and self.session_deadlines.push(arena, deadline, record - arena) < 0:
            return -1
        self.drop_many_stale(arena, self.session_deadlines)
        return 0

    cdef bint counts(self, const uint8_t *arena, uint64_t place) noexcept nogil:
        """Returns whether the record at a place still determines the deadline of its key or session."""
        cdef const uint8_t *record = arena + place
        if self.dead.is_dead(place):
            return False
        if self.touches.count == 0 and place >= self.deadlines.doubtful:
            return True  # the usual case, decided without reading the record
        if place < self.end and place + RECORD_KEY + record_key_size(record) > self.end:
            return False  # a wrong place from a saved table
        if record_operation(record) != RECORD_PUT or self.touches.count == 0:
            return True
        return self.touches.find(
            arena, self.touches.hash(record_key(record), record_key_size(record)), record_key(record),
            record_key_size(record)) == 0

    cdef void drop_many_stale(self, const uint8_t *arena, Deadlines deadlines) noexcept nogil:
        if deadlines.stale > FEW_STALE and 5 * deadlines.stale > 2 * deadlines.count:
            self.drop_stale(arena, deadlines)

    cdef void drop_stale(self, const uint8_t *arena, Deadlines deadlines) noexcept nogil:
        """Removes all stale deadlines. O(deadlines)."""
        cdef size_t kept = 0
        cdef size_t i
        for i in range(deadlines.count):
            if self.counts(arena, place_of(deadlines.items[i])):
                deadlines.items[kept] = deadlines.items[i]
                kept += 1
        deadlines.keep(arena, kept)

    cdef void drop_stale_top(self, const uint8_t *arena, Deadlines deadlines) noexcept nogil:
        """Removes the first deadline, a stale one, and stale ones below it whose parents in the heap are removed.

        After a tick, the deadlines of all that it removed are there. The positions are noted in the unused room of the
        heap; if that is full, some are left for the next call.
        """
        cdef uint64_t first = 0
        cdef uint64_t *stale = &first
        cdef size_t count = 1
        cdef size_t room = 1
        cdef size_t looked = 0
        cdef size_t child
        if deadlines.room > deadlines.count:
            stale = deadlines.items + deadlines.count
            stale[0] = 0
            room = deadlines.room - deadlines.count
        while looked < count and count + CHILDREN <= room:
            child = CHILDREN * stale[looked] + 1
            for child in range(child, min(child + CHILDREN, deadlines.count)):
                if not self.counts(arena, place_of(deadlines.items[child])):
                    stale[count] = child
                    count += 1
            looked += 1
        deadlines.drop(arena, stale, count)
        deadlines.stale -= min(count, deadlines.stale)

    cdef uint64_t next_of(self, const uint8_t *arena, Deadlines deadlines) noexcept nogil:
        """Returns the earliest deadline of keys or of sessions, or NO_DEADLINE; drops stale ones from the top."""
        while deadlines.count and not self.counts(arena, place_of(deadlines.items[0])):
            self.drop_stale_top(arena, deadlines)
        return deadlines.deadline_of(arena, place_of(deadlines.items[0])) if deadlines.count else NO_DEADLINE

    cdef uint64_t deadline_at(self, const uint8_t *arena, uint64_t place) noexcept nogil:
        """Returns the place of the record with the deadline of the key put at `place`: a touch, or that put itself."""
        cdef const uint8_t *record = arena + place
        cdef uint64_t touch = 0
        if self.touches.count:
            touch = self.touches.find(
                arena, self.touches.hash(record_key(record), record_key_size(record)), record_key(record),
                record_key_size(record))
        return touch if touch else place

    cdef int begin_order(self, Mapping mapping) except -1:
        """Creates the order, which is not built yet. May run Python code."""
        cdef Order order = Order(self.table, self.dead, mapping)
        if not self.ordered:
            self.order = order
            self.ordered = True
        return 0


cdef class Taking:
    """The work of `Index.take_all`; the waiting caller keeps the arena alive."""
    cdef Index index
    cdef Walk walk

    def __cinit__(self, Index index):
        self.index = index

    def __call__(self, Work work):
        cdef int outcome = PAUSED
        while outcome == PAUSED:
            with nogil:
                outcome = self.index.take(&self.walk, self.walk.place + SLICE)
                while outcome == PAUSED and work.goes_on(self.walk.place):
                    outcome = self.index.take(&self.walk, self.walk.place + SLICE)
            work()
        if outcome == NO_MEMORY:
            raise MemoryError(f"no memory for a table of {self.index.table.count} keys and more")


cdef object read_metadata(const uint8_t *record):
    cdef const uint8_t *value = record_key(record) + record_key_size(record)
    cdef bytes stored = value[:record_value_size(record)]
    return SnapshotMetadata(LogId(record_index(record), int.from_bytes(stored[:8], "little")), stored[8:])


cdef Walk walk_base(const uint8_t *arena, uint64_t first, uint64_t stop) noexcept nogil:
    """Returns a walk over the records of the base only."""
    cdef Walk walk
    walk.arena = arena
    walk.place = first
    walk.stop = walk.frame = walk.end = stop
    return walk


cdef uint64_t check_records(
    Mapping mapping, uint64_t first, uint64_t stop, Terms terms, uint64_t *found
) except? 0:
    """Returns the place of the first invalid record of a base, or 0; `found`: the number of records per operation.

    Without the GIL.
    """
    cdef Checking checking = Checking(mapping, terms)
    checking.place, checking.stop = first, stop
    run_long(checking, no_tick, stop - first)
    memcpy(found, checking.found, sizeof(checking.found))
    return 0 if checking.finding == VALID else checking.place


cdef class Checking:
    """The work of `check_records`."""
    cdef Mapping mapping
    cdef Terms terms
    cdef uint64_t place, stop
    cdef uint64_t before     # the index of the previous record
    cdef uint64_t found[OPERATIONS]
    cdef int finding

    def __cinit__(self, Mapping mapping, Terms terms):
        self.mapping, self.terms = mapping, terms
        self.finding = VALID

    def __call__(self, Work work):
        cdef bint more = True
        while more:
            with nogil:
                more = self.check_slice()
                while more and work.goes_on(self.place):
                    more = self.check_slice()
            work()

    cdef bint check_slice(self) noexcept nogil:
        """Checks a slice of records; returns whether there is more to check."""
        cdef uint64_t pause = min(self.stop, self.place + SLICE)
        cdef const uint8_t *arena = self.mapping.address
        while self.place < pause and self.finding == VALID:
            if self.stop - self.place >= RECORD_KEY:
                self.found[min(record_operation(arena + self.place), OPERATIONS - 1)] += 1
            self.finding = check_record(arena, &self.place, self.stop, &self.before, self.terms)
        return self.place < self.stop and self.finding == VALID


cdef int check_record(
    const uint8_t *arena, uint64_t *place, uint64_t stop, uint64_t *before, Terms terms
) noexcept nogil:
    """Checks a record and advances `place`: VALID if it is complete, may be live, is included, and in order."""
    cdef const uint8_t *record = arena + place[0]
    cdef uint64_t length, term
    if stop - place[0] < RECORD_KEY:
        return -1
    length = record_length(record)
    if length > stop - place[0] or look_at_record(record, length) != VALID:
        return -1
    if not may_be_live(record_operation(record)) or record_index(record) < before[0]:
        return -1
    if not terms.find(record_index(record), &term):
        return -1
    before[0] = record_index(record)
    place[0] += length
    return VALID


cdef int check_deadlines(Index index, const uint8_t *arena) except -1:
    """Asserts the invariants of deadlines. O(deadlines)."""
    cdef size_t stale = 0
    cdef uint64_t place
    cdef size_t i
    for i in range(index.deadlines.count):
        place = place_of(index.deadlines.items[i])
        stale += not index.counts(arena, place)
        if i:
            assert not index.deadlines.is_before(arena, index.deadlines.items[i], index.deadlines.items[(i - 1) // 4])
        assert index.deadlines.item_of(record_deadline(arena + place), place) == index.deadlines.items[i]
    assert stale == index.deadlines.stale, f"{stale} deadlines are stale, {index.deadlines.stale} were counted"
    stale = 0
    for i in range(index.session_deadlines.count):
        place = place_of(index.session_deadlines.items[i])
        stale += not index.counts(arena, place)
        assert index.session_deadlines.item_of(session_deadline(arena + place), place) == (
            index.session_deadlines.items[i])
    assert stale == index.session_deadlines.stale
    return 0
