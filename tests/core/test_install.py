"""Installing snapshots: one step, after which everything is the snapshot's, and before which nothing is."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import fastsm
from fastsm import (
    ChecksumMismatchError,
    FastStateMachine,
    LogId,
    MemoryStateMachine,
    OrderError,
    ReadOnlyError,
    SnapshotError,
    SnapshotFormatError,
    SnapshotMetadata,
    StaleSnapshotError,
    open_snapshot,
)
from support.faulty import crash_copy
from support.histories import KEYS, History, state_of
from support.inside import inside

FILE = "snapshot.fsm"


@pytest.fixture
def source(tmp_path: Path) -> MemoryStateMachine:
    """The model after a history with terms and configs; ``tmp_path / "source"`` holds its snapshot."""
    history = History(1, large=False)
    model = MemoryStateMachine()
    for _ in range(60):
        model.apply(history.chunk())
    model.apply([history.entry()._replace(command=fastsm.config(b"a,b,c"))])
    model.write_snapshot(tmp_path / "source")
    return model


@pytest.fixture
def follower(directory: Path, machine_at: Callable[..., FastStateMachine]) -> FastStateMachine:
    """A machine that is late, and even has another history."""
    machine = machine_at(directory)
    machine.apply([(1, 1, fastsm.put(b"old", b"1")), (2, 1, fastsm.put(b"key-1", b"old value"))])
    return machine


def everything(machine: FastStateMachine | MemoryStateMachine) -> dict[str, object]:
    state = state_of(machine)
    state["all terms"] = [machine.entry_term(index) for index in range(machine.last_applied().index + 2)]
    state["modified"] = [machine.modified(key) for key in KEYS]
    return state


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_all_is_the_snapshots_afterwards(
    source: MemoryStateMachine, follower: FastStateMachine, tmp_path: Path, compress: str
) -> None:
    """Values, terms, membership, last applied, the entry that wrote each key, and metadata, even after reopening."""
    metadata = source.write_snapshot(tmp_path / "source", compress=compress, attachment=b"raft's own")
    before = (tmp_path / "source" / FILE).read_bytes()
    follower.install_snapshot(metadata, tmp_path / "source" / FILE)
    for _ in range(2):
        assert everything(follower) == everything(source)
        assert follower.snapshot_metadata() == metadata
        assert follower.durable() == follower.last_applied() == metadata.last_included
        assert follower.get(b"old") is None
        inside(follower).check()
        follower.close()
        follower = FastStateMachine(follower.path)
    follower.close()
    assert (tmp_path / "source" / FILE).read_bytes() == before, "the file is left as it was"


def test_entries_continue_after_an_install(
    source: MemoryStateMachine, follower: FastStateMachine, tmp_path: Path
) -> None:
    """The next entry is the one after the last included one; entries up to there are skipped."""
    follower.install_snapshot(None, tmp_path / "source")
    index, term = source.last_applied()
    replayed = [(index - 1, source.entry_term(index - 1), b"not looked at"), (index, term, b"")]
    assert follower.apply([*replayed, (index + 1, term, fastsm.put(b"new", b"1"))]) == [None, None, True]
    with pytest.raises(OrderError):
        follower.apply([(index, term + 1, fastsm.noop())])
    with pytest.raises(OrderError):
        follower.apply([(index + 3, term, fastsm.noop())])
    source.apply([(index + 1, term, fastsm.put(b"new", b"1"))])
    assert everything(follower) == everything(source)
    follower.write_snapshot(tmp_path / "again")
    source.write_snapshot(tmp_path / "source")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "source" / FILE).read_bytes()


def test_views_and_iterators_from_before_stay_as_they_were(
    follower: FastStateMachine, source: MemoryStateMachine, tmp_path: Path
) -> None:
    """Views and iterators show the old state while they are held; its pages are freed with the last of them."""
    view, iterator = follower.get_view(b"key-1"), follower.items()
    assert next(iterator) == (b"old", b"1")
    follower.install_snapshot(None, tmp_path / "source")
    follower.install_snapshot(None, tmp_path / "source")
    assert bytes(view or b"") == b"old value"
    assert list(iterator) == [(b"key-1", b"old value")]
    assert follower.stats().pinned_bytes > 0
    del view, iterator
    gc.collect()
    assert follower.stats().pinned_bytes == 0


def test_an_older_snapshot_is_refused_unless_allowed(
    follower: FastStateMachine, source: MemoryStateMachine, tmp_path: Path
) -> None:
    """The message contains both ids; ``allow_older`` goes back to that state completely."""
    older = MemoryStateMachine()
    older.apply([(1, 1, fastsm.put(b"old", b"1"))])
    metadata = older.write_snapshot(tmp_path / "older")
    with pytest.raises(StaleSnapshotError, match=r"\(index=2, term=1\) \(last applied\).* LogId\(index=1, term=1\)"):
        follower.install_snapshot(metadata, tmp_path / "older")
    assert follower.last_applied() == LogId(2, 1)
    follower.install_snapshot(metadata, tmp_path / "older", allow_older=True)
    assert everything(follower) == everything(older)
    assert follower.apply([(2, 1, fastsm.put(b"another", b"2"))]) == [True]


def test_a_damaged_file_that_is_older_as_well_is_damaged(follower: FastStateMachine, tmp_path: Path) -> None:
    """Checksums are compared before ages."""
    older = MemoryStateMachine()
    older.apply([(1, 1, fastsm.put(b"old", b"1"))])
    older.write_snapshot(tmp_path)
    damage(tmp_path / FILE, -1)
    with pytest.raises(ChecksumMismatchError):
        follower.install_snapshot(None, tmp_path)


def test_the_empty_state_can_be_installed(directory: Path, tmp_path: Path, follower: FastStateMachine) -> None:
    """A snapshot of the empty state leaves nothing, and needs no base."""
    empty = MemoryStateMachine()
    metadata = empty.write_snapshot(tmp_path / "empty", attachment=b"raft's own")
    follower.install_snapshot(metadata, tmp_path / "empty", allow_older=True)
    assert everything(follower) == everything(empty)
    assert follower.snapshot_metadata() == metadata
    assert sorted(os.listdir(directory)) == ["CURRENT", "LOCK", "PUBLISHED", "log-2"]


# ---- what is refused -------------------------------------------------------------------------------------


def damage(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def assert_untouched(machine: FastStateMachine, directory: Path) -> None:
    assert machine.get(b"old") == b"1"
    assert machine.last_applied() == LogId(2, 1)
    assert machine.snapshot_metadata() is None
    names = {name for name in os.listdir(directory) if not name.startswith("table")}
    assert names == {"CURRENT", "LOCK", "PUBLISHED", "log-1"}
    inside(machine).check()


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_every_byte_is_checked(
    source: MemoryStateMachine, follower: FastStateMachine, directory: Path, tmp_path: Path, compress: str
) -> None:
    """A flipped bit anywhere, and a file cut anywhere, is a typed error; the old state is intact."""
    source.write_snapshot(tmp_path / "source", compress=compress, attachment=b"raft's own")
    path = tmp_path / "source" / FILE
    content = path.read_bytes()
    for offset in [*range(200), *range(200, len(content), 1 + len(content) // 150)]:
        damage(path, offset)
        with pytest.raises((SnapshotError, fastsm.FormatVersionError)):
            follower.install_snapshot(None, path)
        path.write_bytes(content[:offset])
        with pytest.raises(SnapshotFormatError):
            follower.install_snapshot(None, path)
        path.write_bytes(content)
    assert_untouched(follower, directory)
    follower.install_snapshot(None, path)


def test_metadata_must_be_the_files(
    source: MemoryStateMachine, follower: FastStateMachine, directory: Path, tmp_path: Path
) -> None:
    """A checksum or a last included entry other than the host was told is refused."""
    with open_snapshot(tmp_path / "source") as snapshot:
        told = snapshot.metadata
    with pytest.raises(ChecksumMismatchError, match="announced"):
        follower.install_snapshot(SnapshotMetadata(told.last_included, bytes(32)), tmp_path / "source")
    with pytest.raises(SnapshotError, match="as of"):
        follower.install_snapshot(SnapshotMetadata(LogId(9, 1), told.checksum), tmp_path / "source")
    assert_untouched(follower, directory)


def test_only_a_file_can_be_installed(follower: FastStateMachine, directory: Path, tmp_path: Path) -> None:
    """A missing file, an empty directory, a FIFO or a link is an immediate typed error that names the path."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for name in ("nothing", "empty", "fifo", "link"):
        with pytest.raises(fastsm.FastsmError, match=name):
            follower.install_snapshot(None, tmp_path / name)
    assert_untouched(follower, directory)


