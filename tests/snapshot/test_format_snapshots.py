"""Snapshots and bases made by hand: compared with the library's, and read by it, even if their content is invalid."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import fastsm
from fastsm import (
    CorruptionError,
    FastStateMachine,
    FormatVersionError,
    LogId,
    SnapshotFormatError,
    SnapshotMetadata,
    open_snapshot,
)
from fastsm.disk import snapshot_header
from support.by_hand import (
    CONFIG,
    DELETE,
    GAP,
    PUT,
    RECORD,
    START,
    current,
    frame,
    head_checksum,
    log_head,
    record,
    run,
    snapshot,
    term_run,
)

RUNS = [term_run(1, 2, 1), term_run(4, 7, 3)]
RECORDS = [record(PUT, 2, b"a", b"1"), record(PUT, 4, b"b", b"2" * 9), record(PUT, 4, b"", b"")]
MEMBERSHIP = record(CONFIG, 5, b"", b"three members")
WHOLE = snapshot((7, 3), RUNS, RECORDS, membership=MEMBERSHIP, attachment=b"raft's own")


def head_after(base: bytes) -> bytes:
    """Return the header of a log that is stacked on a base."""
    return log_head(base=struct.unpack_from("<QQ", base, 16), size=len(base), checksum=base[128:160])


def write_base(directory: Path, base: bytes, *frames: bytes, codec: int = 0) -> None:
    """Make a directory of generation 1 whose log starts after a base."""
    directory.mkdir()
    (directory / "base-1").write_bytes(base)
    (directory / "log-1").write_bytes(head_after(base) + b"".join(frames))
    (directory / "CURRENT").write_bytes(current(durable=START + sum(map(len, frames))))


def test_a_snapshot_is_what_struct_makes(tmp_path: Path, directory: Path) -> None:
    """A snapshot written by the library equals, byte for byte, the one that this file makes from the same history."""
    with FastStateMachine(directory, contiguous=False) as machine:
        machine.apply([
            (1, 1, fastsm.put(b"b", b"old")), (2, 1, fastsm.put(b"a", b"1")), (4, 3, fastsm.batch([
                fastsm.put(b"b", b"2" * 9), fastsm.put(b"", b"")])),
            (5, 3, fastsm.config(b"three members")), (7, 3, fastsm.noop()),
        ])
        metadata = machine.write_snapshot(tmp_path, attachment=b"raft's own")
    assert (tmp_path / "snapshot.fsm").read_bytes() == WHOLE
    assert metadata == SnapshotMetadata(LogId(7, 3), WHOLE[128:160])


def test_a_snapshots_header_comes_back(tmp_path: Path) -> None:
    """The header's fields are where `struct` has them, and packing gives the same bytes."""
    head = snapshot_header.unpack(WHOLE, "file", len(WHOLE))
    assert snapshot_header.pack(head) == WHOLE[:160]
    assert head[:7] == (0, 7, 3, 3, 2, len(MEMBERSHIP), sum(map(len, RECORDS)))
    assert (head.attachment_size, head.state_offset, head.file_size) == (10, 160 + 16, len(WHOLE))
    foreign = WHOLE[:8] + struct.pack("<I", 1) + WHOLE[12:]
    with pytest.raises(FormatVersionError, match="version 1"):
        snapshot_header.unpack(foreign, "file", len(WHOLE))
    (tmp_path / "snapshot.fsm").write_bytes(WHOLE)
    with open_snapshot(tmp_path) as opened:
        opened.verify()
        assert opened.membership == (LogId(5, 3), b"three members")


def test_a_base_made_by_hand_opens(directory: Path) -> None:
    """A state opens with the keys, terms, membership and last included entry of its base."""
    records = record(PUT, 8, b"b", b"3") + record(DELETE, 9, b"a")
    write_base(directory, WHOLE, frame(START, [run(9, 3)], records, previous=head_checksum(head_after(WHOLE))))
    with FastStateMachine(directory, verify_on_open="full") as machine:
        assert list(machine.items()) == [(b"", b""), (b"b", b"3")]
        assert [machine.entry_term(index) for index in range(11)] == [None, 1, 1, None, *[3] * 6, None]
        assert machine.membership() == (LogId(5, 3), b"three members")
        assert machine.last_applied() == machine.durable() == (9, 3)
        assert (machine.modified(b""), machine.modified(b"b")) == (LogId(4, 3), LogId(8, 3))
        assert machine.stats().base == LogId(7, 3)


