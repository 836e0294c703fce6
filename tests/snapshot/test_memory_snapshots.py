"""Snapshots of the model: exact as of any entry since the base, and as docs/format.md says."""

from __future__ import annotations

import asyncio
import os
import random
import struct
from pathlib import Path

import blake3
import pytest

import fastsm
from fastsm import (
    ChecksumMismatchError,
    LogId,
    MemoryStateMachine,
    NotRunningError,
    SnapshotError,
    SnapshotFormatError,
    SnapshotMetadata,
    SnapshotRangeError,
    StaleSnapshotError,
    StorageError,
    open_snapshot,
)
from fastsm.snapshot.model import PUT, record, runs_of
from fastsm.testing.histories import History
from support.snapshots import assemble


def machine_with(*entries: tuple[int, int, bytes], contiguous: bool = True) -> MemoryStateMachine:
    machine = MemoryStateMachine(contiguous=contiguous)
    machine.apply(entries)
    return machine


def put(key: bytes, value: bytes = b"v") -> bytes:
    return fastsm.put(key, value)


def everything(machine: MemoryStateMachine) -> object:
    keys = [key for key, _ in machine.items()]
    last = machine.last_applied()
    return (
        machine.items(), last, machine.membership(), {key: machine.modified(key) for key in keys},
        [machine.entry_term(index) for index in range(last.index + 3)],
    )


def test_the_file_is_what_the_page_says(tmp_path: Path) -> None:
    """The file of a small state has, byte by byte, header, attachment, membership, runs, and records as written."""
    machine = machine_with(
        (1, 1, put(b"a", b"old")), (2, 1, put(b"b", b"two")), (3, 2, fastsm.config(b"m")), (4, 2, put(b"a", b"")),
        (5, 2, fastsm.put(b"c", b"three", expires=9)), (6, 2, fastsm.touch(b"a", 8)), (7, 2, fastsm.touch(b"c", None)),
        (8, 2, fastsm.tick(7)))
    metadata = machine.write_snapshot(tmp_path, attachment=b"att")
    membership = struct.pack("<QIHBB", 3, 1, 0, 3, 0) + b"m" + bytes(7)
    runs = struct.pack("<6Q", 1, 2, 1, 3, 8, 2)
    records = struct.pack("<QIHBB", 2, 3, 1, 1, 0) + b"btwo" + bytes(4)
    records += struct.pack("<QIHBB", 4, 0, 1, 1, 0) + b"a" + bytes(7)
    records += struct.pack("<QIHBB", 5, 5, 1, 1, 1) + b"cthree" + bytes(2) + struct.pack("<Q", 9)
    records += struct.pack("<QIHBB", 6, 0, 1, 8, 1) + b"a" + bytes(7) + struct.pack("<Q", 8)
    records += struct.pack("<QIHBB", 7, 0, 1, 8, 0) + b"c" + bytes(7)
    ids = struct.pack("<8Q", 8, 2, 3, 2, len(membership), len(records), 0, 7)
    flat = membership + runs + records
    head = b"FASTSM-S" + bytes(8) + ids + blake3.blake3(ids + flat).digest() + struct.pack("<2Q", 3, len(flat))
    body = b"att" + bytes(5) + flat
    checksum = blake3.blake3(head + body).digest()
    assert (tmp_path / "snapshot.fsm").read_bytes() == head + checksum + body
    assert metadata == SnapshotMetadata(LogId(8, 2), checksum) == machine.snapshot_metadata()
    assert os.listdir(tmp_path) == ["snapshot.fsm"]


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize("seed", range(4))
def test_every_entry_can_be_the_last_included(tmp_path: Path, seed: int, compress: str) -> None:
    """A snapshot as of any entry installs as the state at that entry, and later entries continue from it."""
    entries = History(seed, 60).entries
    machine = machine_with(*entries)
    for stop in range(0, 61, 1 if compress == "none" else 15):
        expected = machine_with(*entries[:stop])
        metadata = machine.write_snapshot(tmp_path, expected.last_applied(), compress=compress)
        other = MemoryStateMachine()
        other.install_snapshot(metadata, tmp_path)
        assert everything(other) == everything(expected)
        assert other.snapshot_metadata() == metadata
        assert other.durable() == other.last_applied()
        assert other.apply(entries) == [None] * stop + machine_with(*entries[:stop]).apply(entries[stop:])
        assert everything(other) == everything(machine)


def test_bytes_depend_on_the_entries_alone(tmp_path: Path) -> None:
    """A snapshot's bytes do not depend on chunks, nor on an install in between."""
    history = History(9, 80)
    whole = machine_with(*history.entries)
    whole.write_snapshot(tmp_path / "whole")
    half = machine_with(*history.entries[:40])
    half.write_snapshot(tmp_path / "half")
    other = MemoryStateMachine()
    other.install_snapshot(None, tmp_path / "half" / "snapshot.fsm")
    for chunk in history.chunks(7):
        other.apply(chunk)
    other.write_snapshot(tmp_path / "other")
    assert (tmp_path / "other" / "snapshot.fsm").read_bytes() == (tmp_path / "whole" / "snapshot.fsm").read_bytes()


