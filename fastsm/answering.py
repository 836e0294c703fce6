"""The rarer commands, most of which have answers, and the conditions of transactions: how they are made.

A proposer makes no more of these than it can send, so this is plain Python; ``command`` decodes them at C speed.
docs/format.md has their layout.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastsm.command import MAX_COMMAND_SIZE, MAX_KEY_SIZE, MAX_VALUE_SIZE, check, decode
from fastsm.command import deadline_number as deadline_number  # noqa: PLC0414  # others take it from here
from fastsm.errors import CommandError
from fastsm.types import (
    Add,
    Config,
    Delete,
    DeleteRange,
    Forget,
    Once,
    OpenSession,
    Put,
    Read,
    Tick,
    Touch,
)

if TYPE_CHECKING:
    from typing import SupportsIndex

    from typing_extensions import Buffer

ADD, READ, DELETE_RANGE, TRANSACTION, CALL, OPEN_SESSION, ONCE, FORGET = range(7, 15)
TOUCH, TICK = 17, 18
VALUE_IS, EXISTS, MODIFIED_AT = 128, 129, 130
NONE = 2**32 - 1
NO_DEADLINE = NO_LIMIT = 2**64 - 1
_HEADER = struct.Struct("<BBHI")
_IN_BRANCH = (Put, Delete, Add, Touch, DeleteRange, Read)


# ---- commands ------------------------------------------------------------------------------------------

def add(key: Buffer, delta: SupportsIndex, *, initial: SupportsIndex = 0) -> bytes:
    """Returns the command that adds ``delta`` to the integer in ``key``, or sets an absent key to ``initial + delta``.

    The value is an integer as text, such as ``b"-42"``, from -2**63 to 2**63 - 1. Answers ``Answer(True, new value)``,
    or refuses with "not a number" if the value is anything else, and with "overflow" if the sum is out of that range.
    Raises ``CommandError`` if ``delta`` or ``initial`` is out of range.
    """
    name = _bytes(key, "key", MAX_KEY_SIZE)
    numbers = struct.pack("<qq", _integer(delta, "delta"), _integer(initial, "initial"))
    return _HEADER.pack(0, ADD, len(name), 0) + numbers + name


def read(key: Buffer) -> bytes:
    """Returns the command that reads a key at its place in the log: it answers ``Answer(True, value or None)``."""
    name = _bytes(key, "key", MAX_KEY_SIZE)
    return _HEADER.pack(0, READ, len(name), 0) + name


def delete_range(start: Buffer | None, end: Buffer | None) -> bytes:
    """Returns the command that removes every key with ``start <= key < end``; None means unbounded.

    Answers ``Answer(True, number of keys removed)``.
    """
    first = b"" if start is None else _bytes(start, "start", MAX_KEY_SIZE)
    last = b"" if end is None else _bytes(end, "end", MAX_KEY_SIZE)
    return _HEADER.pack(0, DELETE_RANGE, len(first), NONE if end is None else len(last)) + first + last


def delete_prefix(prefix: Buffer) -> bytes:
    """Returns the command that removes every key that starts with ``prefix``, like :func:`delete_range`."""
    first = _bytes(prefix, "prefix", MAX_KEY_SIZE)
    return delete_range(first, after_prefix(first))


def touch(key: Buffer, expires: SupportsIndex | None) -> bytes:
    """Returns the command that changes only the deadline of a key, or removes the deadline (``expires=None``).

    ``expires`` is as in :func:`fastsm.put`. The result is True, or False if the key is absent. Neither the value nor
    ``modified`` nor the order of ``items()`` changes, and the value is not written again.
    """
    name = _bytes(key, "key", MAX_KEY_SIZE)
    return _HEADER.pack(0, TOUCH, len(name), 0) + struct.pack("<Q", deadline_number(expires)) + name


def tick(now: SupportsIndex, *, limit: SupportsIndex | None = None) -> bytes:
    """Returns the command that moves the clock to ``now``, if that is later, and then removes what is due.

    ``now`` is in milliseconds since 1970. Removes keys first, in the order of deadline and key, then sessions, in the
    order of deadline and id; at most ``limit`` in total (None: all; 0: only the clock moves). Answers
    ``Answer(True, number removed)``. It is an entry of its own: batches, transactions and ``once`` do not accept it.
    """
    numbers = {"now": operator.index(now), "limit": NO_LIMIT if limit is None else operator.index(limit)}
    for name, number in numbers.items():
        if not 0 <= number < 2**63 and not (name == "limit" and limit is None):
            raise CommandError(f"{name} {number}: expected 0 to 2**63 - 1")
    return _HEADER.pack(0, TICK, 0, 0) + struct.pack("<QQ", *numbers.values())


def after_prefix(prefix: bytes) -> bytes | None:
    """Returns the smallest key above all keys that start with ``prefix``, or None if there is none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else None


