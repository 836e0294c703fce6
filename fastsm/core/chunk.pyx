"""One chunk being applied: decoded, checked, judged, laid out.

Outside this object, only the state's `runs` are changed, which the caller rewinds if the chunk fails.

Operations become steps, in order. Puts, deletes and no-ops are written as they are. A chunk with any other command is
judged first, against a view of the state (modules `judging`, `view`); its steps are then replaced by what it writes.
"""

import operator

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.list cimport PyList_CheckExact, PyList_GET_SIZE, PyList_New, PyList_SET_ITEM
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset

from fastsm.command cimport (
    ABSENT, BATCHED, CALL, COMPARE_AND_SWAP, CONFIG, DELETE, NOOP, ONCE, Operation,
    PUT, Reader, TOUCH, TRANSACTED, TRANSACTION,
    call_name, call_version, command_error, is_put, next_operation, number_at, open_command,
)
from fastsm.core.judging cimport ANSWERS, Judge, LISTS, reads_key
from fastsm.core.view cimport PendingView
from fastsm.disk.format cimport (
    DEADLINE_SIZE, RECORD_CONFIG, RECORD_DELETE, RECORD_FORGET, RECORD_PUT, RECORD_SESSION, RECORD_TOUCH, UNKNOWN_TERM,
    record_size, write_deadline, write_record, write_record_head,
)
from fastsm.lookup.table cimport prefetch

from fastsm.arguments import bytes_of, not_an_entry
from fastsm.errors import CommandError, OrderError, UnknownCommandError
from fastsm.types import LogId

cdef extern from "Python.h":
    object PySequence_Fast(object sequence, const char *message)
    PyObject **PySequence_Fast_ITEMS(object sequence)
    PyObject *PyList_GET_ITEM(object list, Py_ssize_t i)
    Py_ssize_t PySequence_Fast_GET_SIZE(object sequence)
    bint PyTuple_Check(PyObject *item)
    Py_ssize_t PyTuple_GET_SIZE(PyObject *item)
    PyObject *PyTuple_GET_ITEM(PyObject *item, Py_ssize_t i)
    bint PyLong_CheckExact(PyObject *item)
    uint64_t PyLong_AsUnsignedLongLong(PyObject *item) noexcept
    void PyErr_Clear() noexcept
    PyObject *Py_True
    PyObject *Py_False
    PyObject *Py_None

cdef enum:
    KEPT_STEPS = 1 << 14      # scratch memory for this many steps is kept for the next chunk


