from libc.stdint cimport uint8_t, uint64_t

from fastsm.core.state cimport State
from fastsm.disk.mapping cimport Mapping
from fastsm.lookup.index cimport Index
from fastsm.lookup.order cimport Order
from fastsm.lookup.ranges cimport OrderedView

cdef enum:
    PIECE = 64                # pairs that an iterator takes at a time


cdef class OrderedPairs:
    cdef OrderedView view               # None: the range is empty
    cdef Mapping mapping
    cdef object log                     # which knows the files that are in the arena
    cdef uint64_t readable              # no record may reach beyond; 0: all of them were checked
    cdef readonly uint64_t revision     # the last applied index
    cdef uint64_t found[PIECE]
    cdef size_t at, count


cdef class Ordered(State):
    cdef bint order_wanted              # it was asked for, now or earlier: the next generation gets one, too
    cdef bint order_called              # a thread sorts new keys in, or will
    cdef Order fresh_order(self, bint in_turn=*)
    cdef OrderedPairs view_of(self, bytes low, bytes high, bint reverse)
    cdef object scan_range(self, bytes low, bytes high, object limit, bint reverse)
    cdef uint64_t unchecked(self) noexcept
    cdef OrderedView range_in_turn(self, bytes low, bytes high, bint reverse)
