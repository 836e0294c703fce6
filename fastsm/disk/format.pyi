import struct

from typing_extensions import Buffer

LARGE_BYTES: int
TERM_RUN_BYTES: int
TERM_RUN_STRUCT: struct.Struct
RECORD_STRUCT: struct.Struct
FRAME_STRUCT: struct.Struct
FRAME_RUN_STRUCT: struct.Struct
OPERATIONS: dict[int, str]
OPERATION_PUT: int
OPERATION_SESSION: int
OPERATION_TOUCH: int
MAX_DEADLINE: int
MAX_RESULT_BYTES: int
MAX_SESSION_VALUE: int
OPERATION_CONFIG: int
MAX_RECORD_VALUE: int
MAX_INDEX: int

def unpack_record(buffer: Buffer, place: int) -> tuple[int, int, bytes, bytes, int | None, int]: ...
def size_of_record(head: Buffer) -> int: ...
def unpack_frame(
    buffer: Buffer, offset: int
) -> tuple[int, int | None, list[tuple[int, int | None]], int]: ...
def is_session_value(value: bytes) -> bool: ...
