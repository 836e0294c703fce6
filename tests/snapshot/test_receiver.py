"""A snapshot that arrives in pieces: in order, across restarts, and given out only when all of it is right."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsm import (
    ChecksumMismatchError,
    FastStateMachine,
    FormatVersionError,
    LockedError,
    LogId,
    MemoryStateMachine,
    Snapshot,
    SnapshotError,
    SnapshotFormatError,
    SnapshotMetadata,
    SnapshotReceiver,
    StaleSnapshotError,
    StorageError,
    open_snapshot,
    put,
)
from fastsm.disk.files import Directory
from fastsm.snapshot.model import snapshot_bytes
from support.faulty import Disk
from support.snapshots import open_files, some_state, with_field

DATA = snapshot_bytes(some_state(), "none", b"hello")
PART = "snapshot.fsm.part"


def feed(receiver: SnapshotReceiver, data: bytes = DATA, step: int = 100, stop: int | None = None) -> None:
    """Sends pieces from where the receiver is."""
    stop = len(data) if stop is None else stop
    while receiver.offset < stop:
        at = receiver.offset
        assert receiver.write(at, data[at : min(at + step, stop)]) == min(at + step, stop)


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize("step", [1, 7, 159, 160, 161, 100_000])
def test_pieces_of_any_size_make_the_file(tmp_path: Path, step: int, compress: str) -> None:
    """The path is that of a file with the sender's bytes; nothing else is left."""
    data = snapshot_bytes(some_state(), compress, b"hello")
    before = open_files()
    with SnapshotReceiver(tmp_path / "in") as receiver:
        assert (receiver.offset, receiver.size, receiver.progress) == (0, None, 0.0)
        feed(receiver, data, step)
        assert (receiver.size, receiver.progress) == (len(data), 1.0)
        path = receiver.finish()
        assert path == receiver.finish() == str(tmp_path / "in" / "snapshot.fsm")
        assert "finished" in repr(receiver)
    assert Path(path).read_bytes() == data
    assert os.listdir(tmp_path / "in") == ["snapshot.fsm"]
    assert open_files() <= before


def test_the_size_is_known_with_the_header(tmp_path: Path) -> None:
    """159 bytes do not tell, 160 do."""
    with SnapshotReceiver(tmp_path) as receiver:
        receiver.write(0, DATA[:159])
        assert receiver.size is None
        receiver.write(159, DATA[159:160])
        assert receiver.size == len(DATA)
        assert receiver.progress == 160 / len(DATA)


def test_a_new_receiver_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    """After any number of bytes that holds a header, closed or dropped, the next receiver knows offset and size."""
    for stop in range(0, len(DATA), 97):
        receiver = SnapshotReceiver(tmp_path)
        assert receiver.offset == (stop - 97 if stop - 97 >= 160 else 0)
        feed(receiver, stop=stop)
        if stop % 2:
            receiver.close()
            receiver.close()
        del receiver
    with SnapshotReceiver(tmp_path) as receiver:
        feed(receiver)
        assert Path(receiver.finish()).read_bytes() == DATA


