"""The rules of snapshots."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import LogId, SnapshotMetadata, StateMachine
from fastsm.testing.helpers import PUT, apply_chunks, apply_commands, apply_entries, state_of
from fastsm.testing.histories import History


def write_snapshot(machine: StateMachine, directory: Path, last: LogId) -> SnapshotMetadata:
    """Writes a snapshot to a directory that does not exist yet."""
    return SnapshotMetadata(last, asyncio.run(machine.generate_snapshot_data(directory, last)))


def install(machine: StateMachine, metadata: SnapshotMetadata, path: Path) -> None:
    asyncio.run(machine.apply_snapshot_from_file(metadata, path))


def reset(machine: StateMachine) -> None:
    asyncio.run(machine.reset())


def largest_file(directory: Path) -> Path:
    """Returns the file of a snapshot; if there are several, the largest."""
    files = [Path(folder, name) for folder, _, names in os.walk(directory) for name in names]
    return max(files, key=lambda path: path.stat().st_size)


class SnapshotRules:
    """A snapshot is exact as of an entry, checked before it is trusted, and installed completely or not at all."""

    def test_the_checksum_is_that_of_the_metadata(self, state_machine: StateMachine, tmp_path: Path) -> None:
        """A snapshot's 32-byte checksum is returned, and recorded with its last included entry."""
        apply_commands(state_machine, PUT, PUT)
        made = write_snapshot(state_machine, tmp_path / "new", LogId(2, 1))
        assert type(made.checksum) is bytes, "the checksum is not bytes"
        assert len(made.checksum) == 32, "the checksum does not have 32 bytes"
        assert state_machine.snapshot_metadata() == made, "snapshot_metadata() is not what was written"

    def test_an_older_snapshot_is_not_recorded(self, state_machine: StateMachine, tmp_path: Path) -> None:
        """A snapshot of an earlier entry than the recorded one leaves the metadata unchanged."""
        apply_commands(state_machine, PUT, PUT, PUT)
        newest = write_snapshot(state_machine, tmp_path / "newest", LogId(3, 1))
        write_snapshot(state_machine, tmp_path / "older", LogId(2, 1))
        assert state_machine.snapshot_metadata() == newest, "an older snapshot took the place of a newer one"

    def test_writing_a_snapshot_changes_no_state(self, state_machine: StateMachine, tmp_path: Path) -> None:
        """A snapshot is a copy: the state from which it was made does not change."""
        apply_chunks(state_machine, *History(11, 50).chunks(8))
        before = state_of(state_machine)
        write_snapshot(state_machine, tmp_path / "new", state_machine.last_applied())
        after = {**state_of(state_machine), "snapshot_metadata": None}
        assert after == before, "the state differs after a snapshot"

    @pytest.mark.parametrize("seed", [12, 13])
    def test_installed_in_an_empty_one_the_state_is_equal(
        self, state_machine: StateMachine, tmp_path: Path, seed: int
    ) -> None:
        """An installed snapshot brings values, terms, ``last_applied`` and metadata, and applying continues."""
        apply_chunks(state_machine, *History(seed, 100).chunks(8))
        made = write_snapshot(state_machine, tmp_path / "new", state_machine.last_applied())
        before = state_of(state_machine)
        reset(state_machine)
        install(state_machine, made, tmp_path / "new")
        assert state_of(state_machine) == before, "the installed state differs from that of the snapshot"
        assert apply_commands(state_machine, PUT) == [True], "applying does not continue after a snapshot"

    @pytest.mark.parametrize("index", [0, 1, 37, 60, 99])
    def test_a_snapshot_is_exact_as_of_an_earlier_entry(
        self, state_machine: StateMachine, tmp_path: Path, index: int
    ) -> None:
        """A snapshot has the state as of the requested entry, even if later entries have changed it."""
        entries = History(14, 100).entries
        apply_chunks(state_machine, entries[:30], entries[30:])
        last = LogId(index, entries[index - 1].term if index else 0)
        made = write_snapshot(state_machine, tmp_path / "new", last)
        reset(state_machine)
        apply_chunks(state_machine, entries[:index])
        expected = {**state_of(state_machine), "snapshot_metadata": made}
        reset(state_machine)
        install(state_machine, made, tmp_path / "new")
        assert state_of(state_machine) == expected, f"the snapshot is not the state as of entry {index}"

    def test_an_entry_without_a_command_may_be_the_last_included(
        self, state_machine: StateMachine, tmp_path: Path
    ) -> None:
        """An entry that ``update_last_applied`` counted as applied is part of a snapshot too."""
        apply_commands(state_machine, PUT)
        state_machine.update_last_applied(LogId(5, 3))
        before = state_of(state_machine)
        made = write_snapshot(state_machine, tmp_path / "new", LogId(5, 3))
        reset(state_machine)
        install(state_machine, made, tmp_path / "new")
        assert {**state_of(state_machine), "snapshot_metadata": None} == before, "the ids of the state differ"

    @pytest.mark.parametrize("last", [LogId(4, 2), LogId(3, 1), LogId(2, 2)], ids=["ahead", "term", "known term"])
    def test_a_snapshot_that_cannot_be_exact_is_refused(
        self, state_machine: StateMachine, tmp_path: Path, last: LogId
    ) -> None:
        """An entry not applied yet, or with another term, is a ``SnapshotRangeError``, and leaves no file."""
        apply_entries(state_machine, (1, 1, PUT), (2, 1, PUT), (3, 2, PUT))
        with pytest.raises(fastsm.SnapshotRangeError):
            write_snapshot(state_machine, tmp_path / "new", last)
        files = [name for _, _, names in os.walk(tmp_path / "new") for name in names]
        assert not files, "a snapshot that was refused left a file"
        assert state_machine.snapshot_metadata() is None, "a snapshot that was refused was recorded"

    def test_a_stale_snapshot_is_refused(self, state_machine: StateMachine, tmp_path: Path) -> None:
        """A snapshot older than ``last_applied`` would undo entries: ``StaleSnapshotError``."""
        apply_commands(state_machine, PUT)
        made = write_snapshot(state_machine, tmp_path / "new", LogId(1, 1))
        apply_commands(state_machine, fastsm.delete(b"key"))
        before = state_of(state_machine)
        with pytest.raises(fastsm.StaleSnapshotError):
            install(state_machine, made, tmp_path / "new")
        assert state_of(state_machine) == before, "a part of a stale snapshot was installed"

    def test_a_damaged_snapshot_is_refused(self, state_machine: StateMachine, tmp_path: Path) -> None:
        """A file with a flipped bit or a missing end is a ``SnapshotError``, and the old state is intact."""
        apply_chunks(state_machine, *History(15, 40).chunks(8))
        made = write_snapshot(state_machine, tmp_path / "new", state_machine.last_applied())
        reset(state_machine)
        apply_commands(state_machine, PUT)
        before = state_of(state_machine)
        file = largest_file(tmp_path / "new")
        content = file.read_bytes()
        damages: dict[str, Callable[[], Any]] = {
            f"with byte {at} flipped": lambda at=at: file.write_bytes(  # type: ignore[misc]
                content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            for at in (0, len(content) // 3, len(content) // 2, len(content) - 1)
        }
        damages["cut short"] = lambda: file.write_bytes(content[:-1])
        damages["empty"] = lambda: file.write_bytes(b"")
        damages["a byte too long"] = lambda: file.write_bytes(content + b"\0")
        for name, damage in damages.items():
            damage()
            try:
                install(state_machine, made, tmp_path / "new")
            except (fastsm.SnapshotError, fastsm.FormatVersionError):
                pass
            else:
                pytest.fail(f"a snapshot {name} was installed")
            assert state_of(state_machine) == before, f"a snapshot {name} changed the state"

    def test_another_snapshot_than_announced_is_refused(self, state_machine: StateMachine, tmp_path: Path) -> None:
        """A file that does not belong to the metadata is a ``SnapshotError``: checksum and entry must match."""
        apply_commands(state_machine, PUT)
        made = write_snapshot(state_machine, tmp_path / "new", LogId(1, 1))
        reset(state_machine)
        before = state_of(state_machine)
        with pytest.raises(fastsm.ChecksumMismatchError):
            install(state_machine, dataclasses.replace(made, checksum=bytes(32)), tmp_path / "new")
        with pytest.raises(fastsm.SnapshotError):
            install(state_machine, dataclasses.replace(made, last_included=LogId(2, 1)), tmp_path / "new")
        assert state_of(state_machine) == before, "a snapshot other than the announced one was installed"

    def test_equal_states_have_equal_snapshots(self, state_machine: StateMachine, tmp_path: Path) -> None:
        """The checksum depends on the entries, not on how they were split or where the state came from."""
        history = History(16, 100)
        sums = []
        for number, largest in enumerate((1, 100, 7)):
            apply_chunks(state_machine, *history.chunks(largest))
            made = write_snapshot(state_machine, tmp_path / str(number), state_machine.last_applied())
            sums.append(made.checksum)
            reset(state_machine)
        install(state_machine, made, tmp_path / "2")
        sums.append(write_snapshot(state_machine, tmp_path / "again", made.last_included).checksum)
        assert sums == sums[:1] * 4, "the checksums of one state differ"

    def test_a_stopped_one_writes_and_installs_nothing(self, state_machine: StateMachine, tmp_path: Path) -> None:
        """After ``stop``, both writing and installing raise ``NotRunningError``."""
        apply_commands(state_machine, PUT)
        made = write_snapshot(state_machine, tmp_path / "new", LogId(1, 1))
        state_machine.stop()
        with pytest.raises(fastsm.NotRunningError):
            write_snapshot(state_machine, tmp_path / "other", LogId(1, 1))
        with pytest.raises(fastsm.NotRunningError):
            install(state_machine, made, tmp_path / "new")
