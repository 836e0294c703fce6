"""Sorting records by key.

Multikey quicksort (Bentley, Sedgewick, SODA 1997) with characters of eight bytes, which are kept next to each record's
place. Comparing them needs no key, so there is hardly a cache miss: keys are read again only if those eight bytes are
equal, and the bytes that all of them share after that are skipped at the speed of `memcmp`. The cost is O(n log n +
bytes that tell the keys apart), whatever the keys are.

If several records have the same key, the last one replaces the others.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

from fastsm.disk.hashing cimport load64
from fastsm.lookup.table cimport prefetch

cdef extern from *:
    """
    #if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
      #define fastsm_from_big(word) __builtin_bswap64(word)
    #else
      #define fastsm_from_big(word) (word)
    #endif
    """
    uint64_t from_big "fastsm_from_big"(uint64_t word) noexcept nogil

cdef enum:
    HEAD = 8              # bytes of a key in each item
    FEW = 12              # up to this many items are sorted by insertion
    MANY = 512            # from this many items on, a better pivot pays off
    AHEAD = 16            # records whose cache misses overlap

cdef enum:  # phases of sorting a span
    SHARED = 0            # find how many more bytes all keys share
    LOAD = 1              # read the heads that follow
    CHOOSE = 2            # choose a pivot, or sort a few items directly
    SPLIT = 3             # partition into items below, equal to, and above the pivot
    ENDED = 4             # equal heads: keys that end within their head come first, by size
    EQUAL = 5             # equal keys: keep the last record


cdef inline uint64_t head_of(const uint8_t *record, uint32_t depth) noexcept nogil:
    """Returns eight bytes of a key, starting at `depth`, as a big-endian number; zeros after the key's end."""
    cdef uint32_t size = record_key_size(record)
    cdef uint64_t word = 0
    if depth + HEAD <= size:
        return from_big(load64(record_key(record) + depth))
    if depth < size:
        memcpy(&word, record_key(record) + depth, size - depth)
    return from_big(word)


cdef inline void swap(Item *items, size_t a, size_t b) noexcept nogil:
    cdef Item item = items[a]
    items[a] = items[b]
    items[b] = item


cdef inline uint64_t median(uint64_t a, uint64_t b, uint64_t c) noexcept nogil:
    return max(min(a, b), min(max(a, b), c))


cdef void push(
    Sorter *sorter, size_t first, size_t stop, uint32_t depth, uint32_t phase, uint32_t by_size
) noexcept nogil:
    """Pushes a span, unless it is a single item. The stack suffices, since the larger parts of a split go below."""
    cdef Span *span
    if stop - first < 2:
        return
    span = &sorter.spans[sorter.height]
    sorter.height += 1
    span.first = span.at = span.less = first
    span.stop = span.greater = stop
    span.depth = depth
    span.phase = phase
    span.by_size = by_size
    span.shared = 0xFFFF


cdef void begin_sort(
    Sorter *sorter, Item *items, size_t count, const uint8_t *arena, uint64_t dice
) noexcept nogil:
    """Prepares to sort items whose places are set. `dice`: any number; it determines the pivots."""
    sorter.items = items
    sorter.arena = arena
    sorter.dice = dice | 1
    sorter.steps = 0
    sorter.height = 0
    push(sorter, 0, count, 0, SHARED, False)


cdef bint go_on_sorting(Sorter *sorter, int64_t steps) noexcept nogil:
    """Does about `steps` steps; returns True when everything is sorted."""
    cdef Span *span
    cdef int64_t left = steps
    while sorter.height and left > 0:
        span = &sorter.spans[sorter.height - 1]
        if span.phase == SHARED:
            left -= find_shared(sorter, span, left)
        elif span.phase == LOAD:
            left -= load(sorter, span, left)
        elif span.phase == CHOOSE:
            left -= choose(sorter, span)
        elif span.phase == SPLIT:
            left -= split(sorter, span, left)
        elif span.phase == ENDED:
            left -= part_ended(sorter, span, left)
        else:
            left -= keep_last(sorter, span)
    sorter.steps += steps - left
    return sorter.height == 0


cdef int64_t find_shared(Sorter *sorter, Span *span, int64_t left) noexcept nogil:
    """Finds how many bytes after `depth` all keys share, by comparing the first key with each."""
    cdef const uint8_t *first = sorter.arena + sorter.items[span.first].place
    cdef const uint8_t *key = record_key(first) + span.depth
    cdef const uint8_t *record
    cdef uint32_t shared = min(span.shared, <uint32_t>max(<int>record_key_size(first) - <int>span.depth, 0))
    cdef int64_t steps = 0
    cdef size_t i = max(span.at, span.first + 1)
    while i < span.stop and shared and steps < left:
        if i + AHEAD < span.stop:
            prefetch(sorter.arena + sorter.items[i + AHEAD].place + span.depth)
        record = sorter.arena + sorter.items[i].place
        shared = min(shared, <uint32_t>max(<int>record_key_size(record) - <int>span.depth, 0))
        shared = common(key, record_key(record) + span.depth, shared)
        steps += 1 + shared / 64
        i += 1
    span.at, span.shared = i, shared
    if i == span.stop or shared == 0:
        span.depth += shared
        span.at = span.first
        span.phase = LOAD
    return steps + 1


