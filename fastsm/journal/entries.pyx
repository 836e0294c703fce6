"""The entries of a Raft log: where each of them is. Only this is in memory; the bytes are in the mapped files."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove

from fastsm.journal.format cimport item_data, item_index, item_size, item_term
from fastsm.named cimport named, set_field

from fastsm.types import Entry

cdef type ENTRY = Entry

cdef enum:
    SMALLEST_ROOM = 1024         # entries


cdef object command_of(const uint8_t *frame):
    """Returns a copy of an entry's command."""
    return PyBytes_FromStringAndSize(<const char *>item_data(frame), item_size(frame))


cdef object entry_of(const uint8_t *frame, object term):
    """Returns an `Entry`, given its term."""
    cdef object index = item_index(frame)
    cdef object command = command_of(frame)
    cdef object entry = named(ENTRY, 3)
    set_field(entry, 0, index)
    set_field(entry, 1, term)
    set_field(entry, 2, command)
    return entry


cdef class Reading:
    """Entries as they were at one moment, and the segments that contain them, whatever happens to the log meanwhile."""

    def __dealloc__(self):
        free(self.frames)

    cdef list listed(self):
        """Returns the entries as a list of `Entry`."""
        cdef list found = []
        cdef object term = None
        cdef uint64_t last = 0
        cdef size_t i
        for i in range(self.count):
            if term is None or item_term(self.frames[i]) != last:
                last = item_term(self.frames[i])
                term = last
            found.append(entry_of(self.frames[i], term))
        return found


cdef class Entries:
    """Consecutive entries of a Raft log, at eight bytes each.

    Thread safety: `hold` from any thread; changes from one thread at a time.
    """

    def __cinit__(self, *_, **__):
        self.frames = NULL
        self.first = 1
        self.segments = []

    def __dealloc__(self):
        free(self.frames)

    cdef const uint8_t *frame_at(self, size_t position) noexcept nogil:
        return self.frames[self.head + position]

    cdef uint64_t last(self) noexcept:
        """Returns the last entry; without entries, the index before the first one."""
        return self.first + self.count - 1

    cdef Reading hold(self, uint64_t index, uint64_t stop, uint64_t most_bytes):
        """Returns the existing entries in [index, stop) whose commands have at most `most_bytes` in total.

        The first one is returned even if it is larger. O(what is returned).
        """
        cdef Reading reading = Reading()
        cdef list segments = self.segments[:]  # not list(): without memory CPython's loses a reference to its argument
        cdef uint64_t size = 0
        cdef size_t position, count, i
        # From here to the return no object is made: a garbage collection could run code that changes the log.
        reading.segments = segments
        stop = min(stop, self.first + self.count)
        if not self.first <= index < stop:
            return reading
        position = index - self.first
        count = stop - index
        if most_bytes != <uint64_t>-1:
            for i in range(count):
                size += item_size(self.frames[self.head + position + i])
                if size > most_bytes and i:
                    count = i
                    break
        reading.frames = <const uint8_t **>malloc(count * sizeof(uint8_t *))
        if reading.frames == NULL:
            raise MemoryError(f"not enough memory to read {count} entries of the log")
        memcpy(reading.frames, self.frames + self.head + position, count * sizeof(uint8_t *))
        reading.count = count
        return reading

    # ---- change ----------------------------------------------------------------------------------------

    cdef int reserve(self, size_t more) except -1:
        """Reserves room for `more` entries: adding them then needs no memory."""
        cdef size_t room
        cdef const uint8_t **frames
        if self.head + self.count + more <= self.room:
            return 0
        if self.head > self.count and self.count + more <= self.room:
            memmove(self.frames, self.frames + self.head, self.count * sizeof(uint8_t *))
            self.head = 0
            return 0
        room = max(2 * self.room, max(self.head + self.count + more, <size_t>SMALLEST_ROOM))
        frames = <const uint8_t **>realloc(self.frames, room * sizeof(uint8_t *))
        if frames == NULL:
            raise MemoryError(f"not enough memory for {room} entries of the log")
        self.frames, self.room = frames, room
        return 0

    cdef void push(self, const uint8_t *frame) noexcept nogil:
        self.frames[self.head + self.count] = frame
        self.count += 1
        self.back_changes += 1
        if self.count == 1:
            self.front_changes += 1

    cdef void start_over(self, uint64_t first) noexcept:
        """Drops all entries; the next one is `first`."""
        self.first = first
        self.head = self.count = 0
        self.front_changes += 1
        self.back_changes += 1

    cdef void drop_from(self, uint64_t index) noexcept:
        """Drops the entries from `index` on, which is not before the first."""
        self.count = index - self.first
        self.back_changes += 1
        if not self.count:
            self.head = 0
            self.front_changes += 1

    cdef void drop_before(self, uint64_t index) noexcept:
        """Drops the entries before `index`, which is at most the next one."""
        if index > self.first:
            self.head += index - self.first
            self.count -= index - self.first
            self.first = index
            self.front_changes += 1
            if not self.count:
                self.head = 0
                self.back_changes += 1
