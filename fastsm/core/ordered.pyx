"""Reads in the order of the keys: scans, counts, iterators.

A short scan is a single step under the GIL: it updates the order, walks it to collect places, and only then makes
objects. Long scans, counts and iterators read from a view, piece by piece: the view keeps the state of one moment,
whatever is applied in the meantime.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint64_t

from fastsm.core.frozen cimport key_of, value_of
from fastsm.disk.format cimport record_length
from fastsm.lookup.order cimport FEW_NEW, LOOKS
from fastsm.lookup.ranges cimport collect, forget_gone, start as start_walk
from fastsm.lookup.tree cimport Walk

import operator

from fastsm.arguments import bytes_of
from fastsm.types import ScanResult

cdef enum:
    PAGE = 1024               # pairs that are read in one step under the GIL
    PAGES_COUNTED = 4         # pages that are counted without a view
    # Rounds of catching up with a fast writer outside the GIL, before a final one that makes it wait
    ATTEMPTS = 4


cdef class OrderedPairs:
    """An iterator of pairs in the order of their keys, or in reverse, over the state of one moment.

    Thread safety: every method, from any thread; each pair is returned once.
    """

    def __iter__(self):
        return self

    def __next__(self):
        cdef uint64_t place
        cdef OrderedView view
        while self.at == self.count:
            view = self.view  # a local reference: freeing the view lets other threads run, which may be in here too
            if view is None or view.walk.done:
                self.view = None
                raise StopIteration
            self.at = 0
            self.count = 0
            self.count = view.take(self.found, PIECE)
            if self.count == 0:
                PyErr_CheckSignals()  # there may be many entries of deleted keys
        place = self.found[self.at]
        self.at += 1
        return pair_at(place, self.mapping, self.readable, self.log)

    def __length_hint__(self):
        return self.count - self.at


cdef class Ordered(State):
    """The state, with reads in the order of its keys.

    Thread safety: every method, from any thread.
    """

    cdef Order fresh_order(self, bint in_turn=False):
        """Returns the order, up to date until Python code runs. The first call builds it, without the GIL.

        `in_turn`: the caller is the writer, possibly on behalf of a procedure.
        """
        cdef Index index
        cdef int attempts = 0
        while True:
            if self.gate and not in_turn:
                self.refuse()
            self.order_wanted = True
            index = self._index
            if not index.ordered:
                index.begin_order(self.mapping)
                self.map_order()  # the log may have outgrown that mapping by now
            elif index.order.built and (index.order.waiting() <= FEW_NEW or attempts >= ATTEMPTS):
                index.order.absorb()
                return index.order
            else:
                attempts += index.order.built
                index.order.catch_up(None)

    def _ask_for_order(self):
        """Builds the order now, unless it exists."""
        self.fresh_order()

    def _order_next(self, Index index, Mapping mapping, tick=None):
        """Builds the order of the next generation's index, if this state uses one. O(keys), without the GIL."""
        if self.order_wanted:
            index.begin_order(mapping)
            index.order.catch_up(tick)

    def _keep_order(self):
        """Sorts many new keys in, on a thread that `apply` starts, so that the next reader need not."""
        cdef Order order = self._index.order
        try:
            if order is not None:
                order.catch_up(None)
        except MemoryError:
            pass  # the next reader does it, or raises this
        finally:
            self.order_called = False

    # ---- reads -----------------------------------------------------------------------------------------

    def scan(self, start=None, end=None, *, prefix=None, limit=None, reverse=False):
        """Returns the pairs with `start <= key < end`, in the order of their keys, as `ScanResult(entries, revision)`.

        None means unbounded. `prefix`: only keys that start with it. `limit`: the maximum number of pairs. `reverse`:
        from the end. All pairs are from one state; `revision` is the last applied index of that state. O(log keys +
        results); the first call builds the order of the keys.
        """
        low, high = range_of(start, end, prefix)
        return self.scan_range(low, high, checked_limit(limit), True if reverse else False)

    def scan_prefix(self, prefix, *, limit=None, start_after=None):
        """Returns the pairs whose key starts with `prefix`, sorted by key, as `ScanResult(entries, revision)`.

        `limit`: the maximum number of pairs. `start_after`: only keys after this one; pass the last key of a page to
        get the next page. `revision` is the last applied index of the state that was read. O(log keys + results).
        """
        limit = checked_limit(limit)
        after = None if start_after is None else bound_of(start_after, "start_after") + b"\0"
        low, high = range_of(after, None, bound_of(prefix, "prefix"))
        return self.scan_range(low, high, limit, False)

    def count(self, start=None, end=None, *, prefix=None):
        """Returns the number of keys with `start <= key < end` and with `prefix`, all from one state; None: unbounded.

        O(log keys + keys counted), a few nanoseconds per key, without making objects; O(1) for all keys.
        """
        cdef uint64_t found[PAGE]
        cdef uint64_t total = 0
        cdef Walk walk
        cdef Order order
        cdef int _page
        cdef bytes low, high
        low, high = range_of(start, end, prefix)
        if is_empty(low, high) or (low is None and high is None):
            if self.gate:
                self.refuse()
            return 0 if is_empty(low, high) else self._table.count
        order = self.fresh_order()
        start_walk(order, &walk, low, high, False)
        for _page in range(PAGES_COUNTED):
            total += collect(order, &walk, found, PAGE, LOOKS, None)
            if walk.done:
                forget_gone(order)
                return total
        return self.view_of(low, high, False).view.count()

    def ordered(self, start=None, end=None, *, prefix=None, reverse=False):
        """Returns an iterator of the pairs with `start <= key < end`, and with `prefix`, in the order of their keys.

        The iterator shows the state as of the call, also after later entries, a reset, an install or a close. O(log
        keys) at the call. While the iterator is open (until it is exhausted or dropped), each key that is overwritten
        or deleted costs about 16 bytes.
        """
        low, high = range_of(start, end, prefix)
        return self.view_of(low, high, True if reverse else False)

    # ---- internals -------------------------------------------------------------------------------------

    cdef object scan_range(self, bytes low, bytes high, object limit, bint reverse):
        cdef uint64_t found[PAGE]
        cdef size_t room = PAGE if limit is None or limit > PAGE else limit
        cdef size_t count, i
        cdef Walk walk
        cdef Order order
        cdef Mapping mapping
        cdef uint64_t revision, readable
        cdef list pairs
        if room == 0 or is_empty(low, high):
            if self.gate:
                self.refuse()
            return ScanResult([], self.applied_index)
        order = self.fresh_order()
        # From here on no Python code runs until all places are known.
        start_walk(order, &walk, low, high, reverse)
        count = collect(order, &walk, found, room, LOOKS, None)
        forget_gone(order)
        if not (walk.done or (limit is not None and count == limit)):
            return scan_long(self.view_of(low, high, reverse), limit)
        mapping, log, revision, readable = self.mapping, self._log, self.applied_index, self.unchecked()
        pairs = []
        for i in range(count):
            pairs.append(pair_at(found[i], mapping, readable, log))
        return ScanResult(pairs, revision)

    cdef uint64_t unchecked(self) noexcept:
        """Returns the offset past which no record may extend; 0 if all records were checked already."""
        return 0 if self._verified and not self._index.loaded else self.readable

    cdef OrderedPairs view_of(self, bytes low, bytes high, bint reverse):
        """Returns an iterator of the pairs in a range of the present state."""
        cdef OrderedPairs pairs = OrderedPairs.__new__(OrderedPairs)
        cdef OrderedView view = OrderedView.__new__(OrderedView)
        cdef Order order
        if is_empty(low, high):
            if self.gate:
                self.refuse()
            return pairs
        order = self.fresh_order()
        view.begin(order, self._index.end, low, high, reverse)
        pairs.view = view
        pairs.mapping = self.mapping
        pairs.log = self._log
        pairs.readable = self.unchecked()
        pairs.revision = self.applied_index
        return pairs

    cdef OrderedView range_in_turn(self, bytes low, bytes high, bint reverse):
        """Returns a view of a range for the writer, possibly on a procedure's thread; None: the range is empty."""
        cdef OrderedView view
        if is_empty(low, high):
            return None
        view = OrderedView.__new__(OrderedView)
        view.begin(self.fresh_order(True), self._index.end, low, high, reverse)
        return view

    def _keys_of_range(self, start, end):
        """Returns the keys of `range_in_turn`, for tests."""
        cdef OrderedView view = self.range_in_turn(start, end, False)
        cdef uint64_t places[PIECE]
        cdef size_t i, count
        keys = []
        while view is not None and not view.walk.done:
            count = view.take(places, PIECE)
            for i in range(count):
                keys.append(key_of(self.arena + places[i]))
        return keys

    def _order(self):
        """Returns the order if it is in use, else None."""
        return self._index.order


