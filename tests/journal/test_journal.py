"""The journal: a Raft log with term and vote. A kill loses nothing of it, and a power loss nothing that was synced."""

from __future__ import annotations

import errno
import random
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastsm import CorruptionError, FormatVersionError, LockedError, NotRunningError, OrderError, StorageError
from fastsm.disk.files import Directory
from fastsm.integrations.pysyncobj.journal import FastJournal as Journal
from support.faulty import Disk, memory_directory
from support.power import Drawn, NoDirectorySync, NoSync, Platter, Point, QuietDirectory

LARGE = 1 << 20  # a segment above this size takes no more entries after its front is cut


pytestmark = pytest.mark.usefixtures("quiet")


class State(NamedTuple):
    """Everything that a journal holds, except the commit index."""

    entries: tuple[tuple[bytes, int, int], ...]
    term: int
    vote: str | None


def state_of(journal: Journal) -> State:
    return State(tuple(journal[:]), journal.term, journal.vote)


class Model:
    """A journal as a list; `invent` makes a random change to it and to a journal."""

    def __init__(self, seed: int, largest: int = 5000) -> None:
        self.random = random.Random(seed)
        self.largest = largest
        self.history = [State((), 0, None)]

    @property
    def state(self) -> State:
        """Return the state; it is changed before the journal is."""
        return self.history[-1]

    @state.setter
    def state(self, state: State) -> None:
        self.history.append(state)

    @property
    def entries(self) -> tuple[tuple[bytes, int, int], ...]:
        return self.state.entries

    def invent(self, journal: Journal) -> None:
        dice = self.random.random()
        entries = self.entries
        if dice < 0.55 or not entries:
            self._add(journal)
        elif dice < 0.65:
            index = self.random.randrange(entries[0][1], entries[-1][1] + 2)
            self.state = self.state._replace(entries=tuple(entry for entry in entries if entry[1] < index))
            journal.cut(index)
        elif dice < 0.8:
            index = self.random.randrange(entries[0][1], entries[-1][1] + 1)
            self.state = self.state._replace(entries=tuple(entry for entry in entries if entry[1] >= index))
            journal.truncate_before(index)
        elif dice < 0.9:
            term = max(self.state.term, entries[-1][2]) + self.random.choice((0, 1))
            vote = self.random.choice((None, "a:1", "node-ü:4321"))
            self.state = self.state._replace(term=term, vote=vote)
            journal.set_vote(term, vote)
        elif dice < 0.93:
            index = entries[-1][1] + self.random.randrange(1, 50)
            self.state = self.state._replace(entries=((b"\x01", index, self.state.term + 9),))
            journal.rebase(*self.entries[0])
        elif dice < 0.95:
            self.state = self.state._replace(entries=())
            journal.clear()
        elif dice < 0.98:
            journal.set_commit_index(self.random.choice(entries)[1])
            journal.write_commit_index()
        else:
            journal.prepare()

    def _add(self, journal: Journal) -> None:
        for _ in range(self.random.choice((1, 1, 3, 30))):
            command = self.random.randbytes(self.random.choice((0, 1, 7, 8, 200, self.largest)))
            if self.entries:
                index, term = self.entries[-1][1] + 1, self.entries[-1][2] + (self.random.random() < 0.1)
            else:
                index, term = self.random.randrange(1, 99), self.state.term
            self.state = self.state._replace(entries=(*self.entries, (command, index, term)))
            journal.add(command, index, term)


def check_reads(journal: Journal, model: Model) -> None:
    """Check that every way to read the journal agrees with the list."""
    entries = list(model.entries)
    assert state_of(journal) == model.state
    assert len(journal) == len(entries)
    assert (journal.first_index, journal.last_index) == ((entries[0][1], entries[-1][1]) if entries else (0, 0))
    if not entries:
        return
    assert (journal[0], journal[-1]) == (entries[0], entries[-1])
    a, b = sorted(model.random.randrange(-3, len(entries) + 3) for _ in range(2))
    assert journal[a:b] == entries[a:b]
    assert journal[a:] == entries[a:]
    index = entries[-1][1] - model.random.randrange(len(entries))
    found = entries[index - entries[0][1] :]
    assert journal.entries(index, 5) == found[:5]
    assert journal.entries(index, 5, 1)[:1] == found[:1]
    assert journal.term_at(index) == found[0][2]
    assert journal.term_at(entries[0][1] - 1) is None
    assert journal.term_at(entries[-1][1] + 1) is None


