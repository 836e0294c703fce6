cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.core.awaited cimport Awaited
from fastsm.core.frozen cimport Frozen
from fastsm.core.watchers cimport Watchers
from fastsm.lookup.index cimport BLOCK, Index
from fastsm.generation.log cimport Log
from fastsm.disk.mapping cimport Mapping
from fastsm.lookup.table cimport Table
from fastsm.lookup.terms cimport RunList, Terms

cdef enum:  # status
    RUNNING = 0
    STOPPED = 1
    CLOSED = 2
    FORKED = 3
    CORRUPT = 4
    CALLING = 16              # of the gate: a procedure is running


cdef class State:
    # Invariant: durable <= framed <= applied, as log ids. The index is a function of the base, of the log below
    # `log.end`, and of `runs`: the applied entries that no frame carries yet.
    cdef readonly Log _log
    cdef readonly Index _index
    cdef readonly Table _table     # of the index, as are the terms: one step less on the way of `get`
    cdef readonly Terms _terms
    cdef RunList runs
    cdef uint32_t runs_in_terms    # of these, as many are in the terms already
    cdef Mapping mapping           # what `arena` leads into: both change together
    cdef const uint8_t *arena
    cdef uint64_t readable         # bytes of the arena: no record reaches beyond, whatever it says
    # Which state this is: the high half counts resets and installs, the low half compactions since. It changes in
    # the step that changes log, index and last applied, so a caller that captured it with them knows whether they hold.
    cdef readonly uint64_t _epoch
    cdef readonly bint _verified   # every byte of base and log was checked, or written, by this process
    cdef Awaited awaited           # who waits for an entry to be applied
    cdef readonly Watchers _watchers    # who waits for a change
    cdef int status
    cdef int gate                  # what every call looks at first: 0 when it may go on, else `refuse` knows
    cdef unsigned long calling     # the thread on which procedures run at this moment, or 0
    cdef bint ran                  # when that was found, it was running
    cdef object corruption         # what a verification in the background has found
    cdef bint sync_on_apply
    cdef uint64_t applied_index, applied_term
    cdef uint64_t framed_index, framed_term
    cdef uint64_t durable_index, durable_term
    cdef object metadata           # of the latest snapshot
    cdef bint metadata_unsaved

    cdef int refuse(self) except -1
    cdef void set_gate(self) noexcept

    @cython.final
    cdef object value_at(self, uint64_t place)
    cdef uint64_t dead_bytes(self) noexcept
    cdef int damaged(self, uint64_t place) except -1
    cdef uint64_t find(self, const uint8_t *key, size_t size) noexcept nogil
    cdef uint64_t find_key(self, bytes key) noexcept
    cdef int find_block(self, list keys, Py_ssize_t first, Py_ssize_t count, uint64_t *places) except -1
    cdef Frozen freeze(self)
    cdef void take_arena(self) noexcept
    cdef void map_order(self) noexcept
