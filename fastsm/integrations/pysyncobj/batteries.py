"""PySyncObj's batteries with their state in fastsm: the names and behaviour of ``pysyncobj.batteries``.

    node = ReplicatedStateMachine(own, partners, directory, consumers=[FastDict(), FastCounter()])

Their content is in the node's state machine, under keys that start with the battery's name and a zero byte: on disk
instead of in Python objects, and in snapshots without pickling. Reads show what this node has applied; changes go
through the log, and take ``callback=``, ``sync=`` and ``timeout=`` like :meth:`ReplicatedStateMachine.submit`.

If an operation is impossible (such as ``remove`` of an absent item), nothing changes, on any node: a caller with
``sync`` gets the exception, a callback receives ``FAIL_REASON.REQUEST_DENIED``. (In PySyncObj that ends the cluster.)

Give names (``name=``) if a node has two batteries of one kind. All nodes must have the same batteries, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fastsm.answering import absent, delete_prefix, exists, read, transaction
from fastsm.command import batch, delete, noop, put
from fastsm.integrations.pysyncobj import operations
from fastsm.integrations.pysyncobj.applying import Denied
from fastsm.integrations.pysyncobj.battery import Battery, same
from fastsm.integrations.pysyncobj.codecs import KEYS, VALUES, Codec, codec
from fastsm.integrations.pysyncobj.locks import FastLockManager
from fastsm.types import Answer

__all__ = ["FastCounter", "FastDict", "FastLockManager", "FastPriorityQueue", "FastQueue", "FastSet"]


class FastDict(Battery):
    """``pysyncobj.batteries.ReplDict``, in fastsm.

    ``keys`` and ``values``: ``str``, ``bytes``, or a codec (``encode`` and ``decode``). By default, keys may be
    ``str``, ``bytes``, ``int``, None and tuples of these, and values any object that can be pickled. Reads return new
    objects: changing one changes nothing here. Keys are ordered by their bytes.
    """

    def __init__(self, name: str | None = None, *, keys: Any = None, values: Any = None) -> None:
        super().__init__(name, "dict")
        self._keys, self._values = codec(keys, KEYS), codec(values, VALUES)

    def _key(self, key: Any) -> bytes:
        return self.prefix + self._keys.encode(key)

    def _put(self, key: Any, value: Any) -> bytes:
        return put(self._key(key), self._values.encode(value))

    # ---- changes ---------------------------------------------------------------------------------------

    def reset(self, newData: dict[Any, Any], **options: Any) -> None:
        """Replaces all items with those of a dict, in one step. O(items before and after)."""
        if not isinstance(newData, dict):
            raise TypeError(f"expected a dict, found {newData!r}")
        pairs = [part for key, value in newData.items() for part in (self._key(key), self._values.encode(value))]
        self._operate(operations.replace, self.prefix, *pairs, options=options)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.set(key, value)

    def set(self, key: Any, value: Any, **options: Any) -> None:
        """Sets the value of a key."""
        self._submit(self._put(key, value), options)

    def setdefault(self, key: Any, default: Any, **options: Any) -> Any:
        """Sets the value of a key if it is absent; the result is the key's value afterwards."""
        name, data = self._key(key), self._values.encode(default)

        def take(answer: Answer) -> Any:
            return self._values.decode(data if answer.ok else answer.value[0])

        return self._submit(transaction([absent(name)], [put(name, data)], [read(name)]), options, take)

    def update(self, other: Mapping[Any, Any] | Iterable[tuple[Any, Any]], **options: Any) -> None:
        """Sets all given items, in one entry."""
        pairs = other.items() if isinstance(other, Mapping) else other
        puts = [self._put(key, value) for key, value in pairs]
        self._submit(batch(puts) if puts else noop(), options)

    def pop(self, key: Any, default: Any = None, **options: Any) -> Any:
        """Removes a key; the result is its value, or ``default`` if it was absent."""

        def take(answer: Answer) -> Any:
            return self._values.decode(answer.value[0]) if answer.ok else default

        name = self._key(key)
        return self._submit(transaction([exists(name)], [read(name), delete(name)]), options, take)

    def clear(self, **options: Any) -> None:
        """Removes everything, in one step. O(items)."""
        self._submit(delete_prefix(self.prefix), options)

    # ---- reads -----------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Any:
        data = self._machine().get(self._key(key))
        if data is None:
            raise KeyError(key)
        return self._values.decode(data)

    def get(self, key: Any, default: Any = None) -> Any:
        """Returns the value of a key, or ``default``. O(1)."""
        data = self._machine().get(self._key(key))
        return default if data is None else self._values.decode(data)

    def __len__(self) -> int:
        """Returns the number of items. O(items), a few nanoseconds each, once the keys of the machine are in order."""
        return self._machine().count(prefix=self.prefix)

    def __contains__(self, key: Any) -> bool:
        return self._key(key) in self._machine()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rawData())

    def keys(self) -> Any:
        """Returns all keys, as of one applied state."""
        return self.rawData().keys()

    def values(self) -> Any:
        """Returns all values, as of one applied state."""
        return self.rawData().values()

    def items(self) -> Any:
        """Returns all items, as of one applied state."""
        return self.rawData().items()

    def rawData(self) -> dict[Any, Any]:
        """Returns everything as a dict, which is a copy."""
        return {self._keys.decode(key): self._values.decode(value) for key, value in self._pairs()}


