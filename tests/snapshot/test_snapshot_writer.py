"""Writing a snapshot: it is there whole or not at all, whatever fails or failed before."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastsm import (
    FastStateMachine,
    MemoryStateMachine,
    ReentryError,
    SnapshotError,
    StaleSnapshotError,
    StorageError,
    open_snapshot,
    put,
)
from fastsm.disk.files import Directory
from fastsm.snapshot.writer import prepare, write_snapshot_file
from support.faulty import Disk, in_thread
from support.inside import inside
from support.power import Drawn, Image, Platter, Point
from support.snapshots import StateSource, check, open_files, some_state

SEAM = ("create_file", "write", "sync", "rename", "sync_directory")


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize("method", [*SEAM, "pace_writeback"])
def test_no_failing_call_leaves_anything(tmp_path: Path, method: str, compress: str) -> None:
    """If any system call fails, a ``StorageError`` leaves the older snapshot, no other file and no descriptor."""
    path = tmp_path / "new"
    older = write_snapshot_file(path, StateSource(some_state(5)))
    for nth in range(1, 40):
        disk = Disk()
        rule = disk.fail(method, errno.ENOSPC, nth=nth)
        before = open_files()
        raised = None
        try:
            write_snapshot_file(path, StateSource(some_state(6)), compress=compress, files=disk.files)
        except StorageError as error:
            raised = error.errno
        assert raised == (errno.ENOSPC if rule.struck else None)
        assert open_files() <= before
        assert os.listdir(path) == ["snapshot.fsm"]
        if not rule.struck:
            assert nth > 1
            break
        with open_snapshot(path) as snapshot:
            snapshot.verify()
            assert snapshot.metadata == older or method == "sync_directory"


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SnapshotError])
def test_a_tick_that_raises_cancels(tmp_path: Path, error: type[BaseException], compress: str) -> None:
    """An error of any tick ends the writing, and leaves nothing of it."""
    for ticks in range(100):
        left = [ticks]

        def tick(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise error("enough")

        before = open_files()
        try:
            write_snapshot_file(tmp_path, StateSource(some_state(5)), compress=compress, tick=tick)
        except error:
            assert open_files() <= before
            assert os.listdir(tmp_path) == []
        else:
            break
    assert ticks > 5
    check(tmp_path)


def test_a_snapshot_is_synced_before_its_rename(tmp_path: Path) -> None:
    """The file is synced after its last write and before its rename, and then the directory is synced."""
    disk = Disk()
    write_snapshot_file(tmp_path / "new", StateSource(some_state()), files=disk.files)
    order = [call.method for call in disk.calls if call.method in SEAM]
    assert order[-4:] == ["write", "sync", "rename", "sync_directory"]


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_the_disk_is_given_all_of_it_at_its_pace_before_the_sync(tmp_path: Path, compress: str) -> None:
    """The whole file is given to paced writeback before its sync, so that other syncs need not wait for all of it."""
    disk = Disk()
    write_snapshot_file(tmp_path / "new", StateSource(some_state()), compress=compress, files=disk.files)
    calls = [(call.method, call.arguments) for call in disk.calls if call.method in ("pace_writeback", "sync")]
    fd = calls[0][1][0]
    first_sync = calls.index(("sync", (fd,)))
    paced = [arguments[1:] for method, arguments in calls[:first_sync] if method == "pace_writeback"]
    assert (0, (tmp_path / "new" / "snapshot.fsm").stat().st_size) in paced


def test_writeback_at_a_pace_takes_any_range(tmp_path: Path) -> None:
    """``pace_writeback`` takes any range, even one that is empty or beyond the end; a closed file is an error."""
    with (tmp_path / "file").open("wb+") as file:
        file.write(os.urandom(20 << 20))
        file.flush()
        for start, stop in ((0, 0), (0, 20 << 20), (3, 17), (12 << 20, 20 << 20), (20 << 20, 40 << 20), (9, 5)):
            Directory.pace_writeback(file.fileno(), start, stop)
        closed = os.dup(file.fileno())
        os.close(closed)
        if sys.platform == "linux":
            with pytest.raises(OSError, match="Bad file descriptor"):
                Directory.pace_writeback(closed, 0, 20 << 20)
        assert os.fstat(file.fileno()).st_size == 20 << 20


def test_a_prepared_snapshot_has_no_name_before_commit(tmp_path: Path) -> None:
    """A prepared snapshot has metadata but no name, and the end of the block discards it without a commit."""
    before = open_files()
    with prepare(tmp_path, StateSource(some_state())) as prepared:
        assert prepared.metadata.last_included == some_state().last
        assert not (tmp_path / "snapshot.fsm").exists()
        assert "prepared" in repr(prepared)
    assert os.listdir(tmp_path) == []
    with prepare(tmp_path, StateSource(some_state())) as prepared:
        prepared.commit()
        with pytest.raises(ValueError, match="already"):
            prepared.commit()
    assert os.listdir(tmp_path) == ["snapshot.fsm"]
    assert open_files() <= before
    check(tmp_path)


def test_arguments_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    """An unknown codec, and an attachment that is not bytes, are refused before a directory is made."""
    with pytest.raises(ValueError, match="zstd"):
        write_snapshot_file(tmp_path / "new", StateSource(some_state()), compress="lz4")
    with pytest.raises(TypeError):
        write_snapshot_file(tmp_path / "new", StateSource(some_state()), attachment="text")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from support.power import Drawn, Image, Platter, Point
from support.snapshots import StateSource, some_state
from fastsm.snapshot.writer import write_snapshot_file
def tick():
    print("ready", flush=True)
    sys.stdin.read()
write_snapshot_file({path!r}, StateSource(some_state()), tick=tick)
"""


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    """The next writer removes the file that a killed writer left, but not that of a running one."""
    program = WRITER.format(tests=str(Path(__file__).parent.parent), path=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"ready\n"
        (being_written,) = os.listdir(tmp_path)
        (tmp_path / "snapshot.fsm.1-ab.tmp").write_bytes(b"dead")
        (tmp_path / "snapshot.fsm.note").write_bytes(b"somebody's")
        write_snapshot_file(tmp_path, StateSource(some_state()))
        assert set(os.listdir(tmp_path)) == {being_written, "snapshot.fsm", "snapshot.fsm.note"}
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
    assert being_written in os.listdir(tmp_path)
    write_snapshot_file(tmp_path, StateSource(some_state()))
    assert set(os.listdir(tmp_path)) == {"snapshot.fsm", "snapshot.fsm.note"}


def test_other_files_with_the_name_of_a_leftover_stay(tmp_path: Path) -> None:
    """A link or a FIFO with the name of a leftover stays where it is."""
    (tmp_path / "snapshot.fsm.1-ab.tmp").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "snapshot.fsm.2-ab.tmp")
    write_snapshot_file(tmp_path, StateSource(some_state()))
    assert len(os.listdir(tmp_path)) == 3


