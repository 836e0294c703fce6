"""``RaftLog`` when something ends: room, descriptors, memory, a close, a process."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import fastsm
from fastsm import CorruptionError, Entry, LogId, NotRunningError, RaftLog, StorageError
from support.faulty import Disk, in_thread
from support.inside import inside
from support.list_log import state_of

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def segment_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each append begins a segment."""
    monkeypatch.setattr(fastsm.raft_log, "SEGMENT_BYTES", 1)


def append(log: RaftLog, count: int = 1, size: int = 100) -> None:
    for _ in range(count):
        log.append([Entry(log.last_index + 1, 1, bytes(size))])


def opened_on_a_full_disk(directory: Path) -> RaftLog:
    """Return a log that has appended until its disk was full."""
    disk = Disk()
    log = RaftLog(directory, _files=disk.files)
    append(log, 3)
    disk.fail("allocate", errno.ENOSPC, times=1_000_000)
    with pytest.raises(StorageError):
        append(log, 100_000)
    return log


# ---- room ------------------------------------------------------------------------------------------------


def test_a_log_closes_on_a_disk_without_any_room(tmp_path: Path) -> None:
    """Everything is durable, and there is no room for the last frame: no error; the next opening finds everything."""
    log = opened_on_a_full_disk(tmp_path / "log")
    compacted = 0
    with suppress(StorageError):  # each takes some of the room that was left
        for compacted in range(1, log.last_index):
            log.compact(LogId(compacted, 1))
    assert compacted < log.last_index - 1, "there was room"
    before = state_of(log)
    log.close()
    with RaftLog(tmp_path / "log") as log:
        assert state_of(log) == before
        assert log.durable_index == log.last_index


def test_votes_and_truncations_leave_room_for_a_compaction(tmp_path: Path) -> None:
    """On a full disk votes and truncations are refused before they take the room that a compaction needs."""
    log = opened_on_a_full_disk(tmp_path / "log")
    with suppress(StorageError):
        for term in range(1, 1_000):
            log.save_hard_state(term, None)
    before = state_of(log)
    assert before.hard_state[0] < 999, "there was room"
    with pytest.raises(StorageError):
        log.truncate_after(log.last_index - 1)
    assert state_of(log) == before
    last = log.last_index
    log.compact(LogId(last, log.last_term))
    log.sync()
    assert (log.first_index, log.last_index) == (last + 1, last)
    log.close()


# ---- descriptors -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("segment_each")
def test_a_log_may_have_more_segments_than_a_process_files(tmp_path: Path) -> None:
    """Only the newest segment is kept open: few descriptors suffice to begin, open, verify and remove segments."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(15)]  # the lowest ones, wherever other tests have left gaps
    for number in free:
        os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, hard))
    try:
        with RaftLog(tmp_path / "log") as log:
            append(log, 100)
            before = state_of(log)
            log.verify()
        log = RaftLog(tmp_path / "log")
        assert (state_of(log), log.stats().segments) == (before, 100)
        append(log)
        log.compact(LogId(100, 1))
        log.sync()
        assert log.stats().segments == 1
        before = state_of(log)
        inside(log).abandon()
        with RaftLog(tmp_path / "log") as log:
            assert state_of(log) == before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- a close ---------------------------------------------------------------------------------------------


def test_an_interrupted_close_gives_everything_back(tmp_path: Path) -> None:
    """Ctrl-C during the wait for another thread's sync is raised, and the log is closed with everything durable."""
    disk = Disk()
    log = RaftLog(tmp_path / "log", _files=disk.files)
    append(log)
    gate = disk.hold("sync")

    def interrupt(*_: object) -> None:
        gate.open()
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with in_thread(log.sync) as syncing:
            gate.wait()
            append(log)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                log.close()
    finally:
        signal.signal(signal.SIGALRM, old)
    assert syncing.error is None
    with pytest.raises(NotRunningError):
        log.sync()
    with RaftLog(tmp_path / "log") as log:
        assert log.last_index == log.durable_index == 2


