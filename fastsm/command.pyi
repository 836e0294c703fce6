from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
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
    Transaction,
)

MAX_KEY_SIZE: int
MAX_VALUE_SIZE: int
MAX_COMMAND_SIZE: int

_Column: TypeAlias = (
    Sequence[Buffer] | npt.NDArray[np.bytes_] | npt.NDArray[np.uint8] | tuple[Buffer, npt.NDArray[Any]]
)

def put(key: Buffer, value: Buffer) -> bytes:
    """Returns the command that sets `key` to `value` (bytes-like objects). O(size).

    Raises `CommandError` over `MAX_KEY_SIZE` or `MAX_VALUE_SIZE`.
    """
def put_many(keys: _Column, values: _Column) -> bytes:
    """Returns the batch that sets each key of a column to the value in the other one. O(bytes).

    Of equal keys the last pair counts, and it alone becomes part of the batch.

    A column is a sequence of bytes-like objects, a NumPy `S` array (NULs at the end of a cell do not belong to it), a
    2-D uint8 array (rows, taken whole), or Arrow's `(data, offsets)`: a buffer, and an int32 or int64 array one longer
    than the column. Raises `CommandError` over the limits, `ValueError` when the columns differ in length.
    """
def delete(key: Buffer) -> bytes:
    """Returns the command that removes `key`; a key that is not there is no error."""
def compare_and_swap(key: Buffer, expected: Buffer | None, value: Buffer | None) -> bytes:
    """Returns the command that sets `key` to `value` if its value is `expected`.

    `expected=None`: if the key is not there. `value=None`: remove the key on a match.
    """
def noop() -> bytes:
    """Returns the command that changes nothing: a new leader's first entry."""
def config(data: Buffer) -> bytes:
    """Returns the command that records opaque cluster membership; see `FastStateMachine.membership`."""
def batch(commands: Iterable[Buffer]) -> bytes:
    """Returns the command that does several others in order, each seeing those before it, all or none.

    When a compare-and-swap in it does not match, or an add in it cannot be done, nothing of it happens. It takes put,
    delete, compare_and_swap, noop, add, delete_range and delete_prefix; anything else in it is a `CommandError`, as is
    a member that is malformed itself. With an add or a range in it, it answers `Answer(True, [one value for each])`,
    or `Answer(False, None, reason)`.
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

class Column:
    @property
    def count(self) -> int: ...
    def __new__(cls, source: _Column, name: str) -> Self: ...
