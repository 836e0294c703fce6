"""The policy of compaction: when it comes by itself."""

from __future__ import annotations

from typing import NamedTuple

NEVER = 2**64 - 1


class Policy(NamedTuple):
    """Compaction comes when the dead bytes exceed ``ratio`` times the live ones, and ``floor``.

    What is dead but cannot be given back yet, since it is among the retained entries, does not count again: so each
    compaction comes when as much more has died. Disk use stays within (1 + ratio) of what is live, and of what is
    retained, or of the floor.
    """

    enabled: bool = True
    ratio: float = 1.0
    floor: int = 64 << 20

    def threshold(self, live_bytes: int, dead_bytes: int) -> int:
        """The dead bytes above which the next compaction comes, when so many were dead behind the last one."""
        if not self.enabled:
            return NEVER
        return min(dead_bytes + max(self.floor, int(self.ratio * live_bytes)), NEVER)
