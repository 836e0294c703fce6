from libc.stdint cimport uint8_t


cdef class Scratch:
    cdef uint8_t *block      # the newest; its first bytes lead to the one before it
    cdef size_t used, room   # bytes of it

    cdef uint8_t *take(self, size_t size) except NULL
    cdef int add_block(self, size_t room) except -1
    cdef void forget(self) noexcept
