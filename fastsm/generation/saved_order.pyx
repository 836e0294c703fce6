"""The order of the keys in a saved table: the places of their newest records, sorted by key.

    order  ─►  a view of all keys at one moment  ─►  places  ─►  file
    file   ─►  places, all of which are in the table  ─►  order

An order is derived data, so one that does not match the table exactly is ignored, and built again for the first read
that needs it.
"""

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from fastsm.disk.format cimport FRAME_RUNS, LOG_HEADER_SIZE, RECORD_KEY
from fastsm.lookup.order cimport FEW_NEW, Order
from fastsm.lookup.table cimport PLACE_MASK, SEGMENT_SLOTS, Segment, Table

cdef enum:
    PIECE = 1 << 17           # places that are written between two ticks


# ---- save ----------------------------------------------------------------------------------------------

cdef HeldOrder hold_order(Index index, uint64_t end, bint at_once, tick):
    """Captures the order of an index, to be saved; None if the order is not in use, or there is no memory.

    `end`: the place after the last record. If there are many new keys, they are first sorted in, without the GIL, with
    calls of `tick()`. With `at_once` no Python code runs: many new keys are then not sorted in, and None is returned.
    O(new keys).
    """
    cdef HeldOrder held
    cdef Order order = index.order
    if not index.ordered or index.table.count == 0 or (at_once and order.waiting() > FEW_NEW):
        return None
    held = HeldOrder()
    try:
        if order.waiting() > FEW_NEW:
            order.catch_up(tick)
        if not order.built:
            return None
        order.absorb()
        held.view.begin(order, end, None, None, False)
    except MemoryError:
        return None
    held.count = index.table.count
    return held


cdef class HeldOrder:
    """All keys in their order at one moment, unaffected by later writes.

    Thread safety: used by one thread.
    """

    def __cinit__(self):
        self.view = OrderedView()

    def __dealloc__(self):
        free(self.places)

    cdef bint gather(self, tick) except -1:
        """Collects the newest place of each key; False if keys are missing, or there is no memory for them.

        O(keys), under the GIL between two ticks. To be called once.
        """
        cdef uint64_t found = 0
        try:
            self.places = <uint64_t *>malloc((self.count + 1) * sizeof(uint64_t))
            if self.places == NULL:
                return False
            while not self.view.walk.done and found <= self.count:
                try:
                    found += self.view.take(self.places + found, self.count + 1 - found)
                except MemoryError:
                    return False
                tick()
            return found == self.count
        finally:
            self.view.finish()

    cdef int write(self, directory, descriptor, uint64_t offset, tick) except -1:
        """Writes the places that were gathered."""
        cdef uint64_t first = 0
        cdef uint64_t size
        while first < self.count:
            size = min(self.count - first, <uint64_t>PIECE)
            piece = PyMemoryView_FromMemory(
                <char *>(self.places + first), <ssize_t>(size * sizeof(uint64_t)), PyBUF_READ)
            offset = directory.write_paced(descriptor, piece, offset)
            first += size
            tick()
        return 0


# ---- load ----------------------------------------------------------------------------------------------

cdef bint take_order(
    Index index, Mapping mapping, const uint64_t *places, uint64_t count, uint64_t stop
) except -1:
    """Gives an index the order that was saved with its table; returns False if the two do not match.

    O(places), without the GIL. The keys are not read: the places were saved in the order of their keys, and the
    checksum shows that they are as they were saved.
    """
    cdef bint sound
    with nogil:
        sound = places_are_sound(places, count, stop) and sum_of(places, count) == sum_of_table(index.table)
    if sound:
        index.begin_order(mapping)
        index.order.take_sorted(places, count)
    return sound


cdef bint places_are_sound(const uint64_t *places, uint64_t count, uint64_t stop) noexcept nogil:
    """Returns whether each place is a multiple of 8 within the arena's records, below `stop`."""
    cdef uint64_t least = LOG_HEADER_SIZE + FRAME_RUNS  # the header of a base is larger
    cdef uint64_t greatest = stop - RECORD_KEY
    cdef uint64_t outside = 0
    cdef uint64_t odd = 0
    cdef uint64_t i
    if stop < least + RECORD_KEY:
        return False
    for i in range(count):
        # By sign bits, so that the compiler can vectorize it. A place with the highest bit set is above `stop`.
        outside |= (places[i] - least) | (greatest - places[i]) | places[i]
        odd |= places[i]
    return outside >> 63 == 0 and odd & 7 == 0


cdef uint64_t sum_of(const uint64_t *places, uint64_t count) noexcept nogil:
    cdef uint64_t total = 0
    cdef uint64_t i
    for i in range(count):
        total += places[i]
    return total


cdef uint64_t sum_of_table(Table table) noexcept nogil:
    """Returns the sum of a table's places, which differs for an order of another moment or generation."""
    cdef Segment *segment
    cdef uint64_t mask = PLACE_MASK  # a local variable stays in a register
    cdef uint64_t total = 0
    cdef uint32_t number
    cdef size_t i
    for number in range(table.segment_count):
        segment = table.segment_at(number)
        for i in range(SEGMENT_SLOTS):
            total += segment.slots[i] & mask
    return total << 3
