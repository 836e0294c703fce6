"""Operations that read before they write, and answer: what the batteries do beyond commands of the state machine's.

Each is a procedure of the state machine (:func:`fastsm.procedure`): a function of ``tx`` and of arguments that are
bytes, which every node runs at its place in the log. Its outcome is in the state machine's log and in snapshots, so it
never runs twice. It sees ``tx`` and its arguments, and nothing else: no clock, no chance, no object of the node but the
codec of a priority queue.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

from fastsm.answering import call
from fastsm.errors import FastsmError
from fastsm.integrations.pysyncobj.codecs import Codec
from fastsm.integrations.pysyncobj.errors import UnreadableItemError
from fastsm.procedures import Abort, procedure
from fastsm.types import Answer

_LENGTH = struct.Struct("<I")
_ENDS = struct.Struct(">QQ")
_PLACE = struct.Struct(">Q")
_TIME = struct.Struct("<d")
MOST_DIGITS = 4000  # of a counter; some Pythons refuse to convert numbers of more than 4300, others do not
_TOO_LARGE = 10**MOST_DIGITS


class Tx(Protocol):
    """What an operation uses of a procedure's ``tx``."""

    def get(self, key: bytes) -> bytes | None: ...
    def put(self, key: bytes, value: bytes) -> None: ...
    def delete(self, key: bytes) -> None: ...
    def delete_prefix(self, prefix: bytes) -> int: ...
    def scan(self, *, prefix: bytes, limit: int | None = None) -> list[tuple[bytes, bytes]]: ...


# ---- dict and set ------------------------------------------------------------------------------------------


def take_first(tx: Tx, prefix: bytes) -> bytes:
    """The key after the prefix."""
    for key, _ in tx.scan(prefix=prefix, limit=1):
        tx.delete(key)
        return key[len(prefix) :]
    raise Abort(b"pop from an empty set")


def replace(tx: Tx, prefix: bytes, *pairs: bytes) -> None:
    """All keys with the prefix, by other pairs."""
    tx.delete_prefix(prefix)
    for place in range(0, len(pairs), 2):
        tx.put(pairs[place], pairs[place + 1])


# ---- counter -----------------------------------------------------------------------------------------------


def number_of(data: bytes | None) -> int | float:
    """A counter's value: an integer as decimal text, or what ``repr`` makes of a float."""
    if data is None:
        return 0
    try:
        return int(data)
    except ValueError:
        return float(data)


def number_as_bytes(number: float) -> bytes:
    if isinstance(number, int):
        if abs(number) >= _TOO_LARGE:
            raise OverflowError(f"a counter has at most {MOST_DIGITS} digits")
        return b"%d" % number
    if isinstance(number, float):
        return repr(number).encode()
    raise TypeError(f"expected an int or a float, found {type(number).__name__}: {number!r}")


def add(tx: Tx, key: bytes, amount: bytes) -> bytes:
    data = number_as_bytes(number_of(tx.get(key)) + number_of(amount))
    tx.put(key, data)
    return data


# ---- queues ------------------------------------------------------------------------------------------------
# The prefix itself is the key of the ends: the place of the first item, and the place after the last one. (A heap's
# first place is 0.) The prefix and a place are an item's key.


def ends_of(data: bytes | None) -> tuple[int, int]:
    """Of a queue, from the value of its prefix."""
    first, end = _ENDS.unpack(data) if data else (0, 0)
    return first, end


def queue_put(tx: Tx, prefix: bytes, most: bytes, item: bytes) -> bool:
    first, end = ends_of(tx.get(prefix))
    if int(most) and end - first >= int(most):
        return False
    tx.put(prefix + _PLACE.pack(end), item)
    tx.put(prefix, _ENDS.pack(first, end + 1))
    return True


def queue_get(tx: Tx, prefix: bytes) -> bytes | None:
    first, end = ends_of(tx.get(prefix))
    if first == end:
        return None
    key = prefix + _PLACE.pack(first)
    item = tx.get(key)
    tx.delete(key)
    tx.put(prefix, _ENDS.pack(first + 1, end))
    return item


class _Heap:
    """A binary heap whose items are read when they are looked at, written where they moved; in steps as ``heapq``'s."""

    def __init__(self, tx: Tx, prefix: bytes, codec: Codec) -> None:
        self._tx, self._prefix, self._codec = tx, prefix, codec
        self.size = ends_of(tx.get(prefix))[1]

    def at(self, place: int) -> tuple[Any, bytes]:
        data = self._tx.get(self._prefix + _PLACE.pack(place))
        assert data is not None
        return self.item(data)

    def item(self, data: bytes) -> tuple[Any, bytes]:
        try:
            return self._codec.decode(data), data
        except Exception as error:  # where it was put it could be read
            raise UnreadableItemError(
                f"an item of the priority queue {self._prefix[:-1].decode()!r} cannot be read on this node: {error!r}; "
                "all nodes have the same codec, and the classes of what is pickled") from error

    def put(self, place: int, data: bytes) -> None:
        self._tx.put(self._prefix + _PLACE.pack(place), data)

    def resize(self, size: int) -> None:
        if size < self.size:
            self._tx.delete(self._prefix + _PLACE.pack(size))
        self.size = size
        self._tx.put(self._prefix, _ENDS.pack(0, size))

    def rise(self, item: tuple[Any, bytes], place: int) -> None:
        """Puts an item at a place, or above it where it is smaller."""
        while place > 0:
            above = (place - 1) >> 1
            other = self.at(above)
            if not item[0] < other[0]:
                break
            self.put(place, other[1])
            place = above
        self.put(place, item[1])

    def sink(self, item: tuple[Any, bytes]) -> None:
        """Puts an item in the place of the smallest: a hole goes down to a leaf, and the item rises from there."""
        place = 0
        while (child := 2 * place + 1) < self.size:
            smaller = self.at(child)
            if child + 1 < self.size:
                right = self.at(child + 1)
                if not smaller[0] < right[0]:
                    child, smaller = child + 1, right
            self.put(place, smaller[1])
            place = child
        self.rise(item, place)


