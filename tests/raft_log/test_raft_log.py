"""``RaftLog``: what each call does, and what it refuses."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsm
from fastsm import CommandError, CompactedError, Entry, LockedError, LogId, NotRunningError, OrderError, RaftLog
from support.faulty import memory_directory
from support.inside import inside
from support.list_log import ListLog, LogState, Step, do, invent, state_of

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[RaftLog]:
    with RaftLog(tmp_path / "log") as log:
        yield log


def filled(log: RaftLog, *terms: int) -> RaftLog:
    """Appends entries of these terms, starting at index 1."""
    log.append([(index, term, b"%d" % index) for index, term in enumerate(terms, 1)])
    return log


# ---- an empty log ---------------------------------------------------------------------------------------


def test_a_new_log_is_empty(log: RaftLog) -> None:
    """A new log begins at entry 1, after entry 0 of term 0, and has no vote."""
    assert (log.first_index, log.last_index, log.last_term, log.durable_index) == (1, 0, 0, 0)
    assert (log.term(0), log.term(1), log.entries(1, 9), log.hard_state()) == (0, None, [], (0, None))


def test_a_log_compacted_as_a_whole_goes_on_after_it(log: RaftLog) -> None:
    """After ``compact((i, t))`` of everything: first i + 1, last i, of term t; the next entry is i + 1."""
    filled(log, 1, 1, 2).compact(LogId(3, 2))
    assert (log.first_index, log.last_index, log.last_term) == (4, 3, 2)
    assert (log.term(3), log.term(2), log.entries(4, 9)) == (2, None, [])
    with pytest.raises(OrderError):
        log.append([(4, 1, b"")])
    log.append([(4, 2, b"four")])
    assert log.entries(4, 4) == [Entry(4, 2, b"four")]


# ---- append ---------------------------------------------------------------------------------------------


def test_entries_that_are_there_are_skipped(log: RaftLog) -> None:
    """If they have the same term; their commands are not compared."""
    filled(log, 1, 1, 2)
    log.append([(2, 1, b"other"), (3, 2, b"other"), (4, 2, b"new")])
    assert [entry.command for entry in log.entries(1, 9)] == [b"1", b"2", b"3", b"new"]
    log.append([(1, 1, b"")])
    log.append([])
    assert log.last_index == 4


@pytest.mark.parametrize(
    ("entries", "index"),
    [
        ([(3, 3, b"")], 3), ([(2, 1, b""), (3, 3, b"")], 3), ([(5, 2, b"")], 5), ([(4, 1, b"")], 4),
        ([(4, 2, b""), (6, 2, b"")], 6), ([(4, 3, b""), (5, 2, b"")], 5), ([(1, 1, b"")], 1), ([(0, 0, b"")], 0),
        ([(4, 2, b""), (4, 2, b"")], 4), ([(3, 2, b""), (2, 2, b"")], 2),
    ],
)  # fmt: skip
def test_entries_out_of_order_are_refused_whole(log: RaftLog, entries: Any, index: int) -> None:
    """Another term, a gap, a falling term, an index at or below the border: an error names it, nothing is appended."""
    filled(log, 1, 1, 2).compact((1, 1))
    before = state_of(log)
    with pytest.raises(OrderError) as caught:
        log.append(entries)
    assert caught.value.index == index
    assert state_of(log) == before


@pytest.mark.parametrize("what", [5, [5], [(1, 1)], [b"abc"], [(1, 1, "text")], [(1, 1, 7)], [("1", 1, b"")], None])
def test_appending_anything_but_an_entry_is_a_type_error(log: RaftLog, what: Any) -> None:
    """An object that is not an entry is a TypeError, and nothing is appended."""
    with pytest.raises(TypeError):
        log.append(what)
    assert log.last_index == 0


def test_commands_are_bytes_like_and_taken_at_the_call(log: RaftLog) -> None:
    """Later changes of a buffer by the caller change no entry."""
    buffer = bytearray(b"abc")
    log.append([(1, 1, buffer), (2, 1, memoryview(b"xyz")[1:])])  # type: ignore[list-item]
    buffer[:] = b"zzz"
    assert [entry.command for entry in log.entries(1, 2)] == [b"abc", b"yz"]


def test_a_list_that_changes_during_the_call_is_taken_as_it_was(log: RaftLog) -> None:
    """An index whose ``__index__`` empties the caller's list frees nothing that is still read."""
    entries: list[Any] = []

    class Clearing:
        def __index__(self) -> int:
            entries.clear()
            return 1

    entries += [(Clearing(), 1, bytes(100)), (2, 1, bytes(range(100)))]
    log.append(entries)
    assert log.entries(2, 2) == [Entry(2, 1, bytes(range(100)))]


