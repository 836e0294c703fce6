"""Writing a snapshot: whole or not at all, whatever fails, and whoever died at it before."""

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

from fastsm import SnapshotError, StorageError, open_snapshot
from fastsm.disk.files import Directory
from fastsm.snapshot.writer import prepare, write_snapshot_file
from support.faulty import Disk
from support.power import Drawn, Image, Platter, Point
from support.snapshots import StateSource, check, open_files, some_state

SEAM = ("create_file", "write", "sync", "rename", "sync_directory")


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize("method", [*SEAM, "pace_writeback"])
def test_no_failing_call_leaves_anything(tmp_path: Path, method: str, compress: str) -> None:
    """Whichever call of the system fails: a ``StorageError``, the older snapshot, no other file, no descriptor."""
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
    """At each tick writing may be given up; nothing is left of it."""
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


def test_it_is_synced_before_it_is_named(tmp_path: Path) -> None:
    """The last write comes before the last sync, that before the rename, and then the directory is synced."""
    disk = Disk()
    write_snapshot_file(tmp_path / "new", StateSource(some_state()), files=disk.files)
    order = [call.method for call in disk.calls if call.method in SEAM]
    assert order[-4:] == ["write", "sync", "rename", "sync_directory"]


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_the_disk_is_given_all_of_it_at_its_pace_before_the_sync(tmp_path: Path, compress: str) -> None:
    """So that a sync of another file waits for a few mebibytes, not for a whole snapshot."""
    disk = Disk()
    write_snapshot_file(tmp_path / "new", StateSource(some_state()), compress=compress, files=disk.files)
    calls = [(call.method, call.arguments) for call in disk.calls if call.method in ("pace_writeback", "sync")]
    fd = calls[0][1][0]
    first_sync = calls.index(("sync", (fd,)))
    paced = [arguments[1:] for method, arguments in calls[:first_sync] if method == "pace_writeback"]
    assert (0, (tmp_path / "new" / "snapshot.fsm").stat().st_size) in paced


def test_writeback_at_a_pace_takes_any_range(tmp_path: Path) -> None:
    """It changes nothing, whatever the range: empty, beyond the end, longer than the window. A closed file is an error.
    """
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
    """Between the two steps its metadata is known, and the end of the block discards what was not committed."""
    before = open_files()
    with prepare(tmp_path, StateSource(some_state())) as prepared:
        assert prepared.metadata.last_included == some_state().last
        assert not (tmp_path / "snapshot.fsm").exists()
        assert "prepared" in repr(prepared)
    assert os.listdir(tmp_path) == []
    with prepare(tmp_path, StateSource(some_state())) as prepared:
        prepared.commit()
        with pytest.raises(ValueError, match="before"):
            prepared.commit()
    assert os.listdir(tmp_path) == ["snapshot.fsm"]
    assert open_files() <= before
    check(tmp_path)


def test_arguments_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    """An unknown codec, and an attachment that is no bytes, leave no directory."""
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
    """The next writer removes what a killed one left, not what a living one is at."""
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


def test_what_only_looks_like_a_leftover_is_no_hindrance(tmp_path: Path) -> None:
    """A link or a FIFO of such a name stays where it is."""
    (tmp_path / "snapshot.fsm.1-ab.tmp").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "snapshot.fsm.2-ab.tmp")
    write_snapshot_file(tmp_path, StateSource(some_state()))
    assert len(os.listdir(tmp_path)) == 3


def test_a_writer_that_loses_its_file_to_another_takes_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between creating and locking another writer may take the file for a leftover."""
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
    """Whatever pages and names are lost, there is the older snapshot or the new one, whole; on return, the new one."""
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
