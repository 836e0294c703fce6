from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef class Terms:
    # Invariant: first[i] <= last[i] < first[i + 1], and term[i] < term[i + 1].
    # Invariant: seen >= last[count - 1]; the next entry comes after `seen`.
    cdef uint64_t *first
    cdef uint64_t *last
    cdef uint64_t *term
    cdef readonly size_t count
    cdef size_t room
    cdef readonly uint64_t seen
    cdef inline int reserve(self, size_t more) except -1 nogil:
        """Ensures that `more` runs can be appended without allocating memory."""
        return 0 if self.room - self.count >= more else self.reserve_slowly(more)

    cdef int reserve_slowly(self, size_t more) except -1 nogil
    cdef void append(self, uint64_t last, uint64_t term) noexcept nogil
    cdef int take_frame(self, const uint8_t *frame) except -1 nogil
    cdef size_t run_of(self, uint64_t index) noexcept nogil
    cdef bint holds_all(self, size_t run, const uint64_t *indexes, size_t count) noexcept nogil
    cdef void runs_of(self, const uint64_t *indexes, size_t count, size_t *runs) noexcept nogil
    cdef bint find(self, uint64_t index, uint64_t *term) noexcept nogil
    cdef void round_down(self, uint64_t *index, uint64_t *term) noexcept nogil


ctypedef struct Run:
    uint64_t last
    uint64_t term


ctypedef struct RunMark:
    # What is changed by noting entries after the mark, and restored by `rewind`.
    uint32_t count
    uint64_t index
    uint64_t term
    uint64_t last
    bint started


cdef class RunList:
    # The runs of the next frame. Invariant: they ascend, and only the last one may still grow.
    cdef Run *runs
    cdef uint32_t count
    cdef uint32_t room
    cdef bint started            # an entry was seen, whose id is in `index` and `term`
    cdef uint64_t index
    cdef uint64_t term
    cdef void mark(self, RunMark *mark) noexcept
    cdef void rewind(self, const RunMark *mark) noexcept
    cdef int push(self, uint64_t last, uint64_t term) except -1
    cdef int note_new(self, uint64_t index, uint64_t term) except -1

    cdef inline int note(self, uint64_t index, uint64_t term) except -1:
        """Adds an entry after all others."""
        if self.count == 0 or term != self.term:
            return self.note_new(index, term)
        self.runs[self.count - 1].last = index
        self.index = index
        return 0
