"""Operations that read before they write, and answer: what the batteries do beyond the state machine's own commands.

Each is a procedure of the state machine (:func:`fastsm.procedure`): a function of ``tx`` and of arguments that are
bytes, which every node runs at its place in the log. Its outcome is in the state machine's log and in snapshots, so it
never runs twice. It uses ``tx`` and its arguments, and nothing else: no clock, no randomness, no object of the node
except the codec of a priority queue.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

from fastsm.answering import call
from fastsm.errors import FastsmError
from fastsm.integrations.pysyncobj.codecs import Codec
from fastsm.integrations.pysyncobj.errors import UnreadableItemError
from fastsm.procedures import Abort, procedure
from fastsm.types import Answer, LogId

_LENGTH = struct.Struct("<I")
_ENDS = struct.Struct(">QQ")
_PLACE = struct.Struct(">Q")
_LOCKS_TIME = struct.Struct(">QQQ")
_LOCK = struct.Struct(">QQ")
MOST_DIGITS = 4000  # of a counter; some Pythons refuse to convert numbers of more than 4300 digits
_TOO_LARGE = 10**MOST_DIGITS


class Tx(Protocol):
    """The methods of a procedure's ``tx`` that operations use."""

    @property
    def entry(self) -> LogId: ...
    def get(self, key: bytes) -> bytes | None: ...
    def put(self, key: bytes, value: bytes) -> None: ...
    def delete(self, key: bytes) -> None: ...
    def delete_prefix(self, prefix: bytes) -> int: ...
    def scan(self, *, prefix: bytes, limit: int | None = None) -> list[tuple[bytes, bytes]]: ...


# ---- dict and set ------------------------------------------------------------------------------------------


def take_first(tx: Tx, prefix: bytes) -> bytes:
    """Removes the first key with the prefix; returns that key without the prefix."""
    for key, _ in tx.scan(prefix=prefix, limit=1):
        tx.delete(key)
        return key[len(prefix) :]
    raise Abort(b"pop from an empty set")


def replace(tx: Tx, prefix: bytes, *pairs: bytes) -> None:
    """Replaces all pairs whose keys have the prefix with other pairs."""
    tx.delete_prefix(prefix)
    for place in range(0, len(pairs), 2):
        tx.put(pairs[place], pairs[place + 1])


# ---- counter -----------------------------------------------------------------------------------------------


def number_of(data: bytes | None) -> int | float:
    """Returns a counter's value: an integer stored as decimal text, or a float stored by ``repr``."""
    if data is None:
        return 0
    try:
        return int(data)
    except ValueError:
        return float(data)


def number_as_bytes(number: float) -> bytes:
    if isinstance(number, int):
        if abs(number) >= _TOO_LARGE:
            raise OverflowError(f"expected a counter of at most {MOST_DIGITS} digits, found a larger one")
        return b"%d" % number
    if isinstance(number, float):
        return repr(number).encode()
    raise TypeError(f"expected an int or a float, found {type(number).__name__}: {number!r}")


def add(tx: Tx, key: bytes, amount: bytes) -> bytes:
    data = number_as_bytes(number_of(tx.get(key)) + number_of(amount))
    tx.put(key, data)
    return data


# ---- queues ------------------------------------------------------------------------------------------------
# The prefix itself is the key of the queue's ends: the places of the first item, and after the last one. (In a heap,
# the first place is always 0.) The key of an item is the prefix followed by its place.


def ends_of(data: bytes | None) -> tuple[int, int]:
    """Returns the ends of a queue, given the value of its prefix."""
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
    """A binary heap that reads items only when it compares them, and writes those it moves; works like ``heapq``."""

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
        except Exception as error:  # it could be read where it was put
            raise UnreadableItemError(
                f"an item of the priority queue {self._prefix[:-1].decode()!r} cannot be read on this node: {error!r}; "
                "all nodes need the same codec, and the classes of pickled objects") from error

    def put(self, place: int, data: bytes) -> None:
        self._tx.put(self._prefix + _PLACE.pack(place), data)

    def resize(self, size: int) -> None:
        if size < self.size:
            self._tx.delete(self._prefix + _PLACE.pack(size))
        self.size = size
        self._tx.put(self._prefix, _ENDS.pack(0, size))

    def rise(self, item: tuple[Any, bytes], place: int) -> None:
        """Puts an item at a place, or further up if it is smaller."""
        while place > 0:
            above = (place - 1) >> 1
            other = self.at(above)
            if not item[0] < other[0]:
                break
            self.put(place, other[1])
            place = above
        self.put(place, item[1])

    def sink(self, item: tuple[Any, bytes]) -> None:
        """Replaces the smallest item: a hole moves down to a leaf, and the new item rises from there."""
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
# The prefix itself is the key of the locks' time. Its value: the milliseconds that all leaders have counted in total,
# then the term of the last count, and what its leader had counted in it. The value of a lock's key: the time at which
# it ends and the entry that took it, in eight bytes each, then its holder. A lock that has ended is removed.


