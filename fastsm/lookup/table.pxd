from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from libc.string cimport memcmp

from fastsm.disk.format cimport record_key, record_key_size
from fastsm.disk.hashing cimport load64, siphash13

cdef enum:
    SEGMENT_BITS = 12
    SEGMENT_SLOTS = 1 << SEGMENT_BITS
    TAG_BITS = 24          # of the hash, at the top of the slot: the home, and 12 more bits
    NEXT_BITS = 4          # of the hash: the next bits by which the segment will split
    PLACE_BITS = 36        # of the place, in units of 8 bytes
    TAG_SHIFT = 64 - TAG_BITS
    SLOT_MASK = SEGMENT_SLOTS - 1
    GROUP = 4              # slots that a probe looks at together

cdef uint64_t PLACE_MASK
cdef uint64_t FAILED

cdef void check_table(Table table, const uint8_t *arena) except *

cdef enum:
    BLOCK_SIZE = 2 << 20             # a huge page
    SEGMENT_SIZE = 8 * SEGMENT_SLOTS + 64
    SEGMENTS_PER_BLOCK = BLOCK_SIZE / SEGMENT_SIZE

ctypedef struct Segment:
    uint64_t slots[SEGMENT_SLOTS]
    uint32_t count               # slots in use
    uint32_t depth               # leading hash bits that all its keys share
    uint64_t padding[7]

cdef extern from *:
    """
    #define fastsm_prefetch(address) __builtin_prefetch(address)
    #define fastsm_lowest_bit(word) __builtin_ctz(word)
    """
    int lowest_bit "fastsm_lowest_bit"(uint32_t word) noexcept nogil
    void prefetch "fastsm_prefetch"(const void *address) noexcept nogil


cdef inline uint64_t place_of(uint64_t slot) noexcept nogil:
    return (slot << (64 - PLACE_BITS)) >> (61 - PLACE_BITS)


cdef inline uint32_t tag_hits(const uint64_t *slots, size_t i, uint64_t tag) noexcept nogil:
    """Returns a bit mask of the GROUP slots from `i` on that have the tag. An empty slot counts as tag 0.

    It has no branch per slot: a key's distance from its home is random, so such a branch would be mispredicted.
    """
    return (
        <uint32_t>((slots[i & SLOT_MASK] ^ tag) >> TAG_SHIFT == 0)
        | <uint32_t>((slots[(i + 1) & SLOT_MASK] ^ tag) >> TAG_SHIFT == 0) << 1
        | <uint32_t>((slots[(i + 2) & SLOT_MASK] ^ tag) >> TAG_SHIFT == 0) << 2
        | <uint32_t>((slots[(i + 3) & SLOT_MASK] ^ tag) >> TAG_SHIFT == 0) << 3)


cdef inline bint has_empty(const uint64_t *slots, size_t i) noexcept nogil:
    """Returns whether one of the GROUP slots from `i` on is empty; if so, probes end there."""
    return (
        (slots[i & SLOT_MASK] == 0) | (slots[(i + 1) & SLOT_MASK] == 0)
        | (slots[(i + 2) & SLOT_MASK] == 0) | (slots[(i + 3) & SLOT_MASK] == 0))


cdef inline bint same_key(const uint8_t *record, const uint8_t *key, uint16_t size) noexcept nogil:
    """Compares keys word by word without a call, since most keys are short."""
    cdef const uint8_t *own = record_key(record)
    cdef size_t i = 0
    if record_key_size(record) != size:
        return False
    if size < 8 or size > 64:
        return memcmp(own, key, size) == 0
    while i + 8 <= size:
        if load64(own + i) != load64(key + i):
            return False
        i += 8
    return load64(own + size - 8) == load64(key + size - 8)


