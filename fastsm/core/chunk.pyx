"""A chunk under way: decoded, checked, judged, laid out. It changes nothing but itself.

Operations become steps, in order. Only a compare-and-swap needs to know what the steps before it did; a
chunk that has one keeps its own keys in a small table beside the machine's, and takes back what an entry
wrote there when the entry does not match.
"""

import operator

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.ref cimport Py_INCREF, PyObject
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memset

from fastsm.command cimport (
    ABSENT, COMPARE_AND_SWAP, CONFIG, DELETE, NOOP, PUT, Reader, command_error, next_operation, open_command,
)
from fastsm.disk.format cimport (
    RECORD_CONFIG, RECORD_DELETE, RECORD_KEY, RECORD_PUT, UNKNOWN_TERM,
    record_key_size, record_size, record_value_size, write_record,
)
from fastsm.lookup.table cimport prefetch

from fastsm.arguments import bytes_of, not_an_entry
from fastsm.errors import OrderError
from fastsm.types import LogId

cdef extern from "Python.h":
    object PySequence_Fast(object sequence, const char *message)
    PyObject **PySequence_Fast_ITEMS(object sequence)
    Py_ssize_t PySequence_Fast_GET_SIZE(object sequence)
    bint PyTuple_Check(PyObject *item)
    Py_ssize_t PyTuple_GET_SIZE(PyObject *item)
    PyObject *PyTuple_GET_ITEM(PyObject *item, Py_ssize_t i)
    bint PyLong_CheckExact(PyObject *item)
    uint64_t PyLong_AsUnsignedLongLong(PyObject *item) noexcept
    void PyErr_Clear() noexcept

cdef enum:
    KEPT_STEPS = 1 << 14      # scratch memory that stays for the next chunk


