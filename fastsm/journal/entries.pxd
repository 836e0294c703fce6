from libc.stdint cimport uint8_t, uint64_t


cdef class Entries:
    # Invariant: frames[head : head + count] lead to the entries first … first + count - 1, whose terms never fall.
    cdef const uint8_t **frames
    cdef size_t room
    cdef size_t head
    cdef size_t count
    cdef uint64_t first
    cdef object first_entry              # as __getitem__ gives them, or None
    cdef object last_entry

    cdef const uint8_t *frame_at(self, size_t position) noexcept nogil
    cdef object entry_at(self, size_t position)
    cdef uint64_t stop_of(self, uint64_t index, uint64_t count) noexcept
    cdef int reserve(self) except -1
    cdef void push(self, const uint8_t *frame) noexcept
    cdef void start_over(self, uint64_t first) noexcept
    cdef void drop_from(self, uint64_t index) noexcept
    cdef void drop_before(self, uint64_t index) noexcept
