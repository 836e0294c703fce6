"""The complete test file for a state machine of your own. Run: ``pytest examples/own_state_machine``"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlite_machine import SqliteStateMachine

from fastsm.testing import StateMachineConformance


class TestSqliteStateMachine(StateMachineConformance):
    """One test for each rule of the trait."""

    @pytest.fixture
    def state_machine(self, tmp_path: Path) -> Iterator[SqliteStateMachine]:
        """Provide an empty, running state machine."""
        machine = SqliteStateMachine(tmp_path / "state.db")
        yield machine
        machine.close()

    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Iterator[Callable[[SqliteStateMachine], SqliteStateMachine]]:
        """Provide a function that closes a machine and reopens its storage, so that durability is tested, too."""
        opened = []

        def close_and_open(machine: SqliteStateMachine) -> SqliteStateMachine:
            machine.close()
            opened.append(SqliteStateMachine(tmp_path / "state.db"))
            return opened[-1]

        yield close_and_open
        for machine in opened:
            machine.close()
