"""Power loss: each unsynced page is on the disk or not; the recovered state is a prefix of whole chunks.

The simulator (support/power.py, stories.py, simulation.py) draws the states; the planted faults below show that it
finds mistakes. `tests/soak.py` runs it for as long as you like.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastsm
from fastsm import CorruptionError, FastStateMachine, LogId, StorageError
from fastsm.disk import mapping
from fastsm.disk.files import Directory
from support.faulty import memory_directory
from support.planted import CutNotSynced, NotWrittenAgain
from support.power import PAGE, SECTOR, File, Image, NoDirectorySync, NoSync, Platter, Point, QuietDirectory
from support.simulation import Simulation, kill

SEEDS = range(14)


pytestmark = pytest.mark.usefixtures("quiet")


def test_every_state_is_a_prefix_that_holds_what_was_durable() -> None:
    """Any state that a power loss may leave opens as a prefix of whole chunks, with everything that was durable."""
    counts: Counter[str] = Counter()
    violations: list[str] = []
    with memory_directory() as root:
        for seed in SEEDS:
            simulation = Simulation(seed, root).run()
            counts += simulation.counts
            violations += simulation.violations
    print(dict(counts))
    assert not violations, "\n".join(violations[:5])
    assert counts["states"] >= 20_000
    assert counts["with holes"] >= 1_000
    # A simulator that does nothing finds nothing, so each class of states and of points must have occurred.
    assert counts["torn within a page"] >= 1_000
    assert counts["names lost"] >= 500
    assert counts["after 1 crashes"] >= 1_000
    assert counts["after 2 crashes"] >= 1_000
    assert counts["recovered in full"] >= 1_000
    assert counts["recovered less"] >= 1_000
    assert counts["with expect_applied"] >= 5_000
    assert counts["failed syncs"] >= 50
    assert counts["applied during a sync"] >= 15
    assert counts["kills"] >= 50
    assert counts["after a base"] >= 5_000
    assert counts["by a saved table"] >= 1_000
    assert counts["by a saved order"] >= 500
    assert counts["with a snapshot"] >= 3_000
    for trait in (
        "gaps", 'sync="apply"', "frames over 64 KiB", "rare flushes", "frequent flushes", "saved tables",
        "saved orders",
    ):  # fmt: skip
        assert counts[f"stories with {trait}"] > 0
    assert counts["stories without stores"] > 0
    assert counts["stories in order"] > 0
    for when in ("before", "after"):
        for what in ("create", "write", "sync", "rename", "unlink", "truncate", "allocate", "sync_directory"):
            assert counts[f"{when} {what}"] > 0, f"no state of a moment {when} {what}"
    operations = ("apply", "flush", "save", "update", "clear", "close", "overlap", "open")
    for operation in (*operations, "snapshot", "install", "compact"):
        assert counts[f"after {operation}"] > 0, f"no state of a moment after {operation}"


# ---- planted faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", [NoSync, CutNotSynced, NotWrittenAgain])
def test_planted_fault_is_found(planted: type[Platter]) -> None:
    """Each of these mistakes leads to a violation within the stories that are played.

    The best-known mistakes are in `faults/test_planted_bugs.py`.
    """
    with memory_directory() as root:
        assert any(Simulation(seed, root, planted, most_violations=1).run().violations for seed in SEEDS)


# ---- a failed sync, step by step ------------------------------------------------------------------------


@pytest.mark.parametrize("stores", [None, False])
@pytest.mark.parametrize("planted", [Platter, NotWrittenAgain])
def test_nothing_that_counted_is_gone_after_a_failed_sync(
    tmp_path: Path, stores: bool | None, planted: type[Platter]
) -> None:
    """After a failed sync, a kill, a reopening, a flush and a power loss, everything that was flushed is there."""
    path = tmp_path / "state"
    platter = planted(lambda where: None, stores=stores)
    machine = FastStateMachine(path, _files=platter.files)
    for index in range(1, 20):
        machine.apply([(index, 1, fastsm.put(b"key-%d" % index, b"v" * 700))])
        if index == 5:
            machine.flush()
    platter.fail_next()
    with pytest.raises(StorageError):
        machine.flush()
    assert machine.durable() == LogId(5, 1)
    kill(machine)

    machine = FastStateMachine(path, _files=platter.files)
    assert machine.last_applied() == LogId(19, 1)
    assert machine.durable() == LogId(5, 1)
    machine.flush()
    assert machine.durable() == LogId(19, 1)
    point = Point(platter, "after the flush")
    kill(machine)
    platter.close()

    found = set()
    rng = random.Random(1)
    for _ in range(100):  # one in twenty draws loses everything that was not synced
        point.draw(rng).build(tmp_path / "drawn")
        with FastStateMachine(tmp_path / "drawn", _files=QuietDirectory) as recovered:
            found.add(recovered.last_applied().index)
    assert (min(found) == 19) == (planted is Platter)


# ---- killed in the step from one log to the next -------------------------------------------------------


@pytest.mark.parametrize("step", ["creation", "reset"])
@pytest.mark.parametrize("planted", [Platter, NoDirectorySync])
def test_flush_after_a_switch_that_was_not_synced(
    tmp_path: Path, step: str, planted: type[Platter]
) -> None:
    """After a kill between the rename of CURRENT and its sync, a flush of the next life also syncs the rename."""
    switched: list[Point] = []

    def note(where: str) -> None:
        if where == "before sync_directory" and platter.changes and platter.changes[-1].name == "CURRENT":
            switched.append(Point(platter, where))

    platter = Platter(note)
    with FastStateMachine(tmp_path / "first", _files=platter.files) as machine:
        if step == "reset":
            machine.apply([(1, 1, fastsm.put(b"old", b"1"))])
            machine.flush()
            machine.clear()
    platter.close()
    moment = switched[0 if step == "creation" else 1]

    moment.killed().build(tmp_path / "second")
    platter = planted(lambda where: None)
    platter.take_over(tmp_path / "second", moment.killed(), moment)
    machine = FastStateMachine(tmp_path / "second", _files=platter.files)
    assert machine.last_applied() == LogId()
    machine.apply([(1, 2, fastsm.put(b"new", b"2"))])
    machine.flush()
    point = Point(platter, "after the flush")
    kill(machine)
    platter.close()

    found = set()
    rng = random.Random(1)
    for _ in range(50):
        point.draw(rng).build(tmp_path / "drawn")
        try:
            with FastStateMachine(tmp_path / "drawn", _files=QuietDirectory) as recovered:
                found.add((recovered.get(b"old"), recovered.get(b"new")))
        except CorruptionError:
            found.add("corrupt")
    assert (found == {(None, b"2")}) == (planted is Platter)


# ---- the simulator itself -------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    """Provide a synced file of three pages of 1."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"\1" * 3 * PAGE, 0)
    watched = File(fd)
    watched.keep(watched.look())
    yield watched
    os.close(fd)


