"""kill -9 at any moment: all acknowledged chunks are there, only whole ones, and opening always works.

The killed process is this file, run as a program. It applies and flushes, and acknowledges through a pipe; one byte of
shared memory holds its current phase.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import fastsm
from fastsm import Entry, FastStateMachine, LogId, MemoryStateMachine, open_snapshot
from fastsm.disk.files import Directory
from support.histories import History, state_of
from support.inside import inside

KILLS_EACH = 20
ACKNOWLEDGEMENT = struct.Struct("<cIQ")  # the call that returned, the history's number, the index
EPOCH = b"epoch"  # the key that holds the number of the state's history
JOBS = ("snapshotting", "compacting", "installing")
PHASES = ("starting", "opening", "between", "applying", "writing", "allocating", "syncing", "switching", *JOBS)
CLASSES = {  # of moments of a kill; each class that a test aims at gets at least a twentieth of the kills
    "between": {"starting", "opening", "between"},
    "the frame's write": {"applying", "writing", "allocating"},
    "the sync": {"syncing"},
    "the switch": {"switching"},
    "a snapshot, a compaction, an install": set(JOBS),
}


class Setting(NamedTuple):
    """The options of the killed process."""

    stores: bool
    sync: str
    large: bool
    resets: bool
    job: str = ""  # one of JOBS: what it does between chunks


SETTINGS = {
    "small frames stored through the mapping": Setting(True, "flush", False, False),
    "frames written with pwrite": Setting(False, "flush", True, False),
    "a sync for each chunk": Setting(True, "apply", False, False),
    "large frames": Setting(True, "flush", True, False),
    "resets": Setting(True, "flush", False, True),
    "snapshots": Setting(True, "flush", False, False, "snapshotting"),
    "compactions": Setting(True, "flush", False, False, "compacting"),
    "installs": Setting(True, "flush", False, False, "installing"),
}


def aside(directory: str | Path) -> str:
    """Return the directory of the snapshots."""
    return f"{directory}.aside"


def last_written(directory: str | Path) -> int:
    """Return the index that the snapshot is as of; 0 if there is none."""
    if not os.path.exists(os.path.join(aside(directory), "snapshot.fsm")):
        return 0
    with open_snapshot(aside(directory)) as snapshot:
        return snapshot.metadata.last_included.index


def chunks_of(setting: Setting, seed: int, epoch: int) -> Iterator[list[Entry]]:
    """Yield the endless history number ``epoch``; its first entry writes the number."""
    history = History(seed + 1000 * epoch, large=False)
    history.last = LogId(1, 1)
    yield [Entry(1, 1, fastsm.put(EPOCH, b"%d" % epoch))]
    for chunk in history:
        yield chunk
        if setting.large and history.random.random() < 0.2:
            index, term = history.last
            history.last = LogId(index + 1, term)
            yield [Entry(index + 1, term, fastsm.put(b"", history.random.randbytes(1 << 20)))]


# ---- the process that is killed -------------------------------------------------------------------------


def watched(phase: Callable[[str], Any], stores: bool) -> type[Directory]:
    """Return a seam that reports the process's phase."""

    def telling(name: str, method: str) -> Callable[..., Any]:
        function = getattr(Directory, method)
        static = isinstance(Directory.__dict__[method], staticmethod)

        def call(self: Directory, *arguments: Any) -> Any:
            before = phase(name)
            if before == "switching" or (before in JOBS and name != "switching"):
                phase(before)  # writes and syncs within a phase belong to it
            try:
                return function(*arguments) if static else function(self, *arguments)
            finally:
                phase(before)

        return call

    methods = {
        "write": "writing", "sync": "syncing", "allocate": "allocating",
        "replace_file": "switching", "write_file": "switching",
        "rename": "switching", "sync_directory": "switching", "unlink": "switching", "truncate": "switching",
    }
    members = {method: telling(name, method) for method, name in methods.items()}
    if not stores:
        members["stores_are_safe"] = lambda self, fd: False
    return type("WatchedDirectory", (Directory,), members)


