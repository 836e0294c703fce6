from libc.stdint cimport uint8_t, uint64_t

from fastsm.lookup.index cimport Index
from fastsm.generation.log cimport Log
from fastsm.disk.mapping cimport Mapping
from fastsm.lookup.table cimport Table
from fastsm.disk.walk cimport Walk
from fastsm.long_work cimport Work


cdef class Capture:
    # Invariant: [first, stop) of the arena, and the base, contain all records up to the last included entry.
    cdef readonly object last_included
    cdef readonly uint64_t epoch             # of the state that it was made from
    cdef readonly bytes runs                 # of terms, in the form used by snapshots
    cdef readonly bytes membership           # the membership record, or nothing
    cdef readonly uint64_t estimated_size
    cdef Log log
    cdef Index index
    cdef Mapping mapping
    cdef const uint8_t *arena
    cdef uint64_t last_index, last_term
    cdef bint newest                         # nothing had been applied after it when the capture was made
    cdef uint64_t base_first, base_stop      # the base's records
    cdef uint64_t first                      # the first frame
    cdef uint64_t stop                       # the place after the last included record
    cdef readonly uint64_t next_frame        # the first frame that starts there or later
    cdef uint64_t end                        # after the last frame that was in the index when the map was copied
    cdef uint64_t *dead                      # a copy of the map; [0, stop) of it is valid as of the last included entry
    cdef uint64_t base_config, config_place
    cdef bint config_was_later
    cdef readonly uint64_t clock             # as of the last included entry
    cdef uint64_t base_clock, clock_place
    cdef bint clock_was_later
    cdef bint touched                        # the arena contains a touch
    cdef bint touched_after                 # there is a touch after the last included entry
    # While writing:
    cdef uint8_t *piece
    cdef const uint8_t *source
    cdef uint64_t left                       # bytes of the record at `source` that remain
    cdef uint64_t size                       # bytes written so far
    cdef uint64_t paced                      # the disk was given the file up to here
    cdef uint64_t keys
    cdef readonly uint64_t sessions          # written so far; `keys` counts the others
    cdef Table written_sessions              # used by `revive`
    cdef Table written_touches               # keys whose touch later entries may have hidden: their last record up to L
    cdef bint done
    cdef void hold(
        self, Log log, Index index, uint64_t epoch, uint64_t last_index, uint64_t last_term, bint newest) noexcept
    cdef int name_id(self) except -1
    cdef bytes record_bytes(self, uint64_t place)
    cdef void find_stop(self) noexcept nogil
    cdef bint includes_frame(self, uint64_t place) noexcept nogil
    cdef int revive(self, tick) except -1
    cdef int pass_over(self, Walk *walk, Table written, bint gather, tick) except -1
    cdef bint pass_over_slice(self, Walk *walk, Table written, bint gather, int *failed) noexcept nogil
    cdef int unmark_all(self, Table written, bint touches) except -1
    cdef bint note(self, Table written, const uint8_t *record, uint64_t place, bint gather) noexcept nogil
    cdef Walk walk(self) noexcept nogil
    cdef int write_pieces(self, Walk *walk, uint64_t room, int descriptor, uint64_t offset, Work work) except -1
    cdef int write_piece(self, Walk *walk, uint64_t room, int descriptor, uint64_t offset) noexcept nogil
    cdef uint64_t fill(self, Walk *walk, uint64_t room, uint64_t pause) noexcept nogil
