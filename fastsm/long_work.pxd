from libc.stdint cimport uint64_t


cdef class Work:
    cdef uint64_t done           # bytes, or whatever the work counts; written without the GIL
    cdef int stopped             # set by the thread that waits; looked at without the GIL
    cdef object tick             # None: another thread waits, and serves signals and progress
    cdef readonly uint64_t takes  # how often the thread that works came back for the GIL between its pieces

    cdef inline bint goes_on(self, uint64_t done) noexcept nogil:
        """Whether work without the GIL, of which so much is done, may go on without coming back."""
        self.done = done
        return self.tick is None and not self.stopped
