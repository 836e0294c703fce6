"""The state as the commands of a chunk see it: the applied state, overlaid with what the chunk has written so far.

A chunk has one such view, and everything that reads before it writes is judged over it: compare-and-swap, add, read,
transactions, ranges, procedures. Writes are steps, in order; each refers to the previous write in its slot, so that the
writes of a refused entry can be taken back from the end. Nothing here changes the state.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy

from fastsm.command cimport ABSENT
from fastsm.disk.format cimport (
    DEADLINE_SIZE, NO_DEADLINE, RECORD_DELETE, RECORD_KEY, RECORD_PUT, RECORD_SESSION, RECORD_TOUCH,
    SESSION_DEADLINE, SESSION_ID_SIZE, SESSION_RESULT, may_be_live, record_deadline, record_index,
    record_key_size, record_length, record_value_size,
)

cdef extern from *:
    """
    #define fastsm_add_overflows(a, b, sum) __builtin_add_overflow(a, b, sum)
    """
    bint add_overflows "fastsm_add_overflows"(int64_t a, int64_t b, int64_t *sum) noexcept nogil

cdef enum:
    KEPT_STEPS = 1 << 14      # scratch memory for this many steps is kept for the next chunk
    SMALLEST = 16
    LONGEST_NUMBER = 20       # bytes of a 64-bit integer as text


cdef class PendingView:
    """Scratch memory of `apply`, reused for each chunk that reads before it writes.

    Thread safety: used by one writer at a time. Pointers point into commands and bytes objects that the chunk keeps
    alive, and into the arena, which `mapping` keeps valid.
    """

    def __cinit__(self):
        self.scratch = Scratch()

    def __dealloc__(self):
        free(self.writes)
        free(self.slots)

    cdef int begin(self, Ordered owner, size_t expected) except -1:
        """Begins a chunk over this state, with room for `expected` writes before the slots have to grow."""
        cdef size_t slots = SMALLEST
        self.owner, self.index, self.table, self.log = owner, owner._index, owner._table, owner._log
        self.mapping = owner.mapping
        self.arena = owner.arena
        self.readable = owner.readable
        self.clock = self.index.clock
        self.count = self.known = 0
        self.keys, self.values = [], []
        while slots < 2 * expected:
            slots *= 2
        self.chunk += 1
        if self.chunk == 0:  # the counter wrapped: slots of chunks long ago would count as filled
            self.drop_slots()
            self.chunk = 1
        if slots > self.slot_room:
            self.drop_slots()
            return self.resize(slots)
        self.slot_mask = slots - 1
        return 0

    cdef void drop_slots(self) noexcept:
        free(self.slots)
        self.slots = NULL
        self.slot_room = 0

    cdef void forget(self) noexcept:
        self.count = self.known = 0
        if self.slot_room > 2 * KEPT_STEPS:
            self.drop_slots()
        self.arena = NULL
        self.scratch.forget()
        self.owner = self.index = self.table = self.mapping = self.log = None
        self.keys = self.values = None
        if self.room > KEPT_STEPS:
            free(self.writes)
            self.writes = NULL
            self.room = 0

    cdef int resize(self, size_t slots) except -1:
        """Replaces the slots by `slots` new ones, into which `know_more` enters all writes."""
        cdef Slot *new = <Slot *>calloc(slots, sizeof(Slot))
        if new == NULL:
            raise MemoryError(f"no memory to judge a chunk that writes {slots} records")
        free(self.slots)
        self.slots = new
        self.slot_room = slots
        self.slot_mask = slots - 1
        self.known = 0
        return 0

    # ---- look ------------------------------------------------------------------------------------------

    cdef int look(self, const uint8_t *key, size_t size, uint64_t hashed, Found *found) except -1:
        """Looks a key up. `CorruptionError` if its record, which is not verified yet, cannot be right."""
        return self.look_for(self.table, False, key, size, hashed, found)

    cdef int look_at_session(self, const SessionId *session, Found *found) except -1:
        """Looks a session up: what is found is the value of its record."""
        return self.look_for(self.index.sessions, True, session.key, SESSION_ID_SIZE, session.hashed, found)

    cdef SessionId session_at(self, const uint8_t *number) noexcept:
        """Returns the session whose number is at `number`. The caller keeps those bytes alive until the chunk ends."""
        cdef SessionId session
        session.key = number
        session.hashed = self.index.sessions.hash(number, SESSION_ID_SIZE)
        return session

    cdef int look_for(
        self, Table table, bint session, const uint8_t *key, size_t size, uint64_t hashed, Found *found
    ) except -1:
        cdef const Step *step
        cdef const uint8_t *record
        cdef uint64_t place
        cdef int32_t written
        self.know()
        found.latest = self.latest_write(session, key, size, hashed)
        written = self.value_write(found.latest)
        found.value = NULL
        found.size = ABSENT
        found.index = 0
        found.entry = -1
        found.place = 0
        if written >= 0:
            step = &self.writes[written]
            found.entry = <int32_t>step.entry
            if may_be_live(step.record):
                found.value, found.size, found.index = step.operation.value, step.operation.value_size, step.index
            return 0
        place = table.find(self.arena, hashed, key, <uint16_t>size)
        found.place = place
        if place:
            record = self.arena + place
            found.value = record + RECORD_KEY + record_key_size(record)
            found.size = record_value_size(record)
            found.index = record_index(record)
            if place + RECORD_KEY + record_key_size(record) + <uint64_t>found.size > self.readable:
                raise self.log.damage_at(place)
        return 0

    cdef int add(
        self, const uint8_t *key, size_t size, uint64_t hashed, int64_t delta, int64_t initial, int64_t *total,
        Found *found
    ) except -1:
        """Returns DONE and sets `total`, or returns why the addition is impossible; `found` is the key's old value."""
        self.look(key, size, hashed, found)
        if found.size != ABSENT and not parse_number(found.value, found.size, &initial):
            return NOT_A_NUMBER
        return OVERFLOW if add_overflows(initial, delta, total) else DONE

    # ---- time ------------------------------------------------------------------------------------------

    cdef uint64_t deadline(self, const uint8_t *key, size_t size, uint64_t hashed) except? 0:
        """Returns the deadline of a key; NO_DEADLINE if it has none or does not exist."""
        cdef Found found
        self.look(key, size, hashed, &found)
        return self.deadline_of(&found)

    cdef uint64_t deadline_of(self, const Found *found) except? 0:
        """Returns the deadline of a key that was just looked up, or NO_DEADLINE."""
        cdef uint64_t place
        if found.latest >= 0:
            return step_deadline(&self.writes[found.latest])
        if found.place == 0:
            return NO_DEADLINE
        place = self.index.deadline_at(self.arena, found.place)
        self.check_readable(place)
        return record_deadline(self.arena + place)

    cdef int check_readable(self, uint64_t place) except -1:
        if place + record_length(self.arena + place) > self.readable + 7:
            raise self.log.damage_at(place)
        return 0

    cdef bint touch(self, const Step *step) except -1:
        """Appends a touch if it changes the deadline; returns whether the key exists."""
        cdef Step touched = step[0]
        cdef Found found
        self.look(step.operation.key, step.operation.key_size, step.hashed, &found)
        if found.size == ABSENT:
            return False
        touched.record = RECORD_TOUCH
        touched.operation.value_size = 0
        if self.deadline_of(&found) != step_deadline(step):
            self.write(&touched)
        return True

    # ---- write -----------------------------------------------------------------------------------------

    cdef int write(self, const Step *step) except -1:
        """Appends the write of a step, whose key and value the caller keeps in place.

        `know` enters it into the slots before the next lookup. So a range or a tick that removes a million keys fills
        slots only if a later command looks keys up.
        """
        cdef Step *grown
        cdef size_t room
        if self.count == self.room:
            if self.count >= 0x7FFFFFFF:
                raise MemoryError("a chunk with commands that answer can write at most 2**31 - 1 records")
            room = 2 * self.room + SMALLEST
            grown = <Step *>realloc(self.writes, room * sizeof(Step))
            if grown == NULL:
                raise MemoryError(f"no memory for a chunk that writes {room} records")
            self.writes = grown
            self.room = room
        self.writes[self.count] = step[0]
        self.count += 1
        return 0

    cdef int know_more(self) except -1:
        """Enters each write since the last call into the slot of its key."""
        cdef Slot *slot
        cdef Step *written
        cdef size_t slots = self.slot_mask + 1
        while slots < self.count:
            slots *= 2
        if slots > self.slot_mask + 1:
            self.resize(slots)
        while self.known < self.count:
            written = &self.writes[self.known]
            if writes_key(written.record):
                if written.record == RECORD_TOUCH:
                    written.base = self.value_write(self.latest_write(
                        False, written.operation.key, written.operation.key_size, written.hashed))
                slot = &self.slots[written.hashed & self.slot_mask]
                written.next = slot.latest if slot.chunk == self.chunk else -1
                slot.chunk = self.chunk
                slot.latest = <int32_t>self.known
            self.known += 1
        return 0

    cdef int append_removal(
        self, const Step *step, const uint8_t *key, size_t size, uint64_t hashed, uint8_t record=RECORD_DELETE
    ) except -1:
        """Appends the delete of a key, or the end of a session, whose bytes the caller keeps in place.

        `step` names the entry that removes it.
        """
        cdef Step removing
        removing.operation.kind = step.operation.kind
        removing.operation.key = removing.operation.value = removing.operation.expected = key
        removing.operation.key_size = <uint16_t>size
        removing.operation.value_size = removing.operation.expected_size = 0
        removing.operation.timed = False
        removing.hashed = hashed
        removing.index = step.index
        removing.entry = step.entry
        removing.record = record
        return self.write(&removing)

    cdef int breathe(self) except -1:
        """Lets signal handlers and other threads run; they cannot change the state: the writer's turn is taken."""
        PyErr_CheckSignals()
        with nogil:
            pass
        return 0

    cdef const uint8_t *hold_key(self, const uint8_t *key, size_t size, uint64_t deadline) except NULL:
        """Returns a copy of a key, preceded by a deadline, that is kept as long as the chunk."""
        cdef uint8_t *held = self.scratch.take(DEADLINE_SIZE + size) + DEADLINE_SIZE
        memcpy(held - DEADLINE_SIZE, &deadline, DEADLINE_SIZE)
        memcpy(held, key, size)
        return held

    cdef int write_number(self, const Step *step, int64_t number, uint64_t deadline) except -1:
        """Appends a put of a number, as text, to the key of a step."""
        cdef Step put = step[0]
        cdef uint8_t *text = self.scratch.take(LONGEST_NUMBER)
        if deadline != NO_DEADLINE:
            put.operation.key = self.hold_key(step.operation.key, step.operation.key_size, deadline)
            put.operation.timed = True
        put.operation.value_size = write_decimal(text, number)
        put.operation.value = text + LONGEST_NUMBER - put.operation.value_size
        put.record = RECORD_PUT
        return self.write(&put)

    cdef int write_session(
        self, uint64_t index, uint32_t entry, const SessionId *session, uint64_t sequence, uint64_t deadline,
        bytes result,
    ) except -1:
        """Appends a session's record: its last command's sequence number and result, and its deadline."""
        cdef Step step
        cdef size_t size = PyBytes_GET_SIZE(result)
        cdef uint8_t *value = self.scratch.take(SESSION_RESULT + size)
        step.operation.value = value
        step.operation.value_size = <uint32_t>(SESSION_RESULT + size)
        memcpy(value, &sequence, 8)
        memcpy(value + SESSION_DEADLINE, &deadline, 8)
        memcpy(value + SESSION_RESULT, PyBytes_AS_STRING(result), size)
        step.operation.key = session.key
        step.operation.key_size = SESSION_ID_SIZE
        step.operation.timed = False
        step.record = RECORD_SESSION
        step.index = index
        step.entry = entry
        step.hashed = session.hashed
        return self.write(&step)

    cdef int write_bytes(
        self, uint64_t index, uint32_t entry, bytes key, bytes value, uint64_t deadline=NO_DEADLINE
    ) except -1:
        """Appends a put, or with `value` None a delete; keeps both objects alive as long as the chunk."""
        cdef Step step
        step.operation.key_size = <uint16_t>PyBytes_GET_SIZE(key)
        step.operation.timed = deadline != NO_DEADLINE
        step.operation.key = <const uint8_t *>PyBytes_AS_STRING(key)
        if step.operation.timed:
            step.operation.key = self.hold_key(step.operation.key, step.operation.key_size, deadline)
        else:
            self.keys.append(key)
        step.operation.value = step.operation.key
        step.operation.value_size = 0
        step.record = RECORD_DELETE
        self.values.append(value)
        if value is not None:
            step.operation.value = <const uint8_t *>PyBytes_AS_STRING(value)
            step.operation.value_size = <uint32_t>PyBytes_GET_SIZE(value)
            step.record = RECORD_PUT
        step.index = index
        step.entry = entry
        step.hashed = self.table.hash(step.operation.key, step.operation.key_size)
        return self.write(&step)

    cdef void take_back(self, size_t mark) noexcept:
        """Undoes all writes but the first `mark`."""
        cdef Step *step
        self.count = max(self.known, mark)
        while self.count > mark:
            self.count -= 1
            step = &self.writes[self.count]
            if writes_key(step.record):
                self.slots[step.hashed & self.slot_mask].latest = step.next
        self.known = min(self.known, self.count)