cdef class Chunk:
    """The scratch memory of `apply`, reused for each chunk.

    Thread safety: used by one writer at a time. Its pointers point into the bytes of the commands, which the caller
    keeps alive from `hold` until `forget`.
    """

    def __cinit__(self):
        self.judgement = Judge()

    def __dealloc__(self):
        free(self.steps)
        free(self.outcomes)
        free(self.parts)

    cdef void forget(self) noexcept:
        """Drops everything about the last chunk, and frees large scratch memory."""
        self.count = self.entries = 0
        self.converted = None
        if self.parts != NULL:
            free(self.parts)
            self.parts = NULL
        if self.source is not None:
            self.source = None
            self.judgement.forget()
        if self.room > KEPT_STEPS:
            free(self.steps)
            free(self.outcomes)
            self.steps = NULL
            self.outcomes = NULL
            self.room = self.outcome_room = 0

    # ---- decode ----------------------------------------------------------------------------------------

    cdef int decode(
        self, PyObject **items, Py_ssize_t count, Table table, Terms terms, RunList runs, bint contiguous
    ) except -1:
        """Checks the order and the commands of held entries, and fills in steps, outcomes and `runs`."""
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
                    f"position {i} of the chunk: {LogId(index, term)} after {LogId(before_index, before_term)}: "
                    "indexes rise and terms never fall", index=index)
            before_index, before_term = index, term
            if index <= applied:
                if terms.find(index, &known) and known != term:
                    raise OrderError(
                        f"entry {index} was applied in term {known}, but this chunk has it with term {term}: "
                        "the state was made from another log; open the directory that belongs to this log", index=index)
                self.outcomes[i] = SKIPPED
            else:
                if term < runs.term or (contiguous and index != runs.index + 1):
                    raise cannot_follow(runs, index, term)
                runs.note(index, term)
                self.entries = i + 1
                self.decode_entry(<object>PyTuple_GET_ITEM(items[i], 2), index, table)
        self.entries = count
        if self.conditional:
            self.source = tuple_of(items, count)
        return 0

    cdef int begin(self, size_t count) except -1:
        """Reserves room for the outcomes of `count` entries."""
        self.count = self.puts = self.sessions = self.touches = 0
        self.conditional = self.calls = False
        if count > self.outcome_room:
            free(self.outcomes)
            self.outcome_room = 0
            self.outcomes = <uint8_t *>malloc(count)
            if self.outcomes == NULL:
                raise MemoryError(f"no memory for a chunk of {count} entries")
            self.outcome_room = count
        if count:  # with `count` 0, `outcomes` may be NULL
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
        if self.count == self.room:
            self.grow()
        step = &self.steps[self.count]
        if is_put(<const uint8_t *>PyBytes_AS_STRING(command), PyBytes_GET_SIZE(command), &step.operation):
            step.index = index
            step.entry = self.entries - 1
            step.record = RECORD_PUT
            step.hashed = table.hash(step.operation.key, step.operation.key_size)
            table.prefetch_slot(step.hashed)
            self.puts += 1
            self.count += 1
            return 0
        code = open_command(
            &reader, <const uint8_t *>PyBytes_AS_STRING(command), PyBytes_GET_SIZE(command))
        if code == 0 and (reader.form > BATCHED or reader.once != NULL):
            self.add_heads(&reader, index)
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
            elif step.operation.kind == COMPARE_AND_SWAP:
                self.conditional = True
                self.puts += 1
                step.record = RECORD_DELETE if step.operation.value_size == ABSENT else RECORD_PUT
            else:
                self.take_answering(step, reader.form, table)
            if step.record == RECORD_PUT or step.record == RECORD_DELETE:
                step.hashed = table.hash(step.operation.key, step.operation.key_size)
                table.prefetch_slot(step.hashed)
            self.count += 1
        if code:
            raise command_error(code, &reader, index)
        return 0

    cdef int add_heads(self, const Reader *reader, uint64_t index) except -1:
        """Appends a step for each command that contains others: `once`, or a transaction with its parts' sizes."""
        cdef Step *step
        if reader.once != NULL:
            self.add_head(ONCE, index).operation.key = reader.once
        if reader.form == TRANSACTED:
            step = self.add_head(TRANSACTION, index)
            step.operation.value_size = reader.conditions
            step.operation.expected_size = reader.first_branch
            self.outcomes[step.entry] = ANSWERS
        return 0

    cdef Step *add_head(self, uint8_t kind, uint64_t index) except NULL:
        cdef Step *step
        if self.count == self.room:
            self.grow()
        step = &self.steps[self.count]
        step.operation.kind = kind
        step.index = index
        step.entry = self.entries - 1
        step.record = 0
        self.count += 1
        self.conditional = True
        return step

    cdef int take_answering(self, Step *step, uint8_t form, Table table) except -1:
        """Completes the step of a command that answers, or of a condition."""
        cdef const Operation *operation = &step.operation
        self.conditional = True
        step.record = 0
        if form != TRANSACTED and (form == BATCHED or operation.kind != TOUCH):
            self.outcomes[step.entry] = LISTS if form == BATCHED else ANSWERS
        if operation.kind == CALL:
            self.calls = True
            if self.judgement.procedure_of(operation) is None:
                name = call_name(operation)
                if name is None:
                    raise CommandError(f"entry {step.index}: the name of a procedure is not UTF-8", index=step.index)
                raise UnknownCommandError(
                    f"entry {step.index}: calls procedure {name!r}, version {call_version(operation)}, which this "
                    "machine was not given: open it with procedures=[…] on every replica before a call is proposed",
                    index=step.index)
        elif reads_key(operation.kind):
            step.hashed = table.hash(operation.key, operation.key_size)
            table.prefetch_slot(step.hashed)
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

    cdef int judge(self, Ordered owner) except -1:
        """Decides the outcome of each entry, and replaces the steps with what the chunk writes. May run procedures."""
        cdef PendingView view = self.judgement.view
        cdef Step *steps
        cdef size_t room, i
        if not self.conditional:
            return 0
        view.begin(owner, self.count)
        self.judgement.judge(self.steps, self.count, self.outcomes, self.source, owner._terms)
        steps, room = self.steps, self.room
        self.steps, self.room, self.count = view.writes, view.room, view.count
        view.writes, view.room, view.count = steps, room, 0
        self.puts = 0
        for i in range(self.count):
            self.puts += self.steps[i].record == RECORD_PUT
            self.sessions += self.steps[i].record == RECORD_SESSION
            self.touches += self.steps[i].record == RECORD_TOUCH
        return 0

    # ---- write -----------------------------------------------------------------------------------------

    cdef void lay_out(self, uint64_t place) noexcept nogil:
        """Gives each record its place, starting at `place`; sets `record_bytes`, `deadlines` and large values."""
        cdef uint64_t start = place
        cdef uint64_t deadlines = 0
        self.large_bytes = self.large_values = 0
        cdef Step *step
        cdef size_t i
        for i in range(self.count):
            step = &self.steps[i]
            step.place = place
            if step.record == RECORD_DELETE or step.record == RECORD_FORGET:
                place += record_size(step.operation.key_size, 0)
            elif step.record:
                place += record_size(step.operation.key_size, step.operation.value_size)
                place += DEADLINE_SIZE * <uint64_t>step.operation.timed
                deadlines += step.operation.timed
                if is_large(step):
                    self.large_bytes += step.operation.value_size
                    self.large_values += 1
        self.record_bytes = place - start
        self.deadlines = deadlines

    cdef void write_records(self, uint8_t *p) noexcept nogil:
        cdef Step *step
        cdef size_t i
        for i in range(self.count):
            step = &self.steps[i]
            if step.record:
                p = write_step(p, step)

    cdef int reserve_parts(self) except -1:
        self.parts = <Part *>malloc((2 * self.large_values + 1) * sizeof(Part))
        if self.parts == NULL:
            raise MemoryError(f"no memory for a frame of {self.large_values} large values")
        return 0

    cdef size_t write_around(self, uint8_t *frame, uint8_t *p) noexcept nogil:
        """Writes the records of a frame without their large values, which become parts; returns the number of parts.

        `frame` is the start of the frame, `p` the start of its records.
        """
        cdef size_t count = 0
        cdef Step *step
        cdef size_t i
        cdef uint32_t value_size
        cdef uint64_t padding
        for i in range(self.count):
            step = &self.steps[i]
            if step.record == 0:
                continue
            value_size = 0 if step.record == RECORD_DELETE else step.operation.value_size
            if not is_large(step):
                p = write_step(p, step)
                continue
            p = write_record_head(p, step.record, step.index, step.operation.key, step.operation.key_size, value_size)
            self.parts[count].data, self.parts[count].size = frame, p - frame
            self.parts[count + 1].data, self.parts[count + 1].size = step.operation.value, value_size
            count += 2
            frame = p
            padding = -(<uint64_t>step.operation.key_size + value_size) & 7
            memset(p, 0, padding)
            p += padding
        self.parts[count].data, self.parts[count].size = frame, p - frame
        return count + 1 if p > frame else count

    cdef list results(self):
        """Returns True, False, None or an Answer for each entry."""
        cdef list results = PyList_New(self.entries)
        cdef PyObject *result
        cdef size_t i
        for i in range(self.entries):
            result = Py_True
            if self.outcomes[i] != APPLIED:
                if self.outcomes[i] == REFUSED:
                    result = Py_False
                elif self.outcomes[i] == ANSWERS:
                    result = PyList_GET_ITEM(self.judgement.answers, i)
                else:
                    result = Py_None
            Py_INCREF(<object>result)
            PyList_SET_ITEM(results, i, <object>result)
        return results


