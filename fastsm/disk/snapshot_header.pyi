import struct
from typing import NamedTuple

MAGIC_BYTES: bytes
HEADER_BYTES: int
STATE_CHECKSUM_COVERS: slice
CHECKSUM_COVERS: slice
CODEC_NONE: int
CODEC_ZSTD: int
STRUCT: struct.Struct
MAX_INDEX: int
MAX_RECORD_VALUE: int
VERSION: int

class SnapshotHead(NamedTuple):
    codec: int
    last_index: int
    last_term: int
    keys: int
    runs: int
    membership_size: int
    records_size: int
    sessions: int
    clock: int
    state_checksum: bytes
    attachment_size: int
    stored_size: int
    checksum: bytes
    @property
    def state_offset(self) -> int: ...
    @property
    def state_size(self) -> int: ...
    @property
    def file_size(self) -> int: ...

def pack(head: SnapshotHead) -> bytes: ...
def unpack(data: bytes, path: str, size: int | None = None) -> SnapshotHead: ...
