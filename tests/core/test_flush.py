"""Flush: what is durable when, one sync for many flushes, and the effect of a failing disk."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import Entry, FastStateMachine, LogId, StorageError
from fastsm.disk.files import Directory
from support.faulty import Disk, crash_copy, in_thread

Opener = Callable[..., FastStateMachine]


def put(index: int, size: int = 10, term: int = 1) -> list[Entry]:
    """Return a chunk of one put."""
    return [Entry(index, term, fastsm.put(b"key-%d" % index, b"v" * size))]


def close_poisoned(machine: FastStateMachine) -> None:
    """Close a poisoned machine, which releases everything and then raises the error of its sync."""
    with pytest.raises(StorageError):
        machine.close()
    assert not machine.is_running()


# ---- what is durable when -------------------------------------------------------------------------------


def test_durable_moves_to_where_the_log_ended_when_the_sync_began(directory: Path, machine_at: Opener) -> None:
    """What is applied during a sync is not made durable by that sync."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    gate = disk.hold("sync")
    with in_thread(machine.flush):
        gate.wait()
        machine.apply(put(2))
        assert machine.get(b"key-2") == b"v" * 10
        assert machine.durable() == LogId(0, 0)
        gate.open()
    assert machine.durable() == LogId(1, 1)
    assert machine.last_applied() == LogId(2, 1)
    machine.flush()
    assert machine.durable() == LogId(2, 1)


def test_a_chunk_whose_writeback_fails_is_not_in_the_log(directory: Path, machine_at: Opener) -> None:
    """If starting the writeback of earlier frames fails, the chunk that triggered it is not applied."""
    failing, sizes = [True], []

    class Files(Directory):
        def start_writeback(self, *arguments: Any) -> None:
            if failing.pop():
                raise MemoryError("planted")

    machine = machine_at(directory, _files=Files)

    def apply_some() -> None:
        for index in range(1, 100):
            sizes.append(machine.stats().log_bytes)
            machine.apply(put(index, 100_000))

    with pytest.raises(MemoryError, match="planted"):
        apply_some()
    index = len(sizes)
    assert machine.last_applied() == LogId(index - 1, 1)
    assert machine.stats().log_bytes == sizes[-1]
    failing[:] = [False] * 100
    machine.apply(put(index, 100_001))
    machine.close()
    for table in directory.glob("table-*"):
        table.unlink()
    assert len(machine_at(directory).get(b"key-%d" % index) or b"") == 100_001