# ---- a process -------------------------------------------------------------------------------------------

FORKS = """
import os, sys
import fastsm, fastsm.raft_log
from fastsm.disk.files import Directory
from fastsm.integrations.pysyncobj.journal import FastJournal

fastsm.raft_log.SEGMENT_BYTES = 1
method, kind = sys.argv[1:]
forks = 0


def forking(name):
    function = getattr(Directory, name)

    def method(self, *arguments):
        global armed, forks
        found = function(self, *arguments)
        if armed:
            forks += 1
            if os.fork() == 0:
                armed = False
                children.append(os.getpid())
            else:
                status = os.waitstatus_to_exitcode(os.wait()[1])
                assert status == 7, status
        return found

    return method


armed, children = False, []
files = type("Files", (Directory,), {method: forking(method)})
if kind == "FastJournal":
    log = FastJournal("log", _files=files)
    call = lambda: log.add(bytes(1_000_000), log.last_index + 1, 1)
    what = lambda: len(log)
else:
    log = fastsm.RaftLog("log", _files=files)
    call = lambda: log.append([(log.last_index + 1, 1, bytes(1_000_000))])
    what = lambda: log.last_index
call()
armed = True
try:
    call()
except BaseException:
    if not children:
        raise
if children:
    try:
        call()
        what()
    except fastsm.FastsmError:
        os._exit(7)
    os._exit(8)
armed = False
assert forks, "nothing was forked"
call()
assert what() == 3
log.close()
"""


@pytest.mark.parametrize("kind", ["RaftLog", "FastJournal"])
@pytest.mark.parametrize("method", ["allocate", "sync_directory", "replace_file"])
def test_a_child_forked_in_the_middle_of_an_append_ends_it(tmp_path: Path, kind: str, method: str) -> None:
    """If a finalizer or a signal handler forks, the child continues in the interrupted frame: no crash, no log."""
    if kind == "FastJournal" and method != "allocate":
        pytest.skip("it begins no segment in the middle of an append")
    subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS, method, kind], cwd=tmp_path, check=True,
        timeout=60, env=os.environ | {"PYTHONMALLOC": "debug"})  # fmt: skip
    if kind == "RaftLog":
        with RaftLog(tmp_path / "log") as log:
            assert log.last_index == 3
            log.verify()


# ---- what is verified ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("segment_each")
def test_verify_finds_a_newest_of_another_time_or_log(tmp_path: Path) -> None:
    """The next opening would refuse the directory."""
    with RaftLog(tmp_path / "another") as log:
        append(log, 4)
    another = (tmp_path / "another" / "NEWEST").read_bytes()
    with RaftLog(tmp_path / "log") as log:
        append(log, 3)
        older = (tmp_path / "log" / "NEWEST").read_bytes()
        append(log)
        right = (tmp_path / "log" / "NEWEST").read_bytes()
        for wrong in (older, another):
            (tmp_path / "log" / "NEWEST").write_bytes(wrong)
            with pytest.raises(CorruptionError, match="NEWEST"):
                log.verify()
        (tmp_path / "log" / "NEWEST").write_bytes(right)
        log.verify()


# ---- odd callers -----------------------------------------------------------------------------------------


def test_a_limit_is_read_once(tmp_path: Path) -> None:
    """A number that changes each time it is read is taken as first read."""

    class Falling:
        number = 1

        def __index__(self) -> int:
            self.number -= 1
            return self.number

    with RaftLog(tmp_path / "log") as log:
        append(log, 3)
        assert len(log.entries(1, 3, max_bytes=Falling())) == 1


def test_a_saved_vote_makes_the_entries_before_it_durable(tmp_path: Path) -> None:
    """Saving a vote makes the entries before it durable, because they are in the file that is synced."""
    with RaftLog(tmp_path / "log") as log:
        append(log, 2)
        log.save_hard_state(1, b"me")
        assert log.durable_index == 2
        append(log)
        log.save_hard_state(1, b"me")
        assert log.durable_index == 2
