from typing_extensions import Self

from fastsm.disk.descriptors import Descriptor
from fastsm.disk.files import Directory
from fastsm.errors import CorruptionError
from fastsm.generation.framefile import FrameFile
from fastsm.journal.format import SegmentHead

def segment_name(number: int) -> str: ...

class Segment(FrameFile):
    begin: int
    def __new__(
        cls, directory: Directory, head: SegmentHead, descriptor: Descriptor, base: None = None,
        read_only: bool = False,
    ) -> Self: ...
    @staticmethod
    def adopt(
        directory: Directory, head: SegmentHead, descriptor: Descriptor, size: int, read_only: bool = False
    ) -> Segment: ...
    @staticmethod
    def create(directory: Directory, number: int) -> Segment: ...
    @staticmethod
    def open(directory: Directory, number: int, read_only: bool = False) -> Segment | None: ...
    def corrupt(self, offset: int, expected: object) -> CorruptionError: ...
    def finish_recovery(self, end: int, durable: int, torn_end: int) -> None: ...
