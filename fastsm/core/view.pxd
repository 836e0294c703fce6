from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from fastsm.command cimport Operation
from fastsm.disk.mapping cimport Mapping
from fastsm.disk.format cimport RECORD_DELETE, RECORD_PUT
from fastsm.lookup.index cimport Index
from fastsm.lookup.table cimport Table

ctypedef struct Step:
    # One operation of a chunk, or one thing that it writes.
    Operation operation
    uint64_t hashed       # of its key
    uint64_t index        # of its entry
    uint64_t place        # where its record goes
    uint32_t entry        # position of its entry in the chunk
    int32_t shadowed      # of what is written: the write of the same key before it in this chunk, or -1
    uint8_t record        # the operation of its record, 0: it leaves none

cdef inline bint writes_key(int record) noexcept nogil:
    return record == RECORD_PUT or record == RECORD_DELETE

ctypedef struct Pending:
    # A key that this chunk has written, or wrote and took back.
    const uint8_t *key    # NULL: an empty slot
    uint64_t hashed
    int32_t latest        # the last write of it, -1: none that counts
    uint16_t key_size
    bint session          # it is the id of a session, not a key of the state

ctypedef struct Found:
    # What is under a key at this moment of the chunk.
    const uint8_t *value
    uint32_t size         # ABSENT: the key is not there
    uint64_t index        # of the entry that wrote it, 0: the key is not there
    int32_t entry         # its position in this chunk, -1: it was applied before

cdef enum:  # why an entry is refused: 1 + its position in `answering.REASONS`; 0: it is not
    DONE = 0
    MISMATCH = 1
    NOT_A_NUMBER = 2
    OVERFLOW = 3
    TOO_LARGE = 6


cdef class View:
    cdef Index index
    cdef Table table
    cdef Mapping mapping         # holds the arena
    cdef const uint8_t *arena
    cdef uint64_t readable
    cdef object log
    cdef Step *writes
    cdef size_t count
    cdef size_t room
    cdef Pending *slots          # slot_mask + 1 of them; at most half of them are in use
    cdef size_t slot_mask
    cdef size_t used
    cdef list keys               # bytes objects that slots and writes lead into, for as long as the chunk lasts
    cdef list values             # the same; those of what was taken back are dropped

    cdef int begin(self, Index index, Mapping mapping, uint64_t readable, log, size_t expected) except -1
    cdef void forget(self) noexcept
    cdef int look(self, const uint8_t *key, size_t size, uint64_t hashed, Found *found) except -1
    cdef int look_for(
        self, Table table, bint session, const uint8_t *key, size_t size, uint64_t hashed, Found *found) except -1
    cdef int look_at_session(self, uint64_t session, Found *found) except -1
    cdef int write_session(self, uint64_t index, uint32_t entry, uint64_t session, bytes value) except -1
    cdef int add(
        self, const uint8_t *key, size_t size, uint64_t hashed, int64_t delta, int64_t initial, int64_t *total
    ) except -1
    cdef int write(self, const Step *step) except -1
    cdef int write_number(self, const Step *step, int64_t number) except -1
    cdef int64_t remove_range(self, uint64_t index, uint32_t entry, bytes start, bytes end) except -1
    cdef int write_bytes(self, uint64_t index, uint32_t entry, bytes key, bytes value) except -1
    cdef void take_back(self, size_t mark) noexcept
    cdef list keys_between(self, bytes start, bytes end)
    cdef int resize(self, size_t slots) except -1
    cdef Pending *slot_of(self, bint session, const uint8_t *key, size_t size, uint64_t hashed) noexcept nogil
