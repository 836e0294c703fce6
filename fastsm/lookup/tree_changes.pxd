from libc.stdint cimport uint64_t

from fastsm.lookup.tree cimport Node, Work

cdef int insert(Work *work, Node **root, const uint64_t *places, size_t count) noexcept nogil
cdef int remove(Work *work, Node **root, const uint64_t *places, size_t count) noexcept nogil
