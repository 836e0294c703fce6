from typing_extensions import Buffer

from fastsm.core.ordered import Ordered

class Timed(Ordered):
    def clock(self) -> int:
        """Returns the clock, in milliseconds since 1970: the latest `now` of all ticks; 0 before the first. O(1)."""
    def deadline(self, key: Buffer, /) -> int | None:
        """Returns the deadline of a key, in milliseconds since 1970; None if it has none or is absent. O(1)."""
    def next_deadline(self) -> int | None:
        """Returns the earliest deadline of all keys and sessions, in milliseconds since 1970, or None. Usually O(1).

        A tick with that time removes something. The deadline may be at or before the clock, if a tick had a limit, or
        if it was set after the clock had passed it.
        """
    def _deadlines(self) -> tuple[int, int, int, int]: ...
