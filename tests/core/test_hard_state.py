"""Last applied and snapshot metadata: in memory, in the next frame, durable, and after reopening."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import fastsm
from fastsm import (
    CorruptionError,
    Entry,
    FastStateMachine,
    LogId,
    MemoryStateMachine,
    OrderError,
    SnapshotFormatError,
    SnapshotMetadata,
    SnapshotRangeError,
)
from fastsm.core.hard_state import append_metadata
from support.faulty import Disk, contents, crash_copy
from support.inside import inside

Opener = Callable[..., FastStateMachine]


def noop(index: int, term: int = 1) -> list[Entry]:
    """Return a chunk of one entry that changes nothing."""
    return [Entry(index, term, fastsm.noop())]


def metadata(index: int, term: int = 1, fill: bytes = b"c") -> SnapshotMetadata:
    """Return snapshot metadata with some checksum."""
    return SnapshotMetadata(LogId(index, term), fill * 32)


@pytest.fixture
def machine(directory: Path, machine_at: Opener) -> FastStateMachine:
    return machine_at(directory)


# ---- last applied -----------------------------------------------------------------------------------------


def test_last_applied_of_a_new_machine_is_zero(machine: FastStateMachine) -> None:
    """LogId(0, 0) means that nothing was applied."""
    assert machine.last_applied() == machine.durable() == LogId() == LogId(0, 0)
    assert isinstance(machine.last_applied(), LogId)


def test_update_moves_last_applied_forward(machine: FastStateMachine) -> None:
    """Last applied moves to any higher index, contiguous or not; its term is known, and the next entry follows it."""
    machine.apply(noop(1))
    machine.update_last_applied(LogId(2, 1))
    machine.update_last_applied((7, 3))
    assert machine.last_applied() == LogId(7, 3)
    assert [machine.entry_term(index) for index in range(1, 9)] == [1, 1, None, None, None, None, 3, None]
    with pytest.raises(OrderError):
        machine.apply(noop(9, 3))
    assert machine.apply([*noop(7, 3), *noop(8, 3)]) == [None, True]


def test_update_to_the_same_id_does_nothing(directory: Path, machine: FastStateMachine) -> None:
    """An id equal to last applied causes no error and no frame."""
    machine.update_last_applied(LogId(0, 0))
    machine.apply(noop(1))
    machine.flush()
    size = machine.stats().log_bytes
    machine.update_last_applied(LogId(1, 1))
    machine.persist_last_applied(LogId(1, 1))
    machine.save_hard_state()
    assert machine.stats().log_bytes == size


@pytest.mark.parametrize("log_id", [(4, 2), (0, 0), (5, 1), (5, 3), (6, 1), (2**64 - 1, 2), (-1, 2), (6, 2**64)])
@pytest.mark.parametrize("pending", [True, False])
def test_update_back_or_to_another_term_is_an_order_error(
    log_id: tuple[int, int], pending: bool, machine: FastStateMachine
) -> None:
    """A lower index, another term at the same index, or a falling term is an OrderError, and nothing moves."""
    machine.apply(noop(1))
    machine.update_last_applied(LogId(5, 2))
    if not pending:
        machine.flush()
    for call in (machine.update_last_applied, machine.persist_last_applied):
        with pytest.raises(OrderError) as caught:
            call(log_id)
        assert "(index=5, term=2)" in str(caught.value) or "2**64" in str(caught.value)
    assert machine.last_applied() == LogId(5, 2)


def test_update_is_carried_by_the_next_chunk(directory: Path, tmp_path: Path, machine: FastStateMachine) -> None:
    """No later state is on disk without the id: a crash keeps both or neither."""
    machine.apply(noop(1))
    machine.update_last_applied(LogId(4, 2))
    machine.update_last_applied(LogId(5, 3))
    with FastStateMachine(crash_copy(directory, tmp_path / "before")) as copy:
        assert copy.last_applied() == LogId(1, 1)
    machine.apply([Entry(6, 3, fastsm.put(b"k", b"v"))])
    with FastStateMachine(crash_copy(directory, tmp_path / "after")) as copy:
        assert copy.last_applied() == LogId(6, 3)
        assert [copy.entry_term(index) for index in range(1, 7)] == [1, None, None, 2, 3, 3]


@pytest.mark.parametrize(
    "write", ["flush", "save_hard_state", "stop", "close", "persist_last_applied", "persist metadata"]
)
def test_update_is_carried_by_whatever_is_written_next(
    write: str, directory: Path, tmp_path: Path, machine: FastStateMachine
) -> None:
    """Flush, save, stop, close and the persisting calls write the id, and make it durable."""
    machine.update_last_applied(LogId(3, 1))
    last = LogId(3, 1)
    if write == "persist_last_applied":
        last = LogId(4, 2)
        machine.persist_last_applied(last)
    elif write == "persist metadata":
        machine.persist_last_snapshot_metadata(metadata(2))
    else:
        getattr(machine, write)()
    assert write == "close" or machine.durable() == last
    with FastStateMachine(crash_copy(directory, tmp_path / "copy")) as copy:
        assert copy.last_applied() == last
        assert copy.entry_term(3) == 1


def test_refused_chunk_keeps_what_was_noted_before_it(
    directory: Path, tmp_path: Path, machine: FastStateMachine
) -> None:
    """An error in the chunk that would have recorded an id does not lose the id."""
    machine.apply(noop(1))
    machine.update_last_applied(LogId(3, 1))
    with pytest.raises(fastsm.CommandError):
        machine.apply([*noop(4), *noop(5, 2), Entry(6, 2, b"")])
    assert machine.last_applied() == LogId(3, 1)
    machine.flush()
    with FastStateMachine(crash_copy(directory, tmp_path / "copy")) as copy:
        assert copy.last_applied() == LogId(3, 1)
        assert [copy.entry_term(index) for index in range(1, 6)] == [1, 1, 1, None, None]


def test_failed_write_keeps_what_was_noted_before_it(directory: Path, machine_at: Opener) -> None:
    """A full disk does not lose an id: the next frame records it."""
    disk = Disk(stores=False)
    machine = machine_at(directory, _files=disk.files)
    machine.apply(noop(1))
    machine.update_last_applied(LogId(3, 1))
    disk.fail("write")
    with pytest.raises(fastsm.StorageError):
        machine.apply(noop(4, 2))
    assert machine.last_applied() == LogId(3, 1)
    machine.apply(noop(4, 3))
    machine.close()
    with machine_at(directory) as machine:
        assert [machine.entry_term(index) for index in range(1, 6)] == [1, 1, 1, 3, None]


@pytest.mark.parametrize("value", [None, 5, (1,), "ab", (1.5, 1), (b"1", 1)])
def test_an_invalid_id_raises_and_changes_nothing(value: object, machine: FastStateMachine) -> None:
    """An id that is not two whole numbers raises, and last applied stays unchanged."""
    with pytest.raises((TypeError, IndexError, ValueError)):
        machine.update_last_applied(value)
    assert machine.last_applied() == LogId(0, 0)


# ---- snapshot metadata -----------------------------------------------------------------------------------


def test_metadata_is_in_memory_until_it_is_saved(
    directory: Path, tmp_path: Path, machine: FastStateMachine
) -> None:
    """A flush does not write metadata, save_hard_state does."""
    machine.apply(noop(1))
    machine.update_last_snapshot_metadata(metadata(1))
    machine.flush()
    assert machine.snapshot_metadata() == metadata(1)
    with FastStateMachine(crash_copy(directory, tmp_path / "flushed")) as copy:
        assert copy.snapshot_metadata() is None
    machine.save_hard_state()
    with FastStateMachine(crash_copy(directory, tmp_path / "saved")) as copy:
        assert copy.snapshot_metadata() == metadata(1)


def test_persisted_metadata_is_durable_on_return(directory: Path, machine_at: Opener) -> None:
    """The metadata's frame is synced before the call returns, and so is everything applied earlier."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.apply(noop(1))
    disk.forget()
    machine.persist_last_snapshot_metadata(metadata(1))
    assert disk.calls[-1].method == "sync"
    assert machine.durable() == LogId(1, 1)


