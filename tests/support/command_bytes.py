"""The bytes of commands, by hand: kinds and headers."""

from __future__ import annotations

import struct

PUT, DELETE, COMPARE_AND_SWAP, NOOP, CONFIG, BATCH, ADD = range(1, 8)
READ, DELETE_RANGE, TRANSACTION, CALL, OPEN_SESSION, ONCE, FORGET = range(8, 15)
PUT_UNTIL, SWAP_UNTIL, TOUCH, TICK = range(15, 19)
VALUE_IS, EXISTS, MODIFIED_AT = 128, 129, 130
ABSENT = 0xFFFFFFFF


def header(kind: int, key_size: int = 0, size: int = 0, version: int = 0) -> bytes:
    return struct.pack("<BBHI", version, kind, key_size, size)
