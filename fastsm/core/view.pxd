from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp

from fastsm.command cimport Operation, number_at
from fastsm.core.ordered cimport Ordered
from fastsm.core.scratch cimport Scratch
from fastsm.disk.mapping cimport Mapping
from fastsm.disk.format cimport (
    DEADLINE_SIZE, NO_DEADLINE, RECORD_DELETE, RECORD_PUT, RECORD_TOUCH, is_of_session,
)
from fastsm.lookup.index cimport Index
from fastsm.lookup.table cimport Table

ctypedef struct Step:
    # One operation of a chunk, or one write that it makes.
    Operation operation
    uint64_t hashed       # of its key
    uint64_t index        # of its entry
    uint64_t place        # where its record will be
    uint32_t entry        # the position of its entry in the chunk
    int32_t next          # of a write: the previous write in the same slot, or -1
    int32_t base          # of a touch: the last put or delete of the same key before it in this chunk, or -1
    uint8_t record        # the operation of its record; 0: it makes no record

cdef inline bint writes_key(int record) noexcept nogil:
    """Returns whether a record is that of a key or a session."""
    return record == RECORD_PUT or record == RECORD_DELETE or record == RECORD_TOUCH or is_of_session(record)

cdef inline uint64_t step_deadline(const Step *step) noexcept nogil:
    """Returns the deadline that a put, a delete or a touch gives its key."""
    return number_at(step.operation.key - DEADLINE_SIZE) if step.operation.timed else NO_DEADLINE

ctypedef struct Slot:
    # The writes of this chunk whose keys have the same lowest bits in their hashes, the last one first.
    int32_t latest        # -1: there are none, or all were taken back
    uint32_t chunk        # the chunk that filled the slot; if it is an earlier one, the slot is empty

ctypedef struct Found:
    # What a lookup finds under a key at this point of the chunk.
    const uint8_t *value
    uint32_t size         # ABSENT: the key does not exist
    uint64_t index        # of the entry that wrote it; 0: the key does not exist
    int32_t entry         # the position of that entry in this chunk; -1: it was applied earlier
    int32_t latest        # the last write of the key in this chunk, which may be a touch, or -1
    uint64_t place        # of its record; 0: written by this chunk, or absent

ctypedef struct SessionId:
    const uint8_t *key    # its number, kept as long as the chunk
    uint64_t hashed

cdef enum:  # why an entry is refused: 1 + the position in `answers.REASONS`; 0: it is not refused
    DONE = 0
    MISMATCH = 1
    NOT_A_NUMBER = 2
    OVERFLOW = 3
    TOO_LARGE = 6

cdef enum:
    BREATH = 4096         # keys removed between two checks for signals and other threads


cdef class PendingView:
    cdef Ordered owner           # the state that this is a view of
    cdef Index index
    cdef Table table
    cdef Mapping mapping         # keeps `arena` valid
    cdef const uint8_t *arena
    cdef uint64_t readable
    cdef object log
    cdef Step *writes
    cdef size_t count
    cdef size_t known            # writes before this one are entered in `slots`
    cdef size_t room
    cdef Slot *slots             # the first slot_mask + 1 are in use, one or more for each known write
    cdef size_t slot_room
    cdef size_t slot_mask
    cdef uint32_t chunk          # a counter of chunks, which makes the slots of earlier chunks count as empty
    cdef list keys               # bytes objects that slots and writes point into, kept as long as the chunk
    cdef list values             # the same for values, except those that were taken back
    cdef Scratch scratch         # keys and values that were made here, without an object each
    cdef readonly uint64_t clock

    cdef int begin(self, Ordered owner, size_t expected) except -1
    cdef void forget(self) noexcept
    cdef int look(self, const uint8_t *key, size_t size, uint64_t hashed, Found *found) except -1
    cdef int look_for(
        self, Table table, bint session, const uint8_t *key, size_t size, uint64_t hashed, Found *found) except -1
    cdef int look_at_session(self, const SessionId *session, Found *found) except -1
    cdef SessionId session_at(self, const uint8_t *number) noexcept
    cdef int write_session(
        self, uint64_t index, uint32_t entry, const SessionId *session, uint64_t sequence, uint64_t deadline,
        bytes result) except -1
    cdef uint64_t deadline(self, const uint8_t *key, size_t size, uint64_t hashed) except? 0
    cdef uint64_t deadline_of(self, const Found *found) except? 0
    cdef int check_readable(self, uint64_t place) except -1
    cdef bint touch(self, const Step *step) except -1
    cdef int add(
        self, const uint8_t *key, size_t size, uint64_t hashed, int64_t delta, int64_t initial, int64_t *total,
        Found *found
    ) except -1
    cdef int write(self, const Step *step) except -1
    cdef int append_removal(
        self, const Step *step, const uint8_t *key, size_t size, uint64_t hashed, uint8_t record=*) except -1
    cdef int know_more(self) except -1
    cdef int breathe(self) except -1

    cdef inline int know(self) except -1:
        """Enters all writes into the slots; to be called before slots are used."""
        return self.know_more() if self.known < self.count else 0

    cdef int write_number(self, const Step *step, int64_t number, uint64_t deadline) except -1
    cdef int write_bytes(
        self, uint64_t index, uint32_t entry, bytes key, bytes value, uint64_t deadline=*) except -1
    cdef const uint8_t *hold_key(self, const uint8_t *key, size_t size, uint64_t deadline) except NULL
    cdef void take_back(self, size_t mark) noexcept
    cdef int resize(self, size_t slots) except -1
    cdef void drop_slots(self) noexcept

    cdef inline int32_t latest_write(
        self, bint session, const uint8_t *key, size_t size, uint64_t hashed
    ) noexcept nogil:
        """Returns the last known write of a key or of a session, which may be a touch; -1: there is none."""
        cdef const Slot *slot = &self.slots[hashed & self.slot_mask]
        cdef const Step *step
        cdef int32_t found = slot.latest if slot.chunk == self.chunk else -1
        while found >= 0:
            step = &self.writes[found]
            if step.hashed == hashed and step.operation.key_size == size and is_of_session(step.record) == session:
                if memcmp(step.operation.key, key, size) == 0:
                    break
            found = step.next
        return found

    cdef inline int32_t value_write(self, int32_t write) noexcept nogil:
        """Returns the last write of the same key, up to this one, that is not a touch, or -1."""
        return self.writes[write].base if write >= 0 and self.writes[write].record == RECORD_TOUCH else write
