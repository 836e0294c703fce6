import struct
from typing import NamedTuple

VERSION: int
LOG_HEADER_BYTES: int
LOG_MAGIC_BYTES: bytes
CURRENT_MAGIC_BYTES: bytes
MAX_INDEX: int
MAX_TERM: int

class LogHead(NamedTuple):
    generation: int
    identity: int
    base_index: int
    base_term: int

class CurrentFile(NamedTuple):
    generation: int
    identity: int
    durable_offset: int

def pack_log_head(head: LogHead) -> bytes: ...
def pack_current(current: CurrentFile) -> bytes: ...
def unpack_log_head(data: bytes, path: str) -> LogHead: ...
def unpack_current(data: bytes, path: str) -> CurrentFile: ...
def with_checksum(head: bytes) -> bytes: ...
def unpack(layout: struct.Struct, magic: bytes, data: bytes, path: str, used: int) -> list[int]: ...
