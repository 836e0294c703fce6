from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp

from fastsm.disk.format cimport record_key, record_key_size

cdef enum:
    SORT_SLICE = 1 << 17     # steps between two checks for signals: a few milliseconds
    STACK = 128

ctypedef struct Item:
    # A record to be sorted. Afterwards `place` is 0 if a later record of the same key replaces it.
    uint64_t head         # eight bytes of its key, as a number
    uint64_t place

ctypedef struct Span:
    # Items [first, stop), whose keys agree in the first `depth` bytes.
    size_t first, stop
    size_t at             # progress within this phase
    size_t less, greater  # while splitting: items below the pivot end at `less`, items above it start at `greater`
    uint64_t pivot
    uint32_t depth
    uint32_t shared       # bytes after `depth` in which the keys seen so far agree
    uint32_t phase
    uint32_t by_size      # the heads contain sizes; equal ones belong to equal keys

ctypedef struct Sorter:
    Item *items
    const uint8_t *arena
    uint64_t dice         # the state of a random generator, for unpredictable pivots
    uint64_t steps        # items looked at and keys compared
    uint32_t height
    Span spans[STACK]


cdef inline int compare_key(const uint8_t *record, const uint8_t *key, size_t size) noexcept nogil:
    """Compares as `bytes` do: byte by byte, then the shorter one first."""
    cdef size_t own = record_key_size(record)
    cdef int order = memcmp(record_key(record), key, min(own, size))
    if order:
        return order
    return (own > size) - (own < size)


cdef inline int compare_places(const uint8_t *arena, uint64_t a, uint64_t b) noexcept nogil:
    """Compares the keys of two records."""
    return compare_key(arena + a, record_key(arena + b), record_key_size(arena + b))


cdef void begin_sort(Sorter *sorter, Item *items, size_t count, const uint8_t *arena, uint64_t dice) noexcept nogil
cdef bint go_on_sorting(Sorter *sorter, int64_t steps) noexcept nogil
cdef size_t sorted_places(Item *items, size_t count) noexcept nogil


cdef class Pauses:
    cdef object tick             # called between two pieces unless None; may raise
    cdef readonly bint away      # the thread is running Python code between two pieces
    cdef int take(self) except -1


cdef class Sorting:
    cdef Item *items
    cdef size_t count, room
    cdef Sorter sorter
    cdef int reserve(self, size_t room) except -1
    cdef inline void add(self, uint64_t place) noexcept nogil:
        """Adds a record; there must be room for it."""
        self.items[self.count].place = place
        self.count += 1

    cdef uint64_t *sort(self, const uint8_t *arena, Pauses pauses) except NULL