class FastCounter(Battery):
    """``pysyncobj.batteries.ReplCounter``, in fastsm: an int of any size, or a float."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name, "counter")

    def set(self, newValue: float, **options: Any) -> Any:
        """Sets the value; the result is that value."""
        return self._submit(put(self.prefix, operations.number_as_bytes(newValue)), options, lambda _: newValue)

    def add(self, value: float, **options: Any) -> Any:
        """Adds to the value; the result is the new value."""
        amount = operations.number_as_bytes(value)
        return self._operate(operations.add, self.prefix, amount, options=options, take=operations.number_of)

    def sub(self, value: float, **options: Any) -> Any:
        """Subtracts from the value; the result is the new value."""
        return self.add(-value, **options)

    def inc(self, **options: Any) -> Any:
        """Adds one; the result is the new value."""
        return self.add(1, **options)

    def get(self) -> float:
        """Returns the value."""
        return operations.number_of(self._machine().get(self.prefix))


class FastSet(Battery):
    """``pysyncobj.batteries.ReplSet``, in fastsm. ``items``: as ``keys`` of a :class:`FastDict`."""

    ordered = True

    def __init__(self, name: str | None = None, *, items: Any = None) -> None:
        super().__init__(name, "set")
        self._items = codec(items, KEYS)

    def _key(self, item: Any) -> bytes:
        return self.prefix + self._items.encode(item)

    def reset(self, newData: set[Any], **options: Any) -> None:
        """Replaces all items with those of a set, in one step. O(items before and after)."""
        if not isinstance(newData, (set, frozenset)):
            raise TypeError(f"expected a set, found {newData!r}")
        pairs = [part for item in newData for part in (self._key(item), b"")]
        self._operate(operations.replace, self.prefix, *pairs, options=options)

    def add(self, item: Any, **options: Any) -> None:
        """Adds an item."""
        self._submit(put(self._key(item), b""), options)

    def remove(self, item: Any, **options: Any) -> None:
        """Removes an item; ``KeyError`` if it is absent."""
        def take(answer: Answer) -> None:
            if not answer.ok:
                raise Denied(KeyError(item))

        name = self._key(item)
        self._submit(transaction([exists(name)], [delete(name)]), options, take)

    def discard(self, item: Any, **options: Any) -> None:
        """Removes an item if it is present."""
        self._submit(delete(self._key(item)), options)

    def pop(self, **options: Any) -> Any:
        """Removes the first item in byte order, which is the result; ``KeyError`` if the set is empty."""
        return self._operate(operations.take_first, self.prefix, options=options, take=self._items.decode)

    def clear(self, **options: Any) -> None:
        """Removes everything, in one step. O(items)."""
        self._submit(delete_prefix(self.prefix), options)

    def update(self, other: Iterable[Any], **options: Any) -> None:
        """Adds all given items, in one entry."""
        puts = [put(self._key(item), b"") for item in other]
        self._submit(batch(puts) if puts else noop(), options)

    def rawData(self) -> set[Any]:
        """Returns everything as a set, which is a copy."""
        return {self._items.decode(key) for key, _ in self._pairs()}

    def __len__(self) -> int:
        """Returns the number of items. O(items), a few nanoseconds each, once the keys of the machine are in order."""
        return self._machine().count(prefix=self.prefix)

    def __contains__(self, item: Any) -> bool:
        return self._key(item) in self._machine()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rawData())


class _AnyQueue(Battery):
    _put: Callable[..., Any]
    _get: Callable[..., Any]

    def __init__(self, kind: str, maxsize: int, name: str | None, items: Any) -> None:
        super().__init__(name, kind)
        self._maxsize, self._items = maxsize, codec(items, VALUES)

    def qsize(self) -> int:
        """Returns the number of items. O(1)."""
        first, end = operations.ends_of(self._machine().get(self.prefix))
        return end - first

    def __len__(self) -> int:
        return self.qsize()

    def empty(self) -> bool:
        """Returns whether there are no items."""
        return self.qsize() == 0

    def full(self) -> bool:
        """Returns whether the queue has ``maxsize`` items."""
        return 0 < self._maxsize <= self.qsize()

    def _put_by(self, operation: Callable[..., Any], item: Any, options: dict[str, Any]) -> Any:
        data, most = self._items.encode(item), b"%d" % max(self._maxsize, 0)
        put(self.prefix, data)  # raises for an item that is too large, before it is in the log
        return self._operate(operation, self.prefix, most, data, options=options, take=same)

    def _get_by(self, operation: Callable[..., Any], default: Any, options: dict[str, Any]) -> Any:
        def take(data: bytes | None) -> Any:
            return default if data is None else self._items.decode(data)

        return self._operate(operation, self.prefix, options=options, take=take)


class FastQueue(_AnyQueue):
    """``pysyncobj.batteries.ReplQueue``, in fastsm: first in, first out. ``items``: ``str``, ``bytes`` or a codec.

    ``maxsize`` is sent with each ``put``: every node uses the one of the node that puts.
    """

    def __init__(self, maxsize: int = 0, name: str | None = None, *, items: Any = None) -> None:
        super().__init__("queue", maxsize, name, items)

    def put(self, item: Any, **options: Any) -> Any:
        """Appends an item; the result is True, or False if the queue is full. O(1)."""
        return self._put_by(operations.queue_put, item, options)

    def get(self, default: Any = None, **options: Any) -> Any:
        """Removes the oldest item, which is the result; ``default`` if the queue is empty. O(1)."""
        return self._get_by(operations.queue_get, default, options)


class FastPriorityQueue(_AnyQueue):
    """``pysyncobj.batteries.ReplPriorityQueue``, in fastsm: the smallest first.

    ``items``: ``str``, ``bytes`` or a codec. Items are compared on every node while entries are applied: their order
    must be the same everywhere, and all nodes must have the same codec. Comparing incomparable items is a
    ``TypeError``, and changes nothing.
    """

    codec: Codec

    def __init__(self, maxsize: int = 0, name: str | None = None, *, items: Any = None) -> None:
        super().__init__("priority queue", maxsize, name, items)
        self.codec = self._items

    def put(self, item: Any, **options: Any) -> Any:
        """Adds an item; the result is True, or False if the queue is full. O(log n)."""
        # Raises for an item that no node could read, before it is in the log
        self._items.decode(self._items.encode(item))
        return self._put_by(operations.heap_put, item, options)

    def get(self, default: Any = None, **options: Any) -> Any:
        """Removes the smallest item, which is the result; ``default`` if the queue is empty. O(log n)."""
        return self._get_by(operations.heap_get, default, options)


