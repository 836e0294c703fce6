from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport uint8_t, uint64_t

from fastsm.generation.changes cimport Changes

ctypedef struct Reach:
    # How far the changes were matched with the waiting watches: up to an entry, after which a frame starts in a log.
    uint64_t index
    uint64_t term
    uint64_t identity
    uint64_t frame


cdef class Waiting:
    # Invariant: nothing up to entry `index` concerns it.
    cdef readonly bytes prefix
    cdef readonly object owner     # who is told, on an event loop; None: a thread, by the queue
    cdef readonly bint over
    cdef readonly bint durable
    cdef Changes watch
    cdef object queue
    cdef uint64_t index


cdef class Prefixes:
    # Sorted and distinct. `parents[i]`: the longest other one that is a prefix of it, or -1.
    cdef tuple keys
    cdef dict numbers
    cdef size_t count
    cdef const uint8_t **starts
    cdef size_t *sizes
    cdef int *parents
    cdef uint64_t *hits            # the last entry that changed a key below it, or 0
    cdef bint any_hit
    cdef uint8_t *beginnings       # a bit for each pair of bytes that a key may begin with
    cdef int fill(self) except -1
    cdef bint concerns(self, Waiting waiting) except -1
    cdef void forget_hits(self) noexcept
    cdef uint64_t scan(self, const uint8_t *log, uint64_t first, uint64_t end, uint64_t last) noexcept nogil
    cdef void note(self, const uint8_t *key, size_t size, uint64_t index) noexcept nogil


cdef class Group:
    # The watches that wait for what is applied, or for what is durable.
    # Invariant: everything after `reach` is in the present log, or in one that `left` names.
    cdef list waiting
    cdef Reach reach
    cdef list left                 # (mapping, identity, end, and the reach after it) of logs that were compacted away
    cdef Prefixes prefixes         # of those that wait; None: they are others by now
    cdef bint armed                # the writer is to ring at the next change
    cdef uint64_t changes          # of `waiting`
    cdef void note_change(self) noexcept
    cdef int add(self, Waiting waiting, Reach *reach) except -1
    cdef int take_out(self, Prefixes prefixes, list taken) except -1
    cdef int discard(self, Waiting waiting) except -1
    cdef void let_pass(self, Waiting waiting) noexcept


cdef class Watchers:
    cdef Group applied
    cdef Group durable
    cdef PyThread_type_lock bell   # locked while nobody rings
    cdef bint rung
    cdef bint silent               # the thread is to end
    cdef readonly list awake       # they were taken out, and may not have been told yet
    cdef bint all_end              # all are to look again
    cdef void ring(self) noexcept
    cdef bint hear(self) noexcept
    cdef int take_all(self) except -1
    cdef void wake_all(self) noexcept
    cdef void move(self, object mapping, uint64_t identity, uint64_t end, Reach *reach) noexcept
