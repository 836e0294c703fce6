"""Disks that are really full, and a disk that really fails: file systems mounted for the tests, as root.

Without root these tests are skipped; `test_generation_faults.py` and `test_each_call.py` let calls fail one by one.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

import fastsm
from fastsm import Entry, FastStateMachine, LogId, RaftLog, StorageError, raft_log
from support.faulty import Disk, crash_copy
from support.inside import inside
from support.list_log import state_of as log_state
from support.permits import ext4, tmpfs
from support.simulation import kill

MIB = 1 << 20
Mounted = Callable[[Path], Iterator[Path]]


@contextmanager
def small_tmpfs(root: Path) -> Iterator[Path]:
    with tmpfs(root / "disk", 4 * MIB) as disk:
        yield disk


@contextmanager
def small_ext4(root: Path) -> Iterator[Path]:
    with ext4(root / "disk", root / "image", 8 * MIB) as disk:
        yield disk


def put(index: int, size: int) -> list[Entry]:
    return [Entry(index, 1, fastsm.put(b"key-%d" % (index % 50), bytes([index % 256]) * size))]


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill a disk, as other programs might, except for `leave` bytes."""
    filler = disk / "filler"
    for piece in (64 << 10, 4 << 10):
        with filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(piece))
    os.truncate(filler, max(0, filler.stat().st_size - leave))
    return filler


def state_of(machine: FastStateMachine) -> tuple[LogId, dict[bytes, bytes]]:
    return machine.last_applied(), dict(machine.items())


@pytest.mark.parametrize("mounted", [small_tmpfs, small_ext4], ids=["tmpfs", "ext4"])
@pytest.mark.parametrize("stores", [None, False], ids=["stored", "written"])
def test_a_full_disk_is_an_error_until_there_is_room(mounted: Mounted, stores: bool | None, tmp_path: Path) -> None:
    """A full disk is ENOSPC and leaves file and state unchanged; the machine continues when there is room."""
    outcomes: Counter[str] = Counter()
    with mounted(tmp_path) as disk:
        machine = FastStateMachine(
            disk / "state", auto_compact=False, retain_entries=0, _files=Disk(stores=stores).files
        )
        index = 0
        for round_ in range(12):
            filler = fill(disk, leave=(round_ * 24) << 10)
            size = (100, 5_000, 30_000, 200_000)[round_ % 4]
            for _ in range(2_000):
                before, log_size = state_of(machine), os.path.getsize(inside(machine).log.path)
                try:
                    machine.apply(put(index + 1, size))
                except StorageError as error:
                    outcomes[f"apply {errno.errorcode[error.errno]}"] += 1
                    break
                index += 1
            else:
                pytest.fail("the disk is never full")
            assert state_of(machine) == before
            assert os.path.getsize(inside(machine).log.path) == log_size
            copy = crash_copy(disk / "state", tmp_path / f"copy-{round_}")
            with FastStateMachine(copy) as killed:
                assert state_of(killed) == before
            for work in (partial(machine.write_snapshot, disk / "snapshots"), machine.compact):
                try:
                    work()
                except StorageError as error:
                    outcomes[f"snapshot {errno.errorcode[error.errno]}"] += 1
                assert state_of(machine) == before
            assert not list(disk.glob("snapshots/*.tmp"))
            filler.unlink()
            machine.flush()
            assert machine.apply(put(index + 1, size)) == [True]
            index += 1
            machine.flush()
            machine.compact(index)
            shutil.rmtree(disk / "snapshots", ignore_errors=True)
        before = state_of(machine)
        filler = fill(disk)
        machine.close()
        filler.unlink()
        with FastStateMachine(disk / "state", verify_on_open="full") as machine:
            inside(machine).check()
            assert state_of(machine) == before
    print(dict(outcomes))
    assert set(outcomes) == {"apply ENOSPC", "snapshot ENOSPC"}
    assert outcomes["apply ENOSPC"] == 12
    assert outcomes["snapshot ENOSPC"] >= 6


