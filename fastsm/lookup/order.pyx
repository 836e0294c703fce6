"""The order of the keys: a tree of places, which readers keep up to date.

A key's entry may be the place of any of its records: the dead map tells whether that record is the newest, and if not,
the table has the newest. So overwrites and deletes cost nothing here; only new keys are recorded, with one store each,
and sorted into the tree at the next read, or on a thread if there are many. A reader that finds an entry of an older
record replaces it with the newest, and removes entries of deleted keys.

    from the table, without the GIL    ─►  sorted  ─►  tree      when the order is needed for the first time
    from a saved table, already sorted             ─►  tree      when it was in use at the last close
    new keys, recorded by apply        ─►  sorted  ─►  tree      before each read: a few directly, many without the GIL

A view consists of the tree at one moment, and the place after the last record of that moment. While it is open, apply
notes for each key that it overwrites or deletes which record was the newest: the only fact that the view could not
determine later.
"""

cimport cython
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memmove

import sys
from _thread import allocate_lock

from fastsm.disk.format cimport record_key, record_key_size
from fastsm.lookup.sorting cimport Item, Pauses, Sorter, begin_sort, go_on_sorting, sorted_places
from fastsm.lookup.table cimport FAILED, SEGMENT_SLOTS, Segment, place_of
from fastsm.lookup.tree cimport Work, hold, release, tree_bytes
from fastsm.lookup.tree_changes cimport Children, insert, make_leaves, make_root, release_all

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() noexcept

GLANCE = 0.05  # seconds between two checks whether to go on waiting

cdef enum:
    GATHERED = 16             # segments of the table that are read in one step: a few tenths of a millisecond
    BATCH = 1 << 13           # places that are inserted between two checks for signals
    TREE_PIECE = 1 << 16      # places that are copied between two checks for signals: whole leaves
    MANY_NEW = 1 << 13        # with this many new keys, and this share of the tree, a thread sorts them in
    SHARE_OF_TREE = 64
    GARBAGE = 1 << 16         # up to this many entries of deleted keys, or as many as there are keys, are tolerated


