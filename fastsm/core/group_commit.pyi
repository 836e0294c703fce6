from typing_extensions import Self

from fastsm.core.turns import Turns
from fastsm.generation.framefile import FrameFile

ENDING: str
REENTERED: str

class GroupCommit:
    def __new__(cls, log: FrameFile, turns: Turns) -> Self: ...
    @property
    def log(self) -> FrameFile: ...
    def sync_up_to(self, offset: int) -> None: ...
    def close(self) -> None: ...
