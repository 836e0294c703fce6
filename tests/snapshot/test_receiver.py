"""A snapshot that arrives in pieces: in order, across restarts, and given out only when all of it is right."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastsm import (
    ChecksumMismatchError,
    FormatVersionError,
    LockedError,
    LogId,
    SnapshotError,
    SnapshotFormatError,
    SnapshotMetadata,
    SnapshotReceiver,
    StorageError,
    open_snapshot,
)
from fastsm.snapshot.model import snapshot_bytes
from support.faulty import Disk
from support.receiving import DATA, PART, feed, metadata_of
from support.snapshots import open_files, some_state, with_field


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
