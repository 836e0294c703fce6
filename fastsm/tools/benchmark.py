"""How fast fastsm is on this machine: a small comparison with a dict, and with LMDB and SQLite if they are available.

Each store does the same seeded work in interleaved rounds; results are compared by the ratio to the dict's time in the
same round. The whole comparison takes a minute or two.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsm.command import put
from fastsm.machine import FastStateMachine

KEYS = 200_000
LOOKUPS = 50_000
ENTRIES = 20_000
FLUSHES = 20
CHUNK = 100
ROUNDS = 5

Pairs = list[tuple[bytes, bytes]]
Tick = Callable[[str], None]

# What is measured, in the order of the table: its name, and the unit of its absolute numbers.
WORKS = {
    "get": "ns", "apply": "ns an entry", "apply, then flush": "µs a flush of 100 entries", "snapshot": "ms",
    "reopen": "ms", "memory": "bytes a key",
}  # fmt: skip


@dataclass
class Measured:
    """The measurements of one store: for each kind of work, one number per round."""

    store: str
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def note(self, work: str, value: float) -> None:
        self.rounds.setdefault(work, []).append(value)

    def median(self, work: str) -> float | None:
        values = self.rounds.get(work)
        return statistics.median(values) if values else None


class FastStore:
    """fastsm, doing the same work as the other stores."""

    name = "fastsm"

    def __init__(self, directory: Path) -> None:
        self.machine = FastStateMachine(directory, auto_compact=False)
        self.get: Callable[[bytes], object] = self.machine.get
        self.flush = self.machine.flush
        self.close = self.machine.close

    def chunks(self, pairs: Pairs) -> list[Any]:
        first = self.machine.last_applied().index + 1
        entries = [(first + i, 1, put(key, value)) for i, (key, value) in enumerate(pairs)]
        return [entries[i : i + CHUNK] for i in range(0, len(entries), CHUNK)]

    def apply(self, chunk: Any) -> None:
        self.machine.apply(chunk)

    def snapshot(self, directory: Path) -> None:
        self.machine.write_snapshot(directory)


class DictStore:
    """A plain in-memory dict (not durable). Its snapshot is a pickle."""

    name = "dict"

    def __init__(self, directory: Path) -> None:
        self.pairs: dict[bytes, bytes] = {}
        self.get: Callable[[bytes], object] = self.pairs.get
        self.path = directory

    def chunks(self, pairs: Pairs) -> list[Any]:
        return [pairs[i : i + CHUNK] for i in range(0, len(pairs), CHUNK)]

    def apply(self, chunk: Any) -> None:
        pairs = self.pairs
        for key, value in chunk:
            pairs[key] = value

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def snapshot(self, directory: Path) -> None:
        import pickle  # noqa: PLC0415

        directory.mkdir(parents=True)
        with (directory / "pickle").open("wb") as file:
            pickle.dump(self.pairs, file, protocol=5)
            file.flush()
            os.fsync(file.fileno())


class SqliteStore(DictStore):
    name = "sqlite"

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "pairs.db"
        self.db = sqlite3.connect(self.path, isolation_level=None)
        for setting in ("journal_mode=WAL", "synchronous=OFF", "cache_size=-131072"):
            self.db.execute(f"PRAGMA {setting}")
        self.db.execute("CREATE TABLE IF NOT EXISTS pairs (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
        self.get = self.look_up

    def look_up(self, key: bytes) -> object:
        return self.db.execute("SELECT value FROM pairs WHERE key = ?", (key,)).fetchone()

    def apply(self, chunk: Any) -> None:
        self.db.execute("BEGIN")
        self.db.executemany("INSERT OR REPLACE INTO pairs VALUES (?, ?)", chunk)
        self.db.execute("COMMIT")

    def flush(self) -> None:
        with open(f"{self.path}-wal", "rb") as log:
            os.fsync(log.fileno())

    def close(self) -> None:
        self.db.close()

    def snapshot(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        with contextlib.closing(sqlite3.connect(directory / "copy.db")) as copy:
            self.db.backup(copy)


class LmdbStore(DictStore):
    name = "lmdb"

    def __init__(self, directory: Path) -> None:
        import lmdb  # noqa: PLC0415

        self.env = lmdb.open(str(directory), map_size=4 << 30, sync=False, metasync=False, writemap=True)
        self.renew()

    def renew(self) -> None:
        self.reader = self.env.begin()
        self.get = self.reader.get

    def apply(self, chunk: Any) -> None:
        self.reader.abort()
        with self.env.begin(write=True) as transaction:
            for key, value in chunk:
                transaction.put(key, value)
        self.renew()

    def flush(self) -> None:
        self.env.sync(True)

    def close(self) -> None:
        self.reader.abort()
        self.env.close()

    def snapshot(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.env.copy(str(directory))


def stores() -> list[Any]:
    """Returns the kinds of store that can be measured here."""
    found: list[Any] = [FastStore, DictStore, SqliteStore]
    with contextlib.suppress(ImportError):
        import lmdb  # noqa: F401, PLC0415

        found.append(LmdbStore)
    return found


def seconds_of(function: Callable[..., object], *arguments: Any) -> float:
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - start
    finally:
        gc.enable()


def look_up(get: Callable[[bytes], object], keys: list[bytes]) -> None:
    for key in keys:
        get(key)


def apply_all(store: Any, chunks: list[Any], flush: bool) -> None:
    for chunk in chunks:
        store.apply(chunk)
        if flush:
            store.flush()


def run(directory: Path, tick: Tick = lambda text: None) -> list[Measured]:
    """Measures every store in `directory`; `tick` is called with a description of what comes next."""
    source = random.Random(1)
    keys = [source.randbytes(16) for _ in range(KEYS)]
    value = source.randbytes(100)
    found = {kind.name: Measured(kind.name) for kind in stores()}
    opened: dict[str, Any] = {}
    try:
        for kind in stores():
            tick(f"{kind.name}: {KEYS:,} keys")
            opened[kind.name] = kind(directory / kind.name)
            apply_all(opened[kind.name], opened[kind.name].chunks([(key, value) for key in keys]), False)
            opened[kind.name].flush()
        for turn in range(ROUNDS):
            tick(f"round {turn + 1} of {ROUNDS}")
            names = list(opened)
            for name in names if turn % 2 else reversed(names):
                round_of(opened[name], found[name], source, keys, value)
        for kind in stores():
            tick(f"{kind.name}: snapshot, reopening, memory")
            snapshot_and_reopen(kind, opened, found[kind.name], directory)
            found[kind.name].note("memory", memory_of(kind.name, directory / "memory"))
    finally:
        for store in opened.values():
            store.close()
    return list(found.values())


def round_of(store: Any, measured: Measured, source: random.Random, keys: list[bytes], value: bytes) -> None:
    wanted = [bytes(bytearray(key)) for key in source.choices(keys, k=LOOKUPS)]
    measured.note("get", seconds_of(look_up, store.get, wanted) / LOOKUPS * 1e9)
    chunks = store.chunks([(bytes(bytearray(key)), value) for key in source.choices(keys, k=ENTRIES)])
    measured.note("apply", seconds_of(apply_all, store, chunks, False) / ENTRIES * 1e9)
    store.flush()
    if type(store) is not DictStore:
        chunks = store.chunks([(key, value) for key in source.choices(keys, k=CHUNK * FLUSHES)])
        measured.note("apply, then flush", seconds_of(apply_all, store, chunks, True) / FLUSHES * 1e6)


def snapshot_and_reopen(kind: Any, opened: dict[str, Any], measured: Measured, directory: Path) -> None:
    for turn in range(3):
        target = directory / f"snapshot-{turn}"
        measured.note("snapshot", seconds_of(opened[kind.name].snapshot, target) * 1e3)
        shutil.rmtree(target)
    if kind is DictStore:
        return
    for _ in range(3):
        opened[kind.name].close()
        start = time.perf_counter()
        opened[kind.name] = kind(directory / kind.name)
        measured.note("reopen", (time.perf_counter() - start) * 1e3)


def memory_of(name: str, directory: Path) -> float:
    """Returns the additional memory of a process per key, in bytes; mapped files are not counted."""
    # With this process's own path: in the folder of an unbuilt checkout, `-c` would import the checkout.
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from fastsm.tools.benchmark import print_memory; "
        "print_memory(sys.argv[1], sys.argv[2])")
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, name, str(directory)], capture_output=True, text=True, check=True)
        return float(done.stdout)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def print_memory(name: str, directory: str) -> None:
    """Fills a store, and prints the memory that this took per key, in bytes. To be called in a process of its own."""
    kind = next(kind for kind in stores() if kind.name == name)
    store = kind(Path(directory))
    source = random.Random(2)
    before = own_memory()
    for _ in range(0, KEYS, 1000):
        pairs = [(source.randbytes(16), source.randbytes(100)) for _ in range(1000)]
        apply_all(store, store.chunks(pairs), False)
    del pairs
    print((own_memory() - before) / KEYS)
    store.close()


def own_memory() -> int:
    """Returns the memory that is not of mapped files; on systems that do not report it, the peak memory."""
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("Anonymous:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # noqa: PLC0415

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine() -> dict[str, Any]:
    """Returns facts about this machine, on which the numbers depend."""
    return {
        "system": f"{platform.system()} {platform.release()}", "processor": platform.machine(),
        "cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0],
    }  # fmt: skip


def as_json(found: list[Measured]) -> str:
    """Returns all rounds of everything, and the machine, as JSON."""
    return json.dumps(
        {"machine": machine(), "units": WORKS, "stores": {one.store: one.rounds for one in found}}, indent=1)


def number_text(value: float) -> str:
    """Formats a number with three significant digits; from 1,000 on, as a whole number."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def ratio_to(one: Measured, base: Measured, work: str) -> float | None:
    """Returns the median of the rounds' ratios to the dict's time; None if the dict has no such time."""
    pairs = list(zip(one.rounds.get(work, ()), base.rounds.get(work, ()), strict=False))
    return statistics.median(mine / theirs for mine, theirs in pairs) if pairs else None


