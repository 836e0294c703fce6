import struct
from typing import NamedTuple

SEGMENT_MAGIC_BYTES: bytes
SEGMENT_STRUCT: struct.Struct
STATE_STRUCT: struct.Struct
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

def pack_segment_head(head: SegmentHead) -> bytes: ...
def unpack_segment_head(data: bytes, path: str) -> SegmentHead: ...
