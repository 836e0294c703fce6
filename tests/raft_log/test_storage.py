"""``RaftLog`` with a failing system, lost or damaged files, and a process that forks."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import warnings
from contextlib import closing, suppress
from pathlib import Path

import pytest

import fastsm
from fastsm import CorruptionError, FormatVersionError, LogId, NotRunningError, RaftLog, StorageError
from support.faulty import Disk, contents, crash_copy, memory_directory
from support.inside import inside
from support.list_log import state_of
from support.power import QuietDirectory

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastsm.raft_log, "SEGMENT_BYTES", 8192)


def grown(path: Path, count: int = 40, **options: object) -> RaftLog:
    """Return a log of several segments, with a vote."""
    log = RaftLog(path, **options)  # type: ignore[arg-type]
    log.save_hard_state(2, b"me")
    for index in range(1, count + 1):
        log.append([(index, 2, bytes([index]) * 1000)])
    log.sync()
    return log


# ---- a system that refuses ------------------------------------------------------------------------------


def test_a_full_disk_changes_nothing_and_can_be_compacted(tmp_path: Path) -> None:
    """Without room an append is refused completely; compacting and its sync still work, and make room."""
    disk = Disk()
    log = RaftLog(tmp_path / "log", _files=disk.files)
    log.append([(1, 1, b"one"), (2, 1, bytes(300_000))])
    before = state_of(log)
    full = disk.fail("allocate", errno.ENOSPC, times=1000)
    while True:  # until what was allocated ahead is used up
        try:
            log.append([(log.last_index + 1, 1, bytes(10_000)), (log.last_index + 2, 1, bytes(10_000))])
        except StorageError as error:
            refused = error.errno
            break
        assert full.struck == 0
        before = state_of(log)
    assert refused == errno.ENOSPC
    assert state_of(log) == before
    log.compact(LogId(2, 1))
    log.sync()
    assert log.first_index == 3
    disk.forget()
    log.append([(log.last_index + 1, 1, b"again")])
    after = state_of(log)
    inside(log).abandon()
    with RaftLog(tmp_path / "log") as log:
        assert state_of(log) == after


def test_a_write_that_fails_half_way_leaves_none_of_the_batch(tmp_path: Path) -> None:
    """All or none of the entries are there, now and after a kill."""
    disk = Disk(stores=False)
    log = RaftLog(tmp_path / "log", _files=disk.files)
    log.append([(1, 1, b"one")])
    disk.fail("write", errno.EIO, done=True)
    with pytest.raises(StorageError):
        log.append([(2, 1, b"two"), (3, 1, b"three")])
    assert log.last_index == 1
    crash_copy(tmp_path / "log", tmp_path / "killed")
    with RaftLog(tmp_path / "killed") as killed:
        assert killed.last_index == 1
    log.append([(2, 2, b"other")])
    log.close()


@pytest.mark.parametrize("call", ["sync", "save_hard_state", "close"])
def test_a_failed_sync_poisons(tmp_path: Path, call: str) -> None:
    """Reads work, no write and no sync does; what counted as durable before still counts."""
    disk = Disk()
    log = grown(tmp_path / "log", 5, _files=disk.files)
    log.append([(6, 2, b"six")])
    disk.fail("sync")
    with pytest.raises(StorageError):
        {"sync": log.sync, "save_hard_state": lambda: log.save_hard_state(9, b"other"), "close": log.close}[call]()
    if call == "close":
        with pytest.raises(NotRunningError):
            log.sync()
        return
    for write in (
        lambda: log.append([(7, 2, b"")]), log.sync, lambda: log.save_hard_state(10), lambda: log.compact((2, 2)),
        lambda: log.truncate_after(3),
    ):  # fmt: skip
        with pytest.raises(StorageError, match="close it and open the directory again"):
            write()
    assert (log.durable_index, log.last_index, log.hard_state()) == (5, 6, (2, b"me"))
    assert log.entries(6, 6)[0].command == b"six"
    log.close()


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMFILE])
def test_any_call_may_fail_once(tmp_path: Path, code: int) -> None:
    """Whichever system call fails, the error is typed, what was synced is there, and a new opening works."""
    refused = 0
    for nth in range(1, 400):
        path = tmp_path / f"log-{nth}"
        disk = Disk()
        rule = disk.fail(None, code, nth=nth)
        synced, log = 0, None
        try:
            log = RaftLog(path, _files=disk.files)
            for index in range(1, 25):
                log.append([(index, 1, bytes(1000))])
                if index % 8 == 0:
                    log.sync()
                    synced = index
                if index == 17:
                    log.compact((10, 1))
            log.save_hard_state(3, b"x")
            log.close()
        except StorageError:
            refused += 1
        finally:
            if log is not None:
                inside(log).abandon()
        if not rule.struck:
            break
        with RaftLog(path) as again:
            assert synced <= again.last_index <= 24
            again.append([(again.last_index + 1, 5, b"goes on")])
            again.sync()
        shutil.rmtree(path)
    assert not rule.struck, "there are more calls"
    assert refused > 40


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    """No descriptor stays open after a failed close, or after a failed opening."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for nth in range(1, 40):
        disk = Disk()
        disk.fail(None, nth=nth)
        with suppress(StorageError), closing(RaftLog(tmp_path / f"log-{nth}", _files=disk.files)) as log:
            log.append([(1, 1, b"one")])
            log.sync()
            log.save_hard_state(2, b"me")
    gc.collect()  # descriptors that failed to close are closed with the last reference
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_vote_in_doubt_is_synced_before_it_is_shown(tmp_path: Path) -> None:
    """A vote was written, and its sync failed: a reader may act on it after a restart, so it is durable by then."""
    disk = Disk()
    log = RaftLog(tmp_path / "log", _files=disk.files)
    disk.fail("sync")
    with pytest.raises(StorageError):
        log.save_hard_state(7, b"in doubt")
    inside(log).abandon()
    disk = Disk()
    disk.fail("write")
    with pytest.raises(StorageError):
        RaftLog(tmp_path / "log", _files=disk.files)
    disk.forget()
    with RaftLog(tmp_path / "log", _files=disk.files) as log:
        written = [call.arguments[1] for call in disk.calls if call.method == "write"]
        assert any(b"in doubt" in data for data in written)
        assert disk.calls[-1].method == "sync" or disk.count("sync") >= 2
        assert log.hard_state() == (7, b"in doubt")


