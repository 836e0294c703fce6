"""Reads of ranges: from the present tree in one step, or from a view, piece by piece.

If an entry's record is no longer the newest of its key, the table has the newest; for a view of an earlier moment, the
view's own notes do. A reader that finds many entries of deleted keys removes them from the tree.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals

from fastsm.disk.format cimport record_key, record_key_size
from fastsm.lookup.dead cimport DeadMap
from fastsm.lookup.order cimport LOOKS
from fastsm.lookup.table cimport prefetch
from fastsm.lookup.tree cimport Work, begin_walk, check_tree, hold, owns_path, release, walk_on
from fastsm.lookup.tree_changes cimport remove

cdef enum:
    BLOCK = 32                # entries whose cache misses overlap
    COUNTED = 1 << 17         # entries that are counted without the GIL between two checks for signals
    FEW_GONE = 64             # up to this many entries of deleted keys are not worth a change of the tree


cdef void start(Order order, Walk *walk, bytes start, bytes stop, bint reverse) noexcept:
    """Begins a walk over the present tree, valid as long as the tree does not change; None: unbounded."""
    cdef Work work
    work.arena = order.mapping.address
    work.comparisons = 0
    work.added = 0
    walk.reverse = reverse
    begin_walk(
        &work, walk, order.root,
        NULL if start is None else <const uint8_t *>PyBytes_AS_STRING(start),
        0 if start is None else PyBytes_GET_SIZE(start),
        NULL if stop is None else <const uint8_t *>PyBytes_AS_STRING(stop),
        0 if stop is None else PyBytes_GET_SIZE(stop))
    order.comparisons += work.comparisons


cdef size_t collect(
    Order order, Walk *walk, uint64_t *found, size_t room, size_t looks, Moment moment
) noexcept:
    """Takes entries from a range; `found` receives the newest places of up to `room` keys, in the walk's direction.

    Stops after `looks` entries of any kind (LOOKS at most). Adds entries of deleted keys to `gone`. `moment`: that of
    the tree; None: the present, and then outdated entries of the tree are replaced.
    """
    cdef uint64_t places[BLOCK]
    cdef uint8_t which[BLOCK]
    cdef uint64_t *run
    cdef const uint8_t *arena = order.mapping.address
    cdef size_t count = 0
    cdef size_t taken, stale, i, j
    order.gone_count = 0
    while count < room and looks:
        taken = walk_on(walk, min(min(room - count, looks), <size_t>BLOCK), &run)
        if taken == 0:
            break
        looks -= taken
        order.looks += taken
        stale = 0
        for i in range(taken):
            order.dead.expect(run[i])
        for i in range(taken):
            places[i] = run[i]
            if order.dead.is_dead(places[i]):
                which[stale] = <uint8_t>i
                stale += 1
            else:
                prefetch(arena + places[i])
        if stale:
            resolve(order, places, which, stale, moment)
            keep_gone(order, walk, run, places, which, stale)
            if moment is None and owns_path(walk):
                for j in range(stale):
                    if places[which[j]]:
                        run[which[j]] = places[which[j]]
        for i in range(taken):
            j = taken - 1 - i if walk.reverse else i
            if places[j]:
                found[count] = places[j]
                count += 1
    if walk.reverse:
        reverse_places(order.gone, order.gone_count)
    return count


cdef void keep_gone(
    Order order, const Walk *walk, const uint64_t *run, const uint64_t *places, const uint8_t *which, size_t count
) noexcept:
    """Adds the entries of a run whose keys no longer exist to `gone`, in the walk's direction."""
    cdef size_t i, j
    for i in range(count):
        j = which[count - 1 - i] if walk.reverse else which[i]
        if places[j] == 0:
            order.gone[order.gone_count] = run[j]
            order.gone_count += 1


cdef void resolve(Order order, uint64_t *places, const uint8_t *which, size_t count, Moment moment) noexcept:
    """Replaces up to BLOCK places of outdated records with those of the newest records, now or at a moment.

    0: the key does not exist.
    """
    cdef uint64_t hashes[BLOCK]
    cdef const uint8_t *arena = order.mapping.address
    cdef const uint8_t *record
    cdef uint64_t place
    cdef size_t i
    for i in range(count):
        prefetch(arena + places[which[i]])
    for i in range(count):
        record = arena + places[which[i]]
        hashes[i] = order.table.hash(record_key(record), record_key_size(record))
        order.table.prefetch_slot(hashes[i])
    for i in range(count):
        place = order.table.candidate(hashes[i])
        if place:
            prefetch(arena + place)
    for i in range(count):
        record = arena + places[which[i]]
        place = order.table.find(arena, hashes[i], record_key(record), record_key_size(record))
        if moment is not None and (place == 0 or place >= moment.end):
            place = find_note(moment, arena, record)
        places[which[i]] = place


cdef void forget_gone(Order order) noexcept:
    """Removes the entries of deleted keys that `collect` has found from the present tree, unless they are few."""
    cdef Work work
    cdef size_t count = order.gone_count
    order.gone_count = 0
    if count <= FEW_GONE or not order.built:
        return
    work.arena = order.mapping.address
    work.comparisons = work.added = 0
    if remove(&work, &order.root, order.gone, count) < 0:
        order.drop()
        return
    order.entries += work.added
    order.comparisons += work.comparisons


