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

def put(key: Buffer, value: Buffer) -> bytes: ...
def put_many(keys: _Column, values: _Column) -> bytes: ...
def delete(key: Buffer) -> bytes: ...
def compare_and_swap(key: Buffer, expected: Buffer | None, value: Buffer | None) -> bytes: ...
def noop() -> bytes: ...
def config(data: Buffer) -> bytes: ...
def batch(commands: Iterable[Buffer]) -> bytes: ...
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
): ...
def check(command: Buffer) -> None: ...

class Field:
    def __new__(cls, source: Buffer, name: str, limit: int) -> Self: ...

class Column:
    @property
    def count(self) -> int: ...
    def __new__(cls, source: _Column, name: str) -> Self: ...
    def take_array(self, source: npt.NDArray[Any], name: str) -> None: ...
    def take_offsets(self, data: Buffer, offsets: npt.NDArray[Any], name: str) -> None: ...