@pytest.mark.parametrize("durable", [False, True])
def test_does_what_a_list_does(tmp_path: Path, durable: bool) -> None:
    """After any operations, kills and closes the journal holds what a list of entries would."""
    model = Model(5 + durable)
    journal = Journal(tmp_path, durable=durable)
    segments = 0
    for step in range(1500):
        model.invent(journal)
        segments = max(segments, len(list(tmp_path.glob("journal-*"))))
        if step % 7 == 0:
            check_reads(journal, model)
        if step % 50 == 0:
            (journal.abandon if model.random.random() < 0.7 else journal.close)()
            journal = Journal(tmp_path, durable=durable)
            check_reads(journal, model)
        if step % 30 == 0:
            journal.remove_retired()
    journal.close()
    assert segments > 2


def test_entries_are_checked(tmp_path: Path) -> None:
    """An entry that does not follow the last one, or whose term falls, is refused and changes nothing."""
    journal = Journal(tmp_path)
    journal.add(b"one", 5, 2)
    for index, term in ((5, 2), (7, 2), (4, 2), (6, 1)):
        with pytest.raises(OrderError):
            journal.add(b"two", index, term)
    with pytest.raises(OrderError):
        journal.truncate_before(6)
    assert journal[:] == [(b"one", 5, 2)]
    journal.close()
    with pytest.raises(NotRunningError):
        journal.add(b"two", 6, 2)


def test_commands_are_given_to_a_state_machine(tmp_path: Path) -> None:
    """Entries with the state machine's mark are returned without the mark, others as the given substitute."""
    journal = Journal(tmp_path)
    for index, command in enumerate((b"Fput", b"\x00other", b"F", b""), 1):
        journal.add(command, index, 1)
    expected = [(1, 1, b"put"), (2, 1, b"noop"), (3, 1, b""), (4, 1, b"noop")]
    assert journal.marked(1, 10, 100, ord("F"), b"noop") == (expected, [1, 3])
    assert journal.marked(2, 2, 100, ord("F"), b"noop") == (expected[1:3], [0])
    assert journal.without_marks(1, 5, b"F") == [2, 4]
    assert journal.without_marks(1, 5, b"F\x00") == [4]
    journal.close()


def test_the_commit_index_is_kept(tmp_path: Path) -> None:
    """The written commit index is read back, and is never beyond the last entry."""
    journal = Journal(tmp_path)
    for index in range(1, 10):
        journal.add(b"x", index, 1)
    journal.set_commit_index(8)
    journal.write_commit_index()
    journal.abandon()
    journal = Journal(tmp_path)
    assert journal.commit_index == 8
    journal.cut(5)
    assert journal.commit_index == 4
    journal.abandon()
    journal = Journal(tmp_path)
    assert journal.commit_index == 4
    journal.close()


def test_a_second_opening_of_a_journal_is_refused(tmp_path: Path) -> None:
    """A second opening is refused while the journal is open."""
    journal = Journal(tmp_path)
    with pytest.raises(LockedError):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


# ---- storage errors ------------------------------------------------------------------------------------


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    """An entry without room is refused and changes nothing; the journal continues when there is room."""
    disk = Disk()
    journal = Journal(tmp_path, _files=disk.files)
    journal.add(b"one", 1, 1)
    disk.fail("allocate", errno.ENOSPC, times=2)
    with pytest.raises(StorageError) as caught:
        journal.add(bytes(1 << 20), 2, 1)
    assert caught.value.errno == errno.ENOSPC
    assert journal[:] == [(b"one", 1, 1)]
    journal.add(bytes(1 << 20), 2, 1)
    journal.abandon()
    journal = Journal(tmp_path)
    assert len(journal) == 2
    journal.close()


def test_after_a_failed_sync_nothing_is_written(tmp_path: Path) -> None:
    """After a failed sync nothing is written or synced any more; reads still work."""
    disk = Disk()
    journal = Journal(tmp_path, durable=True, _files=disk.files)
    journal.add(b"one", 1, 1)
    disk.fail("sync")
    with pytest.raises(StorageError):
        journal.sync()
    for write in (lambda: journal.add(b"two", 2, 1), journal.sync, lambda: journal.set_vote(3, None)):
        with pytest.raises(StorageError):
            write()
    assert journal[:] == [(b"one", 1, 1)]
    assert journal.synced_index == 0
    journal.close()


