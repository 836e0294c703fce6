"""The publication, from docs/format.md alone: reading it, and writing it store by store, with and without mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastsm.disk import published

FIELDS = ("number", "incarnation", "identity", "end", "applied index", "applied term", "durable index", "checksum")


class Moment(NamedTuple):
    """The values to publish."""

    identity: int
    end: int
    index: int
    term: int


def take_all_news(reader: Any) -> None:
    """Take news as a reader would that did not check the identity of the published log."""
    publication = reader._lookout.publication
    seen = None if publication is None else publication.read()
    if seen is not None and seen.end > reader._taken_up_to():
        reader._take_up_to(seen.end, seen.applied_index, seen.applied_term, seen.durable_index)


def checksum_of(slot: Any) -> int:
    """Return a slot's checksum."""
    return mixed(slot[:7])


def mixed(fields: Any) -> int:
    """Return the checksum of fields."""
    mix = 0x2545F4914F6CDD1D
    for field in fields:
        mix ^= int(field)
        mix = (mix << 29 | mix >> 35) & (1 << 64) - 1
        mix = mix * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    return mix


def read_page(content: bytes) -> list[dict[str, int]]:
    """Return the slots of a file that are whole."""
    assert len(content) == 4096
    assert content[:16] == b"FASTSM-P" + bytes(8)
    assert not any(content[16:64])
    assert not any(content[224:])
    found = []
    for at in (64, 128):
        fields = [int.from_bytes(content[at + 8 * i : at + 8 * i + 8], "little") for i in range(8)]
        if fields[7] == checksum_of(fields) and fields[0] % 2 == (at - 64) // 64:
            found.append(dict(zip(FIELDS, fields, strict=True)))
    return found


def read_step(content: bytes) -> tuple[int, ...] | None:
    """Return the last announced step (old log, next log, its incarnation), or None if its checksum is wrong."""
    *step, checksum = np.frombuffer(content, np.uint64, 4, 192).tolist()
    return tuple(step) if checksum == mixed(step) else None


class ByHand:
    """The owner's side, which can stop after each store, and can have a classic mistake."""

    def __init__(self, path: Path, mistake: str = "") -> None:
        self.page = np.memmap(path / published.NAME, np.uint64, "r+", 64, (2, 8))
        self.mistake = mistake
        self.incarnation = (published.boot_number() << 32) + 1
        self.log = path / "log-1"

    def publish(self, moment: Moment, incarnation: int | None = None) -> None:
        """Make all stores of one publication."""
        self.incarnation = incarnation or self.incarnation
        for _ in self.stores(moment):
            pass

    def stores(self, moment: Moment) -> Iterator[bool]:
        """Make the stores of one publication; yield after each one whether the publication is complete."""
        step = 2 if self.mistake == "one slot" else 1
        number = int(self.page[:, 0].max()) + step
        fields = [number, self.incarnation, moment.identity, moment.end, moment.index, moment.term, 0, 0]
        fields[7] = checksum_of(fields)
        slot = self.page[number % 2]
        order = (1, 2, 3, 4, 5, 6, 7, 0)
        if self.mistake == "number first":
            order = (0, 1, 2, 3, 4, 5, 6, 7)
        if self.mistake == "no checksum":  # a checksum that is recomputed after each store protects nothing
            order = (0, 1, 2, 3, 4, 5, 6, 7)
        if self.mistake == "before the frame is whole":
            yield from self.early(slot, fields, order, moment)
            return
        for at in order:
            slot[at] = fields[at]
            if self.mistake == "no checksum":
                slot[7] = checksum_of(slot)
            yield at == order[-1]

    def early(self, slot: Any, fields: list[int], order: tuple[int, ...], moment: Moment) -> Iterator[bool]:
        """Publish a frame before its last bytes are written."""
        with open(self.log, "r+b") as log:
            log.seek(moment.end - 16)
            last = log.read(16)
            log.seek(moment.end - 16)
            log.write(bytes(16))
            log.flush()
            for at in order:
                slot[at] = fields[at]
                yield at == order[-1]
            log.seek(moment.end - 16)
            log.write(last)
