"""The end of the interpreter: objects are finalized when no other thread runs, and must not wait for one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PATIENCE = 60  # seconds

# A module of its own: threads that use globals of `__main__` would keep those from being finalized.
WORK = """
import sys, threading, time
import fastsm

begun = threading.Event()
path = sys.argv[1]

def opened(path):
    machine = fastsm.FastStateMachine(path, auto_compact=False, contiguous=False)
    machine.apply([(i, 1, fastsm.put(b"%d" % i, bytes(1 << 20))) for i in range(1, 20)])
    return machine

def nothing(machine):
    begun.set()

def snapshots(machine):
    def progress(done, total):
        begun.set()
        time.sleep(0.01)
    while True:
        machine.write_snapshot(path + "-snapshot", progress=progress)

def writes(machine):
    for i in range(100, 1 << 60):
        machine.apply([(i, 1, fastsm.put(b"x", bytes(10 << 20)))])
        machine.flush()
        if i > 103:
            begun.set()

def waits(machine):
    begun.set()
    machine.wait_applied(10**6)

def watches(machine):
    watch = machine.watch()
    watch.read(timeout=0.001)
    begun.set()
    watch.read()

def orders(machine):
    for first in range(0, 400_000, 4_000):
        keys = [b"%09d" % (i * 7919 % 1_000_003) for i in range(first, first + 4_000)]
        machine.apply([(100 + first, 1, fastsm.put_many(keys, keys))])
    begun.set()
    machine.scan(limit=1)

def close(machine):
    try:
        machine.close()
    except fastsm.NotRunningError:  # a thread is within a write, and will never finish it
        pass

def checksum(machine):
    assert machine.state_checksum()
    machine.close()

def snapshot(machine):
    machine.write_snapshot(path + "-last")
    machine.close()

def scan(machine):
    assert machine.scan(b"1", limit=1).entries[0][0] == b"1"
    machine.close()

def opens(machine):
    machine.close()
    with fastsm.FastStateMachine(path) as again:
        assert again.get(b"1") == bytes(1 << 20)
"""
MAIN = """
import sys, threading
import work

machine = work.opened(sys.argv[1])
threading.Thread(target=getattr(work, sys.argv[2]), args=(machine,), daemon=True).start()
work.begun.wait()

class Owner:
    def __init__(self, machine, end):
        self.machine, self.end = machine, end

    def __del__(self):
        assert sys.is_finalizing()
        print("ends", flush=True)
        self.end(self.machine)
        print("ended", flush=True)

owner = Owner(machine, getattr(work, sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("work", "end"),
    [(work, "close") for work in ("nothing", "snapshots", "writes", "waits", "watches")]
    + [("waits", end) for end in ("checksum", "snapshot", "opens", "scan")]
    + [("orders", end) for end in ("close", "scan")],
)
def test_a_finalizer_at_the_end_of_the_interpreter_waits_for_no_thread(work: str, end: str, tmp_path: Path) -> None:
    """A finalizer at the interpreter's end finishes its work, even long work, whatever other threads were doing."""
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "main.py").write_text(MAIN)
    ended = subprocess.run(
        [sys.executable, "-X", "faulthandler", tmp_path / "main.py", tmp_path / "state", work, end],
        capture_output=True, text=True, timeout=PATIENCE, check=False)  # fmt: skip
    assert (ended.returncode, ended.stdout.split()) == (0, ["ends", "ended"]), ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr, ended.stderr[-2000:]
