"""Memory for the bytes that judging a chunk makes, until it is written: numbers as text, sessions' records."""

from libc.stdlib cimport free, malloc

cdef enum:
    LINK = sizeof(void *)
    BLOCK = 16 << 10         # one block of this size is kept for the next chunk


cdef class Scratch:
    """Bytes that never move, freed all at once.

    Thread safety: used by one writer at a time.
    """

    def __dealloc__(self):
        self.room = 0  # so that no block is kept
        self.forget()

    cdef uint8_t *take(self, size_t size) except NULL:
        """Returns memory for `size` bytes. O(1), without an object."""
        cdef uint8_t *taken
        if size > self.room - self.used:
            self.add_block(max(<size_t>BLOCK, LINK + size))
        taken = self.block + self.used
        self.used += size
        return taken

    cdef int add_block(self, size_t room) except -1:
        cdef uint8_t *block = <uint8_t *>malloc(room)
        if block == NULL:
            raise MemoryError(f"no memory to judge a chunk: {room} bytes")
        (<uint8_t **>block)[0] = self.block
        self.block, self.room, self.used = block, room, LINK
        return 0

    cdef void forget(self) noexcept:
        """Frees everything that was taken."""
        cdef uint8_t *block = self.block
        cdef uint8_t *before
        cdef bint keeps = self.room == BLOCK
        self.block = NULL
        while block != NULL:
            before = (<uint8_t **>block)[0]
            if keeps:
                self.block, keeps = block, False
                (<uint8_t **>block)[0] = NULL
            else:
                free(block)
            block = before
        self.room = BLOCK if self.block != NULL else 0
        self.used = LINK if self.block != NULL else 0