cdef object scan_long(OrderedPairs pairs, limit):
    """Returns a scan of more than one page. Between pages, signal handlers and other threads may run."""
    cdef uint64_t found[PAGE]
    cdef OrderedView view = pairs.view
    cdef list entries = []
    cdef size_t wanted = PAGE
    cdef size_t count, i
    while wanted and not view.walk.done:
        if limit is not None:
            wanted = min(limit - len(entries), PAGE)
        count = view.take(found, wanted)
        for i in range(count):
            entries.append(pair_at(found[i], pairs.mapping, pairs.readable, pairs.log))
        with nogil:
            pass
        PyErr_CheckSignals()
    return ScanResult(entries, pairs.revision)


cdef inline tuple pair_at(uint64_t place, Mapping mapping, uint64_t readable, log):
    cdef const uint8_t *record = mapping.address + place
    if readable and place + record_length(record) > readable + 7:
        raise log.damage_at(place)
    return key_of(record), value_of(record)


cdef object checked_limit(limit):
    if limit is None:
        return None
    limit = operator.index(limit)  # evaluated once: comparisons of the caller's own type could change their answers
    if limit < 0:
        raise ValueError(f"limit={limit}: expected 0 or more")
    return limit


cdef bytes bound_of(bound, str name):
    """Returns a copy as bytes: taking or releasing a buffer may run Python code, and its content may change."""
    return bound if type(bound) is bytes else bytes_of(bound, name)


cdef tuple range_of(start, end, prefix):
    """Returns `(low, high)` as bytes, None if unbounded: the keys in [start, end) that start with a prefix."""
    cdef bytes low = None if start is None else bound_of(start, "start")
    cdef bytes high = None if end is None else bound_of(end, "end")
    cdef bytes beyond
    if prefix is not None:
        prefix = bound_of(prefix, "prefix")
        low = prefix if low is None else max(low, prefix)
        beyond = after_prefix(prefix)
        if beyond is not None:
            high = beyond if high is None else min(high, beyond)
    return low or None, high


cdef bytes after_prefix(bytes prefix):
    """Returns the least key greater than every key with this prefix; None if there is none (it is all 0xff)."""
    cdef bytes stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes((stem[-1] + 1,)) if stem else None


cdef bint is_empty(bytes low, bytes high) except -1:
    return high is not None and (low or b"") >= high
