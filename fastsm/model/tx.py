"""The model's pending state: the writes of one entry, and the argument of procedures; on dicts, deliberately plain."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from typing import Any, TypeVar, cast

from fastsm.answering import deadline_number
from fastsm.command import MAX_KEY_SIZE, MAX_VALUE_SIZE
from fastsm.errors import CommandError, ProcedureError
from fastsm.procedures import add_error, is_trouble
from fastsm.snapshot.model import State
from fastsm.types import LogId

NUMBER = re.compile(rb"0|-?[1-9][0-9]*")

Method = TypeVar("Method", bound=Callable[..., Any])


class Refused(Exception):  # a signal, not an error
    """An entry is refused, for the given reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass
class Outcome:
    """The writes of an entry, in order: names of methods of ``State``, with their arguments."""

    log_id: LogId
    steps: list[tuple[str, tuple[Any, ...]]]

    def write_to(self, state: State) -> None:
        """Applies the writes to a state."""
        for name, arguments in self.steps:
            getattr(state, name)(self.log_id, *arguments)


class Written:
    """A state that one entry is changing; ``can_be_taken_back``: the entry may be refused after it wrote."""

    def __init__(self, state: State, log_id: LogId, *, can_be_taken_back: bool) -> None:
        self.state = state
        self.log_id = log_id
        self._before = state.copy() if can_be_taken_back else None
        self._steps: list[tuple[str, tuple[Any, ...]]] = []

    def take_back(self) -> None:
        """Restores the state before the entry."""
        if self._steps:
            assert self._before is not None
            vars(self.state).update(vars(self._before.copy()))
            self._steps.clear()

    def outcome(self) -> Outcome:
        """Returns the writes that take effect."""
        return Outcome(self.log_id, self._steps)

    def _step(self, name: str, *arguments: Any) -> None:
        getattr(self.state, name)(self.log_id, *arguments)
        self._steps.append((name, arguments))

    def remember(self, session: int, value: bytes) -> None:
        """Sets the value of a session's record."""
        self._step("remember", session, value)

    def forget(self, session: int) -> bool:
        """Ends a session; returns whether it existed."""
        known = session in self.state.sessions
        if known:
            self._step("forget", session)
        return known

    def set_membership(self, data: bytes) -> None:
        """Sets the cluster's membership."""
        self._step("set_membership", data)

    def put(self, key: bytes, value: bytes | None, expires: int | None = None) -> None:
        """Sets a key, or removes it."""
        if value is None:
            self._step("delete", key)
        else:
            self._step("put", key, value, expires)

    def touch(self, key: bytes, expires: int | None) -> bool:
        """Changes only the deadline of a key; returns whether the key exists."""
        found = key in self.state.values
        if found and self.state.deadline(key) != expires:
            self._step("touch", key, expires)
        return found

    def tick(self, now: int, limit: int | None) -> int:
        """Moves the clock, and removes the keys and sessions that are due; returns how many."""
        if now > self.state.clock:
            self._step("set_clock", now)
        keys = [key for expires, key in self.state.deadlines_of_keys() if expires <= self.state.clock]
        sessions = [session for expires, session in self.state.deadlines_of_sessions() if expires <= self.state.clock]
        due = [("delete", key) for key in keys] + [("forget", session) for session in sessions]
        for step in due[:limit]:
            self._step(*step)
        return len(due[:limit])

    def add(self, key: bytes, delta: int, initial: int) -> int:
        """Adds to a number, which keeps its deadline; raises ``Refused`` if that is impossible."""
        value = self.state.values.get(key)
        if value is not None:
            if not NUMBER.fullmatch(value) or len(value) > 20 or not -(2**63) <= int(value) < 2**63:
                raise Refused("not a number")
            initial = int(value)
        if not -(2**63) <= initial + delta < 2**63:
            raise Refused("overflow")
        self.put(key, b"%d" % (initial + delta), self.state.deadline(key))
        return initial + delta

    def keys(self, start: bytes, end: bytes | None) -> list[bytes]:
        """Returns the keys of a range, in order."""
        return sorted(key for key in self.state.values if start <= key and (end is None or key < end))

    def delete_range(self, start: bytes, end: bytes | None) -> int:
        """Removes the keys of a range; returns how many."""
        keys = self.keys(start, end)
        for key in keys:
            self.put(key, None)
        return len(keys)