BAD_BASES = {
    "no key has two records": snapshot((7, 3), RUNS, [RECORDS[0], RECORDS[0]]),
    "two records of one key, counted as one": snapshot((7, 3), RUNS, [RECORDS[0], RECORDS[0]], keys=1),
    "an index that falls": snapshot((7, 3), RUNS, RECORDS[::-1]),
    "a record of an entry in no run": snapshot((7, 3), RUNS, [record(PUT, 3, b"k")]),
    "a record after the last entry": snapshot((7, 3), RUNS, [record(PUT, 8, b"k")]),
    "a delete": snapshot((7, 3), RUNS, [record(DELETE, 4, b"k")]),
    "padding that is not zero": snapshot((7, 3), RUNS, [record(PUT, 4, b"k")[:-1] + b"\1"]),
    "half a record": snapshot((7, 3), RUNS, [RECORDS[1][:-8]]),
    "a value that reaches past the base": snapshot((7, 3), RUNS, [struct.pack(RECORD, 4, 9, 0, PUT, 0) + bytes(8)]),
    "more keys than records": snapshot((7, 3), RUNS, [RECORDS[0], record(PUT, 4, b"k" * 40)], keys=3),
    "runs of one term": snapshot((7, 3), [term_run(1, 2, 3), term_run(4, 7, 3)], RECORDS),
    "runs that overlap": snapshot((7, 3), [term_run(1, 4, 1), term_run(4, 7, 3)], RECORDS),
    "a run that is empty": snapshot((7, 3), [term_run(3, 2, 1), term_run(4, 7, 3)], RECORDS[1:]),
    "runs that end early": snapshot((7, 3), [term_run(1, 6, 3)], RECORDS),
    "another last term": snapshot((7, 3), [term_run(1, 7, 2)], RECORDS),
    "the term that is a mark": snapshot((7, 3), [term_run(1, 7, GAP)], RECORDS),
    "a membership in no run": snapshot((7, 3), RUNS, RECORDS, membership=record(CONFIG, 3, b"", b"m")),
    "a membership that is a put": snapshot((7, 3), RUNS, RECORDS, membership=record(PUT, 5, b"", b"m")),
    "a membership that is too short": snapshot((7, 3), RUNS, RECORDS, membership=MEMBERSHIP + bytes(8)),
}


@pytest.mark.parametrize("base", BAD_BASES.values(), ids=BAD_BASES.keys())
def test_a_base_that_makes_no_sense_is_corruption(tmp_path: Path, base: bytes) -> None:
    """Invalid content with correct checksums is corruption in a base, and is refused as a snapshot."""
    write_base(tmp_path / "state", base)
    with pytest.raises(CorruptionError) as caught:
        FastStateMachine(tmp_path / "state")
    assert caught.value.path == str(tmp_path / "state" / "base-1")
    (tmp_path / "file").write_bytes(base)
    with FastStateMachine(tmp_path / "other") as machine, pytest.raises(SnapshotFormatError):
        machine.install_snapshot(None, tmp_path / "file")


def test_a_base_that_is_not_the_logs_is_corruption(tmp_path: Path) -> None:
    """A base that is missing, or has another content, size or codec than the log's header names, is corruption."""
    other = snapshot((7, 3), RUNS, RECORDS, membership=MEMBERSHIP, attachment=b"raft's OWN")
    for number, base in enumerate((None, other, WHOLE[:-8], WHOLE + bytes(8), WHOLE[:12] + b"\1" + WHOLE[13:])):
        directory = tmp_path / str(number)
        write_base(directory, WHOLE)
        (directory / "base-1").unlink()
        if base is not None:
            (directory / "base-1").write_bytes(base)
        with pytest.raises(CorruptionError) as caught:
            FastStateMachine(directory)
        assert caught.value.path == str(directory / "base-1")