def test_records_that_are_written_again_move_to_the_end(tmp_path: Path) -> None:
    """Records are in the order of the last writes, including a put of the same value, a swap and a batch."""
    machine = machine_with(
        (1, 1, fastsm.put_many([b"a", b"b", b"c", b"a"], [b"1", b"2", b"3", b"1"])), (2, 1, put(b"b", b"2")),
        (3, 1, fastsm.compare_and_swap(b"c", b"3", b"3")), (4, 1, fastsm.compare_and_swap(b"a", b"9", b"1")),
        (5, 1, fastsm.batch([put(b"d"), fastsm.delete(b"d"), put(b"e"), put(b"b", b"2")])))
    assert [key for key, _ in machine.items()] == [b"a", b"c", b"e", b"b"]
    assert machine.modified(b"a") == LogId(1, 1)
    assert machine.modified(b"c") == LogId(3, 1)
    assert machine.modified(b"e") == machine.modified(bytearray(b"b")) == LogId(5, 1)
    assert machine.modified(b"d") is machine.modified(b"nothing") is None


GAPS = [(5, 2, put(b"a")), (6, 2, put(b"b")), (9, 2, put(b"c")), (12, 4, put(b"d"))]


@pytest.mark.parametrize(("last", "runs", "keys"), [
    (LogId(0, 0), [], 0),
    (LogId(3, 0), [], 0),
    (LogId(3, 2), [], 0),
    (LogId(5, 2), [(5, 5, 2)], 1),
    (LogId(7, 2), [(5, 7, 2)], 2),
    (LogId(9, 2), [(5, 9, 2)], 3),
    (LogId(10, 2), [(5, 9, 2)], 3),
    (LogId(10, 3), [(5, 9, 2)], 3),
    (LogId(11, 4), [(5, 9, 2)], 3),
    (LogId(12, 4), [(5, 9, 2), (12, 12, 4)], 4)])
def test_an_entry_in_a_gap_may_be_the_last_included(
    tmp_path: Path, last: LogId, runs: list[tuple[int, int, int]], keys: int
) -> None:
    """An index in a gap may be the last included if its term fits; between two terms it means the entry before."""
    machine = machine_with(*GAPS, contiguous=False)
    expected = LogId(runs[-1][1], runs[-1][2]) if runs else LogId()
    assert machine.write_snapshot(tmp_path, last).last_included == expected
    with open_snapshot(tmp_path) as snapshot:
        snapshot.verify()
        assert snapshot.keys == keys
        flat = b"".join(bytes(piece) for piece in snapshot.flat_pieces())
        assert list(struct.iter_unpack("<QQQ", flat[: 24 * snapshot.head.runs])) == runs


@pytest.mark.parametrize("last", [
    LogId(0, 1), LogId(3, 3), LogId(5, 1), LogId(5, 3), LogId(7, 1), LogId(7, 3), LogId(10, 1), LogId(10, 5),
    LogId(12, 3), LogId(13, 4)])
def test_an_entry_that_cannot_be_is_refused(tmp_path: Path, last: LogId) -> None:
    """An entry of another term, or ahead of the state, is a ``SnapshotRangeError``, and no directory is made."""
    machine = machine_with(*GAPS, contiguous=False)
    with pytest.raises(SnapshotRangeError):
        machine.write_snapshot(tmp_path / "new", last)
    assert not (tmp_path / "new").exists()
    assert machine.snapshot_metadata() is None


def test_the_base_is_the_first_that_can_be_included(tmp_path: Path) -> None:
    """After an install no earlier snapshot can be written, but the installed one can be written again."""
    machine = machine_with(*History(3, 30).entries)
    metadata = machine.write_snapshot(tmp_path)
    other = MemoryStateMachine()
    other.install_snapshot(metadata, tmp_path)
    last = metadata.last_included
    assert other.write_snapshot(tmp_path / "again", last) == metadata
    for index in (0, 1, last.index - 1):
        with pytest.raises(SnapshotRangeError):
            other.write_snapshot(tmp_path / "again", LogId(index, machine.entry_term(index) or 0))
    with pytest.raises(SnapshotRangeError):
        other.write_snapshot(tmp_path / "again", LogId(last.index, last.term + 1))
    with pytest.raises(SnapshotRangeError):
        other.write_snapshot(tmp_path / "again", (-1, 0))


def test_runs_are_maximal() -> None:
    """Entries of one term are one run, including gaps between them; gaps between two terms are in no run."""
    seen = [LogId(5, 2), LogId(6, 2), LogId(9, 2), LogId(12, 4), LogId(13, 4), LogId(14, 5)]
    assert runs_of(seen) == [(5, 9, 2), (12, 13, 4), (14, 14, 5)]
    assert runs_of([]) == []


