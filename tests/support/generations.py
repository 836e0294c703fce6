"""A state with a base, a log and a saved table; scenes that change it, and checks of what a scene leaves."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastsm import FastStateMachine, open_snapshot
from fastsm.core import generations
from support.histories import History
from support.inside import inside

TARGET = "target"  # the directory that snapshots are written to
OTHER = "other"    # the directory of another replica's newer snapshot
OPTIONS: dict[str, Any] = {"retain_entries": 20, "auto_compact": False, "verify_on_open": "full"}


class Scene(NamedTuple):
    """An operation on a copy of the template; with ``table``, saved tables are written."""

    act: Callable[[FastStateMachine, Path], object]
    table: bool = False


def write(compress: str) -> Callable[[FastStateMachine, Path], object]:
    return lambda machine, root: machine.write_snapshot(f"{root}/{TARGET}", compress=compress)


def install(name: str) -> Callable[[FastStateMachine, Path], object]:
    return lambda machine, root: machine.install_snapshot(None, f"{root}/{name}")


SCENES = {
    "write_snapshot": Scene(write("none")),
    "write_snapshot, zstd": Scene(write("zstd")),
    "install_snapshot": Scene(install(OTHER)),
    "install_snapshot, zstd, table": Scene(install(OTHER + "-zstd"), table=True),
    "compact": Scene(lambda machine, root: machine.compact(machine.last_applied().index - 5)),
    "compact, table": Scene(lambda machine, root: machine.compact(machine.last_applied().index - 5), table=True),
    "clear": Scene(lambda machine, root: machine.clear()),
    "close": Scene(lambda machine, root: machine.close()),
    "close, table": Scene(lambda machine, root: machine.close(), table=True),
}


def build_template(root: Path) -> None:
    """Make a state with a base, a log and a saved table; a snapshot of it; and two newer snapshots."""
    history = History(1, large=False)
    threshold, generations.SAVE_TABLE_ABOVE = generations.SAVE_TABLE_ABOVE, 0
    try:
        with FastStateMachine(root / "state", **OPTIONS) as machine:
            for _ in range(20):
                machine.apply(history.chunk())
            machine.compact()
            machine.write_snapshot(root / TARGET)
            machine.apply(history.chunk())
    finally:
        generations.SAVE_TABLE_ABOVE = threshold
    with FastStateMachine(root / "elsewhere", **OPTIONS) as replica:
        replica.install_snapshot(None, root / TARGET)
        newer = History(2, large=False, after=history.last._replace(index=machine_end(history)))
        replica.update_last_applied(newer.last)
        for _ in range(20):
            replica.apply(newer.chunk())
        replica.write_snapshot(root / OTHER)
        replica.write_snapshot(root / f"{OTHER}-zstd", compress="zstd")
    shutil.rmtree(root / "elsewhere")


def machine_end(history: History) -> int:
    """Return an index that the template's machine will not reach."""
    return history.last.index + 1000


def state_of(machine: FastStateMachine) -> tuple[Any, ...]:
    """Return everything that can be read."""
    terms = machine.entry_terms(np.arange(machine.last_applied().index + 2, dtype=np.uint64))
    return (
        machine.last_applied(), dict(machine.items()), machine.membership(), machine.snapshot_metadata(),
        terms.tobytes(), machine.stats().generation,
    )  # fmt: skip


def open_files(root: Path) -> list[str]:
    """Return the files below a directory that this process has open or mapped."""
    gc.collect()  # on Python 3.13 an error's traceback may keep files open until a collection
    names = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    with open("/proc/self/maps", encoding="utf-8") as maps:  # each file once: the system may split a mapping
        names += {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
    return sorted(name for name in names if str(root) in name)


def assert_target_is_whole(root: Path, *, alone: bool) -> Any:
    """Check that the snapshot is whole and, with `alone`, the only file there; return its metadata."""
    with open_snapshot(root / TARGET) as snapshot:
        snapshot.verify()
        if alone:
            assert os.listdir(root / TARGET) == ["snapshot.fsm"]
        return snapshot.metadata


def reopen(root: Path) -> tuple[Any, ...]:
    """Return the state as the next process finds it; check it, and that only files of its generation are left."""
    with FastStateMachine(root / "state", **OPTIONS) as machine:
        inside(machine).check()
        number = machine.stats().generation
        names = {f"log-{number}", f"base-{number}", f"table-{number}", "CURRENT", "LOCK", "PUBLISHED"}
        assert set(os.listdir(root / "state")) <= names
        return state_of(machine)