@cython.no_gc  # it refers to nothing that could refer back to it
cdef class Order:
    """The keys of a table in their order.

    Thread safety: `note` by one writer at a time; everything else under the GIL. Long operations release the GIL in
    between, and then check whether their result is still wanted. A tree that is held never changes.
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
        free(self.moments)
        free(self.gone)
        with nogil:
            release(self.root)

    def __repr__(self):
        state = f"{self.entries} entries" if self.built else "not built"
        return f"<Order: {state}, {self.waiting()} new>"

    @property
    def size(self):
        """The memory that the order takes, in bytes. O(leaves)."""
        return tree_bytes(self.root) + (self.fresh_room + LOOKS) * sizeof(uint64_t)

    @property
    def fresh_keys(self):
        """The number of recorded new keys that are not in the tree."""
        return self.waiting()

    @property
    def open_views(self):
        """The number of views that are open."""
        return self.moment_count

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
        """Ensures that noting so many new keys and changes needs no memory."""
        cdef size_t i = 0
        if self.recording and self.make_room(new_keys) < 0:
            raise MemoryError(f"no memory to keep {self.fresh_count + new_keys} new keys in order")
        while i < self.moment_count:  # if memory runs out, a collection may run and end readers
            reserve_notes(<Moment>self.moments[i], changes)
            i += 1
        return 0

    cdef void tell_readers(self, const uint8_t *arena, uint64_t hashed, uint64_t old) noexcept nogil:
        """Tells open views that a record is no longer its key's newest. While views are open, callers hold the GIL."""
        cdef size_t i
        with gil:
            for i in range(self.moment_count):
                tell_reader(<Moment>self.moments[i], self.table, arena, hashed, old)

    # ---- build and keep up -----------------------------------------------------------------------------

    cdef bint is_behind(self) noexcept:
        """Returns whether there are too many new keys, or entries of deleted keys, to leave them to the next reader."""
        if not self.built or self.builders:
            return False
        return self.waiting() > max(<uint64_t>MANY_NEW, self.entries / SHARE_OF_TREE) or self.has_garbage()

    cdef bint has_garbage(self) noexcept:
        return self.entries > 2 * self.table.count + GARBAGE

    cdef int catch_up(self, tick) except -1:
        """Does long work without the GIL: builds the tree, or sorts many new keys into it.

        Other threads wait in this method during that. The result may be discarded if other threads have changed the
        tree, so the caller must check again.
        """
        cdef Pauses pauses = Pauses(tick)
        cdef bint locked = self.take_lock()
        lock = self.lock  # a forked child may replace it
        if locked:
            self.worker = PyThread_get_thread_ident()
            self.pauses = pauses
        try:
            if not self.built or self.has_garbage():
                self.build(pauses)
            elif self.waiting() > FEW_NEW:
                self.merge(pauses)
        finally:
            if locked:
                self.worker = 0
                self.pauses = None
                lock.release()
        return 0

    cdef bint take_lock(self) except -1:
        """Waits until no other thread does long work here. Returns False if the caller should work without the lock.

        The caller does not wait

        - if it is a signal handler that has interrupted this work on its own thread;
        - if a signal handler has interrupted the work on another thread: that handler may wait for the caller, or for
          the turn that the caller has;
        - if the interpreter is ending, and the other thread no longer runs.
        """
        while self.worker != PyThread_get_thread_ident():
            if self.lock.acquire(True, GLANCE):  # on the main thread, signal handlers run during the wait
                return True
            if (self.pauses is not None and self.pauses.away) or sys.is_finalizing():
                return False
        return False

    cdef int build(self, Pauses pauses) except -1:
        """Builds a new tree from the table. O(keys log keys + bytes that tell them apart), without the GIL."""
        cdef Sorting sorting = Sorting()
        cdef Mapping mapping
        cdef uint64_t *places
        cdef Node *root = NULL
        cdef Node *old
        cdef uint64_t trees = self.trees
        if not self.built and self.builders == 0:
            self.fresh_count = self.absorbed = 0
        self.recording = True
        self.builders += 1
        try:
            if not self.gather(sorting, trees, pauses):
                return 0
            mapping = self.mapping  # read only now: the log may have outgrown the earlier one
            places = sorting.sort(mapping.address, pauses)
            make_tree(places, sorting.count, &root, pauses)
        except BaseException:
            release(root)
            if self.trees == trees:
                self.end_build()
            raise
        if self.trees != trees:
            release(root)
            return 0
        old, self.root = self.root, root
        self.entries = sorting.count
        self.comparisons += sorting.sorter.steps
        self.built = True
        self.trees += 1  # running builds are discarded
        self.builders = 0
        self.absorbed = 0  # the new tree may lack keys that the old one has taken since
        self.version += 1
        with nogil:
            release(old)
        return 0

    cdef int take_sorted(self, const uint64_t *places, size_t count) except -1:
        """Takes the sorted places of all keys of the table as the first tree. O(places), without the GIL."""
        make_tree(places, count, &self.root, Pauses())
        self.entries = count
        self.built = self.recording = self.loaded = True
        self.version += 1
        return 0

    cdef int end_build(self) except -1:
        """Ends a build without a result; an existing tree stays."""
        self.builders -= 1
        if self.builders == 0:
            self.end_builds()
        return 0

    cdef int end_builds(self) except -1:
        """Makes all running builds discard their results."""
        self.builders = 0
        self.trees += 1
        self.recording = self.built
        self.take_off(self.absorbed if self.built else self.fresh_count)
        self.absorbed = 0
        return 0

    cdef bint gather(self, Sorting sorting, uint64_t trees, Pauses pauses) except -1:
        """Reads the table in pieces while it keeps changing; returns False if the build was discarded.

        New keys are recorded starting before the first piece. A split moves keys to a new last segment, where they are
        found a second time; sorting then removes duplicates.
        """
        cdef uint64_t rebuilds = ~self.table.rebuilds
        cdef uint32_t number = 0
        cdef uint32_t stop
        while True:
            if self.trees != trees:
                return False
            if self.table.rebuilds != rebuilds:
                rebuilds = self.table.rebuilds
                number = 0
                sorting.count = 0
                sorting.reserve(self.table.count + self.table.count / 32 + 64)
            stop = min(number + GATHERED, self.table.segment_count)
            if number == stop:
                return True
            sorting.reserve(sorting.count + <size_t>(stop - number) * SEGMENT_SLOTS)
            add_places(self.table, number, stop, sorting)
            number = stop
            with nogil:
                pass
            pauses.take()

    cdef int merge(self, Pauses pauses) except -1:
        """Sorts the new keys into a copy of the tree, without the GIL, and puts the copy in place of the tree."""
        cdef Sorting sorting = Sorting()
        cdef Mapping mapping
        cdef Work work
        cdef Node *root
        cdef uint64_t version = self.version
        cdef uint64_t entries
        cdef size_t count = self.waiting()
        cdef size_t i
        sorting.reserve(count)
        if self.version != version or self.waiting() < count or not self.built:
            return 0
        for i in range(count):
            sorting.add(self.fresh[self.absorbed + i])
        root = self.root
        hold(root)
        entries = self.entries
        mapping = self.mapping
        try:
            insert_all(sorting, mapping, &work, &root, pauses)
        except BaseException:
            release(root)
            raise
        self.comparisons += work.comparisons
        if self.version == version:
            root, self.root = self.root, root
            self.entries = entries + work.added
            self.take_off(count)
        with nogil:
            release(root)
        return 0

    cdef int absorb(self) except -1:
        """Sorts the new keys into the tree directly. Runs no Python code, except to raise MemoryError."""
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
        """Removes the first `count` new keys, now in the tree, from `fresh`; a running build may need them again."""
        self.version += 1
        if self.builders:
            self.absorbed += count
            return
        self.fresh_count -= count
        memmove(self.fresh, self.fresh + count, self.fresh_count * sizeof(uint64_t))
        if self.fresh_count == 0 and self.fresh_room > BATCH:
            free(self.fresh)
            self.fresh = NULL
            self.fresh_room = 0

    cdef void drop(self) noexcept:
        """Drops the tree; the next reader builds one."""
        self.built = self.recording = False
        self.entries = self.builders = 0
        self.fresh_count = self.absorbed = 0
        self.version += 1
        self.trees += 1

    # ---- readers ---------------------------------------------------------------------------------------

    cdef int add_moment(self, void *moment) except -1:
        cdef size_t room
        cdef void **moments
        if self.moment_count == self.moment_room:
            room = 2 * self.moment_room + 4
            moments = <void **>realloc(self.moments, room * sizeof(void *))
            if moments == NULL:
                raise MemoryError(f"no memory for {room} iterators")
            self.moments = moments
            self.moment_room = room
        self.moments[self.moment_count] = moment
        self.moment_count += 1
        return 0

    cdef void remove_moment(self, void *moment) noexcept:
        cdef size_t i
        for i in range(self.moment_count):
            if self.moments[i] == moment:
                self.moment_count -= 1
                self.moments[i] = self.moments[self.moment_count]
                return

    def forget(self):
        """Drops the tree; the next read builds another."""
        cdef Node *root = self.root
        self.root = NULL
        self.drop()
        with nogil:
            release(root)


