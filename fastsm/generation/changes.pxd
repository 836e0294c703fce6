from libc.stdint cimport uint8_t, uint64_t

from fastsm.disk.mapping cimport Mapping

cdef enum:  # what a step along the log came to
    FOUND = 0       # the next change that is asked for is at `at`
    ENDED = 1       # there is none yet
    PAUSED = 2      # as many bytes were passed as were allowed at once
    MISMATCH = 3    # the log has another entry of this index
    DAMAGED = 4     # a length that cannot be: the log was not verified yet

cdef enum:
    ALL = 0x7FFFFFFF     # more changes than are counted, or it is not known how many

ctypedef struct Place:
    # A place between two changes of a log. All offsets are those of the log's file.
    uint64_t index        # of the last entry that was told of, or passed
    uint64_t term         # its term; UNKNOWN_TERM: not known
    uint64_t offset       # how many of its changes were told; where none was asked for, how many there were
    bint whole            # none of its changes is still to come
    bint unchecked        # its term was not compared with the log's yet
    uint64_t identity     # of the log that the rest speaks of
    uint64_t left         # of the changes that were told, as many are still to be passed there
    uint64_t frame        # the next frame
    uint64_t at           # the next record
    uint64_t stop         # the end of the frame that it is in
    uint64_t run          # that frame's run of terms that the last record was in

ctypedef struct Wanted:
    # What a step looks for, and how far it may go.
    const uint8_t *log
    uint64_t end          # of the log
    uint64_t last         # the last entry that may be told
    const uint8_t *prefix
    size_t prefix_size
    uint64_t budget       # bytes to pass at once


cdef class Source:
    # What `look` found at one moment.
    cdef readonly Mapping mapping
    cdef readonly str path              # of the log
    cdef readonly uint64_t state        # another number for each state that is no continuation of the one before
    cdef readonly uint64_t identity     # of the log
    cdef readonly uint64_t end          # of its frames
    cdef readonly uint64_t last_frame   # where the last one starts; 0: not known
    cdef readonly uint64_t base_index
    cdef readonly uint64_t base_term
    cdef readonly uint64_t base_changes  # how many the base's last entry had; ALL: not known
    cdef readonly uint64_t index        # the last entry that may be told
    cdef readonly uint64_t term
    cdef readonly uint64_t newest_index  # the last applied one, which may be told later
    cdef readonly uint64_t newest_term
    cpdef int look(self) except -1
    cpdef bint is_over(self) except -1
    cdef void release(self) noexcept


cdef class Changes:
    cdef readonly Source _source
    cdef readonly bytes _prefix
    cdef Place place          # what was told
    cdef Place draft          # of the read under way
    cdef Wanted wanted        # by it
    cdef uint64_t state       # of the source
    cdef uint64_t size        # bytes of keys and values that the read under way has taken
    cdef bint reading
    cdef unsigned long reader         # the thread that began that
    cdef object awaited       # what stands for it among those who wait; None: nothing, or it is out of date
    cdef readonly bint _closed
    cdef int start_at(self, start) except -1
    cdef int begin(self) except -1
    cdef void end(self) noexcept
    cdef int look(self) except -1
    cdef int settle(self) except -1
    cdef int find_place(self) except -1
    cdef int next_found(self, bint may_pause) except -1
    cdef bint pass_rest(self, bint may_pause) except -1
    cdef void note_told(self) noexcept
    cdef void note_ended(self) noexcept
    cdef void pass_to(self, uint64_t index, uint64_t term, uint64_t identity, uint64_t frame) noexcept
    cdef object change_here(self)
    cdef bint fits(self, uint64_t max_bytes, bint is_first) noexcept
    cdef object next_change(self)
