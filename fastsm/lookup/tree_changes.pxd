from libc.stdint cimport uint32_t, uint64_t

from fastsm.lookup.tree cimport Child, Node, Work

ctypedef struct Children:
    # Nodes that will be the children of one or several nodes.
    Child *items
    size_t count, room


cdef int insert(Work *work, Node **root, const uint64_t *places, size_t count) noexcept nogil
cdef int remove(Work *work, Node **root, const uint64_t *places, size_t count) noexcept nogil
cdef int make_leaves(const uint64_t *places, size_t count, Children *out) noexcept nogil
cdef int make_root(Children *list, uint32_t level, Node **root) noexcept nogil
cdef void release_all(Children *children) noexcept nogil