def test_a_killed_receiver_goes_on(tmp_path: Path) -> None:
    """A kill leaves what was written, and no lock."""
    program = (
        "import os, sys, signal\nfrom fastsm import SnapshotReceiver\nr = SnapshotReceiver(sys.argv[1])\n"
        "r.write(0, sys.stdin.buffer.read())\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], input=DATA[:777], check=False)
    assert ended.returncode == -9
    with SnapshotReceiver(tmp_path) as receiver:
        assert receiver.offset == 777
        feed(receiver)
        receiver.finish()


def test_gaps_and_excess_are_refused(tmp_path: Path) -> None:
    """A gap, or a byte more than the header announces, is a ``SnapshotError`` with both numbers; nothing is taken."""
    with SnapshotReceiver(tmp_path) as receiver:
        with pytest.raises(SnapshotError, match="from 0 on, found one from 1"):
            receiver.write(1, DATA[1:])
        with pytest.raises(SnapshotError, match=f"{len(DATA)} bytes in all, found {len(DATA) + 1}"):
            receiver.write(0, DATA + b"x")
        assert receiver.offset == 0
        feed(receiver)
        with pytest.raises(SnapshotError, match="in all"):
            receiver.write(len(DATA), b"x")
        with pytest.raises(ValueError, match="from 0 on"):
            receiver.write(-1, b"x")
        assert receiver.write(len(DATA), b"") == len(DATA)
        receiver.finish()
        with pytest.raises(SnapshotError, match="complete"):
            receiver.write(0, DATA)


def test_a_repeated_piece_is_accepted_if_it_is_the_same(tmp_path: Path) -> None:
    """What came before may come again, byte for byte, also with more after it; other bytes are refused."""
    with SnapshotReceiver(tmp_path) as receiver:
        feed(receiver, stop=500)
        assert receiver.write(0, DATA[:500]) == receiver.write(100, DATA[100:300]) == 500
        for piece in (b"?" + DATA[101:300], DATA[100:499] + b"?", DATA[100:499] + b"?" + DATA[500:600]):
            with pytest.raises(SnapshotError, match="differs from what was received before"):
                receiver.write(100, piece)
        assert receiver.write(400, DATA[400:700]) == 700
        feed(receiver)
        assert Path(receiver.finish()).read_bytes() == DATA


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("magic", 7, SnapshotFormatError),
        ("version", 9, FormatVersionError),
        ("codec", 5, SnapshotFormatError),
        ("attachment size", 1 << 40, SnapshotFormatError),
        ("records size", 1 << 45, SnapshotFormatError),
        ("stored size", 1 << 63, SnapshotFormatError),
    ],
)
@pytest.mark.parametrize("first", [0, 100])
def test_a_hostile_header_is_refused_at_once(
    tmp_path: Path, name: str, value: int, error: type[Exception], first: int
) -> None:
    """As soon as it is there, and before anything after it is written; the transfer may then start over."""
    bad = with_field(DATA, name, value)
    with SnapshotReceiver(tmp_path) as receiver:
        if first:
            receiver.write(0, bad[:first])
        with pytest.raises(error):
            receiver.write(first, bad[first:300])
        assert (receiver.offset, receiver.size) == (0, None)
        assert os.listdir(tmp_path) == []
        feed(receiver)
        receiver.finish()


def test_finish_needs_every_byte(tmp_path: Path) -> None:
    """One byte short is a ``SnapshotError`` that says how many there are; what is there stays."""
    with SnapshotReceiver(tmp_path) as receiver:
        with pytest.raises(SnapshotError, match="found 0"):
            receiver.finish()
        feed(receiver, stop=len(DATA) - 1)
        with pytest.raises(SnapshotError, match=f"{len(DATA)} bytes, found {len(DATA) - 1}"):
            receiver.finish()
        feed(receiver)
        receiver.finish()


@pytest.mark.parametrize("at", [170, 600, len(DATA) - 1])
def test_a_wrong_byte_is_found_at_the_end_and_all_is_discarded(tmp_path: Path, at: int) -> None:
    """Pages lost with the power look like this: a ``ChecksumMismatchError``, and the transfer starts over."""
    with SnapshotReceiver(tmp_path) as receiver:
        feed(receiver)
    with open(tmp_path / PART, "r+b") as file:
        file.seek(at)
        file.write(bytes([DATA[at] ^ 1]))
    (tmp_path / "snapshot.fsm").write_bytes(b"older")
    with SnapshotReceiver(tmp_path) as receiver:
        assert receiver.offset == len(DATA)
        with pytest.raises(ChecksumMismatchError, match="get it again"):
            receiver.finish()
        assert receiver.offset == 0
        assert (tmp_path / "snapshot.fsm").read_bytes() == b"older"
        feed(receiver)
        assert Path(receiver.finish()).read_bytes() == DATA


def test_a_header_lost_with_the_power_starts_over(tmp_path: Path) -> None:
    """A partial file that begins with zeros, or is longer than it says, is no snapshot's beginning."""
    for content in (bytes(len(DATA)), DATA + b"x"):
        (tmp_path / PART).write_bytes(content)
        with SnapshotReceiver(tmp_path) as receiver:
            assert (receiver.offset, receiver.size) == (0, None)
    assert os.listdir(tmp_path) == []


