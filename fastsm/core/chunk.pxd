from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from fastsm.command cimport Operation
from fastsm.lookup.table cimport Table
from fastsm.lookup.terms cimport RunList, Terms

cdef enum:  # outcomes
    REFUSED = 0
    APPLIED = 1
    SKIPPED = 2

ctypedef struct Step:
    # One operation of a chunk.
    Operation operation
    uint64_t hashed       # of its key
    uint64_t index        # of its entry
    uint64_t place        # where its record goes
    uint32_t entry        # position of its entry in the chunk
    int32_t shadowed      # while judging: the step that wrote its key before it in this chunk, or -1
    uint8_t record        # the operation of its record, 0: it leaves none

ctypedef struct Pending:
    # A key that this chunk writes.
    uint64_t hashed
    int32_t owner         # a step with that key, -1: an empty slot
    int32_t latest        # the last step that wrote it, -1: none that counts


cdef class Chunk:
    cdef Step *steps
    cdef size_t count
    cdef size_t room
    cdef uint8_t *outcomes       # one for each entry
    cdef size_t entries
    cdef size_t outcome_room
    cdef Pending *pending        # while judging; pending_mask + 1 slots
    cdef size_t pending_mask
    cdef bint conditional        # it has a compare-and-swap
    cdef uint64_t damaged        # after judging: a record by which nothing can be judged; 0: none
    cdef uint64_t puts
    cdef uint64_t record_bytes
    cdef list converted          # commands that were not bytes: the steps point into them

    cdef int decode(
        self, tuple entries, Table table, Terms terms, RunList runs, bint contiguous) except -1
    cdef int decode_entry(self, object command, uint64_t index, Table table) except -1
    cdef int begin(self, size_t count) except -1
    cdef int grow(self) except -1
    cdef int open_pending(self) except -1
    cdef void take_back(self, size_t first, size_t failed, size_t stop) noexcept
    cdef int judge(self, Table table, const uint8_t *arena, uint64_t readable) except -1
    cdef bint matches(
        self, Step *step, Table table, const uint8_t *arena, uint64_t readable) noexcept nogil
    cdef Pending *pending_slot(self, Step *step) noexcept nogil
    cdef void lay_out(self, uint64_t place) noexcept nogil
    cdef void write_records(self, uint8_t *p) noexcept nogil
    cdef list results(self)
    cdef void forget(self) noexcept


cdef tuple hold_entries(object chunk)
cdef uint64_t unsigned_slowly(object item, str what) except? 0xFFFFFFFFFFFFFFFF
