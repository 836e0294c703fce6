"""A program that repeats an operation, each time with a fault at another of its calls. Run under the shim.

``at_each_call.py FAULT`` takes each scene and, for every n, forks a child in a fresh copy of the template. There the
n-th system call on files kills the process or fails, or the n-th allocation fails, or a resource limit leaves room for
n - 1 steps. The child checks itself and exits; the parent checks the files that are left. Counts and violations are
printed as JSON.
"""

from __future__ import annotations

import errno
import gc
import itertools
import json
import logging
import mmap
import os
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import _testcapi

import fastsm
from fastsm import Entry, FastsmError, FastStateMachine, StorageError
from fastsm.core import generations
from fastsm.snapshot import codec
from support import shim
from support.faulty import crash_copy, memory_directory
from support.generations import (
    OPTIONS,
    SCENES,
    Scene,
    assert_target_is_whole,
    build_template,
    open_files,
    reopen,
    state_of,
)
from support.inside import inside

HANGS_AFTER = 20
CODES = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.ENOMEM, errno.EDQUOT)
SIZES = (10, 13 << 10, 10, 140 << 10, 0)  # of values: stored, written aside, written in several pieces

acknowledged = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the children: which chunks have returned


def chunk(machine: FastStateMachine, start: int, number: int) -> list[Entry]:
    """Return the chunk with a number, counted from the entry `start`; a part of it may be applied already."""
    term = machine.last_applied().term
    index = start + 2 * number
    value = bytes([number + 1]) * SIZES[number]
    return [Entry(index + 1, term, fastsm.put(b"written", value)), Entry(index + 2, term, fastsm.put(b"too", value))]


def write_chunks(machine: FastStateMachine, _: Path, each: Callable[[], object] = lambda: None) -> None:
    """Apply chunks of all sizes, with two flushes; entries that are applied already are skipped."""
    start = int(machine.membership()[1])  # type: ignore[index]
    for number in range(len(SIZES)):
        machine.apply(chunk(machine, start, number))
        acknowledged[number] = 1
        each()
        if number in (1, 3):
            machine.flush()
    machine.save_hard_state()


@fastsm.procedure
def mix(tx: Any, payload: bytes) -> Any:
    """Write values of all kinds, with and without deadlines, and read what was written."""
    tx.put(b"timed", payload, expires=500)
    tx.add(b"number", 1)
    tx.touch(b"swapped", 700)
    tx.put(b"large", bytes(700_000))
    return [tx.delete_range(b"r", b"s"), tx.count(), tx.scan(prefix=b"number")[0][1]]


def judge_chunk(machine: FastStateMachine, _: Path) -> None:
    """Apply a chunk whose entries depend on the state: sessions, numbers, ticks, ranges, a procedure."""
    start = int(machine.membership()[1])  # type: ignore[index]
    session = start + 1
    commands = [
        fastsm.open_session(expires=800), fastsm.put(b"due", b"", expires=3), fastsm.put(b"r1", b""),
        fastsm.compare_and_swap(b"swapped", None, b"", expires=4), fastsm.call("mix", b"payload"), fastsm.tick(5),
        fastsm.once(session, 1, fastsm.add(b"number", 3), expires=900), fastsm.touch(b"number", 6),
        fastsm.once(session, 2, fastsm.call("mix")), fastsm.batch([fastsm.add(b"due", 1), fastsm.delete_prefix(b"k-")]),
        fastsm.transaction([fastsm.exists(b"timed")], [fastsm.add(b"number", 1), fastsm.read(b"timed")]),
    ]  # fmt: skip
    commands += [fastsm.add(b"number %d" % number, number) for number in range(1000)]  # more than one block of scratch
    commands += [fastsm.forget(session), fastsm.tick(1000)]
    term = machine.last_applied().term
    machine.apply([(index, term, command) for index, command in enumerate(commands, start + 1)])


def open_again(opened: Any, root: Path) -> None:
    """Open the state, and append the machine to the list."""
    opened.append(FastStateMachine(f"{root}/state", **OPTIONS))


ALL = SCENES | {
    "apply and flush": Scene(write_chunks),
    "apply, judged": Scene(judge_chunk),
    "open": Scene(open_again),
    "open, killed": Scene(open_again),
    "open, table": Scene(open_again, table=True),
}


class Fault(NamedTuple):
    """A kind of fault. ``strike(library, n)`` returns a block in which the n-th one happens.

    The block's value names the call that met the fault; it is empty if there was no n-th call.
    """

    strike: Callable[[shim.Shim, int], Any]
    kills: bool = False
    most: int = 1000  # trials of a scene, at most
    enough: int = 1000  # trials in a row without an error, after which the scene is done
    sparse: int = 1000  # beyond this n some are skipped, because there are thousands


@contextmanager
def armed(action: int, library: shim.Shim, n: int) -> Iterator[list[str]]:
    struck: list[str] = []
    library.arm(action, n, CODES[n % len(CODES)])
    try:
        yield struck
    finally:
        struck.append(library.disarm())


