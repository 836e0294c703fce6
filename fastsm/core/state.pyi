from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from fastsm.core.status import Status
from fastsm.generation.log import Log
from fastsm.lookup.index import Index
from fastsm.lookup.table import Table
from fastsm.lookup.terms import Terms
from fastsm.snapshot.capture import Capture
from fastsm.types import LogId, SnapshotMetadata

OPERATIONS: dict[int, str]

class State(Status):
    @property
    def _log(self) -> Log: ...
    @property
    def _index(self) -> Index: ...
    @property
    def _table(self) -> Table: ...
    @property
    def _terms(self) -> Terms: ...
    def _syncs_on_apply(self) -> bool: ...
    def _let_go(self) -> None: ...
    def _bytes(self) -> tuple[int, int, int, int]: ...
    def _figures(
        self,
    ) -> tuple[Log, int, float, int, int, int, int, int, int, int, int, int, bool, int, float]: ...
    def _standing(self) -> tuple[int, Log, int, int]: ...
    def _capture(self, last_included: LogId | tuple[int, int] | None) -> Capture: ...
    def _check(self) -> None: ...
    def _live_records(
        self, last_included: LogId | tuple[int, int] | None
    ) -> Iterator[tuple[str, LogId, bytes, bytes, int | None]]: ...
    def _clock_at(self, last_included: LogId | tuple[int, int] | None) -> int: ...
    def live_records(
        self, last_included: LogId | tuple[int, int] | None = None
    ) -> Iterator[tuple[LogId, bytes, bytes]]:
        """Returns an iterator over the state as of an entry, as tuples: the entry that wrote a key, the key, its value.

        The tuples are in the order in which the keys were last written, as in snapshots. `last_included` is the same as
        for `write_snapshot`. O(bytes of base and log), with one bit of memory per 16 of them; entries can be applied
        meanwhile.
        """
    def get(self, key: Buffer, /) -> bytes | None:
        """Returns the value of a key (any bytes-like object), or None. O(1), no lock, no system call."""
    def get_view(self, key: Buffer, /) -> memoryview | None:
        """Returns the value of a key as a read-only memoryview of the log's pages, or None. O(1), without a copy.

        The view does not change while it is held, even if the state is changed, reset or closed. The pages are freed
        when the last view of them is freed.
        """
    def __contains__(self, key: Buffer, /) -> bool: ...
    def modified(self, key: Buffer, /) -> LogId | None:
        """Returns the entry that last wrote a key, as a `LogId`, or None if the key is absent. O(1)."""
    def get_many(self, keys: Iterable[Buffer]) -> list[bytes | None]:
        """Returns the values of a sequence of keys, in their order, None where absent; all from one state.

        O(keys). Each key takes a fraction of the time of a `get`, since the cache misses of several keys overlap.
        """
    def get_columns(
        self, keys: Iterable[Buffer]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Returns the values of a sequence of keys as NumPy arrays, without an object for each; all from one state.

        The result is `(data, offsets, found)`. `data`: uint8, all values one after the other. `offsets`: int64, one
        longer than `keys`; value i is `data[offsets[i]:offsets[i + 1]]`. `found`: bool, False where a key is absent.
        O(keys).
        """
    def keys(self) -> Iterator[bytes]:
        """Iterates over the keys of the state as of the call, in the order of the entries that last wrote them."""
    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Iterates over the pairs of the state as of the call, in the order of the entries that last wrote them."""
    def columns(
        self,
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Returns the whole state as NumPy arrays, without an object for each pair; all from one state.

        The result is `(key_data, key_offsets, value_data, value_offsets)`, laid out as in `get_columns`, in the order
        of the entries that last wrote the keys, so it is equal on all replicas. O(bytes), without the GIL, except for a
        few nanoseconds per key at the start.
        """
    def len(self) -> int:
        """Returns the number of live keys. O(1)."""
    def entry_term(self, entry_id: int, /) -> int | None:
        """Returns the term of the entry at an index if it is known for certain, else None. O(log terms)."""
    def entry_terms(self, ids: npt.ArrayLike) -> npt.NDArray[np.uint64]:
        """Returns `entry_term` for a uint64 array of indexes, as an array of the same shape; 0: no certain term."""
    def last_applied(self) -> LogId:
        """Returns the last applied entry, as a `LogId`; `LogId(0, 0)` when there is none."""
    def durable(self) -> LogId:
        """Returns the last applied entry that would survive a power loss now.

        It falls only with a reset, or with the installation of an older snapshot.
        """
    def membership(self) -> tuple[LogId, bytes] | None:
        """Returns the newest `config` as `(LogId, bytes)`, or None."""
    def snapshot_metadata(self) -> SnapshotMetadata | None:
        """Returns the metadata of the latest snapshot, or None."""
