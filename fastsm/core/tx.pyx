"""The argument of a procedure: the state at its place in the log, to read and to write."""

import operator

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from fastsm.command cimport ABSENT, NO_DEADLINE
from fastsm.core.view cimport DONE, Found, Step

from fastsm.answering import after_prefix
from fastsm.answers import REASONS
from fastsm.command import MAX_KEY_SIZE, MAX_VALUE_SIZE, deadline_number
from fastsm.errors import CommandError, ProcedureError
from fastsm.procedures import LONGEST_NUMBER, add_error, is_trouble
from fastsm.types import LogId

NUMBERS_END = 1 << 63
MOST = NUMBERS_END - 1


cdef class Tx:
    """The state during one call, on the call's own thread: includes the writes of earlier entries and of this call.

    After the call, or on another thread, every method raises `ProcedureError`. `entry`: the `LogId` of the call's
    entry; `clock`: the clock of the state at this entry, in milliseconds since 1970.

    Thread safety: none; other threads get a `ProcedureError`.
    """

    def __cinit__(self, Ranging view, terms_of, procedure, uint64_t index, term, uint32_t position):
        self.view, self.terms_of, self.procedure = view, terms_of, procedure
        self.index, self.term = index, term
        self.position = position
        self.clock = view.clock
        self.thread = PyThread_get_thread_ident()

    @property
    def entry(self):
        """The `LogId` of the call's entry."""
        return LogId(self.index, self.term)

    def __repr__(self):
        return f"<Tx of {self.procedure.name!r} at {tuple(self.entry)}{'' if self.view is not None else ', over'}>"

    def _trouble(self):
        """Returns the first replica-specific error that a method raised, even if the procedure caught it; or None."""
        return self.trouble

    def _end(self):
        self.view = None

    cdef int check(self) except -1:
        """Refuses an ended call or another thread. Comes after all conversions, which may run the procedure's code."""
        if self.view is None:
            raise ProcedureError(
                f"tx of procedure {self.procedure.name!r} at entry {self.index}: the call is over, so tx can no longer "
                "be used", index=self.index, name=self.procedure.name)
        if self.thread != PyThread_get_thread_ident():
            raise ProcedureError(
                f"tx of procedure {self.procedure.name!r} at entry {self.index}: only the call's own thread may use it",
                index=self.index, name=self.procedure.name)
        return 0

    cdef int look(self, bytes key, Found *found) except -1:
        cdef const uint8_t *data = <const uint8_t *>PyBytes_AS_STRING(key)
        cdef size_t size = PyBytes_GET_SIZE(key)
        return self.view.look(data, size, self.view.table.hash(data, size), found)

    cdef bint find(self, key, Found *found) except -1:
        """Returns whether a key exists, after checking that this call may use the state."""
        key = taken(key, "key", MAX_KEY_SIZE)
        self.check()
        self.look(key, found)
        return found.size != ABSENT

    # ---- read ------------------------------------------------------------------------------------------

    def get(self, key):
        """Returns the value of a key, or None."""
        cdef Found found
        try:
            if not self.find(key, &found):
                return None
            return PyBytes_FromStringAndSize(<const char *>found.value, found.size)
        except BaseException as error:
            raise self._noted(error)

    def modified(self, key):
        """Returns the entry that last wrote a key, as a `LogId`, or None if the key is absent."""
        cdef Found found
        try:
            if not self.find(key, &found):
                return None
            return LogId(found.index, self.terms_of(found.entry, found.index))
        except BaseException as error:
            raise self._noted(error)

    def deadline(self, key):
        """Returns the deadline of a key, or None if it has none or is absent."""
        cdef bytes name
        cdef uint64_t deadline
        try:
            name = taken(key, "key", MAX_KEY_SIZE)
            self.check()
            deadline = self.view.deadline(
                <const uint8_t *>PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name),
                self.view.table.hash(<const uint8_t *>PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name)))
            return None if deadline == NO_DEADLINE else deadline
        except BaseException as error:
            raise self._noted(error)

    def scan(self, start=None, end=None, *, prefix=None, limit=None, reverse=False):
        """Returns the pairs with `start <= key < end` (None: unbounded) and with `prefix`, in the order of their keys.

        O(log keys + results).
        """
        cdef Found found
        cdef list pairs = []
        try:
            keys = self._keys(start, end, prefix, limit, reverse)
            for key in keys:
                self.look(key, &found)
                if found.size != ABSENT:  # a finalizer that wrote may have run since
                    pairs.append((key, PyBytes_FromStringAndSize(<const char *>found.value, found.size)))
            return pairs
        except BaseException as error:
            raise self._noted(error)

    def count(self, start=None, end=None, *, prefix=None):
        """Returns the number of pairs that `scan` would return. O(log keys + results)."""
        try:
            return len(self._keys(start, end, prefix, None, False))
        except BaseException as error:
            raise self._noted(error)

    def _keys(self, start, end, prefix, limit, reverse):
        first, stop = bounds(start, end, prefix)
        if limit is not None:
            limit = operator.index(limit)
            if limit < 0:
                raise ValueError(f"limit={limit}: expected 0 or more")
            limit = min(limit, MOST)
        reverse = bool(reverse)
        self.check()
        return self.view.keys_between(first, stop, -1 if limit is None else limit, reverse)

    # ---- write -----------------------------------------------------------------------------------------

    def put(self, key, value, *, expires=None):
        """Sets a key, with the deadline `expires` or none."""
        cdef uint64_t deadline
        try:
            key, value = taken(key, "key", MAX_KEY_SIZE), taken(value, "value", MAX_VALUE_SIZE)
            deadline = NO_DEADLINE if expires is None else deadline_number(expires)
            self.check()
            self.view.write_bytes(self.index, self.position, key, value, deadline)
        except BaseException as error:
            raise self._noted(error)

    def delete(self, key):
        """Removes a key; does nothing if the key is absent."""
        try:
            key = taken(key, "key", MAX_KEY_SIZE)
            self.check()
            self.view.write_bytes(self.index, self.position, key, None)
        except BaseException as error:
            raise self._noted(error)

    def touch(self, key, expires):
        """Changes only the deadline of a key, or removes the deadline (None); returns whether the key exists."""
        cdef bytes name
        cdef uint64_t deadline
        cdef Step step
        try:
            name = taken(key, "key", MAX_KEY_SIZE)
            deadline = deadline_number(expires)
            self.check()
            step.operation.key_size = <uint16_t>PyBytes_GET_SIZE(name)
            step.operation.timed = deadline != NO_DEADLINE
            step.operation.key = step.operation.value = self.view.hold_key(
                <const uint8_t *>PyBytes_AS_STRING(name), step.operation.key_size, deadline)
            step.index = self.index
            step.entry = self.position
            step.hashed = self.view.table.hash(step.operation.key, step.operation.key_size)
            return self.view.touch(&step)
        except BaseException as error:
            raise self._noted(error)

    def add(self, key, delta, *, initial=0):
        """Adds to the integer in a key, as `fastsm.add` does; returns the sum. `ValueError` if that is impossible."""
        cdef bytes data
        cdef int64_t total = 0
        cdef int64_t number, first
        cdef uint64_t deadline
        cdef int reason
        cdef Found found
        try:
            data = taken(key, "key", MAX_KEY_SIZE)
            number, first = integer(delta, "delta"), integer(initial, "initial")
            self.check()
            reason = self.view.add(
                <const uint8_t *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data),
                self.view.table.hash(<const uint8_t *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)),
                number, first, &total, &found)
            if reason != DONE:
                old, size = None, 0
                if found.size != ABSENT:
                    old, size = found.value[:min(found.size, LONGEST_NUMBER)], found.size
                raise add_error(data, old, size, first, number, REASONS[reason - 1])
            deadline = self.view.deadline_of(&found)
            self.view.write_bytes(self.index, self.position, data, str(total).encode(), deadline)
            return total
        except BaseException as error:
            raise self._noted(error)

    def delete_range(self, start, end):
        """Removes the keys with `start <= key < end` (None: unbounded); returns how many. O(log keys + results)."""
        try:
            first, stop = bounds(start, end, None)
            self.check()
            return self.view.remove_range(self.index, self.position, first, stop)
        except BaseException as error:
            raise self._noted(error)

    def delete_prefix(self, prefix):
        """Removes the keys that start with `prefix`; returns how many. O(log keys + results)."""
        try:
            first, stop = bounds(None, None, memoryview(prefix))  # a prefix of None must raise, not mean all keys
            self.check()
            return self.view.remove_range(self.index, self.position, first, stop)
        except BaseException as error:
            raise self._noted(error)

    def _noted(self, error):
        if self.trouble is None and is_trouble(error):
            self.trouble = error
        return error


cdef bytes taken(object source, str name, size_t limit):
    if type(source) is not bytes:
        if isinstance(source, str):
            raise TypeError(f"{name} is a str: encode it first, {name}.encode()")
        source = bytes(memoryview(source))
    if <size_t>PyBytes_GET_SIZE(source) > limit:
        raise CommandError(f"{name} of {len(source)} bytes: the limit is {limit}")
    return source


cdef object integer(object number, str name):
    number = operator.index(number)
    if not -NUMBERS_END <= number < NUMBERS_END:
        raise CommandError(f"{name} {number}: expected -2**63 to 2**63 - 1")
    return number


cdef tuple bounds(start, end, prefix):
    """Returns the first key of a range, and the first key after it: [start, end) restricted to a prefix."""
    first = b"" if start is None else bytes(memoryview(start))
    stop = None if end is None else bytes(memoryview(end))
    if prefix is not None:
        prefix = bytes(memoryview(prefix))
        first = max(first, prefix)
        after = after_prefix(prefix)
        stop = after if stop is None or (after is not None and after < stop) else stop
    return first, stop