cdef class Chunk:
    """Scratch memory of `apply`, used again for each chunk.

    Thread safety: used by one writer at a time. Its pointers lead into the commands' own bytes, which the caller holds
    (`hold_entries`) until `forget`.
    """

    def __dealloc__(self):
        free(self.steps)
        free(self.outcomes)
        free(self.pending)

    cdef void forget(self) noexcept:
        """Drops what the last chunk left; large scratch memory goes back."""
        self.count = self.entries = 0
        self.converted = None
        if self.room > KEPT_STEPS:
            free(self.steps)
            free(self.outcomes)
            self.steps = NULL
            self.outcomes = NULL
            self.room = self.outcome_room = 0
        free(self.pending)
        self.pending = NULL

    # ---- decode ----------------------------------------------------------------------------------------

    cdef int decode(
        self, tuple entries, Table table, Terms terms, RunList runs, bint contiguous
    ) except -1:
        """Checks order and commands of entries that are held; fills steps, outcomes and `runs`."""
        cdef PyObject **items = PySequence_Fast_ITEMS(entries)
        cdef Py_ssize_t count = PySequence_Fast_GET_SIZE(entries)
        cdef uint64_t applied = runs.index
        cdef uint64_t index, term, known
        cdef uint64_t before_index = 0
        cdef uint64_t before_term = 0
        cdef Py_ssize_t i
        self.begin(count)
        for i in range(count):
            look_ahead(items, i, count)
            if not PyTuple_Check(items[i]) or PyTuple_GET_SIZE(items[i]) != 3:
                raise not_an_entry(<object>items[i], i)
            index = unsigned(PyTuple_GET_ITEM(items[i], 0), "index")
            term = unsigned(PyTuple_GET_ITEM(items[i], 1), "term")
            if i and (index <= before_index or term < before_term):
                raise OrderError(
                    f"position {i} of the chunk: {LogId(index, term)} behind {LogId(before_index, before_term)}: "
                    "indexes rise and terms never fall", index=index)
            before_index, before_term = index, term
            if index <= applied:
                if terms.find(index, &known) and known != term:
                    raise OrderError(
                        f"entry {index} was applied in term {known}, now it comes with term {term}: "
                        "this log is not the one that the state was made from", index=index)
                self.outcomes[i] = SKIPPED
            else:
                check_next(runs, index, term, contiguous)
                runs.note(index, term)
                self.entries = i + 1
                self.decode_entry(<object>PyTuple_GET_ITEM(items[i], 2), index, table)
        self.entries = count
        return 0

    cdef int begin(self, size_t count) except -1:
        """Room for the outcomes of `count` entries."""
        self.count = self.puts = 0
        self.conditional = False
        if count > self.outcome_room:
            free(self.outcomes)
            self.outcome_room = 0
            self.outcomes = <uint8_t *>malloc(count)
            if self.outcomes == NULL:
                raise MemoryError(f"no memory for a chunk of {count} entries")
            self.outcome_room = count
        if count:  # else there may be no outcomes yet
            memset(self.outcomes, APPLIED, count)
        return 0

    cdef int decode_entry(self, object command, uint64_t index, Table table) except -1:
        """Appends the steps of one command."""
        cdef Reader reader
        cdef Step *step
        cdef int code
        if type(command) is not bytes:
            command = bytes_of(command, "command")
            if self.converted is None:
                self.converted = []
            self.converted.append(command)
        code = open_command(
            &reader, <const uint8_t *>PyBytes_AS_STRING(command), PyBytes_GET_SIZE(command))
        while code == 0 and reader.left:
            if self.count == self.room:
                self.grow()
            step = &self.steps[self.count]
            code = next_operation(&reader, &step.operation)
            if code:
                break
            step.index = index
            step.entry = self.entries - 1
            if step.operation.kind == PUT:
                step.record = RECORD_PUT
                self.puts += 1
            elif step.operation.kind == DELETE:
                step.record = RECORD_DELETE
            elif step.operation.kind == CONFIG:
                step.record = RECORD_CONFIG
            elif step.operation.kind == NOOP:
                step.record = 0
            else:
                self.conditional = True
                self.puts += 1
                step.record = RECORD_DELETE if step.operation.value_size == ABSENT else RECORD_PUT
            if step.record == RECORD_PUT or step.record == RECORD_DELETE:
                step.hashed = table.hash(step.operation.key, step.operation.key_size)
                table.prefetch_slot(step.hashed)
            self.count += 1
        if code:
            raise command_error(code, &reader, index)
        return 0

    cdef int grow(self) except -1:
        cdef size_t room = 2 * self.room + 16
        cdef Step *grown = <Step *>realloc(self.steps, room * sizeof(Step))
        if grown == NULL:
            raise MemoryError(f"no memory for a chunk of {room} operations")
        self.steps = grown
        self.room = room
        return 0

    # ---- judge -----------------------------------------------------------------------------------------

    cdef int judge(self, Table table, const uint8_t *arena, uint64_t readable) except -1:
        """Decides each compare-and-swap, and with it its entry: all of an entry's steps count, or none.

        `damaged` is set to the place of a record that cannot be judged by, for it says that it ends behind `readable`.
        """
        cdef size_t first = 0
        cdef size_t stop, i
        cdef Pending *slot
        self.damaged = 0
        if not self.conditional:
            return 0
        self.open_pending()
        while first < self.count:
            stop = first
            while stop < self.count and self.steps[stop].entry == self.steps[first].entry:
                stop += 1
            i = first
            while i < stop:
                if self.steps[i].operation.kind == COMPARE_AND_SWAP:
                    if not self.matches(&self.steps[i], table, arena, readable):
                        break
                if self.steps[i].record == RECORD_PUT or self.steps[i].record == RECORD_DELETE:
                    slot = self.pending_slot(&self.steps[i])
                    self.steps[i].shadowed = slot.latest
                    slot.latest = i
                i += 1
            if i < stop:
                self.take_back(first, i, stop)
            first = stop
        return 0

    cdef void take_back(self, size_t first, size_t failed, size_t stop) noexcept:
        """Undoes an entry whose step `failed` did not match."""
        cdef size_t i
        i = failed
        while i > first:
            i -= 1
            if self.steps[i].record:
                self.pending_slot(&self.steps[i]).latest = self.steps[i].shadowed
        for i in range(first, stop):
            self.steps[i].record = 0
        self.outcomes[self.steps[first].entry] = REFUSED

    cdef int open_pending(self) except -1:
        cdef size_t room = 16
        cdef size_t i
        if self.count >= 0x7FFFFFFF:
            raise MemoryError("a chunk with compare-and-swaps has at most 2**31 - 2 operations")
        while room < 2 * self.count:
            room *= 2
        self.pending = <Pending *>malloc(room * sizeof(Pending))
        if self.pending == NULL:
            raise MemoryError(f"no memory to judge a chunk of {self.count} operations")
        for i in range(room):
            self.pending[i].owner = -1
        self.pending_mask = room - 1
        return 0

    cdef Pending *pending_slot(self, Step *step) noexcept nogil:
        """The slot of the step's key, made when there is none."""
        cdef size_t i = step.hashed & self.pending_mask
        cdef Pending *slot = &self.pending[i]
        while slot.owner >= 0:
            if slot.hashed == step.hashed and same_key(&self.steps[slot.owner].operation, &step.operation):
                return slot
            i = (i + 1) & self.pending_mask
            slot = &self.pending[i]
        slot.hashed = step.hashed
        slot.owner = <int32_t>(step - self.steps)
        slot.latest = -1
        return slot

    cdef bint matches(
        self, Step *step, Table table, const uint8_t *arena, uint64_t readable
    ) noexcept nogil:
        """Whether the key's value, as the steps before left it, is what the step expects."""
        cdef Pending *slot = self.pending_slot(step)
        cdef uint64_t place
        cdef const uint8_t *record
        cdef const uint8_t *value = NULL
        cdef uint32_t size = ABSENT
        if slot.latest >= 0:
            if self.steps[slot.latest].record == RECORD_PUT:
                value = self.steps[slot.latest].operation.value
                size = self.steps[slot.latest].operation.value_size
        else:
            place = table.find(arena, step.hashed, step.operation.key, step.operation.key_size)
            if place:
                record = arena + place
                value = record + RECORD_KEY + record_key_size(record)
                size = record_value_size(record)
                if (value - arena) + <uint64_t>size > readable:
                    self.damaged = place
                    return False
        if size != step.operation.expected_size:
            return False
        return size == ABSENT or memcmp(value, step.operation.expected, size) == 0

    # ---- write -----------------------------------------------------------------------------------------

    cdef void lay_out(self, uint64_t place) noexcept nogil:
        """Gives each record its place, the first one at `place`; sets `record_bytes`."""
        cdef uint64_t start = place
        cdef Step *step
        cdef size_t i
        for i in range(self.count):
            step = &self.steps[i]
            step.place = place
            if step.record == RECORD_PUT or step.record == RECORD_CONFIG:
                place += record_size(step.operation.key_size, step.operation.value_size)
            elif step.record == RECORD_DELETE:
                place += record_size(step.operation.key_size, 0)
        self.record_bytes = place - start

    cdef void write_records(self, uint8_t *p) noexcept nogil:
        cdef Step *step
        cdef size_t i
        for i in range(self.count):
            step = &self.steps[i]
            if step.record:
                p = write_record(
                    p, step.record, step.index, step.operation.key, step.operation.key_size,
                    step.operation.value, 0 if step.record == RECORD_DELETE else step.operation.value_size)

    cdef list results(self):
        """One of True, False, None for each entry."""
        cdef list results = PyList_New(self.entries)
        cdef object result
        cdef size_t i
        for i in range(self.entries):
            if self.outcomes[i] == APPLIED:
                result = True
            elif self.outcomes[i] == REFUSED:
                result = False
            else:
                result = None
            Py_INCREF(result)
            PyList_SET_ITEM(results, i, result)
        return results


