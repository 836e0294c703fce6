from collections.abc import Iterable
from typing import SupportsIndex

from typing_extensions import Buffer, Self

from fastsm.types import (
    Add,
    Batch,
    Call,
    CompareAndSwap,
    Config,
    Delete,
    DeleteRange,
    Forget,
    Noop,
    Once,
    OpenSession,
    Put,
    Read,
    Tick,
    Touch,
    Transaction,
)

MAX_KEY_SIZE: int
MAX_VALUE_SIZE: int
MAX_COMMAND_SIZE: int

def deadline_number(expires: SupportsIndex | None) -> int:
    """Returns a deadline as commands and records store it: milliseconds since 1970. `CommandError` if invalid."""
def put(key: Buffer, value: Buffer, *, expires: SupportsIndex | None = None) -> bytes:
    """Returns the command that sets `key` to `value` (bytes-like objects). O(size).

    `expires`: the deadline, in milliseconds since 1970, from 0 to 2**63 - 1; a `tick` at or after it removes the key.
    Without it the key has no deadline, even if it had one before.

    Raises `CommandError` over `MAX_KEY_SIZE` or `MAX_VALUE_SIZE`, and for a deadline out of range.
    """
def delete(key: Buffer) -> bytes:
    """Returns the command that removes `key`; removing an absent key is not an error."""
def compare_and_swap(
    key: Buffer, expected: Buffer | None, value: Buffer | None, *, expires: SupportsIndex | None = None
) -> bytes:
    """Returns the command that sets `key` to `value` if its value is `expected`.

    `expected=None`: the key must be absent. `value=None`: a match removes the key. `expires`: as in `put`; combined
    with `value=None` it is a `CommandError`.
    """
def noop() -> bytes:
    """Returns the command that changes nothing, for example for a new leader's first entry."""
def config(data: Buffer) -> bytes:
    """Returns the command that records opaque cluster membership; see `FastStateMachine.membership`."""
def batch(commands: Iterable[Buffer]) -> bytes:
    """Returns the command that applies several commands in order, all or none; each sees the effects of earlier ones.

    If a compare-and-swap in it does not match, or an add is impossible, the whole batch has no effect. It may contain
    put, delete, compare_and_swap, noop, add, touch, delete_range and delete_prefix; anything else, or a malformed
    member, is a `CommandError`. If it contains an add, a touch or a range, its result is
    `Answer(True, [one value for each command])`, or `Answer(False, None, reason)`.
    """
def decode(
    command: Buffer,
) -> (
    Put
    | Delete
    | CompareAndSwap
    | Noop
    | Config
    | Batch
    | Add
    | Read
    | DeleteRange
    | Transaction
    | Call
    | OpenSession
    | Once
    | Forget
    | Touch
    | Tick
):
    """Returns the content of a command as a small printable object (`Put`, `Delete`, …, `Batch`). O(size).

    Raises `CommandError` or `UnknownCommandError`, exactly when `apply` would, except that only `apply` raises for a
    procedure that the machine was not given.

    >>> decode(put(b"color", b"blue"))
    Put(key=b'color', value=b'blue')
    """
def check(command: Buffer) -> None:
    """Raises what `apply` would raise for this command, so a proposer can call it before proposing. O(size).

    Does not check whether a machine was given the procedure of a `call`.
    """

class Field:
    def __new__(cls, source: Buffer, name: str, limit: int) -> Self: ...
