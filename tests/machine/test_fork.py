"""A forked child: its copy of a machine cannot be used, and does no harm to the parent's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastsm import FastStateMachine, LogId

PARENT = """
import asyncio, fastsm, gc, os, signal, sys
from pathlib import Path

path, ending, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])


def contents():
    return {name: Path(path, name).read_bytes() for name in sorted(os.listdir(path))}


def refused(call):
    try:
        call()
    except fastsm.NotRunningError as error:
        assert "fork" in str(error), error
    else:
        raise AssertionError("the child may use its parent's machine")


def use(machine, view):
    before = contents()
    assert not machine.is_running()
    for call in (
        lambda: machine.get(b"k"), lambda: machine.get_many([b"k"]), lambda: b"k" in machine, lambda: len(machine),
        lambda: machine.apply([]), machine.flush, machine.save_hard_state, machine.clear, machine.start,
        machine.stop, machine.last_applied, machine.durable, machine.membership, machine.stats,
        lambda: machine.entry_term(1), lambda: machine.update_last_applied((9999, 9)),
        lambda: asyncio.run(machine.apply_chunk([])), lambda: asyncio.run(machine.flush_async()),
        lambda: asyncio.run(machine.apply_chunk([(9999, 1, fastsm.put(b"large", bytes(1 << 20)))])),
        lambda: asyncio.run(machine.reset()),
    ):
        refused(call)
    repr(machine)
    assert bytes(view) == b"seen by the child"
    assert contents() == before


def child(machine, view):
    signal.alarm(30)  # so that a child that hangs fails the test
    use(machine, view)
    if ending == "_exit":
        os._exit(7)
    if ending == "exit":
        sys.exit(7)
    if ending == "exception":
        raise RuntimeError("the child's own")
    if ending == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    before = contents()
    machine.close()
    machine.close()
    assert contents() == before
    del machine
    gc.collect()
    assert contents() == before
    os._exit(7)


def parent(machine):
    machine.apply([(1, 1, fastsm.put(b"k", b"seen by the child"))])
    view = machine.get_view(b"k")
    asyncio.run(machine.apply_chunk([(2, 1, fastsm.put(b"large", bytes(1 << 20)))]))  # a thread of its own
    asyncio.run(machine.flush_async())
    for index in range(3, 3 + rounds):
        machine.apply([(index, 1, fastsm.put(b"%d" % index, b"v" * 100))])
        if index % 2:
            machine.flush()
        pid = os.fork()
        if pid == 0:
            child(machine, view)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code == {"_exit": 7, "exit": 7, "exception": 1, "signal": -9, "close": 7}[ending], code
        try:
            fastsm.FastStateMachine(path)
        except fastsm.LockedError as error:
            assert error.pid == os.getpid()
        else:
            raise AssertionError("the child freed its parent's lock")
        assert machine.apply([(index, 1, b"")]) == [None]
        machine.flush()
        assert machine.durable().index == index


with fastsm.FastStateMachine(path) as machine:
    parent(machine)
"""


@pytest.mark.parametrize("ending", ["_exit", "exit", "exception", "signal", "close"])
def test_forked_child_is_refused_and_harms_nothing(ending: str, directory: Path) -> None:
    """In a child every use is a ``NotRunningError``; however the child ends, the parent's files and lock stay."""
    rounds = 10
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PARENT, str(directory), ending, str(rounds)],
        capture_output=True, text=True, timeout=120, check=False, cwd=directory.parent,
    )
    assert result.returncode == 0, result.stderr
    # Newer Pythons show the source line of a `-c` in the traceback, indented.
    errors = [
        line for line in result.stderr.splitlines() if ("Error" in line or "Warning" in line) and line[0] != " "
    ]
    assert errors == ["RuntimeError: the child's own"] * (rounds if ending == "exception" else 0)
    with FastStateMachine(directory) as machine:
        assert machine.stats().recovery.clean
        assert machine.last_applied() == LogId(2 + rounds, 1)
        assert machine.len() == 2 + rounds


@pytest.mark.parametrize("busy", ["flush", "apply"])
def test_fork_while_another_thread_is_inside(busy: str, directory: Path) -> None:
    """A child forked while a thread of the parent writes or syncs does not hang and does no harm."""
    script = f"""
import fastsm, os, signal, sys, threading, time
from fastsm.disk.files import Directory

class Slow(Directory):
    def sync(self, fd):
        time.sleep(0.02)
        Directory.sync(fd)

machine = fastsm.FastStateMachine(sys.argv[1], sync={"apply" if busy == "apply" else "flush"!r}, _files=Slow)
over = threading.Event()

def work():
    index = 0
    while not over.is_set():
        index += 1
        machine.apply([(index, 1, fastsm.put(b"k", b"%d" % index))])
        machine.flush()

thread = threading.Thread(target=work)
thread.start()
for number in range(50):
    time.sleep(0.002)
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        try:
            machine.flush()
        except fastsm.NotRunningError:
            machine.close()
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
over.set()
thread.join()
machine.flush()
assert machine.durable() == machine.last_applied()
assert machine.get(b"k") == b"%d" % machine.last_applied().index
machine.close()
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, str(directory)],
        capture_output=True, text=True, timeout=120, check=False, cwd=directory.parent,
    )
    assert result.returncode == 0, result.stderr
    with FastStateMachine(directory) as machine:
        assert machine.stats().recovery.clean
