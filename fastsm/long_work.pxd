from libc.stdint cimport uint64_t


cdef class Work:
    cdef uint64_t done           # bytes, or whatever the work counts; written without the GIL
    cdef int stopped             # set by the waiting thread; read without the GIL
    cdef object tick             # None: another thread waits, and serves signals and progress
    cdef readonly uint64_t takes  # how often the working thread took the GIL between its pieces

    cdef inline bint goes_on(self, uint64_t done) noexcept nogil:
        """Returns whether work without the GIL, of which `done` is finished, may continue without taking the GIL."""
        self.done = done
        return self.tick is None and not self.stopped
