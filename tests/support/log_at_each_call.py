"""A program that repeats calls of a ``RaftLog``, each time with a fault at another system call or allocation.

Run it under the shim: ``log_at_each_call.py FAULT`` takes each scene and, for every n, forks a child in a fresh copy of
the scene's start. There the n-th system call on files kills the process or fails, or the n-th allocation fails. A child
that was not killed checks itself; the parent checks the files that are left. Prints counts and violations as JSON.
"""

from __future__ import annotations

import errno
import gc
import itertools
import json
import logging
import mmap
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

with suppress(ImportError):
    import _testcapi

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fastsm.raft_log
from fastsm import Entry, FastsmError, LogId, RaftLog, StorageError
from support import shim
from support.faulty import crash_copy, memory_directory
from support.generations import open_files
from support.inside import inside
from support.list_log import ListLog, LogState, Step, do, state_of

HANGS_AFTER = 20
MOST = 1000  # trials of a scene
DENSE = 80  # allocations that fail one by one; of the hundreds after them only some do
QUIET = 10  # trials in a row without an error, after which the scene is done
CODES = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.ENOMEM, errno.EDQUOT)
ACTIONS = {
    "kill": shim.KILL, "kill after": shim.KILL_AFTER, "fail": shim.FAIL, "fail, done": shim.FAIL_DONE,
    "malloc": shim.FAIL_ALLOCATION, "nomemory": 0,
}  # fmt: skip

# The interpreter reports a lack of memory in other ways, too: for locks and conversions, for instance.
EXPECTED = (StorageError, MemoryError), (StorageError, MemoryError, RuntimeError, SystemError, TypeError)

returned = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the children: how many steps of the scene have returned


def entries(first: int, last: int, term: int, size: int = 500) -> Step:
    return Step("append", ([Entry(index, term, bytes([index % 256]) * size) for index in range(first, last + 1)],))


SYNC, CLOSE = Step("sync", ()), Step("close", ())
TEMPLATE = (Step("save_hard_state", (2, b"me")), *(entries(index, index + 3, 2) for index in range(1, 40, 4)), SYNC)


class Scene(NamedTuple):
    """Steps on a log that the template's steps made.

    ``opens``: faults hit the opening, too; ``killed``: the log was left by a kill; ``new``: there is no log yet.
    """

    steps: tuple[Step, ...]
    opens: bool = False
    killed: bool = False
    new: bool = False


SCENES = {
    "append, sync": Scene((entries(41, 41, 2), SYNC, entries(42, 44, 2), entries(45, 45, 3, 20_000), SYNC, SYNC)),
    "append large": Scene((entries(41, 43, 2, 100_000), SYNC, entries(44, 44, 2, 300_000))),
    "new segments": Scene(tuple(entries(index, index + 1, 2, 3000) for index in range(41, 51, 2))),
    "truncate, append, sync": Scene((Step("truncate_after", (33,)), entries(34, 38, 3), SYNC, entries(39, 39, 3))),
    "truncate all": Scene((Step("truncate_after", (0,)), SYNC, entries(1, 3, 1), SYNC)),
    "compact": Scene((
        Step("compact", (LogId(20, 2),)), SYNC, entries(41, 42, 2), Step("compact", (LogId(42, 2),)), SYNC)),
    "compact beyond": Scene((Step("compact", (LogId(90, 3),)), SYNC, entries(91, 92, 3), SYNC)),
    "compact across": Scene((Step("compact", (LogId(30, 3),)), entries(31, 33, 3), SYNC)),
    "save_hard_state": Scene((
        Step("save_hard_state", (3, None)), Step("save_hard_state", (3, b"you")), Step("save_hard_state", (9, b"")))),
    "close": Scene((entries(41, 42, 2), Step("compact", (LogId(20, 2),)), CLOSE)),
    "open": Scene((), opens=True),
    "open, killed": Scene((), opens=True, killed=True),
    "open, new": Scene((Step("save_hard_state", (1, b"me")), entries(1, 2, 1), SYNC), opens=True, new=True),
}


def perform(log: RaftLog | ListLog, step: Step) -> None:
    if step.method == "close" and isinstance(log, ListLog):
        return
    do(log, step)


