"""Messages between nodes, and from clients: small fields as JSON, commands and pieces of snapshots as raw bytes.

A message is two four-byte lengths, a JSON object, and a blob. Each connection carries one request at a time.
"""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

from fastsm import Entry

Message = dict[str, Any]
Address = tuple[str, int]
LENGTHS = struct.Struct("!II")
LARGEST = 64 << 20             # bytes of a message
LARGEST_COMMAND = LARGEST - (1 << 20)  # a client's command has to fit into the leader's message


class Unreachable(ConnectionError):
    """No answer came; it is unknown whether the request arrived."""


async def send(writer: asyncio.StreamWriter, message: Message, blob: bytes = b"") -> None:
    head = json.dumps(message).encode()
    writer.write(LENGTHS.pack(len(head), len(blob)) + head + blob)
    await writer.drain()


async def receive(reader: asyncio.StreamReader) -> tuple[Message, bytes]:
    head, blob = LENGTHS.unpack(await reader.readexactly(LENGTHS.size))
    if head + blob > LARGEST:
        raise ConnectionError(f"a message of {head + blob} bytes; at most {LARGEST} are taken")
    return json.loads(await reader.readexactly(head)), await reader.readexactly(blob)


def pack_entries(entries: list[Entry]) -> tuple[list[tuple[int, int, int]], bytes]:
    """Return the ``(index, term, size)`` of each entry, and the concatenated commands."""
    return [(e.index, e.term, len(e.command)) for e in entries], b"".join(e.command for e in entries)


def unpack_entries(heads: list[tuple[int, int, int]], blob: bytes) -> list[Entry]:
    entries, at = [], 0
    for index, term, size in heads:
        entries.append(Entry(index, term, blob[at : at + size]))
        at += size
    return entries


class Link:
    """A connection to one address, opened when it is needed, and opened again after any failure."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._one_at_a_time = asyncio.Lock()

    async def call(self, message: Message, blob: bytes = b"", *, timeout: float) -> tuple[Message, bytes]:
        """Send a request and return the reply. Raises ``Unreachable`` if none came in time."""
        async with self._one_at_a_time:
            try:
                return await asyncio.wait_for(self._call(message, blob), timeout)
            except (OSError, EOFError, asyncio.TimeoutError) as error:
                self.close()
                raise Unreachable(f"{self.address}: {error!r}") from error
            except asyncio.CancelledError:
                self.close()  # a late reply must not be mistaken for the reply to the next request
                raise

    async def _call(self, message: Message, blob: bytes) -> tuple[Message, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self.address)
        await send(self._streams[1], message, blob)
        return await receive(self._streams[0])

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
