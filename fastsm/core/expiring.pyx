"""What a tick comes to, over the view of a chunk: the clock, and what is due by it.

What was applied before the chunk is walked over in the order of its deadlines, and nothing of it changes; what the
chunk has written since overrules it, and is sorted in.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdlib cimport free, malloc, qsort
from libc.string cimport memcmp

from fastsm.command cimport number_at
from fastsm.core.view cimport Pending, step_deadline
from fastsm.disk.format cimport (
    CLOCK_SIZE, NO_DEADLINE, RECORD_CLOCK, RECORD_DELETE, RECORD_FORGET, RECORD_SESSION, SESSION_DEADLINE, record_key,
    record_key_size,
)
from fastsm.lookup.deadlines cimport Due


cdef class Expiring(View):
    """The view in which ticks are judged.

    Thread safety: used by one writer at a time.
    """

    cdef void forget(self) noexcept:
        self.due_keys = self.due_sessions = None
        View.forget(self)

    cdef int tick(self, const Step *step, uint64_t now, uint64_t limit, uint64_t *removed) except -1:
        """Appends what a tick comes to: the clock, deletes of keys, ends of sessions. `step` says of which entry."""
        if now > self.clock:
            self.move_clock(step, now)
        removed[0] = 0
        if limit:
            removed[0] = self.remove_due(step, False, limit)
        if limit > removed[0]:
            removed[0] += self.remove_due(step, True, limit - removed[0])
        return 0

    cdef int move_clock(self, const Step *step, uint64_t now) except -1:
        cdef Step written = step[0]
        cdef bytes value = PyBytes_FromStringAndSize(<const char *>&now, CLOCK_SIZE)
        self.values.append(value)
        written.record = RECORD_CLOCK
        written.operation.key = written.operation.value = <const uint8_t *>PyBytes_AS_STRING(value)
        written.operation.key_size = 0
        written.operation.value_size = CLOCK_SIZE
        written.operation.timed = False
        self.write(&written)
        self.clock = now  # a tick is never taken back
        return 0

    cdef uint64_t remove_due(self, const Step *step, bint sessions, uint64_t limit) except? 0:
        """Appends deletes of at most `limit` keys, or ends of sessions, that are due, in order; returns how many.

        What was applied before is walked over in order, and passed for the rest of the chunk: it is removed now, or is
        overtaken by what the chunk has written, which is gathered and sorted.
        """
        cdef DueWalk walk = self.due_sessions if sessions else self.due_keys
        cdef uint64_t removed = 0
        cdef size_t count = 0
        cdef size_t i = 0
        cdef DueKey *written = NULL
        cdef DueKey applied
        cdef const Due *due
        if walk is None:
            walk = DueWalk()  # which may collect garbage, and so run code that reads
            if sessions:
                self.due_sessions = walk
            else:
                self.due_keys = walk
        try:
            if self.session_written if sessions else self.timed:
                self.gather_due(sessions, &written, &count)
            # From here on no Python code runs. What an earlier walk has passed is passed by this one too.
            if not walk.holds():
                walk.begin(self.index.session_deadlines if sessions else self.index.deadlines)
            while removed < limit:
                due = walk.first()
                while due != NULL and due.deadline <= self.clock and not self.is_due(sessions, due.place):
                    walk.pass_first(self.arena)
                    due = walk.first()
                if due == NULL or due.deadline > self.clock:
                    break
                applied.deadline = due.deadline
                applied.key = record_key(self.arena + due.place)
                applied.key_size = record_key_size(self.arena + due.place)
                applied.by_number = sessions
                applied.hashed = (self.index.sessions if sessions else self.table).hash(applied.key, applied.key_size)
                if i < count and order_of_due(&written[i], &applied) < 0:
                    self.remove_key(step, &written[i])
                    i += 1
                else:
                    self.remove_key(step, &applied)
                    walk.pass_first(self.arena)
                removed += 1
            while removed < limit and i < count:
                self.remove_key(step, &written[i])
                i += 1
                removed += 1
        finally:
            free(written)
        return removed

    cdef bint is_due(self, bint sessions, uint64_t place) except -1:
        """Whether a deadline that was applied before still is that of its key, and this chunk has not written the key.
        """
        cdef const uint8_t *record = self.arena + place
        cdef Pending *slot
        if not self.index.counts(self.arena, place):
            return False
        self.check_readable(place)
        slot = self.slot_of(
            sessions, record_key(record), record_key_size(record),
            (self.index.sessions if sessions else self.table).hash(record_key(record), record_key_size(record)))
        return slot.key == NULL or slot.latest < 0

    cdef int gather_due(self, bint sessions, DueKey **found, size_t *count) except -1:
        """The keys, or sessions, that this chunk has written and that are due, in order, for the caller to free."""
        cdef Pending *slot
        cdef const Step *step
        cdef uint64_t deadline
        cdef size_t i
        found[0] = <DueKey *>malloc((self.used + 1) * sizeof(DueKey))
        if found[0] == NULL:
            raise MemoryError(f"no memory to look through {self.used} keys")
        for i in range(self.slot_mask + 1):
            slot = &self.slots[i]
            if slot.key == NULL or slot.latest < 0 or slot.session != sessions:
                continue
            step = &self.writes[slot.latest]
            if sessions:
                deadline = NO_DEADLINE
                if step.record == RECORD_SESSION:
                    deadline = number_at(step.operation.value + SESSION_DEADLINE)
            else:
                deadline = step_deadline(step)
            if deadline > self.clock:
                continue
            found[0][count[0]] = DueKey(deadline, slot.key, slot.hashed, slot.key_size, sessions)
            count[0] += 1
        qsort(found[0], count[0], sizeof(DueKey), compare_due)
        return 0

    cdef int remove_key(self, const Step *step, const DueKey *due) except -1:
        """Appends the delete of a key, or the end of a session, whose bytes stay where they are."""
        cdef Step written
        written.operation.kind = step.operation.kind
        written.operation.key = written.operation.value = written.operation.expected = due.key
        written.operation.key_size = due.key_size
        written.operation.value_size = written.operation.expected_size = 0
        written.operation.timed = False
        written.hashed = due.hashed
        written.index = step.index
        written.entry = step.entry
        written.record = RECORD_FORGET if due.by_number else RECORD_DELETE
        return self.write(&written)


cdef int order_of_due(const DueKey *one, const DueKey *other) noexcept nogil:
    """Below 0 where one is removed before the other: by deadline, then by key, or by id."""
    cdef uint64_t own, foreign
    cdef int order
    if one.deadline != other.deadline:
        return 1 if one.deadline > other.deadline else -1
    if one.by_number:
        own, foreign = number_at(one.key), number_at(other.key)
        return (own > foreign) - (own < foreign)
    order = memcmp(one.key, other.key, min(one.key_size, other.key_size))
    return order if order else <int>one.key_size - <int>other.key_size


cdef int compare_due(const void *one, const void *other) noexcept nogil:
    return order_of_due(<const DueKey *>one, <const DueKey *>other)