def overwrite(file: File, page: int, byte: int) -> None:
    os.pwrite(file.fd, bytes([byte]) * PAGE, page * PAGE)


def drawn_pages(file: File, page: int) -> set[bytes]:
    rng = random.Random(1)
    state = file.state()
    return {bytes(sorted(set(state.draw(rng).image.page(page)))) for _ in range(300)}


def test_synced_pages_are_kept_and_others_may_be_old_new_or_torn(file: File) -> None:
    """Synced pages are in every state; a page written since is old, new, or torn between sectors."""
    overwrite(file, 1, 2)
    file.look()
    overwrite(file, 1, 3)
    assert drawn_pages(file, 0) == {b"\1"}
    assert drawn_pages(file, 1) == {b"\1", b"\2", b"\3", b"\1\2", b"\1\3"}
    torn = {state.draw(random.Random(seed)).image.page(1) for state in [file.state()] for seed in range(300)}
    for page in torn:
        for at in range(0, PAGE, SECTOR):
            assert len(set(page[at : at + SECTOR])) == 1


def test_failed_sync_loses_pages_until_they_are_written_again(file: File) -> None:
    """After a failed sync, the next one covers only pages that were written since."""
    overwrite(file, 0, 2)
    overwrite(file, 1, 2)
    file.lose()
    overwrite(file, 1, 3)
    file.keep(file.look())
    assert file.kept == Image(b"\1" * PAGE + b"\3" * PAGE + b"\1" * PAGE, 3 * PAGE)
    file.written(PAGE - 1, 1)
    file.keep(file.look())
    assert file.kept == Image(b"\2" * PAGE + b"\3" * PAGE + b"\1" * PAGE, 3 * PAGE)


def test_rename_happens_as_a_whole_or_not(tmp_path: Path) -> None:
    """After an unsynced rename, the target's name has the old file's or the new file's content."""
    platter = Platter(lambda where: None)
    directory = platter.files(tmp_path / "state")
    try:
        directory.replace_file("CURRENT", b"old")
        directory.sync_directory = lambda: None  # type: ignore[method-assign]
        directory.replace_file("CURRENT", b"new")
        point = Point(platter, "after the rename")
    finally:
        directory.close()
        platter.close()
    rng = random.Random(1)
    drawn = {frozenset((n, i.content) for n, i in point.draw(rng).files.items()) for _ in range(100)}
    old, new = ("CURRENT", b"old"), ("CURRENT", b"new")
    assert drawn == {frozenset({old}), frozenset({new}), frozenset({old, ("CURRENT.tmp", b"new")})}


def can_store(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return mapping.stores_are_safe(fd)
    finally:
        os.close(fd)


def test_stores_through_a_mapping_are_seen(tmp_path: Path) -> None:
    """Frames that were stored through a mapping may be lost by a power loss, and survive a kill."""
    if not can_store(tmp_path):
        pytest.skip("stores through a mapping are not safe on this file system")
    moments: list[str] = []
    platter = Platter(moments.append)
    machine = FastStateMachine(tmp_path / "state", _files=platter.files)
    machine.apply([(1, 1, fastsm.put(b"a", b"1"))])
    before = len(moments)
    machine.apply([(2, 1, fastsm.put(b"b", b"2" * 5000))])
    assert len(moments) == before
    point = Point(platter, "after apply")
    kill(machine)
    platter.close()
    point.killed().build(tmp_path / "killed")
    with FastStateMachine(tmp_path / "killed", _files=Directory) as found:
        assert found.last_applied() == LogId(2, 1)
    assert point.unsure == 3  # two pages of the log, one of which also has its header, and the page of PUBLISHED
