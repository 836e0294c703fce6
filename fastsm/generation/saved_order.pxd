from libc.stdint cimport uint64_t

from fastsm.disk.mapping cimport Mapping
from fastsm.lookup.index cimport Index
from fastsm.lookup.ranges cimport OrderedView

cdef HeldOrder hold_order(Index index, uint64_t end, bint at_once, tick)
cdef bint take_order(
    Index index, Mapping mapping, const uint64_t *places, uint64_t count, uint64_t stop) except -1


cdef class HeldOrder:
    cdef OrderedView view               # a view of all keys at one moment
    cdef readonly uint64_t count        # the number of keys at that moment
    cdef uint64_t *places               # NULL: not gathered yet
    cdef bint gather(self, tick) except -1
    cdef int write(self, directory, descriptor, uint64_t offset, tick) except -1
