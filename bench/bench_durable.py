"""A hundred entries applied, then one flush: what a host does that acknowledges in batches."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import fastsm
from bench.data import changes, chunked, entries_of, fresh_pairs, scaled
from bench.machine import sync_data, write_all
from bench.peers import open_peer

FLUSHES = scaled(100)


def test_apply_100_then_flush(
    compare: Any, place: Path, keys: list[bytes], values: list[bytes], who: str
) -> None:
    """Compare with appending as many bytes to a growing file, with one `fdatasync` each time."""
    store: Any = fastsm.FastStateMachine(place / who) if who == "fastsm" else open_peer(who, place / who)
    source = random.Random(13)
    turn = iter(range(1000))

    def prepare() -> Any:
        store.flush()
        os.sync()
        made = changes(source, keys, values, 100 * FLUSHES)
        mine: Any = entries_of(made, store.last_applied().index + 1) if who == "fastsm" else fresh_pairs(made)
        pieces = [
            bytes(sum(16 + len(key) + len(value or b"") for key, value in chunk)) for chunk in chunked(made, 100)
        ]
        return (chunked(mine, 100),), (os.open(place / f"bare-{next(turn)}", os.O_WRONLY | os.O_CREAT), pieces)

    def subject(chunks: list[Any]) -> None:
        for chunk in chunks:
            store.apply(chunk)
            store.flush()

    def base(descriptor: int, pieces: list[bytes]) -> None:
        for piece in pieces:
            write_all(descriptor, piece)
            sync_data(descriptor)
        os.close(descriptor)

    compare("flush.100", subject, base, FLUSHES, prepare, rounds=15, who=who)
    store.close()