def test_another_snapshot_than_announced_is_refused(tmp_path: Path) -> None:
    """With ``metadata`` the checksum and the last included entry must be those; else all is discarded."""
    (tmp_path / "file").write_bytes(DATA)
    with open_snapshot(tmp_path / "file") as snapshot:
        right = snapshot.metadata
    wrong = {
        SnapshotError: SnapshotMetadata(LogId(right.last_included.index + 1, 9), right.checksum),
        ChecksumMismatchError: SnapshotMetadata(right.last_included, bytes(32)),
    }
    with SnapshotReceiver(tmp_path / "in") as receiver:
        for error, metadata in wrong.items():
            feed(receiver)
            with pytest.raises(error):
                receiver.finish(metadata)
            assert receiver.offset == 0
        feed(receiver)
        assert receiver.finish(right) == receiver.finish(right)
        with pytest.raises(ChecksumMismatchError):
            receiver.finish(wrong[ChecksumMismatchError])


def test_two_receivers_exclude_each_other(tmp_path: Path) -> None:
    """The second one is a ``LockedError``, until the first is closed."""
    with SnapshotReceiver(tmp_path) as receiver:
        feed(receiver, stop=300)
        with pytest.raises(LockedError):
            SnapshotReceiver(tmp_path)
    SnapshotReceiver(tmp_path).close()


def test_discard_starts_over(tmp_path: Path) -> None:
    """Everything received is gone, and another snapshot may come; a finished one stays."""
    with SnapshotReceiver(tmp_path) as receiver:
        feed(receiver, stop=300)
        receiver.discard()
        receiver.discard()
        assert (receiver.offset, receiver.size, os.listdir(tmp_path)) == (0, None, [])
        feed(receiver)
        receiver.finish()
        receiver.discard()
    assert os.listdir(tmp_path) == ["snapshot.fsm"]


def test_a_closed_receiver_refuses(tmp_path: Path) -> None:
    """All but ``close`` is a ``SnapshotError``; an empty one leaves no file."""
    receiver = SnapshotReceiver(tmp_path)
    receiver.close()
    receiver.close()
    for use in (lambda: receiver.write(0, b""), receiver.finish, receiver.discard):
        with pytest.raises(SnapshotError, match="closed"):
            use()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_takes_nothing_and_the_piece_may_come_again(tmp_path: Path) -> None:
    """A write that fails is a ``StorageError``; the offset and the file are as they were."""
    disk = Disk()
    with SnapshotReceiver(tmp_path, _files=disk.files) as receiver:
        feed(receiver, stop=300)
        disk.fail("write", errno.ENOSPC, done=True)
        with pytest.raises(StorageError) as caught:
            receiver.write(300, DATA[300:400])
        assert caught.value.errno == errno.ENOSPC
        assert (receiver.offset, (tmp_path / PART).stat().st_size) == (300, 300)
        feed(receiver)
        receiver.finish()


def test_a_failed_sync_starts_over(tmp_path: Path) -> None:
    """What the disk holds is then unknown: a ``StorageError``, and everything is discarded."""
    disk = Disk()
    before = open_files()
    with SnapshotReceiver(tmp_path, _files=disk.files) as receiver:
        feed(receiver)
        disk.fail("sync")
        with pytest.raises(StorageError):
            receiver.finish()
        assert (receiver.offset, os.listdir(tmp_path)) == (0, [])
        feed(receiver)
        receiver.finish()
    assert open_files() <= before


def test_finished_is_durable(tmp_path: Path) -> None:
    """It is synced before it is renamed, and the directory after."""
    disk = Disk()
    with SnapshotReceiver(tmp_path, _files=disk.files) as receiver:
        feed(receiver)
        receiver.finish()
    order = [c.method for c in disk.calls if c.method in ("write", "sync", "rename", "sync_directory")]
    assert order[-4:] == ["write", "sync", "rename", "sync_directory"]