cdef bint parse_number(const uint8_t *text, uint32_t size, int64_t *number) noexcept nogil:
    """Parses an integer as `add` writes it: no plus sign, no leading zeros, 64 bits. Returns whether it is one."""
    cdef uint64_t magnitude = 0
    cdef bint negative = size > 0 and text[0] == b"-"
    cdef uint32_t first = 1 if negative else 0
    cdef uint32_t i
    if size <= first or size - first > 19:
        return False
    if text[first] == b"0" and size > 1:
        return False
    for i in range(first, size):
        if not b"0" <= text[i] <= b"9":
            return False
        magnitude = 10 * magnitude + (text[i] - <uint8_t>b"0")  # 19 digits cannot overflow
    if magnitude > <uint64_t>0x7FFFFFFFFFFFFFFF + <uint64_t>negative:
        return False
    number[0] = <int64_t>(0 - magnitude if negative else magnitude)
    return True


cdef uint32_t write_decimal(uint8_t *text, int64_t number) noexcept nogil:
    """Writes a number to the end of LONGEST_NUMBER bytes; returns its size."""
    cdef uint64_t rest = 0 - <uint64_t>number if number < 0 else <uint64_t>number
    cdef uint32_t i = LONGEST_NUMBER
    while True:
        i -= 1
        text[i] = <uint8_t>b"0" + <uint8_t>(rest % 10)
        rest = rest // 10
        if rest == 0:
            break
    if number < 0:
        i -= 1
        text[i] = b"-"
    return LONGEST_NUMBER - i