def test_a_new_segment_that_cannot_be_made_changes_nothing(tmp_path: Path) -> None:
    """If the next segment cannot be created, the journal continues in the old one."""
    disk = Disk()
    journal = Journal(tmp_path, _files=disk.files)
    for index in range(1, 4):
        journal.add(bytes(LARGE), index, 1)
    for method in ("create_file", "write", "sync", "sync_directory", "allocate"):
        disk.forget()
        disk.fail(method, errno.ENOSPC, times=2)
        with pytest.raises(StorageError):
            journal.truncate_before(2)
        assert journal.first_index == 1
    disk.forget()
    journal.truncate_before(2)
    assert journal.first_index == 2
    journal.abandon()
    journal = Journal(tmp_path)
    assert (journal.first_index, journal.last_index) == (2, 3)
    journal.close()


# ---- damage --------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    """After a clean close each flipped bit is an error, or all entries, term and vote are there."""
    with memory_directory() as root:
        journal = Journal(root / "j")
        for index in range(1, 6):
            journal.add(b"command %d" % index, index, 1)
        journal.set_vote(2, "a:1")
        journal.close()
        expected = State(tuple((b"command %d" % n, n, 1) for n in range(1, 6)), 2, "a:1")
        path = root / "j" / "journal-1"
        content = path.read_bytes()
        found = 0
        for bit in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                journal = Journal(root / "j", _files=QuietDirectory)
            except (CorruptionError, FormatVersionError):
                found += 1
                continue
            assert state_of(journal) == expected, f"bit {bit}"
            journal.abandon()
        assert found > 8 * len(content) * 0.8


def test_a_missing_segment_is_found(tmp_path: Path) -> None:
    """Opening reports a missing segment."""
    journal = Journal(tmp_path)
    for index in range(1, 10):
        journal.add(bytes(LARGE), index, 1)
        if index in (4, 7):
            journal.truncate_before(index - 2)
    journal.close()
    names = sorted(path.name for path in tmp_path.glob("journal-*"))
    assert len(names) == 2
    (tmp_path / names[0]).rename(tmp_path / "away")
    with pytest.raises(CorruptionError):
        Journal(tmp_path)
    (tmp_path / "away").rename(tmp_path / names[0])
    journal = Journal(tmp_path)
    assert (journal.first_index, journal.last_index) == (5, 9)
    journal.close()


# ---- power loss ----------------------------------------------------------------------------------------


class Moment(Point):
    """A point, and the states that a power loss may leave: those since the last sync that returned."""

    def __init__(self, platter: Platter, where: str, history: list[State], synced: int) -> None:
        super().__init__(platter, where)
        self.allowed = history[synced:]


def live(seed: int, root: Path, durable: bool, planted: type[Platter] = Platter) -> list[Moment]:
    """Run a random life of a journal; return its moments."""
    model = Model(seed, 5000 if seed % 3 else 70_000)
    synced = 0
    moments: list[Moment] = []
    platter = planted(
        lambda where: moments.append(Moment(platter, where, model.history, synced)),
        stores=False if seed % 4 == 0 else None,
    )
    journal = Journal(root, durable=durable, _files=platter.files)
    rhythm = model.random.choice((0.05, 0.3))
    for _ in range(40):
        model.invent(journal)
        moments.append(Moment(platter, "after an operation", model.history, synced))
        if model.random.random() < rhythm:
            journal.sync()
            synced = len(model.history) - 1
            moments.append(Moment(platter, "after a sync", model.history, synced))
        if model.random.random() < 0.1:
            journal.remove_retired()
    journal.abandon()
    platter.close()
    return moments


def draw_states(moments: list[Moment], root: Path, seed: int, durable: bool, counts: Counter[str]) -> list[str]:
    rng = random.Random(seed)
    wrong = []
    for moment in rng.sample(moments, min(40, len(moments))):
        for _ in range(12):
            drawn: Drawn = moment.draw(rng)
            drawn.build(root)
            counts.update(states=1, holes=drawn.hole, names=drawn.renamed)
            try:
                journal = Journal(root, durable=durable, _files=QuietDirectory)
                found = state_of(journal)
                journal.abandon()
                journal = Journal(root, durable=durable, _files=QuietDirectory)
                again = state_of(journal)
                journal.abandon()
                if again != found:
                    raise AssertionError("a second opening finds another state")
                if found not in moment.allowed:
                    raise AssertionError("not a state since the last sync")
            except (AssertionError, CorruptionError) as error:
                wrong.append(f"seed {seed}, {moment.where}: {error}")
            else:
                counts.update(less=found != moment.allowed[-1], full=found == moment.allowed[-1])
    return wrong