def locks_time_of(data: bytes | None) -> tuple[int, int, int]:
    """Returns the locks' time, the term in which it was last counted, and how much was counted in that term."""
    now, term, counted = _LOCKS_TIME.unpack(data) if data else (0, 0, 0)
    return now, term, counted


class Lock(NamedTuple):
    """The time at which a lock ends, the entry that took it, and its holder."""

    end: int
    token: int
    holder: bytes


def lock_of(data: bytes) -> Lock:
    end, token = _LOCK.unpack_from(data)
    return Lock(end, token, data[_LOCK.size :])


def _lock_until(tx: Tx, prefix: bytes, lease: bytes, token: int, holder: bytes) -> bytes:
    return _LOCK.pack(locks_time_of(tx.get(prefix))[0] + int(lease), token) + holder


def _locks(tx: Tx, prefix: bytes) -> list[tuple[bytes, Lock]]:
    return [(key, lock_of(data)) for key, data in tx.scan(prefix=prefix) if key != prefix]


def locks_pass(tx: Tx, prefix: bytes, term: bytes, counted: bytes, most: bytes) -> None:
    """Advances the locks' time: the leader of ``term`` has counted ``counted`` ms in it. Removes locks that have ended.

    A term has only one leader, and counts that arrive in a later term are ignored. So the locks' time is never faster
    than a leader's clock, however far the leaders' clocks differ. The time since the last entry counts as at most
    ``most``, which is the most that a lock taken in between can lose.
    """
    now, counted_term, before = locks_time_of(tx.get(prefix))
    if tx.entry.term != int(term):
        return
    here = int(counted)
    if counted_term == int(term):
        now += min(max(here - before, 0), int(most))
        here = max(here, before)
    tx.put(prefix, _LOCKS_TIME.pack(now, int(term), here))
    for key, lock in _locks(tx, prefix):
        if lock.end < now:
            tx.delete(key)


def lock_take(tx: Tx, prefix: bytes, key: bytes, holder: bytes, lease: bytes) -> int:
    """Takes a lock; returns the index of this entry, which is a unique token; 0 if another holder has the lock."""
    found = tx.get(key)
    if found is not None and lock_of(found).holder != holder:
        return 0
    tx.put(key, _lock_until(tx, prefix, lease, tx.entry.index, holder))
    return tx.entry.index


def locks_keep(tx: Tx, prefix: bytes, holder: bytes, lease: bytes) -> None:
    for key, lock in _locks(tx, prefix):
        if lock.holder == holder:
            tx.put(key, _lock_until(tx, prefix, lease, lock.token, holder))


def lock_give_back(tx: Tx, key: bytes, holder: bytes, token: bytes) -> None:
    """Gives back a lock that the entry ``token`` took (0: any entry), not one that was taken again in the meantime."""
    found = tx.get(key)
    if found is not None and lock_of(found).holder == holder and int(token) in (0, lock_of(found).token):
        tx.delete(key)


# ---- procedures --------------------------------------------------------------------------------------------

OPERATIONS: tuple[Callable[..., Any], ...] = (
    take_first, replace, add, queue_put, queue_get, locks_pass, lock_take, locks_keep, lock_give_back)
WITH_CODEC: tuple[Callable[..., Any], ...] = (heap_put, heap_get)


def _name(function: Callable[..., Any]) -> str:
    """Returns the name used in journals and messages, which is never reused for another operation."""
    return f"fastsm.{function.__name__}"


def encode(function: Callable[..., Any], *arguments: bytes) -> bytes:
    """Returns the command that runs an operation."""
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
    """Returns the operations as procedures of a node whose priority queues have these codecs, by prefix.

    Every node has all of them, since it also applies the operations of other nodes' batteries.
    """

    def run(function: Callable[..., Any], tx: Tx, payload: bytes) -> Any:
        return function(tx, *_arguments(payload))

    def run_with_codec(function: Callable[..., Any], tx: Tx, payload: bytes) -> Any:
        prefix, *rest = _arguments(payload)
        if prefix not in codecs:
            raise UnreadableItemError(
                f"an entry is for the priority queue {prefix[:-1].decode(errors='replace')!r}, which this node does "
                "not have; all nodes need the same batteries")
        return function(codecs[prefix], tx, prefix, *rest)

    return [
        procedure(name=_name(function))(partial(runner, function))
        for runner, functions in ((run, OPERATIONS), (run_with_codec, WITH_CODEC)) for function in functions
    ]  # fmt: skip


def value_of(result: Any) -> Any:
    """Returns the value for an operation's caller; raises the reason if it was impossible and changed nothing."""
    if not isinstance(result, Answer) or result.ok:
        return result.value if isinstance(result, Answer) else result
    if result.reason == "abort":
        raise KeyError(result.value.decode())
    raise result.error or FastsmError(f"an operation of a battery could not be done: {result.reason}")
