"""The state as the commands of a chunk see it: what was applied, and over it what the chunk has written so far.

There is one such view for a chunk, and everything that looks before it writes is judged over it: compare-and-swap, add,
read, transaction, ranges, procedures. Writes are steps, in order; each knows the write of its key before it, so that an
entry which is refused is taken back from the end. Nothing here changes the state.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp

from fastsm.command cimport ABSENT
from fastsm.disk.format cimport (
    RECORD_DELETE, RECORD_FORGET, RECORD_KEY, RECORD_PUT, RECORD_SESSION, SESSION_ID_SIZE, may_be_live, record_index,
    record_key, record_key_size, record_value_size,
)

cdef extern from *:
    """
    #define fastsm_add_overflows(a, b, sum) __builtin_add_overflow(a, b, sum)
    """
    bint add_overflows "fastsm_add_overflows"(int64_t a, int64_t b, int64_t *sum) noexcept nogil

cdef enum:
    KEPT_STEPS = 1 << 14      # scratch memory that stays for the next chunk
    SMALLEST = 16


cdef class View:
    """Scratch memory of `apply`, used again for each chunk that looks before it writes.

    Thread safety: used by one writer at a time. Pointers lead into commands and bytes objects that the chunk holds, and
    into the arena, whose mapping is held here.
    """

    def __dealloc__(self):
        free(self.writes)
        free(self.slots)

    cdef int begin(self, Index index, Mapping mapping, uint64_t readable, log, size_t expected) except -1:
        """Over this state, with room for `expected` writes before it has to grow."""
        cdef size_t slots = SMALLEST
        self.index, self.table, self.mapping, self.log = index, index.table, mapping, log
        self.arena = mapping.address
        self.readable = readable
        self.count = self.used = 0
        self.keys, self.values = [], []
        while slots < 2 * expected:
            slots *= 2
        return self.resize(slots)

    cdef void forget(self) noexcept:
        self.count = self.used = 0
        free(self.slots)
        self.slots = NULL
        self.arena = NULL
        self.index = self.table = self.mapping = self.log = self.keys = self.values = None
        if self.room > KEPT_STEPS:
            free(self.writes)
            self.writes = NULL
            self.room = 0

    cdef int resize(self, size_t slots) except -1:
        cdef Pending *old = self.slots
        cdef size_t old_count = self.slot_mask + 1 if old != NULL else 0
        cdef size_t i
        self.slots = <Pending *>calloc(slots, sizeof(Pending))
        if self.slots == NULL:
            self.slots = old
            raise MemoryError(f"no memory to judge a chunk that writes {slots // 2} keys")
        self.slot_mask = slots - 1
        for i in range(old_count):
            if old[i].key != NULL:
                self.slot_of(old[i].session, old[i].key, old[i].key_size, old[i].hashed)[0] = old[i]
        free(old)
        return 0

    cdef Pending *slot_of(self, bint session, const uint8_t *key, size_t size, uint64_t hashed) noexcept nogil:
        """The slot of a key, or of a session, or the empty one where it would be."""
        cdef size_t i = hashed & self.slot_mask
        cdef Pending *slot = &self.slots[i]
        while slot.key != NULL:
            if slot.hashed == hashed and slot.key_size == size and slot.session == session:
                if memcmp(slot.key, key, size) == 0:
                    break
            i = (i + 1) & self.slot_mask
            slot = &self.slots[i]
        return slot

    # ---- look ------------------------------------------------------------------------------------------

    cdef int look(self, const uint8_t *key, size_t size, uint64_t hashed, Found *found) except -1:
        """What is under a key. `CorruptionError` where a record that was not verified yet cannot be judged by."""
        return self.look_for(self.table, False, key, size, hashed, found)

    cdef int look_at_session(self, uint64_t session, Found *found) except -1:
        """What is remembered of a session: the value of its record."""
        cdef Table sessions = self.index.sessions
        cdef const uint8_t *key = <const uint8_t *>&session
        return self.look_for(sessions, True, key, SESSION_ID_SIZE, sessions.hash(key, SESSION_ID_SIZE), found)

    cdef int look_for(
        self, Table table, bint session, const uint8_t *key, size_t size, uint64_t hashed, Found *found
    ) except -1:
        cdef Pending *slot = self.slot_of(session, key, size, hashed)
        cdef const Step *step
        cdef const uint8_t *record
        cdef uint64_t place
        found.value = NULL
        found.size = ABSENT
        found.index = 0
        found.entry = -1
        if slot.key != NULL and slot.latest >= 0:
            step = &self.writes[slot.latest]
            found.entry = <int32_t>step.entry
            if may_be_live(step.record):
                found.value, found.size, found.index = step.operation.value, step.operation.value_size, step.index
            return 0
        place = table.find(self.arena, hashed, key, <uint16_t>size)
        if place:
            record = self.arena + place
            found.value = record + RECORD_KEY + record_key_size(record)
            found.size = record_value_size(record)
            found.index = record_index(record)
            if place + RECORD_KEY + record_key_size(record) + <uint64_t>found.size > self.readable:
                raise self.log.damage_at(place)
        return 0

    cdef int add(
        self, const uint8_t *key, size_t size, uint64_t hashed, int64_t delta, int64_t initial, int64_t *total
    ) except -1:
        """DONE, with what an addition comes to, or the reason why it cannot be done."""
        cdef Found found
        self.look(key, size, hashed, &found)
        if found.size != ABSENT and not parse_number(found.value, found.size, &initial):
            return NOT_A_NUMBER
        return OVERFLOW if add_overflows(initial, delta, total) else DONE

    cdef list keys_between(self, bytes start, bytes end):
        """The keys that are there, from `start` to before `end` (None: to the last), in order. O(keys of the state)."""
        cdef uint64_t *places = <uint64_t *>malloc((self.table.count + 1) * sizeof(uint64_t))
        cdef uint64_t count = self.table.count
        cdef const uint8_t *record
        cdef Pending *slot
        cdef list keys = []
        cdef size_t i
        if places == NULL:
            raise MemoryError(f"no memory to look through {count} keys")
        try:
            self.table.gather(places)
            for i in range(count):
                record = self.arena + places[i]
                if places[i] + RECORD_KEY + record_key_size(record) > self.readable:
                    raise self.log.damage_at(places[i])
                if not lies_between(record_key(record), record_key_size(record), start, end):
                    continue
                if self.used:
                    slot = self.slot_of(
                        False, record_key(record), record_key_size(record),
                        self.table.hash(record_key(record), record_key_size(record)))
                    if slot.key != NULL and slot.latest >= 0:
                        continue
                keys.append(PyBytes_FromStringAndSize(<const char *>record_key(record), record_key_size(record)))
        finally:
            free(places)
        if self.used:
            for i in range(self.slot_mask + 1):
                slot = &self.slots[i]
                if slot.key == NULL or slot.latest < 0 or slot.session:
                    continue
                if self.writes[slot.latest].record == RECORD_PUT:
                    if lies_between(slot.key, slot.key_size, start, end):
                        keys.append(PyBytes_FromStringAndSize(<const char *>slot.key, slot.key_size))
        keys.sort()
        return keys

    # ---- write -----------------------------------------------------------------------------------------

    cdef int write(self, const Step *step) except -1:
        """Appends what a step writes; its key and value stay where they are."""
        cdef Pending *slot
        cdef Step *written
        cdef bint session = step.record >= RECORD_SESSION
        cdef size_t room
        if self.count == self.room:
            if self.count >= 0x7FFFFFFF:
                raise MemoryError("a chunk with commands that answer writes at most 2**31 - 1 records")
            room = 2 * self.room + SMALLEST
            written = <Step *>realloc(self.writes, room * sizeof(Step))
            if written == NULL:
                raise MemoryError(f"no memory for a chunk that writes {room} records")
            self.writes = written
            self.room = room
        written = &self.writes[self.count]
        written[0] = step[0]
        if writes_key(step.record) or session:
            slot = self.slot_of(session, step.operation.key, step.operation.key_size, step.hashed)
            if slot.key == NULL:
                if 2 * (self.used + 1) > self.slot_mask + 1:
                    self.resize(2 * (self.slot_mask + 1))
                    slot = self.slot_of(session, step.operation.key, step.operation.key_size, step.hashed)
                slot.session = session
                slot.key = step.operation.key
                slot.key_size = step.operation.key_size
                slot.hashed = step.hashed
                slot.latest = -1
                self.used += 1
            written.shadowed = slot.latest
            slot.latest = <int32_t>self.count
        self.count += 1
        return 0

    cdef int write_number(self, const Step *step, int64_t number) except -1:
        """Appends a put of a number as text, under the key of a step."""
        cdef Step put = step[0]
        cdef bytes text = number_text(number)
        self.values.append(text)
        put.operation.value = <const uint8_t *>PyBytes_AS_STRING(text)
        put.operation.value_size = <uint32_t>PyBytes_GET_SIZE(text)
        put.record = RECORD_PUT
        return self.write(&put)

    cdef int64_t remove_range(self, uint64_t index, uint32_t entry, bytes start, bytes end) except -1:
        """Appends a delete of each key in a range, in order; returns how many."""
        cdef list keys = self.keys_between(start, end)
        for key in keys:
            self.write_bytes(index, entry, key, None)
        return len(keys)

    cdef int write_session(self, uint64_t index, uint32_t entry, uint64_t session, bytes value) except -1:
        """Appends what is remembered of a session from here on; None: it is forgotten."""
        cdef Step step
        cdef bytes key = PyBytes_FromStringAndSize(<const char *>&session, SESSION_ID_SIZE)
        self.keys.append(key)
        step.operation.key = step.operation.value = <const uint8_t *>PyBytes_AS_STRING(key)
        step.operation.key_size = SESSION_ID_SIZE
        step.operation.value_size = 0
        step.record = RECORD_FORGET
        if value is not None:
            self.values.append(value)
            step.operation.value = <const uint8_t *>PyBytes_AS_STRING(value)
            step.operation.value_size = <uint32_t>PyBytes_GET_SIZE(value)
            step.record = RECORD_SESSION
        step.index = index
        step.entry = entry
        step.hashed = self.index.sessions.hash(step.operation.key, SESSION_ID_SIZE)
        return self.write(&step)

    cdef int write_bytes(self, uint64_t index, uint32_t entry, bytes key, bytes value) except -1:
        """Appends a put of these objects, which are held, or, with `value` None, a delete."""
        cdef Step step
        self.keys.append(key)
        step.operation.key = <const uint8_t *>PyBytes_AS_STRING(key)
        step.operation.key_size = <uint16_t>PyBytes_GET_SIZE(key)
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
        while self.count > mark:
            self.count -= 1
            step = &self.writes[self.count]
            if writes_key(step.record) or step.record >= RECORD_SESSION:
                self.slot_of(
                    step.record >= RECORD_SESSION, step.operation.key, step.operation.key_size, step.hashed,
                ).latest = step.shadowed


cdef bint parse_number(const uint8_t *text, uint32_t size, int64_t *number) noexcept nogil:
    """Whether a value is an integer as `add` writes it: no sign but a minus, no leading zero, 64 bits."""
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
        magnitude = 10 * magnitude + (text[i] - <uint8_t>b"0")  # 19 digits fit
    if magnitude > <uint64_t>0x7FFFFFFFFFFFFFFF + <uint64_t>negative:
        return False
    number[0] = <int64_t>(0 - magnitude if negative else magnitude)
    return True


cdef bytes number_text(int64_t number):
    cdef uint8_t text[20]
    cdef uint64_t rest = 0 - <uint64_t>number if number < 0 else <uint64_t>number
    cdef int i = 20
    while True:
        i -= 1
        text[i] = <uint8_t>b"0" + <uint8_t>(rest % 10)
        rest = rest // 10
        if rest == 0:
            break
    if number < 0:
        i -= 1
        text[i] = b"-"
    return PyBytes_FromStringAndSize(<const char *>text + i, 20 - i)


cdef bint lies_between(const uint8_t *key, size_t size, bytes start, bytes end) noexcept:
    if compare(key, size, start) < 0:
        return False
    return end is None or compare(key, size, end) < 0


cdef int compare(const uint8_t *key, size_t size, bytes other) noexcept:
    """As `bytes` compare: byte by byte, then the shorter one first."""
    cdef size_t other_size = PyBytes_GET_SIZE(other)
    cdef int order = memcmp(key, PyBytes_AS_STRING(other), min(size, other_size))
    if order:
        return order
    return (size > other_size) - (size < other_size)