def test_a_writer_that_loses_its_file_to_another_takes_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another writer removes the new file as a leftover before it is locked, the writer makes another one."""
    lock_file: Callable[..., bool] = Directory.lock_file
    lost: list[Any] = []

    def slow(fd: Any, *, wait: bool = False) -> bool:
        if wait and not lost:
            lost.extend(tmp_path.iterdir())
            lost[0].unlink()
        return lock_file(fd, wait=wait)

    monkeypatch.setattr(Directory, "lock_file", staticmethod(slow))
    write_snapshot_file(tmp_path, StateSource(some_state()))
    assert lost
    check(tmp_path)


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_no_power_loss_leaves_half_a_snapshot(tmp_path: Path, compress: str) -> None:
    """After any power loss there is the older or the new snapshot, whole; after the return it is the new one."""
    metadata = write_snapshot_file(tmp_path / "new", StateSource(some_state(5)))
    content = (tmp_path / "new" / "snapshot.fsm").read_bytes()
    points: list[Point] = []
    platter = Platter(lambda where: points.append(Point(platter, where)))
    platter.take_over(tmp_path / "new", Drawn({"snapshot.fsm": Image(content, len(content))}, False, False, False))
    newer = write_snapshot_file(tmp_path / "new", StateSource(some_state(30)), compress=compress, files=platter.files)
    rng = random.Random(4)
    found = set()
    for point in (*points, Point(platter, "end")):
        for _ in range(10):
            point.draw(rng).build(tmp_path / "lost")
            with open_snapshot(tmp_path / "lost") as snapshot:
                snapshot.verify()
                found.add(snapshot.metadata)
                assert snapshot.metadata == newer or (snapshot.metadata == metadata and point.where != "end")
    platter.close()
    assert found == {metadata, newer}


# ---- two writers of one directory ----------------------------------------------------------------------

def test_an_older_snapshot_never_replaces_a_newer_one_that_came_meanwhile(tmp_path: Path) -> None:
    """If a newer snapshot is put in place meanwhile, the older one is a ``StaleSnapshotError`` and leaves nothing."""
    with prepare(tmp_path, StateSource(some_state(5))) as older:
        newer = write_snapshot_file(tmp_path, StateSource(some_state(30)))
        assert older.metadata.last_included < newer.last_included
        with pytest.raises(StaleSnapshotError, match="the newer one stays"):
            older.commit()
    assert os.listdir(tmp_path) == ["snapshot.fsm"]
    with open_snapshot(tmp_path) as snapshot:
        assert snapshot.metadata == newer


def test_an_older_snapshot_replaces_a_newer_one_that_was_there_before(tmp_path: Path) -> None:
    """An older snapshot replaces a newer one that was there before and did not change meanwhile."""
    write_snapshot_file(tmp_path, StateSource(some_state(30)))
    older = write_snapshot_file(tmp_path, StateSource(some_state(5)))
    with open_snapshot(tmp_path) as snapshot:
        assert snapshot.metadata == older


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(200), b"FASTSM-S" + bytes(300), None])
def test_whatever_is_no_snapshot_is_replaced(tmp_path: Path, content: bytes | None) -> None:
    """A file that cannot be read as a snapshot, or a symbolic link, is replaced even if it came meanwhile."""
    with prepare(tmp_path, StateSource(some_state(5))) as prepared:
        if content is None:
            (tmp_path / "snapshot.fsm").symlink_to(tmp_path / "nowhere")
        else:
            (tmp_path / "snapshot.fsm").write_bytes(content)
        prepared.commit()
    check(tmp_path)


@pytest.mark.parametrize("kind", [FastStateMachine, MemoryStateMachine])
def test_metadata_and_file_agree_when_two_snapshots_overlap(tmp_path: Path, kind: Any) -> None:
    """If a newer snapshot overlaps an older one, the older call raises, and file and metadata are the newer one's."""
    machine = FastStateMachine(tmp_path / "state")
    other = machine if kind is FastStateMachine else MemoryStateMachine()
    machine.apply([(1, 1, put(b"a", b"1"))])
    other.apply([(i, 1, put(b"a", b"%d" % i)) for i in (1, 2)])
    for nth in range(1, 30):  # the newer one is written at each progress call of the older one
        calls: list[object] = []

        def progress(done: int, total: int, calls: list[object] = calls, nth: int = nth) -> None:
            calls.append(other.write_snapshot(tmp_path / f"{nth}") if len(calls) + 1 == nth else None)

        try:
            machine.write_snapshot(tmp_path / f"{nth}", (1, 1), progress=progress)
        except StaleSnapshotError:
            with open_snapshot(tmp_path / f"{nth}") as snapshot:
                assert snapshot.metadata == calls[nth - 1] == other.snapshot_metadata()
        else:
            break
    assert nth > 3
    assert len(calls) < nth
    machine.close()