cdef inline bint is_large(const Step *step) noexcept nogil:
    """Returns whether the value is written without being copied. A value that a deadline follows is copied."""
    return (
        step.operation.value_size >= LARGE_VALUE and not step.operation.timed and step.record != RECORD_DELETE
        and step.record != RECORD_FORGET)


cdef inline uint8_t *write_step(uint8_t *p, const Step *step) noexcept nogil:
    """Writes a step's record; returns where the next one starts."""
    cdef uint8_t *start = p
    p = write_record(
        p, step.record, step.index, step.operation.key, step.operation.key_size, step.operation.value,
        0 if step.record == RECORD_DELETE else step.operation.value_size)
    if step.operation.timed:
        p = write_deadline(start, p, number_at(step.operation.key - DEADLINE_SIZE))
    return p


cdef int hold(object chunk, Held *held) except -1:
    """Takes references to the entries of a chunk, until `let_go`: no code that runs later can change or free them.

    An entry is a tuple, so a reference to it also keeps its command alive. A short list is held without a new object.
    """
    cdef Py_ssize_t i
    cdef tuple entries
    if PyList_CheckExact(chunk) and PyList_GET_SIZE(chunk) <= FEW:  # no Python code runs from here to the return
        held.whole = NULL
        held.items = held.few
        held.count = PyList_GET_SIZE(chunk)
        for i in range(held.count):
            held.few[i] = PyList_GET_ITEM(chunk, i)
            Py_INCREF(<object>held.few[i])
        return 0
    entries = hold_entries(chunk)
    Py_INCREF(entries)
    held.whole = <PyObject *>entries
    held.items = PySequence_Fast_ITEMS(entries)
    held.count = PySequence_Fast_GET_SIZE(entries)
    return 0