cdef inline uint32_t common(const uint8_t *a, const uint8_t *b, uint32_t size) noexcept nogil:
    """Returns the length of the common prefix of two strings of `size` bytes."""
    cdef uint32_t i = 0
    if memcmp(a, b, size) == 0:
        return size
    while i + 8 <= size and load64(a + i) == load64(b + i):
        i += 8
    while i < size and a[i] == b[i]:
        i += 1
    return i


cdef int64_t load(Sorter *sorter, Span *span, int64_t left) noexcept nogil:
    """Reads the heads of a span's keys at `depth`."""
    cdef size_t i = span.at
    cdef size_t stop = min(span.stop, i + <size_t>left)
    cdef int64_t steps = <int64_t>(stop - i)
    while i < stop:
        if i + AHEAD < span.stop:
            prefetch(sorter.arena + sorter.items[i + AHEAD].place + span.depth)
        sorter.items[i].head = head_of(sorter.arena + sorter.items[i].place, span.depth)
        i += 1
    span.at = i
    if i == span.stop:
        span.phase = CHOOSE
    return steps


cdef int64_t choose(Sorter *sorter, Span *span) noexcept nogil:
    cdef size_t count = span.stop - span.first
    cdef int64_t steps
    if count <= FEW and not span.by_size:
        steps = insert_each(sorter, span)
        sorter.height -= 1
        return steps
    span.pivot = any_head(sorter, span) if count <= MANY else median(
        any_head(sorter, span), any_head(sorter, span), any_head(sorter, span))
    span.at = span.less = span.first
    span.greater = span.stop
    span.phase = SPLIT
    return 1


cdef uint64_t any_head(Sorter *sorter, Span *span) noexcept nogil:
    """Returns the median of three heads, drawn by xorshift64."""
    cdef uint64_t heads[3]
    cdef int i
    for i in range(3):
        sorter.dice ^= sorter.dice << 13
        sorter.dice ^= sorter.dice >> 7
        sorter.dice ^= sorter.dice << 17
        heads[i] = sorter.items[span.first + sorter.dice % (span.stop - span.first)].head
    return median(heads[0], heads[1], heads[2])


cdef int64_t split(Sorter *sorter, Span *span, int64_t left) noexcept nogil:
    """Does a three-way partition (Dijkstra)."""
    cdef Item *items = sorter.items
    cdef uint64_t pivot = span.pivot
    cdef uint64_t head
    cdef size_t i = span.at
    cdef size_t less = span.less
    cdef size_t greater = span.greater
    cdef int64_t steps = 0
    while i < greater and steps < left:
        head = items[i].head
        if head < pivot:
            swap(items, i, less)
            less += 1
            i += 1
        elif head > pivot:
            greater -= 1
            swap(items, i, greater)
        else:
            i += 1
        steps += 1
    span.at, span.less, span.greater = i, less, greater
    if i == greater:
        part(sorter, span)
    return steps + 1


cdef void part(Sorter *sorter, Span *span) noexcept nogil:
    """Puts the parts of a split span in its place, the largest lowest on the stack."""
    cdef size_t bounds[3][2]
    cdef uint32_t order[3]
    cdef uint32_t depth = span.depth
    cdef uint32_t by_size = span.by_size
    cdef uint32_t i, j, phase
    bounds[0][0], bounds[0][1] = span.first, span.less
    bounds[1][0], bounds[1][1] = span.less, span.greater
    bounds[2][0], bounds[2][1] = span.greater, span.stop
    for i in range(3):
        j = i
        while j and bounds[order[j - 1]][1] - bounds[order[j - 1]][0] < bounds[i][1] - bounds[i][0]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = i
    sorter.height -= 1
    for i in range(3):
        j = order[i]
        phase = CHOOSE if j != 1 else EQUAL if by_size else ENDED
        push(sorter, bounds[j][0], bounds[j][1], depth, phase, by_size)


