from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer, Self

_Column: TypeAlias = (
    Sequence[Buffer] | npt.NDArray[np.bytes_] | npt.NDArray[np.uint8] | tuple[Buffer, npt.NDArray[Any]]
)
_Deadlines: TypeAlias = Sequence[SupportsIndex | None] | npt.NDArray[np.integer[Any]]

def put_many(keys: _Column, values: _Column, *, expires: _Deadlines | None = None) -> bytes:
    """Returns the batch that sets each key of one column to the value in the other one. O(bytes).

    If keys are equal, only the last pair becomes part of the batch.

    A column is a sequence of bytes-like objects, a NumPy `S` array (without the NULs at the end of each cell), a 2-D
    uint8 array (complete rows), or Arrow's `(data, offsets)`: a buffer, and an int32 or int64 array one longer than the
    column. `expires`: a column of deadlines as in `put`, either a sequence of ints and Nones or an integer array;
    without it no key has a deadline.

    Raises `CommandError` if a limit is exceeded or a deadline is out of range, `ValueError` if the columns differ in
    length.
    """

class Column:
    @property
    def count(self) -> int: ...
    def __new__(cls, source: _Column, name: str) -> Self: ...

class Deadlines:
    def __new__(cls, source: _Deadlines | None) -> Self: ...