def test_a_full_disk_from_the_start_is_an_error(tmp_path: Path) -> None:
    """Opening a new directory on a full disk is a `StorageError`; when there is room the same directory opens."""
    with small_tmpfs(tmp_path) as disk:
        filler = fill(disk)
        with pytest.raises(StorageError) as caught:
            FastStateMachine(disk / "state")
        assert caught.value.errno == errno.ENOSPC
        filler.unlink()
        with FastStateMachine(disk / "state") as machine:
            assert machine.apply(put(1, 10)) == [True]


@pytest.mark.parametrize("mounted", [small_tmpfs, small_ext4], ids=["tmpfs", "ext4"])
@pytest.mark.parametrize("end", ["closed", "killed", "without LOCK's content"])
def test_a_directory_on_a_full_disk_can_be_opened(mounted: Mounted, end: str, tmp_path: Path) -> None:
    """A directory on a full disk can be opened and read, and a snapshot can be written to another disk."""
    with mounted(tmp_path) as disk:
        with FastStateMachine(disk / "state") as machine:
            for index in range(1, 40):
                machine.apply(put(index, 500))
            before = state_of(machine)
        if end == "killed":
            machine = FastStateMachine(disk / "state")
            machine.apply(put(40, 500))
            before = state_of(machine)
            kill(machine)
        elif end != "closed":
            os.truncate(disk / "state" / "LOCK", 0)
        fill(disk)
        machine = FastStateMachine(disk / "state")
        assert state_of(machine) == before
        metadata = machine.write_snapshot(tmp_path / "elsewhere")
        assert metadata.last_included == machine.last_applied() == machine.durable()
        assert machine.snapshot_metadata() == metadata
        with suppress(StorageError):
            machine.close()
        with FastStateMachine(disk / "state") as machine:
            assert state_of(machine) == before


@contextmanager
def failing_disk(root: Path) -> Iterator[tuple[Path, Path]]:
    """Mount an ext4 in a file on a tmpfs without room for its data: the block device fails, not the file system.

    Yield the mounted ext4 and its image.
    """
    with tmpfs(root / "below", 48 * MIB) as below, ext4(root / "disk", below / "image", 160 * MIB) as disk:
        os.sync()
        yield disk, below / "image"


@pytest.mark.parametrize("stores", [None, False], ids=["stored", "written"])
def test_durable_entries_survive_a_real_failed_sync(stores: bool | None, tmp_path: Path) -> None:
    """After a failed sync, a kill, a flush by the next process and a power loss, everything durable is there."""
    files = Disk(stores=stores).files
    with failing_disk(tmp_path) as (disk, image):
        machine = FastStateMachine(disk / "state", auto_compact=False, _files=files)
        for index in range(1, 6):
            machine.apply(put(index, 5_000))
        machine.flush()
        machine.apply(put(6, 4 * MIB))  # its blocks are allocated in the file system, but not on the device
        for index in range(7, 30):
            machine.apply(put(index, 5_000))
        filler = fill(image.parent)
        with pytest.raises(StorageError) as caught:
            machine.flush()
        assert caught.value.errno in (errno.EIO, errno.ENOSPC)
        assert machine.durable() == LogId(5, 1)
        with pytest.raises(StorageError, match="poisoned"):
            machine.apply(put(30, 10))
        assert machine.get(b"key-29") == bytes([29]) * 5_000
        state = state_of(machine)
        kill(machine)

        filler.unlink()
        machine = FastStateMachine(disk / "state", auto_compact=False, _files=files)
        assert state_of(machine) == state, "the page cache does not have everything"
        assert machine.durable() == LogId(5, 1)
        machine.flush()
        assert machine.durable() == LogId(29, 1)
        # The device's content without unsynced pages, as after a power loss.
        shutil.copy(image, tmp_path / "image-after")
        kill(machine)
    with ext4(tmp_path / "after", tmp_path / "image-after") as disk, FastStateMachine(
        disk / "state", expect_applied=LogId(29, 1), verify_on_open="full"
    ) as machine:
        assert state_of(machine) == state


