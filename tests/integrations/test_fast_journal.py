"""``FastJournal`` behaves as PySyncObj's own journals do; they are the model here."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pysyncobj")

from pysyncobj.journal import MemoryJournal

from fastsm import CorruptionError, NotRunningError, ReentryError, StorageError
from fastsm.integrations.pysyncobj import FastJournal
from support.faulty import Call, Disk

pytestmark = pytest.mark.usefixtures("quiet")


class Stock(MemoryJournal):  # type: ignore[misc]
    """PySyncObj's journal in memory, with ranges of entries by position."""

    def indexes(self) -> list[int]:
        return [entry[1] for entry in self[0 : len(self)]]


def step(rng: random.Random, stock: Stock, journal: FastJournal) -> None:
    """Make the same random call of both journals, as PySyncObj would."""
    dice = rng.random()
    indexes = stock.indexes()
    if dice < 0.6 or not indexes:
        index = indexes[-1] + 1 if indexes else rng.randrange(1, 50)
        term = stock[-1][2] + (rng.random() < 0.1) if indexes else rng.randrange(9)
        for each in (stock, journal):
            each.add(b"command %d" % index, index, term)
    elif dice < 0.7:
        position = rng.randrange(0, len(indexes) + 2)
        for each in (stock, journal):
            each.deleteEntriesFrom(position)
    elif dice < 0.8:
        position = rng.randrange(0, len(indexes) + 2)
        for each in (stock, journal):
            each.deleteEntriesTo(position)
    elif dice < 0.82:
        for each in (stock, journal):
            each.clear()
    elif dice < 0.92:
        term, vote = rng.randrange(9), rng.choice((None, "a:1", "node-ü:4321"))
        for each in (stock, journal):
            each.setCurrentTerm(term, vote)
    else:
        journal.onOneSecondTimer()


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_does_what_the_journal_in_memory_does(tmp_path: Path, seed: int, durable: bool) -> None:
    """Entries by position and slice, term and vote equal those of the journal in memory, also after reopening."""
    rng = random.Random(seed)
    stock, journal = Stock(), FastJournal(tmp_path / "journal", durable=durable)
    for number in range(400):
        step(rng, stock, journal)
        assert len(journal) == len(stock)
        assert journal[:] == stock[0 : len(stock)]
        if len(stock):
            assert (journal[0], journal[-1]) == (stock[0], stock[-1])
            position = rng.randrange(len(stock))
            assert journal[position] == stock[position]
            assert journal[position : position + 3] == stock[position : position + 3]
            assert (journal.first_index, journal.last_index) == (stock[0][1], stock[-1][1])
        assert (journal.getCurrentTerm(), journal.getVotedForNodeId()) == (
            stock.getCurrentTerm(), stock.getVotedForNodeId())
        if number % 50 == 0:
            (journal._destroy if rng.random() < 0.5 else journal.abandon)()
            journal = FastJournal(tmp_path / "journal", durable=durable)
    journal._destroy()


def test_the_last_entry_is_the_one_that_is_there(tmp_path: Path) -> None:
    """The last entry, which is cached because PySyncObj reads it often, is correct after every kind of change."""
    journal = FastJournal(tmp_path / "journal")
    journal.add(b"one", 1, 1)
    assert journal[-1] is journal[-1]
    journal.add(b"two", 2, 1)
    assert (journal[-1], journal[0]) == ((b"two", 2, 1), (b"one", 1, 1))
    journal.cut(2)
    assert journal[-1] == journal[0] == (b"one", 1, 1)
    journal.add(b"other", 2, 5)
    journal.truncate_before(2)
    assert journal[-1] == journal[0] == (b"other", 2, 5)
    journal.rebase(b"base", 9, 9)
    assert journal[-1] == journal[0] == (b"base", 9, 9)
    journal.clear()
    with pytest.raises(IndexError):
        journal[-1]
    journal.close()


@pytest.mark.parametrize("inner", ["add", "cut", "clear", "rebase", "set_vote", "truncate_before"])
def test_a_step_on_top_of_another_is_refused(tmp_path: Path, inner: str) -> None:
    """A call by a signal handler within a write is an error and changes nothing; a ``close`` is deferred."""
    arguments: dict[str, tuple[Any, ...]] = {
        "add": (b"x", 3, 1), "cut": (2,), "clear": (), "rebase": (b"x", 9, 9), "set_vote": (9, "a"),
        "truncate_before": (2,),
    }  # fmt: skip
    disk = Disk(stores=False)
    journal = FastJournal(tmp_path / "journal", _files=disk.files)
    journal.add(b"one", 1, 1)
    journal.add(b"two", 2, 1)
    met: list[BaseException] = []

    def handle(call: Call) -> None:
        if call.method == "write" and not met:
            try:
                getattr(journal, inner)(*arguments[inner])
            except ReentryError as error:
                met.append(error)

    disk.before = handle
    journal.add(b"three", 3, 1)
    disk.before = None
    assert len(met) == 1
    assert [entry[0] for entry in journal[:]] == [b"one", b"two", b"three"]

    def close(call: Call) -> None:
        if call.method == "write":
            disk.before = None
            journal.close()

    disk.before = close
    journal.add(b"four", 4, 1)
    with pytest.raises(NotRunningError):
        journal.add(b"five", 5, 1)
    journal = FastJournal(tmp_path / "journal")
    assert [entry[0] for entry in journal[:]] == [b"one", b"two", b"three", b"four"]
    journal.close()


def test_a_directory_that_lost_a_file_is_corrupt(tmp_path: Path) -> None:
    """A directory that lost its only segment, or NEWEST, is corrupt."""
    journal = FastJournal(tmp_path / "journal")
    journal.add(b"one", 1, 1)
    journal.close()
    for name in ("journal-1", "NEWEST"):
        (tmp_path / "journal" / name).rename(tmp_path / "away")
        with pytest.raises(CorruptionError):
            FastJournal(tmp_path / "journal")
        (tmp_path / "away").rename(tmp_path / "journal" / name)
    FastJournal(tmp_path / "journal").close()


def test_an_error_of_a_close_leaves_nothing_open(tmp_path: Path) -> None:
    """After a close that fails, the lock is free, and synced entries are there."""
    disk = Disk()
    journal = FastJournal(tmp_path / "journal", durable=True, _files=disk.files)
    journal.add(b"one", 1, 1)
    journal.sync()
    disk.fail("close_file")
    with pytest.raises(StorageError):
        journal.close()
    journal.close()
    journal = FastJournal(tmp_path / "journal", durable=True)
    assert journal[:] == [(b"one", 1, 1)]
    journal.close()
