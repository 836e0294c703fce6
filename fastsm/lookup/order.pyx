"""The order of the keys: a tree of places, kept up at the readers' cost.

A key's entry is the place of any of its records: the dead map says whether that is the newest, and the table knows the
newest otherwise. So overwrites and deletes cost nothing here; only new keys are noted, one store each, and sorted into
the tree when somebody reads, or on a thread when many have come. A reader who finds an entry of an older record puts
the newest in its place, and takes off entries of deleted keys.

    from the table, without the GIL    ─►  sorted  ─►  tree      when the order is first asked for
    new keys, noted by apply           ─►  sorted  ─►  tree      before each read: a few at once, many without the GIL

A view is the tree at a moment, and the end of the records of that moment. While it is open, apply notes for each key
that it overwrites or deletes which record was the newest: the only thing that the view could not find out.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memmove

from _thread import allocate_lock

from fastsm.disk.format cimport record_key, record_key_size
from fastsm.lookup.sorting cimport Item, Sorter, begin_sort, go_on_sorting, sorted_places
from fastsm.lookup.table cimport FAILED, SEGMENT_SLOTS, Segment, place_of, prefetch
from fastsm.lookup.tree cimport (
    Work, begin_walk, check_tree, hold, insert, owns_path, release, remove, tree_bytes, walk_on,
)

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() noexcept

cdef enum:
    BLOCK = 32                # entries whose cache misses are in flight at the same time
    GATHERED = 16             # segments of the table that are read in one go: some tenths of a millisecond
    BATCH = 1 << 13           # places that are inserted between two looks at signals
    COUNTED = 1 << 17         # entries that are counted without the GIL between two looks at signals
    MANY_NEW = 1 << 13        # new keys, and this share of the tree: a thread sorts them in
    SHARE_OF_TREE = 64
    GARBAGE = 1 << 16         # entries of deleted keys that are left alone, and as many as keys
    FEW_GONE = 64


@cython.no_gc  # it refers to nothing that could refer to it
cdef class Order:
    """The keys of a table in their order.

    Thread safety: `note` by one writer at a time; all else under the GIL. What is long gives it up in between, and looks
    afterwards whether its result is still wanted. A tree that is held never changes.
    """

    def __cinit__(self, Table table, DeadMap dead, Mapping mapping):
        self.table = table
        self.dead = dead
        self.mapping = mapping
        self.lock = allocate_lock()
        self.gone = <uint64_t *>malloc(LOOKS * sizeof(uint64_t))
        if self.gone == NULL:
            raise MemoryError("no memory to keep keys in order")

    def __dealloc__(self):
        free(self.fresh)
        free(self.views)
        free(self.gone)
        with nogil:
            release(self.root)

    def __repr__(self):
        state = f"{self.entries} entries" if self.built else "not built"
        return f"<Order: {state}, {self.waiting()} new>"

    @property
    def size(self):
        """Bytes of memory that it takes. O(leaves)."""
        return tree_bytes(self.root) + (self.fresh_room + LOOKS) * sizeof(uint64_t)

    @property
    def fresh_keys(self):
        """How many new keys are noted, but not in the tree."""
        return self.waiting()

    @property
    def open_views(self):
        """How many readers are not through with their moment."""
        return self.view_count

    # ---- notes -----------------------------------------------------------------------------------------

    cdef int make_room(self, size_t more) noexcept nogil:
        cdef size_t room = self.fresh_count + more
        cdef uint64_t *fresh
        if room <= self.fresh_room:
            return 0
        room += room / 2 + 64
        fresh = <uint64_t *>realloc(self.fresh, room * sizeof(uint64_t))
        if fresh == NULL:
            return -1
        self.fresh = fresh
        self.fresh_room = room
        return 0

    cdef int reserve(self, size_t new_keys, size_t changes) except -1:
        """Makes sure that notes of as many new keys and changes need no memory."""
        cdef size_t i
        if self.recording and self.make_room(new_keys) < 0:
            raise MemoryError(f"no memory to keep {self.fresh_count + new_keys} new keys in order")
        for i in range(self.view_count):
            reserve_notes(<OrderedView>self.views[i], changes)
        return 0

    cdef void tell_views(self, const uint8_t *arena, uint64_t hashed, uint64_t old) noexcept nogil:
        """A record is no longer the newest of its key. Only a table that readers know has views: so the GIL is held."""
        cdef size_t i
        with gil:
            for i in range(self.view_count):
                tell_view(<OrderedView>self.views[i], self.table, arena, hashed, old)

    # ---- build and keep up -----------------------------------------------------------------------------

    cdef bint is_behind(self) noexcept:
        """Whether so much is to be done that the next reader should not have to."""
        if not self.built or self.builder:
            return False
        return self.waiting() > max(<uint64_t>MANY_NEW, self.entries / SHARE_OF_TREE) or self.has_garbage()

    cdef bint has_garbage(self) noexcept:
        return self.entries > 2 * self.table.count + GARBAGE

    cdef int catch_up(self, tick) except -1:
        """Does what is long, without the GIL: builds the tree, or sorts many new keys into it.

        Other threads wait here meanwhile. A signal handler that reads on top of it does not: it does the work itself,
        and the frame below finds it done. It may be done in vain, when others have changed the tree: whoever calls
        looks again.
        """
        cdef unsigned long thread = PyThread_get_thread_ident()
        cdef bint locked = self.worker != thread
        if locked:
            self.lock.acquire()  # in the main thread, signal handlers run meanwhile
            self.worker = thread
        try:
            if not self.built or self.has_garbage():
                self.build(tick)
            elif self.waiting() > FEW_NEW:
                self.merge(tick)
        finally:
            if locked:
                self.worker = 0
                self.lock.release()
        return 0

    cdef int build(self, tick) except -1:
        """Makes a new tree from the table. O(keys log keys + bytes that tell them apart), without the GIL."""
        cdef Sorting sorting = Sorting()
        cdef Mapping mapping
        cdef Work work
        cdef Node *root = NULL
        cdef Node *old
        cdef uint64_t *places
        cdef uint64_t builder
        cdef size_t first = 0
        cdef int failed = 0
        if not self.built:
            self.fresh_count = self.absorbed = 0
        self.recording = True
        self.builds += 1
        self.builder = builder = self.builds
        try:
            if not self.gather(sorting, builder, tick):
                return 0
            mapping = self.mapping  # not before: the log may have outgrown it
            work.arena = mapping.address
            work.added = 0
            places = sorting.sort(mapping.address, tick)
            work.comparisons = sorting.sorter.steps
            while first < sorting.count and not failed:
                with nogil:
                    failed = insert(&work, &root, places + first, min(sorting.count - first, <size_t>BATCH))
                first += BATCH
                PyErr_CheckSignals()
                if tick is not None:
                    tick()
            if failed:
                raise MemoryError(f"no memory to keep {sorting.count} keys in order")
        except BaseException:
            release(root)
            if self.builder == builder:
                self.end_build()
            raise
        if self.builder != builder:
            release(root)
            return 0
        old, self.root = self.root, root
        self.entries = work.added
        self.comparisons += work.comparisons
        self.built = True
        self.builder = 0
        self.absorbed = 0  # the new tree may lack what the old one has taken meanwhile
        self.version += 1
        with nogil:
            release(old)
        return 0

    cdef int end_build(self) except -1:
        """A build that comes to nothing: the old tree stays, if there is one."""
        self.builder = 0
        self.recording = self.built
        self.take_off(self.absorbed if self.built else self.fresh_count)
        self.absorbed = 0
        return 0

    cdef bint gather(self, Sorting sorting, uint64_t builder, tick) except -1:
        """Reads the table in pieces, while it goes on changing; False when another build has begun meanwhile.

        New keys are noted from before the first piece on. A split moves keys to a segment behind all others, where they
        are met again, and sorting leaves one of them.
        """
        cdef uint64_t rebuilds = ~self.table.rebuilds
        cdef uint32_t number = 0
        cdef uint32_t stop
        while True:
            if self.builder != builder:
                return False
            if self.table.rebuilds != rebuilds:
                rebuilds = self.table.rebuilds
                number = 0
                sorting.count = 0
                sorting.reserve(self.table.count + self.table.count / 32 + 64)
            stop = min(number + GATHERED, self.table.segment_count)
            if number == stop:
                return True
            sorting.reserve(sorting.count + places_in_segments(self.table, number, stop, None))
            places_in_segments(self.table, number, stop, sorting)
            number = stop
            with nogil:
                pass
            PyErr_CheckSignals()
            if tick is not None:
                tick()

    cdef int merge(self, tick) except -1:
        """Sorts the new keys into a copy of the tree, without the GIL, and takes it."""
        cdef Sorting sorting = Sorting()
        cdef Mapping mapping
        cdef Work work
        cdef Node *root
        cdef uint64_t *places
        cdef uint64_t version = self.version
        cdef size_t count = self.waiting()
        cdef size_t first = 0
        cdef size_t i
        cdef int failed = 0
        sorting.reserve(count)
        if self.version != version or self.waiting() < count or not self.built:
            return 0
        for i in range(count):
            sorting.add(self.fresh[self.absorbed + i])
        root = self.root
        hold(root)
        mapping = self.mapping
        work.arena = mapping.address
        work.added = 0
        try:
            places = sorting.sort(mapping.address, tick)
            work.comparisons = sorting.sorter.steps
            while first < sorting.count and not failed:
                with nogil:
                    failed = insert(&work, &root, places + first, min(sorting.count - first, <size_t>BATCH))
                first += BATCH
                PyErr_CheckSignals()
                if tick is not None:
                    tick()
            if failed:
                raise MemoryError(f"no memory to keep {sorting.count} new keys in order")
        except BaseException:
            release(root)
            raise
        self.comparisons += work.comparisons
        if self.version == version:
            root, self.root = self.root, root
            self.entries += work.added
            self.take_off(count)
        with nogil:
            release(root)
        return 0

    cdef int absorb(self) except -1:
        """Sorts the new keys into the tree at once. Runs no Python code, unless there is no memory."""
        cdef Item few[FEW_NEW]
        cdef Item *items = few
        cdef Sorter sorter
        cdef Work work
        cdef size_t count = self.waiting()
        cdef size_t i
        cdef int failed
        if count == 0:
            return 0
        if count > FEW_NEW:
            items = <Item *>malloc(count * sizeof(Item))
            if items == NULL:
                raise MemoryError(f"no memory to keep {count} new keys in order")
        for i in range(count):
            items[i].place = self.fresh[self.absorbed + i]
        begin_sort(&sorter, items, count, self.mapping.address, <uint64_t>items)
        while not go_on_sorting(&sorter, 1 << 30):
            pass
        work.arena = self.mapping.address
        work.comparisons = sorter.steps
        work.added = 0
        failed = insert(&work, &self.root, <uint64_t *>items, sorted_places(items, count))
        if items != few:
            free(items)
        self.entries += work.added
        self.comparisons += work.comparisons
        if failed:
            self.drop()
            raise MemoryError(f"no memory to keep {count} new keys in order: the next read begins anew")
        self.take_off(count)
        return 0

    cdef void take_off(self, size_t count) noexcept:
        """The tree has the first `count` of the new keys; one that is being built may need them again."""
        self.version += 1
        if self.builder:
            self.absorbed += count
            return
        self.fresh_count -= count
        memmove(self.fresh, self.fresh + count, self.fresh_count * sizeof(uint64_t))
        if self.fresh_count == 0 and self.fresh_room > BATCH:
            free(self.fresh)
            self.fresh = NULL
            self.fresh_room = 0

    cdef void drop(self) noexcept:
        """There is no tree: the next reader builds one."""
        self.built = self.recording = False
        self.entries = self.builder = 0
        self.fresh_count = self.absorbed = 0
        self.version += 1

    # ---- read ------------------------------------------------------------------------------------------

    cdef void start(self, Walk *walk, bytes start, bytes stop, bint reverse) noexcept:
        """Begins a walk over the present tree, which holds as long as nothing changes; None is open."""
        cdef Work work
        work.arena = self.mapping.address
        work.comparisons = 0
        work.added = 0
        walk.reverse = reverse
        begin_walk(
            &work, walk, self.root,
            NULL if start is None else <const uint8_t *>PyBytes_AS_STRING(start),
            0 if start is None else PyBytes_GET_SIZE(start),
            NULL if stop is None else <const uint8_t *>PyBytes_AS_STRING(stop),
            0 if stop is None else PyBytes_GET_SIZE(stop))
        self.comparisons += work.comparisons

    cdef size_t collect(
        self, Walk *walk, uint64_t *found, size_t room, size_t looks, OrderedView view
    ) noexcept:
        """Takes entries off a range; `found` are the newest places of up to `room` keys, in the walk's direction.

        Stops after `looks` entries, whatever they are, LOOKS at most. Entries of deleted keys are left in `gone`.
        `view`: whose tree it is, else it is the present one, and entries are brought up to date.
        """
        cdef uint64_t places[BLOCK]
        cdef uint8_t which[BLOCK]
        cdef uint64_t *run
        cdef const uint8_t *arena = self.mapping.address
        cdef size_t count = 0
        cdef size_t taken, stale, i, j
        self.gone_count = 0
        while count < room and looks:
            taken = walk_on(walk, min(min(room - count, looks), <size_t>BLOCK), &run)
            if taken == 0:
                break
            looks -= taken
            self.looks += taken
            stale = 0
            for i in range(taken):
                self.dead.expect(run[i])
            for i in range(taken):
                places[i] = run[i]
                if self.dead.is_dead(places[i]):
                    which[stale] = <uint8_t>i
                    stale += 1
                else:
                    prefetch(arena + places[i])
            if stale:
                self.resolve(places, which, stale, view)
                self.keep_gone(walk, run, places, which, stale)
                if view is None and owns_path(walk):
                    for j in range(stale):
                        if places[which[j]]:
                            run[which[j]] = places[which[j]]
            for i in range(taken):
                j = taken - 1 - i if walk.reverse else i
                if places[j]:
                    found[count] = places[j]
                    count += 1
        if walk.reverse:
            reverse_places(self.gone, self.gone_count)
        return count

    cdef void keep_gone(
        self, const Walk *walk, const uint64_t *run, const uint64_t *places, const uint8_t *which, size_t count
    ) noexcept:
        """Adds the entries of a run that lead to no key to `gone`, in the walk's direction."""
        cdef size_t i, j
        for i in range(count):
            j = which[count - 1 - i] if walk.reverse else which[i]
            if places[j] == 0:
                self.gone[self.gone_count] = run[j]
                self.gone_count += 1

    cdef void resolve(self, uint64_t *places, const uint8_t *which, size_t count, OrderedView view) noexcept:
        """Replaces up to BLOCK places of records that are not the newest by those that are, or were for a view.

        0: the key is not there.
        """
        cdef uint64_t hashes[BLOCK]
        cdef const uint8_t *arena = self.mapping.address
        cdef const uint8_t *record
        cdef uint64_t place
        cdef size_t i
        for i in range(count):
            prefetch(arena + places[which[i]])
        for i in range(count):
            record = arena + places[which[i]]
            hashes[i] = self.table.hash(record_key(record), record_key_size(record))
            self.table.prefetch_slot(hashes[i])
        for i in range(count):
            place = self.table.candidate(hashes[i])
            if place:
                prefetch(arena + place)
        for i in range(count):
            record = arena + places[which[i]]
            place = self.table.find(arena, hashes[i], record_key(record), record_key_size(record))
            if view is not None and (place == 0 or place >= view.end):
                place = find_note(view, arena, record)
            places[which[i]] = place

    cdef void forget_gone(self) noexcept:
        """Takes entries of deleted keys, as `collect` left them, off the present tree, unless they are few."""
        cdef Work work
        cdef size_t count = self.gone_count
        self.gone_count = 0
        if count <= FEW_GONE or not self.built:
            return
        work.arena = self.mapping.address
        work.comparisons = work.added = 0
        if remove(&work, &self.root, self.gone, count) < 0:
            self.drop()
            return
        self.entries += work.added
        self.comparisons += work.comparisons

    cdef int add_view(self, void *view) except -1:
        cdef size_t room
        cdef void **views
        if self.view_count == self.view_room:
            room = 2 * self.view_room + 4
            views = <void **>realloc(self.views, room * sizeof(void *))
            if views == NULL:
                raise MemoryError(f"no memory for {room} iterators")
            self.views = views
            self.view_room = room
        self.views[self.view_count] = view
        self.view_count += 1
        return 0

    cdef void remove_view(self, void *view) noexcept:
        cdef size_t i
        for i in range(self.view_count):
            if self.views[i] == view:
                self.view_count -= 1
                self.views[i] = self.views[self.view_count]
                return

    def forget(self):
        """Drops the tree: the next read builds another."""
        cdef Node *root = self.root
        self.root = NULL
        self.drop()
        with nogil:
            release(root)

    def check(self):
        """Asserts every invariant. O(keys)."""
        cdef uint64_t found[BLOCK]
        cdef Walk walk
        cdef uint64_t keys = 0
        if not self.built:
            return
        self.absorb()
        check_tree(self.root, self.mapping.address, self.entries)
        self.start(&walk, None, None, False)
        while not walk.done:
            keys += self.collect(&walk, found, BLOCK, BLOCK, None)
        assert keys == self.table.count, f"the order leads to {keys} keys, the table to {self.table.count}"


