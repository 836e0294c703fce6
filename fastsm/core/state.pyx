"""The state and its reads: table, terms and log, which share one status.

A reader needs no lock. It runs under the GIL between two publications, and what it returns remains valid because
records never move or change.
"""

import operator

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_SIZE, PyList_New, PyList_SET_ITEM
from cpython.ref cimport Py_INCREF, PyObject
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from fastsm.disk.format cimport (
    LOG_HEADER_SIZE, RECORD_CONFIG, RECORD_KEY, RECORD_PUT, RECORD_SESSION, RECORD_TOUCH, UNKNOWN_TERM,
    record_index, record_key, record_key_size, record_length, record_operation, record_value_size,
)
from fastsm.snapshot.capture cimport Capture
from fastsm.core.frozen cimport Frozen, View
from fastsm.core.status cimport STOPPED
from fastsm.disk.mapping cimport Mapping
from fastsm.lookup.index cimport check_deadlines
from fastsm.lookup.ranges cimport check_order
from fastsm.lookup.table cimport check_table, prefetch, same_key

from fastsm.arguments import bytes_of, pair_of
from fastsm.disk.format import OPERATIONS
from fastsm.errors import SnapshotRangeError
from fastsm.libraries import library
from fastsm.types import LogId

cdef extern from "Python.h":
    object PyMemoryView_FromObject(object exporter)
    PyObject *PyList_GET_ITEM(object list, Py_ssize_t i)
    Py_ssize_t Py_SIZE(PyObject *item)
    bint PyLong_CheckExact(object item)
    uint64_t PyLong_AsUnsignedLongLong(object item) noexcept
    void PyErr_Clear() noexcept

cdef enum:
    MAX_KEY_SIZE = 0xFFFF

