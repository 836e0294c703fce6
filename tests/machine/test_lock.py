"""The lock: there is one owner at a time, and nothing to clean up after an owner was killed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import fastsm
from fastsm import Entry, FastStateMachine, LockedError, LogId
from support.faulty import contents
from support.inside import inside

HOLDER = """
import fastsm, os, sys, time
machine = fastsm.FastStateMachine(sys.argv[1])
machine.apply([(1, 1, fastsm.put(b"k", b"v"))])
if "fork" in sys.argv:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"x")  # by now the child has closed the lock's descriptor
        time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    print(child)
print("ready", flush=True)
time.sleep(60)
"""
RACER = """
import fastsm, sys, time
path, start, rounds = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
time.sleep(max(0, start - time.time()))
won = 0
while won < rounds:
    try:
        with fastsm.FastStateMachine(path) as machine:
            index = machine.last_applied().index + 1
            found = int(machine.get(b"counter") or 0)
            machine.apply([(index, 1, fastsm.put(b"counter", b"%d" % (found + 1)))])
            won += 1
    except fastsm.LockedError:
        time.sleep(0.0005)
"""


@contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run the script in a Python process, which is killed at the end of the block."""
    child = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE, text=True, cwd="/",  # there no fastsm/ hides the installed package
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def read_until_ready(child: subprocess.Popen[str]) -> list[str]:
    """Return the lines before the one that says "ready"."""
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        if line == "ready\n":
            return lines
        lines.append(line.strip())
    raise AssertionError("the process ended before it was ready")


def test_second_opening_by_this_process_is_a_locked_error(directory: Path) -> None:
    """The error names the directory and says that this process is the holder."""
    with FastStateMachine(directory) as machine:
        with pytest.raises(LockedError, match="this process") as caught:
            FastStateMachine(directory)
        assert (caught.value.path, caught.value.pid) == (str(directory), os.getpid())
        assert machine.apply([Entry(1, 1, fastsm.noop())]) == [True]
    with FastStateMachine(directory) as machine:
        assert machine.last_applied() == LogId(1, 1)


def test_opening_while_another_process_has_it_open_is_a_locked_error(directory: Path) -> None:
    """The error names the holder's process id and start time, and no file is changed."""
    with process(HOLDER, directory) as child:
        read_until_ready(child)
        before = contents(directory)
        lock = (directory / "LOCK").read_bytes()
        with pytest.raises(LockedError) as caught:
            FastStateMachine(directory)
        assert caught.value.pid == child.pid
        assert f"process {child.pid}" in str(caught.value)
        assert time.strftime("%Y-%m-%d") in str(caught.value)
        assert contents(directory) == before
        assert (directory / "LOCK").read_bytes() == lock


def test_lock_is_taken_before_anything_is_cut(directory: Path) -> None:
    """A refused opening does not cut a torn tail, which may be a frame that the holder is writing."""
    with FastStateMachine(directory) as machine:
        machine.apply([Entry(1, 1, fastsm.noop())])
        with (directory / "log-1").open("ab") as log:
            log.write(b"torn")
        before = contents(directory)
        with pytest.raises(LockedError):
            FastStateMachine(directory)
        assert contents(directory) == before


@pytest.mark.parametrize("content", [b"", b"nonsense\n", b"\xff" * 200, b"-1\n", b"12"])
def test_lock_file_of_any_content_can_be_taken_and_told(content: bytes, directory: Path) -> None:
    """The content of LOCK only informs: with any content the lock can be taken, and the error can be made."""
    directory.mkdir()
    (directory / "LOCK").write_bytes(content)
    with FastStateMachine(directory):
        (directory / "LOCK").write_bytes(content)
        with pytest.raises(LockedError) as caught:
            FastStateMachine(directory)
        assert caught.value.pid == (12 if content == b"12" else None)
        assert str(directory) in str(caught.value)


def test_lock_file_stays_after_close(directory: Path) -> None:
    """LOCK is never unlinked, because two processes could then lock two files of one name."""
    with FastStateMachine(directory):
        inode = (directory / "LOCK").stat().st_ino
    assert (directory / "LOCK").stat().st_ino == inode
    with FastStateMachine(directory):
        assert (directory / "LOCK").stat().st_ino == inode


def test_killed_holder_leaves_nothing_to_clean(directory: Path) -> None:
    """The lock is released when its process ends, even by a kill."""
    with process(HOLDER, directory) as child:
        read_until_ready(child)
        child.kill()
        child.wait()
        with FastStateMachine(directory) as machine:
            assert machine.get(b"k") == b"v"


def test_living_child_of_a_killed_holder_does_not_keep_the_lock(directory: Path) -> None:
    """A forked child closes its copy of the lock's descriptor, so that the lock ends with the parent."""
    with process(HOLDER, directory, "fork") as parent:
        (pid,) = read_until_ready(parent)
        try:
            with pytest.raises(LockedError):
                FastStateMachine(directory)
            parent.kill()
            parent.wait()
            os.kill(int(pid), 0)  # it is alive
            with FastStateMachine(directory) as machine:
                assert machine.get(b"k") == b"v"
        finally:
            os.kill(int(pid), signal.SIGKILL)


def test_descriptors_are_not_inherited_by_programs_started(directory: Path) -> None:
    """A program that the host starts inherits neither the lock nor the log, so that it cannot block the next owner."""
    machine = FastStateMachine(directory)
    try:
        for held in (inside(inside(machine).directory).directory, inside(inside(machine).directory).lock):
            assert held is not None
            assert not os.get_inheritable(held.number)
        found = [
            fd
            for fd in map(int, os.listdir("/dev/fd"))
            if _is_open(fd) and os.fstat(fd).st_ino == (directory / "log-1").stat().st_ino
        ]
        assert found
        assert not any(os.get_inheritable(fd) for fd in found)
    finally:
        machine.close()


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_sixteen_processes_race_and_one_at_a_time_wins(directory: Path) -> None:
    """In a race there is one owner at a time, which finds exactly what the owners before it left."""
    rounds = 13  # 16 * 13 = 208
    with ExitStack() as stack:
        start = time.time() + 1.5
        racers = [stack.enter_context(process(RACER, directory, start, rounds)) for _ in range(16)]
        assert [racer.wait(timeout=120) for racer in racers] == [0] * 16
    with FastStateMachine(directory) as machine:
        assert machine.get(b"counter") == b"%d" % (16 * rounds)
        assert machine.last_applied() == LogId(16 * rounds, 1)


def test_asking_for_the_owner_does_not_refuse_an_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An opening waits for a process that locks LOCK only to find the owner; a real owner is reported immediately."""
    FastStateMachine(tmp_path).close()
    attempts = 0
    sleep = time.sleep
    with open(tmp_path / "LOCK", "rb") as asker:
        fcntl.flock(asker, fcntl.LOCK_SH)

        def pause(seconds: float) -> None:
            nonlocal attempts
            attempts += 1
            sleep(seconds)
            if attempts == 40:
                fcntl.flock(asker, fcntl.LOCK_UN)

        monkeypatch.setattr(time, "sleep", pause)
        with FastStateMachine(tmp_path) as machine:
            assert machine.is_running()
            with pytest.raises(LockedError):
                FastStateMachine(tmp_path)
        assert 40 <= attempts < 400
