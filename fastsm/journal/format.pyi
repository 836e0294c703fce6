import struct
from typing import NamedTuple

SEGMENT_MAGIC_BYTES: bytes
SEGMENT_STRUCT: struct.Struct
STATE_STRUCT: struct.Struct
NEWEST_MAGIC_BYTES: bytes
NEWEST_STRUCT: struct.Struct
NEWEST_BYTES: int
ITEM_DATA_BYTES: int

class SegmentHead(NamedTuple):
    generation: int
    identity: int

class SegmentState(NamedTuple):
    first: int
    last: int
    term: int
    voted: int
    commit: int
    previous_end: int
    previous_durable: int
    last_term: int
    previous_checksum: int
    border_term: int

class Newest(NamedTuple):
    number: int
    identity: int
    given_up: int

def pack_segment_head(head: SegmentHead) -> bytes: ...
def unpack_segment_head(data: bytes, path: str) -> SegmentHead: ...
def pack_newest(newest: Newest) -> bytes: ...
def unpack_newest(data: bytes, path: str) -> Newest: ...