def noting(method: Method) -> Method:
    """Decorates a method of ``Tx`` to record a replica-specific error that it raises: the procedure may catch it."""

    @functools.wraps(method)
    def noted(self: Tx, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except BaseException as error:
            if self._noted is None and is_trouble(error):
                self._noted = error
            raise

    return cast("Method", noted)


class Tx:
    """The argument of a procedure of the model. Attributes cannot be set, as with a ``FastStateMachine``."""

    __slots__ = ("_clock", "_entry", "_noted", "_thread", "_written")

    def __init__(self, written: Written) -> None:
        self._entry = written.log_id
        self._clock = written.state.clock
        self._written: Written | None = written
        self._thread = get_ident()
        self._noted: BaseException | None = None

    @property
    def entry(self) -> LogId:
        """Returns the call's entry."""
        return self._entry

    @property
    def clock(self) -> int:
        """Returns the clock of the state at this entry."""
        return self._clock

    def _trouble(self) -> BaseException | None:
        return self._noted

    def _end(self) -> None:
        self._written = None

    @property
    def _pending(self) -> Written:
        if self._written is None or self._thread != get_ident():
            raise ProcedureError(
                f"tx at entry {self._entry.index}: the call is over, or this is another thread; only the call's own "
                "thread may use tx, until the call ends")
        return self._written

    @noting
    def get(self, key: Any) -> bytes | None:
        """Returns the value of a key, or None."""
        key = self._bytes(key, "key", MAX_KEY_SIZE)
        return self._pending.state.values.get(key)

    @noting
    def modified(self, key: Any) -> LogId | None:
        """Returns the entry that last wrote a key, or None."""
        key = self._bytes(key, "key", MAX_KEY_SIZE)
        return self._pending.state.writers.get(key)

    @noting
    def deadline(self, key: Any) -> int | None:
        """Returns the deadline of a key, or None."""
        key = self._bytes(key, "key", MAX_KEY_SIZE)
        return self._pending.state.deadline(key)

    @noting
    def scan(
        self, start: Any = None, end: Any = None, *, prefix: Any = None, limit: int | None = None, reverse: bool = False
    ) -> list[tuple[bytes, bytes]]:
        """Returns the pairs of a range, in order."""
        first, stop = self._bounds(start, end)
        below = b"" if prefix is None else bytes(memoryview(prefix))
        if limit is not None:
            limit = operator.index(limit)
            if limit < 0:
                raise ValueError(f"limit={limit}: expected 0 or more")
        reverse = bool(reverse)
        keys = [key for key in self._pending.keys(first, stop) if key.startswith(below)]
        return [(key, self._pending.state.values[key]) for key in (keys[::-1] if reverse else keys)[:limit]]

    @noting
    def count(self, start: Any = None, end: Any = None, *, prefix: Any = None) -> int:
        """Returns how many pairs a range has."""
        return len(self.scan(start, end, prefix=prefix))

    @noting
    def put(self, key: Any, value: Any, *, expires: Any = None) -> None:
        """Sets a key and its deadline."""
        key, value = self._bytes(key, "key", MAX_KEY_SIZE), self._bytes(value, "value", MAX_VALUE_SIZE)
        expires = _deadline(expires)
        self._pending.put(key, value, expires)

    @noting
    def touch(self, key: Any, expires: Any) -> bool:
        """Changes only the deadline of a key; returns whether the key exists."""
        key, expires = self._bytes(key, "key", MAX_KEY_SIZE), _deadline(expires)
        return self._pending.touch(key, expires)

    @noting
    def delete(self, key: Any) -> None:
        """Removes a key."""
        key = self._bytes(key, "key", MAX_KEY_SIZE)
        self._pending.put(key, None)

    @noting
    def add(self, key: Any, delta: int, *, initial: int = 0) -> int:
        """Adds to a number; raises ``ValueError`` if that is impossible."""
        key, numbers = self._bytes(key, "key", MAX_KEY_SIZE), [_integer(delta, "delta"), _integer(initial, "initial")]
        try:
            return self._pending.add(key, *numbers)
        except Refused as refused:
            value = self._pending.state.values.get(key)
            delta, initial = numbers
            raise add_error(key, value, len(value or b""), initial, delta, refused.reason) from None

    @noting
    def delete_range(self, start: Any, end: Any) -> int:
        """Removes the keys of a range; returns how many."""
        first, stop = self._bounds(start, end)
        return self._pending.delete_range(first, stop)

    @noting
    def delete_prefix(self, prefix: Any) -> int:
        """Removes the keys with a prefix; returns how many."""
        keys = [key for key, _ in self.scan(prefix=memoryview(prefix))]
        for key in keys:
            self._pending.put(key, None)
        return len(keys)

    def _bytes(self, source: Any, name: str, limit: int) -> bytes:
        if isinstance(source, str):
            raise TypeError(f"{name} is a str: encode it first")
        taken = bytes(memoryview(source))
        if len(taken) > limit:
            raise CommandError(f"{name} of {len(taken)} bytes: the limit is {limit}")
        return taken

    def _bounds(self, start: Any, end: Any) -> tuple[bytes, bytes | None]:
        return b"" if start is None else bytes(memoryview(start)), None if end is None else bytes(memoryview(end))


def _deadline(expires: Any) -> int | None:
    return None if expires is None else int(deadline_number(expires))


def _integer(number: Any, name: str) -> int:
    integer = operator.index(number)
    if not -(2**63) <= integer < 2**63:
        raise CommandError(f"{name} {integer}: expected -2**63 to 2**63 - 1")
    return integer