@pytest.mark.parametrize("size", [4000, 100_000], ids=["stored", "written"])
def test_the_system_begins_to_write_what_a_late_flush_will_wait_for(
    directory: Path, machine_at: Opener, size: int
) -> None:
    """Writeback is started piece by piece, once for each byte, and never for a page that may still be stored into."""
    begun: list[tuple[int, int, int]] = []

    class Files(Directory):
        def start_writeback(self, descriptor: Any, offset: int, length: int) -> None:
            begun.append((offset, length, machine.stats().log_bytes))
            Directory.start_writeback(descriptor, offset, length)

    machine = machine_at(directory, _files=Files)
    for index in range(1, 16_000_000 // size):
        machine.apply(put(index, size))
    assert len(begun) > 5
    for (offset, length, _), (following, _, _) in pairwise(begun):
        assert offset + length == following
    for offset, length, log_bytes in begun:
        assert (offset + length) % resource.getpagesize() == 0
        assert offset + length <= log_bytes
    machine.flush()
    told = len(begun)
    machine.apply(put(machine.last_applied().index + 1, size))
    assert len(begun) == told


def test_watermark_of_a_frame_written_during_a_sync_does_not_claim_that_sync(
    directory: Path, tmp_path: Path, machine_at: Opener
) -> None:
    """A frame records what was durable when it was written, not what a running sync will make durable."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    gate = disk.hold("sync")
    with in_thread(machine.flush):
        gate.wait()
        machine.apply(put(2))
        gate.open()
    with FastStateMachine(crash_copy(directory, tmp_path / "copy")) as copy:
        assert copy.durable() == LogId(0, 0)
        assert copy.last_applied() == LogId(2, 1)


def test_flush_covers_everything_applied_before_the_call(directory: Path, machine_at: Opener) -> None:
    """A flush that is called during another one's sync waits for a sync that began after the call."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    disk.forget()
    gate = disk.hold("sync")
    with in_thread(machine.flush):
        gate.wait()
        machine.apply(put(2))
        with in_thread(machine.flush) as second:
            assert not second.done
            gate.open()
    assert second.error is None
    assert machine.durable() == LogId(2, 1)
    assert disk.count("sync") == 2


def test_overlapping_flushes_share_one_sync(directory: Path, machine_at: Opener) -> None:
    """However many flushes wait during a sync, one more sync serves all of them."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    disk.forget()
    gate = disk.hold("sync")
    with ExitStack() as threads:
        first = threads.enter_context(in_thread(machine.flush))
        gate.wait()
        machine.apply(put(2))
        started = threading.Barrier(9)

        def flush() -> None:
            started.wait()
            machine.flush()

        others = [threads.enter_context(in_thread(flush)) for _ in range(8)]
        started.wait()
        gate.open()
    assert [outcome.error for outcome in (first, *others)] == [None] * 9
    assert machine.durable() == LogId(2, 1)
    assert disk.count("sync") == 2


def test_flush_with_nothing_new_does_not_sync(directory: Path, machine_at: Opener) -> None:
    """A flush right after a flush makes no sync."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    machine.flush()
    disk.forget()
    machine.flush()
    machine.save_hard_state()
    assert disk.calls == []


def test_sync_on_apply_is_durable_when_apply_returns(directory: Path, machine_at: Opener) -> None:
    """With sync="apply" each chunk is synced before it is visible."""
    disk = Disk()
    machine = machine_at(directory, sync="apply", _files=disk.files)
    disk.forget()
    gate = disk.hold("sync")
    with in_thread(lambda: machine.apply(put(1))) as outcome:
        gate.wait()
        assert machine.get(b"key-1") is None
        assert machine.last_applied() == machine.durable() == LogId(0, 0)
        assert machine.entry_term(1) is None
        gate.open()
    assert outcome.value == [True]
    assert machine.get(b"key-1") == b"v" * 10
    assert machine.last_applied() == machine.durable() == LogId(1, 1)
    assert disk.count("sync") == 1


def test_flush_claims_nothing_that_no_frame_carries(
    directory: Path, tmp_path: Path, machine_at: Opener
) -> None:
    """An id noted while a flush determines what it covers is not reported as durable by it."""

    class Late(FastStateMachine):
        """Another thread's update comes at the worst moment: just before the flush reads the position."""

        def _position(self) -> Any:
            if self.last_applied().index == 1:
                self.update_last_applied(LogId(2, 1))
            return super()._position()

    with Late(directory) as machine:
        machine.apply(put(1))
        machine.flush()
        durable = machine.durable()
        with FastStateMachine(crash_copy(directory, tmp_path / "copy")) as copy:
            assert durable <= copy.last_applied()


# ---- failed syncs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_failed_sync_poisons(code: int, directory: Path, machine_at: Opener) -> None:
    """After a failed sync reads work, every write raises with the errno, and the sync is never retried."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    machine.flush()
    machine.apply(put(2))
    disk.forget()
    disk.fail("sync", code)
    with pytest.raises(StorageError) as caught:
        machine.flush()
    assert caught.value.errno == code
    assert caught.value.filename == str(directory / "log-1")
    calls = len(disk.calls)
    for write in (
        lambda: machine.apply(put(3)),
        lambda: machine.apply([]),
        machine.flush,
        machine.save_hard_state,
        machine.clear,
        machine.stop,
        lambda: machine.update_last_applied(LogId(3, 1)),
        lambda: machine.persist_last_applied(LogId(3, 1)),
    ):
        with pytest.raises(StorageError, match="poisoned") as caught:
            write()
        assert caught.value.errno == code
    assert len(disk.calls) == calls
    assert machine.is_running()
    assert machine.get_many([b"key-1", b"key-2", b"key-3"]) == [b"v" * 10, b"v" * 10, None]
    assert machine.last_applied() == LogId(2, 1)
    assert machine.durable() == LogId(1, 1)
    assert machine.stats().durable == LogId(1, 1)
    close_poisoned(machine)
    assert disk.count("sync") == 1


def test_reopening_after_a_failed_sync_writes_again_what_is_after_the_watermark(
    directory: Path, machine_at: Opener
) -> None:
    """The page cache is not trusted after a failed sync: the first flush of the next opening rewrites everything."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    machine.flush()
    start = machine.stats().log_bytes
    machine.apply(put(2))
    machine.apply(put(3, 9000))
    end = machine.stats().log_bytes
    disk.fail("sync")
    with pytest.raises(StorageError):
        machine.flush()
    close_poisoned(machine)

    with machine_at(directory, _files=disk.files) as machine:
        assert machine.last_applied() == LogId(3, 1)
        assert machine.durable() == LogId(1, 1)
        content = (directory / "log-1").read_bytes()
        disk.forget()
        machine.flush()
        assert [call.method for call in disk.calls] == ["write", "sync"]
        assert disk.calls[0].arguments[1:] == (content[start:end], start)
        assert machine.durable() == LogId(3, 1)


def test_failed_sync_fails_everybody_who_waits_and_is_not_retried(directory: Path, machine_at: Opener) -> None:
    """Flushes that wait for a sync raise if it fails; none of them syncs again."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    disk.forget()
    disk.fail("sync")
    gate = disk.hold("sync")
    with ExitStack() as threads:
        outcomes = [threads.enter_context(in_thread(machine.flush))]
        gate.wait()
        outcomes += [threads.enter_context(in_thread(machine.flush)) for _ in range(4)]
        gate.open()
    assert [type(outcome.error) for outcome in outcomes] == [StorageError] * 5
    assert disk.count("sync") == 1
    assert machine.durable() == LogId(0, 0)
    close_poisoned(machine)


def test_failed_sync_on_apply_publishes_nothing(directory: Path, tmp_path: Path, machine_at: Opener) -> None:
    """With sync="apply" a chunk whose sync failed is not visible; on reopening it is there completely or not at all."""
    disk = Disk()
    machine = machine_at(directory, sync="apply", _files=disk.files)
    machine.apply(put(1))
    disk.fail("sync")
    with pytest.raises(StorageError):
        machine.apply([*put(2), *put(3)])
    assert machine.get_many([b"key-1", b"key-2", b"key-3"]) == [b"v" * 10, None, None]
    assert machine.last_applied() == machine.durable() == LogId(1, 1)
    assert (machine.len(), machine.entry_term(2)) == (1, None)
    with pytest.raises(StorageError, match="poisoned"):
        machine.apply(put(2))
    with FastStateMachine(crash_copy(directory, tmp_path / "copy")) as copy:
        assert copy.last_applied() in (LogId(1, 1), LogId(3, 1))
        assert copy.len() == copy.last_applied().index
        assert copy.durable() == LogId(1, 1)
    close_poisoned(machine)


def test_a_shared_sync_that_fails_raises_for_every_waiting_caller(directory: Path, machine_at: Opener) -> None:
    """Concurrent callers share one sync, because the system reports an error to only one of two concurrent syncs."""
    disk = Disk()
    machine = machine_at(directory, sync="apply", _files=disk.files)
    machine.apply(put(1))
    machine.update_last_applied(LogId(2, 1))
    gate = disk.hold("sync")
    disk.fail("sync")
    with in_thread(machine.flush) as flush:
        gate.wait()
        with in_thread(lambda: machine.apply(put(3))) as apply:
            gate.open()
    assert isinstance(flush.error, StorageError)
    assert isinstance(apply.error, StorageError)
    assert machine.durable() == LogId(1, 1)
    assert machine.get(b"3") is None
    close_poisoned(machine)


def test_write_of_suspect_bytes_that_fails_poisons(directory: Path, tmp_path: Path, machine_at: Opener) -> None:
    """If the bytes after the watermark cannot be rewritten, nothing becomes durable, and writes fail."""
    with FastStateMachine(directory) as machine:
        machine.apply(put(1))
        copy = crash_copy(directory, tmp_path / "copy")
    disk = Disk()
    machine = machine_at(copy, _files=disk.files)
    disk.forget()
    disk.fail("write", errno.ENOSPC)
    with pytest.raises(StorageError) as caught:
        machine.flush()
    assert caught.value.errno == errno.ENOSPC
    assert disk.count("sync") == 0
    assert machine.durable() == LogId(0, 0)
    with pytest.raises(StorageError, match="poisoned"):
        machine.apply(put(2))
    close_poisoned(machine)


def test_first_flush_after_a_crash_opens_no_file(directory: Path, tmp_path: Path) -> None:
    """A process at its limit of open files continues: the first flush after a crash opens no file."""
    with FastStateMachine(directory) as machine:
        machine.apply(put(1))
        copy = crash_copy(directory, tmp_path / "copy")
    with FastStateMachine(copy, verify_on_open="full") as machine:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            machine.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert machine.durable() == LogId(1, 1)


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_close_gives_everything_back_when_its_sync_fails(nth: int, directory: Path, machine_at: Opener) -> None:
    """Whichever sync of close fails, files and lock are released before the error is raised."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    rule = disk.fail("sync", nth=nth)
    close_poisoned(machine)
    assert rule.struck == 1
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before - 4  # directory, LOCK, PUBLISHED, log
    machine.close()
    with machine_at(directory) as machine:
        assert machine.last_applied() == LogId(1, 1)


# ---- no room ----------------------------------------------------------------------------------------------


def assert_goes_on(machine: FastStateMachine, copy: Path) -> None:
    """The state is as after entry 1, and continues; recovery does not find what failed."""
    assert machine.last_applied() == LogId(1, 1)
    assert machine.get_many([b"key-1", b"key-2"]) == [b"v" * 10, None]
    assert (machine.len(), machine.entry_term(2)) == (1, None)
    with FastStateMachine(crash_copy(Path(machine.path), copy)) as recovered:
        assert recovered.last_applied() == LogId(1, 1)
    assert machine.apply(put(2, 20)) == [True]
    machine.flush()
    assert machine.durable() == LogId(2, 1)
    machine.close()
    with FastStateMachine(machine.path) as reopened:
        assert reopened.get_many([b"key-1", b"key-2"]) == [b"v" * 10, b"v" * 20]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT, errno.ENOMEM])
