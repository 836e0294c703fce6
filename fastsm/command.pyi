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
    """A deadline as commands and records have it: milliseconds since 1970; `CommandError` when it is none."""
def put(key: Buffer, value: Buffer, *, expires: SupportsIndex | None = None) -> bytes:
    """Returns the command that sets `key` to `value` (bytes-like objects). O(size).

    `expires`: the deadline from which on a `tick` removes the key, in milliseconds since 1970, from 0 to 2**63 - 1.
    Without one the key has none, whatever deadline it had before.

    Raises `CommandError` over `MAX_KEY_SIZE` or `MAX_VALUE_SIZE`, and for a deadline out of range.
    """
def delete(key: Buffer) -> bytes:
    """Returns the command that removes `key`; a key that is not there is no error."""
def compare_and_swap(
    key: Buffer, expected: Buffer | None, value: Buffer | None, *, expires: SupportsIndex | None = None
) -> bytes:
    """Returns the command that sets `key` to `value` if its value is `expected`.

    `expected=None`: if the key is not there. `value=None`: remove the key on a match. `expires`: as for `put`; a
    deadline for `value=None` is a `CommandError`.
    """
def noop() -> bytes:
    """Returns the command that changes nothing: a new leader's first entry."""
def config(data: Buffer) -> bytes:
    """Returns the command that records opaque cluster membership; see `FastStateMachine.membership`."""
def batch(commands: Iterable[Buffer]) -> bytes:
    """Returns the command that does several others in order, each seeing those before it, all or none.

    When a compare-and-swap in it does not match, or an add in it cannot be done, nothing of it happens. It takes put,
    delete, compare_and_swap, noop, add, touch, delete_range and delete_prefix; anything else in it is a `CommandError`,
    as is a member that is malformed itself. With an add, a touch or a range in it, it answers
    `Answer(True, [one value for each])`, or `Answer(False, None, reason)`.
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
    """Returns what a command says, as a small printable object (`Put`, `Delete`, …, `Batch`). O(size).

    Raises `CommandError` or `UnknownCommandError`, exactly where `apply` would.

    >>> decode(put(b"color", b"blue"))
    Put(key=b'color', value=b'blue')
    """
def check(command: Buffer) -> None:
    """Raises what `apply` would raise for this command; a proposer calls it before it proposes. O(size)."""

class Field:
    def __new__(cls, source: Buffer, name: str, limit: int) -> Self: ...
