"""The log as a stream of changes: starting from a place, what each entry did to the keys, in order.

A place is an entry's index and the number of its changes that were delivered. It means the same in every log that
contains the entry, so after a compaction, which copies frames, the place is found again by its index; the offset in the
file is only remembered. `steps` goes along the log; this module tracks which log, and what was delivered.

A read works on a draft of its place, which becomes the place once the changes were delivered: if the read ends earlier,
none is lost. It holds the log's mapping only while it runs.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset

from fastsm.disk.format cimport (
    LARGE, LOG_HEADER_SIZE, RECORD_PUT, RUN_SIZE, UNKNOWN_TERM, frame_run_count, record_index, record_key,
    record_key_size, record_length, record_operation, record_value_size,
)
from fastsm.generation.steps cimport DAMAGED, ENDED, FOUND, MISMATCH, PAUSED, advance, count_told, enter, pass_entry
from fastsm.lookup.terms cimport Run
from fastsm.named cimport named, set_field

from fastsm.arguments import bytes_of, watch_start
from fastsm.errors import CompactedError, CorruptionError, NotRunningError, ReentryError
from fastsm.types import Change, Position

cdef enum:
    SLICE = 64 << 20          # bytes passed between two checks for signals: about 10 ms
    PIECE = 1 << 20           # bytes that a coroutine passes or takes before it lets others run
    TAKEN_AT_ONCE = 4096      # changes that are made before other threads may run

cdef uint64_t LARGEST = UNKNOWN_TERM - 1
NOT_YET = object()

cdef type CHANGE = Change


cdef inline object change_of(object index, object term, object key, object value):
    """Returns a `Change`."""
    cdef object change = named(CHANGE, 4)
    set_field(change, 0, index)
    set_field(change, 1, term)
    set_field(change, 2, key)
    set_field(change, 3, value)
    return change


def changes_of(Mapping mapping or None, uint64_t stop, uint64_t index):
    """Returns how many changes an entry made, in a log's frames before `stop`; None if that is unknown."""
    cdef Place place
    cdef Wanted wanted
    cdef uint64_t left = UNKNOWN_TERM
    cdef int result
    if mapping is None:
        return None
    memset(&place, 0, sizeof(Place))
    memset(&wanted, 0, sizeof(Wanted))
    wanted.log, wanted.end, wanted.last = mapping.address + mapping.start, stop, LARGEST
    wanted.prefix = wanted.log  # an empty prefix
    place.index, place.frame = index, LOG_HEADER_SIZE
    with nogil:
        result = enter(&place, &wanted, &left)
        if result == FOUND:
            count_told(&place, &wanted)
    return None if result == DAMAGED else place.offset


# ---- where the log is --------------------------------------------------------------------------------

cdef class Source:
    """A log as a watch sees it: it grows, is compacted, and may be replaced.

    Subclasses override `look`, which passes the log's present state to `take`, and raises if nothing can be read any
    more. A subclass in Python need not define `is_over`.
    """

    def take(
        self, Mapping mapping not None, str path, uint64_t state, uint64_t identity, uint64_t end, uint64_t last_frame,
        base, last, newest=None, uint64_t base_changes=ALL,
    ):
        """Stores what a look found. `base`, `last` (to be delivered) and `newest` (default: `last`) are ids."""
        self.base_index, self.base_term = base
        self.index, self.term = last
        self.newest_index, self.newest_term = last if newest is None else newest
        self.mapping, self.path, self.state, self.identity = mapping, path, state, identity
        self.end, self.last_frame, self.base_changes = end, last_frame, base_changes

    cpdef int look(self) except -1:
        """Reads the log as it is at this moment."""
        raise NotImplementedError

    cpdef bint is_over(self) except -1:
        """Returns whether the iteration ends, after `look` has raised a `NotRunningError`."""
        return True

    cdef void release(self) noexcept:
        self.mapping = None


# ---- read --------------------------------------------------------------------------------------------

