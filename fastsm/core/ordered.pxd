from libc.stdint cimport uint8_t, uint64_t

from fastsm.core.state cimport State
from fastsm.disk.mapping cimport Mapping
from fastsm.lookup.index cimport Index
from fastsm.lookup.order cimport Order
from fastsm.lookup.ranges cimport OrderedView

cdef enum:
    PIECE = 64                # pairs that an iterator fetches at a time


cdef class OrderedPairs:
    cdef OrderedView view               # None: the range is empty
    cdef Mapping mapping
    cdef object log                     # holds the files that are mapped into the arena
    cdef uint64_t readable              # no record may extend past this offset; 0: all records were checked
    cdef readonly uint64_t revision     # the last applied index
    cdef uint64_t found[PIECE]
    cdef size_t at, count


cdef class Ordered(State):
    cdef bint order_wanted              # the order was used, now or earlier, so the next generation builds it too
    cdef bint order_called              # a thread that sorts new keys in was started, and is not done
    cdef Order fresh_order(self, bint in_turn=*)
    cdef OrderedPairs view_of(self, bytes low, bytes high, bint reverse)
    cdef object scan_range(self, bytes low, bytes high, object limit, bint reverse)
    cdef uint64_t unchecked(self) noexcept
    cdef OrderedView range_in_turn(self, bytes low, bytes high, bint reverse)
