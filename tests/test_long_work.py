"""Long work runs without the GIL, while its caller handles signals, progress and interruptions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm.long_work import SHORT_BYTES, Work, run_long

LONG = SHORT_BYTES
TAKES = 4  # how often work may take the GIL; once more for each GiB
VALUE = bytes(200 << 10)


def nothing(done: int = 0) -> None:
    """Do nothing: a tick that lets the work continue."""


class Enough(Exception):
    """The error that ticks raise."""


def test_short_work_is_done_by_its_caller_and_long_work_by_a_thread() -> None:
    """Work below the limit runs in its caller's thread, because a thread would cost more; long work in another."""
    threads = [run_long(lambda work: threading.get_ident(), nothing, size) for size in (0, LONG - 1, LONG)]
    assert threads[:2] == [threading.get_ident()] * 2
    assert threads[2] != threading.get_ident()


@pytest.mark.parametrize("size", [0, LONG], ids=["short", "long"])
def test_the_caller_gets_the_works_result_or_error(size: int) -> None:
    """The caller gets the work's result or error, even if another thread did the work."""

    def fail(work: Work) -> None:
        raise Enough

    assert run_long(lambda work: "done", nothing, size) == "done"
    with pytest.raises(Enough):
        run_long(fail, nothing, size)


@pytest.mark.parametrize("error", [Enough, KeyboardInterrupt])
@pytest.mark.parametrize("size", [0, LONG], ids=["short", "long"])
def test_a_tick_that_raises_ends_the_work_and_waits_for_its_end(size: int, error: type[BaseException]) -> None:
    """The caller gets the tick's error only after the work has ended, so that its resources may be released."""
    over: list[bool] = []

    def endless(work: Work) -> None:
        try:
            while True:
                work(1)
                threading.Event().wait(0.001)
        finally:
            over.append(True)

    def tick(done: int = 0) -> None:
        raise error

    with pytest.raises(error):
        run_long(endless, tick, size)
    assert over == [True]


def test_a_tick_is_told_how_far_the_work_is() -> None:
    """Ticks get rising numbers, and the last call gets the last one that the work reported."""
    told: list[int] = []

    def work_on(work: Work) -> None:
        for done in range(1, 100):
            work(done)

    run_long(work_on, lambda done=0: told.append(done), LONG)
    assert told[-1] == 99
    assert told == sorted(told)


def test_without_a_thread_the_caller_does_long_work_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long work runs in its caller's thread if no thread can be started."""

    def refuse(function: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("fastsm.long_work.BackgroundCall", refuse)
    assert run_long(lambda work: threading.get_ident(), nothing, LONG) == threading.get_ident()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Work]]:
    """Provide the long works that each module starts, recorded in a dict."""
    works: dict[str, list[Work]] = {}
    modules = ("snapshot.writer", "lookup.index", "generation.recovery", "core.frozen")

    def counting(module: str) -> Callable[..., Any]:
        def run(function: Callable[[Work], Any], tick: Any, size: int) -> Any:
            def noted(work: Work) -> Any:
                works.setdefault(module, []).append(work)
                return function(work)

            return run_long(noted, tick, size)

        return run

    for module in modules:
        monkeypatch.setattr(f"fastsm.{module}.run_long", counting(module))
    return works


def fill(machine: fastsm.FastStateMachine, mebibytes: int) -> None:
    for index in range(1, mebibytes * 5 + 1):
        machine.apply([(index, 1, fastsm.put(b"key %d" % index, VALUE))])


@pytest.mark.parametrize("mebibytes", [20, 100])
def test_the_gil_is_taken_as_often_whatever_the_size(
    tmp_path: Path, counted: dict[str, list[Work]], mebibytes: int
) -> None:
    """Snapshot, base, index, columns and recovery do not take the GIL more often for a larger state."""
    with fastsm.FastStateMachine(tmp_path / "a", auto_compact=False) as machine:
        fill(machine, mebibytes)
        machine.write_snapshot(tmp_path / "snapshot")
        machine.columns()
        machine.compact(machine.last_applied())
        wanted = machine.get(b"key 7")
    for table in (tmp_path / "a").glob("table-*"):
        table.unlink()
    with fastsm.FastStateMachine(tmp_path / "b") as machine:
        fill(machine, mebibytes)
    for table in (tmp_path / "b").glob("table-*"):
        table.unlink()
    for name in "ab":
        with fastsm.FastStateMachine(tmp_path / name) as machine:
            assert machine.get(b"key 7") == wanted
    assert set(counted) == {"snapshot.writer", "lookup.index", "generation.recovery", "core.frozen"}
    for module, works in counted.items():
        # The thread's start is one more take.
        assert max(work.takes for work in works) + 1 <= TAKES, module


def test_progress_can_end_a_long_snapshot(tmp_path: Path) -> None:
    """The error that `progress` raises ends the snapshot and leaves no file; the next snapshot is whole."""
    with fastsm.FastStateMachine(tmp_path / "state", auto_compact=False) as machine:
        fill(machine, 20)

        def stop(done: int, total: int) -> None:
            raise Enough

        with pytest.raises(Enough):
            machine.write_snapshot(tmp_path / "snapshot", progress=stop)
        assert list((tmp_path / "snapshot").iterdir()) == []
        machine.write_snapshot(tmp_path / "snapshot")
        with fastsm.open_snapshot(tmp_path / "snapshot") as snapshot:
            snapshot.verify()
            assert snapshot.keys == 100