cdef class Changes:
    """Reads a source's changes of keys with a prefix, starting at a place.

    Subclasses define how to wait: `_wait_for_change(timeout)` returns whether it is worth looking again.

    Thread safety: one reader at a time (a second one gets a `ReentryError`); `position` and closing from any thread.
    """

    def __init__(self, Source source, prefix, start):
        """Finds the place to start: a position, an index, or None for what is applied after now."""
        self._source = source
        self._prefix = bytes_of(prefix, "prefix")
        memset(&self.place, 0, sizeof(Place))
        if start is not None:
            self.start_at(start)
        self.begin()
        try:
            source.look()
            if start is None:
                self.draft.index, self.draft.term, self.draft.whole = source.newest_index, source.newest_term, True
            self.state = source.state
            self.look()
            if start is None and source.last_frame:
                if frame_run_count(self.wanted.log + source.last_frame):
                    self.draft.frame = source.last_frame
            self.settle()
            self.place = self.draft
        finally:
            self.end()

    cdef int start_at(self, start) except -1:
        """Takes an index or a position, which may be a plain tuple."""
        self.place.unchecked = True
        self.place.term = UNKNOWN_TERM
        index, term, offset = watch_start(start)
        self.place.index = index
        if term is not None:
            self.place.term = term
        self.place.whole = offset is None
        if offset is not None:
            self.place.offset = offset
        return 0

    @property
    def position(self):
        """The place where reading continues: the last entry delivered or passed, and how many of its changes were.

        A watch that starts at this `Position` continues there, even in another process or after a restart. The term is
        None if it is unknown because the entry was not seen (yet).
        """
        cdef Place place = self.place
        return Position(place.index, None if place.term == UNKNOWN_TERM else place.term, place.offset)

    # ---- the limits of a read --------------------------------------------------------------------------

    cdef int begin(self) except -1:
        if self._source is None:
            raise TypeError("this watch was made without a source: use the method `watch` of a machine or a reader")
        if self.reading:
            raise ReentryError("this watch is being read already: it has one consumer; open a watch for each consumer")
        self.reading = True
        self.reader = PyThread_get_thread_ident()
        self.awaited = None
        self.draft = self.place
        self.size = 0
        return 0

    cdef void end(self) noexcept:
        self.reading = False
        self._source.release()

    def _begin(self):
        """Begins a read, which excludes others until `_end`."""
        self.begin()

    def _end(self):
        self.end()

    def _is_read_here(self):
        """Returns whether the calling thread has begun a read that is not over."""
        return self.reading and self.reader == PyThread_get_thread_ident()

    def _hand_over(self):
        """Marks the changes taken so far as delivered; the read may go on from there."""
        self.place = self.draft
        self.size = 0

    cdef int look(self) except -1:
        """Uses the log as `source.look` has found it, and finds the draft's place in it."""
        cdef Source source = self._source
        self.wanted.log = source.mapping.address + source.mapping.start
        self.wanted.end, self.wanted.last = source.end, source.index
        self.wanted.prefix = <const uint8_t *>PyBytes_AS_STRING(self._prefix)
        self.wanted.prefix_size = PyBytes_GET_SIZE(self._prefix)
        if source.state != self.state:
            raise self._gone("the state was replaced, by a reset or an install")
        if self.draft.identity != source.identity or self.draft.index < source.base_index:
            self.find_place()
        return 0

    def _look(self):
        """Looks at the log as it is now; raises the reason if the watch has ended."""
        if self._closed:
            raise NotRunningError("this watch is closed: open another one, from its position")
        self._source.look()
        self.look()

    cdef int find_place(self) except -1:
        """Moves the draft to the start of a log that is new to it; raises if the place was compacted."""
        cdef Source source = self._source
        cdef Place *draft = &self.draft
        if draft.index < source.base_index:
            raise self._gone(f"entries up to {source.base_index} were compacted")
        draft.identity = source.identity
        draft.frame = LOG_HEADER_SIZE
        draft.at = draft.stop = 0
        draft.left = draft.offset
        if draft.index > source.base_index:
            return 0
        if draft.unchecked and draft.term == UNKNOWN_TERM:
            draft.term = source.base_term
        draft.unchecked = False
        if draft.term != source.base_term:
            raise self._gone(f"entry {draft.index} is of term {source.base_term}, not {draft.term}")
        if draft.whole and draft.offset == 0 and source.base_changes != ALL and PyBytes_GET_SIZE(self._prefix) == 0:
            draft.offset = source.base_changes
        if not draft.whole:
            # The log's header says how many changes the entry made in total, but not how many with this prefix.
            if draft.offset != source.base_changes and (
                draft.offset or (PyBytes_GET_SIZE(self._prefix) == 0 and source.base_changes != ALL)
            ):
                raise self._gone(f"the rest of entry {draft.index} was compacted")
            draft.whole = True
        return 0

    def _gone(self, str what):
        cdef uint64_t oldest = self._source.base_index + 1
        return CompactedError(
            f"the changes after entry {self.draft.index} are gone: {what}. The oldest possible start is {oldest}; "
            "read the state by scan(), then watch from its revision + 1", oldest=oldest)

    cdef int settle(self) except -1:
        """Finds the frame of a new watch's place, to raise right away if it cannot start there. O(frames)."""
        cdef int result = PAUSED
        cdef bint whole = self.draft.whole
        cdef uint64_t left
        self.wanted.last = LARGEST  # without a limit: the place itself may be after the last entry to deliver
        self.draft.whole = False    # so that the place's own frame is not passed
        while result == PAUSED:
            left = SLICE
            with nogil:
                result = enter(&self.draft, &self.wanted, &left)
            PyErr_CheckSignals()
        self.draft.whole = whole
        if result > PAUSED:
            raise self._failure(result)
        if whole and result == FOUND:
            with nogil:
                count_told(&self.draft, &self.wanted)
        if self.draft.unchecked and self.draft.index == self._source.newest_index:  # not in a frame yet
            if self.draft.term == UNKNOWN_TERM:
                self.draft.term = self._source.newest_term
            elif self.draft.term != self._source.newest_term:
                raise self._failure(MISMATCH)
            self.draft.unchecked = False
        return 0

    def _failure(self, int result):
        if result == MISMATCH:
            return self._gone(f"in this log it has another term than {self.draft.term}")
        return CorruptionError(
            self._source.path, max(self.draft.at, self.draft.frame), "a record or a frame within the log",
            "an impossible length")

    # ---- changes ---------------------------------------------------------------------------------------

    cdef int next_found(self, bint may_pause) except -1:
        """Goes to the next change: FOUND or ENDED, or PAUSED if `may_pause`. Passes long stretches without the GIL."""
        cdef int result
        self.wanted.budget = LARGE
        result = advance(&self.draft, &self.wanted)
        while result == PAUSED:
            self.wanted.budget = PIECE if may_pause else SLICE
            with nogil:
                result = advance(&self.draft, &self.wanted)
            if may_pause:
                break
            PyErr_CheckSignals()
        if result > PAUSED:
            raise self._failure(result)
        if result == ENDED:
            self.note_ended()
        return result

    cdef void note_told(self) noexcept:
        """Passes the change that was found, which is now delivered."""
        cdef Place *draft = &self.draft
        cdef const uint8_t *record = self.wanted.log + draft.at
        cdef uint64_t index = record_index(record)
        if index != draft.index:
            while (<Run *>(self.wanted.log + draft.run)).last < index:
                draft.run += RUN_SIZE
            draft.index = index
            draft.term = (<Run *>(self.wanted.log + draft.run)).term
            draft.offset = draft.left = 0
            draft.whole = False
        draft.offset += 1
        draft.at += record_length(record)

    cdef void note_ended(self) noexcept:
        """Passes everything up to the last entry that may be delivered."""
        cdef Place *draft = &self.draft
        cdef Source source = self._source
        if draft.unchecked or source.index < draft.index:
            return
        if source.index > draft.index:
            draft.index, draft.term = source.index, source.term
            draft.offset = draft.left = 0
        draft.whole = True

    cdef void pass_to(self, uint64_t index, uint64_t term, uint64_t identity, uint64_t frame) noexcept:
        """Passes entries up to `index`, none of which concern this watch; `frame` is after them in log `identity`."""
        cdef Place *draft = &self.draft
        if draft.unchecked or index <= draft.index:
            return
        draft.index, draft.term, draft.identity, draft.frame = index, term, identity, frame
        draft.offset = draft.left = draft.at = draft.stop = 0
        draft.whole = True
        self.place = draft[0]

    cdef bint pass_rest(self, bint may_pause) except -1:
        """Finds out whether the entry of a read's last change has more changes, while the log is mapped anyway.

        Returns False if it has paused before that was certain, and must be called again.
        """
        cdef bint known = pass_entry(&self.draft, &self.wanted, LARGE)
        if not known:
            with nogil:
                known = pass_entry(&self.draft, &self.wanted, PIECE if may_pause else LARGEST)
        return known

    cdef object change_here(self):
        """Returns the change that was found, as an object."""
        cdef const uint8_t *record = self.wanted.log + self.draft.at
        cdef uint64_t index = record_index(record)
        cdef uint64_t run = self.draft.run
        cdef const char *key = <const char *>record_key(record)
        cdef object value = None
        while (<Run *>(self.wanted.log + run)).last < index:
            run += RUN_SIZE
        if record_operation(record) == RECORD_PUT:
            value = PyBytes_FromStringAndSize(key + record_key_size(record), record_value_size(record))
        return change_of(
            index, (<Run *>(self.wanted.log + run)).term, PyBytes_FromStringAndSize(key, record_key_size(record)),
            value)

    cdef bint fits(self, uint64_t max_bytes, bint is_first) noexcept:
        """Returns whether a read may take the change that was found, and adds its size; the first one always fits."""
        cdef const uint8_t *record = self.wanted.log + self.draft.at
        cdef uint64_t size = <uint64_t>record_key_size(record) + record_value_size(record)
        if not is_first and (size > max_bytes or self.size > max_bytes - size):
            return False
        self.size += size
        return True

    def _collect(self, list found, uint64_t limit, uint64_t max_bytes, bint may_pause):
        """Appends changes up to `limit` and `max_bytes`; returns whether it has paused, and there may be more."""
        cdef Py_ssize_t until = len(found) + TAKEN_AT_ONCE
        cdef uint64_t pause = self.size + PIECE
        cdef int result
        while <uint64_t>len(found) < limit:
            result = self.next_found(may_pause)
            if result == PAUSED:
                return True
            if result == ENDED:
                return False
            if not self.fits(max_bytes, not found):
                break
            found.append(self.change_here())
            self.note_told()
            if len(found) >= until or self.size >= pause:
                if may_pause:
                    return True
                with nogil:
                    pass  # let other threads run
                PyErr_CheckSignals()
                until = len(found) + TAKEN_AT_ONCE
                pause = self.size + PIECE
        if found:
            return not self.pass_rest(may_pause)
        return False

    cdef object next_change(self):
        """Returns the next change, or NOT_YET. Raises the reason if the watch has ended."""
        if self._closed:
            raise NotRunningError("this watch is closed: open another one, from its position")
        self._source.look()
        self.look()
        if self.next_found(False) == ENDED:
            self.place = self.draft
            return NOT_YET
        change = self.change_here()
        self.note_told()
        self.pass_rest(False)
        self.place = self.draft
        return change

    def __iter__(self):
        return self

    def __next__(self):
        self.begin()
        try:
            while True:
                try:
                    change = self.next_change()
                except NotRunningError:
                    if self._closed or self._source.is_over():
                        break
                    raise
                if change is not NOT_YET:
                    return change
                self._source.release()
                self._wait_for_change(None)
        finally:
            self.end()
        raise StopIteration

    # ---- waiting ---------------------------------------------------------------------------------------

    def _wait_for_change(self, timeout):
        """Waits up to `timeout` seconds until a look may find more; returns whether it is worth looking."""
        raise NotImplementedError

    def _close(self):
        self._closed = True
