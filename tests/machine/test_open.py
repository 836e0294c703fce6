"""Opening a machine: the directory, its permissions, the options, and what fails."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import FastStateMachine, LogId
from support.faulty import Disk, error_of
from support.histories import put

# ---- the directory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_files_are_private_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    """The directory is made 0700, its files 0600."""
    path = tmp_path / "state"
    before = os.umask(umask)
    try:
        with FastStateMachine(path) as machine:
            machine.apply(put(1))
            machine.clear()
            machine.apply(put(1))
        modes = {name: stat.S_IMODE((path / name).stat().st_mode) for name in ("LOCK", "CURRENT", "log-2")}
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert modes == dict.fromkeys(modes, 0o600)


def test_directory_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    """A directory made by somebody else is taken as it is."""
    tmp_path.chmod(0o750)
    FastStateMachine(tmp_path).close()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o750


def test_directory_may_be_given_as_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A str, a Path, a relative one; later changes of the working directory do not matter."""
    monkeypatch.chdir(tmp_path)
    with FastStateMachine("state") as machine:
        monkeypatch.chdir("/")
        machine.apply(put(1))
        machine.clear()
        machine.apply(put(1))
    with FastStateMachine(os.fsencode(tmp_path / "state")) as machine:
        assert machine.last_applied() == LogId(1, 1)


NAN = float("nan")


@pytest.mark.parametrize("name", ["retain_entries", "retain_bytes", "compact_ratio", "compact_floor"])
@pytest.mark.parametrize("value", [-1, NAN])
def test_sizes_are_0_or_more(name: str, value: float, directory: Path) -> None:
    """Whichever of the sizes is no size is told before anything is made."""
    with pytest.raises(ValueError, match="0 or more"):
        FastStateMachine(directory, **{name: value})
    assert not directory.exists()


@pytest.mark.parametrize("option", [{"sync": "never"}, {"sync": True}, {"verify_on_open": "perhaps"}])
def test_option_of_unknown_value_is_a_value_error(option: dict[str, Any], directory: Path) -> None:
    """A misspelled option is told before anything is made."""
    with pytest.raises(ValueError, match=next(iter(option))):
        FastStateMachine(directory, **option)
    assert not directory.exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("method", ["open_file", "sync", "write", "sync_directory", "rename", "names", "size"])
def test_opening_that_fails_is_a_typed_error_and_works_later(method: str, code: int, directory: Path) -> None:
    """Whichever call of a first opening fails, StorageError has its errno, the lock is free, and the next one works."""
    for nth in range(1, 30):
        disk = Disk()
        rule = disk.fail(method, code, nth=nth)
        path = directory.with_name(f"state-{nth}")
        error = error_of(lambda path=path, disk=disk: FastStateMachine(path, _files=disk.files).close())
        assert error is None or (error.errno == code and str(path) in str(error))
        assert rule.struck == (disk.count(method) >= nth)
        with FastStateMachine(path) as machine:
            assert machine.last_applied() == LogId(0, 0)
        if not rule.struck:
            return
    pytest.fail(f"{method} was called more often than expected")


def test_a_machine_is_opened_once(directory: Path, tmp_path: Path) -> None:
    """A second call of the constructor raises before anything changed, also after ``close``."""
    machine = FastStateMachine(directory)
    machine.apply([(1, 1, fastsm.put(b"a", b"1"))])
    for place in (directory, tmp_path / "another"):
        with pytest.raises(RuntimeError, match="was opened already: make another one"):
            machine.__init__(place)  # type: ignore[misc]
    assert not (tmp_path / "another").exists()
    assert machine.get(b"a") == b"1"
    machine.close()
    with pytest.raises(RuntimeError, match="was opened already: make another one"):
        machine.__init__(directory)  # type: ignore[misc]
    with FastStateMachine(directory) as machine:
        assert machine.get(b"a") == b"1"
