"""The thread that tells watches of changes: whatever happens in it, no watch is forgotten."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import Change, FastStateMachine, NotRunningError, put
from fastsm.background import BackgroundCall
from fastsm.core import watching
from support.inside import inside

_testcapi = pytest.importorskip("_testcapi")

Opener = Callable[..., FastStateMachine]
PATIENCE = 20.0  # seconds


class Reader:
    """Reads once from a watch with a prefix, on a thread that needs no memory for its end, and waits for a change."""

    def __init__(self, machine: FastStateMachine, prefix: bytes) -> None:
        self.watch = machine.watch(prefix)
        self.found: list[Change] = []
        watchers = inside(machine).watchers
        before = len(watchers)
        self.thread = BackgroundCall(self._run)
        while len(watchers) == before:
            assert not self.thread.wait(0.001)

    def _run(self) -> None:
        while not self.found:
            try:
                self.found = self.watch.read()
            except MemoryError:
                continue

    def end(self) -> list[Change]:
        assert self.thread.wait(PATIENCE), "nobody told it"
        return self.found


@contextmanager
def at_collections(call: Callable[[], None]) -> Iterator[None]:
    """Run a function at each garbage collection, of which there is one whenever an object is made."""

    def start(phase: str, info: Any) -> None:
        if phase == "start":
            call()

    before = gc.get_threshold()
    gc.callbacks.append(start)
    gc.set_threshold(1)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(start)


def test_a_watch_that_begins_to_wait_while_others_are_matched_is_told(directory: Path, machine_at: Opener) -> None:
    """A collection on the watches' thread runs Python code, during which another watch begins to wait."""
    machine = machine_at(directory)
    first = Reader(machine, b"first")
    here = threading.get_ident()
    others: list[Reader] = []
    came = threading.Event()

    def come() -> None:
        if threading.get_ident() != here and not first.thread.is_this_thread() and not others:
            gc.disable()
            others.append(Reader(machine, b"second"))
            came.set()

    try:
        with at_collections(come):
            machine.apply([(1, 1, put(b"other", b""))])
            assert came.wait(PATIENCE)
    finally:
        gc.enable()
    machine.apply([(2, 1, put(b"second", b"2"))])
    assert others[0].end() == [Change(2, 1, b"second", b"2")]
    machine.apply([(3, 1, put(b"first", b"3"))])
    assert first.end() == [Change(3, 1, b"first", b"3")]


def test_a_watch_is_told_though_memory_failed(directory: Path, machine_at: Opener) -> None:
    """The n-th allocation between the writer and the reader fails: the thread continues, and tells its watches."""
    machine = machine_at(directory)
    for n in range(40):
        reader = Reader(machine, b"key")
        _testcapi.set_nomemory(n, n + 1)
        try:
            while True:
                try:
                    machine.apply([(n + 1, 1, put(b"key", b""))])
                    break
                except MemoryError:
                    continue
            reader.thread.wait(0.02)  # it may be told only once there is memory
        except MemoryError:
            pass
        finally:
            _testcapi.remove_mem_hooks()
        assert [change.index for change in reader.end()] == [n + 1], n


def test_a_thread_that_was_interrupted_at_its_start_is_not_started_twice(
    directory: Path, machine_at: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a signal handler raises after the thread was started, there is one thread, which a close can wait for."""
    machine = machine_at(directory)
    watch = machine.watch()
    begun: list[int] = []
    real = watching.serve

    def serve(*arguments: Any) -> None:
        begun.append(threading.get_ident())
        real(*arguments)

    monkeypatch.setattr(watching, "serve", serve)
    started = threading.Event()

    def interrupt(frame: Any, event: str, argument: Any) -> Any:
        if event == "c_return" and getattr(argument, "__name__", "") == "start" and not started.is_set():
            started.set()
            raise KeyboardInterrupt

    sys.setprofile(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            watch.read(timeout=0.01)
    finally:
        sys.setprofile(None)
    assert watch.read(timeout=0.01) == []
    machine.apply([(1, 1, fastsm.put(b"key", b""))])
    assert len(watch.read()) == 1
    machine.close()
    assert len(begun) == 1


def test_a_close_without_memory_can_be_repeated(directory: Path, machine_at: Opener) -> None:
    """The n-th allocation of a watch's close fails: the close may raise; after the next one no reader waits."""
    machine = machine_at(directory)
    for n in range(30):
        reader = Reader(machine, b"key")
        _testcapi.set_nomemory(n, n + 1)
        try:
            reader.watch.close()
        except MemoryError:
            pass
        finally:
            _testcapi.remove_mem_hooks()
        reader.watch.close()
        with pytest.raises(NotRunningError):
            reader.end()
        assert len(inside(machine).watchers) == 0
