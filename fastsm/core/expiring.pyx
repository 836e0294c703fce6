"""Ticks: the clock, and the removal of what is due, over the view of a chunk.

Deadlines that were applied before the chunk are walked over in order, and are not changed by the walk; writes of the
chunk override them. The chunk's own deadlines are in a heap, to which each is added once, so many ticks in one chunk
cost no more than in many chunks.
"""

from libc.stdlib cimport free, realloc
from libc.string cimport memcmp, memcpy

from fastsm.command cimport number_at
from fastsm.core.view cimport BREATH, step_deadline, writes_key
from fastsm.disk.format cimport (
    CLOCK_SIZE, NO_DEADLINE, RECORD_CLOCK, RECORD_DELETE, RECORD_FORGET, RECORD_SESSION, SESSION_DEADLINE, record_key,
    record_key_size,
)
from fastsm.lookup.deadlines cimport Deadlines


cdef enum:
    SMALLEST = 16
    KEPT = 1 << 12        # the heap keeps memory for this many deadlines for the next chunk


cdef class Expiring(Ranging):
    """The view in which ticks are judged.

    Thread safety: used by one writer at a time.
    """

    cdef void forget(self) noexcept:
        if self.ticking:
            self.ticking = False
            self.due_keys.end()
            self.due_sessions.end()
            self.new_keys.end()
            self.new_sessions.end()
        Ranging.forget(self)

    cdef int tick(self, const Step *step, uint64_t now, uint64_t limit, uint64_t *removed) except -1:
        """Appends the writes of a tick: the clock, deletes of keys, ends of sessions. `step` names the entry."""
        self.know()
        if now > self.clock:
            self.move_clock(step, now)
        removed[0] = 0
        if not self.ticking:
            self.begin_ticks()
        self.take_written()
        if limit:
            removed[0] = self.remove_due(step, False, limit)
        if limit > removed[0]:
            removed[0] += self.remove_due(step, True, limit - removed[0])
        return 0

    cdef int move_clock(self, const Step *step, uint64_t now) except -1:
        cdef Step written = step[0]
        cdef uint8_t *value = self.scratch.take(CLOCK_SIZE)
        memcpy(value, &now, CLOCK_SIZE)
        written.record = RECORD_CLOCK
        written.operation.key = written.operation.value = value
        written.operation.key_size = 0
        written.operation.value_size = CLOCK_SIZE
        written.operation.timed = False
        self.write(&written)
        self.clock = now  # safe to set now: a tick is never taken back
        return 0

    cdef int begin_ticks(self) except -1:
        """Prepares for the first tick of a chunk. Making objects may collect garbage, and so run code that reads.

        Drops overtaken deadlines from the top of the heaps, as a reader of the next deadline does: on a replica without
        such readers, each tick would have to walk over them.
        """
        if self.new_sessions is None:
            self.due_keys, self.due_sessions = DueWalk(), DueWalk()
            self.new_keys, self.new_sessions = DueHeap(), DueHeap()
        self.index.next_of(self.arena, self.index.deadlines)
        self.index.next_of(self.arena, self.index.session_deadlines)
        self.looked_at = 0
        self.ticking = True
        return 0

    cdef uint64_t remove_due(self, const Step *step, bint sessions, uint64_t limit) except? 0:
        """Appends deletes of keys, or ends of sessions, that are due, in order, at most `limit`; returns how many.

        The walk over earlier deadlines never returns, within this chunk, to one that it has passed: that one is removed
        now, or was overtaken by a write of the chunk. Python code runs only in `breathe`.
        """
        cdef DueWalk walk = self.due_sessions if sessions else self.due_keys
        cdef DueHeap heap = self.new_sessions if sessions else self.new_keys
        cdef uint64_t removed = 0
        cdef DueKey applied, removing
        cdef Deadlines deadlines = self.index.session_deadlines if sessions else self.index.deadlines
        cdef const DueKey *written
        cdef uint64_t place
        applied.write = -1
        while removed < limit:
            if removed and removed % BREATH == 0:
                self.breathe()
            if not walk.holds():  # note earlier removals first, so that a walk that starts again passes them
                self.know()
                walk.begin(deadlines)
            place = walk.first()
            while place and deadlines.deadline_of(self.arena, place) <= self.clock and not self.is_due(sessions, place):
                walk.pass_first(self.arena)
                place = walk.first()
            written = self.first_written(sessions)
            applied.deadline = deadlines.deadline_of(self.arena, place) if place else NO_DEADLINE
            if applied.deadline <= self.clock:
                applied.key = record_key(self.arena + place)
                applied.key_size = record_key_size(self.arena + place)
                applied.by_number = sessions
                applied.hashed = (self.index.sessions if sessions else self.table).hash(applied.key, applied.key_size)
                if written == NULL or order_of_due(&applied, written) < 0:
                    self.remove_key(step, &applied)
                    walk.pass_first(self.arena)
                    removed += 1
                    continue
            if written == NULL:
                break
            removing = written[0]
            heap.drop_first()
            self.remove_key(step, &removing)
            removed += 1
        return removed

    cdef bint is_due(self, bint sessions, uint64_t place) except -1:
        """Returns whether a deadline applied earlier is still current, and this chunk has not written its key."""
        cdef const uint8_t *record = self.arena + place
        if not self.index.counts(self.arena, place):
            return False
        self.check_readable(place)
        return self.latest_write(
            sessions, record_key(record), record_key_size(record),
            (self.index.sessions if sessions else self.table).hash(record_key(record), record_key_size(record))) < 0

    cdef int take_written(self) except -1:
        """Adds the deadlines written since the last tick to the heaps. The entries that wrote them have been judged."""
        cdef const Step *step
        cdef DueKey added
        while self.looked_at < self.count:
            step = &self.writes[self.looked_at]
            added.deadline = NO_DEADLINE
            added.by_number = step.record == RECORD_SESSION
            if added.by_number:
                added.deadline = number_at(step.operation.value + SESSION_DEADLINE)
            elif writes_key(step.record):
                added.deadline = step_deadline(step)
            if added.deadline != NO_DEADLINE:
                added.key, added.key_size = step.operation.key, step.operation.key_size
                added.hashed = step.hashed
                added.write = <int32_t>self.looked_at
                (self.new_sessions if added.by_number else self.new_keys).push(&added)
            self.looked_at += 1
        return 0

    cdef const DueKey *first_written(self, bint sessions) noexcept:
        """Returns the earliest deadline of this chunk's writes that is due and still current; NULL: there is none."""
        cdef DueHeap heap = self.new_sessions if sessions else self.new_keys
        cdef const DueKey *first
        while heap.count and heap.items[0].deadline <= self.clock:
            first = &heap.items[0]
            if self.latest_write(sessions, first.key, first.key_size, first.hashed) == first.write:
                return first
            heap.drop_first()
        return NULL

    cdef int remove_key(self, const Step *step, const DueKey *due) except -1:
        """Appends the delete of a key, or the end of a session, whose bytes the caller keeps in place."""
        return self.append_removal(
            step, due.key, due.key_size, due.hashed, RECORD_FORGET if due.by_number else RECORD_DELETE)


