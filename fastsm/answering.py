"""Commands that answer, made; and what they answer, as bytes.

A proposer makes these commands as rarely as a network round trip allows, so this is plain Python; ``command`` decodes
them at C speed. docs/format.md has their layout, and that of stored answers.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fastsm.command import MAX_COMMAND_SIZE, MAX_KEY_SIZE, MAX_VALUE_SIZE, check, decode
from fastsm.errors import CommandError
from fastsm.types import Add, Delete, DeleteRange, Put, Read

if TYPE_CHECKING:
    from typing import SupportsIndex

    from typing_extensions import Buffer

MAX_ANSWER_SIZE = 64 << 20
MAX_ANSWER_DEPTH = 8
REASONS = ("mismatch", "not a number", "overflow", "abort", "failed", "too large", "stale", "no session")

ADD, READ, DELETE_RANGE, TRANSACTION, CALL = range(7, 12)
VALUE_IS, EXISTS, MODIFIED_AT = 128, 129, 130
NONE = 2**32 - 1
_HEADER = struct.Struct("<BBHI")
_IN_BRANCH = (Put, Delete, Add, DeleteRange, Read)


# ---- commands ------------------------------------------------------------------------------------------

def add(key: Buffer, delta: SupportsIndex, *, initial: SupportsIndex = 0) -> bytes:
    """The command that adds ``delta`` to the integer in ``key``, or sets an absent key to ``initial + delta``.

    The value is an integer as text, such as ``b"-42"``, from -2**63 to 2**63 - 1. Answers ``Answer(True, new value)``;
    refuses with "not a number" where the value is anything else, with "overflow" where the sum leaves that range.
    Raises ``CommandError`` where ``delta`` or ``initial`` leave it.
    """
    name = _bytes(key, "key", MAX_KEY_SIZE)
    numbers = struct.pack("<qq", _integer(delta, "delta"), _integer(initial, "initial"))
    return _HEADER.pack(0, ADD, len(name), 0) + numbers + name


def read(key: Buffer) -> bytes:
    """The command that reads a key at its place in the log: it answers ``Answer(True, value or None)``."""
    name = _bytes(key, "key", MAX_KEY_SIZE)
    return _HEADER.pack(0, READ, len(name), 0) + name


def delete_range(start: Buffer | None, end: Buffer | None) -> bytes:
    """The command that removes every key with ``start <= key < end``; None is open.

    Answers ``Answer(True, number of keys removed)``.
    """
    first = b"" if start is None else _bytes(start, "start", MAX_KEY_SIZE)
    last = b"" if end is None else _bytes(end, "end", MAX_KEY_SIZE)
    return _HEADER.pack(0, DELETE_RANGE, len(first), NONE if end is None else len(last)) + first + last


def delete_prefix(prefix: Buffer) -> bytes:
    """The command that removes every key that starts with ``prefix``, as :func:`delete_range` does."""
    first = _bytes(prefix, "prefix", MAX_KEY_SIZE)
    return delete_range(first, after_prefix(first))


def after_prefix(prefix: bytes) -> bytes | None:
    """The smallest key above all that start with ``prefix``; None where there is none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else None


def value_is(key: Buffer, value: Buffer | None) -> bytes:
    """The condition that a key has this value; None: that it is absent."""
    name = _bytes(key, "key", MAX_KEY_SIZE)
    expected = b"" if value is None else _bytes(value, "value", MAX_VALUE_SIZE)
    return _HEADER.pack(0, VALUE_IS, len(name), NONE if value is None else len(expected)) + name + expected


def exists(key: Buffer) -> bytes:
    """The condition that a key is there."""
    name = _bytes(key, "key", MAX_KEY_SIZE)
    return _HEADER.pack(0, EXISTS, len(name), 0) + name


def absent(key: Buffer) -> bytes:
    """The condition that a key is not there."""
    return value_is(key, None)


