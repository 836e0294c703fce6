"""Operations that read before they write, and answer: what the batteries do beyond puts and deletes.

An operation is a function of a transaction and of arguments that are bytes. It runs on every replica at its place in
the log, with the state as all entries before it left it, and its writes are one command of the state machine, at its
entry. So its outcome is in snapshots and in the state's own log, and it never runs twice.

A function here sees ``get``, ``put``, ``delete`` and ``scan`` of its transaction, the arguments, and nothing else: no
clock, no chance, no object of the node but the codec of a priority queue.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fastsm.command import batch, delete, noop, put
from fastsm.errors import CommandError, FastsmError, UnknownCommandError
from fastsm.integrations.pysyncobj.codecs import Codec
from fastsm.machine import FastStateMachine

OPERATION = 0x47  # the first byte of an operation's entry
NOT_THE_ENTRYS = (OSError, MemoryError, RecursionError, ImportError, SystemError)  # but of this replica alone

_LENGTH = struct.Struct("<I")
_ENDS = struct.Struct(">QQ")
_PLACE = struct.Struct(">Q")
_TIME = struct.Struct("<d")


class Failed(NamedTuple):
    """The answer of an operation that changed nothing since it cannot be done; what its caller gets raised."""

    error: Exception


class Transaction:
    """The state as of the entry before, under the writes so far."""

    def __init__(self, machine: FastStateMachine) -> None:
        self._machine = machine
        self._written: dict[bytes, bytes | None] = {}

    def get(self, key: bytes) -> bytes | None:
        if key in self._written:
            return self._written[key]
        return self._machine.get(key)

    def put(self, key: bytes, value: bytes) -> None:
        self._written[key] = value

    def delete(self, key: bytes) -> None:
        self._written[key] = None

    def scan(self, *, prefix: bytes, limit: int | None = None) -> list[tuple[bytes, bytes]]:
        """Pairs sorted by key; for use before the first write."""
        assert not self._written
        return list(self._machine.scan(prefix=prefix, limit=limit).entries)

    def command(self) -> bytes:
        """All writes as one command."""
        commands = [delete(key) if value is None else put(key, value) for key, value in self._written.items()]
        return noop() if not commands else commands[0] if len(commands) == 1 else batch(commands)


# ---- dict and set ------------------------------------------------------------------------------------------


def set_default(transaction: Transaction, key: bytes, value: bytes) -> bytes:
    found = transaction.get(key)
    if found is not None:
        return found
    transaction.put(key, value)
    return value


def take(transaction: Transaction, key: bytes) -> bytes | None:
    found = transaction.get(key)
    if found is not None:
        transaction.delete(key)
    return found


def remove(transaction: Transaction, key: bytes) -> Failed | None:
    return Failed(KeyError()) if take(transaction, key) is None else None


def take_first(transaction: Transaction, prefix: bytes) -> bytes | Failed:
    """The key after the prefix."""
    for key, _ in transaction.scan(prefix=prefix, limit=1):
        transaction.delete(key)
        return key[len(prefix) :]
    return Failed(KeyError("pop from an empty set"))


def replace(transaction: Transaction, prefix: bytes, *pairs: bytes) -> None:
    """All keys with the prefix, by other pairs."""
    for key, _ in transaction.scan(prefix=prefix):
        transaction.delete(key)
    for place in range(0, len(pairs), 2):
        transaction.put(pairs[place], pairs[place + 1])


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
        return b"%d" % number
    if isinstance(number, float):
        return repr(number).encode()
    raise TypeError(f"expected an int or a float, found {type(number).__name__}: {number!r}")


def add(transaction: Transaction, key: bytes, amount: bytes) -> bytes:
    data = number_as_bytes(number_of(transaction.get(key)) + number_of(amount))
    transaction.put(key, data)
    return data


# ---- queues ------------------------------------------------------------------------------------------------
# The prefix itself is the key of the ends: the place of the first item, and the place after the last one. (A heap's
# first place is 0.) The prefix and a place are an item's key.


def ends_of(data: bytes | None) -> tuple[int, int]:
    """Of a queue, from the value of its prefix."""
    first, end = _ENDS.unpack(data) if data else (0, 0)
    return first, end


def queue_put(transaction: Transaction, prefix: bytes, most: bytes, item: bytes) -> bool:
    first, end = ends_of(transaction.get(prefix))
    if int(most) and end - first >= int(most):
        return False
    transaction.put(prefix + _PLACE.pack(end), item)
    transaction.put(prefix, _ENDS.pack(first, end + 1))
    return True


def queue_get(transaction: Transaction, prefix: bytes) -> bytes | None:
    first, end = ends_of(transaction.get(prefix))
    if first == end:
        return None
    item = take(transaction, prefix + _PLACE.pack(first))
    transaction.put(prefix, _ENDS.pack(first + 1, end))
    return item


class _Heap:
    """A binary heap whose items are read when they are looked at, written where they moved; in steps as ``heapq``'s."""

    def __init__(self, transaction: Transaction, prefix: bytes, codec: Codec) -> None:
        self._transaction, self._prefix, self._codec = transaction, prefix, codec
        self.size = ends_of(transaction.get(prefix))[1]

    def at(self, place: int) -> tuple[Any, bytes]:
        data = self._transaction.get(self._prefix + _PLACE.pack(place))
        assert data is not None
        return self.item(data)

    def item(self, data: bytes) -> tuple[Any, bytes]:
        try:
            return self._codec.decode(data), data
        except Exception as error:  # where it was put it could be read
            raise UnknownCommandError(
                f"an item of the priority queue {self._prefix[:-1].decode()!r} cannot be read on this node: {error!r}; "
                "all nodes have the same codec, and the classes of what is pickled") from error

    def put(self, place: int, data: bytes) -> None:
        self._transaction.put(self._prefix + _PLACE.pack(place), data)

    def resize(self, size: int) -> None:
        if size < self.size:
            self._transaction.delete(self._prefix + _PLACE.pack(size))
        self.size = size
        self._transaction.put(self._prefix, _ENDS.pack(0, size))

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


