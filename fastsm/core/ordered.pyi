from collections.abc import Callable, Iterator

from typing_extensions import Buffer, Self

from fastsm.core.state import State
from fastsm.disk.mapping import Mapping
from fastsm.lookup.index import Index
from fastsm.lookup.order import Order
from fastsm.types import ScanResult

class OrderedPairs(Iterator[tuple[bytes, bytes]]):
    def __new__(cls) -> Self: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> tuple[bytes, bytes]: ...
    def __length_hint__(self) -> int: ...
    @property
    def revision(self) -> int: ...

class Ordered(State):
    def _ask_for_order(self) -> None: ...
    def _order_next(self, index: Index, mapping: Mapping, tick: Callable[[], object] | None = None) -> None: ...
    def _keep_order(self) -> None: ...
    def _keys_of_range(self, start: bytes | None, end: bytes | None) -> list[bytes]: ...
    def _order(self) -> Order | None: ...
    def scan(
        self,
        start: Buffer | None = None,
        end: Buffer | None = None,
        *,
        prefix: Buffer | None = None,
        limit: int | None = None,
        reverse: bool = False,
    ) -> ScanResult:
        """Returns the pairs with `start <= key < end`, in the order of their keys, as `ScanResult(entries, revision)`.

        None means unbounded. `prefix`: only keys that start with it. `limit`: the maximum number of pairs. `reverse`:
        from the end. All pairs are from one state; `revision` is the last applied index of that state. O(log keys +
        results); the first call builds the order of the keys.
        """
    def scan_prefix(
        self, prefix: Buffer, *, limit: int | None = None, start_after: Buffer | None = None
    ) -> ScanResult:
        """Returns the pairs whose key starts with `prefix`, sorted by key, as `ScanResult(entries, revision)`.

        `limit`: the maximum number of pairs. `start_after`: only keys after this one; pass the last key of a page to
        get the next page. `revision` is the last applied index of the state that was read. O(log keys + results).
        """
    def count(
        self, start: Buffer | None = None, end: Buffer | None = None, *, prefix: Buffer | None = None
    ) -> int:
        """Returns the number of keys with `start <= key < end` and with `prefix`, all from one state; None: unbounded.

        O(log keys + keys counted), a few nanoseconds per key, without making objects; O(1) for all keys.
        """
    def ordered(
        self,
        start: Buffer | None = None,
        end: Buffer | None = None,
        *,
        prefix: Buffer | None = None,
        reverse: bool = False,
    ) -> OrderedPairs:
        """Returns an iterator of the pairs with `start <= key < end`, and with `prefix`, in the order of their keys.

        The iterator shows the state as of the call, also after later entries, a reset, an install or a close. O(log
        keys) at the call. While the iterator is open (until it is exhausted or dropped), each key that is overwritten
        or deleted costs about 16 bytes.
        """
