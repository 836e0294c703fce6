"""Ranges of keys in the view of a chunk: the applied ones in their order, merged with those that the chunk has put.

Keys that the chunk has deleted are not passed again and again: they are dropped from the order of its own keys, and a
range of applied keys that it has written is left out as a whole.
"""

from bisect import bisect_left

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t
from libc.string cimport memcmp

from fastsm.command cimport DELETE_RANGE, Operation
from fastsm.core.ordered cimport Ordered
from fastsm.core.view cimport BREATH, Step
from fastsm.disk.format cimport RECORD_KEY, RECORD_PUT, record_key, record_key_size
from fastsm.lookup.ranges cimport OrderedView

cdef enum:
    PAGE = 64                 # keys of a range that are fetched at a time
    FEW_NEW = 16              # up to this many new keys are inserted one by one
    FEW_PASSED = 32           # fewer keys than this are passed again each time

cdef size_t EVER = <size_t>-1


cdef class Ranging(PendingView):
    """The view in which ranges are read and deleted.

    Thread safety: used by one writer at a time.
    """

    cdef int begin(self, Ordered owner, size_t expected) except -1:
        self.in_order = self.passed_start = self.passed_end = None
        return PendingView.begin(self, owner, expected)

    cdef void forget(self) noexcept:
        self.in_order = self.cuts = self.passed_start = self.passed_end = None
        PendingView.forget(self)

    cdef void take_back(self, size_t mark) noexcept:
        PendingView.take_back(self, mark)
        self.ordered_writes = min(self.ordered_writes, self.count)
        self.cuts_hold = min(self.cuts_hold, mark)
        if self.passed_at > mark:
            self.passed_start = self.passed_end = None

    cdef list keys_between(self, bytes start, bytes end, Py_ssize_t most=-1, bint reverse=False):
        """Returns the existing keys from `start` to before `end` (None: unbounded), in order, or in reverse.

        `most`: the maximum number; -1: all. O(log keys + results + keys of the range that this chunk has put). Deleted
        keys do not count, except for a few: they are dropped from `in_order`, or lie between `passed_start` and
        `passed_end`.
        """
        cdef uint64_t places[PAGE]
        cdef list written = self.written_between(start, end)
        cdef list keys = []
        cdef OrderedView view
        cdef const uint8_t *record
        cdef size_t i, room, count
        cdef size_t passed = 0
        cdef bytes nearest = None  # the first applied key that the chunk has not written
        cdef Py_ssize_t next_written = 0
        if reverse:
            written.reverse()
        for view in self.parts_between(start, end, reverse):
            while not view.walk.done and (most < 0 or len(keys) < most):
                room = PAGE if most < 0 else min(<size_t>PAGE, <size_t>(most - len(keys)))
                count = view.take(places, room)
                for i in range(count):
                    record = self.key_at(places[i])
                    if self.known and self.has_written(
                        record_key(record), record_key_size(record),
                        self.table.hash(record_key(record), record_key_size(record))
                    ):
                        passed += nearest is None
                        continue  # either it comes from `written`, or the chunk deleted it
                    key = PyBytes_FromStringAndSize(<const char *>record_key(record), record_key_size(record))
                    nearest = key if nearest is None else nearest
                    while next_written < len(written) and (written[next_written] < key) != reverse:
                        keys.append(written[next_written])
                        next_written += 1
                    keys.append(key)
        self.looked_past += passed
        if passed >= FEW_PASSED and reverse:
            self.note_passed(start if nearest is None else nearest + b"\0", end)
        elif passed >= FEW_PASSED:
            self.note_passed(start, end if nearest is None else nearest)
        while next_written < len(written) and (most < 0 or len(keys) < most):
            keys.append(written[next_written])
            next_written += 1
        return keys if most < 0 else keys[:most]

    cdef int64_t remove_range(self, uint64_t index, uint32_t entry, bytes start, bytes end) except -1:
        """Appends a delete for each key in a range, in order; returns how many. Makes no objects for applied keys."""
        cdef uint64_t places[PAGE]
        cdef list written = self.written_between(start, end)
        cdef OrderedView view
        cdef const uint8_t *record
        cdef uint64_t hashed
        cdef size_t i, count
        cdef size_t removed = 0
        cdef size_t passed = 0
        cdef Py_ssize_t next_written = 0
        cdef Step step
        step.operation.kind = DELETE_RANGE
        step.index = index
        step.entry = entry
        self.keys += written
        for view in self.parts_between(start, end, False):
            while not view.walk.done:
                count = view.take(places, PAGE)
                for i in range(count):
                    record = self.key_at(places[i])
                    hashed = self.table.hash(record_key(record), record_key_size(record))
                    if self.known and self.has_written(record_key(record), record_key_size(record), hashed):
                        passed += 1
                        continue  # either it comes from `written`, or the chunk deleted it
                    while next_written < len(written) and is_before(written[next_written], record):
                        self.append_written(&step, written[next_written])
                        next_written += 1
                        removed += 1
                    self.append_removal(&step, record_key(record), record_key_size(record), hashed)
                    removed += 1
                    if removed % BREATH == 0:
                        self.breathe()
        while next_written < len(written):
            self.append_written(&step, written[next_written])
            next_written += 1
            removed += 1
        self.looked_past += passed
        if passed + removed >= FEW_PASSED:
            self.note_passed(start, end)
        return removed

    cdef int append_written(self, const Step *step, bytes key) except -1:
        """Does `append_removal` for a key that this chunk has put. The caller keeps `key` alive."""
        cdef const uint8_t *data = <const uint8_t *>PyBytes_AS_STRING(key)
        return self.append_removal(step, data, PyBytes_GET_SIZE(key), self.table.hash(data, PyBytes_GET_SIZE(key)))

    cdef list parts_between(self, bytes start, bytes end, bint reverse):
        """Returns views of a range as it was before the chunk, without a part that the chunk is known to have written.

        There are none, one, or two of them, in the order in which they are to be read.
        """
        cdef bytes middle = self.passed_start
        cdef bytes after = self.passed_end
        cdef list parts = []
        cdef OrderedView below, above
        if middle is None:
            below, above = self.owner.range_in_turn(start, end, reverse), None
        else:
            below = self.owner.range_in_turn(start, middle if end is None else min(end, middle), reverse)
            above = None if after is None else self.owner.range_in_turn(max(start, after), end, reverse)
        if below is not None:
            parts.append(below)
        if above is not None:
            parts.insert(0 if reverse else len(parts), above)
        return parts

    cdef int note_passed(self, bytes start, bytes end) except -1:
        """Records that the chunk has written every key of a range that existed before it."""
        if self.passed_start is not None and is_within(self.passed_start, end) and is_within(start, self.passed_end):
            start = min(start, self.passed_start)  # two ranges that touch are one
            end = None if end is None or self.passed_end is None else max(end, self.passed_end)
        self.passed_start, self.passed_end, self.passed_at = start, end, self.count
        return 0

    cdef const uint8_t *key_at(self, uint64_t place) except NULL:
        """Returns the record at a place, after checking that its key is readable."""
        if place + RECORD_KEY + record_key_size(self.arena + place) > self.readable:
            raise self.log.damage_at(place)
        return self.arena + place

    cdef bint has_written(self, const uint8_t *key, size_t size, uint64_t hashed) noexcept nogil:
        """Returns whether this chunk has put or deleted a key, as of the last call of `know`."""
        return self.value_write(self.latest_write(False, key, size, hashed)) >= 0

    cdef list written_between(self, bytes start, bytes end):
        """Returns the keys of a range that this chunk has put and that still exist, in order."""
        cdef list keys = []
        cdef int32_t written
        cdef list gone = []
        cdef Py_ssize_t i, first, stop
        self.know()
        if self.known == 0:
            return keys
        self.keep_order()
        stop = len(self.in_order) if end is None else bisect_left(self.in_order, end)
        first = bisect_left(self.in_order, start)
        for i in range(first, stop):
            key = self.in_order[i]
            written = self.value_write(self.latest_write(
                False, <const uint8_t *>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key),
                self.table.hash(<const uint8_t *>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key))))
            if written >= 0 and self.writes[written].record == RECORD_PUT:
                keys.append(key)
            else:
                gone.append(key)
        self.looked_past += len(gone)
        if len(gone) >= FEW_PASSED:  # dropped, so that later ranges need not look at them
            self.in_order[first:stop] = keys
            self.cuts.append((self.count, gone))
        return keys

    cdef int keep_order(self) except -1:
        """Adds recent writes to `in_order`."""
        cdef const Operation *operation
        cdef list new = []
        if self.in_order is None:
            self.in_order, self.cuts = [], []
            self.ordered_writes, self.cuts_hold = 0, EVER
        self.undo_cuts()
        while self.ordered_writes < self.count:
            if self.writes[self.ordered_writes].record == RECORD_PUT:
                operation = &self.writes[self.ordered_writes].operation
                new.append(PyBytes_FromStringAndSize(<const char *>operation.key, operation.key_size))
            self.ordered_writes += 1
        if len(new) > FEW_NEW:
            self.merge_in(sorted(set(new)))
            return 0
        for key in new:
            i = bisect_left(self.in_order, key)
            if i == len(self.in_order) or self.in_order[i] != key:
                self.in_order.insert(i, key)
        return 0

    cdef int undo_cuts(self) except -1:
        """Brings back dropped keys whose deletes were taken back since."""
        cdef list back = []
        while self.cuts and self.cuts[len(self.cuts) - 1][0] > self.cuts_hold:
            back += self.cuts.pop()[1]
        self.cuts_hold = EVER
        if back:
            self.merge_in(sorted(set(back)))
        return 0

    cdef int merge_in(self, list new) except -1:
        """Merges sorted keys into `in_order`: the sort detects both sorted runs, and merges them."""
        cdef Py_ssize_t known = len(self.in_order)
        for key in new:
            i = bisect_left(self.in_order, key, 0, known)
            if i == known or self.in_order[i] != key:
                self.in_order.append(key)
        self.in_order.sort()
        return 0


cdef bint is_within(bytes key, bytes end) except -1:
    """Returns whether a key is at or before an end; None is after all keys."""
    return end is None or key <= end


cdef bint is_before(bytes key, const uint8_t *record) noexcept:
    """Returns whether a key comes before the key of a record."""
    cdef size_t size = PyBytes_GET_SIZE(key)
    cdef size_t other = record_key_size(record)
    cdef int order = memcmp(<const uint8_t *>PyBytes_AS_STRING(key), record_key(record), min(size, other))
    return order < 0 or (order == 0 and size < other)
