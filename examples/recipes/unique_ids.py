"""Numbers that are never given out twice, reserved in blocks: one log entry for each thousand of them.

>>> machine = fastsm.MemoryStateMachine()
>>> def propose(command):
...     return machine.apply([(machine.last_applied().index + 1, 1, command)])[0]
>>> one, other = UniqueIds(propose, b"ids", block=3), UniqueIds(propose, b"ids", block=3)
>>> [next(one) for _ in range(4)], next(other), next(one)
([1, 2, 3, 4], 7, 5)

If a client is killed, the rest of its block is lost: each client's ids rise, with gaps. If a command is applied twice,
because its client repeated it, that is only one more gap, so no session is needed.
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
