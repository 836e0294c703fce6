"""The histories that the golden files were made from. Their effect on a state machine never changes."""

from __future__ import annotations

from collections.abc import Iterator

import blake3

import fastsm
from fastsm import Entry, FastStateMachine, LogId, MemoryStateMachine, SnapshotMetadata

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
    "put with a deadline": fastsm.put(b"lease", b"anna", expires=1_700_000_000_000),
    "compare and swap with a deadline": fastsm.compare_and_swap(b"lease", b"anna", b"bert", expires=5),
    "touch": fastsm.touch(b"lease", 6),
    "touch, no deadline": fastsm.touch(b"lease", None),
    "tick": fastsm.tick(1_700_000_000_000),
    "tick with a limit": fastsm.tick(7, limit=10),
    "add": fastsm.add(b"n", -1, initial=5),
    "open session": fastsm.open_session(expires=8),
    "once": fastsm.once(5, 1, fastsm.touch(b"lease", 9), expires=10),
    "forget": fastsm.forget(5),
}
LONG = 3_000  # entries


def play(machine: FastStateMachine | MemoryStateMachine) -> None:
    """Apply a history with everything that a log can hold: gaps, terms, all kinds of commands and records."""
    machine.apply([
        Entry(3, 2, fastsm.put(b"color", b"blue")), Entry(4, 2, fastsm.put(b"old", b"x", expires=300)),
        Entry(5, 2, fastsm.touch(b"old", 4_000)), Entry(6, 2, fastsm.tick(50)),
    ])
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
    machine.apply([
        Entry(15, 6, fastsm.put(b"large", b"0123456789abcdef" * 500)),
        Entry(16, 6, fastsm.batch([
            fastsm.put(b"lease", b"anna", expires=5_000), fastsm.put(b"lock", b"1", expires=100),
            fastsm.touch(b"lease", 9_000),
        ])),
        Entry(17, 7, fastsm.open_session(expires=6_000)),
        Entry(18, 7, fastsm.once(17, 1, fastsm.add(b"n", 5))),
        Entry(19, 7, fastsm.tick(200)),
    ])
    machine.apply([Entry(20, 7, fastsm.touch(b"color", 7_000)), Entry(21, 7, fastsm.touch(b"old", None))])
    machine.update_last_applied((22, 8))


def long_history() -> Iterator[Entry]:
    """Yield a history of LONG entries of all kinds, derived from a hash: the same on every version of Python."""
    dice = blake3.blake3(b"a long history").digest(length=8 * LONG)
    index = term = 1
    for at in range(0, len(dice), 8):
        step, new_term, kind, key, size, other, *rest = dice[at : at + 8]
        index += 1 + (step < 20) * (step % 5)
        term += new_term < 5
        value = bytes(rest) * (size % 40)
        yield Entry(index, term, _command(kind, b"key-%d" % (key % 120), value, b"%d" % (other % 3), 16 * size))


def _command(kind: int, key: bytes, value: bytes, small: bytes, time: int) -> bytes:  # noqa: PLR0911  # one for each
    if kind < 100:
        return fastsm.put(key, value if kind < 70 else small, expires=time if kind < 30 else None)
    if kind > 251:
        return fastsm.open_session(expires=time)
    if kind > 240:
        return fastsm.touch(key, time) if kind > 244 else fastsm.tick(time // 4, limit=kind - 240)
    if kind < 140:
        return fastsm.delete(key)
    if kind < 200:
        return fastsm.compare_and_swap(key, small if kind < 170 else None, value if kind % 2 else None)
    if kind < 220:
        return fastsm.batch([
            fastsm.put(key, small), fastsm.delete(small), fastsm.compare_and_swap(key + small, None, value)])
    return fastsm.config(value) if kind < 230 else fastsm.noop()
