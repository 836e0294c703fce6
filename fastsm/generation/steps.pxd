from libc.stdint cimport uint8_t, uint64_t

cdef enum:  # results of a step along the log
    FOUND = 0       # the next wanted change is at `at`
    ENDED = 1       # there are no more changes yet
    PAUSED = 2      # the step has used up its budget of bytes
    MISMATCH = 3    # the log has an entry of another term at this index
    DAMAGED = 4     # a length is impossible, in a log that is not verified yet

ctypedef struct Place:
    # A place between two changes of a log. All offsets are relative to the log's file.
    uint64_t index        # the last entry that was delivered or passed
    uint64_t term         # its term, or UNKNOWN_TERM
    uint64_t offset       # how many of its changes were delivered; if the watch starts after it, how many it made
    bint whole            # no more changes of this entry will follow
    bint unchecked        # its term was not compared with the log yet
    uint64_t identity     # the log to which the remaining fields refer
    uint64_t left         # how many of the delivered changes are still to be passed in this log
    uint64_t frame        # where the next frame starts
    uint64_t at           # where the next record starts
    uint64_t stop         # the end of the frame that contains it
    uint64_t run          # the run of terms, in that frame, of the last record

ctypedef struct Wanted:
    # What a step looks for, and how far it may go.
    const uint8_t *log
    uint64_t end          # the end of the log
    uint64_t last         # the last entry that may be delivered
    const uint8_t *prefix
    size_t prefix_size
    uint64_t budget       # the number of bytes that one step may pass


cdef int enter(Place *place, const Wanted *wanted, uint64_t *left) noexcept nogil
cdef int advance(Place *place, const Wanted *wanted) noexcept nogil
cdef bint pass_entry(Place *place, const Wanted *wanted, uint64_t left) noexcept nogil
cdef void count_told(Place *place, const Wanted *wanted) noexcept nogil
