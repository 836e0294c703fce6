from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint64_t

from fastsm.command cimport Reader
from fastsm.core.ordered cimport Ordered
from fastsm.core.judging cimport APPLIED, Judge, REFUSED, SKIPPED
from fastsm.core.view cimport Step
from fastsm.disk.descriptors cimport Part
from fastsm.lookup.table cimport Table
from fastsm.lookup.terms cimport RunList, Terms


cdef enum:
    FEW = 4                      # a list of up to this many entries is held entry by entry
    LARGE_VALUE = 4 << 10        # a value of at least this many bytes is written without being copied into the frame

ctypedef struct Held:
    # The entries of a chunk as they were at one moment. It owns a reference to each entry, or to a tuple of all.
    PyObject **items
    Py_ssize_t count
    PyObject *whole              # NULL: the entries are in `few`
    PyObject *few[FEW]


cdef class Chunk:
    cdef Step *steps
    cdef size_t count
    cdef size_t room
    cdef uint8_t *outcomes       # one for each entry
    cdef size_t entries
    cdef size_t outcome_room
    cdef bint conditional        # some command reads the state before it writes
    cdef bint calls              # some command calls a procedure
    cdef readonly Judge judgement
    cdef tuple source            # the entries of a conditional chunk
    cdef uint64_t puts
    cdef uint64_t sessions       # records of sessions
    cdef uint64_t touches        # records of touches
    cdef uint64_t deadlines      # records of keys that have a deadline
    cdef uint64_t record_bytes
    cdef uint64_t large_bytes    # the part of `record_bytes` that is large values
    cdef size_t large_values
    cdef Part *parts             # the parts of a frame whose large values are written without being copied
    cdef list converted          # copies of commands that were not bytes objects: steps point into these

    cdef int decode(
        self, PyObject **items, Py_ssize_t count, Table table, Terms terms, RunList runs, bint contiguous
    ) except -1
    cdef int decode_entry(self, object command, uint64_t index, Table table) except -1
    cdef int begin(self, size_t count) except -1
    cdef int grow(self) except -1
    cdef int add_heads(self, const Reader *reader, uint64_t index) except -1
    cdef Step *add_head(self, uint8_t kind, uint64_t index) except NULL
    cdef int take_answering(self, Step *step, uint8_t form, Table table) except -1
    cdef int judge(self, Ordered owner) except -1
    cdef void lay_out(self, uint64_t place) noexcept nogil
    cdef void write_records(self, uint8_t *p) noexcept nogil
    cdef int reserve_parts(self) except -1
    cdef size_t write_around(self, uint8_t *frame, uint8_t *p) noexcept nogil
    cdef list results(self)
    cdef void forget(self) noexcept


cdef int hold(object chunk, Held *held) except -1
cdef void let_go(Held *held) noexcept
cdef tuple hold_entries(object chunk)
cdef uint64_t unsigned_slowly(object item, str what) except? 0xFFFFFFFFFFFFFFFF