@cython.no_gc  # the order does not refer to it
cdef class OrderedView:
    """A range of the keys at a moment, read piece by piece.

    Thread safety: every method under the GIL; `count` gives it up in between, and is called once, alone.
    """

    def __cinit__(self):
        self.notes = Table()

    def __dealloc__(self):
        self.finish()

    cdef int begin(self, Order order, uint64_t end, bytes start, bytes stop, bint reverse) except -1:
        """Takes the tree, which has all keys. `end`: the place behind the last record. Runs no Python code."""
        self.notes.seed0, self.notes.seed1 = order.table.seed0, order.table.seed1
        order.add_view(<void *>self)
        self.order = order
        self.root = order.root
        hold(self.root)
        self.end = end
        order.start(&self.walk, start, stop, reverse)
        return 0

    cdef size_t take(self, uint64_t *found, size_t room) except? 0xFFFFFFFFFFFFFFFF:
        """The places of up to `room` keys; none at the end, and also after many entries of deleted keys."""
        cdef size_t count
        if self.order is None:
            return 0
        count = self.order.collect(&self.walk, found, room, LOOKS, self)
        self.order.forget_gone()
        if self.lost:
            self.finish()
            raise MemoryError("no memory to note what was overwritten while an iterator was open")
        return count

    cdef uint64_t count(self) except? 0xFFFFFFFFFFFFFFFF:
        """How many keys are left. O(keys), mostly without the GIL."""
        cdef uint64_t stale[LOOKS]
        cdef uint64_t total = 0
        cdef size_t stale_count = 0
        while not self.walk.done:
            with nogil:
                total += count_newest(&self.walk, self.order.dead, stale, &stale_count)
            total += self.count_stale(stale, stale_count)
            if self.lost:
                raise MemoryError("no memory to note what was overwritten while keys were counted")
            PyErr_CheckSignals()
        self.finish()
        return total

    cdef size_t count_stale(self, uint64_t *stale, size_t count) noexcept:
        """How many of these entries led to a key; the others are taken off the present tree."""
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
            order.resolve(places, which, size, self)
            for i in range(size):
                if places[i]:
                    total += 1
                else:
                    order.gone[order.gone_count] = stale[first + i]
                    order.gone_count += 1
        order.forget_gone()
        return total

    cdef void finish(self) noexcept:
        """Gives everything back. Idempotent."""
        cdef Node *root = self.root
        _order = self.order  # until all is changed: its end may let another thread run
        if self.order is None:
            return
        self.order.remove_view(<void *>self)
        self.order = None
        self.root = NULL
        self.walk.done = True
        with nogil:
            release(root)


