from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #define fastsm_load(from) __atomic_load_n(from, __ATOMIC_RELAXED)
    #define fastsm_store(to, value) __atomic_store_n(to, value, __ATOMIC_RELAXED)
    """
    uint64_t load_done "fastsm_load"(const uint64_t *done) noexcept nogil
    void store_done "fastsm_store"(uint64_t *done, uint64_t value) noexcept nogil
    int load_stopped "fastsm_load"(const int *stopped) noexcept nogil
    void store_stopped "fastsm_store"(int *stopped, int value) noexcept nogil


cdef class Work:
    cdef uint64_t done           # bytes, or whatever the work counts; written without the GIL
    cdef int stopped             # set by the waiting thread; read without the GIL
    cdef object tick             # None: another thread waits, and serves signals and progress
    cdef readonly uint64_t takes  # how often the working thread took the GIL between its pieces

    cdef inline bint goes_on(self, uint64_t done) noexcept nogil:
        """Returns whether work without the GIL, of which `done` is finished, may continue without taking the GIL."""
        store_done(&self.done, done)
        return self.tick is None and not load_stopped(&self.stopped)
