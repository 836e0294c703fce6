from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.disk.format cimport is_of_session, record_key, record_key_size, record_operation
from fastsm.lookup.dead cimport DeadMap
from fastsm.lookup.deadlines cimport Deadlines
from fastsm.disk.mapping cimport Mapping
from fastsm.lookup.order cimport Order
from fastsm.lookup.table cimport Table, prefetch
from fastsm.lookup.terms cimport Terms
from fastsm.disk.walk cimport Walk

cdef enum:
    BLOCK = 32                # keys whose cache misses overlap
    # Bytes from a record's start to the end of a short key, which may be on another cache line
    KEY_SPAN = 31


cdef class Index:
    # Invariant: determined by the records (and runs) seen so far; every place is in the arena that they came from.
    cdef readonly uint64_t end             # the place after the last frame in the index
    cdef readonly bint loaded              # from a saved table: its slots were not made by this process
    cdef readonly Table table
    cdef readonly Table sessions           # from a session's id to the place of its newest record
    # From a key to the place of its last touch, if it was touched since it was put
    cdef readonly Table touches
    cdef readonly Deadlines deadlines      # those of keys
    cdef readonly Deadlines session_deadlines
    cdef bint timed                        # there are touches, or deadlines of keys
    cdef readonly uint64_t clock           # 0: before the first tick
    cdef readonly uint64_t clock_place     # of the newest clock record; 0: none
    cdef readonly uint64_t touch_place     # of the newest touch; 0: none
    cdef readonly uint64_t base_touches    # touch records in the base
    cdef readonly Terms terms
    cdef readonly DeadMap dead
    cdef readonly bint ordered             # there is an order, which must be told of new keys
    cdef readonly Order order
    cdef readonly uint64_t live_bytes      # the total size of records that the tables refer to
    cdef readonly uint64_t config_place    # of the newest config record; 0: none
    cdef readonly object metadata          # that of the newest snapshot recorded in a frame, or None
    cdef uint64_t metadata_place           # while frames are read: the place of the record with the metadata
    cdef inline void expect(self, const uint8_t *arena, uint64_t hashed) noexcept nogil:
        """Prefetches what `set_place` will touch: the key's current record, and its bit in the dead map."""
        cdef uint64_t candidate = self.table.candidate(hashed)
        if candidate:
            prefetch(arena + candidate)
            prefetch(arena + candidate + KEY_SPAN)
            self.dead.expect(candidate)

    cdef inline uint64_t hash_of(self, const uint8_t *record) noexcept nogil:
        """Returns the hash of a record's key, in the table that the key belongs to."""
        if is_of_session(record_operation(record)):
            return self.sessions.hash(record_key(record), record_key_size(record))
        return self.table.hash(record_key(record), record_key_size(record))

    cdef int set_place(
        self, const uint8_t *arena, int operation, uint64_t hashed, uint64_t place) noexcept nogil
    cdef int note_put(
        self, const uint8_t *arena, const uint8_t *record, uint64_t place, uint64_t old) noexcept nogil
    cdef int note_touch(self, const uint8_t *arena, uint64_t hashed, uint64_t place) noexcept nogil
    cdef int note_session(self, const uint8_t *arena, const uint8_t *record, uint64_t old) noexcept nogil
    cdef void end_touch(self, const uint8_t *arena, const uint8_t *record, uint64_t old) noexcept nogil
    cdef bint counts(self, const uint8_t *arena, uint64_t place) noexcept nogil
    cdef void drop_many_stale(self, const uint8_t *arena, Deadlines deadlines) noexcept nogil
    cdef void drop_stale(self, const uint8_t *arena, Deadlines deadlines) noexcept nogil
    cdef void drop_stale_top(self, const uint8_t *arena, Deadlines deadlines) noexcept nogil
    cdef uint64_t next_of(self, const uint8_t *arena, Deadlines deadlines) noexcept nogil
    cdef uint64_t deadline_at(self, const uint8_t *arena, uint64_t place) noexcept nogil
    cdef int begin_order(self, Mapping mapping) except -1
    cdef int take(self, Walk *walk, uint64_t pause) noexcept nogil
    cdef int take_all(self, Walk walk) except -1
    cdef int take_block(self, const uint8_t *arena, const uint8_t **records, uint32_t count) noexcept nogil
    cdef int read_membership(self, Mapping mapping, base) except -1

cdef int check_deadlines(Index index, const uint8_t *arena) except -1
