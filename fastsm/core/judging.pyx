"""Judging: decides what each entry of a chunk does, in order, over one view of the state. An entry is all or nothing.

Chunks that contain only puts, deletes and no-ops are not judged: they take effect whatever the state is.
"""

import operator

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.contextvars cimport PyContext_Enter, PyContext_Exit, PyContext_New
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from fastsm.answers cimport answer, pack_result
from fastsm.command cimport (
    ABSENT, ADD, CALL, COMPARE_AND_SWAP, DELETE_RANGE, EXISTS, MODIFIED_AT, Operation, READ, TRANSACTION,
    FORGET, NO_DEADLINE, ONCE, OPEN_SESSION, TICK, TOUCH, call_name, call_version, number_at,
)
from fastsm.core.expiring cimport Expiring
from fastsm.core.tx cimport Tx
from fastsm.core.view cimport DONE, Found, MISMATCH, SessionId, Step, TOO_LARGE
from fastsm.disk.format cimport RECORD_FORGET, SESSION_ID_SIZE, SESSION_RESULT
from fastsm.lookup.index cimport BLOCK
from fastsm.lookup.terms cimport Terms

from fastsm.answers import MAX_ANSWER_SIZE, REASONS, checked_value, same_answer, unpack_result
from fastsm.errors import ProcedureError
from fastsm.procedures import answer_of_error, answer_of_value, refuse_trouble

cdef enum:
    VALUE_HEAD = 5         # bytes stored ahead of a bytes value, or of the members of a list
    NUMBER_BYTES = 9
cdef uint64_t ANSWER_LIMIT = MAX_ANSWER_SIZE + VALUE_HEAD


