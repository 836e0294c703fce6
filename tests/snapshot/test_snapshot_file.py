"""A snapshot's file: it is read as it was written, in little memory, and anything wrong in it is noticed."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import tracemalloc
from pathlib import Path

import pytest

import fastsm
from fastsm import (
    ChecksumMismatchError,
    FormatVersionError,
    LogId,
    Snapshot,
    SnapshotError,
    SnapshotFormatError,
    StorageError,
    open_snapshot,
)
from fastsm.snapshot.file import copy_checked, flat_state_checksum
from fastsm.snapshot.model import CONFIG, PUT, State, record, snapshot_bytes
from fastsm.snapshot.writer import write_snapshot_file
from support.snapshots import (
    FIELDS,
    StateSource,
    assemble,
    check,
    field,
    file_of,
    open_files,
    sealed,
    some_state,
    with_field,
)

TYPED = (SnapshotError, FormatVersionError)


# ---- written and read back -----------------------------------------------------------------------------

@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize("attachment", [b"", b"x", b"12345678", bytes(1000)])
@pytest.mark.parametrize("state", [State(), some_state(membership=False), some_state(50)], ids=["0", "plain", "all"])
def test_a_snapshot_is_read_as_it_was_written(tmp_path: Path, state: State, attachment: bytes, compress: str) -> None:
    """A snapshot is read with the metadata, attachment and membership that were written, and verifies."""
    metadata = write_snapshot_file(tmp_path / "a" / "b", StateSource(state), compress=compress, attachment=attachment)
    with open_snapshot(tmp_path / "a" / "b") as snapshot:
        assert isinstance(snapshot, Snapshot)
        assert snapshot.metadata == metadata
        assert snapshot.metadata.last_included == state.last
        assert snapshot.attachment == attachment
        assert snapshot.membership == state.membership
        assert (snapshot.keys, snapshot.codec) == (len(state.values), compress)
        assert snapshot.size == (tmp_path / "a" / "b" / "snapshot.fsm").stat().st_size
        told: list[tuple[int, int]] = []
        snapshot.verify(lambda done, total: told.append((done, total)))
        assert told[-1][0] == told[-1][1]
        assert str(snapshot.keys) in repr(snapshot)


def test_the_writer_and_the_model_write_the_same_bytes(tmp_path: Path) -> None:
    """With the codec none, the writer and the model write the same bytes of the same state."""
    for seed in range(5):
        state = some_state(10 * seed, seed=seed)
        write_snapshot_file(tmp_path, StateSource(state), attachment=b"mine")
        assert (tmp_path / "snapshot.fsm").read_bytes() == snapshot_bytes(state, "none", b"mine")


def test_state_checksums_are_equal_whatever_the_codec_and_the_attachment(tmp_path: Path) -> None:
    """``state_checksum`` covers only the state, ``checksum`` the whole file."""
    sums, state_sums = set(), set()
    for compress in ("none", "zstd"):
        for attachment in (b"", b"other"):
            write_snapshot_file(tmp_path, StateSource(some_state()), compress=compress, attachment=attachment)
            with open_snapshot(tmp_path) as snapshot:
                sums.add(snapshot.metadata.checksum)
                state_sums.add(snapshot.state_checksum)
                assert flat_state_checksum(snapshot.head, snapshot.flat_pieces()) == snapshot.state_checksum
    assert (len(sums), len(state_sums)) == (4, 1)


def test_the_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    """Missing parents are made; the last directory has mode 0700 and the file 0600."""
    write_snapshot_file(tmp_path / "x" / "y" / "z", StateSource(some_state()))
    assert (tmp_path / "x" / "y" / "z").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "x" / "y" / "z" / "snapshot.fsm").stat().st_mode & 0o777 == 0o600


def test_read_at_gives_the_file_in_pieces(tmp_path: Path) -> None:
    """``read_at`` returns the file in pieces, and nothing after its end; a negative offset or size is an error."""
    data = file_of(tmp_path / "file").read_bytes()
    with open_snapshot(tmp_path / "file") as snapshot:
        assert b"".join(snapshot.read_at(at, 100) for at in range(0, len(data), 100)) == data
        assert snapshot.read_at(0, 1 << 60) == data
        assert snapshot.read_at(len(data), 10) == snapshot.read_at(1 << 70, 1) == snapshot.read_at(0, 0) == b""
        for offset, size in ((-1, 1), (0, -1)):
            with pytest.raises(ValueError, match="from 0 on"):
                snapshot.read_at(offset, size)


def test_a_closed_snapshot_refuses(tmp_path: Path) -> None:
    """After ``close``, which may be repeated, reading is a ``SnapshotError``, and the descriptor is closed."""
    before = open_files()
    snapshot = open_snapshot(file_of(tmp_path / "file"))
    snapshot.close()
    snapshot.close()
    assert open_files() <= before
    for use in (snapshot.verify, lambda: snapshot.attachment, lambda: snapshot.membership,
                lambda: snapshot.read_at(0, 1)):
        with pytest.raises(SnapshotError, match="closed"):
            use()
    assert "closed" in repr(snapshot)


# ---- not a snapshot ------------------------------------------------------------------------------------

def test_only_a_regular_file_is_a_snapshot(tmp_path: Path) -> None:
    """A symbolic link, a FIFO, a socket, a device or a directory is immediately a ``SnapshotFormatError``."""
    file_of(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dir" / "snapshot.fsm").mkdir(parents=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    before = open_files()
    for name in ("link", "fifo", "dir", "socket", "/dev/zero"):
        with pytest.raises(SnapshotFormatError, match="regular file"):
            open_snapshot(tmp_path / name)
    listening.close()
    assert open_files() <= before - 1


def test_a_path_without_a_file_is_a_storage_error(tmp_path: Path) -> None:
    """A missing file is a ``StorageError`` with ENOENT."""
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "no" / "thing"):
        with pytest.raises(StorageError) as caught:
            open_snapshot(path)
        assert caught.value.errno == errno.ENOENT
    with pytest.raises(SnapshotError):
        open_snapshot("a\0b")


def test_a_sparse_file_of_a_tebibyte_is_refused_by_its_sizes(tmp_path: Path) -> None:
    """A sparse file of a tebibyte is refused in less than 1 MiB of memory, whatever its header says."""
    data = file_of(tmp_path / "file").read_bytes()
    tebibyte = 1 << 40
    claims: list[dict[str, int]] = [
        {},
        {"attachment size": tebibyte - 160 - field(data, "stored size")},
        {"stored size": tebibyte - 168},
        {"stored size": tebibyte - 168, "codec": 1},
        {"records size": tebibyte, "stored size": tebibyte - 168},
        {"runs": tebibyte // 24},
        {"membership size": tebibyte},
    ]
    for claim in claims:
        changed = data
        for name, value in claim.items():
            changed = with_field(changed, name, value)
        (tmp_path / "file").write_bytes(changed)
        os.truncate(tmp_path / "file", tebibyte)
        tracemalloc.start()
        with pytest.raises(SnapshotFormatError):
            open_snapshot(tmp_path / "file")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


# ---- damage --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_no_flipped_byte_goes_unnoticed(tmp_path: Path, compress: str) -> None:
    """Every flipped byte of an 8 KiB snapshot is a typed error; after the header it is a wrong checksum."""
    state = State()
    for i in range(18):
        state.seen.append(LogId(i + 1, 1))
        state.put(state.last, b"key %d" % i, random.Random(i).randbytes(400))
    data = file_of(tmp_path / "file", state, compress).read_bytes()
    assert 7000 < len(data) < 9000
    fd = os.open(tmp_path / "file", os.O_RDWR)
    for at in range(len(data)):
        os.pwrite(fd, bytes([data[at] ^ 0x10]), at)
        with pytest.raises(ChecksumMismatchError if at >= 160 else TYPED):
            check(tmp_path / "file")
        os.pwrite(fd, data[at : at + 1], at)
    os.close(fd)
    check(tmp_path / "file")


def test_no_cut_goes_unnoticed(tmp_path: Path) -> None:
    """A file cut at any length, or longer by a byte, is a ``SnapshotFormatError``."""
    data = file_of(tmp_path / "file", some_state(100)).read_bytes()
    for size in range(len(data) - 1, -1, -1):
        os.truncate(tmp_path / "file", size)
        with pytest.raises(SnapshotFormatError):
            open_snapshot(tmp_path / "file")
    (tmp_path / "file").write_bytes(data + b"\0")
    with pytest.raises(SnapshotFormatError):
        open_snapshot(tmp_path / "file")


def test_a_file_that_is_cut_while_it_is_read_is_a_format_error(tmp_path: Path) -> None:
    """A file that is cut after it was opened is a ``SnapshotFormatError`` of the next read."""
    path = file_of(tmp_path / "file")
    with open_snapshot(path) as snapshot:
        os.truncate(path, 300)
        for use in (snapshot.verify, lambda: snapshot.read_at(0, snapshot.size)):
            with pytest.raises(SnapshotFormatError, match="while it was read"):
                use()


def test_a_checked_copy_hands_over_what_it_checked(tmp_path: Path) -> None:
    """``copy_checked`` passes on every byte once, in order, and raises if they do not match the header."""
    path = file_of(tmp_path / "file")
    parts: list[bytes] = []
    with open_snapshot(path) as snapshot:
        fd = snapshot.descriptor
        copy_checked(fd, snapshot.head, "file", lambda piece: parts.append(bytes(piece)))
        assert b"".join(parts) == path.read_bytes()
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with pytest.raises(ChecksumMismatchError):
            copy_checked(fd, snapshot.head, "file")
        path.write_bytes(snapshot_bytes(some_state(), "none", b"HELLO"))
        with pytest.raises(SnapshotFormatError, match="changed"):
            copy_checked(fd, snapshot.head, "file")


# ---- forgeries: the checksums are correct --------------------------------------------------------------

NUMBERS = [0, 1, 7, 8, 24, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 39, 1 << 63, (1 << 64) - 1]


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_false_header_field_is_found(tmp_path: Path, name: str, compress: str) -> None:
    """A false number in any field of the header, with matching checksums, is a typed error."""
    state = some_state()
    data = snapshot_bytes(state, compress, b"hello")
    flat = snapshot_bytes(state, "none", b"")[160:]
    true = field(data, name)
    largest = 1 << 8 * struct.calcsize(FIELDS[name][1])
    for number in {*NUMBERS, true - 8, true - 1, true + 1, true + 8}:
        if number == true or not 0 <= number < largest:
            continue
        if name == "attachment size" and true < number <= 8:
            continue  # not false: the zeros may be part of an attachment
        if name == "clock" and number < 2**63:
            continue  # not false either: nothing else records the time
        lying = sealed(with_field(data, name, number), state_sum=name != "state checksum", flat=flat)
        (tmp_path / "file").write_bytes(lying)
        with pytest.raises(TYPED):
            check(tmp_path / "file")


def put(index: int, key: bytes = b"k", value: bytes = b"v") -> bytes:
    return record(PUT, index, key, value)


def patched(data: bytes, at: int, byte: int) -> bytes:
    return data[:at] + bytes([byte]) + data[at + 1 :]


LAST = LogId(9, 3)
RUNS = [(2, 4, 1), (7, 9, 3)]
HOSTILE: dict[str, tuple[list[tuple[int, int, int]], list[bytes], bytes]] = {
    "runs that overlap": ([(2, 7, 1), (7, 9, 3)], [], b""),
    "runs that descend": ([(7, 8, 1), (2, 9, 3)], [], b""),
    "a run that is empty": ([(5, 4, 1), (7, 9, 3)], [], b""),
    "a run from index 0": ([(0, 4, 1), (7, 9, 3)], [], b""),
    "a term that does not rise": ([(2, 4, 3), (7, 9, 3)], [], b""),
    "a term that falls": ([(2, 4, 4), (7, 9, 3)], [], b""),
    "a last run that ends before": ([(2, 4, 1), (7, 8, 3)], [], b""),
    "a last run that ends after": ([(2, 4, 1), (7, 10, 3)], [], b""),
    "a last run of another term": ([(2, 4, 1), (7, 9, 2)], [], b""),
    "a run up to the largest number": ([(2, (1 << 64) - 1, 3)], [], b""),
    "no runs": ([], [], b""),
    "a record before the runs": (RUNS, [put(1)], b""),
    "a record of entry 0": (RUNS, [put(0)], b""),
    "a record in a gap": (RUNS, [put(5)], b""),
    "a record after the runs": (RUNS, [put(10)], b""),
    "a record of the largest index": (RUNS, [put((1 << 64) - 1)], b""),
    "indexes that fall": (RUNS, [put(8), put(7)], b""),
    "a delete": (RUNS, [record(2, 8, b"k", b"")], b""),
    "a config among the records": (RUNS, [record(3, 8, b"", b"v")], b""),
    "a clock among the records": (RUNS, [record(9, 8, b"", b"\1" + bytes(7))], b""),
    "an unknown operation": (RUNS, [record(10, 8, b"k", b"v")], b""),
    "a byte that promises a deadline": (RUNS, [patched(put(8), 15, 1)], b""),
    "a byte that promises two deadlines": (RUNS, [patched(record(PUT, 8, b"k", b"v", 5), 15, 2) + bytes(8)], b""),
    "a deadline out of range": (RUNS, [record(PUT, 8, b"k", b"v", 2**63)], b""),
    "a deadline cut short": (RUNS, [record(PUT, 8, b"k", b"v", 5)[:-8]], b""),
    "a session with a deadline at its end": (RUNS, [record(6, 8, bytes(8), bytes(16), 5)], b""),
    "a touch with a value": (RUNS, [put(8), record(8, 9, b"k", b"v", 5)], b""),
    "a touch out of range": (RUNS, [put(8), record(8, 9, b"k", b"", 2**63)], b""),
    "padding that is not zero": (RUNS, [patched(put(8), 18, 1), put(9)], b""),
    "the last padding not zero": (RUNS, [put(8), patched(put(9), 23, 1)], b""),
    "a value beyond the end": (RUNS, [patched(put(8), 9, 1)], b""),
    "a value beyond any limit": (RUNS, [patched(put(8), 11, 0xFF)], b""),
    "a key beyond the end": (RUNS, [patched(put(8), 13, 1)], b""),
    "a record and a half": (RUNS, [put(8), put(9)[:8]], b""),
    "two records that count as one": (RUNS, [put(8) + put(9)], b""),
    "a membership in a gap": (RUNS, [], record(CONFIG, 5, b"", b"m")),
    "a membership of entry 0": (RUNS, [], record(CONFIG, 0, b"", b"m")),
    "a membership with a key": (RUNS, [], record(CONFIG, 8, b"k", b"m")),
    "a membership that is a put": (RUNS, [], record(PUT, 8, b"", b"m")),
    "a membership with a tail": (RUNS, [], record(CONFIG, 8, b"", b"m") + bytes(8)),
    "a membership cut short": (RUNS, [], record(CONFIG, 8, b"", b"m" * 9)[:-8]),
    "a membership padded with ones": (RUNS, [], patched(record(CONFIG, 8, b"", b"m"), 20, 1)),
    "a membership beyond any limit": (RUNS, [], patched(record(CONFIG, 8, b"", b"m"), 11, 0xFF)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_state_that_makes_no_sense_is_found(tmp_path: Path, name: str) -> None:
    """Parts that contradict each other are a ``SnapshotFormatError``, although every checksum matches."""
    runs, records, membership = HOSTILE[name]
    (tmp_path / "file").write_bytes(assemble(LAST, runs, records, membership))
    with pytest.raises(SnapshotFormatError):
        check(tmp_path / "file")
    machine = fastsm.MemoryStateMachine()
    with pytest.raises(SnapshotFormatError):
        machine.install_snapshot(None, tmp_path / "file")
    assert machine.last_applied() == LogId()


def test_the_table_of_hostile_states_starts_from_a_good_one(tmp_path: Path) -> None:
    """The parts that the forged states are made of pass without the changes."""
    members = record(CONFIG, 8, b"", b"m")
    (tmp_path / "file").write_bytes(assemble(LAST, RUNS, [put(2), put(4, b"a"), put(9, b"b"), put(9, b"c")], members))
    with open_snapshot(tmp_path / "file") as snapshot:
        snapshot.verify()
        assert snapshot.membership == (LogId(8, 3), b"m")


def test_records_are_followed_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are checked correctly, whatever size the pieces have in which the file is read."""
    good = assemble(LAST, RUNS, [put(2, b"k" * 9, b"v" * 30), put(8, b"", b""), put(9)], record(CONFIG, 8, b"", b"m"))
    bad = sealed(patched(good, len(good) - 1, 1))
    for size in range(200, 60, -1):
        monkeypatch.setattr("fastsm.snapshot.file.PIECE", size if size > 160 else 160)
        (tmp_path / "file").write_bytes(good)
        with open_snapshot(tmp_path / "file") as snapshot:
            monkeypatch.setattr("fastsm.snapshot.file.copy_checked", lambda *_: None)
            monkeypatch.setattr("fastsm.snapshot.file.PIECE", size - 60)
            snapshot.verify()
        (tmp_path / "file").write_bytes(bad)
        with open_snapshot(tmp_path / "file") as snapshot, pytest.raises(SnapshotFormatError):
            snapshot.verify()
