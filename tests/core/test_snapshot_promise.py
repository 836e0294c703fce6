"""The promise to the host: it may drop what a snapshot includes from its own log when the call returns.

The power fails at each moment of a life that writes snapshots. The snapshot's directory and the state's are drawn
together, each independently; a host whose log starts after the last snapshot that returned must be able to continue.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastsm import Entry, FastsmError, FastStateMachine, LogId, MemoryStateMachine, SnapshotMetadata
from fastsm.core import generations
from fastsm.snapshot.writer import PreparedSnapshot
from support.faulty import memory_directory
from support.histories import History, state_of
from support.inside import inside
from support.power import Drawn, Platter, Point, QuietDirectory
from support.simulation import SHELF, kill, shelved

SEEDS = range(4)
DRAWS = 4


pytestmark = pytest.mark.usefixtures("quiet")


class Moment(Point):
    """A point in time; what had returned by then, and what may have begun."""

    def __init__(self, host: Host, where: str) -> None:
        super().__init__(host.platter, where)
        self.dropped = host.dropped
        self.under_way = host.under_way
        self.applied = len(host.entries)


class Host:
    """Applies without flushing, and now and then writes a snapshot and drops its log up to it."""

    living: FastStateMachine | None = None

    def __init__(self, path: Path, seed: int, planted: type[Platter]) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.history = History(seed, large=False)
        self.platter = planted(lambda where: self.moments.append(Moment(self, where)))
        self.moments: list[Moment] = []
        self.entries: list[Entry] = []
        self.dropped = LogId()
        self.under_way: LogId | None = None

    def live(self) -> None:
        machine = Host.living = FastStateMachine(self.path, retain_entries=4, _files=self.platter.files)
        try:
            for _ in range(6):
                for _ in range(self.random.randrange(1, 5)):
                    chunk = self.history.chunk()
                    self.entries += chunk
                    machine.apply(chunk)
                self.write_snapshot(machine)
                self.platter.note("after the snapshot")
                if self.random.random() < 0.3:
                    machine.compact()
        finally:
            kill(machine)

    def write_snapshot(self, machine: FastStateMachine) -> None:
        after = [entry for entry in self.entries if entry.index > self.dropped.index]
        index, term, _ = self.random.choice((*after[-3:], after[-1]))
        self.under_way = LogId(index, term)
        machine.write_snapshot(self.path / SHELF, self.under_way, compress=self.random.choice(("none", "zstd")))
        self.dropped, self.under_way = self.under_way, None


def judge(drawn: Drawn, moment: Moment, host: Host, path: Path) -> bool:
    """Return whether the host can continue; also check whether the snapshot being written is recorded already."""
    drawn.build(path)
    machine = FastStateMachine(path, _files=QuietDirectory)
    try:
        assert machine.last_applied() >= moment.dropped, "entries are gone that the host has dropped"
        found, known = shelved(path), machine.snapshot_metadata()
        assert found in {moment.dropped, moment.under_way} - {LogId()} or moment.dropped == LogId()
        if moment.dropped != LogId():
            assert isinstance(known, SnapshotMetadata)
            assert known.last_included >= moment.dropped
        if known is not None:
            assert found is not None, "metadata of a snapshot that is nowhere"
            assert found >= known.last_included, "metadata of a snapshot that is not there yet"
        # The rest of the host's log brings the state to where it was.
        machine.apply([e for e in host.entries[: moment.applied] if e.index > machine.last_applied().index])
        model = MemoryStateMachine()
        model.apply(host.entries[: moment.applied])
        assert state_of(machine) == state_of(model)
        return known is not None and known.last_included == moment.under_way
    finally:
        kill(machine)


def violations(seed: int, planted: type[Platter], counts: Counter[str]) -> Iterator[str]:
    """Yield the violations at all moments of a life, in some states of each."""
    with memory_directory() as root:
        host = Host(root / "state", seed, planted)
        host.live()
        for moment in host.moments:
            for _ in range(DRAWS if moment.unsure else 1):
                drawn = moment.draw(host.random)
                counts["states"] += 1
                counts["names lost"] += drawn.renamed
                counts["after a return"] += moment.dropped != LogId()
                try:
                    counts["under way, and known"] += judge(drawn, moment, host, root / "drawn")
                except (AssertionError, FastsmError) as error:
                    yield f"seed {seed}, {moment.where}: {error!r}"
        host.platter.close()


def test_host_that_dropped_its_log_up_to_a_snapshot_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the return everything that the snapshot includes is there; before it, no metadata without its snapshot."""
    counts: Counter[str] = Counter()
    for seed in SEEDS:
        monkeypatch.setattr(generations, "SAVE_TABLE_ABOVE", 0 if seed % 2 else 4 << 20)
        found = list(violations(seed, Platter, counts))
        assert not found, "\n".join(found[:5])
    print(dict(counts))
    assert counts["states"] >= 4_000
    assert counts["after a return"] >= 3_000
    assert counts["names lost"] >= 200
    assert counts["under way, and known"] >= 50


# ---- planted faults --------------------------------------------------------------------------------------


class ShelfNotSynced(Platter):
    """The directory of snapshots is never synced."""

    def sync_directory(self, folder: str = "") -> None:
        if not folder:
            super().sync_directory(folder)


class SnapshotNotSynced(Platter):
    """The content of snapshots is never synced."""

    def sync(self, fd: int) -> None:
        file = self._watch(fd)
        names = [name for name, number in self.names.items() if self.watched[number] is file]
        if not any(name.startswith(SHELF) for name in names):
            super().sync(fd)


class LogNotSynced(Platter):
    """The log is synced when it is made, and never again."""

    def sync(self, fd: int) -> None:
        file = self._watch(fd)
        names = [name for name, number in self.names.items() if self.watched[number] is file]
        if not file.syncs or not any(name.startswith("log-") for name in names):
            super().sync(fd)


@pytest.mark.parametrize("planted", [ShelfNotSynced, SnapshotNotSynced, LogNotSynced])
def test_a_disk_that_does_not_sync_is_found(planted: type[Platter]) -> None:
    """Each of the three syncs of a snapshot is needed for the promise."""
    assert any(next(violations(seed, planted, Counter()), None) for seed in SEEDS)


def test_metadata_before_the_rename_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot that is renamed after the metadata's frame may be missing although the state records it."""
    commit = PreparedSnapshot.commit

    def commit_late(prepared: PreparedSnapshot) -> None:
        assert Host.living is not None
        inside(Host.living).note_metadata(prepared.metadata)
        inside(Host.living).write_state(True)
        inside(Host.living).log.sync()
        commit(prepared)

    monkeypatch.setattr(PreparedSnapshot, "commit", commit_late)
    assert any(next(violations(seed, Platter, Counter()), None) for seed in SEEDS)
