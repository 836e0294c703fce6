"""Interruptions: a signal handler that raises (as Ctrl-C does) between any two steps of Python code of a call.

A profiler raises in place of the handler, at each step in turn: where a Python function begins, and after each call of
a C function, which is where the interpreter checks for signals. The exception is kept, with its traceback and all
frames, since nothing may depend on their being freed.
"""

from __future__ import annotations

import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import fastsm
from fastsm import FastStateMachine, LogId
from fastsm.core import generations
from support.faulty import PATIENCE, Call, Disk, crash_copy, in_thread, memory_directory
from support.inside import inside

# An exception raised in the callback of a weak reference is not propagated.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

Method = Callable[[FastStateMachine, Path], object]

METHODS: dict[str, Method] = {
    "clear": lambda machine, _: machine.clear(),
    "install": lambda machine, path: machine.install_snapshot(None, path / "source"),
    "compact": lambda machine, _: machine.compact(),
    "snapshot": lambda machine, _: machine.write_snapshot(machine.path + "-target"),
    "save": lambda machine, _: machine.save_hard_state(),
    "close": lambda machine, _: machine.close(),
}


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory in memory: each step has a machine of its own."""
    with memory_directory() as path:
        yield path


class Interruption(BaseException):
    """The exception of a signal handler."""


def interrupted(call: Callable[[], object], step: int, kept: list[Interruption]) -> bool:
    """Run a call, and raise at a step of its Python code; keep the exception. False: it has fewer steps."""
    assert threading.current_thread() is threading.main_thread(), "signal handlers run nowhere else"
    steps = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal steps
        if event in ("call", "c_return") and frame.f_code.co_filename != __file__:
            steps += 1
            if steps == step:
                raise Interruption

    sys.setprofile(profile)
    try:
        call()
    except Interruption as error:
        kept.append(error)
    finally:
        sys.setprofile(None)
    return steps >= step


def source_at(path: Path) -> dict[bytes, bytes]:
    """Write a snapshot that can be installed, later than what :func:`filled` has applied."""
    with FastStateMachine(path.parent / "of the source") as source:
        source.apply([(index, 1, fastsm.put(b"key-%d" % (index % 5), b"s")) for index in range(1, 31)])
        source.write_snapshot(path)
        return dict(source.items())


def filled(machine: FastStateMachine) -> dict[bytes, bytes]:
    machine.apply([(index, 1, fastsm.put(b"key-%d" % (index % 5), b"v" * 50)) for index in range(1, 21)])
    machine.flush()
    return dict(machine.items())


@pytest.mark.parametrize("name", METHODS)
def test_an_interruption_at_any_step_leaves_the_state_old_or_new(name: str, root: Path) -> None:
    """No step poisons the machine, or leaves a lock or a job; it continues, and memory agrees with the disk."""
    installed = source_at(root / "source")
    kept: list[Interruption] = []
    for step in itertools.count(1):
        path = root / str(step)
        machine = FastStateMachine(path, retain_entries=0)
        filled(machine)
        machine.write_snapshot(f"{path}-target")
        machine.apply([(21, 1, fastsm.put(b"later", b"l"))])
        machine.flush()
        before = dict(machine.items())
        after = {"clear": {}, "install": installed}.get(name, before)
        struck = interrupted(partial(METHODS[name], machine, root), step, kept)
        with fastsm.open_snapshot(f"{path}-target") as snapshot:
            snapshot.verify()
        if machine.is_running():
            assert inside(machine).log.poisoned is None, f"step {step}"
            state = dict(machine.items())
            assert state in (before, after), f"step {step}"
            with in_thread(partial(machine.write_snapshot, machine.path + "-other")):
                pass
            last = machine.last_applied()
            machine.apply([(last.index + 1, 1, fastsm.put(b"more", b"m"))])
            state = dict(machine.items())
        else:
            state = before
        with in_thread(machine.close):
            pass
        with FastStateMachine(path, verify_on_open="full") as again:
            inside(again).check()
            assert dict(again.items()) == state, f"step {step}"
        if not struck:
            break
    assert len(kept) > 3


@pytest.mark.parametrize("name", ["clear", "install", "compact", "close"])
def test_a_signal_during_the_step_is_served_after_it(name: str, root: Path) -> None:
    """A handler that raises when CURRENT is replaced does so after the complete step."""
    installed = source_at(root / "source")
    disk = Disk()
    machine = FastStateMachine(root / "state", retain_entries=0, _files=disk.files)
    before = filled(machine)
    after = {"clear": {}, "install": installed}.get(name, before)
    seen = threading.Event()

    def raise_in_main(*_: object) -> None:
        seen.set()
        raise Interruption

    def interrupt(call: Call) -> None:
        if call.method == "rename" and call.arguments[-1] == "CURRENT" and not seen.is_set():
            signal.raise_signal(signal.SIGUSR1)
            assert seen.wait(PATIENCE)

    handler = signal.signal(signal.SIGUSR1, raise_in_main)
    disk.before = interrupt
    try:
        with pytest.raises(Interruption):
            METHODS[name](machine, root)
    finally:
        signal.signal(signal.SIGUSR1, handler)
        disk.before = None
    if name != "close":
        assert dict(machine.items()) == after
        assert inside(machine).log.poisoned is None
        assert len(list((root / "state").glob("log-*"))) == 1, "the old log was removed all the same"
    machine.close()
    with FastStateMachine(root / "state") as again:
        assert dict(again.items()) == after


@pytest.mark.parametrize("name", ["clear", "compact"])
def test_a_call_by_a_finalizer_within_a_step_is_refused(name: str, root: Path) -> None:
    """A finalizer that runs on the thread of the step gets a ReentryError, and its close is deferred."""
    disk = Disk()
    machine = FastStateMachine(root / "state", retain_entries=0, _files=disk.files)
    filled(machine)
    found: list[BaseException] = []

    def finalize(call: Call) -> None:
        if call.method == "rename" and not found:
            with pytest.raises(fastsm.ReentryError) as caught:
                machine.apply([(21, 1, fastsm.put(b"k", b"v"))])
            found.append(caught.value)
            machine.close()
            assert machine.is_running()

    disk.before = finalize
    METHODS[name](machine, root)
    assert "hang" not in str(found[0])
    assert not machine.is_running()


def test_an_interrupted_first_flush_after_a_kill_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an unclean end left is rewritten before the first sync; an interruption there is not a failed sync."""
    monkeypatch.setattr(generations, "SAVE_TABLE_ABOVE", 0)
    killed = root / "killed"
    with FastStateMachine(root / "state") as machine:
        machine.apply([(index, 1, fastsm.put(b"key-%d" % index, bytes(1000))) for index in range(1, 201)])
        crash_copy(root / "state", killed)
    kept: list[Interruption] = []
    for step in itertools.count(1):
        machine = FastStateMachine(crash_copy(killed, root / str(step)))
        struck = interrupted(machine.flush, step, kept)
        assert inside(machine).log.poisoned is None, f"step {step}"
        machine.flush()
        assert machine.durable() == LogId(200, 1)
        with in_thread(machine.close):
            pass
        with FastStateMachine(root / str(step), verify_on_open="full") as again:
            assert again.last_applied() == LogId(200, 1)
        if not struck:
            break
    assert len(kept) > 10
