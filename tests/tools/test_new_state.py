"""A state that a tool makes: in any place where a state can be, whole or not at all, without permanent leftovers."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastsm import CorruptionError, FastStateMachine, LockedError, StorageError, put
from fastsm.disk.files import Directory
from fastsm.generation.unfinished import MARK, UNFINISHED
from fastsm.tools import inspection
from fastsm.tools.new_state import UnfinishedDirectory, new_state
from support.faulty import contents


def fill(machine: FastStateMachine) -> None:
    machine.apply([(1, 1, put(b"a", b"1"))])


def read(path: Path) -> list[tuple[bytes, bytes]]:
    with FastStateMachine(path) as machine:
        return list(machine.items())


@pytest.mark.parametrize(
    "place", ["missing", "missing parents", "empty", "lost+found", "a lock of before", "long name"]
)
def test_a_state_is_made_where_one_can_be(tmp_path: Path, place: str) -> None:
    """A state is made in a missing directory, an empty one, one with ``lost+found``, and under the longest name."""
    path = tmp_path / {"missing parents": "a/b/c", "long name": "n" * 255}.get(place, "new")
    if place in ("empty", "lost+found", "a lock of before"):
        path.mkdir()
    if place == "lost+found":
        (path / "lost+found").mkdir()
    if place == "a lock of before":
        (path / "LOCK").write_bytes(b"1\n")
    with new_state(path) as machine:
        fill(machine)
    assert read(path) == [(b"a", b"1")]
    assert UNFINISHED not in os.listdir(path)
    assert (place == "lost+found") == ("lost+found" in os.listdir(path))


def test_the_root_of_a_mounted_volume_will_do(tmp_path: Path) -> None:
    """A state is made in the root of a mounted volume, which no rename can replace."""
    volume = tmp_path / "volume"
    volume.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "none", volume], check=False).returncode:
        pytest.skip("only root can mount, and not everywhere")
    try:
        with new_state(volume) as machine:
            fill(machine)
        assert read(volume) == [(b"a", b"1")]
    finally:
        subprocess.run(["umount", volume], check=True)


@pytest.mark.parametrize("name", ["notes.txt", "CURRENT", "log-1", "snapshot.fsm", "sub"])
def test_an_existing_target_stays_unchanged(tmp_path: Path, name: str) -> None:
    """A file in the target is a ``StorageError`` that names it; no file is made or changed, not even LOCK."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).write_bytes(b"somebody's")
    with pytest.raises(StorageError, match=f"not empty: it has '{name}'") as caught, new_state(tmp_path / "new"):
        pytest.fail("this must not be filled")
    assert caught.value.errno == errno.ENOTEMPTY
    assert os.listdir(tmp_path / "new") == [name]
    assert (tmp_path / "new" / name).read_bytes() == b"somebody's"


def test_a_whole_state_is_not_touched(tmp_path: Path) -> None:
    """A directory with a state is refused, and stays the same byte for byte."""
    with FastStateMachine(tmp_path / "new") as machine:
        fill(machine)
    before = contents(tmp_path / "new")
    with pytest.raises(StorageError), new_state(tmp_path / "new"):
        pytest.fail("this must not be filled")
    assert contents(tmp_path / "new") == before


@pytest.mark.parametrize("made", [True, False])
def test_an_error_leaves_nothing(tmp_path: Path, made: bool) -> None:
    """After an error a new directory is removed; one that existed keeps only LOCK and PUBLISHED."""
    if not made:
        (tmp_path / "new").mkdir()

    def interrupted() -> None:
        with new_state(tmp_path / "new") as machine:
            fill(machine)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == ([] if made else ["new"])
    assert made or sorted(os.listdir(tmp_path / "new")) == ["LOCK", "PUBLISHED"]


def killed_at(path: Path, call: int) -> bool:
    """Fill a directory in a child that is killed at the n-th call to the disk; return whether it was."""
    pid = os.fork()
    if pid == 0:
        try:
            fill_until(path, call)
            os._exit(0)
        finally:
            os._exit(9)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def fill_until(path: Path, call: int) -> None:
    left = [call]

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(Directory, name)

        def method(self: Directory, *arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(self, *arguments, **options)

        return method

    for name in ("create_file", "write_file", "rename", "unlink", "sync_directory", "close_file"):
        setattr(UnfinishedDirectory, name, counted(name))
    with new_state(path) as machine:
        fill(machine)
        machine.clear()
        fill(machine)


def test_a_killed_tool_leaves_nothing_for_ever(tmp_path: Path) -> None:
    """After a kill at any call the next opening finds nothing or the whole state, and the tool can run again."""
    outcomes = []
    for call in range(200):
        path = tmp_path / f"{call}"
        if not killed_at(path, call):
            break
        shutil.copytree(path, tmp_path / "again")
        opened = read(path)
        outcomes.append(opened)
        assert opened in ([], [(b"a", b"1")])
        assert UNFINISHED not in os.listdir(path)
        if opened:
            assert read(tmp_path / "again") == opened
        else:
            with new_state(tmp_path / "again") as machine:
                fill(machine)
            assert read(tmp_path / "again") == [(b"a", b"1")]
        shutil.rmtree(tmp_path / "again")
    assert call > 15
    assert outcomes.count([]) > 10
    assert outcomes == sorted(outcomes), "once it is whole it stays whole"


def test_looking_at_what_is_unfinished_says_so(tmp_path: Path) -> None:
    """While a tool makes a state, inspect and readers report it as unfinished, and owners find it locked."""
    with new_state(tmp_path / "new") as machine:
        fill(machine)
        assert "a restore or a load that did not finish" in (inspection.inspect(tmp_path / "new").problem or "")
        with pytest.raises(CorruptionError, match="run it again"):
            FastStateMachine(tmp_path / "new", read_only=True)
        with pytest.raises(LockedError):
            FastStateMachine(tmp_path / "new")
    assert inspection.inspect(tmp_path / "new").problem is None


@pytest.mark.parametrize("content", [b"", b"notes", MARK[:-1], MARK + b"more", bytes(len(MARK))])
def test_only_the_tool_s_own_mark_counts(tmp_path: Path, content: bytes) -> None:
    """A file with the mark's name but other content does not cause a state to be removed."""
    with FastStateMachine(tmp_path) as machine:
        fill(machine)
    (tmp_path / UNFINISHED).write_bytes(content)
    assert read(tmp_path) == [(b"a", b"1")]
    assert (tmp_path / UNFINISHED).read_bytes() == content


def test_a_lost_directory_stays_free_for_what_is_restored(directory: Path, tmp_path: Path) -> None:
    """An opening that fails because expected entries are missing makes no state, so that ``restore`` can."""
    with FastStateMachine(tmp_path / "replica") as replica:
        replica.apply([(1, 1, put(b"a", b"1"))])
        replica.write_snapshot(tmp_path)
    with pytest.raises(CorruptionError, match=r"CURRENT: expected entries up to .* found no state; .* restore"):
        FastStateMachine(directory, expect_applied=(1, 1))
    with new_state(directory) as machine:
        machine.install_snapshot(None, tmp_path)
    with FastStateMachine(directory, expect_applied=(1, 1)) as machine:
        assert machine.get(b"a") == b"1"
