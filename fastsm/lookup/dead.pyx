"""The map of dead records: one bit per 16 bytes of the arena, set if a newer record of the key exists.

It lets a snapshot find the live records in one pass over the arena, in the order in which they were written, without
reading keys or the table, which keeps changing. It costs `apply` one store per overwritten key, and memory only where
records are dead.
"""

from libc.stdlib cimport calloc
from libc.string cimport memcpy
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from fastsm.disk.format cimport ARENA_LIMIT

assert ARENA_LIMIT == <uint64_t>BLOCKS << BLOCK_BITS

cdef size_t BLOCK_SIZE = 1 << (BLOCK_BITS - RECORD_UNIT_BITS - 3)


cdef class DeadMap:
    """The bits of dead records, in blocks that never move: a holder of the map may read it without the GIL.

    Thread safety: `reserve` and `mark` by one writer at a time. A copy made in the meantime contains everything marked
    before it began, and perhaps what is marked while it is made.
    """

    def __dealloc__(self):
        cdef size_t i
        for i in range(BLOCKS):
            if self.blocks[i] != NULL:
                munmap(self.blocks[i], BLOCK_SIZE)

    cdef int reserve_slowly(self, uint64_t stop) except -1:
        cdef void *block
        cdef uint64_t number
        while self.room < stop:
            number = self.room >> BLOCK_BITS
            # Not calloc, which may touch all pages: a page without marks should take no memory.
            block = mmap(NULL, BLOCK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
            if block == MAP_FAILED:
                raise MemoryError(f"no memory for the map of dead records up to offset {stop}")
            self.blocks[number] = <uint64_t *>block
            self.room = (number + 1) << BLOCK_BITS
        return 0

    cdef uint64_t *copy(self, uint64_t stop) noexcept nogil:
        """Returns a flat copy of the map below `stop`, which the caller frees; NULL if there is no memory."""
        cdef uint64_t count = (stop >> WORD_BITS) + 1
        cdef uint64_t *words = <uint64_t *>calloc(count, sizeof(uint64_t))
        cdef uint64_t first = 0
        cdef uint64_t piece, i
        cdef const uint64_t *block
        if words == NULL:
            return NULL
        while first < count and self.blocks[first * sizeof(uint64_t) / BLOCK_SIZE] != NULL:
            piece = min(count - first, BLOCK_SIZE / sizeof(uint64_t))
            block = self.blocks[first * sizeof(uint64_t) / BLOCK_SIZE]
            for i in range(piece):  # not memcpy: another thread may mark bits meanwhile
                words[first + i] = load_relaxed(block + i)
            first += piece
        return words

    cdef void fill(self, const uint64_t *words, uint64_t count) noexcept nogil:
        """Copies a flat map into this map, which has no marks yet, but room reserved for them."""
        cdef uint64_t first = 0
        cdef uint64_t piece
        while first < count:
            piece = min(count - first, BLOCK_SIZE / sizeof(uint64_t))
            memcpy(self.blocks[first * sizeof(uint64_t) / BLOCK_SIZE], words + first, piece * sizeof(uint64_t))
            first += piece
