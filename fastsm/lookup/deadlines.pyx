"""Deadlines: which key, or which session, is due next.

A heap of (deadline, place), eight bytes each:

    item    | rough deadline, 28 bits | place / 8, 36 bits |

Rough deadlines ascend with deadlines: they are counted from a base, exact for the first two hours, then to a four
millionth. Where two are equal, the records say which is earlier. What is overtaken stays in the heap until it comes to
the top, or until a quarter of all is stale: then the index filters it. Equal deadlines are in the order of their keys,
so that the order in which a tick removes is the same on every replica.
"""

from libc.stdlib cimport free, realloc
from libc.string cimport memcmp

from fastsm.disk.format cimport (
    LATEST_DEADLINE, RECORD_KEY, SESSION_DEADLINE, SESSION_ID_SIZE, record_deadline, record_key, record_key_size,
    record_length, session_deadline,
)
from fastsm.disk.hashing cimport load64
from fastsm.lookup.table cimport PLACE_BITS, place_of

cdef extern from *:
    """
    #define fastsm_leading_zeros(word) __builtin_clzll(word)
    """
    int leading_zeros "fastsm_leading_zeros"(uint64_t word) noexcept nogil

cdef enum:
    CHILDREN = 4             # of an item: they are on one cache line
    SMALLEST = 16
    MANTISSA_BITS = 22       # of a rough deadline: the others are its exponent
    EARLIER = 1 << 20        # milliseconds from the base to the first deadline: others may be earlier
    FEW_EARLIER = 64         # deadlines before the base that are not worth another one
    KEPT = 1 << 12           # positions, for which memory stays for the next walk

cdef uint64_t FAR = <uint64_t>1 << 33  # milliseconds from the base, beyond which rough deadlines are too rough