cdef uint64_t count_newest(Walk *walk, DeadMap dead, uint64_t *stale, size_t *stale_count) noexcept nogil:
    """Counts entries of newest records, and keeps the others: as many as there is room for."""
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


cdef int reserve_notes(OrderedView view, size_t changes) except -1:
    """Apply does not fail for a reader's sake: the reader does, later."""
    try:
        view.notes.reserve(changes)
    except MemoryError:
        view.lost = True
    return 0


cdef void tell_view(
    OrderedView view, Table table, const uint8_t *arena, uint64_t hashed, uint64_t old
) noexcept:
    """Notes which record was the newest of its key at the view's moment: only the first change finds such a one."""
    cdef const uint8_t *record = arena + old
    cdef Table notes = view.notes
    if old >= view.end or view.lost:
        return
    if notes.seed0 != table.seed0 or notes.seed1 != table.seed1:
        hashed = notes.hash(record_key(record), record_key_size(record))
    if notes.put(arena, hashed, record_key(record), record_key_size(record), old) == FAILED:
        view.lost = True


cdef uint64_t find_note(OrderedView view, const uint8_t *arena, const uint8_t *record) noexcept:
    cdef uint64_t hashed = view.notes.hash(record_key(record), record_key_size(record))
    return view.notes.find(arena, hashed, record_key(record), record_key_size(record))


cdef size_t places_in_segments(Table table, uint32_t first, uint32_t stop, Sorting sorting) noexcept:
    """How many keys are in segments of a table; with `sorting`, which has room for them, they are added to it."""
    cdef Segment *segment
    cdef size_t count = 0
    cdef uint32_t number
    cdef size_t i
    for number in range(first, stop):
        segment = table.segment_at(number)
        count += segment.count
        if sorting is not None:
            for i in range(SEGMENT_SLOTS):
                if segment.slots[i]:
                    sorting.add(place_of(segment.slots[i]))
    return count