# ---- the log ---------------------------------------------------------------------------------------------


def log_entries(log: RaftLog, size: int, count: int = 1) -> list[Entry]:
    first = log.last_index + 1
    return [Entry(index, 1, bytes([index % 256]) * size) for index in range(first, first + count)]


@pytest.mark.parametrize("mounted", [small_tmpfs, small_ext4], ids=["tmpfs", "ext4"])
@pytest.mark.parametrize("stores", [None, False], ids=["stored", "written"])
@pytest.mark.parametrize("segment_bytes", [100_000, 64 << 20])
def test_a_log_on_a_full_disk_is_compacted_and_goes_on(
    mounted: Mounted, stores: bool | None, segment_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is ENOSPC and leaves the log unchanged; it can still be compacted, closed and opened."""
    monkeypatch.setattr(raft_log, "SEGMENT_BYTES", segment_bytes)
    with mounted(tmp_path) as disk:
        log = RaftLog(disk / "log", _files=Disk(stores=stores).files)
        for round_ in range(8):
            filler = fill(disk, leave=(round_ * 24) << 10)
            size = (100, 5_000, 30_000, 200_000)[round_ % 4]
            for _ in range(5_000):
                before = log_state(log)
                try:
                    log.append(log_entries(log, size, 1 + round_ % 3))
                except StorageError as error:
                    refused = error.errno
                    break
            else:
                pytest.fail("the disk is never full")
            assert (refused, log_state(log)) == (errno.ENOSPC, before)
            copy = crash_copy(disk / "log", tmp_path / f"copy-{round_}")
            with RaftLog(copy) as killed:
                assert log_state(killed) == before
            log.sync()
            assert log.durable_index == log.last_index
            if log.last_index - log.first_index > 2:
                log.compact((log.last_index - 1, 1))
                log.sync()
                assert log.first_index == log.last_index
            if round_ % 2:  # closed and opened without any room
                before = log_state(log)
                log.close()
                log = RaftLog(disk / "log", _files=Disk(stores=stores).files)
                assert log_state(log) == before
            filler.unlink()
            log.save_hard_state(round_ + 1, b"me")
            log.append(log_entries(log, 10))
            log.sync()
        before = log_state(log)
        log.close()
        with RaftLog(disk / "log") as log:
            log.verify()
            assert log_state(log) == before


def test_durable_entries_of_a_log_survive_a_real_failed_sync(tmp_path: Path) -> None:
    """After a failed sync, a kill, a sync by the next process and a power loss, everything durable is in the log."""
    with failing_disk(tmp_path) as (disk, image):
        log = RaftLog(disk / "log")
        log.save_hard_state(3, b"me")
        log.append(log_entries(log, 5_000, 5))
        log.sync()
        log.append(log_entries(log, 4 * MIB))  # its blocks are allocated in the file system, but not on the device
        log.append(log_entries(log, 5_000, 20))
        filler = fill(image.parent)
        with pytest.raises(StorageError) as caught:
            log.save_hard_state(4, b"you")
        assert caught.value.errno in (errno.EIO, errno.ENOSPC)
        assert (log.durable_index, log.hard_state()) == (5, (3, b"me"))
        with pytest.raises(StorageError, match="poisoned"):
            log.append(log_entries(log, 10))
        kept = log.entries(1, 99)
        inside(log).abandon()

        filler.unlink()
        log = RaftLog(disk / "log")
        assert log.entries(1, 99) == kept, "the page cache does not have everything"
        assert log.hard_state() in ((3, b"me"), (4, b"you"))
        log.sync()
        assert log.durable_index == 26
        hard_state = log.hard_state()
        shutil.copy(image, tmp_path / "image-after")  # what the device holds now, and no page that was not synced
        inside(log).abandon()
    with ext4(tmp_path / "after", tmp_path / "image-after") as disk, RaftLog(disk / "log") as log:
        assert (log.entries(1, 99), log.hard_state()) == (kept, hard_state)