def heap_put(codec: Codec, tx: Tx, prefix: bytes, most: bytes, item: bytes) -> bool:
    heap = _Heap(tx, prefix, codec)
    if int(most) and heap.size >= int(most):
        return False
    heap.resize(heap.size + 1)
    heap.rise(heap.item(item), heap.size - 1)
    return True


def heap_get(codec: Codec, tx: Tx, prefix: bytes) -> bytes | None:
    heap = _Heap(tx, prefix, codec)
    if not heap.size:
        return None
    last, smallest = heap.at(heap.size - 1), heap.at(0)
    heap.resize(heap.size - 1)
    if heap.size:
        heap.sink(last)
    return smallest[1]


# ---- locks -------------------------------------------------------------------------------------------------
# The value of a lock's key: the time in its first eight bytes, then its holder.


def lock_of(data: bytes | None) -> tuple[float, bytes] | None:
    """Time and holder."""
    return None if data is None else (_TIME.unpack(data[: _TIME.size])[0], data[_TIME.size :])


def lock_acquire(tx: Tx, key: bytes, holder: bytes, now: bytes, most_age: bytes) -> bool:
    found = lock_of(tx.get(key))
    if found is not None and float(now) - found[0] <= float(most_age) and found[1] != holder:
        return False
    tx.put(key, _TIME.pack(float(now)) + holder)
    return True


def lock_prolongate(tx: Tx, prefix: bytes, holder: bytes, now: bytes, most_age: bytes) -> None:
    for key, data in tx.scan(prefix=prefix):
        found = lock_of(data)
        assert found is not None
        if float(now) - found[0] > float(most_age):
            tx.delete(key)
        elif found[1] == holder:
            tx.put(key, _TIME.pack(float(now)) + holder)


def lock_release(tx: Tx, key: bytes, holder: bytes) -> None:
    found = lock_of(tx.get(key))
    if found is not None and found[1] == holder:
        tx.delete(key)


# ---- procedures --------------------------------------------------------------------------------------------

OPERATIONS: tuple[Callable[..., Any], ...] = (
    take_first, replace, add, queue_put, queue_get, lock_acquire, lock_prolongate, lock_release)
WITH_CODEC: tuple[Callable[..., Any], ...] = (heap_put, heap_get)


def _name(function: Callable[..., Any]) -> str:
    """In journals and on the wire: never used for another one."""
    return f"fastsm.{function.__name__}"


def encode(function: Callable[..., Any], *arguments: bytes) -> bytes:
    """The command that runs an operation."""
    parts: list[bytes] = []
    for argument in arguments:
        parts += (_LENGTH.pack(len(argument)), argument)
    return call(_name(function), b"".join(parts))


def _arguments(payload: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(payload):
        start = place + _LENGTH.size
        place = start + _LENGTH.unpack(payload[place:start])[0]
        if place > len(payload):
            raise ValueError(f"an argument ends at byte {place} of {len(payload)}")
        yield payload[start:place]


def procedures_of(codecs: Mapping[bytes, Codec]) -> list[Callable[[Any, bytes], Any]]:
    """The operations as procedures of a node whose priority queues have these codecs, by prefix.

    Every node has all of them: what another node's battery does is applied here too.
    """

    def run(function: Callable[..., Any], tx: Tx, payload: bytes) -> Any:
        return function(tx, *_arguments(payload))

    def run_with_codec(function: Callable[..., Any], tx: Tx, payload: bytes) -> Any:
        prefix, *rest = _arguments(payload)
        if prefix not in codecs:
            raise UnreadableItemError(
                f"an entry is for the priority queue {prefix[:-1].decode(errors='replace')!r}, which this node does "
                "not have; all nodes have the same batteries")
        return function(codecs[prefix], tx, prefix, *rest)

    return [
        procedure(name=_name(function))(partial(runner, function))
        for runner, functions in ((run, OPERATIONS), (run_with_codec, WITH_CODEC)) for function in functions
    ]  # fmt: skip


def value_of(result: Any) -> Any:
    """What an operation's caller is given; raises why it could not be done, in which case nothing has changed."""
    if not isinstance(result, Answer) or result.ok:
        return result.value if isinstance(result, Answer) else result
    if result.reason == "abort":
        raise KeyError(result.value.decode())
    raise result.error or FastsmError(f"an operation of a battery could not be done: {result.reason}")