cdef tuple hold_entries(object chunk):
    """The entries of a chunk as they are now, with their commands: no code that runs later can change or free them.

    An entry is a tuple too, so that whoever holds it holds its command.
    """
    cdef object entries = PySequence_Fast(chunk, "a chunk is a sequence of entries")
    cdef Py_ssize_t count, i
    cdef PyObject **items
    cdef tuple held
    if type(entries) is tuple:
        return entries
    while True:
        count = PySequence_Fast_GET_SIZE(entries)
        held = PyTuple_New(count)  # may collect garbage, and so run code that changes the list
        if PySequence_Fast_GET_SIZE(entries) == count:
            break
    items = PySequence_Fast_ITEMS(entries)
    for i in range(count):
        if i + 16 < count:
            prefetch(items[i + 16])
        Py_INCREF(<object>items[i])
        PyTuple_SET_ITEM(held, i, <object>items[i])
    return held


cdef inline bint same_key(const Operation *a, const Operation *b) noexcept nogil:
    return a.key_size == b.key_size and memcmp(a.key, b.key, a.key_size) == 0


cdef inline void look_ahead(PyObject **items, Py_ssize_t i, Py_ssize_t count) noexcept:
    """Prefetches entries to come: fresh objects are a cache miss each."""
    cdef PyObject *item
    if i + 8 < count:
        prefetch(items[i + 8])
    if i + 4 < count:
        item = items[i + 4]
        if PyTuple_Check(item) and PyTuple_GET_SIZE(item) == 3:
            prefetch(PyTuple_GET_ITEM(item, 0))
            prefetch(PyTuple_GET_ITEM(item, 2))
            prefetch(<char *>PyTuple_GET_ITEM(item, 2) + 64)
            prefetch(<char *>PyTuple_GET_ITEM(item, 2) + 128)


cdef inline uint64_t unsigned(PyObject *item, str what) except? 0xFFFFFFFFFFFFFFFF:
    cdef uint64_t number
    if PyLong_CheckExact(item):
        number = PyLong_AsUnsignedLongLong(item)
        if number != UNKNOWN_TERM:
            return number
        PyErr_Clear()  # negative or too large; or just this one number, which is refused as well
    return unsigned_slowly(<object>item, what)


cdef uint64_t unsigned_slowly(object item, str what) except? 0xFFFFFFFFFFFFFFFF:
    number = operator.index(item)
    if not 0 <= number < UNKNOWN_TERM:
        raise OrderError(f"{what} {number}: expected 0 to 2**64 - 2")
    return number


cdef int check_next(RunList runs, uint64_t index, uint64_t term, bint contiguous) except -1:
    """Whether an entry may follow the last applied one, which `runs` ends with."""
    if term < runs.term:
        raise OrderError(
            f"entry {index} of term {term} behind {LogId(runs.index, runs.term)}: terms never fall", index=index)
    if contiguous and index != runs.index + 1:
        raise OrderError(
            f"entry {index} behind {LogId(runs.index, runs.term)}: expected entry {runs.index + 1}; "
            "a host that does not hand over every entry opens with contiguous=False", index=index)
    return 0
