"""The rules of ordered reads, for state machines that have them: ``scan``, ``count``, ``ordered``."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import fastsm
from fastsm import StateMachine
from fastsm.testing.helpers import PUT, apply_chunks, apply_commands
from fastsm.testing.histories import History

PUTS = [b"", b"\x00", b"a", b"a\x00", b"aa", b"b", b"a\xff", b"a\xff\xff", b"\xff", b"\xff\xff", b"\xff\xff\x00", b"~"]
BOUNDS = [None, b"", b"\x00", b"a", b"a\xff", b"b", b"between", b"\xff\xff", b"\xff" * 70_000]


def in_range(pairs: dict[bytes, bytes], start: Any, end: Any, prefix: Any) -> list[tuple[bytes, bytes]]:
    """Returns the pairs of a range, sorted."""
    return sorted(
        (key, value) for key, value in pairs.items()
        if (start is None or key >= start) and (end is None or key < end) and key.startswith(prefix or b""))


class OrderRules:
    """Ranges of keys in the order of ``bytes``, each read from one state."""

    @pytest.fixture
    def in_order(self, state_machine: StateMachine) -> Any:
        """Returns the state machine if it has ordered reads; otherwise skips the test."""
        if not all(hasattr(state_machine, name) for name in ("scan", "count", "ordered", "scan_prefix")):
            pytest.skip(f"{type(state_machine).__name__} has no ordered reads")
        return state_machine

    def test_a_scan_gives_the_range_in_order(self, in_order: Any) -> None:
        """A scan returns the pairs with ``start <= key < end`` and the prefix, in ``bytes`` order, from either end."""
        pairs = {key: b"of " + key for key in PUTS}
        apply_commands(in_order, *(fastsm.put(key, value) for key, value in pairs.items()))
        for start in BOUNDS:
            for end in BOUNDS:
                for prefix in (None, b"a", b"\xff"):
                    expected = in_range(pairs, start, end, prefix)
                    found = in_order.scan(start, end, prefix=prefix)
                    assert found.entries == expected, f"scan({start!r}, {end!r}, prefix={prefix!r}) is not the range"
                    assert found.revision == len(PUTS), "the revision is not the index of the last applied entry"
                    found = in_order.scan(start, end, prefix=prefix, reverse=True)
                    assert found.entries == expected[::-1], "a scan in reverse is not the range from its end"

    def test_a_limit_cuts_a_scan(self, in_order: Any) -> None:
        """At most ``limit`` pairs are returned, from where the scan begins; a negative limit is a ``ValueError``."""
        apply_commands(in_order, *(fastsm.put(key, b"") for key in PUTS))
        for limit in (0, 1, 5, 100):
            expected = sorted(PUTS)[:limit]
            assert [key for key, _ in in_order.scan(limit=limit).entries] == expected, f"limit={limit} is not respected"
            found = [key for key, _ in in_order.scan(limit=limit, reverse=True).entries]
            assert found == sorted(PUTS)[::-1][:limit], f"limit={limit} is not respected in reverse"
        with pytest.raises(ValueError, match="limit"):
            in_order.scan(limit=-1)

    def test_a_prefix_is_scanned_in_pages(self, in_order: Any) -> None:
        """``scan_prefix`` returns the keys with a prefix, and with ``start_after`` only those after a key."""
        apply_commands(in_order, *(fastsm.put(key, b"") for key in PUTS))
        for prefix in (b"", b"a", b"\xff", b"no such"):
            expected = [key for key in sorted(PUTS) if key.startswith(prefix)]
            found, after = [], None
            for _ in PUTS:  # more pages than there can be, but not without end
                page = in_order.scan_prefix(prefix, limit=2, start_after=after).entries
                if page:
                    found += [key for key, _ in page]
                    after = found[-1]
            assert found == expected, f"the pages of {prefix!r} are not its keys"

    def test_a_count_is_that_of_the_scan(self, in_order: Any) -> None:
        """``count`` returns how many pairs a scan would return."""
        apply_commands(in_order, *(fastsm.put(key, b"") for key in PUTS), fastsm.delete(b"a"))
        for start in BOUNDS:
            for end in BOUNDS:
                expected = len(in_range(dict.fromkeys(set(PUTS) - {b"a"}, b""), start, end, None))
                assert in_order.count(start, end) == expected, f"count({start!r}, {end!r}) is not that of the scan"

    def test_ordered_stays_at_its_moment(self, in_order: Any) -> None:
        """An ``ordered`` iterator returns the pairs as of its call, whatever is applied and reset afterwards."""
        apply_commands(in_order, *(fastsm.put(key, b"old") for key in PUTS))
        expected = sorted((key, b"old") for key in PUTS)
        forward, backward = in_order.ordered(), in_order.ordered(reverse=True)
        first = next(forward)
        apply_commands(in_order, *(fastsm.put(key, b"new") for key in PUTS[::2]), fastsm.put(b"other", b"new"))
        apply_commands(in_order, *(fastsm.delete(key) for key in PUTS[::3]))
        asyncio.run(in_order.reset())
        assert [first, *forward] == expected, "an iterator does not show the state of its call"
        assert list(backward) == expected[::-1], "an iterator in reverse does not show the state of its call"
        assert list(in_order.ordered()) == [], "after a reset there are keys in order"

    def test_a_stopped_one_reads_nothing_in_order(self, in_order: Any) -> None:
        """After ``stop``, ordered reads raise ``NotRunningError`` at the call."""
        apply_commands(in_order, PUT)
        in_order.stop()
        for read in (in_order.scan, in_order.count, in_order.ordered, lambda: in_order.scan_prefix(b"")):
            with pytest.raises(fastsm.NotRunningError):
                read()

    def test_ordered_reads_follow_a_random_history(self, in_order: Any) -> None:
        """After each chunk of a random history, ordered reads return exactly the existing keys."""
        history = History(11, 150)
        for chunk in history.chunks(7):
            apply_chunks(in_order, chunk)
            entries = in_order.scan().entries
            assert entries == sorted(entries), "the keys are not in order"
            assert len(entries) == in_order.len() == in_order.count(b""), "a scan does not give each key once"
            assert all(in_order.get(key) == value for key, value in entries), "a scan gives another value than get()"