def value_is(key: Buffer, value: Buffer | None) -> bytes:
    """Returns the condition that a key has this value; None: that the key is absent."""
    name = _bytes(key, "key", MAX_KEY_SIZE)
    expected = b"" if value is None else _bytes(value, "value", MAX_VALUE_SIZE)
    return _HEADER.pack(0, VALUE_IS, len(name), NONE if value is None else len(expected)) + name + expected


def exists(key: Buffer) -> bytes:
    """Returns the condition that a key exists."""
    name = _bytes(key, "key", MAX_KEY_SIZE)
    return _HEADER.pack(0, EXISTS, len(name), 0) + name


def absent(key: Buffer) -> bytes:
    """Returns the condition that a key does not exist."""
    return value_is(key, None)


def modified_at(key: Buffer, index: SupportsIndex) -> bytes:
    """Returns the condition that the entry ``index`` was the last to write a key; 0: that the key is absent."""
    name = _bytes(key, "key", MAX_KEY_SIZE)
    number = operator.index(index)
    if not 0 <= number < 2**64 - 1:
        raise CommandError(f"index {number}: expected 0 to 2**64 - 2")
    return _HEADER.pack(0, MODIFIED_AT, len(name), 0) + struct.pack("<Q", number) + name


def transaction(conditions: Iterable[Buffer], then: Iterable[Buffer], otherwise: Iterable[Buffer] = ()) -> bytes:
    """Returns the command that does ``then`` if all conditions hold, otherwise ``otherwise``: in order, all or none.

    Conditions are made by :func:`value_is`, :func:`exists`, :func:`absent` and :func:`modified_at`; a branch may
    contain put, delete, add, touch, delete_range, delete_prefix and read. Answers ``Answer(True, [one value for each of
    then])``, or ``Answer(False, [… of otherwise], "mismatch")``. An add that is impossible refuses everything:
    ``Answer(False, None, reason)``.
    """
    tests = [_copied(each) for each in conditions]
    branches = [[_copied(each) for each in branch] for branch in (then, otherwise)]
    for position, test in enumerate(tests):
        if test[1:2] not in (b"\x80", b"\x81", b"\x82"):
            raise CommandError(f"condition {position}: expected value_is, exists, absent or modified_at")
    for name, branch in zip(("then", "otherwise"), branches, strict=True):
        for position, command in enumerate(branch):
            decoded = decode(command)
            if not isinstance(decoded, _IN_BRANCH):
                raise CommandError(
                    f"{name}, command {position}: expected a put, delete, add, touch, delete_range, delete_prefix or "
                    f"read, found {decoded}"
                )
    whole = b"".join([
        _HEADER.pack(0, TRANSACTION, 0, len(tests)), struct.pack("<II", *map(len, branches)), *tests, *branches[0],
        *branches[1],
    ])
    check(whole)
    return whole


