"""A counter that many clients increment: each addition counts once, however often a client has to repeat it.

``propose`` puts a command into your Raft library's log and returns its result: with PySyncObj,
``node.submit(command, sync=True)``. Here a machine without a cluster takes its place:

>>> machine = fastsm.MemoryStateMachine()
>>> def propose(command):
...     return machine.apply([(machine.last_applied().index + 1, 1, command)])[0]
>>> visits = Counter(propose, b"visits")
>>> visits.add(1), visits.add(2)
(1, 3)
>>> visits.value(machine)
3

A client that does not know the outcome of its command repeats it with the same number:

>>> visits.add(5, number=3), visits.add(5, number=3)
(8, 8)

If the client leaves the numbers to the counter, ``number`` is that of the last addition:

>>> visits.add(1), visits.number
(9, 4)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastsm

Propose = Callable[[bytes], Any]


class Counter:
    """A number in the state, changed through a session of its own, one addition at a time.

    ``number`` is the number of the last addition. Numbers must rise: an earlier one raises ``ValueError``, "stale".
    """

    def __init__(self, propose: Propose, key: bytes) -> None:
        self._propose = propose
        self._key = key
        self._session = propose(fastsm.open_session()).value
        self.number = 0

    def add(self, delta: int, *, number: int | None = None) -> int:
        """Add to the number and return the new value. ``number`` identifies the addition; by default the next one."""
        number = self.number + 1 if number is None else number
        self.number = max(self.number, number)
        answer = self._propose(fastsm.once(self._session, number, fastsm.add(self._key, delta)))
        if not answer:
            raise ValueError(f"not added: {answer.reason}")
        value: int = answer.value
        return value

    def value(self, machine: fastsm.StateMachine) -> int:
        """Return the value as this node has applied it."""
        return int(machine.get(self._key) or 0)
