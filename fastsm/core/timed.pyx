"""Reads of the logged time: the clock, and deadlines.

Reads never consult the system's clock: a key that is due stays visible until a tick removes it.
"""

cimport cython
from libc.stdint cimport uint64_t

from fastsm.disk.format cimport NO_DEADLINE, record_deadline, record_length
from fastsm.lookup.index cimport Index

from fastsm.arguments import bytes_of


cdef class Timed(Ordered):
    """The state, with its clock and its deadlines.

    Thread safety: every method, from any thread.
    """

    def clock(self):
        """Returns the clock, in milliseconds since 1970: the latest `now` of all ticks; 0 before the first. O(1)."""
        if self.gate:
            self.refuse()
        return self._index.clock

    @cython.always_allow_keywords(False)
    def deadline(self, key, /):
        """Returns the deadline of a key, in milliseconds since 1970; None if it has none or is absent. O(1)."""
        cdef uint64_t place, deadline
        if type(key) is not bytes:
            key = bytes_of(key, "key")
        if self.gate:
            self.refuse()
        # From here on no Python code runs until the number is known.
        place = self.find_key(<bytes>key)
        if place == 0:
            return None
        place = self._index.deadline_at(self.arena, place)
        if place + record_length(self.arena + place) > self.readable + 7:
            self.damaged(place)
        deadline = record_deadline(self.arena + place)
        return None if deadline == NO_DEADLINE else deadline

    def next_deadline(self):
        """Returns the earliest deadline of all keys and sessions, in milliseconds since 1970, or None. Usually O(1).

        A tick with that time removes something. The deadline may be at or before the clock, if a tick had a limit, or
        if it was set after the clock had passed it.
        """
        cdef uint64_t earliest
        cdef Index index
        if self.gate:
            self.refuse()
        index = self._index
        earliest = min(
            index.next_of(self.arena, index.deadlines), index.next_of(self.arena, index.session_deadlines))
        return None if earliest == NO_DEADLINE else earliest

    def _deadlines(self):
        """Returns how many deadlines keys and sessions have, and how many each heap holds, for tests."""
        cdef Index index = self._index
        return (
            index.deadlines.count - index.deadlines.stale, index.deadlines.count,
            index.session_deadlines.count - index.session_deadlines.stale, index.session_deadlines.count)