def states_of(scene: Scene) -> list[LogState]:
    """Return the model's states before the first step and after each step."""
    model = ListLog()
    if not scene.new:
        for step in (*TEMPLATE, *(UNSYNCED if scene.killed else ())):
            perform(model, step)
    states = [model.state]
    for step in scene.steps:
        perform(model, step)
        states.append(model.state)
    return states


UNSYNCED = (
    entries(41, 41, 2), Step("compact", (LogId(22, 2),)), Step("truncate_after", (40,)), entries(41, 42, 5),
    Step("save_hard_state", (7, b"she")), entries(43, 43, 6))  # fmt: skip


def prepare(scene: Scene, root: Path) -> None:
    """Make the log that a scene starts from in ``root/log``; a killed one also gets a torn tail."""
    if scene.new:
        root.mkdir()
        return
    log = RaftLog(root / "making")
    for step in (*TEMPLATE, *(UNSYNCED if scene.killed else ())):
        do(log, step)
    if scene.killed:
        crash_copy(root / "making", root / "log")
        inside(log).abandon()
        newest = max((root / "log").glob("journal-*"), key=lambda each: int(each.name.partition("-")[2]))
        content = newest.read_bytes()
        end = len(content.rstrip(b"\0")) + 7 & ~7
        newest.write_bytes(content[:end] + b"torn" * 30 + content[end + 120 :])
    else:
        log.close()
        (root / "making").rename(root / "log")


def allowed(states: list[LogState], done: int) -> list[LogState]:
    """Return what a kill may leave after `done` steps: that state, the next, or a prefix of the next append."""
    before, after = states[done], states[min(done + 1, len(states) - 1)]
    found = [before, after]
    if after.entries[: len(before.entries)] == before.entries:
        found += [before._replace(entries=after.entries[:n]) for n in range(len(before.entries), len(after.entries))]
    return found


def reopen(directory: Path) -> LogState:
    """Return the log's state; check that it is the same after another kill, and that the log takes new entries."""
    log = RaftLog(directory)
    found = state_of(log)
    assert log.durable_index <= log.last_index
    inside(log).abandon()
    log = RaftLog(directory)
    assert state_of(log) == found, "a second opening finds another state"
    log.verify()
    log.append([(log.last_index + 1, log.last_term, b"goes on")])
    log.sync()
    assert log.durable_index == log.last_index
    inside(log).abandon()
    return found


