"""Snapshots, compactions and installs while something else happens at the worst moment, step by step."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import fastsm
from fastsm import FastStateMachine, LogId, NotRunningError, SnapshotError, StorageError, open_snapshot
from fastsm.generation import current as generation
from support.faulty import PATIENCE, Disk, in_thread
from support.histories import History, model_of, state_of
from support.inside import inside

MachineAt = Callable[..., FastStateMachine]
Entries = list[tuple[int, int, bytes]]


def entries(first: int, last: int) -> Entries:
    """Return entries with one put each, of a few keys."""
    return [(index, 1, fastsm.put(b"key-%d" % (index % 5), b"%d" % index)) for index in range(first, last + 1)]


def apply(machine: FastStateMachine, first: int, last: int) -> None:
    """Apply each entry as a chunk of its own."""
    for index in range(first, last + 1):
        assert machine.apply(entries(index, index)) == [True]


@pytest.fixture
def with_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save tables of states of any size."""
    monkeypatch.setattr("fastsm.core.generations.SAVE_TABLE_ABOVE", 0)


# ---- a snapshot and the writer ---------------------------------------------------------------------------


class Nowhere:
    """A directory that discards what a capture writes."""

    write = staticmethod(lambda fd, data, offset: None)


def test_a_capture_holds_each_key_once_however_fast_the_same_keys_are_written(directory: Path) -> None:
    """A record is not revived if its successor is overwritten while the map of dead records is copied."""
    machine = FastStateMachine(directory, auto_compact=False)
    machine.apply(entries(1, 5))
    ending = threading.Event()
    pad = b"#" * 2000

    def write() -> None:
        while not ending.is_set():
            index = machine.last_applied().index + 1
            if index > 20_000:
                machine.clear()
                machine.apply(entries(1, 5))
            else:
                machine.apply([(index, 1, fastsm.put(b"key-%d" % (index % 5), pad))])

    with in_thread(write):
        try:
            stop = time.monotonic() + 2  # without the fix, some 20 of thousands of captures were wrong
            while time.monotonic() < stop:
                capture = inside(machine).capture(None)
                capture.find(lambda: None)
                keys, _ = capture.write_records(Nowhere, None, 0, lambda done=0: None)
                assert keys == 5 or capture.last_included.index < 5
        finally:
            ending.set()
    machine.close()


@pytest.mark.parametrize("what", ["compact", "write_snapshot"])
def test_chunks_at_every_step_of_the_work_are_neither_lost_nor_taken_too_early(
    tmp_path: Path, directory: Path, with_tables: None, what: str
) -> None:
    """A chunk applied at any call of the seam is in the state, also after reopening, and not in the snapshot."""
    disk = Disk()
    history = History(11, large=False)
    chunks = [history.chunk() for _ in range(30)]
    machine = FastStateMachine(directory, retain_entries=8, auto_compact=False, _files=disk.files)
    for chunk in chunks:
        machine.apply(chunk)
    last = machine.last_applied()
    following = [history.chunk()]

    def interfere(call: object) -> None:
        disk.before = None  # applying makes calls, too
        with suppress(RuntimeError):  # raised if the call is made in the writer's own turn
            machine.apply(following[0])
            chunks.append(following.pop())
            following.append(history.chunk())
        disk.before = interfere

    disk.before = interfere
    machine.compact() if what == "compact" else machine.write_snapshot(tmp_path / "target")
    disk.before = None
    if what == "write_snapshot":
        with FastStateMachine(tmp_path / "other") as other:
            other.install_snapshot(None, tmp_path / "target")
            assert state_of(other) == state_of(model_of(chunks[:30]))
            assert other.last_applied() == last
    assert len(chunks) > 40
    for _ in range(2):
        inside(machine).check()
        machine.verify()
        assert state_of(machine) == state_of(model_of(chunks))
        machine.close()
        machine = FastStateMachine(directory)
    machine.close()


def test_a_snapshot_as_of_each_chunk_installs_as_that_state(
    tmp_path: Path, directory: Path, machine_at: MachineAt
) -> None:
    """A snapshot as of an earlier chunk has that chunk's values and deletes, before and after a compaction."""
    history = History(12, large=False)
    chunks = [history.chunk(5) for _ in range(24)]
    machine, other = machine_at(directory, auto_compact=False), machine_at(tmp_path / "other")
    for chunk in chunks:
        machine.apply(chunk)
    for number in (*range(1, 25), *range(12, 25)):
        if number == 24:
            machine.compact(chunks[11][-1].index)
        machine.write_snapshot(tmp_path, chunks[number - 1][-1][:2])
        other.install_snapshot(None, tmp_path, allow_older=True)
        assert state_of(other) == state_of(model_of(chunks[:number]))


# ---- the content of a saved table ------------------------------------------------------------------------


