"""A lock with an owner, a deadline and a fencing token. The order of the log guarantees one holder at a time.

>>> machine = fastsm.MemoryStateMachine(procedures=PROCEDURES)
>>> def propose(command):
...     return machine.apply([(machine.last_applied().index + 1, 1, command)])[0]
>>> ann = Lock(propose, "disk", "ann")
>>> bob = Lock(propose, "disk", "bob")
>>> ann.acquire(10_000, now=0), bob.acquire(10_000, now=0)
(True, False)
>>> ann.token
3

The holder extends its lease in time, and writes with its token: the write is a log entry with the condition that the
lock is still the one that was acquired. What the holder believes, or what its clock says, does not matter.

>>> ann.keep_alive(20_000, now=0), ann.write(fastsm.put(b"disk/file", b"ann's"))
(True, True)

If the holder is late, a tick (which the leader proposes: ``fastsm.Clock``) removes the lock, and another client gets
it:

>>> propose(fastsm.tick(20_000)).value
1
>>> bob.acquire(10_000, now=20_000)
True
>>> ann.write(fastsm.put(b"disk/file", b"ann's, late")), ann.keep_alive(10_000, now=20_000), ann.release()
(False, False, False)
>>> bob.token > ann.token
True

The token works outside of the state machine, too: a disk or a service remembers the highest token that it has seen,
and refuses lower ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import fastsm

Propose = Callable[[bytes], Any]


class Lock:
    """A client's side of a lock. ``token`` is that of the last lease: the index of the entry that granted it.

    Each acquisition is applied once, however often it is proposed (``fastsm.once``): a client that does not know the
    outcome calls ``acquire`` again, with ``again=True``. ``now`` is the client's time, in milliseconds since 1970.
    """

    def __init__(self, propose: Propose, name: str, owner: str) -> None:
        self.token = 0
        self._propose = propose
        self._key = lock_key(name)
        self._name = name
        self._owner = owner
        self._session = propose(fastsm.open_session()).value
        self._number = 0

    def acquire(self, lease_ms: int, *, now: int | None = None, again: bool = False) -> bool:
        """Take the lock for ``lease_ms``, if it is free; return whether it was."""
        self._number += not again
        command = call("lock.acquire", self._name, self._owner, lease_ms, now)
        answer = self._propose(fastsm.once(self._session, self._number, command))
        if answer:
            self.token = answer.value
        return bool(answer)

    def keep_alive(self, lease_ms: int, *, now: int | None = None) -> bool:
        """Extend the lease, if the lock is still this client's. A touch changes neither owner nor token."""
        return bool(self._propose(call("lock.keep_alive", self._name, self.token, lease_ms, now)))

    def write(self, *commands: bytes) -> bool:
        """Apply commands as the holder: all of them, or none if this client is no longer the holder."""
        # Before the first lease the token is 0, and `modified_at(key, 0)` is true of a lock that nobody holds.
        held = [fastsm.exists(self._key), fastsm.modified_at(self._key, self.token)]
        return bool(self._propose(fastsm.transaction(held, commands)))

    def release(self) -> bool:
        """Release the lock; return False if this client no longer held it."""
        return self.write(fastsm.delete(self._key))


def lock_key(name: str) -> bytes:
    return b"lock/" + name.encode()


def call(procedure: str, name: str, who: str | int, lease_ms: int, now: int | None) -> bytes:
    now = time.time_ns() // 1_000_000 if now is None else now
    return fastsm.call(procedure, json.dumps([name, who, lease_ms, now]).encode())


@fastsm.procedure(name="lock.acquire")
def acquire(tx: Any, payload: bytes) -> int:
    """Return the token; abort with the holder's name if there is a holder.

    A lease begins at the client's time, or at the log's time if the client's clock is late: otherwise the lease could
    be over before it begins.
    """
    name, owner, lease_ms, now = json.loads(payload)
    holder = tx.get(lock_key(name))
    if holder is not None:
        raise fastsm.Abort(holder)
    tx.put(lock_key(name), owner.encode(), expires=max(now, tx.clock) + lease_ms)
    token: int = tx.entry.index
    return token


@fastsm.procedure(name="lock.keep_alive")
def keep_alive(tx: Any, payload: bytes) -> int:
    """Return the new deadline, which is never earlier than the old one; abort if the lease of this token is over."""
    name, token, lease_ms, now = json.loads(payload)
    written = tx.modified(lock_key(name))
    if written is None or written.index != token:
        raise fastsm.Abort
    deadline: int = max(tx.deadline(lock_key(name)), max(now, tx.clock) + lease_ms)
    tx.touch(lock_key(name), deadline)
    return deadline


PROCEDURES = [acquire, keep_alive]
