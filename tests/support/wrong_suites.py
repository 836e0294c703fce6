"""The suites that pytest runs on state machines that are wrong, each in one way, and the rules that find it.

The state machines are in the files of this folder whose names begin with ``wrong_``, by what they are wrong about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastsm import MemoryStateMachine
from fastsm.snapshot.model import State
from fastsm.testing import StateMachineConformance
from fastsm.testing.answers import AnswerRules
from fastsm.testing.calls import CallRules
from fastsm.testing.deadlines import DeadlineRules
from fastsm.testing.watching import WatchRules

FAULTS: dict[str, set[str]] = {}  # the name of a wrong class, and tests that must fail
Wrong = type[MemoryStateMachine]
BEYOND_THE_TRAIT = (AnswerRules, CallRules, DeadlineRules, WatchRules)


def collect(*, beyond_the_trait: bool) -> tuple[Callable[..., Callable[[Wrong], Wrong]], Callable[[], dict[str, type]]]:
    """A decorator that notes wrong machines, and a function that gives the suites on those of this file.

    They are of the rules of the trait, or of those of answers, procedures, time and watches: all together take long.
    """
    noted: list[Wrong] = []

    def found_by(*tests: str) -> Callable[[Wrong], Wrong]:
        def note(wrong: Wrong) -> Wrong:
            FAULTS[wrong.__name__] = {f"test_{test}" for test in tests}
            noted.append(wrong)
            return wrong

        return note

    return found_by, lambda: {f"Test{wrong.__name__}": suite_on(wrong, beyond_the_trait) for wrong in noted}


class StoringStateMachine(MemoryStateMachine):
    """The model with something like a disk, which outlives it. This one is right."""

    def __init__(self, **options: Any) -> None:
        self._disk: dict[str, Any] = {}
        super().__init__(**options)

    def flush(self) -> None:
        super().flush()
        self._disk.update(self._stored())

    def _stored(self) -> dict[str, Any]:
        stored = {name: getattr(self, name).copy() for name in ("_state", "_outcomes", "_base")}
        return {**stored, "_metadata": self._metadata}

    def clear(self) -> None:
        super().clear()
        self.flush()

    def reopen(self) -> StoringStateMachine:
        again = type(self)()
        again._disk = self._disk
        for name, value in self._disk.items():
            setattr(again, name, value.copy() if isinstance(value, (State, list)) else value)
        return again


def suite_on(wrong: Wrong, beyond_the_trait: bool) -> type:
    """The suite, or that part of it, as a class that pytest collects."""

    class Suite(StateMachineConformance):
        @pytest.fixture
        def state_machine(self) -> MemoryStateMachine:
            return wrong()

        @pytest.fixture
        def with_procedures(self) -> Any:
            return lambda procedures: wrong(procedures=procedures)

    def reopen(self: object) -> Callable[[StoringStateMachine], StoringStateMachine]:
        return lambda machine: machine.reopen()

    for name in dir(StateMachineConformance):
        if name.startswith("test_") and beyond_the_trait != any(hasattr(rules, name) for rules in BEYOND_THE_TRAIT):
            setattr(Suite, name, None)
    if issubclass(wrong, StoringStateMachine):
        Suite.reopen = pytest.fixture(reopen)  # type: ignore[method-assign]
    Suite.__name__ = Suite.__qualname__ = f"Test{wrong.__name__}"
    return Suite
