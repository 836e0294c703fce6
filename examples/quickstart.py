"""The first five minutes: apply, read, flush, snapshot, restart. Run: ``python examples/quickstart.py``"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import fastsm


def main(folder: Path) -> None:
    # A command is bytes. Your Raft library carries it; when it is committed, the state machine applies it.
    commands = [
        fastsm.put(b"color", b"blue"),
        fastsm.compare_and_swap(b"color", b"blue", b"green"),
        fastsm.batch([fastsm.put(b"size", b"9"), fastsm.delete(b"shape")]),
    ]
    entries = [(index, 1, command) for index, command in enumerate(commands, 1)]

    with fastsm.FastStateMachine(folder / "state") as machine:
        print("results:", machine.apply(entries))
        print("color:", machine.get(b"color"))
        machine.flush()  # durable from here on
        metadata = machine.write_snapshot(folder / "snapshots")
        print("snapshot as of:", metadata.last_included)
        print(machine.stats())

    # Closed or killed, it reopens where it was. Replaying the log is harmless: known entries are skipped.
    with fastsm.FastStateMachine(folder / "state") as machine:
        print("after a restart:", machine.last_applied(), machine.apply(entries))

    # A follower that lacks many entries installs the snapshot.
    with fastsm.FastStateMachine(folder / "follower") as follower:
        follower.install_snapshot(metadata, folder / "snapshots")
        print("follower:", follower.last_applied(), list(follower.items()))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))