@pytest.mark.parametrize("durable", [False, True])
def test_power_loss_takes_nothing_that_was_synced(durable: bool) -> None:
    """Whatever unsynced pages and names are lost, the journal opens as one of the states since the last sync, twice."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    with memory_directory() as root:
        for seed in range(10):
            moments = live(seed, root / f"life-{seed}", durable)
            wrong += draw_states(moments, root / f"drawn-{seed}", seed, durable, counts)
    print(dict(counts))
    assert not wrong, "\n".join(wrong[:5])
    assert counts["states"] > 4000
    assert min(counts["holes"], counts["names"], counts["less"], counts["full"]) > 50


@pytest.mark.parametrize("planted", [NoDirectorySync, NoSync])
def test_planted_faults_are_seen(planted: type[Platter]) -> None:
    """The simulator finds a journal whose syncs do not happen."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    with memory_directory() as root:
        for seed in range(4):
            moments = live(seed, root / f"life-{seed}", True, planted)
            wrong += draw_states(moments, root / f"drawn-{seed}", seed, True, counts)
    assert wrong


def test_the_first_sync_after_a_kill_rewrites_unsynced_frames(tmp_path: Path) -> None:
    """The first sync after a kill rewrites what the killed process wrote, although the cache has it already."""
    disk = Disk()
    journal = Journal(tmp_path, durable=True)
    journal.add(b"in doubt", 1, 1)
    journal.abandon()
    journal = Journal(tmp_path, durable=True, _files=disk.files)
    assert journal.synced_index == 0
    disk.forget()
    journal.sync()
    assert any(b"in doubt" in call.arguments[1] for call in disk.calls if call.method == "write")
    assert journal.synced_index == 1
    journal.close()


def test_new_entries_start_no_writeback_of_found_ones(tmp_path: Path) -> None:
    """New entries do not start writeback of entries that an earlier process appended."""
    journal = Journal(tmp_path)
    for index in range(1, 7):
        journal.add(bytes(1_000_000), index, 1)
    journal.abandon()
    told = []

    class Files(Directory):
        def start_writeback(self, *arguments: object) -> None:
            told.append(arguments)

    journal = Journal(tmp_path, _files=Files)
    journal.add(b"", 7, 1)
    journal.add(b"", 8, 1)
    assert told == []
    journal.close()


# ---- pointers -------------------------------------------------------------------------------------------------

def test_none_is_not_a_command(tmp_path: Path) -> None:
    """None as a command is a ``TypeError``, and nothing is appended."""
    nothing: Any = None
    with closing(Journal(tmp_path / "journal")) as journal:
        for call in (journal.add, journal.rebase):
            with pytest.raises(TypeError):
                call(nothing, 1, 1)
        assert len(journal) == 0


def test_a_slice_whose_numbers_remove_entries(tmp_path: Path) -> None:
    """A slice whose ``__index__`` cuts the journal returns the entries that are left, and reads nothing beyond."""
    with closing(Journal(tmp_path / "journal")) as journal:
        for i in range(1, 100):
            journal.add(b"command-%d" % i, i, 1)

        class Cutting:
            def __index__(self) -> int:
                journal.cut(3)
                return 0

        assert journal[Cutting() : 99] == [(b"command-1", 1, 1), (b"command-2", 2, 1)]


def test_the_commit_index_never_passes_the_last_entry(tmp_path: Path) -> None:
    """Removing entries also moves the commit index back, in memory and after reopening."""
    journal = Journal(tmp_path)
    for index in (5, 6, 7):
        journal.add(b"", index, 1)
    journal.set_commit_index(7)
    journal.write_commit_index()
    journal.clear()
    assert (journal.last_index, journal.commit_index) == (0, 0)
    journal.add(b"new", 1, 2)
    assert (journal.last_index, journal.commit_index) == (1, 0)
    journal.set_commit_index(1)
    journal.write_commit_index()
    journal.abandon()
    journal = Journal(tmp_path)
    assert (journal.last_index, journal.commit_index) == (1, 1)
    journal.close()


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 2**63, 2**64 - 5, 2**64 - 1])
@pytest.mark.parametrize("index", [0, 1, 4, 5, 10, 11, 2**64 - 1])
def test_ranges_of_any_size_end_where_the_entries_do(tmp_path: Path, index: int, count: int) -> None:
    """A range beyond the last entry returns the entries that exist; one that starts outside returns nothing."""
    journal = Journal(tmp_path)
    for each in range(4, 11):
        journal.add(b"c%d" % each, each, 1)
    expected = list(range(index, min(index + count, 11))) if 4 <= index <= 10 else []
    assert [each for _, each, _ in journal.entries(index, count)] == expected
    assert [each for each, _, _ in journal.marked(index, count, 2**64 - 1, ord("c"), b"")[0]] == expected
    journal.close()
