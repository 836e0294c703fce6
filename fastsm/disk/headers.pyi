import struct
from typing import NamedTuple

VERSION: int
LOG_HEADER_BYTES: int
TABLE_HEADER_BYTES: int
TABLE_PAGE: int
SEGMENT_BYTES: int
LOG_MAGIC_BYTES: bytes
CURRENT_MAGIC_BYTES: bytes
TABLE_MAGIC_BYTES: bytes
DUE_BYTES: int
MOST_CHANGES: int
MAX_INDEX: int

class LogHead(NamedTuple):
    generation: int
    identity: int
    base_index: int = ...
    base_term: int = ...
    base_size: int = ...
    base_checksum: bytes = ...
    base_changes: int = ...

class CurrentFile(NamedTuple):
    generation: int
    identity: int
    durable_offset: int
    last_frame: int = ...
    last_checksum: int = ...

class Sections(NamedTuple):
    runs: int
    metadata: int
    dead: int
    directories: tuple[int, ...]
    deadlines: tuple[int, ...]
    front_end: int
    segments: tuple[int, ...]
    order: int
    end: int

class SavedPart(NamedTuple):
    seed0: int
    seed1: int
    entries: int
    segments: int
    depth: int

class SavedTable(NamedTuple):
    identity: int
    log_offset: int
    log_start: int
    seed0: int
    seed1: int
    keys: int
    live_bytes: int
    config_place: int
    segments: int
    depth: int
    runs: int
    metadata_size: int
    dead_words: int
    frames: int
    last_frame: int
    last_checksum: int
    clock: int
    clock_place: int
    touch_place: int
    key_deadlines: int
    session_deadlines: int
    sessions: SavedPart
    touches: SavedPart
    ordered: int
    body_checksum: int
    @property
    def parts(self) -> tuple[SavedPart, ...]: ...
    @property
    def sections(self) -> Sections: ...

def pack_saved_table(saved: SavedTable) -> bytes: ...
def unpack_saved_table(data: bytes, path: str, size: int) -> SavedTable: ...
def pack_log_head(head: LogHead) -> bytes: ...
def head_checksum(packed: bytes) -> int: ...
def pack_current(current: CurrentFile) -> bytes: ...
def unpack_log_head(data: bytes, path: str) -> LogHead: ...
def unpack_current(data: bytes, path: str) -> CurrentFile: ...
def with_checksum(head: bytes) -> bytes: ...
def unpack(
    layout: struct.Struct, magic: bytes, data: bytes, path: str, used: int, has_word: bool = False
) -> list[int]: ...
