cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.core.frozen cimport Frozen
from fastsm.core.status cimport Status
from fastsm.lookup.index cimport BLOCK, Index
from fastsm.generation.log cimport Log
from fastsm.disk.mapping cimport Mapping
from fastsm.lookup.table cimport Table
from fastsm.lookup.terms cimport RunList, Terms

cdef class State(Status):
    # Invariant: durable <= framed <= applied, as log ids. The index is determined by the base, the log up to `log.end`,
    # and `runs`: the applied entries that are in no frame yet.
    cdef readonly Log _log
    cdef readonly Index _index
    cdef readonly Table _table     # these two are those of the index: saves `get` one indirection
    cdef readonly Terms _terms
    cdef RunList runs
    cdef uint32_t runs_in_terms    # how many of `runs` are in the terms already
    cdef Mapping mapping           # the mapping that `arena` points into: both change together
    cdef const uint8_t *arena
    cdef uint64_t readable         # bytes of the arena: no record may extend past it, whatever its length field says
    cdef bint sync_on_apply
    cdef uint64_t applied_index, applied_term
    cdef uint64_t framed_index, framed_term
    cdef uint64_t durable_index, durable_term
    cdef object metadata           # the metadata of the latest snapshot
    cdef bint metadata_unsaved

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