def test_ids_without_commands_are_in_the_runs(tmp_path: Path) -> None:
    """Ids of ``update_last_applied`` may be the last included entry, and are in the runs."""
    machine = machine_with((1, 1, put(b"a")))
    machine.update_last_applied((4, 1))
    machine.update_last_applied((8, 3))
    machine.write_snapshot(tmp_path)
    other = MemoryStateMachine()
    other.install_snapshot(None, tmp_path)
    assert [other.entry_term(index) for index in range(10)] == [None, 1, 1, 1, 1, None, None, None, 3, None]
    assert other.last_applied() == LogId(8, 3)


def test_older_metadata_is_not_recorded(tmp_path: Path) -> None:
    """A snapshot as of an earlier entry, or the same one, does not change the metadata."""
    machine = machine_with((1, 1, put(b"a")), (2, 1, put(b"b")))
    newest = machine.write_snapshot(tmp_path)
    machine.write_snapshot(tmp_path, (1, 1))
    machine.write_snapshot(tmp_path, attachment=b"other")
    assert machine.snapshot_metadata() == newest


def test_a_stale_snapshot_is_refused_unless_asked_for(tmp_path: Path) -> None:
    """A snapshot as of last applied is not stale; an older one is, and needs ``allow_older``."""
    machine = machine_with((1, 1, put(b"a")))
    metadata = machine.write_snapshot(tmp_path)
    machine.install_snapshot(metadata, tmp_path)
    machine.apply([(2, 1, put(b"b"))])
    before = everything(machine)
    with pytest.raises(StaleSnapshotError, match="allow_older"):
        machine.install_snapshot(metadata, tmp_path)
    assert everything(machine) == before
    machine.install_snapshot(metadata, tmp_path, allow_older=True)
    assert machine.last_applied() == LogId(1, 1)
    assert machine.items() == [(b"a", b"v")]


def test_announced_metadata_must_match_the_file(tmp_path: Path) -> None:
    """Metadata with another checksum, another entry or of another type have an error of their own each."""
    machine = machine_with((1, 1, put(b"a")))
    metadata = machine.write_snapshot(tmp_path)
    other = MemoryStateMachine()
    with pytest.raises(ChecksumMismatchError):
        other.install_snapshot(SnapshotMetadata(metadata.last_included, bytes(32)), tmp_path)
    with pytest.raises(SnapshotError):
        other.install_snapshot(SnapshotMetadata(LogId(2, 1), metadata.checksum), tmp_path)
    with pytest.raises(TypeError, match="SnapshotMetadata"):
        other.install_snapshot((1, 1), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(StorageError):
        other.install_snapshot(None, tmp_path / "nothing")
    assert everything(other) == everything(MemoryStateMachine())


def test_a_key_that_comes_twice_is_found(tmp_path: Path) -> None:
    """Two records of one key, which only an install can notice, are a ``SnapshotFormatError``."""
    records = [record(PUT, 1, b"k", b"1"), record(PUT, 2, b"k", b"2")]
    (tmp_path / "snapshot.fsm").write_bytes(assemble(LogId(2, 1), [(1, 2, 1)], records))
    with pytest.raises(SnapshotFormatError, match="two"):
        MemoryStateMachine().install_snapshot(None, tmp_path)


def test_no_flipped_byte_is_installed(tmp_path: Path) -> None:
    """A snapshot with any wrong byte is refused with a typed error, and the old state stays whole."""
    machine_with(*History(5, 20).entries).write_snapshot(tmp_path)
    data = (tmp_path / "snapshot.fsm").read_bytes()
    machine = machine_with((1, 1, put(b"a")))
    before = everything(machine)
    for at in random.Random(1).sample(range(len(data)), min(len(data), 400)):
        (tmp_path / "snapshot.fsm").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises((SnapshotError, fastsm.FormatVersionError)):
            machine.install_snapshot(None, tmp_path)
    assert everything(machine) == before


def test_the_coroutines_are_the_same(tmp_path: Path) -> None:
    """``generate_snapshot_data`` returns the checksum, ``apply_snapshot_from_file`` installs."""
    machine = machine_with((1, 1, put(b"a")))
    checksum = asyncio.run(machine.generate_snapshot_data(tmp_path, LogId(1, 1)))
    assert machine.snapshot_metadata() == SnapshotMetadata(LogId(1, 1), checksum)
    other = MemoryStateMachine()
    asyncio.run(other.apply_snapshot_from_file(machine.snapshot_metadata(), tmp_path))
    assert everything(other) == everything(machine)


def test_arguments_are_checked_and_progress_is_told(tmp_path: Path) -> None:
    """An unknown codec leaves no file, ``progress`` ends at the file's size, and a stopped model refuses."""
    machine = machine_with((1, 1, put(b"a")))
    with pytest.raises(ValueError, match="zstd"):
        machine.write_snapshot(tmp_path / "new", compress="lz4")
    assert not (tmp_path / "new").exists()
    told: list[tuple[int, int]] = []
    machine.write_snapshot(tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == (tmp_path / "snapshot.fsm").stat().st_size
    machine.stop()
    for use in (lambda: machine.write_snapshot(tmp_path), lambda: machine.install_snapshot(None, tmp_path),
                lambda: machine.modified(b"a")):
        with pytest.raises(NotRunningError):
            use()