def heap_put(transaction: Transaction, prefix: bytes, most: bytes, item: bytes, *, codec: Codec) -> bool:
    heap = _Heap(transaction, prefix, codec)
    if int(most) and heap.size >= int(most):
        return False
    heap.resize(heap.size + 1)
    heap.rise(heap.item(item), heap.size - 1)
    return True


def heap_get(transaction: Transaction, prefix: bytes, *, codec: Codec) -> bytes | None:
    heap = _Heap(transaction, prefix, codec)
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


def lock_acquire(transaction: Transaction, key: bytes, holder: bytes, now: bytes, most_age: bytes) -> bool:
    found = lock_of(transaction.get(key))
    if found is not None and float(now) - found[0] <= float(most_age) and found[1] != holder:
        return False
    transaction.put(key, _TIME.pack(float(now)) + holder)
    return True


def lock_prolongate(transaction: Transaction, prefix: bytes, holder: bytes, now: bytes, most_age: bytes) -> None:
    for key, data in transaction.scan(prefix=prefix):
        found = lock_of(data)
        assert found is not None
        if float(now) - found[0] > float(most_age):
            transaction.delete(key)
        elif found[1] == holder:
            transaction.put(key, _TIME.pack(float(now)) + holder)


def lock_release(transaction: Transaction, key: bytes, holder: bytes) -> None:
    found = lock_of(transaction.get(key))
    if found is not None and found[1] == holder:
        transaction.delete(key)


# ---- entries -----------------------------------------------------------------------------------------------

NUMBERS: dict[int, Callable[..., Any]] = {  # in journals, on the wire: never used for another one
    1: set_default, 2: take, 3: remove, 4: take_first, 5: replace, 6: add, 7: queue_put, 8: queue_get, 9: heap_put,
    10: heap_get, 11: lock_acquire, 12: lock_prolongate, 13: lock_release,
}  # fmt: skip
_NUMBER_OF = {function: number for number, function in NUMBERS.items()}
_WITH_CODEC = (heap_put, heap_get)


def encode(function: Callable[..., Any], *arguments: bytes) -> bytes:
    """An operation as the content of an entry."""
    parts = [bytes([_NUMBER_OF[function]])]
    for argument in arguments:
        parts += (_LENGTH.pack(len(argument)), argument)
    return b"".join(parts)


def _arguments(content: bytes) -> Iterator[bytes]:
    place = 1
    while place < len(content):
        start = place + _LENGTH.size
        place = start + _LENGTH.unpack(content[place:start])[0]
        yield content[start:place]


def run(content: bytes, machine: FastStateMachine, codecs: dict[bytes, Codec]) -> tuple[Any, bytes]:
    """Runs an operation on the state; returns its answer, and the command that makes its changes.

    Raises ``UnknownCommandError`` for one that this node does not have: the others do.
    """
    try:
        return _run(content, Transaction(machine), codecs)
    except CommandError as error:
        if isinstance(error, UnknownCommandError):
            raise
        return Failed(error), noop()
    except (*NOT_THE_ENTRYS, FastsmError):
        raise
    except Exception as error:
        return Failed(error), noop()  # two items that do not compare, a malformed entry: so it is on every replica


def _run(content: bytes, transaction: Transaction, codecs: dict[bytes, Codec]) -> tuple[Any, bytes]:
    function = NUMBERS.get(content[0])
    if function is None:
        raise UnknownCommandError(f"operation {content[0]} of the batteries is of a newer release")
    arguments = list(_arguments(content))
    options: dict[str, Any] = {}
    if function in _WITH_CODEC:
        if arguments[0] not in codecs:
            raise UnknownCommandError(
                f"an entry is for the priority queue {arguments[0][:-1].decode()!r}, which this node does not have; "
                "all nodes have the same batteries")
        options["codec"] = codecs[arguments[0]]
    answer = function(transaction, *arguments, **options)
    return answer, noop() if isinstance(answer, Failed) else transaction.command()
