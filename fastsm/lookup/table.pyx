"""The hash table: from a key to the place of its newest record.

Extendible hashing (Fagin, Nievergelt, Pippenger, Strong, TODS 1979) over open-addressed segments:

    hash    | directory bits … |  …  | home, 12 bits | tag, 12 bits |
                     |                       |
              segments[depth bits] ─► 4,096 slots, probed from the home on, one by one
    slot    | home and tag, 24 bits | next, 4 bits | place / 8, 36 bits |      0: empty

A segment that is about three quarters full splits in two by the next bit of the hash, so the table grows by 32 KiB at a
time, without rehashing all keys. As all segments fill at the same rate, each has a limit of its own: with a common
limit, all of them would split at almost the same time. A slot contains its home, so a delete closes the gap after it
without reading keys, and leaves no tombstone. It also contains the next four bits by which its segment will split, so
only every fourth split has to read keys. The table itself stores no keys; the caller passes the arena, in which places
are offsets of records.

The hash is SipHash-1-3 with a random seed. If more keys collide than chance allows (an attacker knows the seed), the
table draws a new seed and rebuilds itself.
"""

import os

from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.mman cimport munmap
from posix.stdlib cimport posix_memalign

from fastsm.disk.format cimport ARENA_LIMIT, record_key, record_key_size

cdef extern from *:
    """
    #include <sys/mman.h>
    #ifdef MADV_HUGEPAGE
      #ifndef MADV_COLLAPSE
        #define MADV_COLLAPSE 25
      #endif
      #define fastsm_huge_page(address, size) ((void)madvise(address, size, MADV_HUGEPAGE))
      #define fastsm_collapse(address, size) ((void)madvise(address, size, MADV_COLLAPSE))
    #else
      #define fastsm_huge_page(address, size) ((void)0)
      #define fastsm_collapse(address, size) ((void)0)
    #endif
    """
    void huge_page "fastsm_huge_page"(void *address, size_t size) noexcept nogil
    void collapse "fastsm_collapse"(void *address, size_t size) noexcept nogil

PLACE_MASK = (<uint64_t>1 << PLACE_BITS) - 1

assert ARENA_LIMIT == <uint64_t>8 << PLACE_BITS
assert sizeof(Segment) == SEGMENT_SIZE

cdef enum:
    HOME_SHIFT = 64 - SEGMENT_BITS
    SPLIT_BITS = 9
    SPLIT_FROM = SEGMENT_SLOTS / 4 * 3 - 384   # keys; up to SPLIT_FROM + 2**SPLIT_BITS: 66 to 78 % of the slots
    # Reached only if memory runs out or under attack: each probe needs an empty slot to end
    FULL_AT = SEGMENT_SLOTS - 64
    CROWDED = 1024                   # a displacement that chance does not produce in a lifetime
    SUSPICIOUS = 16                  # keys with one tag met by one probe: just as unlikely
    SMALL_POOL = 16                  # blocks
    SPARE_DEPTH = 4                  # how much deeper than the average a segment may become

cdef uint64_t FAILED = ~<uint64_t>0


cdef inline uint64_t next_bits(uint64_t hashed, uint32_t depth) noexcept nogil:
    """Returns the four directory bits by which a segment of this depth splits next."""
    cdef uint32_t used = depth & ~<uint32_t>(NEXT_BITS - 1)
    return (hashed << used) >> (64 - NEXT_BITS)


cdef inline uint64_t make_slot(uint64_t hashed, uint32_t depth, uint64_t place) noexcept nogil:
    return hashed << TAG_SHIFT | next_bits(hashed, depth) << PLACE_BITS | place >> 3


cdef inline uint32_t split_limit(uint64_t hashed, uint32_t depth) noexcept nogil:
    """Returns with how many keys the segment of a hash splits: random, but always the same for one segment."""
    cdef uint64_t name = (hashed >> 1) >> (63 - depth) | <uint64_t>1 << depth
    return SPLIT_FROM + <uint32_t>((name * <uint64_t>0x9E3779B97F4A7C15) >> (64 - SPLIT_BITS))