def test_a_command_that_is_too_large_is_refused(log: RaftLog) -> None:
    """More than 2**32 - 1 bytes: a ``CommandError`` before anything is written."""
    import mmap  # noqa: PLC0415  # its pages are never touched

    with mmap.mmap(-1, 1 << 32) as pages, memoryview(pages) as command:
        from fastsm.journal import engine  # noqa: PLC0415

        assert engine.LARGEST_COMMAND == (1 << 32) - 1
        with pytest.raises((CommandError, MemoryError)) as caught:
            log.append([(1, 1, command)])  # type: ignore[list-item]
        assert isinstance(caught.value, MemoryError) or caught.value.index == 1
    assert log.last_index == 0


@pytest.mark.parametrize("size", [0, 1, 100, 12 << 10, 64 << 10, 1 << 20])
@pytest.mark.parametrize("count", [1, 2, 70])
def test_batches_of_any_size(tmp_path: Path, size: int, count: int) -> None:
    """What was appended is read back, now and after a kill, whether it was stored or written."""
    path = tmp_path / "log"
    log = RaftLog(path)
    entries = [Entry(i, 1, bytes([i]) * size) for i in range(1, min(count, (4 << 20) // max(size, 1) + 1) + 1)]
    log.append(entries)
    log.sync()
    more = [entry._replace(index=entry.index + len(entries)) for entry in entries]
    log.append(more)
    assert log.entries(1, 1000) == entries + more
    inside(log).abandon()
    with RaftLog(path) as log:
        assert log.entries(1, 1000) == entries + more
        log.verify()


# ---- read -----------------------------------------------------------------------------------------------


def test_reading_a_compacted_entry_is_an_error_that_names_the_oldest(log: RaftLog) -> None:
    """``oldest`` is the first entry that can be read."""
    filled(log, 1, 1, 2, 2).compact((2, 1))
    for first, last in ((1, 1), (2, 3), (0, 9), (-5, 2)):
        with pytest.raises(CompactedError) as caught:
            log.entries(first, last)
        assert caught.value.oldest == 3
    assert log.entries(3, 2) == log.entries(5, 9) == log.entries(2**70, 2**71) == []
    assert [entry.index for entry in log.entries(3, 2**70)] == [3, 4]


def test_max_bytes_counts_commands(log: RaftLog) -> None:
    """``max_bytes`` returns as many entries as fit by the size of their commands, but at least one."""
    log.append([(index, 1, bytes(size)) for index, size in enumerate((10, 10, 0, 5, 100), 1)])
    for most, count in ((0, 1), (9, 1), (10, 1), (19, 1), (20, 3), (24, 3), (25, 4), (124, 4), (125, 5), (2**70, 5)):
        assert len(log.entries(1, 9, max_bytes=most)) == count
    with pytest.raises(ValueError, match="max_bytes"):
        log.entries(1, 9, max_bytes=-1)


def test_the_term_is_known_at_the_border(log: RaftLog) -> None:
    """The term is known for each entry and for the one before the first, and None for any other number."""
    filled(log, 1, 1, 2, 3).compact((2, 1))
    assert [log.term(index) for index in (-1, 0, 1, 2, 3, 4, 5, 2**64, 2**70)] == [None] * 3 + [1, 2, 3] + [None] * 3


def test_a_read_is_of_one_moment(log: RaftLog) -> None:
    """A finalizer truncates and appends while entries are copied: the read shows the log as it was."""
    filled(log, *[1] * 3000)
    expected = log.entries(1, 3000)

    class Truncating:
        def __del__(self) -> None:
            log.truncate_after(1)
            log.append([(2, 9, b"other")])

    class Cycle:
        pass

    cycle: Any = Cycle()
    cycle.cycle, cycle.last = cycle, Truncating()
    del cycle
    assert log.entries(1, 3000) == expected
    import gc  # noqa: PLC0415

    gc.collect()
    assert log.last_term == 9


# ---- truncate and compact -------------------------------------------------------------------------------


def test_truncation_ends_at_the_border(log: RaftLog) -> None:
    """A truncation at the border empties the log; before it is an error; at or after the end it does nothing."""
    filled(log, 1, 1, 2, 3).compact((2, 1))
    log.truncate_after(9)
    log.truncate_after(4)
    assert log.last_index == 4
    with pytest.raises(OrderError):
        log.truncate_after(1)
    log.truncate_after(2)
    assert (log.first_index, log.last_index, log.last_term) == (3, 2, 1)
    log.append([(3, 7, b"")])
    assert log.last_term == 7


def test_compaction_beyond_the_end_begins_anew(log: RaftLog) -> None:
    """After a snapshot was installed, everything is dropped, and the log begins after it."""
    filled(log, 1, 1).compact(LogId(10, 5))
    assert (log.first_index, log.last_index, log.last_term, log.term(10), log.term(2)) == (11, 10, 5, 5, None)


@pytest.mark.parametrize("term", [2, 5])
def test_compaction_across_another_term_begins_anew(log: RaftLog, term: int) -> None:
    """If the log has another term at that index, none of it belongs to the snapshot's history."""
    filled(log, 1, 3, 3, 3).sync()
    log.compact(LogId(2, term))
    assert (log.first_index, log.last_index, log.last_term) == (3, 2, term)
    assert log.durable_index == 1
    log.sync()
    assert log.durable_index == 2


def test_compaction_at_or_below_the_border_does_nothing(log: RaftLog) -> None:
    """A compaction at or below the border does nothing; above it, a term below the border's is an error."""
    filled(log, 1, 2, 3).compact((2, 2))
    before = state_of(log)
    for up_to in ((2, 2), (2, 9), (1, 1), (0, 0)):
        log.compact(up_to)
    with pytest.raises(OrderError):
        log.compact((9, 1))
    assert state_of(log) == before


def test_files_go_after_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments whose entries were all compacted are removed by the next sync; the rest is intact."""
    monkeypatch.setattr(fastsm.raft_log, "SEGMENT_BYTES", 4096)
    path = tmp_path / "log"
    with RaftLog(path) as log:
        for index in range(1, 40):
            log.append([(index, 1, bytes(1000))])
        assert log.stats().segments > 5
        log.compact((35, 1))
        assert len(list(path.glob("journal-*"))) > 5
        log.sync()
        assert len(list(path.glob("journal-*"))) == log.stats().segments == 2
        log.verify()
    with RaftLog(path) as log:
        assert (log.first_index, log.last_index) == (36, 39)


def test_a_truncation_across_segments_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a cut at any entry, with one entry per segment, reopening finds the same log each time.

    The log continues with the lowest possible term, in the segment of the cut or in one of its own.
    """
    ranges = itertools.combinations_with_replacement(range(5), 2)
    for (border, place), own_segment in itertools.product(ranges, (False, True)):
        with memory_directory() as root:
            model = ListLog()
            cut = Step("truncate_after", (place,))
            lowest = Step("append", ([Entry(place + 1, place, b"lowest"), Entry(place + 2, place + 1, b"next")],))
            filling = [Step("append", ([Entry(index, index, b"")],)) for index in range(1, 6)]
            compaction = Step("compact", (LogId(border, border),))
            for step in [*filling, compaction, cut, lowest, *filling[place + 2 :], cut, lowest]:
                monkeypatch.setattr(fastsm.raft_log, "SEGMENT_BYTES", 1 if own_segment or step in filling else 1 << 26)
                log = RaftLog(root / "log")
                do(log, step)
                do(model, step)
                inside(log).abandon()
                with RaftLog(root / "log") as log:
                    assert state_of(log) == model.state, (border, place, own_segment, step)


# ---- hard state -----------------------------------------------------------------------------------------


def test_hard_state_follows_the_rules_of_votes(tmp_path: Path) -> None:
    """A term never falls; a vote cannot change in its term; both survive a kill."""
    log = RaftLog(tmp_path / "log")
    log.save_hard_state(3)
    log.save_hard_state(3, b"a")
    log.save_hard_state(3, bytearray(b"a"))
    for term, vote in ((2, None), (2, b"a"), (3, b"b"), (3, None), (3, b"")):
        with pytest.raises(OrderError):
            log.save_hard_state(term, vote)
        assert log.hard_state() == (3, b"a")
    with pytest.raises(TypeError):
        log.save_hard_state(4, "a")  # type: ignore[arg-type]
    log.save_hard_state(4, None)
    log.save_hard_state(5, b"")
    inside(log).abandon()
    with RaftLog(tmp_path / "log") as log:
        assert log.hard_state() == (5, b"")


# ---- durable --------------------------------------------------------------------------------------------


def test_durable_index_falls_with_a_truncation_only(log: RaftLog) -> None:
    """``durable_index`` falls with a truncation, but not with an append or a compaction."""
    filled(log, 1, 1, 1, 1)
    assert log.durable_index == 0
    log.sync()
    log.append([(5, 1, b"")])
    assert log.durable_index == 4
    log.compact((2, 1))
    assert log.durable_index == 4
    log.truncate_after(3)
    assert log.durable_index == 3
    log.append([(4, 2, b"")])
    assert log.durable_index == 3
    log.compact((9, 2))
    assert log.durable_index == 3
    log.sync()
    assert log.durable_index == 9


def test_durable_index_is_known_after_a_kill(tmp_path: Path) -> None:
    """After a kill ``durable_index`` is what frames record as synced; a first sync makes the rest durable."""
    log = RaftLog(tmp_path / "log")
    filled(log, 1, 1, 1).sync()
    log.append([(4, 1, b"")])
    inside(log).abandon()
    log = RaftLog(tmp_path / "log")
    assert (log.last_index, log.durable_index) == (4, 3)
    log.sync()
    assert log.durable_index == 4
    log.close()
    with RaftLog(tmp_path / "log") as log:
        assert log.durable_index == 4
        assert log.stats().recovery.clean


# ---- life -----------------------------------------------------------------------------------------------


CALLS: dict[str, Callable[[RaftLog], object]] = {
    "append": lambda log: log.append([(1, 1, b"")]),
    "truncate_after": lambda log: log.truncate_after(0),
    "compact": lambda log: log.compact((5, 5)),
    "entries": lambda log: log.entries(1, 2),
    "term": lambda log: log.term(0),
    "first_index": lambda log: log.first_index,
    "last_index": lambda log: log.last_index,
    "last_term": lambda log: log.last_term,
    "durable_index": lambda log: log.durable_index,
    "hard_state": lambda log: log.hard_state(),
    "save_hard_state": lambda log: log.save_hard_state(1, b"a"),
    "sync": lambda log: log.sync(),
    "verify": lambda log: log.verify(),
    "stats": lambda log: log.stats(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_closed_log_refuses(log: RaftLog, name: str) -> None:
    """Every call except ``close`` and ``repr`` is refused."""
    log.close()
    log.close()
    with pytest.raises(NotRunningError):
        CALLS[name](log)
    assert "not open" in repr(log)


def test_a_second_opening_of_a_log_is_refused(tmp_path: Path, log: RaftLog) -> None:
    """A second opening is refused, immediately or after ``lock_timeout``; it waits for a close."""
    with pytest.raises(LockedError):
        RaftLog(tmp_path / "log")
    with pytest.raises(LockedError):
        RaftLog(tmp_path / "log", lock_timeout=0.01)
    with pytest.raises(ValueError, match="lock_timeout"):
        RaftLog(tmp_path / "log", lock_timeout=-1)
    closing = threading.Timer(0.05, log.close)
    closing.start()
    RaftLog(tmp_path / "log", lock_timeout=60).close()
    closing.join()


def test_stats_and_repr_say_what_there_is(log: RaftLog) -> None:
    """Stats and repr show sizes, counts, and what recovery found; ``as_dict`` is flat for metrics."""
    filled(log, 1, 2).sync()
    stats = log.stats()
    assert (stats.first_index, stats.last_index, stats.last_term, stats.durable_index, stats.entries) == (1, 2, 2, 2, 2)
    assert stats.segments == 1
    assert stats.sync_count >= 1
    assert stats.as_dict()["recovery_torn_bytes"] == 0
    assert "entries       1 to 2, the last of term 2" in str(stats)
    assert repr(log).endswith("entries 1 to 2>")


def test_a_log_that_is_dropped_says_so(tmp_path: Path) -> None:
    """A log that is dropped without a close gives a ``ResourceWarning``, and its directory is released."""
    log = RaftLog(tmp_path / "log")
    with pytest.warns(ResourceWarning, match="never closed"):
        del log
    RaftLog(tmp_path / "log").close()


# ---- the model ------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), small=st.booleans())
def test_does_what_a_list_does(seed: int, small: bool) -> None:
    """After any calls, kills and clean ends the log equals the list, in every read and refusal."""
    rng = random.Random(seed)
    model = ListLog()
    with memory_directory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastsm.raft_log, "SEGMENT_BYTES", 20_000 if small else 1 << 26)
        log = RaftLog(root / "log")
        for number in range(120):
            step = invent(rng, model)
            do(log, step)
            do(model, step)
            if number % 5 == 0:
                check_reads(log, model, rng)
                check_refusals(log, model, rng)
            if number % 23 == 0:
                (inside(log).abandon if rng.random() < 0.7 else log.close)()
                log = RaftLog(root / "log")
        check_reads(log, model, rng)
        log.verify()
        log.close()


def check_reads(log: RaftLog, model: ListLog, rng: random.Random) -> None:
    """Check that every way to read agrees with the list."""
    assert state_of(log) == model.state
    assert (log.first_index, log.last_index, log.last_term) == (model.first_index, *model.last)
    low, high = model.first_index - 3, model.last.index + 3
    for index in range(low, high):
        assert log.term(index) == model.term(index)
    a, b = rng.randrange(low, high), rng.randrange(low, high)
    most = rng.choice((None, 0, 100, 7000))
    assert outcome(lambda: log.entries(a, b, max_bytes=most)) == outcome(lambda: model.entries(a, b, most))


def check_refusals(log: RaftLog, model: ListLog, rng: random.Random) -> None:
    """Check that the log refuses what the list does, naming the same entry."""
    before: LogState = model.state
    near = range(max(0, model.first_index - 2), model.last.index + 3)
    for index, term in itertools.islice(zip(rng.sample(near, len(near)), itertools.repeat(0)), 3):
        chunk = [(index, rng.choice((term, model.term(index) or 0, model.last.term)), b"")]
        for call in (lambda each: each.append(chunk), lambda each: each.truncate_after(index)):  # noqa: B023
            copy = ListLog(before)
            expected = outcome(lambda: call(copy))  # noqa: B023
            if expected[0] == "OrderError":
                assert outcome(lambda: call(log)) == expected  # noqa: B023
                assert state_of(log) == before


def outcome(call: Callable[[], Any]) -> tuple[Any, ...]:
    try:
        return "", call()
    except OrderError as error:
        return "OrderError", error.index
    except CompactedError as error:
        return "CompactedError", error.oldest


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_large_entry_alone_is_as_it_was_given(tmp_path: Path, kind: type[Any]) -> None:
    """Large entries, of sizes around the limit for writing without a copy, are read back unchanged."""
    sizes = [(128 << 10) + more for more in range(-2, 10)] + [(1 << 20) + 3]
    entries = [Entry(index, 1, bytes([index]) * size) for index, size in enumerate(sizes, 1)]
    with RaftLog(tmp_path / "log") as log:
        for index, term, command in entries:
            log.append([(index, term, kind(command))])
            log.append([(index, term, b"known")])
        assert log.entries(1, 99) == entries
    with RaftLog(tmp_path / "log") as log:
        assert log.entries(1, 99) == entries
        log.verify()


def test_counts_of_syncs_never_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a segment has counted still counts after the segment is removed."""
    monkeypatch.setattr(fastsm.raft_log, "SEGMENT_BYTES", 5_000)
    with RaftLog(tmp_path / "log") as log:
        before = log.stats()
        for index in range(1, 41):
            log.append([(index, 1, bytes(1000))])
            log.sync()
            log.compact((index, 1))
            stats = log.stats()
            assert stats.sync_count > before.sync_count
            assert stats.sync_seconds >= before.sync_seconds
            before = stats
        assert before.log_bytes < 20_000, "no segment was removed"
