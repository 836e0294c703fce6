from collections.abc import Iterator
from typing import NamedTuple, SupportsIndex

from typing_extensions import Buffer

class Tail(NamedTuple):
    torn_end: int
    proof: int
    watermark: int
    looks: int

def search_bytes(data: Buffer, identity: int, end: int, offset: int) -> Tail: ...
def search_tail(descriptor: SupportsIndex, identity: int, end: int, size: int) -> Tail: ...
def torn_tail_end(descriptor: SupportsIndex, identity: int, end: int, size: int, path: str) -> int: ...
def data_ranges(descriptor: SupportsIndex, start: int, size: int) -> Iterator[tuple[int, int]]: ...