cdef class State(Status):
    """The applied state, and every way to read it.

    Thread safety: every method, from any thread.
    """

    # ---- read ------------------------------------------------------------------------------------------

    @cython.always_allow_keywords(False)
    def get(self, key, /):
        """Returns the value of a key (any bytes-like object), or None. O(1), no lock, no system call."""
        cdef uint64_t place
        if type(key) is not bytes:
            return State.get(self, bytes_of(key, "key"))
        if self.gate:
            self.refuse()
        place = self.find_key(<bytes>key)
        if place == 0:
            return None
        return self.value_at(place)

    @cython.final
    cdef inline object value_at(self, uint64_t place):
        cdef const uint8_t *record = self.arena + place
        cdef uint64_t start = place + RECORD_KEY + record_key_size(record)
        if start + record_value_size(record) > self.readable:
            self.damaged(place)
        return PyBytes_FromStringAndSize(<const char *>self.arena + start, record_value_size(record))

    cdef int damaged(self, uint64_t place) except -1:
        """Raises the error for a record that extends past the arena: its length may be wrong until all is verified."""
        raise self._log.damage_at(place)

    @cython.always_allow_keywords(False)
    def get_view(self, key, /):
        """Returns the value of a key as a read-only memoryview of the log's pages, or None. O(1), without a copy.

        The view does not change while it is held, even if the state is changed, reset or closed. The pages are freed
        when the last view of them is freed.
        """
        cdef uint64_t place
        cdef const uint8_t *record
        cdef View view
        if type(key) is not bytes:
            key = bytes_of(key, "key")
        if self.gate:
            self.refuse()
        place = self.find_key(<bytes>key)
        if place == 0:
            return None
        record = self.arena + place
        if place + RECORD_KEY + record_key_size(record) + record_value_size(record) > self.readable:
            self.damaged(place)
        view = View.__new__(View)
        view.mapping = self.mapping
        view.data = record_key(record) + record_key_size(record)
        view.size = record_value_size(record)
        return PyMemoryView_FromObject(view)

    def __contains__(self, key):
        if type(key) is not bytes:
            key = bytes_of(key, "key")
        if self.gate:
            self.refuse()
        return self.find_key(<bytes>key) != 0

    @cython.always_allow_keywords(False)
    def modified(self, key, /):
        """Returns the entry that last wrote a key, as a `LogId`, or None if the key is absent. O(1)."""
        cdef uint64_t place, index
        cdef uint64_t term = 0
        cdef bint certain
        if type(key) is not bytes:
            key = bytes_of(key, "key")
        if self.gate:
            self.refuse()
        place = self.find_key(<bytes>key)
        if place == 0:
            return None
        index = record_index(self.arena + place)
        certain = self._terms.find(index, &term)
        return LogId(index, term if certain else None)

    cdef inline uint64_t find(self, const uint8_t *key, size_t size) noexcept nogil:
        if size > MAX_KEY_SIZE:
            return 0
        return self._table.find(self.arena, self._table.hash(key, size), key, size)

    cdef inline uint64_t find_key(self, bytes key) noexcept:
        """Returns the place of a key, 0 if absent; valid until Python code runs.

        Other buffers were copied into bytes before the status was checked, because taking or releasing a buffer may run
        Python code, which may close the machine.
        """
        return self.find(<const uint8_t *>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key))

    cdef int find_block(self, list keys, Py_ssize_t first, Py_ssize_t count, uint64_t *places) except -1:
        """Finds the places of up to BLOCK keys, 0 if absent: hashes all, prefetches all, then looks them up."""
        cdef uint64_t hashes[BLOCK]
        cdef Table table = self._table
        cdef const uint8_t *arena = self.arena
        cdef const uint8_t *key
        cdef size_t size
        cdef Py_ssize_t i
        for i in range(count):
            key = <const uint8_t *>PyBytes_AS_STRING(<object>PyList_GET_ITEM(keys, first + i))
            hashes[i] = table.hash(key, Py_SIZE(PyList_GET_ITEM(keys, first + i)))
            table.prefetch_slot(hashes[i])
        for i in range(count):
            places[i] = table.candidate(hashes[i])
            if places[i]:
                prefetch(arena + places[i])
                prefetch(arena + places[i] + 64)
        for i in range(count):
            if places[i] == 0:
                continue
            key = <const uint8_t *>PyBytes_AS_STRING(<object>PyList_GET_ITEM(keys, first + i))
            size = Py_SIZE(PyList_GET_ITEM(keys, first + i))
            if size > MAX_KEY_SIZE:
                places[i] = 0
            elif not same_key(arena + places[i], key, size):
                places[i] = table.find(arena, hashes[i], key, size)
            if places[i]:
                prefetch(arena + places[i] + RECORD_KEY + size + record_value_size(arena + places[i]) - 1)
        return 0

    def get_many(self, keys):
        """Returns the values of a sequence of keys, in their order, None where absent; all from one state.

        O(keys). Each key takes a fraction of the time of a `get`, since the cache misses of several keys overlap.
        """
        cdef list wanted = list_of_bytes(keys)
        cdef Py_ssize_t total = PyList_GET_SIZE(wanted)
        cdef list values = PyList_New(total)
        cdef object value
        cdef uint64_t places[BLOCK]
        cdef Py_ssize_t first, count, i
        if self.gate:
            self.refuse()
        for first in range(0, total, BLOCK):
            count = min(total - first, BLOCK)
            self.find_block(wanted, first, count, places)
            for i in range(count):
                value = self.value_at(places[i]) if places[i] else None
                Py_INCREF(value)
                PyList_SET_ITEM(values, first + i, value)
        return values

    @cython.boundscheck(False)
    @cython.wraparound(False)
    def get_columns(self, keys):
        """Returns the values of a sequence of keys as NumPy arrays, without an object for each; all from one state.

        The result is `(data, offsets, found)`. `data`: uint8, all values one after the other. `offsets`: int64, one
        longer than `keys`; value i is `data[offsets[i]:offsets[i + 1]]`. `found`: bool, False where a key is absent.
        O(keys).
        """
        np = library("numpy")  # imported on first use: it would dominate the import time of fastsm
        cdef list wanted = list_of_bytes(keys)
        cdef Py_ssize_t count = len(wanted)
        places_array = np.zeros(count, dtype=np.uint64)
        offsets_array = np.zeros(count + 1, dtype=np.int64)
        cdef uint64_t[::1] places = places_array
        cdef int64_t[::1] offsets = offsets_array
        cdef Mapping mapping
        cdef const uint8_t *record
        cdef Py_ssize_t first, i
        if self.gate:
            self.refuse()
        mapping = self.mapping  # its bytes remain valid, whatever other threads do from here on
        for first in range(0, count, BLOCK):
            self.find_block(wanted, first, min(count - first, BLOCK), &places[first])
        for i in range(count):
            offsets[i + 1] = offsets[i]
            if places[i]:
                if places[i] + record_length(mapping.address + places[i]) > self.readable + 7:
                    self.damaged(places[i])
                offsets[i + 1] += record_value_size(mapping.address + places[i])
        data_array = np.empty(offsets[count], dtype=np.uint8)
        cdef uint8_t[::1] data = data_array
        with nogil:
            for i in range(count):
                if offsets[i + 1] > offsets[i]:
                    record = mapping.address + places[i]
                    memcpy(
                        &data[offsets[i]], record_key(record) + record_key_size(record), record_value_size(record))
        return data_array, offsets_array, places_array != 0

    cdef Frozen freeze(self):
        """Returns the present state, held still. O(keys), a few nanoseconds per key under the GIL."""
        cdef Frozen frozen = Frozen.__new__(Frozen)
        if self.gate:
            self.refuse()
        # From here to the return no Python object is made: a garbage collection could let another thread write.
        frozen.reserve(self._table.count)
        self._table.gather(frozen.places)
        frozen.mapping = self.mapping
        frozen.arena = self.arena
        frozen.log = self._log
        frozen.readable = 0 if self._verified and not self._index.loaded else self.readable
        frozen.revision = self.applied_index
        return frozen

    def keys(self):
        """Iterates over the keys of the state as of the call, in the order of the entries that last wrote them."""
        return self.freeze().in_order().keys()

    def items(self):
        """Iterates over the pairs of the state as of the call, in the order of the entries that last wrote them."""
        return self.freeze().in_order().items()

    def columns(self):
        """Returns the whole state as NumPy arrays, without an object for each pair; all from one state.

        The result is `(key_data, key_offsets, value_data, value_offsets)`, laid out as in `get_columns`, in the order
        of the entries that last wrote the keys, so it is equal on all replicas. O(bytes), without the GIL, except for a
        few nanoseconds per key at the start.
        """
        return self.freeze().in_order().columns()

    def len(self):
        """Returns the number of live keys. O(1)."""
        self._require(stopped_is_fine=True)
        return self._table.count

    @cython.always_allow_keywords(False)
    def entry_term(self, entry_id, /):
        """Returns the term of the entry at an index if it is known for certain, else None. O(log terms)."""
        cdef uint64_t term
        cdef uint64_t index
        if not PyLong_CheckExact(entry_id):
            entry_id = operator.index(entry_id)
        if self.gate > STOPPED:
            self.refuse()
        index = PyLong_AsUnsignedLongLong(entry_id)
        if index == UNKNOWN_TERM:
            PyErr_Clear()  # negative or too large: no entry has such an index
            return None
        return term if self._terms.find(index, &term) else None

    def entry_terms(self, ids):
        """Returns `entry_term` for a uint64 array of indexes, as an array of the same shape; 0: no certain term."""
        if self.gate > STOPPED:
            self.refuse()
        return self._terms.get_many(ids)

    def last_applied(self):
        """Returns the last applied entry, as a `LogId`; `LogId(0, 0)` when there is none."""
        self._require(stopped_is_fine=True)
        return LogId(self.applied_index, self.applied_term)

    def durable(self):
        """Returns the last applied entry that would survive a power loss now.

        It falls only with a reset, or with the installation of an older snapshot.
        """
        self._require(stopped_is_fine=True)
        return LogId(self.durable_index, self.durable_term)

    def membership(self):
        """Returns the newest `config` as `(LogId, bytes)`, or None."""
        cdef const uint8_t *record
        cdef uint64_t place, index
        cdef uint64_t term = 0
        cdef bint certain
        cdef bytes data
        self._require(stopped_is_fine=True)
        # From here on no Python code runs until all is copied (`LogId` is Python code).
        place = self._index.config_place
        if place == 0:
            return None
        record = self.arena + place
        if place + RECORD_KEY + record_value_size(record) > self.readable:
            self.damaged(place)
        index = record_index(record)
        certain = self._terms.find(index, &term)
        data = PyBytes_FromStringAndSize(<const char *>record_key(record), record_value_size(record))
        return LogId(index, term if certain else None), data

    def snapshot_metadata(self):
        """Returns the metadata of the latest snapshot, or None."""
        self._require(stopped_is_fine=True)
        return self.metadata

    # ---- for the machine and for tests -----------------------------------------------------------------

    def _standing(self):
        """Returns, as of one moment: epoch, log, index of the base, and last applied index."""
        cdef uint64_t epoch = self._epoch
        cdef uint64_t applied = self.applied_index
        cdef Log log = self._log
        return epoch, log, log.head.base_index, applied

    def live_records(self, last_included=None):
        """Returns an iterator over the state as of an entry, as tuples: the entry that wrote a key, the key, its value.

        The tuples are in the order in which the keys were last written, as in snapshots. `last_included` is the same as
        for `write_snapshot`. O(bytes of base and log), with one bit of memory per 16 of them; entries can be applied
        meanwhile.
        """
        records = self._live_records(last_included)
        return ((log_id, key, value) for operation, log_id, key, value, _ in records if operation == "put")

    def _live_records(self, last_included):
        """Returns `live_records`, also touches and sessions, as tuples with operation first and deadline last."""
        cdef Capture capture = self._capture(last_included)
        capture.find(lambda: None)
        terms = capture.index.terms
        return (
            (OPERATIONS[operation], LogId(index, terms.get(index)), key, value, deadline)
            for operation, index, key, value, deadline in capture.all_records())

    def _clock_at(self, last_included):
        """Returns the clock as of an entry. O(bytes)."""
        cdef Capture capture = self._capture(last_included)
        capture.find(lambda: None)
        return capture.clock

    def _capture(self, last_included):
        """Captures the state as of an entry: O(runs). `SnapshotRangeError` if that state is not available.

        An id between two terms, where no entry was seen, stands for the entry before it: otherwise a replica that
        installs the snapshot would claim an entry that the writer of the snapshot never saw.
        """
        cdef Capture capture = Capture.__new__(Capture)
        cdef uint64_t index = 0
        cdef uint64_t term = 0
        if last_included is not None:
            # May run Python code, as may the next line
            wanted_index, wanted_term = pair_of(last_included, "last_included")
            index, term = captured_id(self._log, wanted_index, wanted_term)
        # From here to `hold` no Python code runs, unless this raises.
        if self.gate:
            self.refuse()
        if last_included is None:
            index, term = self.applied_index, self.applied_term
        if not self._log.head.base_index <= index <= self.applied_index:
            applied = LogId(self.applied_index, self.applied_term)
            base = LogId(self._log.head.base_index, self._log.head.base_term)
            raise SnapshotRangeError(
                f"{self._log.path}: the state as of {LogId(index, term)} is not available: expected an entry from "
                f"{base} (the base) to {applied} (last applied)")
        if not self._terms.allows(index, term):
            raise SnapshotRangeError(
                f"{self._log.path}: entry {index} does not have term {term}: it was applied in term "
                f"{self._terms.get(index)}")
        self._terms.round_down(&index, &term)
        capture.hold(self._log, self._index, self._epoch, index, term, index == self.applied_index)
        capture.name_id()
        return capture

    def _syncs_on_apply(self):
        return self.sync_on_apply

    cdef void take_arena(self) noexcept:
        """Makes reads use the log's present mapping. The old mapping lives as long as something holds it."""
        _old = self.mapping  # held until all is changed: freeing it may let another thread run
        if self.mapping is not self._log.mapping:
            self.mapping = self._log.mapping
            self.arena = self.mapping.address
        self.readable = self.mapping.mapped
        self.map_order()

    cdef void map_order(self) noexcept:
        """Makes the order, if there is one, read through the present mapping."""
        cdef Mapping _old
        if self._index.ordered and self._index.order.mapping is not self.mapping:
            _old = self._index.order.mapping  # held until all is changed
            self._index.order.mapping = self.mapping

    def _let_go(self):
        """Drops the index and the mapping, after the last read."""
        cdef Index nothing = Index()
        _old = self.mapping, self._index  # held until all is changed: freeing them lets other threads run
        self.arena = NULL
        self.mapping = None
        self._index, self._table, self._terms = nothing, nothing.table, nothing.terms
        self._log.let_go()

    def _bytes(self):
        """Returns, as of one moment, the bytes of the log, of the base, of live records, and of everything dead."""
        cdef uint64_t log_bytes = self._log.end
        cdef uint64_t base_bytes = self._log.base_bytes
        cdef uint64_t live_bytes = self._index.live_bytes
        cdef uint64_t dead_bytes = self.dead_bytes()
        return log_bytes, base_bytes, live_bytes, dead_bytes

    def _figures(self):
        """Returns figures for `stats`, as of one moment, as a tuple in the order in which `stats_of` uses them."""
        if self.gate > STOPPED:
            self.refuse()
        cdef Log log = self._log
        cdef Table table = self._table
        cdef uint64_t keys = table.count
        cdef uint64_t live_bytes = self._index.live_bytes
        cdef uint64_t dead_bytes = self.dead_bytes()
        cdef uint64_t log_bytes = log.end
        cdef uint64_t term_runs = self._terms.count
        cdef uint64_t applied_index = self.applied_index
        cdef uint64_t applied_term = self.applied_term
        cdef uint64_t durable_index = self.durable_index
        cdef uint64_t durable_term = self.durable_term
        cdef uint64_t sync_count = log.sync_count
        cdef double sync_seconds = log.sync_seconds
        cdef bint verified = self._verified
        return (
            log, table.size, table.load, keys, live_bytes, dead_bytes, log_bytes, term_runs, applied_index,
            applied_term, durable_index, durable_term, verified, sync_count, sync_seconds)

    cdef inline uint64_t dead_bytes(self) noexcept:
        """Returns the bytes that compaction could free: everything in base and log except live records."""
        return self._log.base_bytes + self._log.end - LOG_HEADER_SIZE - self._index.live_bytes

    def _check(self):
        """Asserts every invariant of table, terms and counts. O(log and slots)."""
        cdef uint64_t live = 0
        cdef uint64_t place
        cdef Frozen frozen = self.freeze()
        cdef Index index = self._index
        cdef size_t i
        check_table(index.table, self.arena)
        for i in range(frozen.count):
            place = frozen.places[i]
            assert place < self._log.start + self._log.end
            assert record_operation(self.arena + place) == RECORD_PUT
            assert not index.dead.is_dead(place)
            live += record_length(self.arena + place)
        live += check_others(index, index.sessions, RECORD_SESSION, self.arena, self._log.start + self._log.end)
        live += check_others(index, index.touches, RECORD_TOUCH, self.arena, self._log.start + self._log.end)
        check_deadlines(index, self.arena)
        assert live == index.live_bytes, f"live_bytes is {index.live_bytes}, but the records add up to {live} bytes"
        assert index.config_place == 0 or record_operation(self.arena + index.config_place) == RECORD_CONFIG
        index.terms.check()
        if index.ordered:
            check_order(index.order)
        assert (index.table, index.terms) == (self._table, self._terms)
        assert LOG_HEADER_SIZE <= self._log.durable <= self._log.end <= self._log.allocated
        assert self.durable_index <= self.framed_index <= self.applied_index == self.runs.index
        assert self._terms.seen == self.applied_index