cdef class Deadlines:
    """What is due, the earliest first.

    Thread safety: none of its own, as the index.
    """

    def __cinit__(self, bint by_number=False):
        self.by_number = by_number

    def __dealloc__(self):
        free(self.items)

    def __repr__(self):
        return f"<Deadlines: {self.count}, {self.stale} of them stale>"

    cdef bint is_before(self, const uint8_t *arena, uint64_t one, uint64_t other) noexcept nogil:
        """Whether an item is due before another one: exact, whatever the base is."""
        cdef uint64_t own, foreign
        if (one ^ other) >> PLACE_BITS:
            return one < other
        own, foreign = self.deadline_of(arena, place_of(one)), self.deadline_of(arena, place_of(other))
        if own != foreign:
            return own < foreign
        return self.order_of(arena, place_of(one), place_of(other)) < 0

    cdef uint64_t deadline_of(self, const uint8_t *arena, uint64_t place) noexcept nogil:
        """The deadline that the record at a place says; 0 where a saved table lies about it."""
        cdef const uint8_t *record = arena + place
        if self.by_number:
            if place < self.doubtful < place + RECORD_KEY + SESSION_ID_SIZE + SESSION_DEADLINE + 8:
                return 0
            return session_deadline(record)
        return 0 if place < self.doubtful < place + record_length(record) else record_deadline(record)

    cdef uint64_t item_of(self, uint64_t deadline, uint64_t place) noexcept nogil:
        return rough(deadline, self.base) << PLACE_BITS | place >> 3

    cdef void begin_at(self, const uint8_t *arena, uint64_t deadline) noexcept nogil:
        """Counts rough deadlines from before this one. Their order stays. O(deadlines)."""
        cdef uint64_t place
        cdef size_t i
        self.base = deadline - EARLIER if deadline > EARLIER else 0
        self.earlier = 0
        for i in range(self.count):
            place = place_of(self.items[i])
            self.items[i] = self.item_of(self.deadline_of(arena, place), place)

    cdef int order_of(self, const uint8_t *arena, uint64_t one, uint64_t other) noexcept nogil:
        """The order of the keys, or ids, of two records: below 0, 0, or above."""
        cdef uint64_t own, foreign
        cdef size_t size, other_size
        cdef int order
        if self.by_number:
            own, foreign = load64(record_key(arena + one)), load64(record_key(arena + other))
            return (own > foreign) - (own < foreign)
        size, other_size = record_key_size(arena + one), record_key_size(arena + other)
        if one < self.doubtful and one + RECORD_KEY + size > self.doubtful:
            size = 0
        if other < self.doubtful and other + RECORD_KEY + other_size > self.doubtful:
            other_size = 0
        order = memcmp(record_key(arena + one), record_key(arena + other), min(size, other_size))
        return order if order else (size > other_size) - (size < other_size)

    cdef int reserve(self, size_t more) except -1:
        """Makes sure that as many can be pushed without memory."""
        if self.make_room(more) < 0:
            raise MemoryError(f"no memory for {self.count + more} deadlines")
        return 0

    cdef int make_room(self, size_t more) noexcept nogil:
        cdef size_t wanted = self.count + more
        cdef size_t room = self.room
        cdef uint64_t *items
        if wanted > room:
            room = wanted + wanted / 2 + SMALLEST
        elif room > 4 * wanted + 4 * SMALLEST:
            room = 2 * wanted  # many were removed
        else:
            return 0
        items = <uint64_t *>realloc(self.items, room * sizeof(uint64_t))
        if items == NULL:
            return -1 if wanted > self.room else 0
        self.items = items
        self.room = room
        return 0

    cdef int push(self, const uint8_t *arena, uint64_t deadline, uint64_t place) noexcept nogil:
        """Adds one; -1 without memory, which `reserve` prevents."""
        cdef uint64_t added
        cdef size_t i = self.count
        cdef size_t parent
        if self.count == self.room and self.make_room(1) < 0:
            return -1
        self.earlier += deadline < self.base
        if i == 0:
            self.begin_at(arena, deadline)
        elif self.earlier > i / 8 + FEW_EARLIER:
            self.begin_at(arena, min(deadline, self.deadline_of(arena, place_of(self.items[0]))))
        added = self.item_of(deadline, place)
        self.count += 1
        self.version += 1
        while i:
            parent = (i - 1) / CHILDREN
            if not self.is_before(arena, added, self.items[parent]):
                break
            self.items[i] = self.items[parent]
            i = parent
        self.items[i] = added
        return 0

    cdef void drop_first(self, const uint8_t *arena) noexcept nogil:
        self.version += 1
        self.count -= 1
        if self.count:
            self.items[0] = self.items[self.count]
            self.sink(arena, 0)

    cdef void sink(self, const uint8_t *arena, size_t i) noexcept nogil:
        """Moves the item at `i` down to where none below it is due before it."""
        cdef uint64_t moved = self.items[i]
        cdef size_t child, least, stop
        while True:
            child = CHILDREN * i + 1
            if child >= self.count:
                break
            stop = min(child + CHILDREN, self.count)
            least = child
            for child in range(least + 1, stop):
                if self.is_before(arena, self.items[child], self.items[least]):
                    least = child
            if not self.is_before(arena, self.items[least], moved):
                break
            self.items[i] = self.items[least]
            i = least
        self.items[i] = moved

    cdef void keep(self, const uint8_t *arena, size_t count) noexcept nogil:
        """The first `count` items are all that count, in any order: makes a heap of them. O(count)."""
        cdef uint64_t first
        cdef size_t i
        self.version += 1
        self.count = count
        self.stale = 0
        if count < 2:
            return
        i = (count - 2) / CHILDREN + 1
        while i:
            i -= 1
            self.sink(arena, i)
        first = self.deadline_of(arena, place_of(self.items[0]))
        if first > self.base + FAR:
            self.begin_at(arena, first)

    cdef int take_saved(self, const uint8_t *data, size_t count, uint64_t stop) except -1:
        """Takes items as they were in memory; 0 when they are not sound: their places lie below `stop`."""
        cdef uint64_t deadline, place
        cdef size_t i
        self.reserve(count)
        for i in range(count):
            deadline, place = load64(data + i * sizeof(Due)), load64(data + i * sizeof(Due) + 8)
            if place & 7 or not RECORD_KEY <= place <= stop - RECORD_KEY - 8:
                return 0
            if deadline > LATEST_DEADLINE:
                return 0
            if i and deadline < load64(data + (i - 1) / CHILDREN * sizeof(Due)):
                return 0
            if i == 0:
                self.begin_at(NULL, deadline)
            self.items[i] = self.item_of(deadline, place)
        self.count = count
        self.doubtful = stop
        return 1


