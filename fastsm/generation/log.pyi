from collections.abc import Callable

from typing_extensions import Self

from fastsm.disk.base import Base
from fastsm.disk.descriptors import Descriptor
from fastsm.disk.files import Directory
from fastsm.disk.headers import CurrentFile, LogHead, SavedTable
from fastsm.errors import CorruptionError
from fastsm.generation.framefile import FrameFile
from fastsm.lookup.terms import Terms
from fastsm.types import LogId, Recovery, SnapshotMetadata

def log_name(generation: int) -> str: ...

class Log(FrameFile):
    def __new__(
        cls, directory: Directory, head: LogHead, descriptor: Descriptor, base: Base | None = None,
        read_only: bool = False,
    ) -> Self: ...
    @property
    def base(self) -> Base | None: ...
    @property
    def base_bytes(self) -> int: ...
    @staticmethod
    def create(directory: Directory, generation: int, base: Base | None = None, changes: int | None = None) -> Log: ...
    @staticmethod
    def open(
        directory: Directory, current: CurrentFile, read_only: bool = False, up_to: int | None = None
    ) -> Log: ...
    @staticmethod
    def adopt(
        directory: Directory, head: LogHead, descriptor: Descriptor, size: int, base: Base | None = None,
        read_only: bool = False,
    ) -> Log: ...
    def close(self) -> None: ...
    def copy_from(self, source: Log, first: int, stop: int) -> None: ...
    def recover(
        self,
        terms: Terms,
        current: CurrentFile,
        expect_applied: LogId | None = None,
        *,
        saved: SavedTable | None = None,
        metadata: SnapshotMetadata | None = None,
        verify: Callable[[], None] | None = None,
        not_below: int = 0,
    ) -> Recovery: ...
    def judge_current(self, current: CurrentFile) -> None: ...
    def damage_at(self, place: int) -> CorruptionError: ...
    def last_frame_up_to(self, index: int, at_least: int = 0) -> tuple[int, LogId]: ...
    def last_durable(self, index: int, term: int, start: int = ...) -> LogId: ...
    def verification(self) -> tuple[Descriptor, LogHead, str, int, int]: ...
