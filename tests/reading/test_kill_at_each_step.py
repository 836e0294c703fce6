"""An owner that is killed before each system call, seen by a reader and its watch that live on."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fastsm import Change, CompactedError, FastStateMachine, Reader, put
from fastsm.disk import published
from fastsm.disk.files import Directory
from support.faulty import memory_directory

CALLS = ("write", "truncate", "sync", "rename", "sync_directory", "unlink", "allocate", "create_file", "write_file")
OPTIONS: dict[str, Any] = {"auto_compact": False, "retain_entries": 2}
LAST = 9  # the last entry of the template


class Killing(Directory):
    """Kills its process before the system call of this number."""

    left = 0

    @classmethod
    def count(cls) -> None:
        if cls.left == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        cls.left -= 1


def counted(name: str) -> Callable[..., Any]:
    def method(self: Killing, *arguments: Any, **options: Any) -> Any:
        Killing.count()
        function = getattr(Directory, name)
        static = isinstance(Directory.__dict__[name], staticmethod)
        return function(*arguments, **options) if static else function(self, *arguments, **options)

    return method


for _name in CALLS:
    setattr(Killing, _name, counted(_name))


def fill(machine: FastStateMachine, first: int, last: int, term: int = 1) -> None:
    for index in range(first, last + 1):
        machine.apply([(index, term, put(b"key-%d" % (index % 3), b"%d of %d" % (index, term)))])


def apply(machine: FastStateMachine, root: Path) -> None:
    fill(machine, LAST + 1, LAST + 3)


def apply_and_close(machine: FastStateMachine, root: Path) -> None:
    apply(machine, root)
    machine.close()


def pass_and_flush(machine: FastStateMachine, root: Path) -> None:
    machine.update_last_applied((LAST + 1, 1))
    machine.flush()


def install(name: str) -> Callable[[FastStateMachine, Path], None]:
    return lambda machine, root: machine.install_snapshot(None, root / name, allow_older=True)


class Act(NamedTuple):
    """What an owner does, and what a reader may then report: that the state was replaced, or went back."""

    run: Callable[[FastStateMachine, Path], Any]
    replaces: bool = False
    goes_back: bool = False


ACTS = {
    "apply": Act(apply),
    "pass and flush": Act(pass_and_flush),
    "compact": Act(lambda machine, root: machine.compact()),
    "snapshot": Act(lambda machine, root: machine.write_snapshot(root / "other")),
    "install older": Act(install("older"), replaces=True, goes_back=True),
    "install newer": Act(install("newer"), replaces=True),
    "reset": Act(lambda machine, root: machine.clear(), replaces=True, goes_back=True),
    "close": Act(apply_and_close),
}


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A directory on which system calls are fast."""
    with memory_directory() as root:
        yield root


@pytest.fixture(scope="module")
def template(memory: Path) -> Path:
    """A directory with a base and a log, and snapshots of an earlier and of a later entry."""
    root = memory / "template"
    root.mkdir()
    with FastStateMachine(root / "later", **OPTIONS) as machine:
        fill(machine, 1, LAST + 2)
        machine.write_snapshot(root / "newer")
    with FastStateMachine(root / "state", **OPTIONS) as machine:
        fill(machine, 1, 5)
        machine.write_snapshot(root / "older")
        machine.compact(4)
        fill(machine, 6, LAST)
    return root


def kill_amid(root: Path, act: Act, call: int) -> bool:
    """Let another process act, and be killed before a system call; return False if it ends before that."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            machine = FastStateMachine(root / "state", _files=Killing, **OPTIONS)
            Killing.left = call
            act.run(machine, root)
            Killing.left = 0
            machine.close()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def tear(path: Path, dice: random.Random) -> None:
    """Stores the next slot partly, up to some field, as a kill may leave it."""
    slots = np.memmap(path / published.NAME, np.uint64, "r+", 64, (2, 8))
    older = slots[int(slots[1][0] < slots[0][0])]
    for field in range(1, dice.randrange(1, 8)):
        older[field] = dice.getrandbits(64)


def state_of(one: Any) -> tuple[Any, list[tuple[bytes, bytes]]]:
    return one.last_applied(), list(one.items())


class Life:
    """A reader and its watch, before, during and after the end of an owner."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.reader = Reader(root / "state")
        self.seldom = Reader(root / "state")  # looks only when the next owner has gone on for long
        self.watch = self.reader.watch()
        self.late = self.seldom.watch()
        self.before = state_of(self.reader)

    def follow(self, act: Act) -> None:
        """Check everything that must hold once the owner was killed."""
        self.reader.refresh()
        shown = state_of(self.reader)
        told = self.read(self.watch, act)
        with FastStateMachine(self.root / "state", **OPTIONS) as machine:
            found = machine.last_applied()
            self.reader.refresh()
            assert list(self.reader.items()) == list(machine.items())
            went_back = found < self.before[0]
            assert not went_back or act.goes_back
            assert self.reader.stats().rebuilt == went_back
            if shown[0].index > found.index and not went_back:  # an entry without a command: its host repeats it
                machine.update_last_applied(shown[0])
            fill(machine, machine.last_applied().index + 1, machine.last_applied().index + 20, term=5)
            for reader in (self.reader, self.seldom):
                reader.refresh()
                assert state_of(reader) == state_of(machine)
                assert reader.stats().rebuilt == went_back
            for watch, before in ((self.watch, told), (self.late, [])):
                found_now = self.read(watch, act)
                if found_now is not None:
                    assert [*(before or []), *found_now] == machine.watch(start=LAST + 1).read(timeout=0)

    def read(self, watch: Any, act: Act) -> list[Change] | None:
        """Return what a watch delivers; None if the state was replaced."""
        try:
            return list(watch.read(10**6, timeout=0))
        except CompactedError:
            assert act.replaces
            return None

    def close(self) -> None:
        self.reader.close()
        self.seldom.close()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("torn", [False, True], ids=["", "a slot half written"])
@pytest.mark.parametrize("name", ACTS)
def test_a_kill_before_each_call_is_followed(memory: Path, template: Path, name: str, torn: bool) -> None:
    """Readers show what the next owner has, and report if it went back; watches lose nothing except replaced states."""
    dice = random.Random(7)
    act = ACTS[name]
    call = 0
    killed = True
    while killed:
        call += 1
        root = memory / f"{name}-{torn}-{call}"
        shutil.copytree(template, root)
        with FastStateMachine(root / "state", **OPTIONS):
            life = Life(root)
        killed = kill_amid(root, act, call)
        if torn:
            tear(root / "state", dice)
        life.follow(act)
        life.close()
        shutil.rmtree(root)
    assert call > 1
