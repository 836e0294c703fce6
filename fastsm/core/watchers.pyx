"""The watches that wait for a change, matched with changes outside the writer.

The writer only rings a bell, if one is armed. A thread (`watching`) hears it at most once per millisecond, and scans
what was written since its last round: once for all watches, and without the GIL. Waiting watches are not updated one by
one: how far changes were scanned is stored once for all watches of a group, as its `reach`.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.pythread cimport (
    PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock, PyThread_release_lock,
)
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memset

from fastsm.disk.format cimport (
    FRAME_RUNS, frame_length, frame_run_count, frame_size, is_change, record_index, record_key, record_key_size,
    record_length, record_operation,
)
from fastsm.lookup.terms cimport Run

cdef enum:
    PAIRS = 1 << 16           # pairs of byte values


cdef class Waiting:
    """One wait for a change of a key with a prefix. `queue` receives it when the watch should look again."""

    def __cinit__(self, Changes watch not None, bint durable, queue, owner):
        self.watch, self.prefix, self.durable, self.queue, self.owner = watch, watch._prefix, durable, queue, owner
        self.index = watch.draft.index
        if self.index and (watch.draft.unchecked or not watch.draft.whole):
            self.index -= 1  # the watch still needs that entry, or some of its changes

    def tell(self):
        """Wakes the thread that waits."""
        self.queue.put(self)


cdef class Prefixes:
    """Finds which of many prefixes a key has; quick for the usual case of none.

    Thread safety: used by one thread.
    """

    def __cinit__(self, keys):
        self.keys = tuple(sorted(set(keys)))
        self.count = len(self.keys)
        self.numbers = {key: number for number, key in enumerate(self.keys)}
        self.starts = <const uint8_t **>calloc(self.count, sizeof(void *))
        self.sizes = <size_t *>calloc(self.count, sizeof(size_t))
        self.parents = <int *>calloc(self.count, sizeof(int))
        self.hits = <uint64_t *>calloc(self.count, sizeof(uint64_t))
        self.beginnings = <uint8_t *>calloc(PAIRS // 8, 1)
        if not (self.starts and self.sizes and self.parents and self.hits and self.beginnings):
            raise MemoryError(f"no memory to match {self.count} prefixes")
        self.fill()

    def __dealloc__(self):
        free(self.starts)
        free(self.sizes)
        free(self.parents)
        free(self.hits)
        free(self.beginnings)

    cdef bint concerns(self, Waiting waiting) except -1:
        """Returns whether an entry after the wait's `index` changed a key with its prefix."""
        number = self.numbers.get(waiting.prefix)
        return number is not None and self.hits[<size_t>number] > waiting.index

    cdef void forget_hits(self) noexcept:
        if self.any_hit:
            memset(self.hits, 0, self.count * sizeof(uint64_t))
            self.any_hit = False

    cdef int fill(self) except -1:
        cdef size_t i, pair
        cdef int parent
        cdef bytes key
        for i in range(self.count):
            key = self.keys[i]
            self.starts[i] = <const uint8_t *>PyBytes_AS_STRING(key)
            self.sizes[i] = PyBytes_GET_SIZE(key)
            parent = <int>i - 1
            while parent >= 0 and not key.startswith(<bytes>self.keys[parent]):
                parent = self.parents[parent]
            self.parents[i] = parent
            if self.sizes[i] == 0:
                memset(self.beginnings, 0xFF, PAIRS // 8)
            elif self.sizes[i] == 1:
                memset(self.beginnings + 32 * <size_t>self.starts[i][0], 0xFF, 32)
            else:
                pair = <size_t>self.starts[i][0] << 8 | self.starts[i][1]
                self.beginnings[pair >> 3] |= 1 << (pair & 7)
        return 0

    cdef uint64_t scan(self, const uint8_t *log, uint64_t first, uint64_t end, uint64_t last) noexcept nogil:
        """Scans whole frames from the offset `first` on, as long as they apply no entry after `last`.

        Returns where the next frame starts; 0 if a length cannot be right, because the log is not verified yet.
        """
        cdef const uint8_t *frame
        cdef const uint8_t *record
        cdef const uint8_t *stop
        cdef uint64_t length
        cdef size_t size, pair
        cdef uint32_t runs
        while first < end:
            frame = log + first
            runs = frame_run_count(frame)
            length = frame_length(frame)
            if length > end - first or length < frame_size(runs, 0):
                return 0
            if runs and (<const Run *>(frame + FRAME_RUNS))[runs - 1].last > last:
                return first
            stop = frame + length
            record = frame + frame_size(runs, 0)
            while record < stop:
                length = record_length(record)
                if length > <uint64_t>(stop - record):
                    return 0
                if is_change(record_operation(record)):
                    size = record_key_size(record)
                    pair = 0
                    if size:
                        pair = <size_t>record_key(record)[0] << 8
                        if size > 1:
                            pair |= record_key(record)[1]
                    if self.beginnings[pair >> 3] >> (pair & 7) & 1:
                        self.note(record_key(record), size, record_index(record))
                record += length
            first = stop - log
        return first

    cdef void note(self, const uint8_t *key, size_t size, uint64_t index) noexcept nogil:
        """Notes an entry under each prefix of a key.

        These are: the greatest prefix in the list that the key starts with, then its parent, and so on.
        """
        cdef size_t low = 0
        cdef size_t high = self.count
        cdef size_t middle, shared
        cdef int order, number
        while low < high:
            middle = (low + high) / 2
            shared = min(size, self.sizes[middle])
            order = memcmp(self.starts[middle], key, shared)
            if order < 0 or (order == 0 and self.sizes[middle] <= size):
                low = middle + 1
            else:
                high = middle
        number = <int>low - 1
        while number >= 0:
            if self.sizes[number] <= size and memcmp(self.starts[number], key, self.sizes[number]) == 0:
                self.hits[number] = index
                self.any_hit = True
            number = self.parents[number]


cdef class Group:
    """The watches that wait for what is applied, or for what is durable. Thread safe, under the GIL."""

    def __cinit__(self):
        self.waiting = []
        self.left = []

    cdef int add(self, Waiting waiting, Reach *reach) except -1:
        """Adds a wait of a watch that has seen everything up to `reach`."""
        cdef bint alone = not self.waiting
        self.waiting.append(waiting)
        self.note_change()
        if alone:
            self.reach = reach[0]
            self.left.clear()
        self.armed = True
        return 0

    cdef void note_change(self) noexcept:
        self.prefixes = None
        self.changes += 1

    cdef int take_out(self, Prefixes prefixes, list taken) except -1:
        """Moves waits to `taken`: those that `prefixes` was hit for, or all of them with None."""
        cdef Waiting waiting
        cdef list kept = []
        cdef Py_ssize_t i
        for i in range(len(self.waiting)):  # no Python code runs in this loop
            waiting = self.waiting[i]
            if prefixes is not None and not prefixes.concerns(waiting):
                kept.append(waiting)
                continue
            taken.append(waiting)
            self.let_pass(waiting)
        self.waiting = kept
        self.note_change()
        return 0

    cdef void let_pass(self, Waiting waiting) noexcept:
        """Ends a wait: its watch moves up to the reach, before which no change concerned it."""
        cdef Changes watch = waiting.watch
        waiting.over = True
        if watch.awaited is waiting:  # after an exception during a read, the watch may wait anew
            watch.pass_to(self.reach.index, self.reach.term, self.reach.identity, self.reach.frame)
            watch.awaited = None

    cdef int discard(self, Waiting waiting) except -1:
        """Removes a wait, if it is still in the group."""
        cdef Py_ssize_t i
        for i in range(len(self.waiting)):
            if self.waiting[i] is waiting:
                del self.waiting[i]
                self.note_change()
                self.let_pass(waiting)
                break
        return 0


cdef class Watchers:
    """All waiting watches of a state. Thread safe, under the GIL."""

    def __cinit__(self):
        self.bell = PyThread_allocate_lock()
        if self.bell == NULL:
            raise MemoryError("no memory for the bell of the watches")
        PyThread_acquire_lock(self.bell, 1)
        self.awake = []
        self.applied = Group()
        self.durable = Group()

    def __dealloc__(self):
        if self.bell != NULL:
            if not self.rung:
                PyThread_release_lock(self.bell)
            PyThread_free_lock(self.bell)

    cdef void ring(self) noexcept:
        """Wakes the thread. Runs no Python code, and needs no memory."""
        self.applied.armed = self.durable.armed = False
        if not self.rung:
            self.rung = True
            PyThread_release_lock(self.bell)

    cdef void wake_all(self) noexcept:
        """Makes all watches look again, because the state ends."""
        if self.applied.waiting or self.durable.waiting:
            self.all_end = True
            self.ring()

    cdef void move(self, object mapping, uint64_t identity, uint64_t end, Reach *reach) noexcept:
        """Notes that the log of this mapping was compacted at `end`; changes continue in another log at `reach`."""
        cdef Group group
        for group in (self.applied, self.durable):
            if group.waiting:
                try:
                    group.left.append((mapping, identity, end, reach.index, reach.term, reach.identity, reach.frame))
                except MemoryError:
                    self.all_end = True
        if self.durable.waiting or self.all_end:
            self.ring()

    cdef bint hear(self) noexcept:
        """Waits for the bell; returns False if it was rung by `silence`. Called by one thread only."""
        cdef PyThread_type_lock bell = self.bell
        with nogil:
            PyThread_acquire_lock(bell, 1)
        self.rung = False
        return not self.silent

    def silence(self):
        """Makes the thread end."""
        self.silent = True
        self.ring()

    def discard(self, Waiting waiting):
        """Removes a wait, if it is still in its group, and moves its watch past what did not concern it."""
        (self.durable if waiting.durable else self.applied).discard(waiting)

    def of_watch(self, watch):
        """Returns the waits of one watch; there is more than one only after an exception during a read."""
        cdef Waiting waiting
        cdef list found = []
        for waiting in self.applied.waiting + self.durable.waiting:
            if waiting.watch is watch:
                found.append(waiting)
        return found

    cdef int take_all(self) except -1:
        """Takes out all waits, so that their watches look again."""
        self.all_end = False
        try:
            self.applied.take_out(None, self.awake)
            self.durable.take_out(None, self.awake)
        except MemoryError:
            self.all_end = True
            raise
        return 0

    def __len__(self):
        return len(self.applied.waiting) + len(self.durable.waiting)
