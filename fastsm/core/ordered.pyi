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

        None is open. `prefix`: only keys that start with it. `limit`: at most so many. `reverse`: from the end. All are
        of one state; `revision` is the last applied index at which it held. O(log keys + results); the first call of
        all builds the order.
        """
    def scan_prefix(
        self, prefix: Buffer, *, limit: int | None = None, start_after: Buffer | None = None
    ) -> ScanResult:
        """Returns the pairs whose key starts with `prefix`, sorted by key, as `ScanResult(entries, revision)`.

        `limit`: at most so many. `start_after`: only keys after this one; the last key of a page gives the next
        page. `revision` is the last applied index at which the result held. O(log keys + results).
        """
    def count(
        self, start: Buffer | None = None, end: Buffer | None = None, *, prefix: Buffer | None = None
    ) -> int:
        """Returns the number of keys with `start <= key < end`, and with `prefix`; None is open. All are of one state.

        O(log keys + keys counted), some nanoseconds each, without an object for any; of all keys O(1).
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

        It shows the state at the call, however much is applied, and after a reset, an install or a close too. O(log
        keys) at the call. While it is open, each key that is overwritten or deleted costs about 16 bytes; it is open
        until it is used up or dropped.
        """