cdef int order_of_due(const DueKey *one, const DueKey *other) noexcept nogil:
    """Compares the order in which two are removed: by deadline, then by key, or by session id."""
    cdef uint64_t own, foreign
    cdef int order
    if one.deadline != other.deadline:
        return 1 if one.deadline > other.deadline else -1
    if one.by_number:
        own, foreign = number_at(one.key), number_at(other.key)
        return (own > foreign) - (own < foreign)
    order = memcmp(one.key, other.key, min(one.key_size, other.key_size))
    return order if order else <int>one.key_size - <int>other.key_size


cdef class DueHeap:
    """A heap of deadlines that a chunk has written; an overtaken deadline stays until it reaches the top.

    Thread safety: used by one writer at a time.
    """

    def __dealloc__(self):
        free(self.items)

    cdef void end(self) noexcept:
        """Removes all deadlines, and frees large memory."""
        self.count = 0
        if self.room > KEPT:
            free(self.items)
            self.items = NULL
            self.room = 0

    cdef int push(self, const DueKey *added) except -1:
        """Adds a deadline. O(log count)."""
        cdef size_t i = self.count
        cdef size_t parent
        cdef DueKey *grown
        if self.count == self.room:
            grown = <DueKey *>realloc(self.items, (2 * self.room + SMALLEST) * sizeof(DueKey))
            if grown == NULL:
                raise MemoryError(f"no memory for the deadlines that a chunk writes, {self.count} and more")
            self.items = grown
            self.room = 2 * self.room + SMALLEST
        self.count += 1
        while i:
            parent = (i - 1) // 2
            if order_of_due(added, &self.items[parent]) >= 0:
                break
            self.items[i] = self.items[parent]
            i = parent
        self.items[i] = added[0]
        return 0

    cdef void drop_first(self) noexcept:
        """Removes the earliest deadline. O(log count)."""
        cdef DueKey moved
        cdef size_t i = 0
        cdef size_t child
        self.count -= 1
        moved = self.items[self.count]
        while True:
            child = 2 * i + 1
            if child >= self.count:
                break
            if child + 1 < self.count and order_of_due(&self.items[child + 1], &self.items[child]) < 0:
                child += 1
            if order_of_due(&self.items[child], &moved) >= 0:
                break
            self.items[i] = self.items[child]
            i = child
        self.items[i] = moved
