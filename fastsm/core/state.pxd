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
    CALLING = 16              # value of `gate` only: a procedure is running


cdef class State:
    # Invariant: durable <= framed <= applied, as log ids. The index is determined by the base, the log up to `log.end`,
    # and `runs`: the applied entries that are in no frame yet.
    cdef readonly Log _log
    cdef readonly Index _index
    cdef readonly Table _table     # those of the index, as is `_terms`: saves `get` one indirection
    cdef readonly Terms _terms
    cdef RunList runs
    cdef uint32_t runs_in_terms    # how many of `runs` are in the terms already
    cdef Mapping mapping           # the mapping that `arena` points into: both change together
    cdef const uint8_t *arena
    cdef uint64_t readable         # bytes of the arena: no record may extend past it, whatever its length field says
    # Identifies the state: the high half counts resets and installs, the low half compactions since the last of them.
    # It changes together with log, index and last applied, so a caller that captured it can tell whether they changed.
    cdef readonly uint64_t _epoch
    cdef readonly bint _verified   # every byte of base and log was checked or written by this process
    cdef Awaited awaited           # tickets of callers that wait for an entry to be applied
    cdef readonly Watchers _watchers    # watches that wait for a change
    cdef int status
    cdef int gate                  # checked first by every call: 0 means go on, otherwise call `refuse`
    cdef unsigned long calling     # the thread that runs procedures at the moment, or 0
    cdef bint ran                  # with CORRUPT: whether the machine was running when the damage was found
    cdef object corruption         # the error that a background verification has found
    cdef bint sync_on_apply
    cdef uint64_t applied_index, applied_term
    cdef uint64_t framed_index, framed_term
    cdef uint64_t durable_index, durable_term
    cdef object metadata           # the metadata of the latest snapshot
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
