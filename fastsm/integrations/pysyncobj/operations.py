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
MOST_DIGITS = 4000  # of a counter; some Pythons refuse to convert numbers of more than 4300, others do not
_TOO_LARGE = 10**MOST_DIGITS


class Tx(Protocol):
    """What an operation uses of a procedure's ``tx``."""

    @property
    def entry(self) -> LogId: ...
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
# The prefix itself is the key of the locks' time, in milliseconds: what the nodes that led have counted, all together;
# then the term of the last count, and what its leader had counted in it. The value of a lock's key: the time after
# which it ends and the entry that took it, in eight bytes each, then its holder. A lock that has ended is not there.


def locks_time_of(data: bytes | None) -> tuple[int, int, int]:
    """The locks' time, the term in which it was counted last, and how much of it in that term."""
    now, term, counted = _LOCKS_TIME.unpack(data) if data else (0, 0, 0)
    return now, term, counted


class Lock(NamedTuple):
    """The time after which a lock ends, the entry that took it, and its holder."""

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
    """Lets time pass: the leader of a term has counted so many milliseconds in it. Removes the locks that end by that.

    Only one node leads in a term, and what arrives in a later one does not count. So the locks' time is never faster
    than the clock of a leader, however far their clocks are apart. What has passed since the last entry counts for
    ``most`` at most: all that a lock can lose which was taken in between.
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
    """The entry that took it: a token that no other acquisition has; 0 where another one holds it."""
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
    """What is said of an earlier acquisition, and comes late, gives no later one back. 0: of any."""
    found = tx.get(key)
    if found is not None and lock_of(found).holder == holder and int(token) in (0, lock_of(found).token):
        tx.delete(key)


# ---- procedures --------------------------------------------------------------------------------------------

OPERATIONS: tuple[Callable[..., Any], ...] = (
    take_first, replace, add, queue_put, queue_get, locks_pass, lock_take, locks_keep, lock_give_back)
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
