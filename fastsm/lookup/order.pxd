from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastsm.disk.format cimport RECORD_PUT
from fastsm.disk.mapping cimport Mapping
from fastsm.lookup.dead cimport DeadMap
from fastsm.lookup.sorting cimport Pauses, Sorting
from fastsm.lookup.table cimport Table
from fastsm.lookup.tree cimport Node

cdef enum:
    FEW_NEW = 256             # up to this many new keys are sorted in by a reader, under the GIL
    LOOKS = 4096              # entries that a reader looks at in one step, under the GIL


cdef class Order:
    # Invariant: once `built`, each key of the table has exactly one place of one of its records in tree and `fresh`
    # together, or one in both of them. Deleted keys may still have one, too.
    cdef Table table
    cdef DeadMap dead
    cdef Mapping mapping                # what all places point into; replaced when the log outgrows it
    cdef Node *root
    cdef readonly uint64_t entries      # places in the tree
    cdef readonly bint built
    cdef readonly bint loaded           # loaded from a saved table
    cdef bint recording                 # new keys are recorded in `fresh`
    cdef uint64_t *fresh                # places of new keys, in order of arrival
    cdef size_t fresh_count, fresh_room
    cdef size_t absorbed                # so many of them are in the tree, but may be missing from a tree being built
    cdef uint32_t builders              # running builds; the first to finish is used
    # Counts trees that were built or dropped: builds that began earlier are discarded
    cdef uint64_t trees
    cdef uint64_t version               # of tree and `fresh` together: changes when places move from one to the other
    cdef void **moments                 # those of open readers, as borrowed references
    cdef size_t moment_count, moment_room
    cdef uint64_t *gone                 # places of deleted keys that `collect` has found
    cdef size_t gone_count
    cdef readonly uint64_t comparisons  # key comparisons made
    cdef readonly uint64_t looks        # entries looked at by readers
    # Limits large work to one thread at a time; `trees` and `version` ensure correctness without it
    cdef object lock
    cdef unsigned long worker           # the thread that has the lock
    cdef Pauses pauses                  # those of that thread

    cdef inline size_t waiting(self) noexcept:
        """Returns how many new keys are not in the tree yet."""
        return self.fresh_count - self.absorbed

    cdef inline int note(
        self, const uint8_t *arena, int operation, uint64_t hashed, uint64_t place, uint64_t old
    ) noexcept nogil:
        """Records a change of the table; returns -1 if there is no memory, unless room was reserved."""
        if old == 0:
            return self.note_new(place) if operation == RECORD_PUT and self.recording else 0
        if self.moment_count:
            self.tell_readers(arena, hashed, old)
        return 0

    cdef inline int note_new(self, uint64_t place) noexcept nogil:
        if self.fresh_count == self.fresh_room and self.make_room(1) < 0:
            return -1
        self.fresh[self.fresh_count] = place
        self.fresh_count += 1
        return 0

    cdef int make_room(self, size_t more) noexcept nogil
    cdef int reserve(self, size_t new_keys, size_t changes) except -1
    cdef void tell_readers(self, const uint8_t *arena, uint64_t hashed, uint64_t old) noexcept nogil
    cdef bint is_behind(self) noexcept
    cdef bint has_garbage(self) noexcept
    cdef int catch_up(self, tick) except -1
    cdef bint take_lock(self) except -1
    cdef int build(self, Pauses pauses) except -1
    cdef int take_sorted(self, const uint64_t *places, size_t count) except -1
    cdef int end_build(self) except -1
    cdef int end_builds(self) except -1
    cdef bint gather(self, Sorting sorting, uint64_t trees, Pauses pauses) except -1
    cdef int merge(self, Pauses pauses) except -1
    cdef int absorb(self) except -1
    cdef void take_off(self, size_t count) noexcept
    cdef void drop(self) noexcept
    cdef int add_moment(self, void *moment) except -1
    cdef void remove_moment(self, void *moment) noexcept


cdef class Moment:
    # Invariant: `end` is the place after the moment's last record, and `notes` leads from each key that was overwritten
    # or deleted since then to its newest record at that moment.
    cdef uint64_t end
    cdef Table notes
    cdef bint lost                      # a note could not be made for lack of memory