cdef uint64_t check_others(Index index, Table table, int operation, const uint8_t *arena, uint64_t end) except? 0:
    """Asserts the invariants of the table of sessions or of touches; returns the total size of its records."""
    cdef uint64_t *places = <uint64_t *>malloc((table.count + 1) * sizeof(uint64_t))
    cdef uint64_t total = 0
    cdef size_t i
    if places == NULL:
        raise MemoryError("no memory to check sessions and touches")
    try:
        check_table(table, arena)
        table.gather(places)
        for i in range(table.count):
            assert places[i] < end
            assert record_operation(arena + places[i]) == operation
            assert not index.dead.is_dead(places[i])
            total += record_length(arena + places[i])
    finally:
        free(places)
    return total


cdef tuple captured_id(Log log, index, term):
    """Returns the caller's id as plain integers. `SnapshotRangeError` if no entry can have it."""
    index, term = operator.index(index), operator.index(term)
    if not (0 <= index < UNKNOWN_TERM and 0 <= term < UNKNOWN_TERM):
        raise SnapshotRangeError(f"{log.path}: no entry has the id {(index, term)}: expected 0 to 2**64 - 2 each")
    return index, term


cdef list list_of_bytes(keys):
    cdef list wanted = list(keys)
    for i in range(len(wanted)):
        if type(wanted[i]) is not bytes:
            wanted[i] = bytes_of(wanted[i], "key")
    return wanted
