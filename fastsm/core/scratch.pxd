from libc.stdint cimport uint8_t


cdef class Scratch:
    cdef uint8_t *block      # the newest; its first bytes point to the previous one
    cdef size_t used, room   # bytes of it

    cdef uint8_t *take(self, size_t size) except NULL
    cdef int add_block(self, size_t room) except -1
    cdef void forget(self) noexcept
