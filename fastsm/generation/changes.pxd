from libc.stdint cimport uint8_t, uint64_t

from fastsm.disk.mapping cimport Mapping
from fastsm.generation.steps cimport Place, Wanted

cdef enum:
    ALL = 0x7FFFFFFF     # more changes than are counted, or an unknown number


cdef class Source:
    # What `look` found, all from one moment.
    cdef readonly Mapping mapping
    cdef readonly str path              # the path of the log
    cdef readonly uint64_t state        # differs between states that do not continue each other
    cdef readonly uint64_t identity     # the identity of the log
    cdef readonly uint64_t end          # the end of its frames
    cdef readonly uint64_t last_frame   # where its last frame starts; 0: unknown
    cdef readonly uint64_t base_index
    cdef readonly uint64_t base_term
    cdef readonly uint64_t base_changes  # how many changes the base's last entry made; ALL: unknown
    cdef readonly uint64_t index        # the last entry that may be delivered
    cdef readonly uint64_t term
    cdef readonly uint64_t newest_index  # the last applied entry, which may be delivered later
    cdef readonly uint64_t newest_term
    cpdef int look(self) except -1
    cpdef bint is_over(self) except -1
    cdef void release(self) noexcept


cdef class Changes:
    cdef readonly Source _source
    cdef readonly bytes _prefix
    cdef Place place          # what was delivered
    cdef Place draft          # the place of the current read
    cdef Wanted wanted        # what the current read looks for
    cdef uint64_t state       # the source's `state`
    cdef uint64_t size        # bytes of keys and values that the current read has taken
    cdef bint reading
    cdef unsigned long reader         # the thread that began the current read
    cdef object awaited       # the wait that is registered for this watch; None: none, or an outdated one
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
