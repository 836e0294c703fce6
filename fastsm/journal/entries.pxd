from libc.stdint cimport uint8_t, uint64_t


cdef class Reading:
    cdef const uint8_t **frames
    cdef size_t count
    cdef list segments                   # their mappings keep the bytes valid

    cdef list listed(self)


cdef class Entries:
    # Invariant: frames[head : head + count] point to the entries first … first + count - 1, whose terms never fall.
    cdef const uint8_t **frames
    cdef size_t room
    cdef size_t head
    cdef size_t count
    cdef uint64_t first                  # the first entry, or the next one if there is none
    cdef uint64_t front_changes          # how often the start has changed
    cdef uint64_t back_changes           # how often the end has changed
    cdef list segments                   # where the frames are, oldest first

    cdef const uint8_t *frame_at(self, size_t position) noexcept nogil
    cdef uint64_t last(self) noexcept
    cdef Reading hold(self, uint64_t index, uint64_t stop, uint64_t most_bytes)
    cdef int reserve(self, size_t more) except -1
    cdef void push(self, const uint8_t *frame) noexcept nogil
    cdef void start_over(self, uint64_t first) noexcept
    cdef void drop_from(self, uint64_t index) noexcept
    cdef void drop_before(self, uint64_t index) noexcept


cdef object command_of(const uint8_t *frame)
cdef object entry_of(const uint8_t *frame, object term)