def modified_at(key: Buffer, index: SupportsIndex) -> bytes:
    """The condition that the entry ``index`` was the last one to write a key; 0: that it is absent."""
    name = _bytes(key, "key", MAX_KEY_SIZE)
    number = operator.index(index)
    if not 0 <= number < 2**64 - 1:
        raise CommandError(f"index {number}: expected 0 to 2**64 - 2")
    return _HEADER.pack(0, MODIFIED_AT, len(name), 0) + struct.pack("<Q", number) + name


def transaction(conditions: Iterable[Buffer], then: Iterable[Buffer], otherwise: Iterable[Buffer] = ()) -> bytes:
    """The command that does ``then`` when all conditions hold, and else ``otherwise``: in order, all or none.

    Conditions are made by :func:`value_is`, :func:`exists`, :func:`absent` and :func:`modified_at`; a branch takes
    put, delete, add, delete_range, delete_prefix and read. Answers ``Answer(True, [one value for each of then])``, or
    ``Answer(False, [… of otherwise], "mismatch")``. An add that cannot be done refuses the whole:
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
                    f"{name}, command {position}: expected a put, delete, add, delete_range, delete_prefix or read, "
                    f"found {decoded}"
                )
    whole = b"".join([
        _HEADER.pack(0, TRANSACTION, 0, len(tests)), struct.pack("<II", *map(len, branches)), *tests, *branches[0],
        *branches[1],
    ])
    check(whole)
    return whole


def call(name: str, payload: Buffer = b"", *, version: SupportsIndex = 1) -> bytes:
    """The command that runs a procedure, a function of the embedder's, on every replica; see ``fastsm.procedure``."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, found {type(name).__name__}")
    label = encoded_name(name)
    data = _bytes(payload, "payload", MAX_VALUE_SIZE)
    number = operator.index(version)
    if not 0 <= number < 2**32:
        raise CommandError(f"version {number}: expected 0 to 2**32 - 1")
    return _HEADER.pack(0, CALL, len(label), len(data)) + struct.pack("<I", number) + label + data


def encoded_name(name: str) -> bytes:
    """The name of a procedure as a command carries it."""
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


# ---- answers -------------------------------------------------------------------------------------------

class BadAnswerError(ValueError):
    """A value that no answer may have; ``too_large`` where only its size is wrong."""

    def __init__(self, message: str, *, too_large: bool = False) -> None:
        self.too_large = too_large
        super().__init__(message)


def checked_value(value: Any) -> Any:
    """A copy of a value that an answer may have: nobody else holds its lists. Raises ``BadAnswerError``.

    None, a bool, an int of 64 bits, bytes, or a list of these: of exactly these types, since others may say anything.
    """
    copied, size = _copy_value(value, 0, MAX_ANSWER_SIZE)
    if size > MAX_ANSWER_SIZE:
        raise BadAnswerError(f"an answer of {size} bytes: the limit is {MAX_ANSWER_SIZE}", too_large=True)
    return copied


def _copy_value(value: Any, depth: int, room: int) -> tuple[Any, int]:
    kind = type(value)
    if value is None or kind is bool:
        return value, 1
    if kind is int:
        if not -(2**63) <= value < 2**63:
            raise BadAnswerError(f"{value.bit_length()} bits in an int: an answer takes 64, with the sign")
        return value, 9
    if kind is bytes:
        return value, 5 + len(value)
    if kind is not list:
        raise BadAnswerError(f"expected None, a bool, an int, bytes or a list of these, found {kind.__name__}")
    if depth == MAX_ANSWER_DEPTH:
        raise BadAnswerError(f"lists in an answer are at most {MAX_ANSWER_DEPTH} deep")
    total, members = 5, []
    for each in value:
        member, size = _copy_value(each, depth + 1, room - total)
        members.append(member)
        total += size
        if total > room:
            raise BadAnswerError(f"an answer of more than {MAX_ANSWER_SIZE} bytes", too_large=True)
    return members, total
