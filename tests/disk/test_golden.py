"""Golden files: files written by earlier commits are still read correctly. See tests/golden/regenerate.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import FastStateMachine, LogId, MemoryStateMachine, SnapshotMetadata, open_snapshot
from support.golden import COMMANDS, LONG, long_history, play
from support.inside import inside

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
STATES = sorted(name for name in EXPECTED if name.startswith("state-"))
SNAPSHOTS = {
    f"{folder}/{name}.fsm": EXPECTED[folder][name]
    for folder in EXPECTED if folder.startswith("snapshots-") for name in EXPECTED[folder]
}  # fmt: skip
GOLDEN_COMMANDS = [command for name in EXPECTED if name.startswith("commands-") for command in EXPECTED[name]]
HISTORIES = sorted(name for name in EXPECTED if name.startswith("long-history-"))


@pytest.fixture(params=STATES)
def golden(request: pytest.FixtureRequest, directory: Path) -> tuple[Path, dict[str, Any]]:
    """Provide a copy of a golden directory, and what it holds."""
    shutil.copytree(GOLDEN / request.param, directory)
    return directory, EXPECTED[request.param]


def assert_items(machine: FastStateMachine, expected: dict[str, Any]) -> None:
    assert machine.len() == len(expected["items"])
    for key, value in expected["items"].items():
        assert machine.get(bytes.fromhex(key)) == bytes.fromhex(value)
        assert machine.deadline(bytes.fromhex(key)) == expected["deadlines"][key]
    assert machine.clock() == expected["clock"]
    sessions = {
        str(int.from_bytes(key, "little")): value.hex()
        for operation, _, key, value, _ in inside(machine).live_records(None) if operation == "session"}
    assert sessions == expected["sessions"]
    assert machine.get(b"gone") is None
    log_id, data = expected["membership"]
    assert machine.membership() == (LogId(*log_id), bytes.fromhex(data))


@pytest.mark.parametrize("with_table", [True, False])
def test_golden_state_is_read(
    golden: tuple[Path, dict[str, Any]], machine_at: Callable[..., FastStateMachine], with_table: bool
) -> None:
    """A golden directory opens as cleanly closed, with exactly its original state, with and without its table."""
    directory, expected = golden
    tables = list(directory.glob("table-*"))
    if not with_table:
        for table in tables:
            table.unlink()
    machine = machine_at(
        directory, contiguous=False, expect_applied=tuple(expected["last_applied"]), verify_on_open="off")
    assert machine.stats().verified == (not list(directory.glob("base-*")) and not (with_table and tables))
    assert list(machine.last_applied()) == list(machine.durable()) == expected["last_applied"]
    assert machine.stats().recovery.clean
    assert machine.stats().recovery.torn_bytes == 0
    assert_items(machine, expected)
    order = inside(machine).order()  # a golden table was saved with the order in use
    assert (order is not None and order.loaded) == (with_table and bool(tables))
    assert [key.hex() for key, _ in machine.scan().entries] == sorted(expected["items"])
    assert [machine.entry_term(index) for index in range(len(expected["terms"]))] == expected["terms"]
    log_id, checksum = expected["snapshot_metadata"]
    assert machine.snapshot_metadata() == SnapshotMetadata(LogId(*log_id), bytes.fromhex(checksum))
    machine.verify()


def test_golden_state_is_not_changed_by_looking(golden: tuple[Path, dict[str, Any]]) -> None:
    """Opening and closing a cleanly closed directory does not change a byte of its files."""
    directory, _ = golden
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    FastStateMachine(directory, contiguous=False).close()
    assert {name: (directory / name).read_bytes() for name in before} == before


def test_golden_state_goes_on(golden: tuple[Path, dict[str, Any]]) -> None:
    """New entries can be applied to a golden directory, and are there afterwards, together with the old state."""
    directory, expected = golden
    index, term = expected["last_applied"]
    with FastStateMachine(directory, contiguous=False) as machine:
        assert machine.apply([(index + 1, term, fastsm.put(b"new", b"entry"))]) == [True]
    with FastStateMachine(directory, contiguous=False) as machine:
        assert machine.len() == len(expected["items"]) + 1
        assert machine.get(b"new") == b"entry"
        for key, value in expected["items"].items():
            assert machine.get(bytes.fromhex(key)) == bytes.fromhex(value)


@pytest.mark.parametrize(("name", "expected"), SNAPSHOTS.items(), ids=SNAPSHOTS.keys())
def test_golden_snapshot_is_read(name: str, expected: dict[str, Any], tmp_path: Path) -> None:
    """A golden snapshot verifies, has the metadata that it was made with, and can be installed."""
    last = LogId(*expected["last_included"])
    with open_snapshot(GOLDEN / name) as snapshot:
        snapshot.verify()
        assert snapshot.metadata == SnapshotMetadata(last, bytes.fromhex(expected["checksum"]))
        assert snapshot.state_checksum.hex() == expected["state_checksum"]
        assert snapshot.attachment.hex() == expected["attachment"]
        assert snapshot.codec == expected["codec"]
    model = MemoryStateMachine(contiguous=False)
    play(model)
    model.write_snapshot(tmp_path / "model", last)
    model.install_snapshot(None, tmp_path / "model", allow_older=True)
    with FastStateMachine(tmp_path / "state") as machine:
        machine.install_snapshot(None, GOLDEN / name)
        assert machine.last_applied() == last
        assert list(machine.items()) == model.items()
        assert machine.membership() == model.membership()
        assert machine.clock() == model.clock()
        assert machine.state_checksum() == model.state_checksum()
        assert [machine.entry_term(index) for index in range(25)] == [model.entry_term(index) for index in range(25)]


@pytest.mark.parametrize(("name", "expected"), SNAPSHOTS.items(), ids=SNAPSHOTS.keys())
def test_golden_snapshot_is_written_again(name: str, expected: dict[str, Any], tmp_path: Path) -> None:
    """The same history gives the same snapshot file, byte for byte; a compressed one has the same state."""
    with FastStateMachine(tmp_path / "state", contiguous=False) as machine:
        play(machine)
        machine.write_snapshot(
            tmp_path, LogId(*expected["last_included"]), compress=expected["codec"],
            attachment=bytes.fromhex(expected["attachment"]))
    with open_snapshot(tmp_path) as snapshot:
        assert snapshot.state_checksum.hex() == expected["state_checksum"]
    if expected["codec"] == "none":
        assert (tmp_path / "snapshot.fsm").read_bytes() == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("name", HISTORIES)
@pytest.mark.parametrize("chunk", [1, 7, LONG])
def test_golden_history_gives_the_golden_checksum(name: str, chunk: int, tmp_path: Path) -> None:
    """A history gives one snapshot checksum on every Python, in chunks of any size, across compaction and restart."""
    entries = list(long_history())
    assert len(entries) == LONG
    machine = FastStateMachine(tmp_path / "state", contiguous=False)
    for start in range(0, LONG, chunk):
        machine.apply(entries[start : start + chunk])
        if start == LONG // 3 // chunk * chunk:
            machine.compact(machine.last_applied())
            machine.close()
            machine = FastStateMachine(tmp_path / "state", contiguous=False)
    with machine:
        assert machine.write_snapshot(tmp_path).checksum.hex() == EXPECTED[name]


@pytest.mark.parametrize("command", GOLDEN_COMMANDS, ids=lambda command: command["name"])
def test_golden_command_is_understood(command: dict[str, str]) -> None:
    """A golden command passes the check and decodes to what it was made of."""
    data = bytes.fromhex(command["bytes"])
    fastsm.check(data)
    assert repr(fastsm.decode(data)) == command["says"]


def test_golden_command_is_made_again() -> None:
    """The functions that make commands make the golden ones, byte for byte."""
    made = {name: command.hex() for name, command in COMMANDS.items()}
    assert made == {command["name"]: command["bytes"] for command in EXPECTED["commands-0"]}


def test_golden_files_are_complete() -> None:
    """Every golden file has a description, every description has a file, and every kind of command is included."""
    assert sorted(path.name for path in GOLDEN.iterdir() if path.name.startswith("state-")) == STATES
    assert {path.relative_to(GOLDEN).as_posix() for path in GOLDEN.glob("snapshots-*/*")} == SNAPSHOTS.keys()
    assert {bytes.fromhex(command["bytes"])[1] for command in GOLDEN_COMMANDS} == {*range(1, 8), *range(12, 19)}
    assert {expected["codec"] for expected in SNAPSHOTS.values()} == {"none", "zstd"}