@pytest.mark.parametrize("between", ["nothing", "compact", "flush"])
def test_metadata_of_a_snapshot_is_in_the_table_that_is_saved(
    tmp_path: Path, directory: Path, machine_at: MachineAt, with_tables: None, between: str
) -> None:
    """A machine that is reopened from its saved table knows the metadata of the snapshot that it wrote."""
    machine = machine_at(directory, retain_entries=3)
    apply(machine, 1, 10)
    metadata = machine.write_snapshot(tmp_path)
    machine.apply(entries(11, 12))
    if between == "compact":
        machine.compact()
    elif between == "flush":
        machine.flush()
    machine.close()
    assert (directory / f"table-{1 + (between == 'compact')}").exists()
    machine = machine_at(directory)
    assert machine.snapshot_metadata() == metadata
    assert machine.last_applied() == LogId(12, 1)


def test_metadata_of_an_installed_snapshot_is_in_the_saved_table(
    tmp_path: Path, directory: Path, machine_at: MachineAt, with_tables: None
) -> None:
    """A machine that is reopened from its saved table knows the metadata of the snapshot that it installed."""
    source = machine_at(tmp_path / "source")
    source.apply(entries(1, 10))
    metadata = source.write_snapshot(tmp_path)
    machine = machine_at(directory)
    machine.install_snapshot(None, tmp_path)
    for _ in range(2):
        machine.close()
        machine = machine_at(directory)
        assert machine.snapshot_metadata() == metadata