def test_a_newer_snapshot_between_a_capture_and_the_start_of_its_thread_stays(tmp_path: Path) -> None:
    """A snapshot that is written between a coroutine's capture and its thread's start is newer, and stays."""
    machine = FastStateMachine(tmp_path / "state")
    machine.apply([(1, 1, put(b"a", b"1"))])
    taken = inside(machine).snapshots.take(machine, (1, 1))
    machine.apply([(2, 1, put(b"a", b"2"))])
    newer = machine.write_snapshot(tmp_path / "out")
    with pytest.raises(StaleSnapshotError):
        inside(machine).snapshots.write(machine, taken, tmp_path / "out", None, None)
    with open_snapshot(tmp_path / "out") as snapshot:
        assert snapshot.metadata == newer
    assert machine.write_snapshot(tmp_path / "out", (1, 1)).last_included == (1, 1), "this call means it"
    machine.close()


def test_a_signal_handler_does_not_wait_for_its_own_thread(tmp_path: Path) -> None:
    """A writer that interrupts its own thread within the exclusive step raises ``ReentryError``: no deadlock."""
    directory = Directory(tmp_path)
    with directory.exclusive(), pytest.raises(ReentryError, match="call again later"):
        write_snapshot_file(tmp_path, StateSource(some_state(5)))
    write_snapshot_file(tmp_path, StateSource(some_state(5)))
    directory.close()


def test_the_step_waits_for_another_process(tmp_path: Path) -> None:
    """While another process holds the directory's lock, a snapshot is not renamed into place."""
    program = (
        "import fcntl, os, sys\nfd = os.open(sys.argv[1], os.O_RDONLY)\nfcntl.flock(fd, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()\n"
    )
    tmp_path.joinpath("out").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with prepare(tmp_path / "out", StateSource(some_state(5))) as prepared:
            with in_thread(prepared.commit) as outcome:
                assert not (tmp_path / "out" / "snapshot.fsm").exists()
                holder.communicate()
            assert outcome.error is None
    check(tmp_path / "out")


def test_a_forked_child_does_not_keep_a_writer_s_lock(tmp_path: Path) -> None:
    """A forked child holds no lock of its parent's temporary file, which can be removed after the parent's death."""
    program = (
        "import os, sys\nfrom fastsm.snapshot.writer import prepare\nfrom support.snapshots import *\n"
        "prepared = prepare(sys.argv[1], StateSource(some_state(5)))\n"
        "ready, tell = os.pipe()\n"
        "child = os.fork()\n"
        "if child == 0:\n    os.write(tell, b'!'); sys.stdin.read(); os._exit(0)\n"
        "os.read(ready, 1); print('forked', flush=True); os._exit(0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"forked\n"
        assert process.wait(60) == 0
        assert len(os.listdir(tmp_path)) == 1
        write_snapshot_file(tmp_path, StateSource(some_state(5)))
        assert os.listdir(tmp_path) == ["snapshot.fsm"]
