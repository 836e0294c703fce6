"""Snapshots for tests: small states, their files, and forged files with correct checksums."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3

import fastsm
from fastsm import LogId, MemoryStateMachine, open_snapshot
from fastsm.snapshot.model import CONFIG, PUT, State, record, runs_of, snapshot_bytes
from support.inside import inside

# The place of each field of the header, from docs/format.md.
FIELDS = {
    "magic": (0, "<Q"), "version": (8, "<I"), "codec": (12, "<I"), "last index": (16, "<Q"), "last term": (24, "<Q"),
    "keys": (32, "<Q"), "runs": (40, "<Q"), "membership size": (48, "<Q"), "records size": (56, "<Q"),
    "sessions": (64, "<Q"), "clock": (72, "<Q"), "state checksum": (80, "<Q"), "attachment size": (112, "<Q"),
    "stored size": (120, "<Q"),
}
STATE = 160


def some_state(keys: int = 20, *, membership: bool = True, seed: int = 1) -> State:
    """Return the state of a model that applied puts and deletes, with terms that rise."""
    rng = random.Random(seed)
    machine = MemoryStateMachine(contiguous=False)
    index, term = 2, 1
    if membership:
        machine.apply([(index, term, fastsm.config(b"members"))])
    while len(machine) < keys:
        index, term = index + rng.choice((1, 1, 3)), term + rng.choice((0, 0, 0, 1))
        key = b"key %d" % rng.randrange(2 * keys)
        command = fastsm.delete(key) if rng.random() < 0.1 else fastsm.put(key, rng.randbytes(rng.randrange(60)))
        machine.apply([(index, term, command)])
    return inside(machine).state_as_of(machine.last_applied())


class StateSource:
    """A state in the form that the writer takes."""

    estimated_size = 0
    sessions = clock = 0

    def __init__(self, state: State) -> None:
        self.last_included = state.last
        self.membership = b""
        if state.membership:
            self.membership = record(CONFIG, state.membership[0].index, b"", state.membership[1])
        self.runs = b"".join(struct.pack("<QQQ", *run) for run in runs_of(state.seen))
        self.records = [record(PUT, state.writers[key].index, key, value) for key, value in state.values.items()]

    def find(self, tick: Callable[[], object]) -> None:
        """Do nothing: everything is found already."""

    def write_records(self, directory: Any, fd: Any, offset: int, tick: Callable[[], object]) -> tuple[int, int]:
        start = offset
        for each in self.records:
            directory.write(fd, each, offset)
            offset += len(each)
            tick()
        return len(self.records), offset - start


def file_of(path: Path, state: State | None = None, compress: str = "none", attachment: bytes = b"hello") -> Path:
    """Write a snapshot's file."""
    path.write_bytes(snapshot_bytes(state or some_state(), compress, attachment))
    return path


def with_field(data: bytes, name: str, value: int) -> bytes:
    """Return the file with another number in its header."""
    changed = bytearray(data)
    offset, layout = FIELDS[name]
    struct.pack_into(layout, changed, offset, value)
    return bytes(changed)


def field(data: bytes, name: str) -> int:
    offset, layout = FIELDS[name]
    number: int = struct.unpack_from(layout, data, offset)[0]
    return number


def sealed(data: bytes, *, state_sum: bool = True, flat: bytes | None = None) -> bytes:
    """Return the file with checksums that match its content."""
    changed = bytearray(data)
    if state_sum:
        start = STATE + (field(data, "attachment size") + 7 & ~7)
        changed[80:112] = blake3.blake3(data[16:80] + (data[start:] if flat is None else flat)).digest()
    changed[128:160] = blake3.blake3(bytes(changed[:128]) + data[160:]).digest()
    return bytes(changed)


def assemble(last: LogId, runs: list[tuple[int, int, int]], records: list[bytes], membership: bytes = b"",
             **fields: int) -> bytes:
    """Assemble a file from parts, with correct sizes and checksums, except for the given fields."""
    flat = membership + b"".join(struct.pack("<QQQ", *run) for run in runs) + b"".join(records)
    head = struct.pack(
        "<8sIIQQQQQQ48xQQ32x", b"FASTSM-S", 0, 0, *last, len(records), len(runs), len(membership),
        sum(map(len, records)), 0, len(flat),
    )
    data = head + flat
    for name, value in fields.items():
        data = with_field(data, name.replace("_", " "), value)
    return sealed(data)


def open_files() -> int:
    """Return this process's number of descriptors. Those of earlier tests may be closed at any time: it may fall."""
    return len(os.listdir("/proc/self/fd"))


def check(path: Path) -> None:
    """Open a snapshot and verify all of it."""
    with open_snapshot(path) as snapshot:
        snapshot.verify()
