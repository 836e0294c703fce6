"""Saved tables, taken apart and put together again with right checksums, however wrong they are then."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import xxhash

from fastsm.disk import headers
from fastsm.disk.headers import SavedTable

SLOTS = 4096
SEGMENT = 8 * SLOTS + 64
PLACE_BITS = 36


class TableFile:
    """The content of a saved table: ``saved`` is its header, ``body`` what is after that."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        self.path = path
        self.saved: SavedTable = headers.unpack_saved_table(content, str(path), len(content))
        self.body = bytearray(content[headers.TABLE_HEADER_BYTES :])
        self.sections = sections_of(self.saved)

    def change_part(self, name: str, **fields: int) -> None:
        """Changes the header's words on the table of sessions, or of touches."""
        self.saved = self.saved._replace(**{name: getattr(self.saved, name)._replace(**fields)})

    def change(self, **fields: int) -> None:
        self.saved = self.saved._replace(**fields)

    def set(self, layout: str, offset: int, *values: int) -> None:
        """Packs numbers into the file at an offset after the header."""
        struct.pack_into("<" + layout, self.body, offset - headers.TABLE_HEADER_BYTES, *values)

    def get(self, layout: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from("<" + layout, self.body, offset - headers.TABLE_HEADER_BYTES)

    def slots(self) -> Iterator[tuple[int, int]]:
        """Where each slot in use is in the file, and what it holds."""
        for segment in range(self.saved.segments):
            start = self.sections.segments + segment * SEGMENT
            for number, slot in enumerate(self.get(f"{SLOTS}Q", start)):
                if slot:
                    yield start + 8 * number, slot

    def move(self, at: int, place: int) -> None:
        """Lets the slot at an offset lead to another place."""
        (slot,) = self.get("Q", at)
        self.set("Q", at, slot >> PLACE_BITS << PLACE_BITS | place >> 3)

    def move_all(self, place: int) -> None:
        for at, _ in list(self.slots()):
            self.move(at, place)

    def ordered(self) -> list[int]:
        """The places in the order of their keys."""
        return list(self.get(f"{self.saved.ordered}Q", self.sections.order))

    def set_ordered(self, places: list[int]) -> None:
        """Replaces the order, however long."""
        del self.body[self.sections.order - headers.TABLE_HEADER_BYTES :]
        self.body += struct.pack(f"<{len(places)}Q", *places)
        self.change(ordered=len(places))

    def write(self) -> None:
        """Puts it back, with the checksums of what it holds now."""
        saved = self.saved._replace(body_checksum=xxhash.xxh64_intdigest(bytes(self.body)))
        self.path.write_bytes(headers.pack_saved_table(saved) + self.body)


def sections_of(saved: SavedTable) -> SimpleNamespace:
    """Where the sections are: of the tables, that of the keys."""
    found = saved.sections
    return SimpleNamespace(
        runs=found.runs, metadata=found.metadata, dead=found.dead, directory=found.directories[0],
        deadlines=found.deadlines[0], segments=found.segments[0], order=found.order, end=found.end)


def place_of(slot: int) -> int:
    return (slot & (1 << PLACE_BITS) - 1) << 3
