"""The rules of the log of a Raft node, one test each: what ``fastsm.RaftLog`` promises, for any log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from fastsm import CompactedError, Entry, LogId, OrderError

Reopen = Callable[[Any], Any]


def filled(log: Any, *terms: int) -> Any:
    """Returns the log with entries of these terms, starting at index 1."""
    log.append([Entry(index, term, b"command %d" % index) for index, term in enumerate(terms, 1)])
    return log


def indexes(entries: Iterable[Entry]) -> list[int]:
    return [entry.index for entry in entries]


def bounds(log: Any) -> tuple[int, int, int]:
    """Returns first index, last index, last term."""
    return log.first_index, log.last_index, log.last_term


def refused(log: Any, call: Callable[[], object], what: str) -> None:
    """Asserts that the call raises ``OrderError``, and changes nothing."""
    before = bounds(log), log.entries(log.first_index, log.last_index), log.hard_state()
    try:
        call()
    except OrderError:
        pass
    else:
        pytest.fail(f"{what} was accepted")
    after = bounds(log), log.entries(log.first_index, log.last_index), log.hard_state()
    assert after == before, f"{what} was refused, and has changed the log nevertheless"


class RaftLogConformance:
    """Subclass this, and give it a fixture ``raft_log``: an empty, open log.

    For a log that stores data, add a second fixture, ``reopen``: a function that closes the given log, opens the same
    storage again, and returns the result. Without it the tests of what must survive are skipped.
    """

    @pytest.fixture
    def raft_log(self) -> Any:
        """An empty, open log."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture raft_log: an empty log, open")

    @pytest.fixture
    def reopen(self) -> Reopen:
        """A function that closes a log, and opens its storage again."""
        pytest.skip(f"{type(self).__name__} has no fixture reopen: what must survive is not tested")

    # ---- an empty one -----------------------------------------------------------------------------------

    def test_an_empty_log_begins_at_one(self, raft_log: Any) -> None:
        """First index 1, last index 0, last term 0; entry 0 has term 0, so that the first entry has a previous one."""
        assert bounds(raft_log) == (1, 0, 0), "first_index, last_index, last_term of a new log are not 1, 0, 0"
        assert raft_log.term(0) == 0, "term(0) of a new log is not 0"
        assert raft_log.term(1) is None, "term() of an entry that is not there is not None"
        assert raft_log.entries(1, 10) == [], "entries() of a new log are not empty"

    def test_a_new_node_has_voted_for_nobody(self, raft_log: Any) -> None:
        """The hard state of a new log is term 0 and no vote."""
        assert raft_log.hard_state() == (0, None), "hard_state() of a new log is not (0, None)"

    # ---- append and read --------------------------------------------------------------------------------

    def test_entries_are_read_as_they_were_appended(self, raft_log: Any) -> None:
        """Index, term and command are read back, one by one or many at a time."""
        entries = [Entry(1, 1, b"a"), Entry(2, 1, b""), Entry(3, 4, bytes(range(256)) * 300)]
        raft_log.append(entries[:1])
        raft_log.append(entries[1:])
        assert bounds(raft_log) == (1, 3, 4), "first_index, last_index, last_term are not those of the entries"
        assert raft_log.entries(1, 3) == entries, "entries() are not what was appended"
        assert [raft_log.term(index) for index in (1, 2, 3)] == [1, 1, 4], "term() is not that of the entries"

    def test_a_range_includes_both_ends_and_stops_at_the_last_entry(self, raft_log: Any) -> None:
        """Beyond the end, the existing entries are returned; a range that ends before it begins is empty."""
        filled(raft_log, 1, 1, 1, 2, 2)
        for first, last, expected in ((2, 4, [2, 3, 4]), (5, 5, [5]), (4, 90, [4, 5]), (6, 9, []), (4, 3, [])):
            assert indexes(raft_log.entries(first, last)) == expected, f"entries({first}, {last}) are wrong"

    def test_a_limit_of_bytes_gives_at_least_one_entry(self, raft_log: Any) -> None:
        """As many entries are returned as fit by their commands, and the first one even if it is larger."""
        raft_log.append([Entry(index, 1, bytes(10)) for index in range(1, 6)])
        for most, expected in ((0, 1), (9, 1), (10, 1), (29, 2), (30, 3), (1000, 5)):
            assert len(raft_log.entries(1, 5, max_bytes=most)) == expected, f"max_bytes={most} gives a wrong number"

    def test_what_was_read_stays(self, raft_log: Any) -> None:
        """A list that was appended or read is the caller's: changing it does not change the log, nor vice versa."""
        given = [Entry(1, 1, b"a"), Entry(2, 1, b"b"), Entry(3, 1, b"c")]
        raft_log.append(given)
        found, expected = raft_log.entries(1, 3), list(given)
        given.clear()
        raft_log.truncate_after(1)
        raft_log.append([Entry(2, 2, b"another")])
        assert found == expected, "the entries of an earlier read have changed with the log"
        found.clear()
        assert raft_log.entries(1, 2) == [Entry(1, 1, b"a"), Entry(2, 2, b"another")], "a read list is the log's own"

    def test_entries_that_are_there_are_skipped(self, raft_log: Any) -> None:
        """A message that is repeated, or overlaps, appends what is new, and keeps what the log has already."""
        filled(raft_log, 1, 1, 2)
        raft_log.append([Entry(2, 1, b"other"), Entry(3, 2, b"other"), Entry(4, 2, b"new")])
        raft_log.append([Entry(1, 1, b"other")])
        assert raft_log.last_index == 4, "an append of known entries has removed what came after them"
        assert [entry.command for entry in raft_log.entries(2, 4)] == [b"command 2", b"command 3", b"new"]

    def test_a_conflict_is_refused(self, raft_log: Any) -> None:
        """An entry that the log has with another term is refused: the caller has to truncate first."""
        filled(raft_log, 1, 1, 2)
        for entries in ([(3, 3, b"")], [(2, 1, b""), (3, 3, b""), (4, 3, b"")], [(2, 0, b"")]):
            refused(raft_log, lambda: raft_log.append(entries), f"an append of {entries}")  # noqa: B023

    def test_a_gap_is_refused(self, raft_log: Any) -> None:
        """A gap is refused after the last entry, and among the new ones; so is entry 0, which no log has."""
        refused(raft_log, lambda: raft_log.append([(2, 1, b"")]), "entry 2 in an empty log")
        refused(raft_log, lambda: raft_log.append([(0, 0, b""), (1, 1, b"")]), "entry 0")
        filled(raft_log, 1, 1)
        for entries in ([(4, 1, b"")], [(3, 1, b""), (5, 1, b"")], [(3, 1, b""), (3, 1, b"")]):
            refused(raft_log, lambda: raft_log.append(entries), f"an append of {entries}")  # noqa: B023

    def test_terms_never_fall(self, raft_log: Any) -> None:
        """A falling term is refused after the last entry, and among the new ones."""
        filled(raft_log, 1, 3)
        for entries in ([(3, 2, b"")], [(3, 5, b""), (4, 4, b"")]):
            refused(raft_log, lambda: raft_log.append(entries), f"an append of {entries}")  # noqa: B023

    def test_an_append_of_nothing_is_nothing(self, raft_log: Any) -> None:
        """Appending no entries is not an error."""
        filled(raft_log, 1).append([])
        assert bounds(raft_log) == (1, 1, 1), "an append of nothing has changed the log"

    # ---- truncate ---------------------------------------------------------------------------------------

    def test_truncation_removes_what_comes_after(self, raft_log: Any) -> None:
        """The entry itself stays; other entries may replace those that were removed."""
        filled(raft_log, 1, 1, 2, 2).truncate_after(2)
        assert bounds(raft_log) == (1, 2, 1), "truncate_after(2) has not left entries 1 and 2"
        assert raft_log.term(3) is None, "an entry that was truncated has a term"
        raft_log.append([Entry(3, 5, b"another")])
        assert raft_log.entries(3, 9) == [Entry(3, 5, b"another")], "the entry that replaced a truncated one is missing"

    def test_truncation_at_the_end_or_beyond_is_nothing(self, raft_log: Any) -> None:
        """A truncation at or after the end changes nothing, even in an empty log."""
        raft_log.truncate_after(0)
        filled(raft_log, 1, 1)
        raft_log.truncate_after(2)
        raft_log.truncate_after(100)
        assert bounds(raft_log) == (1, 2, 1), "truncate_after the end has removed entries"

    def test_everything_may_be_truncated(self, raft_log: Any) -> None:
        """All entries down to the border can be truncated; below it is an error."""
        filled(raft_log, 1, 1, 1, 1).compact(LogId(2, 1))
        refused(raft_log, lambda: raft_log.truncate_after(1), "a truncation below the border")
        raft_log.truncate_after(2)
        assert bounds(raft_log) == (3, 2, 1), "a log truncated after its border is not empty"
        raft_log.append([Entry(3, 2, b"")])
        assert bounds(raft_log) == (3, 3, 2)

    # ---- compact ----------------------------------------------------------------------------------------

    def test_compaction_drops_up_to_an_entry(self, raft_log: Any) -> None:
        """Later entries stay; the term at the border is known, earlier ones are not."""
        filled(raft_log, 1, 2, 2, 3).compact(LogId(2, 2))
        assert bounds(raft_log) == (3, 4, 3), "compact((2, 2)) of four entries has not left 3 and 4"
        assert [raft_log.term(index) for index in (1, 2, 3)] == [None, 2, 2], "the terms around the border are wrong"
        assert indexes(raft_log.entries(3, 9)) == [3, 4]

    def test_what_was_compacted_is_told(self, raft_log: Any) -> None:
        """A read that begins below the border is a ``CompactedError``; ``oldest`` is where reads can begin."""
        filled(raft_log, 1, 1, 1).compact(LogId(2, 1))
        for first, last in ((1, 1), (2, 2), (1, 3)):
            with pytest.raises(CompactedError) as caught:
                raft_log.entries(first, last)
            assert caught.value.oldest == 3, "oldest is not the first existing entry"

    def test_a_log_compacted_as_a_whole_goes_on(self, raft_log: Any) -> None:
        """The next entry comes after the border, and its term is not lower."""
        filled(raft_log, 1, 2).compact(LogId(2, 2))
        assert bounds(raft_log) == (3, 2, 2), "first, last, last term are not i + 1, i, t after compact((i, t)) of all"
        refused(raft_log, lambda: raft_log.append([(3, 1, b"")]), "a term below the border's")
        refused(raft_log, lambda: raft_log.append([(2, 2, b"")]), "an entry at the border")
        refused(raft_log, lambda: raft_log.append([(1, 1, b""), (2, 2, b""), (3, 2, b"")]), "entries below the border")
        raft_log.append([Entry(3, 2, b"three")])
        assert raft_log.entries(3, 3) == [Entry(3, 2, b"three")]

    def test_compaction_beyond_the_end_begins_anew(self, raft_log: Any) -> None:
        """After a snapshot was installed, the log begins after it."""
        filled(raft_log, 1, 1).compact(LogId(20, 4))
        assert bounds(raft_log) == (21, 20, 4), "a log compacted beyond its end does not begin after that"
        assert raft_log.term(20) == 4, "the term at the border is not the snapshot's"
        raft_log.append([Entry(21, 4, b"")])

    def test_compaction_across_another_term_drops_everything(self, raft_log: Any) -> None:
        """If the log has another term at that index, nothing after it belongs to the snapshot's history."""
        filled(raft_log, 1, 1, 1, 1).compact(LogId(2, 3))
        assert bounds(raft_log) == (3, 2, 3), "entries of another history are still there after compact((2, 3))"

    def test_compaction_below_the_border_is_nothing(self, raft_log: Any) -> None:
        """An older snapshot changes nothing, whatever its term; a term that falls above the border is an error."""
        filled(raft_log, 2, 2, 2).compact(LogId(2, 2))
        for up_to in (LogId(2, 2), LogId(2, 3), LogId(1, 2), LogId(0, 0)):
            raft_log.compact(up_to)
        assert bounds(raft_log) == (3, 3, 2), "a compaction below the border has changed the log"
        assert raft_log.term(2) == 2, "a compaction at the border has changed its term"
        refused(raft_log, lambda: raft_log.compact(LogId(9, 1)), "a compaction up to a lower term")

    # ---- hard state -------------------------------------------------------------------------------------

    def test_a_vote_is_kept(self, raft_log: Any) -> None:
        """A vote is returned as it was saved, as any bytes; it may be given later in a term, and repeated."""
        for term, vote in ((1, None), (1, b"a"), (1, b"a"), (2, b""), (5, bytes(range(256))), (6, None)):
            raft_log.save_hard_state(term, vote)
            assert raft_log.hard_state() == (term, vote), "hard_state() is not what was saved"

    def test_nobody_votes_twice(self, raft_log: Any) -> None:
        """A falling term, another vote in the same term, and no vote after a vote are refused."""
        raft_log.save_hard_state(3, b"a")
        for term, vote in ((2, None), (2, b"a"), (3, b"b"), (3, None), (3, b"")):
            what = f"a vote {vote!r} in term {term}"
            refused(raft_log, lambda: raft_log.save_hard_state(term, vote), what)  # noqa: B023

    def test_votes_and_entries_do_not_touch_each_other(self, raft_log: Any) -> None:
        """Neither truncation nor compaction changes a vote, and a vote changes no entry."""
        filled(raft_log, 1, 1).save_hard_state(4, b"a")
        raft_log.truncate_after(1)
        raft_log.compact(LogId(9, 3))
        assert raft_log.hard_state() == (4, b"a"), "what changed the entries has changed the vote"
        raft_log.save_hard_state(7, None)
        assert bounds(raft_log) == (10, 9, 3), "a vote has changed the entries"

    # ---- durable ----------------------------------------------------------------------------------------

    def test_a_sync_makes_everything_durable(self, raft_log: Any) -> None:
        """``durable_index`` reaches the last entry with a sync; a compaction keeps it, a truncation makes it fall."""
        filled(raft_log, 1, 1, 1).sync()
        assert raft_log.durable_index == 3, "durable_index is not the last entry after a sync"
        raft_log.compact(LogId(2, 1))
        assert raft_log.durable_index == 3, "durable_index has changed with a compaction"
        raft_log.truncate_after(2)
        assert raft_log.durable_index == 2, "durable_index is above the last entry after a truncation"
        raft_log.append([Entry(3, 2, b"")])
        raft_log.sync()
        assert raft_log.durable_index == 3

    def test_a_coroutine_syncs_too(self, raft_log: Any) -> None:
        """``sync_async``, if there is one, makes everything durable that was appended before the call."""
        if not hasattr(raft_log, "sync_async"):
            pytest.skip(f"{type(raft_log).__name__} has no sync_async")
        asyncio.run(raft_log.sync_async())
        filled(raft_log, 1, 1)

        async def sync_often() -> None:
            await asyncio.gather(*(raft_log.sync_async() for _ in range(5)))

        asyncio.run(sync_often())
        assert raft_log.durable_index == 2, "durable_index is not the last entry after sync_async()"

    # ---- what must survive ------------------------------------------------------------------------------

    def test_everything_survives(self, raft_log: Any, reopen: Reopen) -> None:
        """Entries, border, term and vote are kept when the log is opened again, repeatedly."""
        filled(raft_log, 1, 1, 2, 2, 3).compact(LogId(2, 1))
        raft_log.truncate_after(4)
        raft_log.save_hard_state(5, b"a")
        expected = bounds(raft_log), raft_log.entries(3, 9), raft_log.term(2)
        for _ in range(2):
            raft_log = reopen(raft_log)
            found = bounds(raft_log), raft_log.entries(3, 9), raft_log.term(2)
            assert found == expected, "the log differs after reopening"
            assert raft_log.hard_state() == (5, b"a"), "the vote differs after reopening"
        refused(raft_log, lambda: raft_log.save_hard_state(5, b"b"), "a second vote after reopening")
        raft_log.append([Entry(5, 9, b"goes on")])

    @pytest.mark.parametrize("up_to", [LogId(4, 2), LogId(30, 7), LogId(2, 6)])
    def test_an_emptied_log_survives(self, raft_log: Any, reopen: Reopen, up_to: LogId) -> None:
        """A log that was compacted completely, beyond its end, or across another term still begins after that."""
        filled(raft_log, 1, 1, 2, 2).compact(up_to)
        raft_log = reopen(raft_log)
        assert bounds(raft_log) == (up_to.index + 1, up_to.index, up_to.term), "an emptied log begins elsewhere"
        raft_log.append([Entry(up_to.index + 1, up_to.term, b"")])
        raft_log = reopen(raft_log)
        assert bounds(raft_log) == (up_to.index + 1, up_to.index + 1, up_to.term)

    def test_truncated_entries_do_not_come_back(self, raft_log: Any, reopen: Reopen) -> None:
        """Truncated entries do not come back, and those that replaced them stay."""
        filled(raft_log, 1, 1, 1, 1).truncate_after(1)
        raft_log = reopen(raft_log)
        assert bounds(raft_log) == (1, 1, 1), "what was truncated is there again"
        raft_log.append([Entry(2, 3, b"another")])
        raft_log = reopen(raft_log)
        assert raft_log.entries(2, 9) == [Entry(2, 3, b"another")]
