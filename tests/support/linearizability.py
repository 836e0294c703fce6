"""A check whether the results that clients of one key saw are linearizable (Wing, Gong, JPDC 1993)."""

from __future__ import annotations

import math
from typing import NamedTuple

UNKNOWN = math.inf


class Operation(NamedTuple):
    """A client's operation on a register. ``returned`` is ``UNKNOWN`` if no answer came.

    ``kind`` and ``argument``: "get"; "put" and the value; "swap" and the pair of expected and new value.
    ``result``: for a get the value, for a swap whether it matched.
    """

    called: float
    returned: float
    kind: str
    argument: object = None
    result: object = None

    def after(self, value: object) -> tuple[bool, object]:
        """Return whether the operation may have found this value, and the value that it leaves."""
        if self.kind == "put":
            return True, self.argument
        if self.kind == "get":
            return value == self.result, value
        assert isinstance(self.argument, tuple)
        expected, new = self.argument
        matches = value == expected
        return self.returned == UNKNOWN or matches == self.result, new if matches else value


def is_linearizable(operations: list[Operation], value: object = None) -> bool:
    """Return whether some order respects real time and explains each result, from a register that holds ``value``.

    Operations without an answer took effect at any time after their call, or never. A get without an answer is ignored.
    """
    said = sorted((one for one in operations if one.returned != UNKNOWN), key=lambda one: one.called)
    maybe = [one for one in operations if one.returned == UNKNOWN and one.kind != "get"]
    # A step: how many of `said`, in the order of calls, took effect; which later ones did; which of `maybe` did.
    stack: list[tuple[int, frozenset[int], frozenset[int], object]] = [(0, frozenset(), frozenset(), value)]
    seen = set(stack)
    while stack:
        first, later, taken, value = stack.pop()
        if first == len(said):
            return True
        candidates, until, i = [], said[first].returned, first
        while i < len(said) and said[i].called <= until:
            if i not in later:
                candidates.append(i)
                until = min(until, said[i].returned)
            i += 1
        steps = []
        for number, one in enumerate(maybe):  # pushed first, so tried last: if nothing else explains the results
            possible, new = one.after(value)
            if number not in taken and one.called <= until and new != value and possible:
                steps.append((first, later, taken | {number}, new))
        for i in reversed(candidates):
            possible, new = said[i].after(value)
            if said[i].called <= until and possible:
                start, rest = first, later | {i}
                while start in rest:
                    rest -= {start}
                    start += 1
                steps.append((start, rest, taken, new))
        for step in steps:
            if step not in seen:
                seen.add(step)
                stack.append(step)
    return False
