"""Files made by hand from docs/format.md, with `struct` and reference checksums; their content may be invalid."""

from __future__ import annotations

import struct
from typing import Any

import blake3
import xxhash

LOG_FIELDS = ["8s", "I", "I", "Q", "Q", "Q", "Q", "Q", "32s", "Q"]
CURRENT_FIELDS = ["8s", "I", "I", "Q", "Q", "Q", "Q", "Q", "Q"]
FRAME_FIELDS = ["Q", "Q", "I", "I", "Q"]
RUN_FIELDS = ["Q", "Q"]
RECORD_FIELDS = ["Q", "I", "H", "B", "B"]
SNAPSHOT_FIELDS = ["8s", "I", "I", *"QQQQQQQQ", "32s", "Q", "Q", "32s"]
TABLE_FIELDS = ["8s", "I", "I", *(33 * "Q"), "Q"]

NEWEST_FIELDS = ["8s", "I", "I", "Q", "Q", "Q", "Q"]
SEGMENT_FIELDS = ["8s", "I", "I", "Q", "Q", "56s", "Q"]

LOG = "<" + "".join(LOG_FIELDS)
CURRENT = "<" + "".join(CURRENT_FIELDS)
FRAME = "<" + "".join(FRAME_FIELDS)
RUN = "<" + "".join(RUN_FIELDS)
RECORD = "<" + "".join(RECORD_FIELDS)
SNAPSHOT_HEAD = "<" + "".join(SNAPSHOT_FIELDS)
TABLE = "<" + "".join(TABLE_FIELDS)
NEWEST = "<" + "".join(NEWEST_FIELDS)
SEGMENT = "<" + "".join(SEGMENT_FIELDS)

PUT, DELETE, CONFIG, SNAPSHOT, CLOSE, SESSION, FORGET, TOUCH, CLOCK = range(1, 10)
GAP = 2**64 - 1
IDENTITY = 0x1122334455667788
START = 96  # of the frames


def sealed(layout: str, *fields: Any) -> bytes:
    """Return a header with its checksum, made by `struct` alone."""
    head = struct.pack(layout[:-1], *fields)
    return head + struct.pack("<Q", xxhash.xxh64_intdigest(head))


def log_head(
    identity: int = IDENTITY, generation: int = 1, base: tuple[int, int] = (0, 0), size: int = 0,
    checksum: bytes = bytes(32),
) -> bytes:
    return sealed(LOG, b"FASTSM-L", 0, 0, generation, identity, *base, size, checksum)


def current(
    identity: int = IDENTITY, generation: int = 1, durable: int = START, last_frame: int = 0, last_checksum: int = 0
) -> bytes:
    return sealed(CURRENT, b"FASTSM-C", 0, 0, generation, identity, durable, last_frame, last_checksum)


def newest(number: int, identity: int, given_up: int = 0) -> bytes:
    return sealed(NEWEST, b"FASTSM-N", 0, 0, number, identity, given_up)


def run(last: int, term: int) -> bytes:
    return struct.pack(RUN, last, term)


def record(
    operation: int, index: int, key: bytes = b"", value: bytes = b"", expires: int | None = None,
    timed: int | None = None,
) -> bytes:
    """Return a record. ``timed`` is its byte 15, which says whether it has a deadline; by default it is right."""
    timed = int(expires is not None) if timed is None else timed
    content = struct.pack(RECORD, index, len(value), len(key), operation, timed) + key + value
    return content + bytes(-len(content) % 8) + (b"" if expires is None else struct.pack("<Q", expires))


def seal(sizes: bytes, identity: int, offset: int) -> int:
    """Return the seal of a frame header with this length, lag and run count."""
    return xxhash.xxh64_intdigest(sizes, identity ^ offset)


def frame(
    offset: int, runs: list[bytes], records: bytes, *,
    lag: int = 0, count: int | None = None, identity: int = IDENTITY, previous: int | None = None,
) -> bytes:
    """Return a frame with a correct seal and checksum; its content may be invalid.

    ``previous`` is the checksum of the frame before it; by default the frame is the first one after :func:`log_head`.
    """
    body = b"".join(runs) + records
    length = struct.calcsize(FRAME) + len(body)
    sizes = struct.pack("<QII", length, lag, len(runs) if count is None else count)
    own = seal(sizes, identity, offset)
    previous = head_checksum(log_head(identity)) if previous is None else previous
    return struct.pack("<Q16sQ", xxhash.xxh64_intdigest(body, own ^ previous), sizes, own) + body


def frame_checksum(frame: bytes) -> int:
    """Return a frame's checksum, to which the next frame is chained."""
    return int.from_bytes(frame[:8], "little")


def head_checksum(head: bytes) -> int:
    """Return what the first frame is chained to: the header's checksum as it would be without base changes."""
    return int(xxhash.xxh64_intdigest(head[:12] + bytes(4) + head[16:-8]))


def seal_frames(file: bytearray, identity: int) -> None:
    """Recompute seals and checksums of frames, up to the first length that is invalid."""
    offset = START
    previous = head_checksum(bytes(file[:START]))
    while offset + 32 <= len(file):
        (length,) = struct.unpack_from("<Q", file, offset + 8)
        if not 32 <= length <= len(file) - offset:
            return
        own = seal(bytes(file[offset + 8 : offset + 24]), identity, offset)
        previous = xxhash.xxh64_intdigest(bytes(file[offset + 32 : offset + length]), own ^ previous)
        struct.pack_into("<Q", file, offset, previous)
        struct.pack_into("<Q", file, offset + 24, own)
        offset += length


def term_run(first: int, last: int, term: int) -> bytes:
    return struct.pack("<QQQ", first, last, term)


def snapshot(
    last: tuple[int, int], runs: list[bytes], records: list[bytes], *,
    membership: bytes = b"", attachment: bytes = b"", keys: int | None = None, sessions: int = 0, clock: int = 0,
) -> bytes:
    """Return a flat snapshot with correct checksums; its content may be invalid."""
    content = b"".join(records)
    state = membership + b"".join(runs) + content
    ids = struct.pack(
        "<QQQQQQQQ", *last, len(records) if keys is None else keys, len(runs), len(membership), len(content), sessions,
        clock)
    head = struct.pack("<8sII", b"FASTSM-S", 0, 0) + ids + blake3.blake3(ids + state).digest()
    head += struct.pack("<QQ", len(attachment), len(state))
    body = attachment + bytes(-len(attachment) % 8) + state
    return head + blake3.blake3(head + body).digest() + body
