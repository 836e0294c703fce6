"""Snapshots, installs, compactions, resets, closes and openings, with a failure or a kill at each call of the seam.

Each leaves the old generation or the new one, whole.
"""

from __future__ import annotations

import errno
import gc
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastsm import FastStateMachine, StorageError
from support.faulty import Call, Disk, crash_copy, memory_directory
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
from support.histories import History
from support.inside import inside
from support.simulation import kill

FAULTS = [(code, done) for code in (errno.EIO, errno.ENOSPC) for done in (False, True)]


pytestmark = pytest.mark.usefixtures("quiet", "quick_collections")


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """Provide a state with a base, a log and a saved table; a snapshot of it; and two newer snapshots."""
    with memory_directory() as root:
        build_template(root)
        yield root


class Failed(NamedTuple):
    """The facts of a `StorageError`; the error itself would keep frames alive, and their open files."""

    errno: int | None
    text: str


class Stage:
    """A copy of the template with an open machine, and its states before and after the scene."""

    def __init__(self, template: Path, root: Path, scene: Scene) -> None:
        self.root = root
        self.scene = scene
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root)
        self.disk = Disk()
        self.machine = FastStateMachine(root / "state", _files=self.disk.files, **OPTIONS)
        history = History(3, large=False, after=self.machine.last_applied())
        for _ in range(3):
            self.machine.apply(history.chunk(4))
        self.next = history.chunk(1)
        self.old = state_of(self.machine)
        self.generation = self.machine.stats().generation
        self.left = [self.old]  # the states that may be found at the end
        self.disk.forget()

    def play(self) -> Failed | None:
        """Play the scene; return the failure that ended it, or None."""
        try:
            self.scene.act(self.machine, self.root)
        except StorageError as error:
            return Failed(error.errno, repr(error))
        finally:
            self.disk.before = None
        return None

    def end(self) -> None:
        self.disk.forget()
        with suppress(StorageError):
            self.machine.close()