cdef void let_go(Held *held) noexcept:
    """Releases the references that `hold` took. May run finalizers."""
    cdef Py_ssize_t i
    if held.whole != NULL:
        Py_DECREF(<object>held.whole)
        return
    for i in range(held.count):
        Py_DECREF(<object>held.few[i])


cdef tuple tuple_of(PyObject **items, Py_ssize_t count):
    """Returns held entries as a tuple."""
    cdef tuple entries = PyTuple_New(count)  # a garbage collection here cannot change held entries
    cdef Py_ssize_t i
    for i in range(count):
        Py_INCREF(<object>items[i])
        PyTuple_SET_ITEM(entries, i, <object>items[i])
    return entries


cdef tuple hold_entries(object chunk):
    """Returns the entries of a chunk, as they are now, as a tuple."""
    cdef object entries = PySequence_Fast(chunk, "expected a chunk: a sequence of entries, such as a list of them")
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


cdef inline void look_ahead(PyObject **items, Py_ssize_t i, Py_ssize_t count) noexcept:
    """Prefetches entries that come next: each freshly made object is a cache miss."""
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
        PyErr_Clear()  # negative or too large; or 2**64 - 1, which is refused as well
    return unsigned_slowly(<object>item, what)


cdef uint64_t unsigned_slowly(object item, str what) except? 0xFFFFFFFFFFFFFFFF:
    number = operator.index(item)
    if not 0 <= number < UNKNOWN_TERM:
        raise OrderError(f"{what} {number}: expected 0 to 2**64 - 2")
    return number


cdef object cannot_follow(RunList runs, uint64_t index, uint64_t term):
    """Returns the error for an entry that must not follow the last applied one (the end of `runs`)."""
    if term < runs.term:
        return OrderError(
            f"entry {index} of term {term} after {LogId(runs.index, runs.term)}: terms never fall", index=index)
    return OrderError(
        f"entry {index} after {LogId(runs.index, runs.term)}: expected entry {runs.index + 1}; "
        "a host that does not hand over every entry opens with contiguous=False", index=index)
