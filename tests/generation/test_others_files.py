"""Files in a state directory that this library has not made, or cannot read: they stay."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest

from fastsm import FastStateMachine, LogId, StorageError, put
from support.faulty import Disk


def make_foreign(path: Path, kind: str) -> None:
    """Something that this library has not made."""
    if kind == "text":
        path.write_bytes(b"2026-11-29 12:00 all is well\n" * 50)
    elif kind == "directory":
        path.mkdir()
        (path / "inside").write_bytes(b"x")
    elif kind == "symbolic link":
        path.symlink_to("nowhere")
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
            server.bind(os.path.relpath(path))


@pytest.fixture
def closed(directory: Path) -> Path:
    """A directory that was closed after nine entries."""
    with FastStateMachine(directory) as machine:
        machine.apply([(index, 1 + index // 4, put(b"key", b"old")) for index in range(1, 10)])
    return directory


FOREIGN = ("text", "directory", "symbolic link", "FIFO", "socket")


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_that_others_named_like_ours_stay(closed: Path, kind: str) -> None:
    """Opening, a reset, a compaction, an install and a failed install pass over them, and take other numbers."""
    foreign = {"log-20261129", "table-7", "base-3", "log-2", "table-4.tmp", "CURRENT-5.tmp", "log-12"}
    for name in foreign:
        make_foreign(closed / name, kind)
    for _ in range(2):
        with FastStateMachine(closed, retain_entries=0) as machine:
            last = machine.last_applied().index
            machine.apply([(last + 1, 3, put(b"key", b"value"))])
            machine.write_snapshot(closed.parent / "snapshots")
            machine.compact()
            with pytest.raises(StorageError):
                machine.install_snapshot(None, closed.parent / "nowhere")
            machine.install_snapshot(None, closed.parent / "snapshots")
            machine.clear()
            machine.apply([(1, 1, put(b"key", b"value"))])
            assert machine.stats().generation not in (2, 3, 4, 5, 7, 12)
        assert foreign <= set(os.listdir(closed))
    with FastStateMachine(closed) as machine:
        assert machine.get(b"key") == b"value"
    assert (closed / "log-20261129").is_symlink() == (kind == "symbolic link")


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_new_directory_may_hold_files_that_others_named_like_ours(tmp_path: Path, kind: str) -> None:
    """They are no state that lost its CURRENT; the first generation takes the first number that nobody has."""
    for name in ("log-1", "base-2", "log-20261129"):
        make_foreign(tmp_path / name, kind)
    for expected in (0, 1):
        with FastStateMachine(tmp_path) as machine:
            assert machine.last_applied().index == expected
            assert machine.stats().generation == 3
            machine.apply([(1, 1, put(b"key", b"value"))])
    assert {"log-1", "base-2", "log-20261129"} <= set(os.listdir(tmp_path))


def test_a_left_over_file_that_cannot_be_read_stays(closed: Path) -> None:
    """It is no reason not to open; but while CURRENT is lost, an unreadable log is one: this is no new directory."""
    class Refusing(Disk().files):  # type: ignore[misc,name-defined]
        def open_file(self, name: str, flags: int = os.O_RDWR) -> object:
            if name in ("log-77", "log-1") and (name == "log-77" or not (closed / "CURRENT").exists()):
                raise OSError(5, os.strerror(5))
            return super().open_file(name, flags)

    (closed / "log-77").write_bytes(b"")
    with FastStateMachine(closed, _files=Refusing) as machine:
        assert machine.last_applied() == LogId(9, 3)
    assert (closed / "log-77").exists()
    (closed / "CURRENT").unlink()
    with pytest.raises(StorageError):
        FastStateMachine(closed, _files=Refusing)
    assert not (closed / "CURRENT").exists()