@contextmanager
def without_memory(library: shim.Shim, n: int) -> Iterator[list[str]]:
    """Let only the interpreter's n-th allocation fail."""
    struck: list[str] = []
    _testcapi.set_nomemory(n, n + 1)
    try:
        yield struck
    finally:
        _testcapi.remove_mem_hooks()
        struck.append("allocation")


@contextmanager
def limited(limit: int, start: int, step: int, library: shim.Shim, n: int) -> Iterator[list[str]]:
    """Limit a resource to what the process uses now, and n - 1 steps more."""
    soft, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (start + (n - 1) * step, hard))
    try:
        yield ["limit"]
    finally:
        resource.setrlimit(limit, (soft, hard))


def descriptors() -> int:
    """Return the number that the next descriptor will get."""
    fd = os.open("/", os.O_RDONLY)
    os.close(fd)
    return fd


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


FAULTS = {
    "kill": Fault(lambda library, n: armed(shim.KILL, library, n), kills=True),
    "kill after": Fault(lambda library, n: armed(shim.KILL_AFTER, library, n), kills=True),
    "fail": Fault(lambda library, n: armed(shim.FAIL, library, n)),
    "fail, done": Fault(lambda library, n: armed(shim.FAIL_DONE, library, n)),
    "short": Fault(lambda library, n: armed(shim.SHORT, library, n)),
    "malloc": Fault(lambda library, n: armed(shim.FAIL_ALLOCATION, library, n)),
    "nomemory": Fault(without_memory, most=60, enough=3, sparse=4),
    "descriptors": Fault(lambda library, n: limited(resource.RLIMIT_NOFILE, descriptors(), 1, library, n), enough=3),
    "address space": Fault(
        lambda library, n: limited(resource.RLIMIT_AS, address_space(), 1 << 20, library, n), most=40, enough=3
    ),
    "file size": Fault(lambda library, n: limited(resource.RLIMIT_FSIZE, 0, 12 << 10, library, n), most=60, enough=3),
}