cdef class Table:
    cdef uint64_t seed0, seed1   # the seed of the keys' hashes
    cdef uint64_t next0, next1   # the secret that later seeds are derived from; never stored
    cdef Segment **segments      # the directory: 1 << depth pointers
    cdef uint32_t depth
    cdef uint32_t segment_count
    cdef uint32_t segment_room   # segments in the pool, in use or not
    cdef void **pool             # blocks of SEGMENTS_PER_BLOCK segments
    cdef uint32_t block_count, block_room
    cdef uint32_t mapped_blocks  # the first blocks of the pool are a private mapping of a saved table
    cdef void *mapped
    cdef size_t mapped_size
    cdef readonly uint64_t count
    cdef readonly uint64_t rebuilds

    cdef inline uint64_t hash(self, const uint8_t *key, size_t size) noexcept nogil:
        return siphash13(self.seed0, self.seed1, key, size)

    cdef inline Segment *segment_of(self, uint64_t hashed) noexcept nogil:
        return self.segments[(hashed >> 1) >> (63 - self.depth)]

    cdef inline void prefetch_slot(self, uint64_t hashed) noexcept nogil:
        prefetch(&self.segment_of(hashed).slots[(hashed >> (TAG_BITS - SEGMENT_BITS)) & (SEGMENT_SLOTS - 1)])

    cdef inline uint64_t candidate(self, uint64_t hashed) noexcept nogil:
        """Returns the first place with the key's tag, or 0: almost always the key's own. For prefetching."""
        cdef const uint64_t *slots = self.segment_of(hashed).slots
        cdef size_t i = (hashed >> (TAG_BITS - SEGMENT_BITS)) & SLOT_MASK
        cdef uint32_t hits = tag_hits(slots, i, hashed << TAG_SHIFT)
        while hits == 0:
            if has_empty(slots, i):
                return 0
            i += GROUP
            hits = tag_hits(slots, i, hashed << TAG_SHIFT)
        return place_of(slots[(i + lowest_bit(hits)) & SLOT_MASK])

    cdef inline uint64_t find(
        self, const uint8_t *arena, uint64_t hashed, const uint8_t *key, uint16_t size
    ) noexcept nogil:
        """Returns the place of the key's record, or 0."""
        cdef const uint64_t *slots = self.segment_of(hashed).slots
        cdef size_t i = (hashed >> (TAG_BITS - SEGMENT_BITS)) & SLOT_MASK
        cdef uint64_t slot = slots[i]
        cdef const uint8_t *record
        while slot:
            if (slot ^ hashed << TAG_SHIFT) >> TAG_SHIFT == 0:
                record = arena + place_of(slot)
                prefetch(record + 64)  # the value, while the key is being compared
                if same_key(record, key, size):
                    return place_of(slot)
            i = (i + 1) & SLOT_MASK
            slot = slots[i]
        return 0

    cdef void gather(self, uint64_t *places) noexcept nogil
    cdef uint64_t put(
        self, const uint8_t *arena, uint64_t hashed, const uint8_t *key, uint16_t size, uint64_t place
    ) noexcept nogil
    cdef uint64_t remove(
        self, const uint8_t *arena, uint64_t hashed, const uint8_t *key, uint16_t size) noexcept nogil
    cdef inline int reserve(self, uint64_t more) except -1:
        """Ensures room for `more` new keys: afterwards `put` needs memory only for the directory."""
        if self.segment_room - self.segment_count > min(more, <uint64_t>self.segment_count):
            return 0
        return self.reserve_slowly(more)

    cdef int reserve_slowly(self, uint64_t more) except -1
    cdef int start(self) noexcept nogil
    cdef void free_all(self) noexcept nogil
    cdef int grow_pool(self) noexcept nogil
    cdef bint double_directory(self) noexcept nogil
    cdef void share_out(self, const uint8_t *arena, Segment *low, Segment *high) noexcept nogil
    cdef void renew_next_bits(self, const uint8_t *arena, Segment *segment) noexcept nogil
    cdef Segment *new_segment(self, uint32_t depth) noexcept nogil
    cdef Segment *segment_at(self, uint32_t number) noexcept nogil
    cdef int split(self, const uint8_t *arena, uint64_t hashed) noexcept nogil
    cdef int rebuild(self, const uint8_t *arena) noexcept nogil
    cdef int insert_new(self, const uint8_t *arena, uint64_t hashed, uint64_t place) noexcept nogil
