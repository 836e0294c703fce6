from collections.abc import Callable
from typing import Any, SupportsIndex

from typing_extensions import Self

from fastsm.disk.headers import CurrentFile, LogHead
from fastsm.disk.mapping import Mapping
from fastsm.errors import CorruptionError
from fastsm.lookup.terms import Terms
from fastsm.types import LogId, SnapshotMetadata

FINDINGS: dict[int, str]

class Scan:
    def __new__(
        cls, mapping: Mapping, size: int, head: LogHead, path: str, terms: Terms, start: int = ..., frames: int = 0,
        last_frame: int = 0, chain: int | None = None,
    ) -> Self: ...  # fmt: skip
    @property
    def path(self) -> str: ...
    @property
    def end(self) -> int: ...
    @property
    def watermark(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def last_frame(self) -> int: ...
    @property
    def chain(self) -> int: ...
    def read_frames(self) -> None: ...
    def judge_snapshot(self, metadata: SnapshotMetadata | None) -> None: ...
    def last_applied(self) -> LogId: ...
    def judge_durable(self, known_durable: int) -> None: ...
    def corrupt(self, expected: str) -> CorruptionError: ...
    def end_of_torn_tail(self, descriptor: SupportsIndex) -> int: ...

def judge_expected(
    path: str, end: int, expected: LogId | None, recovered: LogId, terms: Terms
) -> None: ...
def read_piece(descriptor: SupportsIndex, size: int, offset: int) -> bytes: ...
def known_frames(descriptor: SupportsIndex, head: LogHead, current: CurrentFile) -> tuple[int, int]: ...
def whole_frames(
    descriptor: SupportsIndex, head: Any, size: int,
    progress: Callable[[int, int], None] | None = None, first_chain: int | None = None,
    known: tuple[int, int] | None = None,
) -> tuple[int, int]: ...  # fmt: skip
def verify_file(
    descriptor: SupportsIndex, head: LogHead, path: str, end: int, chain: int,
    progress: Callable[[int, int], None] | None = None,
) -> None: ...  # fmt: skip
