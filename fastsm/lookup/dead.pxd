from libc.stdint cimport uint8_t, uint64_t

from fastsm.lookup.table cimport prefetch

cdef extern from *:
    """
    /* Plain moves on all known machines, but in C only atomics may be used by two threads at a time. */
    #define fastsm_load_relaxed(word) __atomic_load_n(word, __ATOMIC_RELAXED)
    #define fastsm_store_relaxed(word, value) __atomic_store_n(word, value, __ATOMIC_RELAXED)
    """
    uint64_t load_relaxed "fastsm_load_relaxed"(const uint64_t *word) noexcept nogil
    void store_relaxed "fastsm_store_relaxed"(uint64_t *word, uint64_t value) noexcept nogil

cdef enum:
    RECORD_UNIT_BITS = 4                     # no two records start within 16 bytes: their headers alone are larger
    BLOCK_BITS = 28                          # bytes of the arena that one block of the map covers: 256 MiB
    BLOCKS = 1 << (39 - BLOCK_BITS)
    WORD_BITS = RECORD_UNIT_BITS + 6         # bytes of the arena that one word covers: 1 KiB


cdef inline bint is_marked(const uint64_t *words, uint64_t place) noexcept nogil:
    """Returns whether a flat map marks the record at `place` as dead."""
    return (load_relaxed(words + (place >> WORD_BITS)) >> ((place >> RECORD_UNIT_BITS) & 63)) & 1


cdef inline void unmark(uint64_t *words, uint64_t place) noexcept nogil:
    words[place >> WORD_BITS] &= ~(<uint64_t>1 << ((place >> RECORD_UNIT_BITS) & 63))


cdef class DeadMap:
    # Invariant: a bit is set exactly for each put record below `room` that is not the newest of its key.
    cdef uint64_t *blocks[BLOCKS]
    cdef uint64_t room                       # places below this one can be marked

    cdef int reserve_slowly(self, uint64_t stop) except -1
    cdef uint64_t *copy(self, uint64_t stop) noexcept nogil
    cdef void fill(self, const uint64_t *words, uint64_t count) noexcept nogil

    cdef inline int reserve(self, uint64_t stop) except -1:
        """Ensures that marking records below `stop` needs no memory."""
        return self.reserve_slowly(stop) if stop > self.room else 0

    cdef inline void mark(self, uint64_t place) noexcept nogil:
        cdef uint64_t *block = self.blocks[place >> BLOCK_BITS]
        place &= (<uint64_t>1 << BLOCK_BITS) - 1
        cdef uint64_t *word = block + (place >> WORD_BITS)
        store_relaxed(word, load_relaxed(word) | <uint64_t>1 << ((place >> RECORD_UNIT_BITS) & 63))

    cdef inline void expect(self, uint64_t place) noexcept nogil:
        """Prefetches what `mark` will touch."""
        prefetch(self.blocks[place >> BLOCK_BITS] + ((place & ((<uint64_t>1 << BLOCK_BITS) - 1)) >> WORD_BITS))

    cdef inline bint is_dead(self, uint64_t place) noexcept nogil:
        cdef uint64_t *block = self.blocks[place >> BLOCK_BITS]
        return is_marked(block, place & ((<uint64_t>1 << BLOCK_BITS) - 1))