cdef int64_t part_ended(Sorter *sorter, Span *span, int64_t left) noexcept nogil:
    """Splits a span of equal heads: keys that end within the head come first, by size; the rest are sorted further."""
    cdef size_t i = span.at
    cdef size_t stop = min(span.stop, i + <size_t>left)
    cdef int64_t steps = <int64_t>(stop - i)
    cdef uint32_t depth = span.depth + HEAD
    cdef uint32_t size
    while i < stop:
        if i + AHEAD < span.stop:
            prefetch(sorter.arena + sorter.items[i + AHEAD].place)
        size = record_key_size(sorter.arena + sorter.items[i].place)
        if size <= depth:
            sorter.items[i].head = size
            swap(sorter.items, i, span.less)
            span.less += 1
        i += 1
    span.at = i
    if i == span.stop:
        part_at(sorter, span.first, span.less, span.stop, depth)
    return steps


cdef void part_at(Sorter *sorter, size_t first, size_t middle, size_t stop, uint32_t depth) noexcept nogil:
    sorter.height -= 1
    if middle - first > stop - middle:
        push(sorter, first, middle, depth, CHOOSE, True)
        push(sorter, middle, stop, depth, SHARED, False)
    else:
        push(sorter, middle, stop, depth, SHARED, False)
        push(sorter, first, middle, depth, CHOOSE, True)


cdef int64_t keep_last(Sorter *sorter, Span *span) noexcept nogil:
    """Keeps the last record of equal keys."""
    cdef uint64_t last = 0
    cdef size_t i
    for i in range(span.first, span.stop):
        last = max(last, sorter.items[i].place)
        sorter.items[i].place = 0
    sorter.items[span.first].place = last
    i = span.stop - span.first
    sorter.height -= 1
    return <int64_t>i


cdef int64_t insert_each(Sorter *sorter, Span *span) noexcept nogil:
    """Sorts a few items; if heads are equal, by the rest of their keys."""
    cdef Item *items = sorter.items + span.first
    cdef size_t count = span.stop - span.first
    cdef size_t kept = 1
    cdef int64_t steps = 1
    cdef size_t i, j
    cdef Item item
    cdef int order
    for i in range(1, count):
        item = items[i]
        j = kept
        order = 1
        while j:
            order = compare_items(sorter.arena, &items[j - 1], &item)
            steps += 1
            if order <= 0:
                break
            j -= 1
        if j and order == 0:
            items[j - 1].place = max(items[j - 1].place, item.place)
            continue
        # Make a gap at j.
        kept += 1
        i_to_j(items, kept - 1, j)
        items[j] = item
    for i in range(kept, count):
        items[i].place = 0
    return steps


cdef inline void i_to_j(Item *items, size_t i, size_t j) noexcept nogil:
    """Moves the items [j, i) up by one."""
    while i > j:
        items[i] = items[i - 1]
        i -= 1


cdef inline int compare_items(const uint8_t *arena, const Item *a, const Item *b) noexcept nogil:
    if a.head != b.head:
        return 1 if a.head > b.head else -1
    return compare_places(arena, a.place, b.place)


cdef size_t sorted_places(Item *items, size_t count) noexcept nogil:
    """Packs the places of sorted items at the front of their own memory; returns how many there are."""
    cdef uint64_t *places = <uint64_t *>items
    cdef size_t kept = 0
    cdef size_t i
    for i in range(count):
        if items[i].place:
            places[kept] = items[i].place
            kept += 1
    return kept


cdef class Pauses:
    """What happens between two pieces of long work: signal handlers, and a tick.

    Thread safety: used by one working thread; others may read `away`.
    """

    def __cinit__(self, tick=None):
        self.tick = tick

    cdef int take(self) except -1:
        self.away = True
        try:
            PyErr_CheckSignals()
            if self.tick is not None:
                self.tick()
        finally:
            self.away = False
        return 0


cdef class Sorting:
    """Records being sorted, and their memory.

    Thread safety: none; one thread fills and sorts it.
    """

    def __dealloc__(self):
        free(self.items)

    cdef int reserve(self, size_t room) except -1:
        """Reserves room for `room` items."""
        cdef Item *items
        if room <= self.room:
            return 0
        room = max(room, self.room + self.room / 4)
        items = <Item *>realloc(self.items, room * sizeof(Item))
        if items == NULL:
            raise MemoryError(f"no memory to sort {room} keys")
        self.items = items
        self.room = room
        return 0

    cdef uint64_t *sort(self, const uint8_t *arena, Pauses pauses) except NULL:
        """Sorts without the GIL, in slices; returns the places, of which `count` remain.

        The caller keeps alive what `arena` points into.
        """
        cdef bint sorted = False
        cdef uint64_t dice = <uint64_t>self.items * <uint64_t>0x9E3779B97F4A7C15
        self.reserve(1)
        begin_sort(&self.sorter, self.items, self.count, arena, dice)
        while not sorted:
            with nogil:
                sorted = go_on_sorting(&self.sorter, SORT_SLICE)
            pauses.take()
        with nogil:
            self.count = sorted_places(self.items, self.count)
        return <uint64_t *>self.items
