"""A receiver that is told which snapshot it receives: what it keeps of an earlier one, and what it refuses."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from fastsm import (
    ChecksumMismatchError,
    FastStateMachine,
    LockedError,
    LogId,
    MemoryStateMachine,
    SnapshotFormatError,
    SnapshotMetadata,
    SnapshotReceiver,
    StaleSnapshotError,
    open_snapshot,
    put,
)
from fastsm.snapshot.model import snapshot_bytes
from support.receiving import DATA, PART, feed, metadata_of
from support.snapshots import some_state

# What the leader announces after the transfer of DATA was interrupted.
SNAPSHOTS = {
    "the same": DATA,
    "newer and larger": snapshot_bytes(some_state(40), "none", b"hello"),
    "newer and smaller": snapshot_bytes(some_state(23), "zstd", b""),
    "older": snapshot_bytes(some_state(5), "none", b"hello"),
    "of the same entry, smaller": snapshot_bytes(some_state(), "none", b""),
    "of the same entry and size": snapshot_bytes(some_state(), "none", b"HELLO"),
}
assert len(SNAPSHOTS["newer and larger"]) > len(DATA) > len(SNAPSHOTS["newer and smaller"])
assert metadata_of(SNAPSHOTS["newer and smaller"]).last_included > metadata_of(DATA).last_included
BYTES = [0, 1, 159, 160, 161, 700, len(DATA) - 1, len(DATA)]  # received of DATA, one of each kind
CASES = list(itertools.product(SNAPSHOTS, [*BYTES, "finished"], ["closed", "killed", "nobody restarted"]))


@pytest.mark.parametrize(("then", "received", "end"), CASES)
def test_an_interrupted_transfer_goes_on_or_starts_over(
    tmp_path: Path, then: str, received: int | str, end: str
) -> None:
    """Whatever was received, however it ended, and whatever the leader announces next: the loop of the guide arrives.

    It sends again only what is not there: bytes of this very snapshot from a whole header on are kept.
    """
    announced = SNAPSHOTS[then]
    receiver = SnapshotReceiver(tmp_path, metadata_of(DATA))
    feed(receiver, stop=len(DATA) if received == "finished" else int(received))
    if received == "finished":
        receiver.finish()
    if end == "closed" or then != "the same":
        receiver.close()
    if end == "nobody restarted" and then == "the same":
        again = receiver
    else:
        del receiver
        again = SnapshotReceiver(tmp_path, metadata_of(announced))
    kept = {"finished": len(DATA)}.get(str(received), received) if then == "the same" else 0
    if kept in (1, 159) and again.offset == 0:
        kept = 0
    assert (again.metadata, again.offset) == (metadata_of(announced), kept)
    assert again.complete == (kept == len(announced))
    with again:
        if received != "finished" or again.offset == 0:
            feed(again, announced)
        path = again.finish()
        assert path == again.finish(metadata_of(announced))
        assert again.complete
    assert Path(path).read_bytes() == announced
    assert os.listdir(tmp_path) == ["snapshot.fsm"]


@pytest.mark.parametrize("stop", BYTES)
def test_a_part_of_fewer_bytes_than_a_header_starts_over(tmp_path: Path, stop: int) -> None:
    """Nobody can tell whose it is; with a whole header it is kept, whether or not its metadata was announced."""
    for metadata in (None, metadata_of(DATA)):
        with SnapshotReceiver(tmp_path, metadata) as receiver:
            feed(receiver, stop=stop)
            receiver.close()
        with SnapshotReceiver(tmp_path, metadata) as receiver:
            assert receiver.offset == (stop if stop >= 160 else 0)
            assert receiver.metadata == (metadata_of(DATA) if metadata or stop >= 160 else None)
            receiver.discard()


@pytest.mark.parametrize("name", [name for name in SNAPSHOTS if name != "the same"])
def test_another_snapshot_is_refused_with_its_header(tmp_path: Path, name: str) -> None:
    """Its first 160 bytes are enough: nothing of it is kept, and the announced one can come."""
    with SnapshotReceiver(tmp_path, metadata_of(DATA)) as receiver:
        receiver.write(0, SNAPSHOTS[name][:100])
        with pytest.raises(ChecksumMismatchError):
            receiver.write(100, SNAPSHOTS[name][100:160])
        assert receiver.offset == 0
        feed(receiver)
        receiver.finish()


def test_a_complete_snapshot_is_offered_and_checked(tmp_path: Path) -> None:
    """It needs no byte more; ``finish`` reads all of it again, and what is damaged is fetched again."""
    for damage in (None, 170, len(DATA) - 1):
        data = bytearray(DATA)
        if damage:
            data[damage] ^= 1
        (tmp_path / "snapshot.fsm").write_bytes(data)
        with SnapshotReceiver(tmp_path, metadata_of(DATA)) as receiver:
            assert (receiver.complete, receiver.offset, receiver.size) == (True, len(DATA), len(DATA))
            assert receiver.write(0, data[:300]) == len(DATA)
            with pytest.raises(LockedError):
                SnapshotReceiver(tmp_path, metadata_of(DATA))
            if damage:
                with pytest.raises(ChecksumMismatchError):
                    receiver.finish()
                assert (receiver.complete, receiver.offset) == (False, 0)
                feed(receiver)
            assert Path(receiver.finish()).read_bytes() == DATA
        assert os.listdir(tmp_path) == ["snapshot.fsm"]


def test_a_file_that_was_cut_is_not_complete(tmp_path: Path) -> None:
    """A file of the announced header but of another size is no offer; it is replaced in the end."""
    for content in (DATA[:-1], DATA[:160], DATA + b"x"):
        (tmp_path / "snapshot.fsm").write_bytes(content)
        with SnapshotReceiver(tmp_path, metadata_of(DATA)) as receiver:
            assert (receiver.complete, receiver.offset) == (False, 0)
            feed(receiver)
            assert Path(receiver.finish()).read_bytes() == DATA


def test_an_older_complete_file_goes_when_the_newer_one_begins(tmp_path: Path) -> None:
    """The disk need not hold both: it stays until the first byte, and one that is not older stays until the end."""
    newer = SNAPSHOTS["newer and larger"]
    (tmp_path / "snapshot.fsm").write_bytes(DATA)
    with SnapshotReceiver(tmp_path, metadata_of(newer)) as receiver:
        assert (tmp_path / "snapshot.fsm").exists()
        receiver.write(0, newer[:1])
        assert os.listdir(tmp_path) == [PART]
        feed(receiver, newer)
        receiver.finish()
    for name, before in (("older", newer), ("of the same entry, smaller", DATA)):
        (tmp_path / "snapshot.fsm").write_bytes(before)
        with SnapshotReceiver(tmp_path, metadata_of(SNAPSHOTS[name])) as receiver:
            feed(receiver, SNAPSHOTS[name], stop=500)
            assert (tmp_path / "snapshot.fsm").read_bytes() == before
            feed(receiver, SNAPSHOTS[name])
            assert Path(receiver.finish()).read_bytes() == SNAPSHOTS[name], "the leader says so, and it was seen"


def test_a_newer_snapshot_that_came_meanwhile_stays(tmp_path: Path) -> None:
    """A writer of the same directory may be faster than the transfer: ``StaleSnapshotError``, and its file stays."""
    with SnapshotReceiver(tmp_path, metadata_of(DATA)) as receiver:
        feed(receiver)
        (tmp_path / "snapshot.fsm").write_bytes(SNAPSHOTS["newer and larger"])
        with pytest.raises(StaleSnapshotError):
            receiver.finish()
        receiver.discard()
    assert (tmp_path / "snapshot.fsm").read_bytes() == SNAPSHOTS["newer and larger"]


@pytest.mark.parametrize("call", ["finish", "discard", "write"])
def test_another_snapshot_in_the_place_of_the_offered_one_stays(tmp_path: Path, call: str) -> None:
    """Another writer puts a newer snapshot there after a receiver has looked: it is neither removed nor handed out."""
    with FastStateMachine(tmp_path / "state") as machine:
        for index in (1, 2, 3):
            machine.apply([(index, 1, put(b"key", b"%d" % index))])
        first = machine.write_snapshot(tmp_path / "first", (1, 1))
        second = machine.write_snapshot(tmp_path / "second", (2, 1))
        machine.write_snapshot(tmp_path / "in", (1, 1))
        with SnapshotReceiver(tmp_path / "in", second if call == "write" else first) as receiver:
            newest = machine.write_snapshot(tmp_path / "in")
            if call == "finish":
                with pytest.raises(StaleSnapshotError):
                    receiver.finish()
            elif call == "discard":
                receiver.discard()
            else:
                receiver.write(0, (tmp_path / "second" / "snapshot.fsm").read_bytes()[:200])
            with open_snapshot(tmp_path / "in") as snapshot:
                assert snapshot.metadata == newest


def test_the_old_loop_gets_somewhere_too(tmp_path: Path) -> None:
    """Without ``metadata`` at the start, ``finish(metadata)`` discards another's part, however much of it is there."""
    newer = SNAPSHOTS["newer and smaller"]
    with SnapshotReceiver(tmp_path) as receiver:
        feed(receiver, stop=len(newer) + 1)
        receiver.close()
    with SnapshotReceiver(tmp_path) as receiver:
        with pytest.raises(ChecksumMismatchError):
            receiver.finish(metadata_of(newer))
        feed(receiver, newer)
        receiver.finish(metadata_of(newer))


