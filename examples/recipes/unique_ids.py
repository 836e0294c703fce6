"""Numbers that no two clients get, a block at a time: one entry in the log for each thousand of them.

>>> machine = fastsm.MemoryStateMachine()
>>> def propose(command):
...     return machine.apply([(machine.last_applied().index + 1, 1, command)])[0]
>>> one, other = UniqueIds(propose, b"ids", block=3), UniqueIds(propose, b"ids", block=3)
>>> [next(one) for _ in range(4)], next(other), next(one)
([1, 2, 3, 4], 7, 5)

A client that is killed takes the rest of its block with it: ids rise for each client, and have gaps. A command that is
applied twice, because its client asked again, is one gap more, and no more than that: no session is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fastsm

Propose = Callable[[bytes], Any]


class UniqueIds:
    """An iterator of ids, reserved ``block`` at a time. Thread safety: none; give each thread its own."""

    def __init__(self, propose: Propose, key: bytes, *, block: int = 1_000) -> None:
        self._propose = propose
        self._key = key
        if block < 1:
            raise ValueError(f"block {block}: expected 1 or more ids")
        self._block = block
        self._ids: Iterator[int] = iter(())

    def __iter__(self) -> UniqueIds:
        return self

    def __next__(self) -> int:
        for free in self._ids:
            return free
        answer = self._propose(fastsm.add(self._key, self._block))
        if not answer:
            raise ValueError(f"no ids: {answer.reason}")
        last = answer.value
        self._ids = iter(range(last - self._block + 1, last + 1))
        return next(self._ids)
