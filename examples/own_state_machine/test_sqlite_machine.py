"""The whole test file that a state machine of your own needs. Run: ``pytest examples/own_state_machine``"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlite_machine import SqliteStateMachine

from fastsm.testing import StateMachineConformance


class TestSqliteStateMachine(StateMachineConformance):
    """Every rule of the trait, one test each."""

    @pytest.fixture
    def state_machine(self, tmp_path: Path) -> Iterator[SqliteStateMachine]:
        """An empty, running state machine."""
        machine = SqliteStateMachine(tmp_path / "state.db")
        yield machine
        machine.close()

    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Iterator[Callable[[SqliteStateMachine], SqliteStateMachine]]:
        """Closes it and opens the same storage again: with this fixture durability is tested, too."""
        opened = []

        def close_and_open(machine: SqliteStateMachine) -> SqliteStateMachine:
            machine.close()
            opened.append(SqliteStateMachine(tmp_path / "state.db"))
            return opened[-1]

        yield close_and_open
        for machine in opened:
            machine.close()
