"""The entries of a journal: where each lies. In memory alone; the bytes are in the mapped files."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport UINT64_MAX, uint8_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memmove

from fastsm.journal.format cimport item_data, item_index, item_size, item_term

cdef enum:
    SMALLEST_ROOM = 1024         # entries


cdef class Entries:
    """Entries `first_index` to `last_index` of a Raft log, eight bytes each: a list of `(command, index, term)`.

    Thread safety: none; one thread at a time.
    """

    def __cinit__(self, *_, **__):
        self.frames = NULL

    def __dealloc__(self):
        free(self.frames)

    @property
    def first_index(self):
        """The index of the first entry; 0 when there is none."""
        return self.first if self.count else 0

    @property
    def last_index(self):
        """The index of the last entry; 0 when there is none."""
        return self.first + self.count - 1 if self.count else 0

    def __len__(self):
        return self.count

    def __bool__(self):
        return True

    def __getitem__(self, item):
        """`(command, index, term)` at a position from 0 on, or from the end; a slice gives a list. As lists do it."""
        cdef Py_ssize_t position
        if isinstance(item, slice):
            start, stop, step = item.indices(self.count)
            entries = []
            for position in range(start, stop, step):
                if not 0 <= position < <Py_ssize_t>self.count:
                    break  # the slice's own numbers, or a finalizer, removed entries meanwhile
                entries.append(self.entry_at(position))
            return entries
        position = item
        if position < 0:
            position += self.count
        if not 0 <= position < <Py_ssize_t>self.count:
            raise IndexError(f"position {item} of {self.count} entries")
        if position == <Py_ssize_t>self.count - 1:
            if self.last_entry is None:
                self.last_entry = self.entry_at(position)
            return self.last_entry
        if position == 0:
            if self.first_entry is None:
                self.first_entry = self.entry_at(0)
            return self.first_entry
        return self.entry_at(position)

    cdef const uint8_t *frame_at(self, size_t position) noexcept nogil:
        return self.frames[self.head + position]

    cdef object entry_at(self, size_t position):
        cdef const uint8_t *frame = self.frame_at(position)
        return (
            PyBytes_FromStringAndSize(<const char *>item_data(frame), item_size(frame)), item_index(frame),
            item_term(frame))

    def term_at(self, uint64_t index):
        """The term of an entry, or None when it is not there. O(1)."""
        if not self.count or not self.first <= index < self.first + self.count:
            return None
        return item_term(self.frame_at(index - self.first))

    cdef uint64_t stop_of(self, uint64_t index, uint64_t count) noexcept:
        """Where a range of at most `count` entries from `index` on ends; `index`, when none of them is there."""
        cdef uint64_t stop = self.first + self.count
        if not self.count or not self.first <= index < stop:
            return index
        return index + min(count, stop - index)

    def entries(self, uint64_t index, uint64_t count, uint64_t most_bytes=UINT64_MAX):
        """At most `count` entries from `index` on, `(command, index, term)`, and no more behind `most_bytes`.

        The one with which the sum of their sizes comes to `most_bytes` is the last. O(what is returned).
        """
        cdef uint64_t stop = self.stop_of(index, count)
        cdef uint64_t size = 0
        cdef list found = []
        while index < stop and size < most_bytes:
            size += item_size(self.frame_at(index - self.first))
            found.append(self.entry_at(index - self.first))
            index += 1
        return found

    def marked(self, uint64_t index, uint64_t count, uint64_t most_bytes, uint8_t mark, bytes filler):
        """Entries as `(index, term, command)`, for a state machine; and the positions that are not its own.

        Those whose command starts with the byte `mark` are: they are given without it. The others are given as
        `filler`. Ends like `entries`. O(what is returned).
        """
        cdef uint64_t stop = self.stop_of(index, count)
        cdef uint64_t size = 0
        cdef const uint8_t *frame
        cdef list found = []
        cdef list others = []
        while index < stop and size < most_bytes:
            frame = self.frame_at(index - self.first)
            size += item_size(frame)
            if item_size(frame) and item_data(frame)[0] == mark:
                command = PyBytes_FromStringAndSize(<const char *>item_data(frame) + 1, item_size(frame) - 1)
            else:
                others.append(len(found))
                command = filler
            found.append((index, item_term(frame), command))
            index += 1
        return found, others

    def without_marks(self, uint64_t index, uint64_t stop, bytes marks):
        """The indexes in [index, stop) of entries whose command starts with none of these bytes. O(stop - index)."""
        cdef list found = []
        cdef const uint8_t *frame
        index = max(index, self.first)
        stop = min(stop, self.first + self.count)
        while index < stop:
            frame = self.frame_at(index - self.first)
            if not item_size(frame) or item_data(frame)[0] not in marks:
                found.append(index)
            index += 1
        return found

    # ---- change ----------------------------------------------------------------------------------------

    cdef int reserve(self) except -1:
        """Room for one more entry: afterwards adding it cannot fail in memory."""
        cdef size_t room
        cdef const uint8_t **frames
        if self.head + self.count < self.room:
            return 0
        if self.head > self.count:
            memmove(self.frames, self.frames + self.head, self.count * sizeof(uint8_t *))
            self.head = 0
            return 0
        room = max(2 * self.room, <size_t>SMALLEST_ROOM)
        frames = <const uint8_t **>realloc(self.frames, room * sizeof(uint8_t *))
        if frames == NULL:
            raise MemoryError(f"no memory for {room} entries of the journal")
        self.frames, self.room = frames, room
        return 0

    cdef void push(self, const uint8_t *frame) noexcept:
        self.frames[self.head + self.count] = frame
        self.count += 1

    cdef void start_over(self, uint64_t first) noexcept:
        """Without entries; the next one is `first`."""
        self.first = first
        self.head = self.count = 0
        self.first_entry = self.last_entry = None

    cdef void drop_from(self, uint64_t index) noexcept:
        """Drops the entries from `index` on, which is not before the first."""
        self.count = index - self.first
        self.last_entry = None
        if not self.count:
            self.first_entry = None

    cdef void drop_before(self, uint64_t index) noexcept:
        if self.count and index > self.first:
            self.head += index - self.first
            self.count -= index - self.first
            self.first = index
            self.first_entry = None
