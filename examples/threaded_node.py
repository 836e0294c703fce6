"""The state machine side of a Raft node on threads: one applies, others read, one flushes, one writes snapshots.

Run: ``python examples/threaded_node.py [entries]``
"""

from __future__ import annotations

import queue
import sys
import tempfile
import threading
from pathlib import Path

import fastsm
from fastsm import Entry, FastStateMachine


def apply_loop(machine: FastStateMachine, committed: queue.Queue[list[Entry] | None]) -> None:
    """Apply committed chunks in order, as a Raft library's apply thread does. The machine has its own lock."""
    while (chunk := committed.get()) is not None:
        machine.apply(chunk)


def flush_loop(machine: FastStateMachine, stop: threading.Event) -> None:
    """Flush every 10 ms. Overlapping flushes of other threads would share its fsync."""
    while not stop.wait(0.01):
        machine.flush()


def read_loop(machine: FastStateMachine, stop: threading.Event, seen: list[int]) -> None:
    """Read without ever waiting. Both keys of a batch always match: a chunk is visible as a whole or not at all."""
    while not stop.is_set():
        left, right = machine.get_many([b"left", b"right"])
        assert left == right, "a batch was seen in part"
        seen.append(int(left or b"0"))


def main(folder: Path, count: int) -> None:
    with FastStateMachine(folder / "state") as machine:
        committed: queue.Queue[list[Entry] | None] = queue.Queue(maxsize=64)
        stop = threading.Event()
        seen: list[int] = []
        applying = threading.Thread(target=apply_loop, args=(machine, committed))
        others = [
            threading.Thread(target=flush_loop, args=(machine, stop)),
            *(threading.Thread(target=read_loop, args=(machine, stop, seen)) for _ in range(2)),
        ]
        for thread in (applying, *others):
            thread.start()
        for first in range(1, count + 1, 100):
            commands = (
                fastsm.batch([fastsm.put(b"left", b"%d" % i), fastsm.put(b"right", b"%d" % i)])
                for i in range(first, min(first + 100, count + 1))
            )
            committed.put([Entry(first + i, 1, command) for i, command in enumerate(commands)])
            if first == 1 + count // 200 * 100:  # halfway; entries are applied while the snapshot is written
                metadata = machine.write_snapshot(folder / "snapshots")
                print("snapshot as of:", tuple(metadata.last_included))
        committed.put(None)
        applying.join()
        stop.set()
        for thread in others:
            thread.join()
        machine.flush()
        print("applied:", tuple(machine.last_applied()), "durable:", tuple(machine.durable()))
        print("reads meanwhile:", "many" if len(seen) > 10 else len(seen))
        assert machine.get(b"left") == b"%d" % count


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name), int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
