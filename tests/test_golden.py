"""Golden files: what earlier commits wrote is read as it was meant. See tests/golden/regenerate.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import FastStateMachine, LogId, SnapshotMetadata

GOLDEN = Path(__file__).resolve().parent / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
STATES = sorted(name for name in EXPECTED if name.startswith("state-"))
COMMANDS = [command for name in EXPECTED if name.startswith("commands-") for command in EXPECTED[name]]


@pytest.fixture(params=STATES)
def golden(request: pytest.FixtureRequest, directory: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of a golden directory, and what it holds."""
    shutil.copytree(GOLDEN / request.param, directory)
    return directory, EXPECTED[request.param]


def test_golden_state_is_read(
    golden: tuple[Path, dict[str, Any]], machine_at: Callable[..., FastStateMachine]
) -> None:
    """A golden directory opens, cleanly, and holds exactly what it was made with."""
    directory, expected = golden
    machine = machine_at(directory, contiguous=False, expect_applied=tuple(expected["last_applied"]))
    assert list(machine.last_applied()) == list(machine.durable()) == expected["last_applied"]
    assert machine.stats().recovery.clean
    assert machine.stats().recovery.torn_bytes == 0
    assert machine.len() == len(expected["items"])
    for key, value in expected["items"].items():
        assert machine.get(bytes.fromhex(key)) == bytes.fromhex(value)
    assert machine.get(b"gone") is None
    assert [machine.entry_term(index) for index in range(len(expected["terms"]))] == expected["terms"]
    log_id, data = expected["membership"]
    assert machine.membership() == (LogId(*log_id), bytes.fromhex(data))
    log_id, checksum = expected["snapshot_metadata"]
    assert machine.snapshot_metadata() == SnapshotMetadata(LogId(*log_id), bytes.fromhex(checksum))


def test_golden_state_is_not_changed_by_looking(golden: tuple[Path, dict[str, Any]]) -> None:
    """Opening and closing a cleanly closed directory leaves its files as they were, byte for byte."""
    directory, _ = golden
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    FastStateMachine(directory, contiguous=False).close()
    assert {name: (directory / name).read_bytes() for name in before} == before


def test_golden_state_goes_on(golden: tuple[Path, dict[str, Any]]) -> None:
    """New entries can be applied behind what a golden directory holds, and both are there afterwards."""
    directory, expected = golden
    index, term = expected["last_applied"]
    with FastStateMachine(directory, contiguous=False) as machine:
        assert machine.apply([(index + 1, term, fastsm.put(b"new", b"entry"))]) == [True]
    with FastStateMachine(directory, contiguous=False) as machine:
        assert machine.len() == len(expected["items"]) + 1
        assert machine.get(b"new") == b"entry"
        for key, value in expected["items"].items():
            assert machine.get(bytes.fromhex(key)) == bytes.fromhex(value)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command["name"])
def test_golden_command_is_understood(command: dict[str, str]) -> None:
    """A golden command passes the check and says what it was made to say."""
    data = bytes.fromhex(command["bytes"])
    fastsm.check(data)
    assert repr(fastsm.decode(data)) == command["says"]


def test_golden_files_are_complete() -> None:
    """Every golden directory is described, and the other way round; every kind of command is among them."""
    assert sorted(path.name for path in GOLDEN.iterdir() if path.name.startswith("state-")) == STATES
    assert {bytes.fromhex(command["bytes"])[1] for command in COMMANDS} == {1, 2, 3, 4, 5, 6}
