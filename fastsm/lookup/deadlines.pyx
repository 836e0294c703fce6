"""Deadlines: which key, or which session, is due next.

A heap of (deadline, place) items, eight bytes each:

    item    | rough deadline, 28 bits | place / 8, 36 bits |

Rough deadlines rise with deadlines: they are relative to a base, exact for the first two hours, and then accurate to
one part in four million. If two are equal, the deadlines in the records decide. A deadline that its key or session no
longer has is *stale*: it stays in the heap until it reaches the top, or until more than two fifths of all are stale and
the index filters the heap. Equal deadlines are ordered by key, so that ticks remove keys in the same order on every
replica.
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
    SMALLEST = 16
    MANTISSA_BITS = 22       # bits of a rough deadline; the rest are its exponent
    EARLIER = 1 << 20        # milliseconds between the base and the first deadline, in case later ones are due earlier
    FEW_EARLIER = 64         # up to this many deadlines before the base, the base is kept
    KEPT = 1 << 12           # memory for this many positions is kept for the next walk

cdef uint64_t FAR = <uint64_t>1 << 33  # milliseconds from the base; beyond it, rough deadlines are too inaccurate


cdef class Deadlines:
    """A heap of deadlines, the earliest first.

    Thread safety: none of its own, like the index.
    """

    def __cinit__(self, bint by_number=False):
        self.by_number = by_number

    def __dealloc__(self):
        free(self.items)

    def __repr__(self):
        return f"<Deadlines: {self.count}, {self.stale} of them stale>"

    cdef bint is_before(self, const uint8_t *arena, uint64_t one, uint64_t other) noexcept nogil:
        """Returns whether one item is due before another; exact, whatever the base is."""
        cdef uint64_t own, foreign
        if (one ^ other) >> PLACE_BITS:
            return one < other
        own, foreign = self.deadline_of(arena, place_of(one)), self.deadline_of(arena, place_of(other))
        if own != foreign:
            return own < foreign
        return self.order_of(arena, place_of(one), place_of(other)) < 0

    cdef uint64_t deadline_of(self, const uint8_t *arena, uint64_t place) noexcept nogil:
        """Returns the deadline in the record at a place; 0 if a saved table gave a wrong place."""
        cdef const uint8_t *record = arena + place
        if self.by_number:
            if place < self.doubtful < place + RECORD_KEY + SESSION_ID_SIZE + SESSION_DEADLINE + 8:
                return 0
            return session_deadline(record)
        return 0 if place < self.doubtful < place + record_length(record) else record_deadline(record)

    cdef uint64_t item_of(self, uint64_t deadline, uint64_t place) noexcept nogil:
        return rough(deadline, self.base) << PLACE_BITS | place >> 3

    cdef void begin_at(self, const uint8_t *arena, uint64_t deadline) noexcept nogil:
        """Sets the base shortly before a deadline. Does not change the order. O(deadlines)."""
        cdef uint64_t place
        cdef size_t i
        self.base = deadline - EARLIER if deadline > EARLIER else 0
        self.earlier = 0
        for i in range(self.count):
            place = place_of(self.items[i])
            self.items[i] = self.item_of(self.deadline_of(arena, place), place)

    cdef int order_of(self, const uint8_t *arena, uint64_t one, uint64_t other) noexcept nogil:
        """Compares the keys (or ids) of two records: < 0, 0 or > 0."""
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
        """Ensures that pushing `more` deadlines needs no memory."""
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
            room = 2 * wanted  # after many removals
        else:
            return 0
        items = <uint64_t *>realloc(self.items, room * sizeof(uint64_t))
        if items == NULL:
            return -1 if wanted > self.room else 0
        self.items = items
        self.room = room
        return 0

    cdef int push(self, const uint8_t *arena, uint64_t deadline, uint64_t place) noexcept nogil:
        """Adds a deadline; returns -1 if there is no memory, which `reserve` prevents."""
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

    cdef void drop(self, const uint8_t *arena, const uint64_t *positions, size_t count) noexcept nogil:
        """Removes the items at rising positions, which must include the parent of each of them (except of the top).

        The last position is filled first, so that an item sinks from there instead of from the top of the heap.
        """
        self.version += 1
        while count:
            count -= 1
            self.count -= 1
            if positions[count] < self.count:
                self.items[positions[count]] = self.items[self.count]
                self.sink(arena, positions[count])

    cdef void sink(self, const uint8_t *arena, size_t i) noexcept nogil:
        """Moves the item at `i` down until none below it is due before it."""
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
        """Keeps the first `count` items, which may be in any order, and makes a heap of them. O(count)."""
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
        """Takes saved items; returns 0 unless they form a heap, with valid deadlines, and valid places below `stop`."""
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
    """Returns 28 bits that rise with the deadline: the time since the base, as a floating-point number."""
    cdef uint64_t later = deadline - base if deadline > base else 0
    cdef uint64_t shift
    if later >> (MANTISSA_BITS + 1) == 0:
        return later
    shift = 63 - MANTISSA_BITS - leading_zeros(later)
    return (shift << MANTISSA_BITS) + (later >> shift)


cdef class DueWalk:
    """A walk over deadlines in their order, which changes none of them. O(log of those passed) per step."""

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
        """Releases the deadlines, and frees large memory."""
        self.deadlines = None
        self.count = 0
        if self.room > KEPT:
            free(self.frontier)
            self.frontier = NULL
            self.room = 0

    cdef bint holds(self) noexcept:
        """Returns whether no item has moved since the walk began: a reader may have removed stale ones."""
        return self.deadlines is not None and self.version == self.deadlines.version

    cdef uint64_t first(self) noexcept:
        """Returns the place of the earliest deadline that was not passed; 0 at the end."""
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