def call(name: str, payload: Buffer = b"", *, version: SupportsIndex = 1) -> bytes:
    """Returns the command that runs a procedure, a function of the embedder, on every replica: see ``procedure``."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, found {type(name).__name__}")
    label = encoded_name(name)
    data = _bytes(payload, "payload", MAX_VALUE_SIZE)
    number = operator.index(version)
    if not 0 <= number < 2**32:
        raise CommandError(f"version {number}: expected 0 to 2**32 - 1")
    return _HEADER.pack(0, CALL, len(label), len(data)) + struct.pack("<I", number) + label + data


def open_session(*, expires: SupportsIndex | None = None) -> bytes:
    """Returns the command that opens a session; it answers ``Answer(True, id)``: its entry's index, which is unique.

    ``expires`` is a deadline in milliseconds since 1970: a ``tick`` at or after it removes the session. None: no
    deadline.
    """
    return _HEADER.pack(0, OPEN_SESSION, 0, 0) + struct.pack("<Q", deadline_number(expires))


def once(
    session: SupportsIndex, sequence: SupportsIndex, command: Buffer, *, expires: SupportsIndex | None = None
) -> bytes:
    """Returns a command that applies another command exactly once, however often it is proposed.

    ``session``: the id that ``open_session`` answered. Sequences rise from 1; gaps are allowed. Repeating the last
    sequence returns the same result, and changes nothing. An older one is ``Answer(False, None, "stale")``, an unknown
    or forgotten session "no session": neither says whether that command was applied before, so propose only one command
    of a session at a time. The result is that of ``command``, or "too large" if that takes more than 1 MiB; refusals
    are remembered too. ``expires`` sets the session's deadline; None leaves it unchanged.

    ``command`` may be any except config, once, open_session, forget and tick. Raises ``CommandError`` for those, and
    for a sequence below 1.
    """
    inner = _copied(command)
    numbers = [operator.index(session), operator.index(sequence)]
    for name, number, first in (("session", numbers[0], 0), ("sequence", numbers[1], 1)):
        if not first <= number < 2**64:
            raise CommandError(f"{name} {number}: expected {first} to 2**64 - 1")
    decoded = decode(inner)
    if isinstance(decoded, (Config, Once, OpenSession, Forget, Tick)):
        raise CommandError(
            f"the command in a once: expected any but config, once, open_session, forget and tick, found {decoded}"
        )
    if len(inner) > MAX_COMMAND_SIZE - 32:
        raise CommandError(f"command of {len(inner) + 32} bytes: the limit is {MAX_COMMAND_SIZE}")
    return _HEADER.pack(0, ONCE, 0, len(inner)) + struct.pack("<QQQ", *numbers, deadline_number(expires)) + inner


def forget(session: SupportsIndex) -> bytes:
    """Returns the command that removes a session. The result is True, or False if there is no such session."""
    number = operator.index(session)
    if not 0 <= number < 2**64:
        raise CommandError(f"session {number}: expected 0 to 2**64 - 1")
    return _HEADER.pack(0, FORGET, 0, 0) + struct.pack("<Q", number)


def encoded_name(name: str) -> bytes:
    """Returns the name of a procedure as commands encode it."""
    try:
        label = name.encode()
    except UnicodeEncodeError as error:
        raise CommandError(f"name {name!r} cannot be written as UTF-8: {error}") from None
    return _bytes(label, "name", MAX_KEY_SIZE)


def _bytes(source: Buffer, name: str, limit: int) -> bytes:
    if isinstance(source, str):
        raise TypeError(f"{name} is a str: encode it first, {name}.encode()")
    view = memoryview(source)
    if view.nbytes > limit:
        raise CommandError(f"{name} of {view.nbytes} bytes: the limit is {limit}")
    return bytes(view)


def _copied(command: Buffer) -> bytes:
    return _bytes(command, "command", MAX_COMMAND_SIZE)


def _integer(number: SupportsIndex, name: str) -> int:
    integer = operator.index(number)
    if not -(2**63) <= integer < 2**63:
        raise CommandError(f"{name} {integer}: expected -2**63 to 2**63 - 1")
    return integer