class Trial:
    """One scene with one fault, for one n, in a child of its own."""

    def __init__(self, sweep: Sweep, n: int) -> None:
        self.sweep = sweep
        self.n = n
        self.root = sweep.root / "trial"

    def run(self) -> tuple[str, str]:
        """Return how the trial ended ("over", "killed", or what the child reports), and what was wrong."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.sweep.prepared, self.root)
        acknowledged[: len(SIZES)] = bytes(len(SIZES))
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            signal.alarm(HANGS_AFTER)
            self._be_child(writing)
        os.close(writing)
        with open(reading, encoding="utf-8", errors="replace") as pipe:
            told = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == -signal.SIGKILL and self.sweep.fault.kills:
            return "killed", self._judge(self._judge_killed)
        if status != 0 or not told:
            return "violated", f"the child ended with {status}, {told}"
        outcome, _, violation = told.partition("\n")
        return outcome, violation or self._judge(self._judge_closed)

    def _judge(self, judge: Callable[[], None]) -> str:
        try:
            judge()
        except (AssertionError, FastsmError) as error:
            return "".join(traceback.format_exception(error))
        return ""

    def _judge_killed(self) -> None:
        metadata = assert_target_is_whole(self.root, alone=False)
        state = reopen(self.root)
        assert state in self.sweep.states, f"applied {state[0]}, generation {state[-1]}"
        if self.sweep.name == "apply and flush":
            assert self.sweep.states.index(state) >= sum(acknowledged[: len(SIZES)]), "an apply that returned is gone"
        if state[3] is not None and self.sweep.name != "install_snapshot" and "install" not in self.sweep.name:
            assert metadata.last_included >= state[3].last_included

    def _judge_closed(self) -> None:
        state = reopen(self.root)
        assert state[:-1] in [right[:-1] for right in self.sweep.states], f"applied {state[0]}"

    def _be_child(self, writing: int) -> None:
        try:
            outcome = self._act()
            os.write(writing, f"{outcome}\n".encode())
        except BaseException:
            os.write(writing, f"violated\n{traceback.format_exc()[-1500:]}".encode())
        finally:
            os._exit(0)

    def _act(self) -> str:
        sweep = self.sweep
        opens = sweep.name.startswith("open")
        machine: Any = [] if opens else open_stage(self.root)
        before = open_files(self.root)
        error = None
        gc.collect()
        gc.disable()
        strike = sweep.fault.strike(sweep.library, self.n)
        try:
            with strike as struck:
                sweep.scene.act(machine, self.root)
        except (FastsmError, MemoryError, RuntimeError) as raised:
            if isinstance(raised, RuntimeError) and "allocate lock" not in str(raised):
                raise  # "can't allocate lock" is how the interpreter reports a lack of memory for a lock
            error = type(raised).__name__, getattr(raised, "errno", None), repr(raised)
        gc.enable()
        gc.collect()
        outcome = "gone around" if error is None else f"{error[0]} {errno.errorcode.get(error[1] or 0, '')}".strip()
        if not struck[0]:
            outcome = "over"
        if opens:
            machine = self._judge_opened(machine)
        elif machine.is_running():
            self._judge_running(machine, error, before)
        with suppress(StorageError):
            machine.close()
        del machine
        gc.collect()
        assert open_files(self.root) == [], f"left open: {open_files(self.root)}, after {error}"
        return outcome

    def _judge_opened(self, opened: list[FastStateMachine]) -> FastStateMachine:
        if not opened:
            assert open_files(self.root) == [], f"left open: {open_files(self.root)}"
            open_again(opened, self.root)
        assert state_of(opened[0]) == self.sweep.states[0]
        return opened.pop()

    def _judge_running(self, machine: FastStateMachine, error: tuple[str, Any, str] | None, before: list[str]) -> None:
        states = self.sweep.states
        inside(machine).check()
        state = state_of(machine)
        copy = crash_copy(self.root, self.root.with_name("copy"))
        try:
            left = reopen(copy)
        finally:
            shutil.rmtree(copy)
        assert left in states, f"{error}: a crash would leave {left[0]}"
        poisoned = inside(machine).log.poisoned is not None
        if error is None:
            assert state == left == states[-1], "no error, but not done"
        elif self.sweep.name == "apply and flush":
            assert states.index(state) == sum(acknowledged[: len(SIZES)]), f"{error}: {state[0]}"
            assert poisoned or left == state, f"{error}: on disk {left[0]}, in memory {state[0]}"
        else:
            assert state[:3] + state[4:] == states[0][:3] + states[0][4:], f"{error}: not the old state"
            now = open_files(self.root)
            assert poisoned or now == before, f"{error}: open are {now}, before {before}"
        if poisoned:
            assert error is not None
            return
        self.sweep.scene.act(machine, self.root)
        assert not machine.is_running() or state_of(machine)[:-1] == states[-1][:-1], f"{error}: doing it again fails"
        assert_target_is_whole(self.root, alone=True)


def open_stage(root: Path) -> FastStateMachine:
    """Open the template, and append some frames; the membership records the index of the last entry."""
    machine = FastStateMachine(root / "state", **OPTIONS, procedures=[mix])
    last = machine.last_applied()
    machine.apply([Entry(last.index + 1, last.term, fastsm.config(b"%d" % (last.index + 4)))])
    for index in range(last.index + 2, last.index + 5):
        machine.apply([Entry(index, last.term, fastsm.put(b"k-%d" % index, b"v" * 50))])
    return machine


class Sweep:
    """A scene with a fault, for every n."""

    def __init__(self, name: str, fault: str, template: Path, root: Path) -> None:
        self.name, self.name_of_fault = name, fault
        self.scene, self.fault = ALL[name], FAULTS[fault]
        self.root = root
        self.library = shim.Shim()
        self.prepared = root / "prepared"
        self.outcomes: Counter[str] = Counter()
        self.violations: list[str] = []
        generations.SAVE_TABLE_ABOVE = 0 if self.scene.table else 4 << 20
        shutil.copytree(template, self.prepared)
        if name.startswith("open"):
            machine = open_stage(self.prepared)
            crash_copy(self.prepared, root / "killed")
            machine.close()
            if "killed" in name:
                shutil.rmtree(self.prepared)
                (root / "killed").rename(self.prepared)
        self.states = self._rehearse()

    def _rehearse(self) -> list[tuple[Any, ...]]:
        """Return the states that a run without a fault goes through, in order."""
        rehearsal = self.root / "rehearsal"
        shutil.copytree(self.prepared, rehearsal)
        if self.name.startswith("open"):
            return [reopen(rehearsal)]
        machine = open_stage(rehearsal)
        states = [state_of(machine)]
        if self.scene.act is write_chunks:
            write_chunks(machine, rehearsal, lambda: states.append(state_of(machine)))
        else:
            self.scene.act(machine, rehearsal)
            if machine.is_running():
                states.append(state_of(machine))
        machine.close()
        return states

    def run(self) -> Sweep:
        n, unmet = 1, 0
        while self.outcomes.total() < self.fault.most and unmet < self.fault.enough and len(self.violations) < 4:
            outcome, violation = Trial(self, n).run()
            if violation:
                self.violations.append(f"{self.name}, {self.name_of_fault}, n = {n}: {violation}")
            if outcome == "over":
                break
            self.outcomes[outcome] += 1
            unmet = unmet + 1 if outcome == "gone around" else 0
            n += 1 + n // self.fault.sparse
        return self


def main() -> None:
    logging.getLogger("fastsm").setLevel(logging.CRITICAL + 1)
    codec._library()  # imported before the faults, which should not hit the import
    fault, *names = sys.argv[1:]
    found: dict[str, Any] = {"violations": [], "outcomes": {}}
    with memory_directory() as root:
        (root / "template").mkdir()
        build_template(root / "template")
        gc.collect()
        gc.freeze()  # so that collections in the children do not visit, and thereby copy, the parent's objects
        for number, name in zip(itertools.count(), names or ALL, strict=False):
            (root / str(number)).mkdir()
            sweep = Sweep(name, fault, root / "template", root / str(number)).run()
            found["outcomes"][name] = dict(sweep.outcomes)
            found["violations"] += sweep.violations
            shutil.rmtree(root / str(number))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