cdef uint64_t find_note(Moment moment, const uint8_t *arena, const uint8_t *record) noexcept:
    cdef uint64_t hashed = moment.notes.hash(record_key(record), record_key_size(record))
    return moment.notes.find(arena, hashed, record_key(record), record_key_size(record))


@cython.no_gc  # the order does not refer back to it
cdef class OrderedView:
    """A range of the keys at one moment, read piece by piece.

    Thread safety: every method under the GIL; `count` releases it in between, and must be the only call.
    """

    def __cinit__(self):
        self.moment = Moment()

    def __dealloc__(self):
        self.finish()

    cdef int begin(self, Order order, uint64_t end, bytes low, bytes high, bint reverse) except -1:
        """Takes the tree, which has all keys. `end`: the place after the last record. Runs no Python code."""
        self.moment.notes.seed0, self.moment.notes.seed1 = order.table.seed0, order.table.seed1
        self.moment.end = end
        order.add_moment(<void *>self.moment)
        self.order = order
        self.root = order.root
        hold(self.root)
        start(order, &self.walk, low, high, reverse)
        return 0

    cdef size_t take(self, uint64_t *found, size_t room) except? 0xFFFFFFFFFFFFFFFF:
        """Takes the places of up to `room` keys; may return 0 not only at the end, but also after many deleted keys."""
        cdef size_t count
        if self.order is None:
            return 0
        count = collect(self.order, &self.walk, found, room, LOOKS, self.moment)
        forget_gone(self.order)
        if self.moment.lost:
            self.finish()
            raise MemoryError("no memory to note what was overwritten while an iterator was open")
        return count

    cdef uint64_t count(self) except? 0xFFFFFFFFFFFFFFFF:
        """Returns how many keys are left. O(keys), mostly without the GIL."""
        cdef uint64_t stale[LOOKS]
        cdef uint64_t total = 0
        cdef size_t stale_count = 0
        while not self.walk.done:
            with nogil:
                total += count_newest(&self.walk, self.order.dead, stale, &stale_count)
            total += self.count_stale(stale, stale_count)
            if self.moment.lost:
                raise MemoryError("no memory to note what was overwritten while keys were counted")
            PyErr_CheckSignals()
        self.finish()
        return total

    cdef size_t count_stale(self, uint64_t *stale, size_t count) noexcept:
        """Returns how many of these entries had an existing key; removes the others from the present tree."""
        cdef uint64_t places[BLOCK]
        cdef uint8_t which[BLOCK]
        cdef Order order = self.order
        cdef size_t total = 0
        cdef size_t first, size, i
        order.gone_count = 0
        for i in range(BLOCK):
            which[i] = <uint8_t>i
        for first in range(0, count, BLOCK):
            size = min(count - first, <size_t>BLOCK)
            for i in range(size):
                places[i] = stale[first + i]
            resolve(order, places, which, size, self.moment)
            for i in range(size):
                if places[i]:
                    total += 1
                else:
                    order.gone[order.gone_count] = stale[first + i]
                    order.gone_count += 1
        forget_gone(order)
        return total

    cdef void finish(self) noexcept:
        """Releases everything. Idempotent."""
        cdef Node *root = self.root
        _order = self.order  # held until all is changed: freeing it may let another thread run
        if self.order is None:
            return
        self.order.remove_moment(<void *>self.moment)
        self.order = None
        self.root = NULL
        self.walk.done = True
        with nogil:
            release(root)


cdef uint64_t count_newest(Walk *walk, DeadMap dead, uint64_t *stale, size_t *stale_count) noexcept nogil:
    """Counts entries of newest records, and collects other entries, as long as there is room."""
    cdef uint64_t *run
    cdef uint64_t total = 0
    cdef size_t kept = 0
    cdef size_t looked = 0
    cdef size_t taken, i
    while looked < COUNTED and kept < LOOKS:
        taken = walk_on(walk, LOOKS - kept, &run)
        if taken == 0:
            break
        looked += taken
        for i in range(taken):
            stale[kept] = run[i]
            kept += dead.is_dead(run[i])
        total += taken
    stale_count[0] = kept
    return total - kept


cdef void reverse_places(uint64_t *places, size_t count) noexcept:
    cdef size_t i
    cdef uint64_t place
    for i in range(count / 2):
        place = places[i]
        places[i] = places[count - 1 - i]
        places[count - 1 - i] = place


cdef int check_order(Order order) except -1:
    """Asserts every invariant. O(keys)."""
    cdef uint64_t found[BLOCK]
    cdef Walk walk
    cdef uint64_t keys = 0
    if not order.built:
        return 0
    order.absorb()
    check_tree(order.root, order.mapping.address, order.entries)
    start(order, &walk, None, None, False)
    while not walk.done:
        keys += collect(order, &walk, found, BLOCK, BLOCK, None)
    assert keys == order.table.count, f"the order leads to {keys} keys, the table to {order.table.count}"
    return 0