def test_a_saved_table_that_cannot_be_read_is_not_needed(directory: Path, with_tables: None) -> None:
    """If a saved table cannot be read, base and log are read instead."""
    with FastStateMachine(directory) as machine:
        machine.apply(entries(1, 10))
    (directory / "table-1").chmod(0)
    disk = Disk()

    class Refusing(disk.files):  # type: ignore[misc,name-defined]
        def open_file(self, name: str, flags: int = os.O_RDWR) -> object:
            if name.startswith("table"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().open_file(name, flags)

    with FastStateMachine(directory, _files=Refusing) as machine:
        assert machine.last_applied() == LogId(10, 1)
        inside(machine).check()


# ---- failed syncs ----------------------------------------------------------------------------------------


def test_compaction_does_not_carry_over_a_chunk_whose_sync_failed(directory: Path) -> None:
    """With ``sync="apply"``, a chunk whose sync failed is not in the next generation, and the machine is poisoned."""
    disk = Disk()
    machine = FastStateMachine(directory, sync="apply", retain_entries=0, auto_compact=False, _files=disk.files)
    machine.apply(entries(1, 10))
    prepared = threading.Event()
    gate = None

    def progress(done: int, total: int) -> None:
        nonlocal gate
        if gate is None and (directory / "base-2").exists() and not prepared.is_set():
            gate = disk.hold("sync")  # the sync of the chunk below, which is in the log by then
            disk.fail("sync", times=1)
            prepared.set()
            gate.wait()

    def compact() -> None:
        machine.compact(10, progress=progress)

    with in_thread(compact) as compaction:
        assert prepared.wait(PATIENCE)
        with in_thread(lambda: machine.apply(entries(11, 11))) as chunk:
            while len(disk.gates) or gate is None:
                time.sleep(0.001)
            while not (directory / "log-2").exists():
                time.sleep(0.001)
            gate.open()
    assert isinstance(chunk.error, StorageError)
    assert isinstance(compaction.error, StorageError)
    assert machine.last_applied() == LogId(10, 1)
    with pytest.raises(StorageError, match="poisoned"):
        machine.apply(entries(11, 11))
    inside(machine).check()
    with pytest.raises(StorageError):
        machine.close()
    with FastStateMachine(directory) as machine:
        inside(machine).check()


def test_flush_during_a_close_whose_sync_fails_fails_too(directory: Path) -> None:
    """A flush that waits during a close whose sync fails raises, too: its entries are not durable."""
    disk = Disk()
    machine = FastStateMachine(directory, _files=disk.files)
    machine.apply(entries(1, 3))
    mark = inside(machine).mark(False)  # a flush has begun
    disk.fail("sync")
    with pytest.raises(StorageError):
        machine.close()
    with pytest.raises(StorageError, match="poisoned"):
        inside(machine).sync_to(mark)  # the flush continues


def test_snapshot_of_a_poisoned_machine_is_refused_before_anything_is_replaced(tmp_path: Path, directory: Path) -> None:
    """A poisoned machine refuses a snapshot, whose entries could not be made durable; the older snapshot stays."""
    disk = Disk()
    machine = FastStateMachine(directory, _files=disk.files)
    machine.apply(entries(1, 3))
    metadata = machine.write_snapshot(tmp_path)
    machine.apply(entries(4, 5))
    disk.fail("sync")
    with pytest.raises(StorageError):
        machine.flush()
    with pytest.raises(StorageError, match="poisoned"):
        machine.write_snapshot(tmp_path)
    assert machine.snapshot_metadata() == metadata
    with open_snapshot(tmp_path) as snapshot:
        assert snapshot.metadata == metadata
    with pytest.raises(StorageError):
        machine.close()


def test_when_it_is_unknown_what_current_names_the_machine_is_poisoned(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the rename of CURRENT and the check of it both fail, nothing more is acknowledged in the old log."""
    disk = Disk()
    machine = FastStateMachine(directory, _files=disk.files)
    machine.apply(entries(1, 3))
    disk.fail("rename", done=True)
    monkeypatch.setattr(generation, "still_current", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        machine.clear()
    with pytest.raises(StorageError, match="poisoned"):
        machine.apply(entries(4, 4))
    with pytest.raises(StorageError):
        machine.close()


# ---- close -----------------------------------------------------------------------------------------------


def test_close_within_a_compaction_ends_it(directory: Path) -> None:
    """Whenever its ``progress`` closes the machine, the compaction raises ``SnapshotError``, and the state stays."""
    calls = 1
    while True:
        machine = FastStateMachine(directory, retain_entries=3, verify_on_open="off")
        last = machine.last_applied().index
        apply(machine, last + 1, last + 10)
        left = [calls]

        def progress(done: int, total: int, machine: FastStateMachine = machine, left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                machine.close()

        try:
            machine.compact(last + 5, progress=progress)
            break
        except SnapshotError as error:
            assert "ended by a close" in str(error)  # noqa: PT017
        calls += 1
        with FastStateMachine(directory) as machine:
            inside(machine).check()
            assert machine.last_applied().index == last + 10
    machine.close()
    assert calls > 3


@pytest.mark.parametrize("what", ["compact", "install", "write_snapshot"])
def test_close_waits_for_what_it_ends(tmp_path: Path, directory: Path, what: str) -> None:
    """When close returns, no work is still running in the directory, and none of its files are left."""
    disk = Disk()
    machine = FastStateMachine(directory, retain_entries=0, _files=disk.files)
    apply(machine, 1, 10)
    machine.write_snapshot(tmp_path / "other")
    gate = disk.hold("write")
    calls = {
        "compact": lambda: machine.compact(5),
        "install": lambda: machine.install_snapshot(None, tmp_path / "other"),
        "write_snapshot": lambda: machine.write_snapshot(tmp_path / "target"),
    }
    with in_thread(calls[what]) as work:
        gate.wait()
        with in_thread(machine.close) as closing:
            while not inside(machine).jobs.closed:
                time.sleep(0.001)
            assert not closing.done
            gate.open()
    assert closing.error is None
    assert isinstance(work.error, SnapshotError)
    assert sorted(os.listdir(directory)) == ["CURRENT", "LOCK", "PUBLISHED", "log-1"]
    assert not (tmp_path / "target").exists() or os.listdir(tmp_path / "target") == []


def test_close_ends_the_snapshot_of_a_coroutine(tmp_path: Path, directory: Path) -> None:
    """A close ends a running ``generate_snapshot_data`` instead of waiting until all of it is written."""
    disk = Disk()
    machine = FastStateMachine(directory, _files=disk.files)
    machine.apply(entries(1, 10))
    gate = disk.hold("write")

    async def story() -> None:
        task = asyncio.create_task(machine.generate_snapshot_data(tmp_path, None))
        await asyncio.to_thread(gate.wait)
        with in_thread(machine.close):
            while not inside(machine).jobs.closed:
                await asyncio.sleep(0.001)
            gate.open()
        with pytest.raises(SnapshotError, match="ended by a close"):
            await task

    asyncio.run(story())
    assert os.listdir(tmp_path) == [directory.name]


def test_nothing_begins_after_a_close(tmp_path: Path, directory: Path) -> None:
    """A snapshot, compaction or install of a closed machine raises ``NotRunningError``."""
    machine = FastStateMachine(directory)
    machine.apply(entries(1, 10))
    machine.close()
    for call in (
        lambda: machine.write_snapshot(tmp_path),
        lambda: machine.compact(5),
        lambda: machine.install_snapshot(None, tmp_path),
    ):
        with pytest.raises(NotRunningError):
            call()


# ---- the policy ------------------------------------------------------------------------------------------


def test_a_chunk_is_applied_although_no_thread_can_be_had_to_compact(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no thread can be started to compact, ``apply`` still succeeds, and a later chunk starts the compaction."""
    machine = FastStateMachine(directory, compact_ratio=0, compact_floor=0, retain_entries=0)
    refused = []

    def refuse(*_: object) -> None:
        refused.append(True)
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("fastsm.core.engine.start_new_thread", refuse)
        for first in range(1, 30, 10):
            assert machine.apply(entries(first, first + 9)) == [True] * 10
    assert len(refused) == 3
    machine.apply(entries(31, 40))
    deadline = time.monotonic() + PATIENCE
    while machine.stats().generation == 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert machine.stats().generation > 1
    machine.close()
