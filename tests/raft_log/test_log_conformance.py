"""The suite for Raft logs: ``RaftLog`` and a list pass it, and logs with mistakes do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastsm import Entry, LogId, RaftLog
from fastsm.testing import RaftLogConformance
from support.inside import inside
from support.list_log import ListLog


class TestRaftLog(RaftLogConformance):
    """The log of this package."""

    @pytest.fixture
    def raft_log(self, tmp_path: Path) -> Any:
        self.open = [RaftLog(tmp_path / "log")]
        yield self.open[0]
        self.open[-1].close()

    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Callable[[Any], Any]:
        def close_and_open(log: RaftLog) -> RaftLog:
            log.close()
            self.open.append(RaftLog(tmp_path / "log"))
            return self.open[-1]

        return close_and_open


class TestKilledRaftLog(TestRaftLog):
    """The same, with a kill instead of each close."""

    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Callable[[Any], Any]:
        def kill_and_open(log: RaftLog) -> RaftLog:
            inside(log).abandon()
            self.open.append(RaftLog(tmp_path / "log"))
            return self.open[-1]

        return kill_and_open


class MemoryLog(ListLog):
    """The model, with the additional methods that the suite needs."""

    durable_index = 0

    @property
    def last_index(self) -> int:
        return self.last.index

    @property
    def last_term(self) -> int:
        return self.last.term

    def hard_state(self) -> tuple[int, bytes | None]:
        return self.state.hard_state

    def entries(self, first: int, last: int, max_bytes: int | None = None) -> list[Entry]:
        return super().entries(first, last, max_bytes)

    def truncate_after(self, index: int) -> None:
        super().truncate_after(index)
        self.durable_index = min(self.durable_index, max(index, self.state.border.index))

    def sync(self) -> None:
        self.durable_index = self.last.index

    async def sync_async(self) -> None:
        self.sync()


class TestMemoryLog(RaftLogConformance):
    """A log that stores nothing."""

    @pytest.fixture
    def raft_log(self) -> MemoryLog:
        return MemoryLog()


class TakesConflicts(MemoryLog):
    def append(self, entries: Any) -> None:
        for index, term, _ in entries:
            if self.term(index) not in (None, term):
                super().truncate_after(index - 1)
        super().append(entries)


class TruncatesWhatItKnows(MemoryLog):
    def append(self, entries: Any) -> None:
        if entries:
            super().truncate_after(max(entries[0][0] - 1, self.state.border.index))
        super().append(entries)


class KeepsAnotherHistory(MemoryLog):
    def compact(self, up_to: LogId) -> None:
        kept = self.state.entries[max(0, up_to.index - self.state.border.index) :]
        super().compact(up_to)
        self.state = self.state._replace(entries=kept)


class ForgetsTheBordersTerm(MemoryLog):
    def term(self, index: int) -> int | None:
        return None if index == self.state.border.index else super().term(index)


class VotesTwice(MemoryLog):
    def save_hard_state(self, term: int, voted_for: bytes | None) -> None:
        self.state = self.state._replace(hard_state=(term, voted_for))


class ReadsNothingOfLargeEntries(MemoryLog):
    def entries(self, first: int, last: int, max_bytes: int | None = None) -> list[Entry]:
        found = super().entries(first, last, max_bytes)
        return [] if max_bytes is not None and found and len(found[0].command) > max_bytes else found


class EmptiesWithoutAWord(MemoryLog):
    def entries(self, first: int, last: int, max_bytes: int | None = None) -> list[Entry]:
        return super().entries(max(first, self.first_index), last, max_bytes)


class DurableStays(MemoryLog):
    def truncate_after(self, index: int) -> None:
        ListLog.truncate_after(self, index)


class HandsOutItsList(MemoryLog):
    def __init__(self) -> None:
        super().__init__()
        self.handed_out: list[list[Entry]] = []

    def entries(self, first: int, last: int, max_bytes: int | None = None) -> list[Entry]:
        self.handed_out.append(super().entries(first, last, max_bytes))
        return self.handed_out[-1]

    def truncate_after(self, index: int) -> None:
        super().truncate_after(index)
        for found in self.handed_out:
            found[:] = [entry for entry in found if entry.index <= index]


class TakesEntryZero(MemoryLog):
    def append(self, entries: Any) -> None:
        super().append([entry for entry in entries if entry[0] > 0])


class ChangesItsBordersTerm(MemoryLog):
    def compact(self, up_to: LogId) -> None:
        super().compact(up_to)
        if up_to.index == self.state.border.index:
            self.state = self.state._replace(border=up_to)


class CoroutinesSyncNothing(MemoryLog):
    async def sync_async(self) -> None:
        pass


@pytest.mark.parametrize(
    "wrong", [
        TakesConflicts, TruncatesWhatItKnows, KeepsAnotherHistory, ForgetsTheBordersTerm, VotesTwice,
        ReadsNothingOfLargeEntries, EmptiesWithoutAWord, DurableStays, HandsOutItsList, TakesEntryZero,
        ChangesItsBordersTerm, CoroutinesSyncNothing,
    ],
)  # fmt: skip
def test_mistakes_are_seen(wrong: type[MemoryLog]) -> None:
    """At least one rule fails for each log with a mistake."""
    suite = RaftLogConformance()
    failed = []
    for name in dir(suite):
        if name.startswith("test_") and "surviv" not in name and "come_back" not in name:
            try:
                getattr(suite, name)(wrong())
            except (AssertionError, pytest.fail.Exception, Exception):
                failed.append(name)
    assert failed


def rules_about_reopening() -> list[tuple[str, tuple[Any, ...]]]:
    """Return the names of the rules that take ``reopen``, each with further arguments."""
    marks = getattr(RaftLogConformance.test_an_emptied_log_survives, "pytestmark")  # noqa: B009
    return [
        ("test_everything_survives", ()), ("test_truncated_entries_do_not_come_back", ()),
        *(("test_an_emptied_log_survives", (up_to,)) for up_to in marks[0].args[1])]


def broken_rules(reopen: Callable[[MemoryLog], MemoryLog]) -> list[str]:
    suite, failed = RaftLogConformance(), []
    for name, more in rules_about_reopening():
        try:
            getattr(suite, name)(MemoryLog(), reopen, *more)
        except Exception:
            failed.append(name)
    return failed


class Remembers(MemoryLog):
    """It keeps the longest list of entries that it ever had, for a reopening that loses a truncation."""

    longest: tuple[Entry, ...] = ()

    def append(self, entries: Any) -> None:
        super().append(entries)
        self.longest = max(self.longest, self.state.entries, key=len)


FORGETFUL: dict[str, Callable[[MemoryLog], Any]] = {
    "the vote": lambda log: log.state._replace(hard_state=(log.state.hard_state[0], None)),
    "the term": lambda log: log.state._replace(hard_state=(0, None)),
    "the border": lambda log: log.state._replace(border=LogId(0, 0)),
    "the border's term": lambda log: log.state._replace(border=LogId(log.state.border.index, 0)),
    "the last entry": lambda log: log.state._replace(entries=log.state.entries[:-1]),
    "a truncation": lambda log: log.state._replace(entries=log.longest),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("lost", FORGETFUL)
def test_what_a_reopened_log_lost_is_seen(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """At least one rule fails for a log that loses something when it is opened again; without a loss none does."""
    monkeypatch.setattr(f"{__name__}.MemoryLog", Remembers)
    assert broken_rules(lambda log: log) == []

    def reopen(log: MemoryLog) -> MemoryLog:
        log.state = FORGETFUL[lost](log)
        return log

    assert broken_rules(reopen)