def test_newest_metadata_is_what_is_read_back(directory: Path, machine_at: Opener) -> None:
    """The last one saved counts, with every byte of its checksum and the largest numbers."""
    largest = SnapshotMetadata(LogId(2**64 - 2, 2**64 - 3), bytes(range(32)))
    with machine_at(directory, contiguous=False) as machine:
        assert machine.snapshot_metadata() is None
        machine.apply(noop(2**64 - 2, 2**64 - 3))
        machine.persist_last_snapshot_metadata(metadata(1))
        machine.update_last_snapshot_metadata(metadata(2, fill=b"d"))
        machine.update_last_snapshot_metadata(largest)
        machine.save_hard_state()
    with machine_at(directory, contiguous=False) as machine:
        assert machine.snapshot_metadata() == largest
        assert isinstance(machine.snapshot_metadata().last_included, LogId)


def test_metadata_is_frozen() -> None:
    """Later changes by the caller do not change metadata."""
    with pytest.raises(AttributeError):
        metadata(1).checksum = b""


def test_a_tuple_is_not_snapshot_metadata(machine: FastStateMachine) -> None:
    """A tuple of the same shape is not accepted as SnapshotMetadata."""
    with pytest.raises(TypeError, match="SnapshotMetadata"):
        machine.update_last_snapshot_metadata((LogId(1, 1), b"c" * 32))