def test_the_disk_works_while_pieces_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every so many bytes there is a sync, so that the last one is short."""
    monkeypatch.setattr("fastsm.snapshot.receiver.SYNC_EVERY", 400)
    disk = Disk()
    with SnapshotReceiver(tmp_path, _files=disk.files) as receiver:
        feed(receiver)
        assert disk.count("sync") == len(DATA) // 400


# ---- a receiver that is told what it receives ----------------------------------------------------------


def metadata_of(data: bytes) -> SnapshotMetadata:
    index, term = int.from_bytes(data[16:24], "little"), int.from_bytes(data[24:32], "little")
    return SnapshotMetadata(LogId(index, term), data[128:160])


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


@pytest.fixture
def forked_child() -> Iterator[list[int]]:
    """Ids of children that the test has forked; they end with it."""
    children: list[int] = []
    yield children
    for pid in children:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("end", ["closed", "dropped", "finished", "discarded"])
def test_a_forked_child_keeps_no_lock(tmp_path: Path, forked_child: list[int], end: str) -> None:
    """In the child the receiver is closed; the parent's file stays, and a new receiver can go on at once."""
    receiver = SnapshotReceiver(tmp_path, metadata_of(DATA))
    feed(receiver, stop=len(DATA) if end == "finished" else 300)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            receiver.finish()
        except SnapshotError as error:
            receiver.close()
            os.write(writer, b"closed" if "closed" in str(error) else b"wrong")
        while True:
            os.read(reader, 0) or os.sched_yield()
    forked_child.append(pid)
    assert os.read(reader, 10) == b"closed"
    if end == "finished":
        receiver.finish()
    elif end == "discarded":
        receiver.discard()
    if end == "dropped":
        del receiver
    else:
        receiver.close()
    with SnapshotReceiver(tmp_path, metadata_of(DATA)) as again:
        assert again.offset == {"finished": len(DATA), "discarded": 0}.get(end, 300)
        feed(again)
        again.finish()
    os.close(reader)
    os.close(writer)


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


def test_finish_on_an_event_loop_leaves_the_loop_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop runs while the file is checked; every other call is refused meanwhile, and works afterwards."""
    checking, go_on = threading.Event(), threading.Event()

    def held(snapshot: Snapshot) -> None:
        checking.set()
        assert go_on.wait(60)

    monkeypatch.setattr(Snapshot, "verify", held)

    async def story() -> str:
        with SnapshotReceiver(tmp_path) as receiver:
            feed(receiver)
            finishing = asyncio.ensure_future(receiver.finish_async())
            while not checking.is_set():
                await asyncio.sleep(0.001)
            for call in (receiver.finish, receiver.discard, lambda: receiver.write(0, b"x")):
                with pytest.raises(SnapshotError, match="finish_async is running; await its end first"):
                    call()
            with pytest.raises(SnapshotError, match="finish_async is running"):
                await receiver.finish_async()
            go_on.set()
            path = await finishing
            assert receiver.finish() == path == await receiver.finish_async()
        return path

    assert Path(asyncio.run(story())).read_bytes() == DATA


def test_a_cancelled_finish_goes_on_and_close_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelling the await stops nothing: when ``close`` returns, the file has its name, and no thread has it open."""
    checking, go_on, verify = threading.Event(), threading.Event(), Snapshot.verify

    def held(snapshot: Snapshot) -> None:
        checking.set()
        assert go_on.wait(60)
        verify(snapshot)

    monkeypatch.setattr(Snapshot, "verify", held)

    async def story() -> None:
        with SnapshotReceiver(tmp_path) as receiver:
            feed(receiver)
            finishing = asyncio.ensure_future(receiver.finish_async())
            while not checking.is_set():
                await asyncio.sleep(0.001)
            finishing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await finishing
            go_on.set()

    asyncio.run(story())
    assert [path.name for path in tmp_path.iterdir() if path.name != "LOCK"] == ["snapshot.fsm"]
    assert (tmp_path / "snapshot.fsm").read_bytes() == DATA


def test_a_finish_that_fails_on_an_event_loop_may_be_tried_again(tmp_path: Path) -> None:
    """What ``finish`` raises, the await raises; the receiver is as after ``finish``."""

    async def story() -> None:
        with SnapshotReceiver(tmp_path) as receiver:
            feed(receiver, stop=len(DATA) - 1)
            with pytest.raises(SnapshotError, match="write the rest first"):
                await receiver.finish_async()
            feed(receiver)
            await receiver.finish_async()
        with pytest.raises(SnapshotError, match="is closed"):
            await receiver.finish_async()

    asyncio.run(story())
    assert (tmp_path / "snapshot.fsm").read_bytes() == DATA


@pytest.mark.parametrize("offset", [0.0, "0", None])
def test_an_offset_is_an_integer(tmp_path: Path, offset: object) -> None:
    """A float would be taken as far as it happens to compare, so nothing but an integer is."""
    with SnapshotReceiver(tmp_path) as receiver, pytest.raises(TypeError, match="integer"):
        receiver.write(offset, b"")  # type: ignore[arg-type]


