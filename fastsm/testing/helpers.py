"""What the rules share: applying chunks, and what the trait shows of a state."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

import fastsm
from fastsm import Entry, LogId, SnapshotMetadata, StateMachine
from fastsm.testing.histories import KEYS
from fastsm.types import Result

METADATA = SnapshotMetadata(LogId(1, 1), bytes(range(32)))
PUT = fastsm.put(b"key", b"value")
Chunk = Sequence[Entry | tuple[int, int, bytes]]


def apply_chunks(machine: StateMachine, *chunks: Chunk) -> list[list[Result]]:
    """Applies chunks, one after another; returns the results of each."""

    async def apply_all() -> list[list[Result]]:
        return [await machine.apply_chunk(chunk) for chunk in chunks]

    return asyncio.run(apply_all())


def apply_entries(machine: StateMachine, *entries: Entry | tuple[int, int, bytes]) -> list[Result]:
    """Applies one chunk, and returns its results."""
    return apply_chunks(machine, entries)[0]


def apply_commands(machine: StateMachine, *commands: bytes) -> list[Result]:
    """Applies one chunk of commands after the last applied entry, in its term (1 for the first)."""
    index, term = machine.last_applied()
    return apply_entries(machine, *((index + i, term or 1, c) for i, c in enumerate(commands, 1)))


def state_of(machine: StateMachine) -> dict[str, Any]:
    """Returns everything that the trait shows of a state."""
    last = machine.last_applied()
    return {
        "values": {key: machine.get(key) for key in (*KEYS, b"key", b"other")},
        "len": machine.len(),
        "last_applied": last,
        "terms": [machine.entry_term(index) for index in range(last.index + 3)],
        "snapshot_metadata": machine.snapshot_metadata(),
    }


def needs(machine: StateMachine, *names: str) -> StateMachine:
    """Returns the machine if it has these methods beyond the trait; otherwise skips the test."""
    for name in names:
        if not hasattr(machine, name):
            pytest.skip(f"{type(machine).__name__} has no {name}")
    return machine
