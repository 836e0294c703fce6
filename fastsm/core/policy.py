"""The policy of compaction: when it comes by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fastsm.core.engine import Engine

NEVER = 2**64 - 1


class Policy(NamedTuple):
    """Compaction comes when the dead bytes exceed ``ratio`` times the live ones, and ``floor``.

    Dead bytes that cannot be given back yet, since they are among the retained entries, do not count again: each
    compaction comes when as many more bytes have died. Disk use stays within (1 + ratio) times the live bytes, plus
    what is retained or the floor.
    """

    enabled: bool = True
    ratio: float = 1.0
    floor: int = 64 << 20

    def threshold(self, live_bytes: int, dead_bytes: int) -> int:
        """The dead bytes above which the next compaction comes, when so many were dead after the last one."""
        if not self.enabled:
            return NEVER
        return min(dead_bytes + max(self.floor, int(self.ratio * live_bytes)), NEVER)

    def renew(self, engine: Engine, dead_bytes: int | None = None) -> None:
        """Has the next compaction come when so many more bytes are dead than now, or than ``dead_bytes``."""
        _, _, live, dead = engine._bytes()
        engine._compact_above(self.threshold(live, dead if dead_bytes is None else dead_bytes))