def test_read_only_and_stopped_machines_refuse(
    source: MemoryStateMachine, follower: FastStateMachine, directory: Path, tmp_path: Path
) -> None:
    """An install is a write, and needs a running machine."""
    follower.flush()
    with FastStateMachine(directory, read_only=True) as reader, pytest.raises(ReadOnlyError):
        reader.install_snapshot(None, tmp_path / "source")
    follower.stop()
    with pytest.raises(fastsm.NotRunningError):
        follower.install_snapshot(None, tmp_path / "source")
    follower.start()
    assert_untouched(follower, directory)


# ---- next to others ---------------------------------------------------------------------------------------


def test_coroutines_keep_their_order(source: MemoryStateMachine, follower: FastStateMachine, tmp_path: Path) -> None:
    """A chunk awaited together with an install, but after it, is applied on top of the snapshot's state."""
    metadata = source.snapshot_metadata()
    index, term = source.last_applied()

    async def story() -> list[object]:
        return await asyncio.gather(
            follower.apply_chunk([(3, 1, fastsm.noop())]),
            follower.apply_snapshot_from_file(metadata, tmp_path / "source"),
            follower.apply_chunk([(index + 1, term, fastsm.put(b"after", b"1"))]),
        )

    assert asyncio.run(story()) == [[True], None, [True]]
    assert follower.last_applied() == LogId(index + 1, term)
    assert follower.get(b"after") == b"1"


def test_readers_see_the_old_state_or_the_new_one(
    source: MemoryStateMachine, follower: FastStateMachine, tmp_path: Path
) -> None:
    """``get_many`` concurrent with installs, back and forth, never sees a mixture."""
    old_metadata = follower.write_snapshot(tmp_path / "old")
    states = {tuple(follower.get_many(KEYS)), tuple(source.get_many(KEYS))}
    seen = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(tuple(follower.get_many(KEYS)))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        follower.install_snapshot(None, tmp_path / "source")
        follower.install_snapshot(old_metadata, tmp_path / "old", allow_older=True)
    stop.set()
    for thread in threads:
        thread.join()
    assert seen <= states


def test_a_killed_install_leaves_old_or_new(
    source: MemoryStateMachine, follower: FastStateMachine, directory: Path, tmp_path: Path
) -> None:
    """A copy of the directory at any call of ``progress`` opens as the old state."""
    old = everything(follower)
    copies = []

    def progress(done: int, total: int) -> None:
        copies.append(crash_copy(directory, tmp_path / f"copy-{len(copies)}"))
        assert 0 < done <= total

    follower.install_snapshot(None, tmp_path / "source", progress=progress)
    assert copies
    for path in copies:
        with FastStateMachine(path) as machine:
            assert everything(machine) == old
            assert not [name for name in os.listdir(path) if name.startswith("base")]