# ---- lost and damaged files -----------------------------------------------------------------------------


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("clean", [False, True])
def test_a_directory_that_lost_a_file_is_corrupt(tmp_path: Path, clean: bool) -> None:
    """A loss of any segment, of the newest, or of all is an error that names it, and nothing is written."""
    log = grown(tmp_path / "log")
    log.compact((7, 2))
    log.sync()
    (log.close if clean else inside(log).abandon)()
    names = sorted(name for name in os.listdir(tmp_path / "log") if name != "LOCK")
    assert len(names) > 4
    for lost in ([name] for name in names):
        assert_refused(tmp_path, lost, lost[0])
    assert_refused(tmp_path, [name for name in names if name != "NEWEST"], names[-2])
    assert_refused(tmp_path, [name for name in names if name != names[0]], "NEWEST")
    with RaftLog(tmp_path / "log") as log:
        assert (log.first_index, log.last_index) == (8, 40)


def assert_refused(tmp_path: Path, lost: list[str], named: str) -> None:
    copy = crash_copy(tmp_path / "log", tmp_path / "copy")
    for name in lost:
        (copy / name).unlink()
    before = contents(copy)
    with pytest.raises(CorruptionError) as caught:
        RaftLog(copy)
    assert contents(copy) == before
    assert named in str(caught.value) or "segment" in str(caught.value)
    shutil.rmtree(copy)


def test_a_segment_that_was_lost_while_the_log_had_one(tmp_path: Path) -> None:
    """If the only segment of a small log is gone, it is not taken for an empty log."""
    grown(tmp_path / "log", 3).close()
    (tmp_path / "log" / "journal-1").unlink()
    with pytest.raises(CorruptionError, match="journal-1"):
        RaftLog(tmp_path / "log")


@pytest.mark.usefixtures("small_segments")
def test_files_of_two_logs_do_not_mix(tmp_path: Path) -> None:
    """A segment or NEWEST of another log is an error."""
    for name in ("a", "b"):
        grown(tmp_path / name).close()
    for name in sorted(os.listdir(tmp_path / "a")):
        if name != "LOCK":
            copy = crash_copy(tmp_path / "a", tmp_path / "copy")
            shutil.copy(tmp_path / "b" / name, copy / name)
            with pytest.raises(CorruptionError):
                RaftLog(copy)
            shutil.rmtree(copy)


