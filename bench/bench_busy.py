"""Long operations while another Python thread reads in a loop: how much that thread slows them."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fastsm
from bench.bench_snapshot import bare_write
from bench.data import fill


@contextmanager
def reading(machine: fastsm.FastStateMachine, keys: list[bytes]) -> Iterator[None]:
    """Read one key after the other in another thread, for as long as the block runs."""
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            for key in keys[:1000]:
                machine.get(key)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_snapshot(compare: Any, machine_at: Any, place: Path, keys: list[bytes], values: list[bytes]) -> None:
    """Compare with a bare write and fsync of as many bytes while no other thread runs."""
    machine = machine_at()
    fill(machine, keys, values)
    machine.write_snapshot(place / "size")
    content = os.urandom((place / "size" / "snapshot.fsm").stat().st_size)
    turn = iter(range(1000))

    def snapshot(path: Path) -> None:
        with reading(machine, keys):
            machine.write_snapshot(path)

    def prepare() -> Any:
        number = next(turn)
        shutil.rmtree(place / f"snapshot-{number - 1}", ignore_errors=True)
        os.sync()
        return (place / f"snapshot-{number}",), (place / "bare", content)

    compare("busy.snapshot", snapshot, bare_write, 1, prepare, rounds=9)


def empty(path: Path, out: Path) -> fastsm.FastStateMachine:
    return fastsm.FastStateMachine(path)


def installed(path: Path, out: Path) -> fastsm.FastStateMachine:
    """Return a machine with a base of all keys and a log of one entry, so that a compaction writes everything."""
    machine = empty(path, out)
    machine.install_snapshot(None, out)
    machine.apply([(machine.last_applied().index + 1, 1, fastsm.noop())])
    return machine


def closed(path: Path, out: Path) -> fastsm.FastStateMachine:
    machine = installed(path, out)
    machine.close()
    return machine


def open_full(machine: fastsm.FastStateMachine, out: Path) -> None:
    fastsm.FastStateMachine(machine.path, verify_on_open="full").close()


Make = Callable[[Path, Path], fastsm.FastStateMachine]
Work = Callable[[fastsm.FastStateMachine, Path], object]
ROWS: dict[str, tuple[Make, Work]] = {
    "busy.install": (empty, lambda machine, out: machine.install_snapshot(None, out)),
    "busy.compact": (installed, lambda machine, _: machine.compact(machine.last_applied().index)),
    "busy.open_full": (closed, open_full),
    "busy.verify": (installed, lambda machine, _: machine.verify()),
    "busy.columns": (installed, lambda machine, _: machine.columns()),
}


@pytest.mark.parametrize("row", ROWS)
def test_other_long_work(
    compare: Any, machine_at: Any, place: Path, keys: list[bytes], values: list[bytes], row: str
) -> None:
    """Compare with the same operation while no other thread reads."""
    read = machine_at(auto_compact=False)
    fill(read, keys, values)
    out = place / "out"
    read.write_snapshot(out)
    make, work = ROWS[row]
    turn = iter(range(1000))
    made: list[fastsm.FastStateMachine] = []

    def clean() -> None:
        while made:
            made[-1].close()
            shutil.rmtree(made.pop().path)

    def busy(machine: fastsm.FastStateMachine) -> None:
        with reading(read, keys):
            work(machine, out)

    def alone(machine: fastsm.FastStateMachine) -> None:
        work(machine, out)

    def prepare() -> Any:
        clean()
        made.extend(make(place / f"made-{next(turn)}", out) for _ in range(2))
        os.sync()
        return (made[0],), (made[1],)

    compare(row, busy, alone, 1, prepare)
    clean()
