"""The outcomes of commands on plain dicts: an implementation of the rules that shares nothing with state machines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import fastsm
from fastsm import Answer

# What a command does: its name and its arguments, as for the functions that make commands. A command inside another one
# is a meaning too; keyword arguments are a dict at the end.
Meaning = tuple[Any, ...]

ANSWERING = ("add", "read", "delete_range", "delete_prefix", "tick", "transaction")
ANSWERING_IN_BATCH = ("add", "delete_range", "delete_prefix", "touch")


def encode(meaning: Meaning) -> bytes:
    """Returns the command, or the condition, with this meaning."""
    name, arguments, options = parts(meaning)
    encoded = [
        encode(each) if isinstance(each, tuple) else [encode(one) for one in each] if isinstance(each, list) else each
        for each in arguments
    ]
    command: bytes = getattr(fastsm, name)(*encoded, **options)
    return command


def parts(meaning: Meaning) -> tuple[str, list[Any], dict[str, Any]]:
    """Returns name, arguments, and keyword arguments."""
    name, *arguments = meaning
    options = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
    return name, arguments, options


class Refused(Exception):  # a signal, not an error
    """An entry is refused, for the given reason."""


@dataclass(frozen=True)
class Session:
    """The last sequence of a session, its result, and until when the session lives."""

    sequence: int
    result: bool | Answer
    expires: int | None


@dataclass
class PlainState:
    """The state that entries lead to."""

    values: dict[bytes, bytes] = field(default_factory=dict)  # in the order in which they were written
    writers: dict[bytes, int] = field(default_factory=dict)
    deadlines: dict[bytes, int] = field(default_factory=dict)
    sessions: dict[int, Session] = field(default_factory=dict)
    clock: int = 0

    def perform(self, index: int, meaning: Meaning) -> bool | Answer:
        """Does what an entry says; returns its result."""
        name, arguments, options = parts(meaning)
        if name == "open_session":
            self.sessions[index] = Session(0, False, options.get("expires"))
            return Answer(True, index)
        if name == "once":
            return self._once(index, arguments, options.get("expires"))
        if name == "forget":
            return self.sessions.pop(arguments[0], None) is not None
        answers = name in ANSWERING or (
            name == "batch" and any(member[0] in ANSWERING_IN_BATCH for member in arguments[0]))
        before = {key: dict(each) if isinstance(each, dict) else each for key, each in vars(self).items()}
        try:
            value = self._do(index, name, arguments, options)
        except Refused as refused:
            vars(self).update(before)
            return Answer(False, None, str(refused)) if answers else False
        if name == "transaction":
            holds, values = value
            return Answer(True, values) if holds else Answer(False, values, "mismatch")
        return Answer(True, value) if answers else name != "touch" or bool(value)

    def _once(self, index: int, arguments: list[Any], expires: int | None) -> bool | Answer:
        number, sequence, meaning = arguments
        session = self.sessions.get(number)
        if session is None:
            return Answer(False, None, "no session")
        if sequence < session.sequence:
            return Answer(False, None, "stale")
        if sequence == session.sequence:
            return session.result
        result = self.perform(index, meaning)
        known = session.expires if expires is None else expires
        self.sessions[number] = replace(session, sequence=sequence, result=result, expires=known)
        return result

    def _do(self, index: int, name: str, arguments: list[Any], options: dict[str, Any]) -> Any:
        do = getattr(self, f"_{name}", None)
        return True if do is None else do(index, *arguments, **options)  # a noop or a config changes no keys

    def _member(self, index: int, meaning: Meaning) -> Any:
        name, arguments, options = parts(meaning)
        return self._do(index, name, arguments, options)

    # ---- one for each command --------------------------------------------------------------------------

    def _put(self, index: int, key: bytes, value: bytes, expires: int | None = None) -> bool:
        self._delete(index, key)
        self.values[key], self.writers[key] = value, index
        if expires is not None:
            self.deadlines[key] = expires
        return True

    def _delete(self, index: int, key: bytes) -> bool:
        for each in (self.values, self.writers, self.deadlines):
            each.pop(key, None)
        return True

    def _compare_and_swap(
        self, index: int, key: bytes, expected: bytes | None, value: bytes | None, expires: int | None = None
    ) -> bool:
        if self.values.get(key) != expected:
            raise Refused("mismatch")
        return self._delete(index, key) if value is None else self._put(index, key, value, expires)

    def _touch(self, index: int, key: bytes, expires: int | None) -> bool:
        if key not in self.values:
            return False
        self.deadlines.pop(key, None)
        if expires is not None:
            self.deadlines[key] = expires
        return True

    def _add(self, index: int, key: bytes, delta: int, initial: int = 0) -> int:
        text = self.values.get(key)
        if text is not None:
            if re.fullmatch(rb"0|-?[1-9][0-9]{0,18}", text) is None or not -(2**63) <= int(text) < 2**63:
                raise Refused("not a number")
            initial = int(text)
        if not -(2**63) <= initial + delta < 2**63:
            raise Refused("overflow")
        self._put(index, key, str(initial + delta).encode(), self.deadlines.get(key))
        return initial + delta

    def _read(self, index: int, key: bytes) -> bytes | None:
        return self.values.get(key)

    def _delete_range(self, index: int, start: bytes | None, end: bytes | None) -> int:
        found = [key for key in self.values if (start or b"") <= key and (end is None or key < end)]
        for key in found:
            self._delete(index, key)
        return len(found)

    def _delete_prefix(self, index: int, prefix: bytes) -> int:
        found = [key for key in self.values if key.startswith(prefix)]
        for key in found:
            self._delete(index, key)
        return len(found)

    def _batch(self, index: int, members: list[Meaning]) -> list[Any]:
        return [self._member(index, member) for member in members]

    def _transaction(self, index: int, conditions: list[Meaning], then: list[Meaning], otherwise: list[Meaning]) -> Any:
        holds = all(self._holds(*condition) for condition in conditions)
        return holds, [self._member(index, member) for member in (then if holds else otherwise)]

    def _holds(self, name: str, key: bytes, expected: Any = None) -> bool:
        if name == "modified_at":
            return bool(self.writers.get(key, 0) == expected)
        if name == "exists":
            return key in self.values
        return bool(self.values.get(key) == expected)  # value_is, absent

    def _tick(self, index: int, now: int, limit: int | None = None) -> int:
        self.clock = max(self.clock, now)
        keys = sorted((expires, key) for key, expires in self.deadlines.items() if expires <= self.clock)
        sessions = sorted(
            (session.expires, number) for number, session in self.sessions.items()
            if session.expires is not None and session.expires <= self.clock)
        for _, key in keys[:limit]:
            self._delete(index, key)
        left = None if limit is None else max(0, limit - len(keys))
        for _, number in sessions[:left]:
            del self.sessions[number]
        due = len(keys) + len(sessions)
        return due if limit is None else min(limit, due)