class Sweep:
    """A scene with a fault, for every n."""

    def __init__(self, name: str, fault: str, root: Path) -> None:
        self.name, self.fault = name, fault
        self.scene = SCENES[name]
        self.states = states_of(self.scene)
        self.library = shim.Shim()
        self.prepared, self.trial = root / "prepared", root / "trial"
        self.outcomes: Counter[str] = Counter()
        self.violations: list[str] = []
        prepare(self.scene, self.prepared)

    def run(self) -> Sweep:
        quiet = 0
        for n in range(1, MOST):
            if self.fault == "nomemory" and n > DENSE and n % 8:
                continue
            outcome, violation = self.try_it(n)
            quiet = quiet + 1 if outcome == "gone around" else 0
            if violation:
                self.violations.append(f"{self.name}, {self.fault}, n = {n}, {outcome}: {violation}")
            if outcome == "over" or len(self.violations) > 3 or (self.fault == "nomemory" and quiet == QUIET):
                break
            self.outcomes[outcome] += 1
        return self

    def try_it(self, n: int) -> tuple[str, str]:
        """Return how the trial ended, and what was wrong."""
        shutil.rmtree(self.trial, ignore_errors=True)
        shutil.copytree(self.prepared, self.trial)
        returned[0] = 0
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            signal.alarm(HANGS_AFTER)
            self.be_child(writing, n)
        os.close(writing)
        with open(reading, encoding="utf-8", errors="replace") as pipe:
            told = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == -signal.SIGKILL and self.fault.startswith("kill"):
            outcome, violation = "killed", ""
        elif status != 0 or not told:
            return "violated", f"the child ended with {status}, {told}"
        else:
            outcome, _, violation = told.partition("\n")
        return outcome, violation or self.judge_left(outcome)

    def judge_left(self, outcome: str) -> str:
        try:
            found = reopen(self.trial / "log")
            right = allowed(self.states, returned[0]) if outcome == "killed" else self.states[returned[0] :][:1]
            assert found in right, f"{returned[0]} steps had returned; found {shown(found)}"
        except (AssertionError, FastsmError) as error:
            return "".join(traceback.format_exception(error))
        return ""

    # ---- the child ---------------------------------------------------------------------------------------

    def be_child(self, writing: int, n: int) -> None:
        try:
            os.write(writing, f"{self.act(n)}\n".encode())
        except BaseException:
            os.write(writing, f"violated\n{traceback.format_exc()[-1500:]}".encode())
        finally:
            os._exit(0)

    def act(self, n: int) -> str:
        log = None if self.scene.opens else RaftLog(self.trial / "log")
        error = ""  # as text, because a traceback would keep files open
        gc.collect()
        gc.disable()
        self.arm(n)
        try:
            if log is None:
                log = RaftLog(self.trial / "log")
            for step in self.scene.steps:
                perform(log, step)
                returned[0] += 1
        except EXPECTED[self.fault == "nomemory"] as raised:
            error = f"{type(raised).__name__}: {raised}"
        try:
            struck = self.disarm()
        except MemoryError:  # the allocation that fails, only one, is that of this call's frame
            struck = self.disarm()
        gc.enable()
        outcome = "over" if not struck else error.partition(":")[0] or "gone around"
        self.judge(log, error)
        del log
        gc.collect()
        assert (left := open_files(self.trial)) == [], f"left open: {left}"
        return outcome

    def arm(self, n: int) -> None:
        if self.fault == "nomemory":  # the interpreter's allocations, which include the compiled modules' objects
            _testcapi.set_nomemory(n, n + 1)
        else:
            self.library.arm(ACTIONS[self.fault], n, CODES[n % len(CODES)])

    def disarm(self) -> str:
        if self.fault == "nomemory":
            _testcapi.remove_mem_hooks()
            return "an allocation"
        return self.library.disarm()

    def judge(self, log: RaftLog | None, error: str) -> None:
        """Check that an error changed nothing in memory, except a poisoned log's vote; then do the other steps."""
        done = returned[0]
        if log is None:
            gc.collect()
            assert open_files(self.trial) == [], "left open by an opening that failed"
            log = RaftLog(self.trial / "log")
        if inside(log).is_closed():  # closing releases everything even if its last sync fails
            returned[0] = len(self.states) - 1
            return
        if self.fault == "nomemory" and state_of(log) != self.states[done]:
            done = returned[0] = done + 1  # the step was done, but there was no memory to return
        assert state_of(log) == self.states[done], f"after {error}: {shown(state_of(log))}"
        assert log.durable_index <= log.last_index
        if inside(log).is_poisoned():
            assert error
            self.judge_poisoned(log, done)
            return
        for step in self.scene.steps[done:]:
            perform(log, step)
            returned[0] += 1
        if not inside(log).is_closed():
            assert state_of(log) == self.states[-1]
            log.sync()
            assert log.durable_index == log.last_index
            log.close()

    def judge_poisoned(self, log: RaftLog, done: int) -> None:
        """Check that writes raise, and that only the vote that could not be synced may be found by a reopening."""
        with suppress(StorageError):
            log.append([(log.last_index + 1, log.last_term, b"")])
            raise AssertionError("a poisoned log took an entry")
        with suppress(StorageError):
            log.close()
        del log
        after = self.states[min(done + 1, len(self.states) - 1)]
        with RaftLog(self.trial / "log") as again:
            found = state_of(again)
            assert found in (self.states[done], after), f"after a poisoning: {shown(found)}"
            returned[0] = done if found == self.states[done] else done + 1


def shown(state: LogState) -> str:
    last = state.entries[-1][:2] if state.entries else None
    return f"{state.border}, {len(state.entries)} entries up to {last}, {state.hard_state}"


def main() -> None:
    logging.getLogger("fastsm").setLevel(logging.CRITICAL + 1)
    fastsm.raft_log.SEGMENT_BYTES = 8192
    fault, *names = sys.argv[1:]
    found: dict[str, Any] = {"violations": [], "outcomes": {}}
    with memory_directory() as root:
        gc.collect()
        gc.freeze()
        for number, name in zip(itertools.count(), names or SCENES, strict=False):
            (root / str(number)).mkdir()
            sweep = Sweep(name, fault, root / str(number)).run()
            found["outcomes"][name] = dict(sweep.outcomes)
            found["violations"] += sweep.violations
            shutil.rmtree(root / str(number))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
