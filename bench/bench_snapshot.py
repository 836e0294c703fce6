"""Snapshots of a million keys: writing one, installing one, and how much writing one delays a reader."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest

import fastsm
from bench import data
from bench.data import chunked, fill
from bench.machine import write_all
from bench.peers import open_peer

WINDOWS = 2 if data.smoke else 20


@pytest.fixture(scope="module")
def full(keys: list[bytes], values: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with fastsm.FastStateMachine(tmp_path_factory.mktemp("snapshot") / "state") as machine:
        fill(machine, keys, values)
        machine.flush()
        yield machine


def bare_write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    write_all(descriptor, content)
    os.fsync(descriptor)
    os.close(descriptor)


def test_snapshot(compare: Any, full: Any, place: Path, keys: list[bytes], values: list[bytes], who: str) -> None:
    """Compare with a bare write and fsync of as many bytes."""
    store: Any = full
    if who != "fastsm":
        store = open_peer(who, place / who)
        for chunk in chunked(list(zip(keys, values, strict=True)), 1000):
            store.apply(chunk)
        store.flush()
    turn = iter(range(1000))
    content = b""

    def prepare() -> Any:
        nonlocal content
        if not content:
            full.write_snapshot(place / "size")
            content = os.urandom((place / "size" / "snapshot.fsm").stat().st_size)
        number = next(turn)
        shutil.rmtree(place / f"snapshot-{number - 1}", ignore_errors=True)
        os.sync()
        return (place / f"snapshot-{number}",), (place / "bare", content)

    try:
        compare("snapshot", store.write_snapshot if who == "fastsm" else store.snapshot, bare_write, 1, prepare,
                rounds=3 if who == "pysyncobj" else 9, who=who)  # fmt: skip
    except NotImplementedError:
        pytest.skip(f"{who} has no snapshots")
    finally:
        if store is not full:
            store.close()


def test_install(compare: Any, full: Any, place: Path) -> None:
    full.write_snapshot(place / "out")
    source = place / "out" / "snapshot.fsm"
    content = source.read_bytes()
    turn = iter(range(1000))
    opened: list[fastsm.FastStateMachine] = []

    def clean() -> None:
        while opened:
            opened[-1].close()
            shutil.rmtree(opened.pop().path)

    def prepare() -> Any:
        clean()
        os.sync()
        opened.append(fastsm.FastStateMachine(place / f"state-{next(turn)}"))
        return (opened[-1],), (place / "bare", content)

    compare("install", lambda machine: machine.install_snapshot(None, source), bare_write, 1, prepare, rounds=9)
    assert opened[-1].len() == full.len()
    clean()


def read_for(get: Callable[[bytes], object], wanted: list[bytes], going: Callable[[], bool]) -> Any:
    """Read until `going` returns false; return the nanoseconds of each get."""
    clock, times, i, count = time.perf_counter_ns, [], 0, len(wanted)
    before = clock()
    while True:
        for _ in range(1000):
            get(wanted[i % count])
            now = clock()
            times.append(now - before)
            before = now
            i += 1
        if not going():
            break
    return np.array(times)


def window(full: Any, wanted: list[bytes], work: Callable[[], object] | None, seconds: float) -> tuple[Any, float]:
    """Measure one window: read in this thread while `work` runs in another, or for `seconds` if there is no work."""
    start = time.perf_counter()
    if work is None:
        return read_for(full.get, wanted, lambda: time.perf_counter() - start < seconds), seconds
    thread = threading.Thread(target=work)
    thread.start()
    times = read_for(full.get, wanted, thread.is_alive)
    thread.join()
    return times, time.perf_counter() - start


def hash_and_write(path: Path, content: bytes) -> None:
    """Hash and write a snapshot's bytes in a few C calls without the GIL: the least that a snapshot can disturb."""
    blake3.blake3(content).digest()
    bare_write(path, content)


def test_reader_meanwhile(note: Any, full: Any, keys: list[bytes], place: Path) -> None:
    """Measure 20 windows during a snapshot; each has one of equal length without, and one with a busy C thread."""
    wanted = random.Random(14).choices(keys, k=100_000)
    full.write_snapshot(place / "size")
    content = os.urandom((place / "size" / "snapshot.fsm").stat().st_size)
    windows: dict[str, list[Any]] = {"with": [], "without": [], "next to C": []}
    for number in range(WINDOWS):
        target = place / f"snapshot-{number}"
        busy, seconds = window(full, wanted, partial(full.write_snapshot, target), 0)
        windows["with"].append(busy)
        windows["without"].append(window(full, wanted, None, seconds)[0])
        windows["next to C"].append(window(full, wanted, partial(hash_and_write, place / "bare", content), 0)[0])
        shutil.rmtree(target)
    marks = [50, 90, 99, 99.9, 99.99, 99.999]
    extra: dict[str, Any] = {"percentiles": marks}
    for name, arrays in windows.items():
        times = np.concatenate(arrays)
        extra[name] = [float(value) for value in np.percentile(times, marks)]
        extra[f"{name}_longest"] = float(times.max())
        extra[f"{name}_gets"] = len(times)
    for base, row in (("without", "snapshot.reader"), ("next to C", "snapshot.reader.c")):
        pairs = list(zip(windows["with"], windows[base], strict=True))
        note(f"{row}.p9999", "ratio", [float(np.percentile(a, 99.99) / np.percentile(b, 99.99)) for a, b in pairs],
             extra=extra)  # fmt: skip
        note(f"{row}.gap", "ratio", [float(a.max() / b.max()) for a, b in pairs])
