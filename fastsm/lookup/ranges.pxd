from libc.stdint cimport uint8_t, uint64_t

from fastsm.lookup.order cimport Moment, Order
from fastsm.lookup.tree cimport Node, Walk

cdef void start(Order order, Walk *walk, bytes start, bytes stop, bint reverse) noexcept
cdef size_t collect(
    Order order, Walk *walk, uint64_t *found, size_t room, size_t looks, Moment moment) noexcept
cdef void forget_gone(Order order) noexcept
cdef int check_order(Order order) except -1


cdef class OrderedView:
    # Invariant: `root` is the order's tree at `moment`, which contains all keys, and never changes.
    cdef Order order                    # None: not begun, or finished
    cdef Moment moment
    cdef Node *root
    cdef Walk walk                      # what is left of the range
    cdef int begin(self, Order order, uint64_t end, bytes low, bytes high, bint reverse) except -1
    cdef size_t take(self, uint64_t *found, size_t room) except? 0xFFFFFFFFFFFFFFFF
    cdef uint64_t count(self) except? 0xFFFFFFFFFFFFFFFF
    cdef size_t count_stale(self, uint64_t *stale, size_t count) noexcept
    cdef void finish(self) noexcept
