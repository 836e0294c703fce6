from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport uint8_t, uint64_t

from fastsm.generation.changes cimport Changes

ctypedef struct Reach:
    # How far changes were matched with waiting watches: up to an entry, and to the frame that starts after it in a log.
    uint64_t index
    uint64_t term
    uint64_t identity
    uint64_t frame


cdef class Waiting:
    # Invariant: no entry up to `index` concerns this wait.
    cdef readonly bytes prefix
    cdef readonly object owner     # an (event loop, future) to tell; None: a thread, by `queue`
    cdef readonly bint over
    cdef readonly bint durable
    cdef Changes watch
    cdef object queue
    cdef uint64_t index


cdef class Prefixes:
    # The prefixes, sorted and distinct. `parents[i]`: the longest other prefix that prefix i starts with, or -1.
    cdef tuple keys
    cdef dict numbers
    cdef size_t count
    cdef const uint8_t **starts
    cdef size_t *sizes
    cdef int *parents
    cdef uint64_t *hits            # per prefix: the last entry that changed a key with it, or 0
    cdef bint any_hit
    cdef uint8_t *beginnings       # one bit for each pair of bytes that a key with one of the prefixes may begin with
    cdef int fill(self) except -1
    cdef bint concerns(self, Waiting waiting) except -1
    cdef void forget_hits(self) noexcept
    cdef uint64_t scan(self, const uint8_t *log, uint64_t first, uint64_t end, uint64_t last) noexcept nogil
    cdef void note(self, const uint8_t *key, size_t size, uint64_t index) noexcept nogil


cdef class Group:
    # Invariant: all changes after `reach` are in the present log, or in a log listed in `left`.
    cdef list waiting
    cdef Reach reach
    # Compacted logs: (mapping, identity, end, and the fields of the reach in the next log)
    cdef list left
    cdef Prefixes prefixes         # those of `waiting`; None: to be made again
    cdef bint armed                # the writer should ring at the next change
    cdef uint64_t changes          # counts changes of `waiting`
    cdef void note_change(self) noexcept
    cdef int add(self, Waiting waiting, Reach *reach) except -1
    cdef int take_out(self, Prefixes prefixes, list taken) except -1
    cdef int discard(self, Waiting waiting) except -1
    cdef void let_pass(self, Waiting waiting) noexcept


cdef class Watchers:
    cdef Group applied
    cdef Group durable
    cdef PyThread_type_lock bell   # locked until someone rings
    cdef bint rung
    cdef bint silent               # the thread should end
    cdef readonly list awake       # waits that were taken out, and may not have been told yet
    cdef bint all_end              # all watches should look again
    cdef void ring(self) noexcept
    cdef bint hear(self) noexcept
    cdef int take_all(self) except -1
    cdef void wake_all(self) noexcept
    cdef void move(self, object mapping, uint64_t identity, uint64_t end, Reach *reach) noexcept