cdef class Table:
    """A hash table from keys to places: 8 bytes per slot, 12 to 22 bytes per key.

    Invariants (`check` asserts them):
    - a key is in the segment of its hash, and no empty slot lies between its home and its slot;
    - a segment of depth d is named by exactly the 2**(depth - d) directory entries that share its d bits;
    - every segment has an empty slot; `count` is the sum of the segments' counts.

    Thread safety: none of its own; all calls are made under the GIL, or before the table is shared.
    """

    def __cinit__(self, seed=None):
        self.seed0, self.seed1 = seed if seed is not None else random_seed()
        self.next0, self.next1 = random_seed()
        if self.reserve(1) < 0 or self.start() < 0:
            raise MemoryError("no memory for an empty table")

    def __dealloc__(self):
        with nogil:  # freeing ten million keys takes several milliseconds
            self.free_all()

    cdef void free_all(self) noexcept nogil:
        free_pool(self.pool, self.mapped_blocks, self.block_count)
        free(self.segments)
        if self.mapped_size:
            munmap(self.mapped, self.mapped_size)

    def __len__(self):
        return self.count

    def __repr__(self):
        return f"<Table of {self.count} keys in {self.segment_count} segments>"

    @property
    def size(self):
        """The memory of the segments in use and of the directory, in bytes."""
        return self.segment_count * sizeof(Segment) + (sizeof(void *) << self.depth)

    @property
    def load(self):
        """The share of slots that are in use."""
        return self.count / (<double>self.segment_count * SEGMENT_SLOTS)

    # ---- memory ----------------------------------------------------------------------------------------

    cdef int start(self) noexcept nogil:
        """Makes one empty segment under a directory of depth 0."""
        cdef Segment *first
        self.segments = <Segment **>malloc(sizeof(Segment *))
        if self.segments == NULL:
            return -1
        first = self.new_segment(0)
        if first == NULL:
            return -1
        self.segments[0] = first
        self.depth = 0
        return 0

    cdef int reserve_slowly(self, uint64_t more) except -1:
        cdef uint64_t splits = 1 + min(more, <uint64_t>self.segment_count)
        while self.segment_room - self.segment_count < splits:
            if self.grow_pool() < 0:
                raise MemoryError(f"no memory for a table of {self.count + more} keys")
        return 0

    cdef int grow_pool(self) noexcept nogil:
        cdef void *block
        cdef void **blocks
        cdef uint32_t room
        if self.block_count == self.block_room:
            room = self.block_room * 2 + 8
            blocks = <void **>malloc(room * sizeof(void *))
            if blocks == NULL:
                return -1
            if self.block_count:
                memcpy(blocks, self.pool, self.block_count * sizeof(void *))
            free(self.pool)
            self.pool = blocks
            self.block_room = room
        if posix_memalign(&block, BLOCK_SIZE, BLOCK_SIZE):
            return -1
        if self.block_count >= SMALL_POOL:
            huge_page(block, BLOCK_SIZE)
        self.pool[self.block_count] = block
        self.block_count += 1
        self.segment_room += SEGMENTS_PER_BLOCK
        return 0

    cdef Segment *segment_at(self, uint32_t number) noexcept nogil:
        return <Segment *>self.pool[number / SEGMENTS_PER_BLOCK] + number % SEGMENTS_PER_BLOCK

    cdef Segment *new_segment(self, uint32_t depth) noexcept nogil:
        cdef Segment *segment
        if self.segment_count == self.segment_room and self.grow_pool() < 0:
            return NULL
        cdef uint32_t full = self.segment_count / SEGMENTS_PER_BLOCK
        segment = self.segment_at(self.segment_count)
        if self.segment_count % SEGMENTS_PER_BLOCK == 0 and self.mapped_blocks < full <= SMALL_POOL:
            # In a small pool, a block becomes a huge page only when it is full, so it takes no more pages than it uses.
            # Later blocks are huge from the start: a collapse takes a millisecond, or longer on a busy machine.
            huge_page(self.pool[full - 1], BLOCK_SIZE)
            collapse(self.pool[full - 1], BLOCK_SIZE)
        self.segment_count += 1
        memset(segment, 0, sizeof(Segment))
        segment.depth = depth
        return segment

    # ---- find ------------------------------------------------------------------------------------------

    cdef void gather(self, uint64_t *places) noexcept nogil:
        """Writes all `count` places to an array, in no particular order."""
        cdef Segment *segment
        cdef uint32_t number
        cdef size_t i
        for number in range(self.segment_count):
            segment = self.segment_at(number)
            for i in range(SEGMENT_SLOTS):
                if segment.slots[i]:
                    places[0] = place_of(segment.slots[i])
                    places += 1

    # ---- change ----------------------------------------------------------------------------------------

    cdef uint64_t put(
        self, const uint8_t *arena, uint64_t hashed, const uint8_t *key, uint16_t size, uint64_t place
    ) noexcept nogil:
        """Sets the key's place; returns its old place, 0 for a new key, or FAILED if there is no memory."""
        cdef Segment *segment = self.segment_of(hashed)
        cdef size_t i = (hashed >> (TAG_BITS - SEGMENT_BITS)) & SLOT_MASK
        cdef uint64_t slot = segment.slots[i]
        cdef uint32_t distance = 0
        cdef uint32_t strangers = 0
        while slot:
            if (slot ^ hashed << TAG_SHIFT) >> TAG_SHIFT == 0:
                if same_key(arena + place_of(slot), key, size):
                    segment.slots[i] = make_slot(hashed, segment.depth, place)
                    return place_of(slot)
                strangers += 1
            distance += 1
            i = (i + 1) & SLOT_MASK
            slot = segment.slots[i]
        if segment.count < SPLIT_FROM and distance < CROWDED and strangers < SUSPICIOUS:
            segment.slots[i] = make_slot(hashed, segment.depth, place)
            segment.count += 1
            self.count += 1
            return 0
        if distance < CROWDED and strangers < SUSPICIOUS and self.insert_new(arena, hashed, place) == 0:
            return 0
        # Chance does not produce this: these keys were chosen with knowledge of the seed. (Or a split got no memory.)
        if self.rebuild(arena) < 0 or self.insert_new(arena, self.hash(key, size), place) < 0:
            return FAILED
        return 0

    cdef int insert_new(self, const uint8_t *arena, uint64_t hashed, uint64_t place) noexcept nogil:
        """Inserts a key that is known to be absent, splitting its segment when due."""
        cdef Segment *segment = self.segment_of(hashed)
        cdef size_t i
        while segment.count >= split_limit(hashed, segment.depth) and self.split(arena, hashed):
            segment = self.segment_of(hashed)
        if segment.count >= FULL_AT:
            return -1
        i = (hashed >> (TAG_BITS - SEGMENT_BITS)) & SLOT_MASK
        while segment.slots[i]:
            i = (i + 1) & SLOT_MASK
        segment.slots[i] = make_slot(hashed, segment.depth, place)
        segment.count += 1
        self.count += 1
        return 0

    cdef uint64_t remove(
        self, const uint8_t *arena, uint64_t hashed, const uint8_t *key, uint16_t size
    ) noexcept nogil:
        """Removes the key; returns its old place, or 0. Closes the gap (Knuth, volume 3, algorithm 6.4R)."""
        cdef Segment *segment = self.segment_of(hashed)
        cdef size_t gap = (hashed >> (TAG_BITS - SEGMENT_BITS)) & SLOT_MASK
        cdef size_t i, home
        cdef uint64_t slot = segment.slots[gap]
        cdef uint64_t place
        while slot:
            if (slot ^ hashed << TAG_SHIFT) >> TAG_SHIFT == 0 and same_key(
                arena + place_of(slot), key, size
            ):
                break
            gap = (gap + 1) & SLOT_MASK
            slot = segment.slots[gap]
        if slot == 0:
            return 0
        place = place_of(slot)
        i = gap
        while True:
            i = (i + 1) & SLOT_MASK
            slot = segment.slots[i]
            if slot == 0:
                break
            home = slot >> HOME_SHIFT
            # A slot may move into the gap unless the gap is before its home.
            if ((i - home) & SLOT_MASK) >= ((i - gap) & SLOT_MASK):
                segment.slots[gap] = slot
                gap = i
        segment.slots[gap] = 0
        segment.count -= 1
        self.count -= 1
        return place

    # ---- grow ------------------------------------------------------------------------------------------

    cdef bint double_directory(self) noexcept nogil:
        cdef size_t entries = <size_t>1 << self.depth
        cdef Segment **doubled = <Segment **>malloc(2 * entries * sizeof(Segment *))
        cdef size_t i
        if doubled == NULL:
            return False
        for i in range(entries):
            doubled[2 * i] = doubled[2 * i + 1] = self.segments[i]
        free(self.segments)
        self.segments = doubled
        self.depth += 1
        return True

    cdef int split(self, const uint8_t *arena, uint64_t hashed) noexcept nogil:
        """Splits the segment of a hash by the next bit; returns 0 if that is impossible (no memory, or too deep)."""
        cdef Segment *low = self.segment_of(hashed)
        cdef Segment *high
        cdef uint32_t depth = low.depth
        cdef size_t first, half, i
        if depth > SPARE_DEPTH and (<uint64_t>1 << (depth - SPARE_DEPTH)) > self.segment_count:
            return 0
        if depth == self.depth and not self.double_directory():
            return 0
        high = self.new_segment(depth + 1)
        if high == NULL:
            return 0
        half = <size_t>1 << (self.depth - depth - 1)
        first = ((hashed >> 1) >> (63 - self.depth)) & ~(2 * half - 1)
        for i in range(first + half, first + 2 * half):
            self.segments[i] = high
        low.depth = depth + 1
        self.share_out(arena, low, high)
        return 1

    cdef void share_out(self, const uint8_t *arena, Segment *low, Segment *high) noexcept nogil:
        """Moves those slots of `low` to `high` whose next hash bit is 1. Fills both in the order of the old slots."""
        cdef uint64_t slots[SEGMENT_SLOTS]
        cdef uint32_t bit = PLACE_BITS + NEXT_BITS - 1 - ((low.depth - 1) & (NEXT_BITS - 1))
        cdef Segment *target
        cdef size_t i, j
        memcpy(slots, low.slots, sizeof(slots))
        memset(low.slots, 0, sizeof(low.slots))
        low.count = 0
        for i in range(SEGMENT_SLOTS):
            if slots[i] == 0:
                continue
            target = high if slots[i] >> bit & 1 else low
            j = slots[i] >> HOME_SHIFT
            while target.slots[j]:
                j = (j + 1) & SLOT_MASK
            target.slots[j] = slots[i]
            target.count += 1
        if low.depth & (NEXT_BITS - 1) == 0:
            self.renew_next_bits(arena, low)
            self.renew_next_bits(arena, high)

    cdef void renew_next_bits(self, const uint8_t *arena, Segment *segment) noexcept nogil:
        """Reads the next four bits from the keys' hashes, after the slots' bits were used up."""
        cdef uint64_t hashed
        cdef const uint8_t *record
        cdef size_t i
        for i in range(SEGMENT_SLOTS):
            if i + 32 < SEGMENT_SLOTS and segment.slots[i + 32]:
                prefetch(arena + place_of(segment.slots[i + 32]))
                prefetch(arena + place_of(segment.slots[i + 32]) + 40)
            if segment.slots[i]:
                record = arena + place_of(segment.slots[i])
                hashed = self.hash(record_key(record), record_key_size(record))
                segment.slots[i] = make_slot(hashed, segment.depth, place_of(segment.slots[i]))

    cdef int rebuild(self, const uint8_t *arena) noexcept nogil:
        """Rebuilds the table with a new seed. O(keys). If it returns -1 (no memory), the table is unchanged."""
        cdef uint64_t old0 = self.seed0
        cdef uint64_t old1 = self.seed1
        cdef uint64_t old_keys = self.count
        cdef Segment **old_segments = self.segments
        cdef void **old_pool = self.pool
        cdef uint32_t old_depth = self.depth
        cdef uint32_t old_count = self.segment_count
        cdef uint32_t old_room = self.segment_room
        cdef uint32_t old_blocks = self.block_count
        cdef uint32_t old_mapped = self.mapped_blocks
        cdef uint32_t old_block_room = self.block_room
        cdef Segment *segment
        cdef const uint8_t *record
        cdef uint64_t slot
        cdef uint32_t number
        cdef size_t i
        cdef int failed
        # The next seed is derived by hashing with a secret that is never written to a file.
        self.seed0 = siphash13(self.next0, self.next1, <const uint8_t *>&self.rebuilds, 8)
        self.seed1 = siphash13(self.next1, self.next0, <const uint8_t *>&self.rebuilds, 8)
        self.segments = NULL
        self.pool = NULL
        self.segment_count = self.segment_room = self.block_count = self.block_room = self.mapped_blocks = 0
        self.count = 0
        failed = self.start()
        for number in range(old_count):
            segment = <Segment *>old_pool[number / SEGMENTS_PER_BLOCK] + number % SEGMENTS_PER_BLOCK
            for i in range(SEGMENT_SLOTS):
                slot = segment.slots[i]
                if slot and failed == 0:
                    record = arena + place_of(slot)
                    failed = self.insert_new(
                        arena, self.hash(record_key(record), record_key_size(record)), place_of(slot))
        if failed == 0:
            free_pool(old_pool, old_mapped, old_blocks)
            free(old_segments)
            if self.mapped_size:
                munmap(self.mapped, self.mapped_size)
            self.mapped_size = 0
            self.rebuilds += 1
            return 0
        free_pool(self.pool, 0, self.block_count)
        self.mapped_blocks = old_mapped
        free(self.segments)
        self.seed0, self.seed1, self.count = old0, old1, old_keys
        self.segments, self.pool, self.depth = old_segments, old_pool, old_depth
        self.segment_count, self.segment_room = old_count, old_room
        self.block_count, self.block_room = old_blocks, old_block_room
        return -1

    # ---- for tests: the same from Python, with any buffer as the arena ----------------------------------

    def insert(self, const uint8_t[::1] arena, uint64_t place):
        """Puts the record at a place; returns the old place of its key, or None."""
        cdef const uint8_t *record = &arena[0] + place
        cdef uint64_t old
        self.reserve(1)
        old = self.put(
            &arena[0], self.hash(record_key(record), record_key_size(record)),
            record_key(record), record_key_size(record), place)
        if old == FAILED:
            raise MemoryError("no memory to grow the table")
        return old or None

    def lookup(self, const uint8_t[::1] arena, bytes key):
        """Returns the place of a key, or None."""
        return self.find(&arena[0], self.hash(key, len(key)), key, len(key)) or None

    def discard(self, const uint8_t[::1] arena, bytes key):
        """Removes a key; returns its old place, or None."""
        return self.remove(&arena[0], self.hash(key, len(key)), key, len(key)) or None

    @property
    def seed(self):
        """Returns the seed of the hash; with it, keys can be made that collide in this table."""
        return self.seed0, self.seed1

    def check(self, const uint8_t[::1] arena):
        """Asserts every invariant. O(slots)."""
        check_table(self, &arena[0])


