"""The seam to the system on unusual file systems and with unusual permissions."""

from __future__ import annotations

import errno
import math
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastsm
from fastsm.disk import files
from fastsm.disk.files import Directory
from fastsm.errors import LockedError
from support.inside import inside

KEY = fastsm.put(b"a", b"1")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")
APPLY_AS = """
import fastsm, os, sys
user, group, path, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4], 8)
with fastsm.FastStateMachine(path + "-of-root") as machine:  # all modules are imported while root may read them
    pass
os.setgroups([]), os.setgid(group), os.setuid(user), os.umask(0o077)
with fastsm.FastStateMachine(path, mode=mode) as machine:
    machine.apply([(machine.last_applied().index + 1, 1, fastsm.put(b"a", b"1"))])
"""


def apply_as(user: int, group: int, path: Path, mode: str = "700") -> subprocess.CompletedProcess[str]:
    """Apply one entry in a process that runs as another user."""
    command = [sys.executable, "-c", APPLY_AS, str(user), str(group), str(path), mode]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def open_to_search() -> Iterator[Path]:
    """Provide a folder that, with its parents, every user can search, unlike pytest's own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o711)
        yield Path(folder)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_fallocate_is_written_with_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """If the system cannot allocate blocks, zeros are written instead; every entry is applied and found again."""

    def refuse(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with fastsm.FastStateMachine(tmp_path / "state") as machine:
        assert machine.apply([(1, 1, KEY)]) == [True]
    with fastsm.FastStateMachine(tmp_path / "state", verify_on_open="full") as machine:
        assert machine.get(b"a") == b"1"


def test_a_full_disk_is_still_an_error_of_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk allocation fails and nothing is written; only an unsupported call has a substitute."""

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    directory = Directory(tmp_path)
    descriptor = directory.create_file("file")
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space") as raised:
        directory.allocate(descriptor, 0, 1 << 20)
    assert raised.value.errno == errno.ENOSPC
    assert directory.size(descriptor) == 0


def test_each_listing_opens_the_directory_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each listing uses a new descriptor, because on btrfs one that stays open shows old names."""
    listed = []
    real = os.listdir

    def note(descriptor: int) -> list[str]:
        listed.append((descriptor, os.lseek(descriptor, 0, os.SEEK_CUR)))
        return real(descriptor)

    monkeypatch.setattr(files.os, "listdir", note)
    directory = Directory(tmp_path)
    for name in ("b", "a"):
        directory.create_file(name).close()
        directory.names()
    assert directory.names() == ["a", "b"]
    assert all(descriptor != inside(directory).directory.number and offset == 0 for descriptor, offset in listed)
    assert len(listed) == 3


def test_the_content_of_the_lock_only_informs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is locked even if process id and time cannot be written on a full disk."""

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "LOCK").write_text("4242\nof a process that is gone\n")
    directory = Directory(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "pwrite", refuse)
        directory.lock()
    with pytest.raises(LockedError) as raised:
        Directory(tmp_path).lock()
    assert raised.value.pid is None


def test_a_lock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``lock_timeout`` an opening retries until the lock is free; after the timeout the error names the holder."""
    holder = fastsm.FastStateMachine(tmp_path)
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            holder.close()

    with pytest.raises(LockedError):
        fastsm.FastStateMachine(tmp_path)
    monkeypatch.setattr(files.time, "sleep", pause)
    with fastsm.FastStateMachine(tmp_path, lock_timeout=math.inf) as machine:
        assert len(pauses) == 3
        moment = iter(range(100))
        monkeypatch.setattr(files.time, "monotonic", lambda: next(moment))
        with pytest.raises(LockedError) as raised:
            fastsm.FastStateMachine(tmp_path, lock_timeout=5)
        assert raised.value.pid == os.getpid()
        assert machine.apply([(1, 1, KEY)]) == [True]


def test_a_copy_of_the_lock_elsewhere_does_not_outlive_its_owners_close(tmp_path: Path) -> None:
    """A close releases the lock even if a child that is just being started has a copy of its descriptor."""
    directory = Directory(tmp_path)
    directory.lock()
    assert inside(directory).lock is not None
    copy = inside(directory).lock.duplicate()
    directory.close()
    Directory(tmp_path).lock()
    copy.close()


@pytest.mark.parametrize(("option", "value"), [
    ("lock_timeout", -1), ("lock_timeout", math.nan), ("mode", 0o070), ("mode", 0o1700)])
def test_options_that_make_no_sense_are_refused(tmp_path: Path, option: str, value: float) -> None:
    """A negative timeout, or a mode that its owner could not use, is a ``ValueError``, and nothing is made."""
    with pytest.raises(ValueError, match=option):
        fastsm.FastStateMachine(tmp_path / "state", **{option: value})
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("mode", "of_files"), [(0o700, 0o600), (0o750, 0o640), (0o770, 0o660), (0o755, 0o644)])
def test_mode_is_that_of_directory_and_files(tmp_path: Path, mode: int, of_files: int) -> None:
    """The directory and every file, including those of a compaction, have the given mode, whatever the umask is."""
    before = os.umask(0o077)
    try:
        with fastsm.FastStateMachine(tmp_path / "state", mode=mode) as machine:
            machine.apply([(1, 1, KEY)])
            machine.apply([(2, 1, KEY)])
            machine.compact(1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == mode
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").iterdir()}
    assert found == dict.fromkeys(found, of_files)
    assert {"LOCK", "CURRENT", "base-2", "log-2"} <= set(found)


@needs_root
def test_a_parent_that_may_only_be_searched(open_to_search: Path) -> None:
    """A directory opens whose parent may be searched but not read: its name need not be synced by the opening."""
    state = open_to_search / "state"
    state.mkdir()
    os.chown(state, 1234, 1234)
    done = apply_as(1234, 1234, state)
    assert done.returncode == 0, done.stderr


@needs_root
@pytest.mark.parametrize("by", ["mode", "administrator"])
def test_users_of_a_group_take_turns(open_to_search: Path, by: str) -> None:
    """With ``mode=0o770``, or after an administrator changed the files' modes, users of a group can take turns."""
    state = open_to_search / "state"
    state.mkdir()
    os.chown(state, 1234, 4321)
    state.chmod(0o2770)
    mode = "770" if by == "mode" else "700"
    first = apply_as(1234, 4321, state, mode)
    assert first.returncode == 0, first.stderr
    if by == "administrator":
        refused = apply_as(5678, 4321, state, mode)
        assert refused.returncode == 1
        assert "PermissionError" in refused.stderr or "Permission denied" in refused.stderr
        for path in state.iterdir():
            path.chmod(0o660)
    for user in (5678, 1234, 5678):
        done = apply_as(user, 4321, state, mode)
        assert done.returncode == 0, done.stderr
    with fastsm.FastStateMachine(state, read_only=True) as machine:
        assert machine.last_applied().index == 4