def test_saving_twice_writes_once(machine: FastStateMachine) -> None:
    """Unchanged hard state costs no frame."""
    machine.apply(noop(1))
    machine.persist_last_snapshot_metadata(metadata(1))
    size = machine.stats().log_bytes
    machine.save_hard_state()
    machine.save_hard_state()
    assert machine.stats().log_bytes == size


@pytest.mark.parametrize("kind", ["fast", "model"])
@pytest.mark.parametrize(
    ("last", "checksum", "error"),
    [((3, 1), bytes(32), SnapshotRangeError), ((2, 1), b"short", SnapshotFormatError),
     ((2, 1), bytes(33), SnapshotFormatError)],
    ids=["ahead of the state", "a short checksum", "a long checksum"],
)  # fmt: skip
def test_metadata_that_no_opening_would_accept_is_refused(
    kind: str, last: tuple[int, int], checksum: bytes, error: type[Exception], directory: Path, machine_at: Opener
) -> None:
    """Metadata ahead of last applied, or malformed, is refused by the call, so the directory can be opened later."""
    machine = machine_at(directory) if kind == "fast" else MemoryStateMachine()
    machine.apply([*noop(1), *noop(2)])
    wrong = SnapshotMetadata(LogId(*last), checksum)
    for note in (machine.update_last_snapshot_metadata, machine.persist_last_snapshot_metadata):
        with pytest.raises(error):
            note(wrong)
    machine.save_hard_state()
    assert machine.snapshot_metadata() is None
    if isinstance(machine, FastStateMachine):
        machine.close()
        assert machine_at(directory).last_applied() == LogId(2, 1)


def test_state_behind_its_own_metadata_is_corruption(directory: Path, tmp_path: Path) -> None:
    """The host dropped its log up to the snapshot: a state that ends earlier has a hole that cannot be filled."""
    machine = FastStateMachine(directory)
    machine.apply(noop(1))
    # The machine's own calls refuse such metadata, so another release or a tool has written it.
    append_metadata(inside(machine).log, metadata(5, 2))
    inside(machine).log.sync()
    copy = crash_copy(directory, tmp_path / "copy")
    machine.close()
    for path in (directory, copy):
        before = contents(path)
        with pytest.raises(CorruptionError) as caught:
            FastStateMachine(path)
        assert "(index=5, term=2)" in str(caught.value)
        assert contents(path) == before


def test_state_at_its_own_metadata_is_fine(directory: Path, machine_at: Opener) -> None:
    """Metadata of a snapshot of everything applied, even up to an id without a command, is accepted."""
    with machine_at(directory) as machine:
        machine.update_last_applied(LogId(5, 2))
        machine.persist_last_snapshot_metadata(metadata(5, 2))
    with machine_at(directory) as machine:
        assert machine.last_applied() == machine.snapshot_metadata().last_included == LogId(5, 2)


def test_torn_entries_before_saved_metadata_are_corruption(
    directory: Path, tmp_path: Path, machine: FastStateMachine
) -> None:
    """Entries below a snapshot's last included one that are torn away are never lost without an error."""
    machine.apply([Entry(1, 1, fastsm.put(b"k", b"v" * 100))])
    start = machine.stats().log_bytes
    machine.apply(noop(2))
    machine.persist_last_snapshot_metadata(metadata(2))
    copy = crash_copy(directory, tmp_path / "copy")
    with (copy / "log-1").open("r+b") as log:
        log.truncate(start)
    with FastStateMachine(copy) as recovered:  # the metadata is gone with the entries: an older, whole state
        assert (recovered.last_applied(), recovered.snapshot_metadata()) == (LogId(1, 1), None)