@cython.no_gc  # it refers only to a table
cdef class Moment:
    """Lets a reader keep reading as of one moment after other records have become the newest of their keys.

    Thread safety: that of the order.
    """

    def __cinit__(self):
        self.notes = Table()


cdef int make_tree(const uint64_t *places, size_t count, Node **root, Pauses pauses) except -1:
    """Builds a tree from sorted places of different keys. O(places); reads no keys."""
    cdef Children leaves
    cdef size_t first = 0
    cdef int failed = 0
    leaves.items = NULL
    leaves.count = leaves.room = 0
    try:
        while first < count and not failed:
            with nogil:
                failed = make_leaves(places + first, min(count - first, <size_t>TREE_PIECE), &leaves)
            first += TREE_PIECE
            pauses.take()
    except BaseException:
        release_all(&leaves)
        raise
    if failed:
        release_all(&leaves)
    elif make_root(&leaves, 0, root) == 0:
        return 0
    raise MemoryError(f"no memory to keep {count} keys in order")


cdef int insert_all(Sorting sorting, Mapping mapping, Work *work, Node **root, Pauses pauses) except -1:
    """Sorts gathered places into a tree that only the caller holds; `work` counts the effort."""
    cdef uint64_t *places
    cdef size_t first = 0
    cdef int failed = 0
    work.arena = mapping.address
    work.added = 0
    places = sorting.sort(mapping.address, pauses)
    work.comparisons = sorting.sorter.steps
    while first < sorting.count and not failed:
        with nogil:
            failed = insert(work, root, places + first, min(sorting.count - first, <size_t>BATCH))
        first += BATCH
        pauses.take()
    if failed:
        raise MemoryError(f"no memory to keep {sorting.count} keys in order")
    return 0


cdef int reserve_notes(Moment moment, size_t changes) except -1:
    """Reserves notes. If that fails, apply goes on; the reader fails later instead."""
    try:
        moment.notes.reserve(changes)
    except MemoryError:
        moment.lost = True
    return 0


cdef void tell_reader(
    Moment moment, Table table, const uint8_t *arena, uint64_t hashed, uint64_t old
) noexcept:
    """Notes which record was the newest of its key at the moment; only the key's first change is noted."""
    cdef const uint8_t *record = arena + old
    cdef Table notes = moment.notes
    if old >= moment.end or moment.lost:
        return
    if notes.seed0 != table.seed0 or notes.seed1 != table.seed1:
        hashed = notes.hash(record_key(record), record_key_size(record))
    if notes.put(arena, hashed, record_key(record), record_key_size(record), old) == FAILED:
        moment.lost = True


cdef void add_places(Table table, uint32_t first, uint32_t stop, Sorting sorting) noexcept:
    """Adds the places in some segments of a table; there is room for all of their slots."""
    cdef Segment *segment
    cdef uint32_t number
    cdef int i
    for number in range(first, stop):
        segment = table.segment_at(number)
        for i in range(SEGMENT_SLOTS):
            if segment.slots[i]:
                sorting.add(place_of(segment.slots[i]))