@pytest.fixture(params=SCENES)
def scene(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Provide each of the scenes."""
    name: str = request.param
    if "zstd" in name:
        pytest.importorskip("zstandard")
    if SCENES[name].table:
        monkeypatch.setattr("fastsm.core.generations.SAVE_TABLE_ABOVE", 0)
    return SCENES[name]


def rehearse(template: Path, root: Path, scene: Scene) -> tuple[list[Call], list[tuple[Any, ...]]]:
    """Play the scene without a fault; return the seam's calls, and the states that may be found: old and new."""
    stage = Stage(template, root, scene)
    assert stage.play() is None
    calls = list(stage.disk.calls)
    if not stage.machine.is_running():
        return calls, [stage.old]
    new = state_of(stage.machine)
    stage.end()
    return calls, [stage.old, new]


def test_at_each_call_a_kill_leaves_the_old_generation_or_the_new_one(template: Path, scene: Scene) -> None:
    """After a kill before any call of the seam, the old or the new generation opens; a snapshot it names is there."""
    with memory_directory() as root:
        calls, states = rehearse(template, root / "stage", scene)
        stage = Stage(template, root / "stage", scene)
        copies: list[Path] = []

        def copy(call: Call) -> None:
            copies.append(crash_copy(stage.root, root / f"copy-{len(copies)}"))

        stage.disk.before = copy
        assert stage.play() is None
        stage.end()
        assert len(copies) == len(calls)
        found = Counter()
        for path in copies:
            metadata = assert_target_is_whole(path, alone=False)
            state = reopen(path)
            found[states.index(state)] += 1
            if state[3] is not None and states[-1][0] == stage.old[0]:
                assert metadata.last_included >= state[3].last_included
            shutil.rmtree(path)
        print(f"{len(copies)} kills: {dict(found)}")
        assert set(found) == set(range(len(states)))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{errno.errorcode[fault[0]]}{', done' * fault[1]}")
def test_at_each_call_a_fault_leaves_the_old_generation_or_the_new_one(
    template: Path, scene: Scene, fault: tuple[int, bool]
) -> None:
    """A failing call is a ``StorageError``, or does not matter; nothing is lost, left open or left on disk."""
    code, done = fault
    outcomes: Counter[str] = Counter()
    with memory_directory() as root:
        calls, states = rehearse(template, root / "stage", scene)
        for number in range(1, len(calls) + 1):
            stage = Stage(template, root / "stage", scene)
            before = open_files(root)
            stage.disk.fail(None, code, nth=number, done=done)
            error = stage.play()
            here = f"call {number}, {stage.disk.calls[number - 1].method}: {error!r}"
            assert error is None or error.errno == code, here
            outcomes["failed" if error else "gone around"] += 1
            if stage.machine.is_running():
                outcomes[judge_running(stage, states, error, before, here)] += 1
            stage.end()
            assert reopen(stage.root) in stage.left, here
            assert_target_is_whole(stage.root, alone=False)
            del stage
            gc.collect(0)
            assert open_files(root) == [], here
    print(f"{len(calls)} calls: {dict(outcomes)}")
    assert outcomes["failed"] >= 3  # a full disk does not fail a close when all data is durable


def state_of_copy(stage: Stage, root: Path) -> tuple[Any, ...]:
    """Return the state that the next process would find if this one were killed now."""
    copy = crash_copy(stage.root, root / "copy")
    try:
        return reopen(copy)
    finally:
        shutil.rmtree(copy)


def judge_running(
    stage: Stage, states: list[tuple[Any, ...]], error: Failed | None, before: list[str], here: str
) -> str:
    """Check a machine that still runs after the fault: it has the old state or, without an error, the new one."""
    machine = stage.machine
    stage.disk.forget()
    inside(machine).check()
    found = state_of_copy(stage, stage.root.parent)
    assert found in states, here
    if error is None:
        assert state_of(machine) == found == states[-1], here
        outcome = "went on in the new state"
    else:
        assert state_of(machine)[:3] == stage.old[:3], here
        assert machine.stats().generation == stage.generation, here
        assert open_files(stage.root) == [name for name in before if str(stage.root) in name], here
        outcome = "went on in the old state"
    if inside(machine).log.poisoned is None:
        assert machine.last_applied() == found[0]
        assert machine.apply(stage.next) if found[0] == stage.old[0] else True
        machine.flush()
        stage.scene.act(machine, stage.root)
        assert_target_is_whole(stage.root, alone=True)
        stage.left = [state_of(machine)] if machine.is_running() else [found]
    else:
        assert error is not None
        assert poison_is_due(stage, found, machine), here
        with pytest.raises(StorageError, match="poisoned"):
            machine.apply(stage.next)
        stage.left = [found]
        outcome = "poisoned"
    return outcome


def poison_is_due(stage: Stage, found: tuple[Any, ...], machine: FastStateMachine) -> bool:
    """Return whether the disk's content is unknown: the log's sync failed, or CURRENT names the next generation."""
    named = int.from_bytes((stage.root / "state" / "CURRENT").read_bytes()[16:24], "little")
    return named != stage.generation or "syncing the log" in str(inside(machine).log.poisoned)


def opens_or_says_why(path: Path, disk: Disk, code: int, state: tuple[Any, ...]) -> bool:
    """Return whether an opening failed with the system's error; otherwise it must find the state."""
    try:
        with closing(FastStateMachine(path / "state", _files=disk.files, **OPTIONS)) as machine:
            disk.rules.clear()
            assert state_of(machine) == state
    except StorageError as error:
        return error.errno == code
    return False


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{errno.errorcode[fault[0]]}{', done' * fault[1]}")
@pytest.mark.parametrize("end", ["closed", "killed"])
def test_at_each_call_of_an_opening_a_fault_leaves_everything_as_it_was(
    template: Path, fault: tuple[int, bool], end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An opening that fails is a ``StorageError``; the next one finds the whole state, and nothing is left open."""
    code, done = fault
    monkeypatch.setattr("fastsm.core.generations.SAVE_TABLE_ABOVE", 0)
    failed = 0
    with memory_directory() as root:
        stage = Stage(template, root / "stage", SCENES["compact"])
        (stage.machine.close if end == "closed" else lambda: kill(stage.machine))()
        (stage.root / "state" / "log-99").write_bytes(b"FASTSM-L left over")
        number = 0
        while failed == number:
            number += 1
            copy = crash_copy(stage.root, root / "copy")
            disk = Disk()
            rule = disk.fail(None, code, nth=number, done=done)
            failed += opens_or_says_why(copy, disk, code, stage.old) or rule.struck
            assert reopen(copy) == stage.old
            shutil.rmtree(copy)
            disk.forget()
            gc.collect(0)
            assert open_files(copy) == [], f"call {number}"
    print(f"{number - 1} calls")
    assert number > 15