cdef inline uint64_t rough(uint64_t deadline, uint64_t base) noexcept nogil:
    """28 bits that ascend with the deadline: what comes after the base, as a number with a short mantissa."""
    cdef uint64_t later = deadline - base if deadline > base else 0
    cdef uint64_t shift
    if later >> (MANTISSA_BITS + 1) == 0:
        return later
    shift = 63 - MANTISSA_BITS - leading_zeros(later)
    return (shift << MANTISSA_BITS) + (later >> shift)


cdef class DueWalk:
    """A way over deadlines in their order that changes nothing. O(log of those passed) for each."""

    def __dealloc__(self):
        free(self.frontier)

    cdef int begin(self, Deadlines deadlines) except -1:
        self.deadlines = deadlines
        self.version = deadlines.version
        self.count = 0
        if deadlines.count:
            self.enter(NULL, 0)
        return 0

    cdef void end(self) noexcept:
        """Lets go of the deadlines, and gives large memory back."""
        self.deadlines = None
        self.count = 0
        if self.room > KEPT:
            free(self.frontier)
            self.frontier = NULL
            self.room = 0

    cdef bint holds(self) noexcept:
        """Whether nothing has moved since it began: a reader may have taken off what was stale."""
        return self.deadlines is not None and self.version == self.deadlines.version

    cdef uint64_t first(self) noexcept:
        """The place of what is due first of all that was not passed; 0 at the end."""
        return place_of(self.deadlines.items[self.frontier[0]]) if self.count else 0

    cdef bint is_before(self, const uint8_t *arena, size_t i, size_t j) noexcept:
        return self.deadlines.is_before(arena, self.deadlines.items[i], self.deadlines.items[j])

    cdef int pass_first(self, const uint8_t *arena) except -1:
        cdef size_t passed = self.frontier[0]
        cdef size_t moved, child, i
        self.count -= 1
        moved = self.frontier[self.count]
        i = 0
        while True:
            child = 2 * i + 1
            if child >= self.count:
                break
            if child + 1 < self.count and self.is_before(arena, self.frontier[child + 1], self.frontier[child]):
                child += 1
            if not self.is_before(arena, self.frontier[child], moved):
                break
            self.frontier[i] = self.frontier[child]
            i = child
        if self.count:
            self.frontier[i] = moved
        for child in range(CHILDREN * passed + 1, min(CHILDREN * passed + 1 + CHILDREN, self.deadlines.count)):
            self.enter(arena, child)
        return 0

    cdef int enter(self, const uint8_t *arena, size_t position) except -1:
        cdef size_t *grown
        cdef size_t i = self.count
        cdef size_t parent
        if self.count == self.room:
            grown = <size_t *>realloc(self.frontier, (2 * self.room + SMALLEST) * sizeof(size_t))
            if grown == NULL:
                raise MemoryError(f"no memory to look at {self.count} deadlines")
            self.frontier = grown
            self.room = 2 * self.room + SMALLEST
        self.count += 1
        while i:
            parent = (i - 1) / 2
            if not self.is_before(arena, position, self.frontier[parent]):
                break
            self.frontier[i] = self.frontier[parent]
            i = parent
        self.frontier[i] = position
        return 0
