"""Saved tables, taken apart and put together again with correct checksums; their content may be false."""

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
    """The content of a saved table: ``saved`` is its header, ``body`` the rest."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        self.path = path
        self.saved: SavedTable = headers.unpack_saved_table(content, str(path), len(content))
        self.body = bytearray(content[headers.TABLE_HEADER_BYTES :])
        self.sections = sections_of(self.saved)

    def change_part(self, name: str, **fields: int) -> None:
        """Change the header's fields for the table of sessions, or of touches."""
        self.saved = self.saved._replace(**{name: getattr(self.saved, name)._replace(**fields)})

    def change(self, **fields: int) -> None:
        self.saved = self.saved._replace(**fields)

    def set(self, layout: str, offset: int, *values: int) -> None:
        """Pack numbers into the body, at an offset of the file."""
        struct.pack_into("<" + layout, self.body, offset - headers.TABLE_HEADER_BYTES, *values)

    def get(self, layout: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from("<" + layout, self.body, offset - headers.TABLE_HEADER_BYTES)

    def slots(self) -> Iterator[tuple[int, int]]:
        """Yield the offset in the file, and the content, of each slot in use."""
        for segment in range(self.saved.segments):
            start = self.sections.segments + segment * SEGMENT
            for number, slot in enumerate(self.get(f"{SLOTS}Q", start)):
                if slot:
                    yield start + 8 * number, slot

    def move(self, at: int, place: int) -> None:
        """Let the slot at an offset point to another place."""
        (slot,) = self.get("Q", at)
        self.set("Q", at, slot >> PLACE_BITS << PLACE_BITS | place >> 3)

    def move_all(self, place: int) -> None:
        for at, _ in list(self.slots()):
            self.move(at, place)

    def ordered(self) -> list[int]:
        """Return the places in the order of their keys."""
        return list(self.get(f"{self.saved.ordered}Q", self.sections.order))

    def set_ordered(self, places: list[int]) -> None:
        """Replace the order by one of any length."""
        del self.body[self.sections.order - headers.TABLE_HEADER_BYTES :]
        self.body += struct.pack(f"<{len(places)}Q", *places)
        self.change(ordered=len(places))

    def write(self) -> None:
        """Write the table back, with checksums of its current content."""
        saved = self.saved._replace(body_checksum=xxhash.xxh64_intdigest(bytes(self.body)))
        self.path.write_bytes(headers.pack_saved_table(saved) + self.body)


def sections_of(saved: SavedTable) -> SimpleNamespace:
    """Return the offsets of the sections; of the three tables, only those of the table of keys."""
    found = saved.sections
    return SimpleNamespace(
        runs=found.runs, metadata=found.metadata, dead=found.dead, directory=found.directories[0],
        deadlines=found.deadlines[0], segments=found.segments[0], order=found.order, end=found.end)


def place_of(slot: int) -> int:
    return (slot & (1 << PLACE_BITS) - 1) << 3
