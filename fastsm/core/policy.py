"""The policy of automatic compaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fastsm.core.engine import Engine

NEVER = 2**64 - 1


class Policy(NamedTuple):
    """Calls for compaction when the dead bytes exceed both ``ratio`` times the live bytes and ``floor``.

    Dead bytes that cannot be freed yet, because they are among the retained entries, are not counted again: the next
    compaction waits until as many more bytes are dead. Between compactions, disk use stays within (1 + ratio) times the
    live bytes, plus the floor, plus what is retained.
    """

    enabled: bool = True
    ratio: float = 1.0
    floor: int = 64 << 20

    def threshold(self, live_bytes: int, dead_bytes: int) -> int:
        """Returns the number of dead bytes that calls for the next compaction, given the counts after the last one."""
        if not self.enabled:
            return NEVER
        more = max(self.floor, self.ratio * live_bytes) if live_bytes else self.floor  # infinity times 0 is no number
        return min(dead_bytes + int(more), NEVER) if more < NEVER else NEVER

    def renew(self, engine: Engine, dead_bytes: int | None = None) -> None:
        """Sets when the next compaction is called for, counted from now, or from ``dead_bytes`` dead bytes."""
        _, _, live, dead = engine._bytes()
        engine._compact_above(self.threshold(live, dead if dead_bytes is None else dead_bytes))
