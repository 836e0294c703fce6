from libc.stdint cimport uint64_t

from fastsm.disk.mapping cimport Mapping
from fastsm.disk.published cimport Publication
from fastsm.generation.log cimport Log

cdef extern from *:
    """
    #include <stdint.h>
    #include <time.h>
    #ifdef CLOCK_MONOTONIC_COARSE
      #define FASTSM_CLOCK CLOCK_MONOTONIC_COARSE
    #else
      #define FASTSM_CLOCK CLOCK_MONOTONIC
    #endif
    static inline uint64_t fastsm_now(void) {
        struct timespec now;
        clock_gettime(FASTSM_CLOCK, &now);
        return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    }
    static inline void fastsm_sleep(uint64_t nanoseconds) {
        struct timespec time = {(time_t)(nanoseconds / 1000000000u), (long)(nanoseconds % 1000000000u)};
        nanosleep(&time, NULL);
    }
    """
    uint64_t now "fastsm_now"() noexcept nogil
    void pause_for "fastsm_sleep"(uint64_t nanoseconds) noexcept nogil

cdef enum:
    SLICE = 1 << 20              # bytes of frames between two checks for signals
    LOOK_INTERVAL = 1000000000   # nanoseconds between two checks of the name of the publication's file
    RETRY_INTERVAL = 100000000   # the same while there is none yet, or published frames are missing
    FIRST_STEP = 200_000         # nanoseconds between two looks at the publication, at first
    LAST_STEP = 1_000_000


cdef class Lookout:
    cdef readonly Publication publication   # None: there is none yet
    cdef uint64_t look_at                   # when the file's name is checked again
    cdef bint again                         # the last publication should be looked at again

    cdef inline bint may_have_news(self) noexcept:
        return self.publication is None or self.again or self.publication.is_new() or now() >= self.look_at

    cpdef bint is_worth_a_look(self) noexcept


cdef int check_next(Mapping mapping, Log log, uint64_t end) except -1
cdef object not_published(Log log, uint64_t end, str found)
cdef uint64_t reach(Log log, uint64_t end, uint64_t file_size) except? 0