def table(found: list[Measured]) -> Iterator[tuple[str, ...]]:
    """Yields rows for people: the work, then each store's median and, if the dict does the same, the ratio to it."""
    base = next(one for one in found if one.store == "dict")
    yield ("", *(one.store for one in found))
    for work, unit in WORKS.items():
        cells = []
        for one in found:
            value, ratio = one.median(work), ratio_to(one, base, work)
            text = "-" if value is None else number_text(value)
            cells.append(text if ratio is None or one is base else f"{text} ({ratio:.2g})")
        yield (f"{work}, {unit}", *cells)


def plot(found: list[Measured], path: Path) -> None:
    """Draws a small chart for each kind of work, into a PNG, SVG or PDF; needs matplotlib."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, all_axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    for axes, (work, unit) in zip(all_axes.flat, WORKS.items(), strict=True):
        shown = [(one.store, value) for one in found if (value := one.median(work)) is not None]
        bars = axes.barh(
            [name for name, _ in shown], [value for _, value in shown],
            color=["#d1602b" if name == "fastsm" else "#9db8cc" for name, _ in shown])
        axes.bar_label(bars, [f" {number_text(value)}" for _, value in shown], fontsize=9)
        axes.set_title(f"{work} ({unit})", loc="left", fontsize=10)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_xticks([])
        axes.invert_yaxis()
        axes.margins(x=0.2)
    figure.suptitle(f"{KEYS:,} keys: lower is better", x=0.01, ha="left")
    figure.savefig(path)
    plt.close(figure)
