"""A Raft log as PySyncObj sees it: a list of `(command, index, term)`, whose first entry may have any index.

PySyncObj often reads `journal[-1]`, so this is compiled. Each command starts with a mark of the integration's, which
says whose entry it is; the log below does not interpret it.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport UINT64_MAX, uint8_t, uint64_t

from fastsm.journal.entries cimport Reading, command_of
from fastsm.journal.format cimport ITEM_ENTRY, Item, item_data, item_index, item_size, item_term
from fastsm.journal.journal cimport Journal

from fastsm.disk import format
from fastsm.errors import OrderError
from fastsm.journal.journal import LARGEST_COMMAND

cdef uint64_t LARGEST = format.MAX_INDEX
cdef uint64_t LARGEST_SIZE = LARGEST_COMMAND

cdef enum:
    SMALL_SEGMENT = 1 << 20      # bytes; not worth a new segment when the front is cut


cdef inline object triple(const uint8_t *frame):
    return command_of(frame), item_index(frame), item_term(frame)


cdef class Positions(Journal):
    """A list of `(command, index, term)` with a term, a vote and a commit index. Thread safety: that of the log."""

    # ---- read ------------------------------------------------------------------------------------------

    @property
    def first_index(self):
        """The index of the first entry; 0 if there is none."""
        return self.first if self.count else 0

    @property
    def last_index(self):
        """The index of the last entry; 0 if there is none."""
        return self.last() if self.count else 0

    @property
    def synced_index(self):
        """The last entry that a sync has covered, so that it survives a power loss; 0 if there is none."""
        return min(self.synced, self.last()) if self.count else 0

    @property
    def commit_index(self):
        """The value last passed to `set_commit_index`, or `last_index` if that is lower."""
        return min(self.committed, self.last()) if self.count else 0

    @property
    def term(self):
        """The current term, as set by `set_vote`; 0 at first."""
        return self.current_term

    @property
    def vote(self):
        """The node that got this node's vote in the current term, or None."""
        return None if self.current_vote is None else self.current_vote.decode()

    cdef bint is_vote(self, bytes vote) except -1:
        try:
            if vote is not None:
                vote.decode()
        except UnicodeDecodeError:
            return False
        return True

    def __len__(self):
        return self.count

    def __bool__(self):
        return True

    def __getitem__(self, item):
        """Returns `(command, index, term)` at a position, which may be negative; a slice returns a list."""
        cdef Py_ssize_t position
        if isinstance(item, slice):
            start, stop, step = item.indices(self.count)
            entries = []
            for position in range(start, stop, step):
                if not 0 <= position < <Py_ssize_t>self.count:
                    break  # the slice's own numbers, or a finalizer, have just removed entries
                entries.append(self.at(position))
            return entries
        position = item
        if position < 0:
            position += self.count
        if not 0 <= position < <Py_ssize_t>self.count:
            raise IndexError(f"position {item} of {self.count} entries")
        if position == <Py_ssize_t>self.count - 1:
            if self.last_entry is None or self.last_seen != self.back_changes:
                self.last_seen = self.back_changes
                self.last_entry = self.at(position)
            return self.last_entry
        if position == 0:
            if self.first_entry is None or self.first_seen != self.front_changes:
                self.first_seen = self.front_changes
                self.first_entry = self.at(0)
            return self.first_entry
        return self.at(position)

    cdef object at(self, size_t position):
        return triple(self.frame_at(position))

    def term_at(self, uint64_t index):
        """Returns the term of an entry, or None if it does not exist. O(1)."""
        if not self.count or not self.first <= index <= self.last():
            return None
        return item_term(self.frame_at(index - self.first))

    cdef Reading reading(self, uint64_t index, uint64_t count, uint64_t most_bytes):
        """Reads up to `count` entries from `index` on; stops after the one that brings the total to `most_bytes`."""
        cdef uint64_t last = index + min(count, UINT64_MAX - index)
        cdef uint64_t size = 0
        cdef uint64_t stop = index
        if index >= self.first:
            last = min(last, self.first + self.count)
            while stop < last and size < most_bytes:
                size += item_size(self.frame_at(stop - self.first))
                stop += 1
        return self.hold(index, stop, UINT64_MAX)

    def entries(self, uint64_t index, uint64_t count, uint64_t most_bytes=UINT64_MAX):
        """Returns at most `count` entries from `index` on, as `(command, index, term)`.

        The last one is the entry that brings their total size to `most_bytes`. O(what is returned).
        """
        cdef Reading reading = self.reading(index, count, most_bytes)
        cdef list found = []
        cdef size_t i
        for i in range(reading.count):
            found.append(triple(reading.frames[i]))
        return found

    def marked(self, uint64_t index, uint64_t count, uint64_t most_bytes, uint8_t mark, bytes filler):
        """Returns entries as `(index, term, command)` for a state machine, and the positions of those not meant for it.

        Entries whose command starts with the byte `mark` are meant for it, and returned without the mark; others are
        replaced by `filler`. Ends like `entries`. O(what is returned).
        """
        cdef Reading reading = self.reading(index, count, most_bytes)
        cdef const uint8_t *frame
        cdef list found = []
        cdef list others = []
        cdef size_t i
        for i in range(reading.count):
            frame = reading.frames[i]
            if item_size(frame) and item_data(frame)[0] == mark:
                command = PyBytes_FromStringAndSize(<const char *>item_data(frame) + 1, item_size(frame) - 1)
            else:
                others.append(i)
                command = filler
            found.append((item_index(frame), item_term(frame), command))
        return found, others

    def without_marks(self, uint64_t index, uint64_t stop, bytes marks):
        """Returns the indexes in [index, stop) of entries whose command starts with none of `marks`. O(entries)."""
        cdef Reading reading = self.hold(max(index, self.first), stop, UINT64_MAX)
        cdef const uint8_t *frame
        cdef list found = []
        cdef size_t i
        for i in range(reading.count):
            frame = reading.frames[i]
            if not item_size(frame) or item_data(frame)[0] not in marks:
                found.append(item_index(frame))
        return found

    # ---- change ----------------------------------------------------------------------------------------

    cpdef add(self, bytes command, uint64_t index, uint64_t term):
        """Appends the next entry. O(size); durable after `sync`.

        If there are no entries, it may have any index. Raises `OrderError` for any other than the next index, a falling
        term, or a command that is too large, and `StorageError`; then nothing has changed.
        """
        cdef Item item
        self.check_open()
        if self.count and index != self.last() + 1:
            raise OrderError(f"{self.path}: expected entry {self.last() + 1}, found {index}", index=index)
        if self.count and term < self.last_term():
            raise OrderError(f"{self.path}: the term of entry {index} cannot fall to {term}", index=index)
        if not 0 < index <= LARGEST or term > LARGEST:
            raise OrderError(
                f"{self.path}: expected an index of at least 1 and a term, neither above {LARGEST}, found {index} and "
                f"{term}", index=index)
        if <uint64_t>PyBytes_GET_SIZE(command) > LARGEST_SIZE:
            raise OrderError(
                f"{self.path}: entry {index} has {len(command)} bytes: expected at most {LARGEST_SIZE}", index=index)
        if not self.count and (index != self.first or term < self.border_term):
            self.begin_after(index - 1, term)
        item = Item(index, term, <const uint8_t *>PyBytes_AS_STRING(command), PyBytes_GET_SIZE(command), ITEM_ENTRY)
        self.append_entries(&item, 1)
        self.last_entry, self.last_seen = (command, index, term), self.back_changes

    def cut(self, uint64_t index):
        """Removes the entries from `index` on, in one step. O(segments)."""
        if self.count and index <= self.last():
            self.remove_from(max(index, self.first))

    def clear(self):
        """Removes all entries, in one step; the next one may have any index."""
        self.cut(0)

    def rebase(self, bytes command, uint64_t index, uint64_t term):
        """Replaces all entries with one, in one step, after a snapshot was installed. O(segments)."""
        if not 0 < index <= LARGEST or term > LARGEST:
            raise OrderError(
                f"{self.path}: expected an index of at least 1 and a term, neither above {LARGEST}, found {index} and "
                f"{term}", index=index)
        self.replace_all(index, term, command)

    def rotate(self):
        """Begins a new segment if the newest is large, so that files can be removed once the front is cut.

        `prepare` makes the file in advance, on another thread. O(segments), and a sync with `durable`.
        """
        self.check_open()
        if self.count and self.newest.end >= SMALL_SEGMENT:
            self.go_on(self.first, self.border_term)

    def truncate_before(self, uint64_t index):
        """Removes the entries before `index`, which stays, in one step, with a new segment like `rotate`. O(segments).

        Files that are no longer needed are removed by `remove_retired`.
        """
        if not self.count or index <= self.first:
            return
        if index > self.last():
            raise OrderError(f"{self.path}: cannot remove all entries up to {index}: one must stay", index=index)
        self.check_open()
        if self.newest.end < SMALL_SEGMENT:
            self.remove_up_to(index - 1)
        else:
            self.go_on(index, item_term(self.frame_at(index - 1 - self.first)))

    def set_vote(self, uint64_t term, vote):
        """Sets the current term, and the vote in it: a str, or None for no vote yet. Durable after `sync`."""
        self.note_vote(term, None if vote is None else vote.encode())
