"""Sixteen processes open one directory at the same time, 200 times: one gets it, and the others learn which one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fastsm import FastStateMachine

PROCESSES, ROUNDS = 16, 200
RACE = """
import mmap, os, signal, sys, time
import fastsm

path, processes, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
shared = mmap.mmap(-1, mmap.PAGESIZE)  # the round; then, for each process, the round that it has finished
owners = mmap.mmap(-1, 4 * processes * rounds)  # per process and round: the pid in the error; 0: it won


def wait(condition):
    while not condition():
        time.sleep(0)


def race(number):
    for round_ in range(1, rounds + 1):
        wait(lambda: shared[0] == round_ % 251)
        at = 4 * (number * rounds + round_ - 1)
        try:
            machine = fastsm.FastStateMachine(path)
        except fastsm.LockedError as error:
            owners[at : at + 4] = (error.pid or 0xFFFFFFFF).to_bytes(4, "little")
            shared[1 + number] = round_ % 251
            continue
        index = machine.last_applied().index + 1
        machine.apply([(index, 1, fastsm.put(b"round", b"%d" % round_))])
        shared[1 + number] = round_ % 251
        wait(lambda: all(shared[1 + n] == round_ % 251 for n in range(processes)))
        assert machine.get(b"round") == b"%d" % round_
        machine.close()
        shared[1 + processes] = round_ % 251


children = []
for number in range(processes):
    pid = os.fork()
    signal.alarm(100)  # so that no process waits for ever for a dead one
    if pid == 0:
        try:
            race(number)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    children.append(pid)
for round_ in range(1, rounds + 1):
    shared[0] = round_ % 251
    wait(lambda: shared[1 + processes] == round_ % 251)
    told = [int.from_bytes(owners[at : at + 4], "little")
            for at in (4 * (number * rounds + round_ - 1) for number in range(processes))]
    assert told.count(0) == 1, f"round {round_}: {told.count(0)} have it"
    winner = children[told.index(0)]
    # Between taking the lock and writing its id, LOCK may still name the previous holder, or none.
    named = [pid for pid in told if pid == winner]
    others = {pid for pid in told if pid not in (0, winner, 0xFFFFFFFF)}
    assert others <= set(children), others
    print(len(named))
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * processes
"""


def test_one_of_sixteen_processes_has_the_lock_in_each_of_200_rounds(tmp_path: Path) -> None:
    """In each round one process opens the directory and the others are refused; the next one finds what it wrote."""
    ended = subprocess.run(
        [sys.executable, "-c", RACE, tmp_path / "state", str(PROCESSES), str(ROUNDS)], capture_output=True, text=True,
        timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    told = [int(line) for line in ended.stdout.split()]
    assert len(told) == ROUNDS
    assert sum(told) >= ROUNDS * (PROCESSES - 1) * 0.8  # mostly, the error names the winner
    with FastStateMachine(tmp_path / "state") as machine:
        assert (machine.last_applied().index, machine.get(b"round")) == (ROUNDS, b"%d" % ROUNDS)