cdef class Judge:
    """Judges chunks, one at a time; `view` then holds what the chunk writes.

    Thread safety: used by one writer at a time. Making an object may run a finalizer, and a call runs the embedder's
    code; neither can change the state, because the writer's turn is taken, nor the chunk, which no other code can
    reach.
    """

    def __cinit__(self):
        self.view = Expiring()
        self.procedures = {}

    cdef void forget(self) noexcept:
        self.answers = self.entries = self.terms = self.value = None
        self.steps = NULL
        self.outcomes = NULL
        self.view.forget()

    cdef int judge(self, Step *steps, size_t count, uint8_t *outcomes, tuple entries, Terms terms) except -1:
        """Judges a chunk: sets outcomes and answers, and makes writes in the view, which has begun for this chunk."""
        cdef size_t first = 0
        cdef size_t stop
        cdef size_t expected = 0
        cdef uint32_t entry
        self.steps, self.outcomes, self.entries, self.terms = steps, outcomes, entries, terms
        self.answers = None
        while first < count:
            while expected < min(first + BLOCK, count):
                self.expect_reads(expected, min(expected + BLOCK, count))
                expected += BLOCK
            entry = steps[first].entry
            stop = first + 1
            while stop < count and steps[stop].entry == entry:
                stop += 1
            result = self.judge_entry(first, stop)
            if result is True:
                outcomes[entry] = APPLIED
            elif result is False:
                outcomes[entry] = REFUSED
            else:
                if self.answers is None:
                    self.answers = [None] * len(entries)
                self.answers[entry] = result
                outcomes[entry] = ANSWERS
            first = stop
        return 0

    cdef void expect_reads(self, size_t first, size_t stop) noexcept:
        """Prefetches the records that the steps from `first` to before `stop` read, so that cache misses overlap."""
        cdef size_t i
        for i in range(first, stop):
            if reads_key(self.steps[i].operation.kind):
                self.view.index.expect(self.view.arena, self.steps[i].hashed)

    cdef object judge_entry(self, size_t first, size_t stop):
        """Returns True, False, or an Answer."""
        cdef uint8_t kind = self.steps[first].operation.kind
        if kind == TRANSACTION:
            return self.judge_transaction(first, stop)
        if kind == CALL:
            return self.call(&self.steps[first])
        if kind == ONCE:
            return self.judge_once(first, stop)
        if kind == OPEN_SESSION or kind == FORGET:
            return self.judge_session(&self.steps[first])
        if kind == TICK:
            return self.judge_tick(&self.steps[first])
        if kind == TOUCH and self.outcomes[self.steps[first].entry] == APPLIED:
            return self.view.touch(&self.steps[first])
        return self.judge_list(first, stop, self.outcomes[self.steps[first].entry])

    # ---- sessions --------------------------------------------------------------------------------------

    cdef object judge_session(self, Step *step):
        """Opens a session, whose id is the entry's index, or forgets a session."""
        cdef const uint8_t *number = step.operation.key - 8  # the deadline of a new session, or the session to forget
        cdef uint64_t index = step.index
        cdef uint8_t *key
        cdef SessionId session
        cdef Found found
        if step.operation.kind == OPEN_SESSION:
            key = self.view.scratch.take(SESSION_ID_SIZE)
            memcpy(key, &index, SESSION_ID_SIZE)
            session = self.view.session_at(key)
            self.view.write_session(index, step.entry, &session, 0, number_at(number), b"")
            return answer(True, index, None)
        session = self.view.session_at(number)
        self.view.look_at_session(&session, &found)
        if found.size == ABSENT:
            return False
        self.view.append_removal(step, number, SESSION_ID_SIZE, session.hashed, RECORD_FORGET)
        return True

    cdef object judge_once(self, size_t head, size_t stop):
        """Judges the command inside (the steps after `head`), whose result is stored together with its writes."""
        cdef const uint8_t *numbers = self.steps[head].operation.key
        cdef uint64_t index = self.steps[head].index
        cdef uint32_t entry = self.steps[head].entry
        cdef uint64_t sequence = number_at(numbers + 8)
        cdef uint64_t deadline = number_at(numbers + 16)
        cdef uint64_t last
        cdef size_t mark = self.view.count
        cdef SessionId session = self.view.session_at(numbers)
        cdef Found found
        self.view.look_at_session(&session, &found)
        if found.size == ABSENT:
            return answer(False, None, "no session")
        last = number_at(found.value)
        if sequence < last:
            return answer(False, None, "stale")
        if sequence == last:
            return unpack_result(found.value[SESSION_RESULT:found.size])
        if deadline == NO_DEADLINE:
            deadline = number_at(found.value + 8)
        # An empty batch has no steps, and takes effect.
        result = self.judge_entry(head + 1, stop) if head + 1 < stop else True
        packed = pack_result(result)
        if packed is None:
            self.view.take_back(mark)
            result = answer(False, None, "too large")
            packed = pack_result(result)
        self.view.write_session(index, entry, &session, sequence, deadline, packed)
        return result

    cdef object judge_tick(self, Step *step):
        """Moves the clock, and removes what is due."""
        cdef const uint8_t *numbers = step.operation.key
        cdef uint64_t removed = 0
        self.view.tick(step, number_at(numbers - 16), number_at(numbers - 8), &removed)
        return answer(True, removed, None)

    # ---- commands --------------------------------------------------------------------------------------

    cdef object judge_list(self, size_t first, size_t stop, uint8_t outcome):
        """Judges a single command, or the members of a batch in order, until one cannot be done."""
        cdef size_t mark = self.view.count
        cdef size_t i
        cdef int reason
        cdef list values = [] if outcome == LISTS else None
        self.value_bytes = VALUE_HEAD if outcome == LISTS else 0
        for i in range(first, stop):
            reason = self.do_step(&self.steps[i], outcome != APPLIED)
            if reason != DONE:
                self.view.take_back(mark)
                return False if outcome == APPLIED else refusal(reason)
            if values is not None:
                values.append(self.value)
        if outcome == APPLIED:
            return True
        return answer(True, self.value if values is None else values, None)

    cdef object judge_transaction(self, size_t head, size_t stop):
        """Judges conditions, then one of two branches: the steps after `head` are conditions and both branches."""
        cdef size_t mark = self.view.count
        cdef size_t conditions = head + 1 + self.steps[head].operation.value_size
        cdef size_t i = head + 1
        cdef size_t first
        cdef int reason
        cdef list values
        while i < conditions and self.holds(&self.steps[i]):
            i += 1
        cdef bint all_hold = i == conditions
        i = conditions
        if all_hold:
            stop = i + self.steps[head].operation.expected_size
        else:
            i += self.steps[head].operation.expected_size
        first = i
        values = [None] * (stop - first)
        self.value_bytes = VALUE_HEAD
        while i < stop:
            reason = self.do_step(&self.steps[i], True)
            if reason != DONE:
                self.view.take_back(mark)
                return refusal(reason)
            values[i - first] = self.value
            i += 1
        return answer(True, values, None) if all_hold else answer(False, values, "mismatch")

    cdef int holds(self, const Step *step) except -1:
        """Returns whether a condition holds."""
        cdef const Operation *operation = &step.operation
        cdef Found found
        self.view.look(operation.key, operation.key_size, step.hashed, &found)
        if operation.kind == EXISTS:
            return found.size != ABSENT
        if operation.kind == MODIFIED_AT:
            return found.index == number_at(operation.key - 8)
        return has_value(&found, operation.value, operation.value_size)

    cdef int do_step(self, Step *step, bint answering) except -1:
        """Returns DONE, and sets `value` when `answering`; or the reason why the step cannot be done."""
        cdef Operation *operation = &step.operation
        cdef Found found
        cdef int64_t number = 0
        cdef int reason
        cdef uint8_t kind = operation.kind
        if kind == COMPARE_AND_SWAP:
            self.view.look(operation.key, operation.key_size, step.hashed, &found)
            if not has_value(&found, operation.expected, operation.expected_size):
                return MISMATCH
        if kind == ADD:
            reason = self.view.add(
                operation.key, operation.key_size, step.hashed, <int64_t>number_at(operation.key - 16),
                <int64_t>number_at(operation.key - 8), &number, &found)
            if reason != DONE:
                return reason
            self.view.write_number(step, number, self.view.deadline_of(&found))
            self.value = number
            self.value_bytes += NUMBER_BYTES
        elif kind == TOUCH:
            self.value = self.view.touch(step)
            self.value_bytes += 1
        elif kind == READ:
            self.view.look(operation.key, operation.key_size, step.hashed, &found)
            return self.take_value(found.value, found.size)
        elif kind == DELETE_RANGE:
            self.value = self.view.remove_range(
                step.index, step.entry, operation.key[:operation.key_size],
                None if operation.value_size == ABSENT else operation.value[:operation.value_size])
            self.value_bytes += NUMBER_BYTES
        else:
            if step.record:
                self.view.write(step)
            if answering:
                self.value = True
                self.value_bytes += 1
        return DONE if self.value_bytes <= ANSWER_LIMIT else TOO_LARGE

    cdef int take_value(self, const uint8_t *value, uint64_t size) except -1:
        if size == ABSENT:
            self.value = None
            self.value_bytes += 1
        else:
            self.value_bytes += VALUE_HEAD + size
            if self.value_bytes <= ANSWER_LIMIT:  # otherwise the object would not be used
                self.value = PyBytes_FromStringAndSize(<const char *>value, size)
        return DONE if self.value_bytes <= ANSWER_LIMIT else TOO_LARGE

    # ---- procedures ------------------------------------------------------------------------------------

    cdef object call(self, Step *step):
        """Runs a procedure, which decoding has found to exist."""
        cdef size_t mark = self.view.count
        cdef size_t values = len(self.view.values)
        cdef bytes payload = step.operation.value[:step.operation.value_size]
        called = self.procedure_of(&step.operation)
        if self.stopped:
            raise KeyboardInterrupt
        result = self.run_once(step, called, payload)
        if self.twice:
            result = self.run_again(step, mark, called, payload, result)
        if not result[0]:
            self.view.take_back(mark)
            del self.view.values[values:]
        return result

    cdef object procedure_of(self, const Operation *operation):
        """Returns the procedure that a call names, or None. Caches the last one, since calls often repeat."""
        cdef bytes name = self.called_name
        if not (
            name is not None and PyBytes_GET_SIZE(name) == operation.key_size
            and memcmp(PyBytes_AS_STRING(name), operation.key, operation.key_size) == 0
            and self.called_version == call_version(operation)
        ):
            label = call_name(operation)
            called = None if label is None else self.procedures.get((label, call_version(operation)))
            if called is None:
                return None
            self.called, self.called_name = called, operation.key[:operation.key_size]
            self.called_version = call_version(operation)
        return self.called

    cdef object run_once(self, Step *step, called, bytes payload):
        cdef uint64_t index = step.index
        cdef Tx tx = Tx(self.view, self.term_of, called, index, self.term_of(step.entry, 0), step.entry)
        try:
            # Empty: what the host or an earlier call has set, such as the precision of `decimal`, must not count.
            context = PyContext_New()
            PyContext_Enter(context)
            try:
                returned = called.function(tx, payload)
            finally:
                PyContext_Exit(context)
        except Exception as error:
            return answer_of_error(called, error, tx.trouble, index)
        finally:
            tx.view = None  # whatever happened, `tx` is over
        if tx.trouble is not None:
            refuse_trouble(called, tx.trouble, index)
        try:
            return answer(True, checked_value(returned), None)
        except Exception:
            return answer_of_value(called, returned, index)

    cdef object run_again(self, Step *step, size_t mark, called, bytes payload, result):
        """Undoes the call and runs it again, for `check_procedures`. Raises `ProcedureError` if the results differ."""
        cdef list first = self.written(mark)
        cdef uint64_t index = step.index
        self.view.take_back(mark)
        again = self.run_once(step, called, payload)
        if not same_answer(again, result) or self.written(mark) != first:
            raise ProcedureError(
                f"entry {index}: procedure {called.name!r}, version {called.version}, was run twice and gave {result}, "
                f"then {again}, or made other writes: it must depend on nothing but tx and its payload",
                index=index, name=called.name)
        return again

    cdef list written(self, size_t mark):
        """Returns the writes after `mark`, as objects."""
        cdef list found = []
        cdef const Operation *operation
        cdef size_t i
        for i in range(mark, self.view.count):
            operation = &self.view.writes[i].operation
            found.append((
                self.view.writes[i].record, operation.key[:operation.key_size], operation.value[:operation.value_size],
                number_at(operation.key - 8) if operation.timed else None))
        return found

    def term_of(self, position, uint64_t index):
        """Returns the term of this chunk's entry at `position`; with -1, of an earlier entry (None: unknown)."""
        cdef uint64_t term
        if position >= 0:
            return operator.index(self.entries[position][1])
        return term if self.terms.find(index, &term) else None


cdef inline bint has_value(const Found *found, const uint8_t *value, uint32_t size) noexcept nogil:
    """Returns whether the value found equals `value`; with size ABSENT, whether no value was found."""
    return found.size == size and (size == ABSENT or memcmp(found.value, value, size) == 0)


cdef object refusal(int reason):
    return answer(False, None, REASONS[reason - 1])