cdef void check_table(Table table, const uint8_t *arena) except *:
    cdef Segment *segment
    cdef const uint8_t *record
    cdef uint64_t slot, hashed, used
    cdef uint64_t total = 0
    cdef uint32_t number
    cdef size_t i, j
    for number in range(table.segment_count):
        segment = table.segment_at(number)
        used = 0
        named = []
        for i in range(<size_t>1 << table.depth):
            if table.segments[i] == segment:
                named.append(i)
        share = 1 << (table.depth - segment.depth)
        assert len(named) == share, f"segment {number} is named {len(named)} times, its depth says {share}"
        assert named[-1] - named[0] == share - 1, f"segment {number}: its names are not neighbours"
        for i in range(SEGMENT_SLOTS):
            slot = segment.slots[i]
            if slot == 0:
                continue
            used += 1
            record = arena + place_of(slot)
            hashed = table.hash(record_key(record), record_key_size(record))
            assert table.segment_of(hashed) == segment, f"segment {number}, slot {i}: the key belongs elsewhere"
            assert make_slot(hashed, segment.depth, place_of(slot)) == slot, f"segment {number}, slot {i}: another tag"
            j = slot >> HOME_SHIFT
            while j != i:
                assert segment.slots[j], f"segment {number}: a probe for slot {i} ends early, at slot {j}"
                j = (j + 1) & SLOT_MASK
        assert used == segment.count < SEGMENT_SLOTS, f"segment {number} counts {segment.count}, holds {used}"
        total += used
    assert total == table.count, f"the table counts {table.count} keys, holds {total}"


cdef void free_pool(void **pool, uint32_t mapped, uint32_t count) noexcept nogil:
    cdef uint32_t i
    for i in range(mapped, count):
        free(pool[i])
    free(pool)


cdef tuple random_seed():
    return int.from_bytes(os.urandom(8), "little"), int.from_bytes(os.urandom(8), "little")
