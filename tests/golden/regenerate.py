"""Makes the golden files again: `python tests/golden/regenerate.py`, and the example of docs/format.md.

Only while the formats are version 0. From the first tagged release on these files are what that release
wrote, and are never made again: a later version gets files of its own beside them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import fastsm
from fastsm import Entry, FastStateMachine, LogId, MemoryStateMachine, SnapshotMetadata

HERE = Path(__file__).resolve().parent

COMMANDS = {
    "put": fastsm.put(b"color", b"blue"),
    "put, empty": fastsm.put(b"", b""),
    "delete": fastsm.delete(b"color"),
    "compare and swap": fastsm.compare_and_swap(b"color", b"blue", b"red"),
    "compare and swap, if absent": fastsm.compare_and_swap(b"color", None, b"red"),
    "compare and swap, remove": fastsm.compare_and_swap(b"color", b"red", None),
    "noop": fastsm.noop(),
    "config": fastsm.config(b"a,b,c"),
    "batch": fastsm.batch([
        fastsm.put(b"x", b"1"), fastsm.delete(b"y"), fastsm.compare_and_swap(b"z", None, b"3"), fastsm.noop(),
    ]),
    "batch, empty": fastsm.batch([]),
}


def play(machine: FastStateMachine | MemoryStateMachine) -> None:
    """A history with everything that a log can hold: gaps, terms, all kinds of commands and records."""
    machine.apply([Entry(3, 2, fastsm.put(b"color", b"blue")), Entry(4, 2, fastsm.noop())])
    machine.apply([
        Entry(7, 2, fastsm.put(b"", b"the empty key")),
        Entry(9, 5, fastsm.config(b"a,b,c")),
        Entry(10, 5, fastsm.put(b"gone", b"soon")),
        Entry(11, 5, fastsm.compare_and_swap(b"color", b"green", b"never")),
        Entry(12, 5, fastsm.compare_and_swap(b"color", b"blue", b"red")),
    ])
    machine.flush()
    machine.apply([
        Entry(13, 6, fastsm.batch([
            fastsm.put(b"\x00\xff", bytes(range(256))), fastsm.delete(b"gone"), fastsm.delete(b"never there"),
        ])),
        Entry(14, 6, fastsm.batch([fastsm.put(b"color", b"no"), fastsm.compare_and_swap(b"x", b"y", b"z")])),
    ])
    machine.persist_last_snapshot_metadata(SnapshotMetadata(LogId(12, 5), bytes(range(32))))
    machine.apply([Entry(15, 6, fastsm.put(b"large", b"0123456789abcdef" * 500))])
    machine.update_last_applied((20, 8))


def write_example(path: Path) -> None:
    """The example of docs/format.md."""
    with FastStateMachine(path) as machine:
        machine.apply([Entry(1, 1, fastsm.put(b"color", b"blue")), Entry(2, 1, fastsm.noop())])
        machine.flush()
        machine.apply([Entry(3, 2, fastsm.put(b"color", b"red"))])


def described() -> dict[str, Any]:
    """What the directory holds, as the model says: not read back by the code that wrote it."""
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
        "snapshot_metadata": [list(metadata.last_included), metadata.checksum.hex()],
    }


def main() -> None:
    """Replaces the files beside this script, and prints the example."""
    folder = Path(tempfile.mkdtemp())
    with (
        mock.patch("os.urandom", random.Random(0).randbytes),
        FastStateMachine(folder / "state", contiguous=False) as machine,
    ):
        play(machine)
    with mock.patch("os.urandom", lambda size: bytes(range(1, 1 + size))):
        write_example(folder / "example")
    for name in ("CURRENT", "log-1"):
        content = (folder / "example" / name).read_bytes()
        print(name)
        for start in range(0, len(content), 16):
            print(f"    {start:04x}  {content[start:start + 16].hex(' ')}")
    target = HERE / "state-0"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in ("CURRENT", "log-1"):
        shutil.copy(folder / "state" / name, target / name)
    expected = {
        "state-0": described(),
        "commands-0": [
            {"name": name, "bytes": command.hex(), "says": repr(fastsm.decode(command))}
            for name, command in COMMANDS.items()
        ],
    }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(folder)
    print(f"{os.path.relpath(target)} and expected.json are new")


if __name__ == "__main__":
    main()