def run(directory: str, phase_file: str, pipe: int, seed: int, setting: Setting) -> None:
    """Apply, flush and reset until the process is killed."""
    with open(phase_file, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 1)
    current = ["starting"]

    def phase(name: str) -> str:
        before = current[0]
        current[0] = name
        memory[0] = PHASES.index(name)
        return before

    def acknowledge(what: bytes, epoch: int, index: int) -> None:
        os.write(pipe, ACKNOWLEDGEMENT.pack(what, epoch, index))

    dice = random.Random(seed + 5)
    phase("opening")
    machine = FastStateMachine(directory, sync=setting.sync, _files=watched(phase, setting.stores))
    phase("between")
    epoch = int(machine.get(EPOCH) or 0)
    acknowledge(b"o", epoch, machine.last_applied().index)

    def work() -> bool:
        """Do the job; return whether the history continues from an earlier entry."""
        phase(setting.job)
        index = machine.last_applied().index
        written = last_written(directory)
        if setting.job == "compacting":
            machine.compact(dice.randint(machine.stats().base.index, index))
        elif setting.job == "snapshotting" or not written or dice.random() < 0.3:
            machine.write_snapshot(aside(directory), compress=dice.choice(("none", "zstd")))
            acknowledge(b"s", epoch, index)
        else:
            acknowledge(b"I", epoch, written)
            machine.install_snapshot(None, aside(directory), allow_older=True)
            acknowledge(b"i", epoch, written)
        phase("between")
        return setting.job == "installing"

    while True:
        for number, chunk in enumerate(chunks_of(setting, seed, epoch)):
            phase("applying")
            machine.apply(chunk)
            phase("between")
            acknowledge(b"a", epoch, chunk[-1].index)
            if dice.random() < 0.1:
                index = machine.last_applied().index
                machine.flush()
                acknowledge(b"f", epoch, index)
            if setting.resets and number > 3 and dice.random() < 0.3:
                break
            if setting.job and chunk[-1].index == machine.last_applied().index and dice.random() < 0.3 and work():
                break
        if setting.resets:
            machine.clear()
            epoch += 1
            acknowledge(b"r", epoch, 0)


# ---- the process that kills -----------------------------------------------------------------------------


class Killed(NamedTuple):
    """What is known of a killed process. ``installing``: the index that an install may have gone back to."""

    phase: str
    opened: bool
    epoch: int
    applied: int
    flushed: int
    written: int = 0
    installing: int = 0