def test_metadata_of_another_kind_is_a_type_error(tmp_path: Path) -> None:
    """A tuple is not taken for metadata; nothing is made."""
    with pytest.raises(TypeError, match="expected a SnapshotMetadata, found tuple"):
        SnapshotReceiver(tmp_path / "in", (LogId(1, 1), bytes(32)))  # type: ignore[arg-type]
    assert not (tmp_path / "in").exists()


def odd(last_included: object, checksum: object) -> SnapshotMetadata:
    return SnapshotMetadata(last_included, checksum)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ("metadata", TypeError),
        (odd((1, 1), 32), TypeError),  # an int is no checksum of so many zeros
        (odd((1, 1), "c" * 32), TypeError),
        (odd((1, 1), None), TypeError),
        (odd(("1", 1), bytes(32)), TypeError),
        (odd((1.0, 1), bytes(32)), TypeError),
        (odd(7, bytes(32)), TypeError),
        (odd((1, 1), bytes(31)), SnapshotFormatError),
        (odd((-1, 1), bytes(32)), SnapshotFormatError),
        (odd((2**64, 1), bytes(32)), SnapshotFormatError),
    ],
)
def test_metadata_that_no_snapshot_can_have_is_refused(tmp_path: Path, metadata: Any, error: type[Exception]) -> None:
    """Wherever a caller hands it over: a typed error, and nothing that was received is discarded for it."""
    with pytest.raises(error):
        SnapshotReceiver(tmp_path / "none", metadata)
    assert not (tmp_path / "none").exists()
    with SnapshotReceiver(tmp_path / "in") as receiver:
        feed(receiver)
        with pytest.raises(error):
            receiver.finish(metadata)
        assert receiver.complete
        path = receiver.finish()
        with pytest.raises(error):
            receiver.finish(metadata)
    for machine in (MemoryStateMachine(), FastStateMachine(tmp_path / "state")):
        with pytest.raises(error):
            machine.install_snapshot(metadata, path)
        assert machine.last_applied() == LogId(0, 0)
        if isinstance(machine, FastStateMachine):
            machine.close()


def test_metadata_may_be_any_bytes_and_any_pair(tmp_path: Path) -> None:
    """A memoryview, a tuple, NumPy's integers: taken as what they stand for."""
    with SnapshotReceiver(tmp_path / "first") as receiver:
        feed(receiver)
        path = receiver.finish()
    known = open_snapshot(path).metadata
    given = odd(tuple(known.last_included), memoryview(bytearray(known.checksum)))
    with SnapshotReceiver(tmp_path / "second", given) as receiver:
        assert receiver.metadata == known
        feed(receiver)
        assert receiver.finish(given) == str(tmp_path / "second" / "snapshot.fsm")