def test_a_piece_is_any_buffer(tmp_path: Path) -> None:
    """Pieces of an array, every second byte of a buffer, and nothing at all in two dimensions are bytes, too."""
    with SnapshotReceiver(tmp_path) as receiver:
        assert receiver.write(np.int64(0), np.zeros((0, 5), np.uint8)) == 0
        twice = bytes(byte for byte in DATA[:400] for _ in range(2))
        assert receiver.write(0, memoryview(twice)[::2]) == 400
        assert receiver.write(400, np.frombuffer(DATA, np.uint8)[400:]) == len(DATA)
        assert Path(receiver.finish()).read_bytes() == DATA


@pytest.mark.parametrize("removed", [False, True])
def test_a_discard_that_fails_says_so_and_the_transfer_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    """The receiver then expects the first byte again, whether the part is gone or not; the same bytes complete it."""
    unlink = Directory.unlink

    def fail(directory: Directory, name: str) -> None:
        if removed:
            unlink(directory, name)
        raise OSError(errno.EIO, "the disk says no")

    with SnapshotReceiver(tmp_path) as receiver:
        feed(receiver, stop=500)
        with monkeypatch.context() as patch:
            patch.setattr(Directory, "unlink", fail)
            with pytest.raises(StorageError, match="the disk says no"):
                receiver.discard()
        assert (receiver.offset, receiver.complete) == (0, False)
        assert receiver.write(0, DATA[:100]) == (100 if removed else 500)
        feed(receiver)
        assert Path(receiver.finish()).read_bytes() == DATA


def test_a_finish_whose_last_sync_failed_is_not_durable_until_that_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call raises as long as the directory cannot be synced: a path is given only for a name that stays."""
    synced: list[str] = []

    def no_sync(directory: Directory) -> None:
        raise OSError(errno.EIO, "the disk says no")

    with SnapshotReceiver(tmp_path) as receiver:
        feed(receiver)
        with monkeypatch.context() as patch:
            patch.setattr(Directory, "sync_directory", no_sync)
            for _ in range(2):
                with pytest.raises(StorageError):
                    receiver.finish()
        monkeypatch.setattr(Directory, "sync_directory", lambda directory: synced.append(directory.path))
        assert Path(receiver.finish()).read_bytes() == DATA
        receiver.finish()
    assert synced == [str(tmp_path)]


def test_a_rename_that_reports_an_error_after_it_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next ``finish`` finds the file under its name, and leaves alone what another receiver does meanwhile."""
    rename = Directory.rename

    def do_and_fail(directory: Directory, source: str, target: str) -> None:
        rename(directory, source, target)
        raise OSError(errno.EIO, "the reply was lost")

    with SnapshotReceiver(tmp_path) as receiver:
        feed(receiver)
        with monkeypatch.context() as patch:
            patch.setattr(Directory, "rename", do_and_fail)
            with pytest.raises(StorageError, match="the reply was lost"):
                receiver.finish()
        with SnapshotReceiver(tmp_path) as another:
            feed(another, stop=300)
            assert Path(receiver.finish()).read_bytes() == DATA
            assert another.write(300, DATA[300:400]) == 400


@pytest.mark.parametrize("end", ["discard", "close"])
def test_another_receiver_s_part_stays(tmp_path: Path, end: str) -> None:
    """A receiver whose part was removed, and made again by another one, removes nothing."""
    with SnapshotReceiver(tmp_path) as receiver:
        if end == "discard":
            receiver.write(0, DATA[:100])
        (tmp_path / PART).unlink()
        with SnapshotReceiver(tmp_path) as other:
            other.write(0, DATA[:1000])
            getattr(receiver, end)()
            other.write(1000, DATA[1000:])
            assert Path(other.finish()).read_bytes() == DATA


@pytest.mark.parametrize("replaced", [False, True])
def test_a_part_that_somebody_removed_is_never_taken_for_another(tmp_path: Path, replaced: bool) -> None:
    """``finish`` says so, whatever has the name by now, and the transfer starts over."""
    with SnapshotReceiver(tmp_path) as receiver:
        feed(receiver)
        (tmp_path / PART).unlink()
        if replaced:
            (tmp_path / PART).write_bytes(b"something else")
        with pytest.raises(SnapshotError, match="removed or replaced it; the transfer starts over"):
            receiver.finish()
        assert receiver.offset == 0
        assert not (tmp_path / "snapshot.fsm").exists()
        feed(receiver)
        assert Path(receiver.finish()).read_bytes() == DATA
