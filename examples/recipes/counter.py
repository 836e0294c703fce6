"""A counter that many clients count up, each visit once, however often a client has to ask.

``propose`` is how a command gets into your Raft library's log, and its result back: ``node.submit(command, sync=True)``
with PySyncObj. Here a machine without a cluster plays it:

>>> machine = fastsm.MemoryStateMachine()
>>> def propose(command):
...     return machine.apply([(machine.last_applied().index + 1, 1, command)])[0]
>>> visits = Counter(propose, b"visits")
>>> visits.add(1), visits.add(2)
(1, 3)
>>> visits.value(machine)
3

A client that was not told what became of its command asks again, with the same number:

>>> visits.add(5, number=3), visits.add(5, number=3)
(8, 8)

``number`` has that of its last addition, for a client that left it to the counter:

>>> visits.add(1), visits.number
(9, 4)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastsm

Propose = Callable[[bytes], Any]


class Counter:
    """A number in the state, through a session of its own: one addition at a time.

    ``number``: which addition the last one was. Numbers rise: an earlier one raises ``ValueError``, "stale".
    """

    def __init__(self, propose: Propose, key: bytes) -> None:
        self._propose = propose
        self._key = key
        self._session = propose(fastsm.open_session()).value
        self.number = 0

    def add(self, delta: int, *, number: int | None = None) -> int:
        """Adds, and returns the new value. ``number`` says which addition it is; the next one by default."""
        number = self.number + 1 if number is None else number
        self.number = max(self.number, number)
        answer = self._propose(fastsm.once(self._session, number, fastsm.add(self._key, delta)))
        if not answer:
            raise ValueError(f"not added: {answer.reason}")
        value: int = answer.value
        return value

    def value(self, machine: fastsm.StateMachine) -> int:
        """Reads the value that is applied on this node."""
        return int(machine.get(self._key) or 0)
