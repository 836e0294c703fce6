"""Random commands of every kind, procedures included, and a comparison of two machines that applied them."""

from __future__ import annotations

import random
from typing import Any

import fastsm
from fastsm import Abort, Entry, FastStateMachine, MemoryStateMachine

KEYS = [b"", b"\x00", b"a", b"a/1", b"a/2", b"b", b"b\xff", b"\xff", b"\xff\xff", b"long" * 50]
VALUES = [b"", b"0", b"-0", b"7", b"-41", b"01", b"9223372036854775807", b"9223372036854775808", b"text", b"x" * 400]
NUMBERS = [0, 1, -1, 5, 2**63 - 1, -(2**63)]


@fastsm.procedure
def move(tx: Any, payload: bytes) -> list[Any]:
    """Move a value from one key to another, and return what it read; abort if there is no value."""
    source, target = payload.split(b"|")
    value = tx.get(source)
    tx.delete(source)
    if value is None:
        raise Abort([source, tx.count()])
    tx.put(target, value)
    return [value, tx.count(b"a", b"b"), *[key for key, _ in tx.scan(prefix=b"a", reverse=True, limit=3)]]


@fastsm.procedure(version=2)
def count_up(tx: Any, payload: bytes) -> Any:
    """Add to a key whose value may not be a number."""
    total = tx.add(payload, 3, initial=-1)
    tx.put(b"last", str(tx.modified(payload)).encode())
    return total


@fastsm.procedure
def sweep(tx: Any, payload: bytes) -> int:
    """Remove ranges after writing to them."""
    tx.put(payload + b"!", b"")
    removed = tx.delete_prefix(payload) + tx.delete_range(b"b", None)
    tx.put(payload, b"%d" % removed)
    return removed


@fastsm.procedure
def fail(tx: Any, payload: bytes) -> None:
    """Write, then raise."""
    tx.put(payload, b"never")
    tx.delete_range(None, None)
    raise KeyError(payload)


@fastsm.procedure
def renew(tx: Any, payload: bytes) -> list[Any]:
    """Read the log's clock, and change deadlines: of the key in the payload, and of keys that it writes."""
    before = [tx.clock, tx.deadline(payload), tx.touch(payload, tx.clock + 5), tx.touch(b"none", 1)]
    if tx.deadline(payload) is not None:
        tx.put(payload + b"!", b"1", expires=tx.clock + tx.count())
        tx.add(payload + b"!", 1)
    tx.put(b"a", b"0" if tx.touch(b"a", None) else b"")
    return [*before, tx.deadline(payload), tx.deadline(payload + b"!"), tx.deadline(b"a")]


PROCEDURES = [move, count_up, sweep, fail, renew]


class Commands:
    """Commands drawn by a seed, on few keys, so that many commands have the same key."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.opened: list[int] = []
        self.sequence = 1
        self.now = 0

    def key(self) -> bytes:
        return self.random.choice(KEYS)

    def value(self) -> bytes:
        return self.random.choice(VALUES)

    def bound(self) -> bytes | None:
        return self.random.choice((None, self.key(), self.key()))

    def expires(self) -> int | None:
        """Return no deadline, or one that is soon or already over by the clock, or rarely the greatest one."""
        way = self.random.random()
        return None if way < 0.4 else 2**63 - 1 if way < 0.45 else max(0, self.now + self.random.randrange(-3, 60))

    def tick(self) -> bytes:
        self.now += self.random.choice((0, 1, 5, 30))
        late, limit = self.random.choice((0, 0, 0, 9)), self.random.choice((None, None, 0, 1, 3))
        return fastsm.tick(max(0, self.now - late), limit=limit)

    def write(self) -> bytes:
        way = self.random.randrange(12)
        if way < 4:
            return fastsm.put(self.key(), self.value(), expires=self.expires())
        if way >= 10:
            return fastsm.touch(self.key(), self.expires())
        if way < 6:
            return fastsm.delete(self.key())
        if way < 9:
            return fastsm.add(self.key(), self.random.choice(NUMBERS), initial=self.random.choice(NUMBERS))
        if self.random.random() < 0.5:
            return fastsm.delete_prefix(self.key())
        return fastsm.delete_range(self.bound(), self.bound())

    def swap(self) -> bytes:
        expected = self.random.choice((None, self.value()))
        return fastsm.compare_and_swap(self.key(), expected, self.value(), expires=self.expires())

    def branch(self) -> list[bytes]:
        return [self.write() if self.random.random() < 0.7 else fastsm.read(self.key())
                for _ in range(self.random.randrange(4))]

    def condition(self, index: int) -> bytes:
        way = self.random.randrange(4)
        if way == 0:
            return fastsm.value_is(self.key(), self.value())
        if way == 1:
            return fastsm.modified_at(self.key(), self.random.choice((0, index - 1, max(0, index - 2))))
        return fastsm.exists(self.key()) if way == 2 else fastsm.absent(self.key())

    def call(self) -> bytes:
        name = self.random.choice(("move", "count_up", "sweep", "fail", "renew"))
        payload = b"|".join((self.key(), self.key())) if name == "move" else self.key()
        return fastsm.call(name, payload, version=2 if name == "count_up" else 1)

    def anything(self, index: int) -> bytes:
        """Return a command that a client with or without a session might propose."""
        way = self.random.random()
        session = self.random.choice(self.opened) if self.opened and way > 0.03 else index - 1
        if way < 0.1:
            return self.tick()
        if way < 0.6:
            return self.command(index)
        if way < 0.66:
            self.opened = [*self.opened[-3:], index]
            return fastsm.open_session(expires=self.expires())
        if way < 0.69:
            return fastsm.forget(session)
        inner = self.command(index)
        while fastsm.decode(inner).__class__.__name__ == "Config":
            inner = self.command(index)
        self.sequence += self.random.choice((0, 0, 1, 1, 5, -1))
        return fastsm.once(session, max(1, self.sequence), inner, expires=self.expires())

    def command(self, index: int) -> bytes:  # noqa: PLR0911  # one for each kind
        """Return a command that is valid without a session."""
        way = self.random.random()
        if way < 0.3:
            return self.write()
        if way < 0.45:
            return self.swap()
        if way < 0.55:
            return fastsm.read(self.key())
        if way < 0.7:
            members = [self.random.choice((self.write, self.swap, fastsm.noop))() for _ in range(3)]
            return fastsm.batch(members[: self.random.randrange(4)])
        if way < 0.85:
            conditions = [self.condition(index) for _ in range(self.random.randrange(3))]
            return fastsm.transaction(conditions, self.branch(), self.branch())
        if way < 0.95:
            return self.call()
        return self.random.choice((fastsm.noop(), fastsm.config(self.value())))

    def chunk(self, first: int, size: int) -> list[Entry]:
        return [Entry(first + i, 1 + (first + i) // 50, self.anything(first + i)) for i in range(size)]


def same(fast: FastStateMachine, model: MemoryStateMachine) -> None:
    """Assert that the two have the same state."""
    assert list(fast.items()) == model.items()
    assert [fast.modified(key) for key in KEYS] == [model.modified(key) for key in KEYS]
    assert fast.membership() == model.membership()
    assert (fast.clock(), fast.next_deadline()) == (model.clock(), model.next_deadline())
    assert [fast.deadline(key) for key in KEYS] == [model.deadline(key) for key in KEYS]
    assert fast.last_applied() == model.last_applied()
