"""Reads in the order of the keys: scans, counts, iterators.

A short scan is one step under the GIL: bring the order up to date, walk, take the places, and make objects only then. A
long one, a count and an iterator read a view, piece by piece: that of one moment, whatever is applied meanwhile.
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
    PAGE = 1024               # pairs that are read in one go, under the GIL
    PAGES_COUNTED = 4         # pages that are counted without a view
    ATTEMPTS = 4              # to bring the order up to date next to a fast writer, before it has to wait


cdef class OrderedPairs:
    """An iterator of pairs in the order of their keys, or in reverse: those of the state at one moment.

    Thread safety: every method, from any thread; each pair is given once.
    """

    def __iter__(self):
        return self

    def __next__(self):
        cdef uint64_t place
        cdef OrderedView view
        while self.at == self.count:
            view = self.view  # held: its end lets other threads run, who may be here, too
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
        """The order, which has all keys; true until Python code runs. The first call builds it, without the GIL.

        `in_turn`: for the writer, who may run a procedure.
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
                self.map_order()  # the log may have outgrown that mapping meanwhile
            elif index.order.built and (index.order.waiting() <= FEW_NEW or attempts >= ATTEMPTS):
                index.order.absorb()
                return index.order
            else:
                attempts += index.order.built
                index.order.catch_up(None)

    def _ask_for_order(self):
        """Builds the order now, if there is none."""
        self.fresh_order()

    def _order_next(self, Index index, Mapping mapping, tick=None):
        """Gives the index of a next generation its order, when this state has one. O(keys), without the GIL."""
        if self.order_wanted:
            index.begin_order(mapping)
            index.order.catch_up(tick)

    def _keep_order(self):
        """On a thread that `apply` starts, when many new keys have come: the next reader need not sort them in."""
        cdef Order order = self._index.order
        try:
            if order is not None:
                order.catch_up(None)
        except MemoryError:
            pass  # then the next reader does it, or says so
        finally:
            self.order_called = False

    # ---- reads -----------------------------------------------------------------------------------------

    def scan(self, start=None, end=None, *, prefix=None, limit=None, reverse=False):
        """Returns the pairs with `start <= key < end`, in the order of their keys, as `ScanResult(entries, revision)`.

        None is open. `prefix`: only keys that start with it. `limit`: at most so many. `reverse`: from the end. All are
        of one state; `revision` is the last applied index at which it held. O(log keys + results); the first call of
        all builds the order.
        """
        low, high = range_of(start, end, prefix)
        return self.scan_range(low, high, checked_limit(limit), True if reverse else False)

    def scan_prefix(self, prefix, *, limit=None, start_after=None):
        """Returns the pairs whose key starts with `prefix`, sorted by key, as `ScanResult(entries, revision)`.

        `limit`: at most so many. `start_after`: only keys after this one; the last key of a page gives the next
        page. `revision` is the last applied index at which the result held. O(log keys + results).
        """
        limit = checked_limit(limit)
        after = None if start_after is None else bound_of(start_after, "start_after") + b"\0"
        low, high = range_of(after, None, bound_of(prefix, "prefix"))
        return self.scan_range(low, high, limit, False)

    def count(self, start=None, end=None, *, prefix=None):
        """Returns the number of keys with `start <= key < end`, and with `prefix`; None is open. All are of one state.

        O(log keys + keys counted), some nanoseconds each, without an object for any; of all keys O(1).
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

        It shows the state at the call, however much is applied, and after a reset, an install or a close too. O(log
        keys) at the call. While it is open, each key that is overwritten or deleted costs about 16 bytes; it is open
        until it is used up or dropped.
        """
        low, high = range_of(start, end, prefix)
        return self.view_of(low, high, True if reverse else False)

    # ---- how -------------------------------------------------------------------------------------------

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
        """Bytes beyond which no record may reach, whatever it says; 0 when all of them were checked."""
        return 0 if self._verified and not self._index.loaded else self.readable

    cdef OrderedPairs view_of(self, bytes low, bytes high, bint reverse):
        """The pairs of a range of the present state."""
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
        """The places of a range for the writer in its turn, also on the thread of a procedure; None: it is empty."""
        cdef OrderedView view
        if is_empty(low, high):
            return None
        view = OrderedView.__new__(OrderedView)
        view.begin(self.fresh_order(True), self._index.end, low, high, reverse)
        return view

    def _keys_of_range(self, start, end):
        """What `range_in_turn` leads to, for tests."""
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
        """The order, if it is in use."""
        return self._index.order


cdef object scan_long(OrderedPairs pairs, limit):
    """A scan of more than a page: signals are served, and other threads run, between pages."""
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
    limit = operator.index(limit)  # asked once: its own comparisons may say anything
    if limit < 0:
        raise ValueError(f"limit={limit}: expected 0 or more")
    return limit


cdef bytes bound_of(bound, str name):
    """A copy in bytes: taking or releasing a buffer may run Python code, and its content may change."""
    return bound if type(bound) is bytes else bytes_of(bound, name)


cdef tuple range_of(start, end, prefix):
    """`(low, high)` as bytes, None where open: the intersection of [start, end) and the keys with a prefix."""
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
    """The least key that is greater than all with a prefix; None when there is none: it is all 0xff."""
    cdef bytes stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes((stem[-1] + 1,)) if stem else None


cdef bint is_empty(bytes low, bytes high) except -1:
    return high is not None and (low or b"") >= high
