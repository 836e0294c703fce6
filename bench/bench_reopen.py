"""Opening a million keys: after a clean close, and after kill -9."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import blake3
import pytest

import fastsm
from bench.data import chunked, fill, fresh
from bench.harness import run_python
from bench.peers import open_peer

CHILD = """
import os, pickle, sys
import fastsm
keys, values = pickle.load(open(sys.argv[2], "rb"))
machine = fastsm.FastStateMachine(sys.argv[1], auto_compact=False)
index = machine.last_applied().index + 1
for start in range(0, len(keys), 1000):
    machine.apply([
        (index + start + i, 1, fastsm.put(*pair))
        for i, pair in enumerate(zip(keys[start:start + 1000], values[start:start + 1000]))])
machine.flush()
os.kill(os.getpid(), 9)
"""


def apply_and_die(directory: Path, keys: list[bytes], values: list[bytes]) -> None:
    """Apply all pairs and flush in another process, which then kills itself."""
    import pickle  # noqa: PLC0415

    content = directory.parent / "pairs"
    content.write_bytes(pickle.dumps((keys, values)))
    ended = run_python(CHILD, directory, content)
    assert ended.returncode == -9, ended.stderr
    content.unlink()


def copied(source: Path, target: Path) -> Path:
    """Copy a state directory; the copy's pages are in the page cache and synced to the disk."""
    shutil.copytree(source, target)
    os.sync()
    return target


def open_and_close(directory: Path, seconds: list[float], **options: Any) -> None:
    start = time.perf_counter()
    machine = fastsm.FastStateMachine(directory, **options)
    seconds.append(time.perf_counter() - start)
    machine.close()


def test_open_after_a_clean_close(
    note: Any, place: Path, keys: list[bytes], values: list[bytes], who: str
) -> None:
    if who == "fastsm":
        with fastsm.FastStateMachine(place / who) as machine:
            fill(machine, keys, values)
    else:
        store = open_peer(who, place / who)
        for chunk in chunked(list(zip(keys, values, strict=True)), 1000):
            store.apply(chunk)
        store.flush()
        store.close()
    os.sync()
    times: list[float] = []
    for _ in range(9 if who not in ("pysyncobj", "dict_log") else 3):
        if who == "fastsm":
            open_and_close(place / who, times)
        else:
            start = time.perf_counter()
            store = open_peer(who, place / who)
            store.get(keys[0])
            times.append(time.perf_counter() - start)
            store.close()
    note("open.background", "ms", [seconds * 1e3 for seconds in times], who)


def test_open_full(compare: Any, place: Path, keys: list[bytes], values: list[bytes]) -> None:
    """Open with every byte checked before the call returns; compared with reading and hashing the same files."""
    with fastsm.FastStateMachine(place / "state") as machine:
        fill(machine, keys, values)
    os.sync()
    opened: list[fastsm.FastStateMachine] = []

    def prepare() -> Any:
        while opened:
            opened.pop().close()
        return (), ()

    def subject() -> None:
        opened.append(fastsm.FastStateMachine(place / "state", verify_on_open="full"))

    def base() -> None:
        for path in (place / "state").iterdir():
            with path.open("rb", buffering=0) as file:
                hasher = blake3.blake3()
                while piece := file.read(4 << 20):
                    hasher.update(piece)

    compare("open.full", subject, base, 1, prepare)
    prepare()


@pytest.mark.parametrize("kind", ["killed", "killed.base"])
def test_open_after_a_kill(compare: Any, place: Path, keys: list[bytes], values: list[bytes], kind: str) -> None:
    """Open a log of everything, or a base and 64 MiB of log; compared with making a dict of pairs in memory."""
    original = place / "original"
    if kind == "killed":
        apply_and_die(original, keys, values)
    else:
        with fastsm.FastStateMachine(original, retain_entries=0, auto_compact=False) as machine:
            fill(machine, keys, values)
            machine.compact()
        tail = (64 << 20) // 144
        apply_and_die(original, keys[:tail], values[:tail])
    opened: list[fastsm.FastStateMachine] = []
    turn = iter(range(1000))

    def clean() -> None:
        while opened:
            opened[-1].close()
            shutil.rmtree(opened.pop().path)

    def prepare() -> Any:
        clean()
        return (copied(original, place / f"copy-{next(turn)}"),), (fresh(keys), fresh(values))

    def subject(directory: Path) -> None:
        opened.append(fastsm.FastStateMachine(directory))

    def base(some_keys: list[bytes], some_values: list[bytes]) -> None:
        dict(zip(some_keys, some_values, strict=True))

    compare(f"open.{kind}", subject, base, len(keys), prepare)
    assert opened[-1].len() == len(keys)
    clean()