def run_and_kill(directory: Path, seed: int, setting: Setting, dice: random.Random) -> Killed:
    """Start the process, let it work for a random time, and kill it, mostly in a certain phase."""
    phase_file = directory.with_suffix(".phase")
    phase_file.write_bytes(b"\0")
    reading, writing = os.pipe()
    arguments = [directory, phase_file, writing, seed, *map(int, (setting.stores, setting.large, setting.resets))]
    command = [sys.executable, __file__, *map(str, arguments), setting.sync, setting.job]
    child = subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.PIPE)
    os.close(writing)
    try:
        with phase_file.open("r+b") as file, mmap.mmap(file.fileno(), 1) as memory:
            wait_for_moment(memory, setting, dice)
            child.kill()
            assert child.wait() == -9, child.stderr.read().decode()
            phase = PHASES[memory[0]]
    finally:
        child.kill()
        child.communicate()
    with open(reading, "rb") as pipe:
        received = pipe.read()
    opened, epoch, applied, flushed, written, installing = False, 0, 0, 0, 0, 0
    for what, number, index in ACKNOWLEDGEMENT.iter_unpack(received[: len(received) // 13 * 13]):
        opened = True
        if what in b"ro":
            epoch, applied, flushed = number, index, 0
        elif what == b"a":
            assert number == epoch
            applied = max(applied, index)  # replayed entries were applied before
        elif what == b"s":
            written = index
        elif what == b"I":
            installing = index
        elif what == b"i":
            applied, installing = index, 0
        else:
            flushed = index
    return Killed(phase, opened, epoch, applied, flushed, written, installing)


def wait_for_moment(memory: mmap.mmap, setting: Setting, dice: random.Random) -> None:
    """Wait a random time after the process begins to open or to work, and then, mostly, for a certain phase."""
    deadline = time.monotonic() + 20
    first = PHASES.index("opening" if dice.random() < 0.1 else "between")
    while memory[0] < first and time.monotonic() < deadline:
        time.sleep(0.0001)
    if first == PHASES.index("between"):
        time.sleep(dice.random() * 0.1)
    if dice.random() < 0.8:
        phases = ["writing", "allocating", "applying"] * 2 + ["syncing"] + ["switching"] * 20 * setting.resets
        if setting.job:
            phases = [setting.job] * 4 + ["snapshotting", "switching", "writing"]
        wanted = PHASES.index(dice.choice(phases))
        patience = time.monotonic() + 0.05
        while memory[0] != wanted and time.monotonic() < patience:
            pass


def assert_right(
    directory: Path, seed: int, setting: Setting, killed: Killed, before: tuple[int | None, LogId] | None = None
) -> tuple[int | None, LogId]:
    """Check that the state is that after some whole chunks, no fewer than were acknowledged.

    Return its epoch and last applied entry; ``before`` has those that the previous life left.
    """
    with FastStateMachine(directory) as machine:
        inside(machine).check()
        applied = machine.last_applied()
        epoch = int(machine.get(EPOCH) or -1) if applied.index else None
        if epoch is None:
            # Nothing was applied, or a reset had begun or was done.
            assert killed.applied == 0 or setting.resets
        elif not killed.opened:
            assert before in (None, (epoch, applied)), "it was killed before it did anything"
        elif epoch == killed.epoch:
            assert applied.index >= killed.applied or applied.index == killed.installing
            assert machine.durable().index <= applied.index
        else:
            assert (epoch, setting.resets) == (killed.epoch + 1, True)
        model = MemoryStateMachine()
        for chunk in chunks_of(setting, seed, epoch or 0):
            if model.last_applied().index >= applied.index:
                break
            model.apply(chunk)
        assert model.last_applied() == applied, "half a chunk"
        assert state_of(machine) == state_of(model)
        assert machine.get(EPOCH) == model.get(EPOCH)
        if killed.written:
            assert machine.snapshot_metadata() is not None
        assert_snapshot_right(directory, seed, setting, killed)
        return epoch, applied


def assert_snapshot_right(directory: Path, seed: int, setting: Setting, killed: Killed) -> None:
    """Check that an acknowledged snapshot, or a later one, is there, and has the state as of its entry."""
    if not os.path.exists(os.path.join(aside(directory), "snapshot.fsm")):
        assert killed.written == 0
        return
    with open_snapshot(aside(directory)) as snapshot:
        snapshot.verify()
        last = snapshot.metadata.last_included
    assert last.index >= killed.written
    model = MemoryStateMachine()
    for chunk in chunks_of(setting, seed, 0):
        if model.last_applied() >= last:
            break
        model.apply(chunk)
    other = directory.with_suffix(".other")
    with FastStateMachine(other) as machine:
        machine.install_snapshot(None, aside(directory))
        assert state_of(machine) == state_of(model)
    shutil.rmtree(other)


def test_killed_process_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    """After a kill at any moment, every apply that returned is recovered, and only whole chunks are."""
    kill_all(tmp_path, False, ("between", "the frame's write", "the sync", "the switch"))


def test_killed_in_snapshots_compactions_and_installs(tmp_path: Path) -> None:
    """After a kill an acknowledged snapshot is there, too, and an install happened as a whole or not at all."""
    kill_all(tmp_path, True, ("the switch", "a snapshot, a compaction, an install"))


def kill_all(tmp_path: Path, jobs: bool, aims: tuple[str, ...]) -> None:
    """Kill processes of all settings with jobs, or of those without."""
    phases: Counter[str] = Counter()
    for name, setting in SETTINGS.items():
        if bool(setting.job) != jobs:
            continue
        dice = random.Random(f"kill {name}")
        applied = flushed = 0
        before = phases.copy()
        left = None
        for number in range(KILLS_EACH):
            directory = tmp_path / f"{name}-{number // 3}"  # each directory has three lives
            killed = run_and_kill(directory, number // 3, setting, dice)
            phases[killed.phase] += 1
            applied += killed.applied
            flushed += killed.flushed
            left = assert_right(directory, number // 3, setting, killed, left if number % 3 else None)
        print(f"\n{name}: {applied} entries acknowledged, {flushed} flushed; {dict(phases - before)}")
        assert applied > 5 * KILLS_EACH
        assert flushed > 0
    classes = {name: sum(phases[phase] for phase in CLASSES[name]) for name in aims}
    print(classes)
    assert min(classes.values()) >= phases.total() / 20, classes


if __name__ == "__main__":
    path, phases, descriptor, number, stores, large, resets, when, job = sys.argv[1:]
    options = Setting(bool(int(stores)), when, bool(int(large)), bool(int(resets)), job)
    run(path, phases, int(descriptor), int(number), options)
