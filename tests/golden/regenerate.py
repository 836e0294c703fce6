"""Remakes the golden files and the example of docs/format.md: `python tests/golden/regenerate.py`.

Only while the formats have version 0. From the first tagged release on, these files stay as that release wrote
them, and a later version gets files of its own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import fastsm
from fastsm import Entry, FastStateMachine, MemoryStateMachine, open_snapshot

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for `import support.…`

from support.golden import COMMANDS, long_history, play  # noqa: E402
from support.inside import inside  # noqa: E402

FILE = "snapshot.fsm"
SNAPSHOTS: dict[str, dict[str, Any]] = {
    "flat": {},
    "attachment": {"attachment": b"Raft's own bytes"},
    "zstd": {"attachment": b"and compressed", "compress": "zstd"},
    "as-of-12": {"last_included": (12, 5)},
}


def write_example(path: Path) -> None:
    """Write the example of docs/format.md."""
    with FastStateMachine(path) as machine:
        machine.apply([Entry(1, 1, fastsm.put(b"color", b"blue")), Entry(2, 1, fastsm.noop())])
        machine.flush()
        machine.apply([Entry(3, 2, fastsm.put(b"color", b"red"))])
    with FastStateMachine(path, read_only=True) as machine:
        machine.write_snapshot(path)


def write_compacted(path: Path) -> None:
    """Write the history's state with a base up to entry 12, the rest in the log, and a saved table with the order."""
    with mock.patch("fastsm.core.generations.SAVE_TABLE_ABOVE", 0), FastStateMachine(
        path, contiguous=False, ordered=True
    ) as machine:
        play(machine)
        machine.compact(12)


def write_snapshots(path: Path, machine: FastStateMachine) -> dict[str, Any]:
    """Write snapshots of the state; return their descriptions."""
    described = {}
    for name, options in SNAPSHOTS.items():
        machine.write_snapshot(path, **options)
        shutil.move(path / FILE, path / f"{name}.fsm")
        with open_snapshot(path / f"{name}.fsm") as snapshot:
            described[name] = {
                "last_included": list(snapshot.metadata.last_included),
                "checksum": snapshot.metadata.checksum.hex(),
                "state_checksum": snapshot.state_checksum.hex(),
                "attachment": snapshot.attachment.hex(),
                "codec": snapshot.codec,
            }
    return described


def described() -> dict[str, Any]:
    """Describe the directory by the model, not by the code that wrote it."""
    model = MemoryStateMachine(contiguous=False)
    play(model)
    membership = model.membership()
    metadata = model.snapshot_metadata()
    assert membership is not None
    assert metadata is not None
    return {
        "last_applied": list(model.last_applied()),
        "items": {key.hex(): value.hex() for key, value in sorted(model.items())},
        "terms": [model.entry_term(index) for index in range(25)],
        "membership": [list(membership[0]), membership[1].hex()],
        "deadlines": {key.hex(): model.deadline(key) for key, _ in sorted(model.items())},
        "clock": model.clock(),
        "sessions": {session: value.hex() for session, value in inside(model).state.sessions.items()},
        "snapshot_metadata": [list(metadata.last_included), metadata.checksum.hex()],
    }


def checksum_of_the_long_history(path: Path) -> str:
    """Return the model's checksum."""
    model = MemoryStateMachine(contiguous=False)
    model.apply(list(long_history()))
    return model.write_snapshot(path).checksum.hex()


def print_example(folder: Path) -> None:
    for name in ("CURRENT", "log-1", FILE):
        content = (folder / name).read_bytes()
        print(name)
        for start in range(0, len(content), 16):
            print(f"{start:04x}  {content[start:start + 16].hex(' ')}")


def keep(source: Path, name: str) -> None:
    """Put a folder's files next to this script."""
    shutil.rmtree(HERE / name, ignore_errors=True)
    shutil.copytree(source, HERE / name, ignore=shutil.ignore_patterns("LOCK", "PUBLISHED"))


def main() -> None:
    """Replaces the files next to this script, and prints the example."""
    folder = Path(tempfile.mkdtemp())
    with mock.patch("os.urandom", random.Random(0).randbytes):
        with FastStateMachine(folder / "state", contiguous=False) as machine:
            play(machine)
        with FastStateMachine(folder / "state", contiguous=False, read_only=True) as machine:
            snapshots = write_snapshots(folder / "snapshots", machine)
        write_compacted(folder / "compacted")
    with mock.patch("os.urandom", lambda size: bytes(range(1, 1 + size))):
        write_example(folder / "example")
    print_example(folder / "example")
    keep(folder / "state", "state-0")
    keep(folder / "compacted", "state-0-compacted")
    keep(folder / "snapshots", "snapshots-0")
    expected = {
        "state-0": described(),
        "state-0-compacted": described(),
        "snapshots-0": snapshots,
        "long-history-0": checksum_of_the_long_history(folder / "long"),
        "commands-0": [
            {"name": name, "bytes": command.hex(), "says": repr(fastsm.decode(command))}
            for name, command in COMMANDS.items()
        ],
    }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(folder)
    print(f"{os.path.relpath(HERE)} is new")


if __name__ == "__main__":
    main()
