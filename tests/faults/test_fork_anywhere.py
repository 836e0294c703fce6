"""A fork by a signal handler at any moment of the parent's work; the child ends immediately or continues."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import fastsm
from fastsm import FastStateMachine
from fastsm.integrations.pysyncobj.journal import FastJournal as Journal

POINTS = 50
PARENT = """
import os, random, signal, sys, time
from contextlib import closing

import fastsm
import fastsm.raft_log
from fastsm.integrations.pysyncobj.journal import FastJournal as Journal

fastsm.raft_log.SEGMENT_BYTES = 20_000
root, ending, points = sys.argv[1], sys.argv[2], int(sys.argv[3])
parent = os.getpid()
dice = random.Random(ending)
living = []
forks = 0
armed = False


def fork(number, frame):
    global armed, forks
    if not armed:
        return
    armed = False
    forks += 1
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # a child that hangs fails the test
        if ending == "_exit":
            os._exit(7)
        if ending == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        if ending == "sys.exit":
            sys.exit(7)
        if ending == "the end":
            raise TheEnd
        time.sleep(60)
        os._exit(0)
    if ending == "lives on":
        living.append(pid)
        return
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == {"_exit": 7, "signal": -9, "sys.exit": 7, "the end": 0}[ending], code


class TheEnd(BaseException):
    pass


def work(machine, journal, log):
    global armed
    values = {}
    index = 0

    def apply():
        nonlocal index
        for _ in range(dice.randrange(1, 30)):
            index += 1
            key, value = b"key-%d" % dice.randrange(60), dice.randbytes(dice.choice((10, 100, 20_000)))
            machine.apply([(index, 1, fastsm.put(key, value))])
            values[key] = value

    def append():
        first = journal.last_index + 1
        for number in range(20):
            journal.add(b"entry %d" % (first + number), first + number, 1)
        journal.sync()

    def use_log():
        first = log.last_index + 1
        log.append([(first + number, 1, b"entry %d" % (first + number)) for number in range(dice.randrange(1, 200))])
        log.sync()

    def vote():
        log.save_hard_state(log.hard_state()[0] + 1, b"me")

    def compact_log():
        if log.last_index > 20:
            log.compact((log.last_index - 20, 1))
            log.sync()

    target = os.path.join(root, "snapshots")
    calls = [
        apply, machine.flush, machine.save_hard_state, append, append, use_log, use_log, use_log, vote, compact_log,
        log.verify, lambda: machine.write_snapshot(target),
        lambda: machine.write_snapshot(target, compress="zstd"), lambda: machine.compact(index),
        lambda: (machine.write_snapshot(target), machine.install_snapshot(None, target)),
    ]
    apply()
    while forks < points:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.0001, 0.004))
        while armed:
            dice.choice(calls)()
        assert dict(machine.items()) == values
        assert machine.last_applied() == (index, 1)
        apply()
        machine.flush()
    return values, index


try:
    with fastsm.FastStateMachine(os.path.join(root, "state"), retain_entries=0) as machine:
        with closing(Journal(os.path.join(root, "journal"))) as journal, fastsm.RaftLog(root + "/raft-log") as log:
            signal.signal(signal.SIGALRM, fork)
            values, index = work(machine, journal, log)
            last = journal.last_index
            kept = log.first_index, log.last_index, log.hard_state()
        assert os.listdir(os.path.join(root, "snapshots")) == ["snapshot.fsm"]
    assert os.getpid() == parent
    with fastsm.FastStateMachine(os.path.join(root, "state"), verify_on_open="full") as machine:
        machine._check()
        assert dict(machine.items()) == values and machine.stats().recovery.clean
    with closing(Journal(os.path.join(root, "journal"))) as journal:
        assert journal.last_index == last
        assert [journal[n][0] for n in range(len(journal))] == [b"entry %d" % n for n in range(1, last + 1)]
    with fastsm.RaftLog(root + "/raft-log") as log:
        log.verify()
        assert (log.first_index, log.last_index, log.hard_state()) == kept and log.stats().recovery.clean
        found = log.entries(kept[0], kept[1])
        assert [entry.command for entry in found] == [b"entry %d" % n for n in range(kept[0], kept[1] + 1)]
    for pid in living:
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9, "the child did not live on"
    print("fine:", forks, "forks,", last, "entries of the journal")
except TheEnd:
    pass  # the child runs to its end, through its copy of the parent's stack
"""


@pytest.mark.parametrize("ending", ["_exit", "sys.exit", "the end", "signal", "lives on"])
def test_a_child_forked_anywhere_harms_nothing(ending: str, tmp_path: Path) -> None:
    """Forks at 50 points of applies, flushes, snapshots, installs, compactions and log calls do not harm the parent."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PARENT, tmp_path, ending, str(POINTS)],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.splitlines()[-1].startswith(f"fine: {POINTS} forks"), ended.stdout
    print(ended.stdout.splitlines()[-1])


CALLER = """
import os, sys
from contextlib import closing

import fastsm
from fastsm.integrations.pysyncobj.journal import FastJournal as Journal

root, what = sys.argv[1:]


def fork(done, total):
    pid = os.fork()
    if pid == 0:
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


with fastsm.FastStateMachine(root + "/state") as machine, closing(Journal(root + "/journal")) as journal:
    machine.apply([(1, 1, fastsm.put(b"key", b"value"))])
    if what == "write_snapshot":
        machine.write_snapshot(root + "/snapshots", progress=fork)
    elif what == "compact":
        machine.compact(1, progress=fork)
    elif what == "install_snapshot":
        machine.write_snapshot(root + "/snapshots")
        machine.install_snapshot(None, root + "/snapshots", progress=fork)
    elif what == "journal":
        journal.add(b"entry", 1, 1)
        pid = os.fork()
        journal.add(b"another", 2, 1) if pid else sys.exit(7)  # the child leaves both blocks
        os.waitpid(pid, 0)
        journal.add(b"a third", 3, 1)
"""


@pytest.mark.parametrize("what", ["write_snapshot", "compact", "install_snapshot", "journal"])
def test_a_child_that_exits_from_a_callback_takes_nothing_along(what: str, tmp_path: Path) -> None:
    """A child that exits within its parent's call removes and trims no files, and ends no work of the parent."""
    subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", CALLER, tmp_path, what], check=True, cwd=tmp_path
    )
    with FastStateMachine(tmp_path / "state") as machine:
        assert machine.get(b"key") == b"value"
    if what == "write_snapshot":
        with fastsm.open_snapshot(tmp_path / "snapshots") as snapshot:
            snapshot.verify()
    if what == "journal":
        with closing(Journal(tmp_path / "journal")) as journal:
            assert [journal[n][0] for n in range(len(journal))] == [b"entry", b"another", b"a third"]


FORKS = """
import os, signal, sys, threading, time
from fastsm.background import undisturbed

forked = threading.Event()


def fork(number, frame):
    if pid := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        forked.set()
    else:
        raise SystemExit(7)


def work():
    os.kill(os.getpid(), signal.SIGUSR1)
    assert forked.wait(60)
    return "done"


signal.signal(signal.SIGUSR1, fork)
assert undisturbed(work) == "done"
"""


def test_an_exit_by_a_handler_in_a_forked_child_ends_the_child(tmp_path: Path) -> None:
    """If a handler forks during an uninterruptible step, the child ends by its `sys.exit`, and the parent continues."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120)