@pytest.mark.parametrize("sync", ["flush", "apply"])
def test_failed_allocation_leaves_the_state_as_it_was(
    code: int, sync: str, directory: Path, tmp_path: Path, machine_at: Opener
) -> None:
    """Without room for a frame apply raises StorageError, nothing of the chunk counts, and the machine continues."""
    disk = Disk()
    machine = machine_at(directory, sync=sync, _files=disk.files)
    machine.apply(put(1))
    size = (directory / "log-1").stat().st_size
    disk.fail("allocate", code, times=2)
    with pytest.raises(StorageError) as caught:
        machine.apply(put(2, 1 << 20))
    assert caught.value.errno == code
    assert caught.value.filename == str(directory / "log-1")
    assert (directory / "log-1").stat().st_size == size
    assert_goes_on(machine, tmp_path / "copy")


def test_allocation_ahead_that_fails_is_tried_with_what_is_needed(directory: Path, machine_at: Opener) -> None:
    """On a nearly full disk, room for the frame itself is enough."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    rule = disk.fail("allocate", errno.ENOSPC)
    assert machine.apply(put(1)) == [True]
    assert rule.struck == 1
    assert (directory / "log-1").stat().st_size == 4096


def test_allocation_that_fails_half_way_gives_the_room_back(
    directory: Path, tmp_path: Path, machine_at: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the system leaves the file partly grown, as ext4 does, it is cut to its old size."""
    machine = machine_at(directory)
    machine.apply(put(1))
    size = (directory / "log-1").stat().st_size

    def allocate_some(fd: int, offset: int, length: int) -> None:
        os.ftruncate(fd, offset + length // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", allocate_some, raising=False)
        with pytest.raises(StorageError):
            machine.apply(put(2, 1 << 20))
        assert (directory / "log-1").stat().st_size == size
    assert_goes_on(machine, tmp_path / "copy")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(("size", "done"), [(100, False), (100, True), (200 << 10, False), (200 << 10, True)])
def test_failed_write_leaves_the_state_as_it_was(
    code: int, size: int, done: bool, *, directory: Path, tmp_path: Path, machine_at: Opener
) -> None:
    """A frame whose write failed counts nowhere, even if its bytes had reached the file."""
    disk = Disk(stores=False)
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    disk.fail("write", code, done=done)
    with pytest.raises(StorageError) as caught:
        machine.apply(put(2, size))
    assert caught.value.errno == code
    assert_goes_on(machine, tmp_path / "copy")


def test_failed_write_that_cannot_be_taken_back_poisons(directory: Path, machine_at: Opener) -> None:
    """If it is unknown whether a frame is in the file, nothing is written after it."""
    disk = Disk(stores=False)
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    disk.fail("write", times=2, done=True)
    with pytest.raises(StorageError):
        machine.apply(put(2))
    assert machine.last_applied() == LogId(1, 1)
    with pytest.raises(StorageError, match="poisoned"):
        machine.apply(put(2))
    close_poisoned(machine)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Make the system refuse larger files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("stores", [None, False])
def test_file_size_limit_is_an_error_and_no_signal(
    stores: bool | None, directory: Path, tmp_path: Path, machine_at: Opener
) -> None:
    """A real EFBIG from the system: the old size is restored, and writes continue once there is room."""
    machine = machine_at(directory, _files=Disk(stores=stores).files)
    machine.apply(put(1))
    size = (directory / "log-1").stat().st_size
    with file_size_limit(size), pytest.raises(StorageError) as caught:
        machine.apply(put(2, 1 << 20))
    assert caught.value.errno == errno.EFBIG
    assert (directory / "log-1").stat().st_size == size
    assert_goes_on(machine, tmp_path / "copy")


def test_no_room_for_hard_state_is_an_error_and_goes_on(directory: Path, machine_at: Opener) -> None:
    """A flush that cannot write the frame of last applied raises; nothing is lost, and it works later."""
    disk = Disk(stores=False)
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    machine.flush()
    machine.update_last_applied(LogId(2, 1))
    disk.fail("write", errno.ENOSPC)
    with pytest.raises(StorageError):
        machine.flush()
    assert (machine.last_applied(), machine.durable()) == (LogId(2, 1), LogId(1, 1))
    machine.flush()
    assert machine.durable() == LogId(2, 1)


def test_close_without_room_for_its_last_frame_loses_nothing(
    directory: Path, machine_at: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    """On a full disk everything applied is durable after close; only the next opening takes longer."""
    disk = Disk(stores=False)
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    disk.fail("write", errno.ENOSPC)
    machine.close()
    assert "without a final frame" in caplog.text
    with machine_at(directory) as machine:
        assert machine.last_applied() == LogId(1, 1)
        assert not machine.stats().recovery.clean


def test_a_large_chunk_after_a_flush_is_written_once(directory: Path, machine_at: Opener) -> None:
    """Zeros are only written ahead of small frames: a large frame is not written over zeros of its own."""
    disk = Disk(stores=False)
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    machine.flush()
    disk.forget()
    machine.apply(put(2, 8 << 20))
    written = sum(len(call.arguments[1]) for call in disk.calls if call.method == "write")
    assert 8 << 20 < written < 9 << 20