@pytest.mark.usefixtures("small_segments")
def test_an_older_name_of_the_newest_segment_loses_nothing(tmp_path: Path) -> None:
    """If NEWEST is older than the last segment, that is an error, and the segment stays."""
    log = grown(tmp_path / "log", 10)
    older = (tmp_path / "log" / "NEWEST").read_bytes()
    log.append([(index, 2, bytes(1000)) for index in range(11, 30)])
    log.append([(30, 2, bytes(1000))])
    log.close()
    assert (tmp_path / "log" / "NEWEST").read_bytes() != older
    (tmp_path / "log" / "NEWEST").write_bytes(older)
    before = contents(tmp_path / "log")
    with pytest.raises(CorruptionError, match="NEWEST"):
        RaftLog(tmp_path / "log")
    assert contents(tmp_path / "log") == before


def test_every_flipped_bit_is_found_or_harmless() -> None:
    """After a clean close each single flipped bit of a file is an error, or nothing is lost."""
    with memory_directory() as root:
        log = RaftLog(root / "log")
        log.append([(index, 1, b"command %d" % index) for index in range(1, 6)])
        log.save_hard_state(2, b"a")
        log.compact((2, 1))
        expected = state_of(log)
        log.close()
        for name in ("journal-1", "NEWEST"):
            path = root / "log" / name
            content = path.read_bytes()
            found = 0
            for bit in range(8 * len(content)):
                damaged = bytearray(content)
                damaged[bit // 8] ^= 1 << bit % 8
                path.write_bytes(damaged)
                try:
                    log = RaftLog(root / "log", _files=QuietDirectory)
                except (CorruptionError, FormatVersionError):
                    found += 1
                    continue
                assert state_of(log) == expected, f"{name}, bit {bit}"
                inside(log).abandon()
            path.write_bytes(content)
            assert found > 8 * len(content) * 0.7


@pytest.mark.usefixtures("small_segments")
def test_verify_names_the_damage_next_to_the_owner(tmp_path: Path) -> None:
    """A byte that changes on disk under an open log is found by ``verify``, with file and offset."""
    with grown(tmp_path / "log") as log:
        told: list[tuple[int, int]] = []
        log.verify(lambda done, total: told.append((done, total)))
        assert told[-1][0] == told[-1][1] == log.stats().log_bytes
        path = tmp_path / "log" / "journal-2"
        with open(path, "r+b") as file:
            file.seek(500)
            byte = file.read(1)
            file.seek(500)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(CorruptionError) as caught:
            log.verify()
        assert caught.value.path == str(path)
        assert caught.value.offset is not None
        path.rename(tmp_path / "away")
        with pytest.raises(CorruptionError, match="journal-2"):
            log.verify()


def test_a_log_opened_by_a_relative_path_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the process has changed its working directory, every call still works, ``verify`` too."""
    monkeypatch.chdir(tmp_path)
    with grown(Path("log")) as log:
        monkeypatch.chdir("/")
        log.verify()
        log.compact(LogId(log.last_index, log.last_term))
        log.append([(log.last_index + 1, log.last_term, b"")])
        log.sync()
        log.verify()
        last = log.last_index
    with RaftLog(tmp_path / "log") as log:
        assert log.last_index == last


# ---- fork -----------------------------------------------------------------------------------------------


def test_a_forked_child_has_no_log(tmp_path: Path) -> None:
    """In the child every call is a ``NotRunningError``, and nothing of the parent's is touched, which continues."""
    with grown(tmp_path / "log", 3) as log:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            code = 1
            try:
                for call in (log.sync, lambda: log.append([(4, 2, b"")]), lambda: log.entries(1, 2), log.hard_state):
                    with pytest.raises(NotRunningError):
                        call()
                log.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        log.append([(4, 2, b"four")])
        log.sync()
        with pytest.raises(fastsm.LockedError):
            RaftLog(tmp_path / "log")
    with RaftLog(tmp_path / "log") as log:
        assert log.last_index == 4
