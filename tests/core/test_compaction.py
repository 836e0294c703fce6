"""Compaction: the space of dead records is freed, and nothing else changes."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastsm
from fastsm import (
    CorruptionError,
    Entry,
    FastsmError,
    FastStateMachine,
    LogId,
    MemoryStateMachine,
    SnapshotError,
    SnapshotMetadata,
    SnapshotRangeError,
    StorageError,
)
from fastsm.core.policy import NEVER, Policy
from fastsm.generation import current as generation
from support.faulty import crash_copy, frames_of
from support.histories import KEYS, History, state_of
from support.inside import inside


def disk_bytes(directory: Path) -> int:
    """Return the size of base and log."""
    total = 0
    for path in directory.iterdir():
        if path.name.startswith(("base", "log")):
            with contextlib.suppress(FileNotFoundError):  # the old generation goes meanwhile
                total += path.stat().st_size
    return total


def overwrite(machine: FastStateMachine, count: int, *, keys: int = 10, size: int = 1000) -> None:
    """Apply ``count`` entries that each set one of a few keys."""
    first, term = machine.last_applied().index + 1, max(1, machine.last_applied().term)
    for at in range(first, first + count, 100):
        stop = min(at + 100, first + count)
        machine.apply([(i, term, fastsm.put(b"key-%d" % (i % keys), b"%d" % i * (size // 8))) for i in range(at, stop)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_compaction_changes_only_the_space(tmp_path: Path, seed: int, contiguous: bool) -> None:
    """State, terms, membership, metadata and ids are the same after a compaction, a kill, and a clean close."""
    history = History(seed, contiguous=contiguous, large=False)
    model = MemoryStateMachine(contiguous=contiguous)
    machine = FastStateMachine(tmp_path / "0", contiguous=contiguous)
    dice = random.Random(seed)
    for life in range(1, 9):
        for _ in range(10):
            chunk = history.chunk()
            machine.apply(chunk)
            model.apply(chunk)
        if dice.random() < 0.5:
            metadata = SnapshotMetadata(model.last_applied(), dice.randbytes(32))
            for one in (machine, model):
                one.update_last_snapshot_metadata(metadata)
        before = machine.stats().generation
        machine.compact(dice.randint(machine.stats().base.index, machine.last_applied().index))
        assert machine.stats().generation >= before
        inside(machine).check()
        assert machine.durable() == machine.last_applied() or machine.stats().generation == before
        copy = crash_copy(tmp_path / str(life - 1), tmp_path / str(life))
        if machine.stats().generation == before:
            with FastStateMachine(copy, contiguous=contiguous) as found:
                inside(model).metadata = found.snapshot_metadata()  # what was only noted is gone
        machine.close()
        machine = FastStateMachine(copy, contiguous=contiguous)
        for one in (machine, model):
            assert one.snapshot_metadata() == model.snapshot_metadata()
        assert state_of(machine) == state_of(model)
        assert [machine.modified(key) for key in KEYS] == [model.modified(key) for key in KEYS]
        assert list(machine.items()) == list(model.items())
    assert machine.stats().base.index > 0
    machine.close()


def test_space_comes_back(directory: Path, machine_at: Callable[..., FastStateMachine]) -> None:
    """A log that is nearly all garbage becomes a small base and a small log; dead bytes are gone."""
    machine = machine_at(directory, auto_compact=False)
    overwrite(machine, 5000)
    before = disk_bytes(directory)
    assert machine.stats().dead_bytes > 100 * machine.stats().live_bytes
    machine.compact(machine.last_applied())
    stats = machine.stats()
    assert stats.dead_bytes < 1000
    assert stats.base == machine.last_applied()
    assert disk_bytes(directory) < before / 10
    machine.verify()


def test_by_default_retained_entries_stay_in_the_log(
    directory: Path, tmp_path: Path, machine_at: Callable[..., FastStateMachine]
) -> None:
    """``compact()`` goes up to the end of a chunk, ``retain_entries`` or more before last applied."""
    machine = machine_at(directory, retain_entries=450)
    overwrite(machine, 400)
    machine.compact()
    assert machine.stats().base == LogId(), "there is nothing that may go"
    overwrite(machine, 600)
    machine.compact()
    assert machine.stats().base == LogId(500, 1)
    machine.write_snapshot(tmp_path, (550, 1))
    machine.compact()
    assert machine.stats().base == LogId(500, 1)


def test_large_values_are_retained_by_their_bytes(
    directory: Path, machine_at: Callable[..., FastStateMachine]
) -> None:
    """The lesser of ``retain_entries`` and ``retain_bytes`` counts: a hundred large entries do not stay forever."""
    machine = machine_at(directory, retain_entries=10_000, retain_bytes=1 << 20, auto_compact=False)
    for index in range(1, 101):
        machine.apply([(index, 1, fastsm.put(b"key", bytes([index]) * 100_000))])
    machine.compact()
    base = machine.stats().base.index
    assert 88 <= base <= 92, "ten entries of 100 kB are about a mebibyte"
    assert disk_bytes(directory) < 6 << 20
    machine.state_checksum((base, 1))
    with pytest.raises(SnapshotRangeError):
        machine.state_checksum((base - 1, 1))


def test_up_to_may_be_any_integer(directory: Path, machine_at: Callable[..., FastStateMachine]) -> None:
    """An id, a tuple and NumPy's integers are accepted; a float is a TypeError, and nothing happens."""
    machine = machine_at(directory)
    for index in range(1, 6):
        machine.apply([(index, 1, fastsm.noop())])
    for up_to, base in ((np.int64(1), 1), ((2, 1), 2), (LogId(3, 1), 3), (np.uint8(4), 4)):
        machine.compact(up_to)
        assert machine.stats().base == LogId(base, 1)
    for wrong in (5.0, "5"):
        with pytest.raises(TypeError):
            machine.compact(wrong)  # type: ignore[arg-type]


def test_up_to_is_rounded_down_to_the_end_of_a_chunk(
    directory: Path, machine_at: Callable[..., FastStateMachine]
) -> None:
    """An id or an index within a chunk means the end of the previous chunk; one that is out of range is refused."""
    machine = machine_at(directory)
    overwrite(machine, 500)
    machine.compact(LogId(299, 1))
    assert machine.stats().base == LogId(200, 1)
    machine.compact(200)
    machine.compact(250)
    assert machine.stats().base == LogId(200, 1)
    for wrong in (199, 501, LogId(501, 1)):
        with pytest.raises(SnapshotRangeError, match=r"200.*500"):
            machine.compact(wrong)
    machine.compact(300)
    assert machine.stats().base == LogId(300, 1)


def test_views_and_iterators_from_before_stay(directory: Path, machine_at: Callable[..., FastStateMachine]) -> None:
    """Views and iterators read the old generation until they are dropped; then its pages are freed too."""
    machine = machine_at(directory)
    overwrite(machine, 100)
    expected = machine.get(b"key-1")
    view, items = machine.get_view(b"key-1"), machine.items()
    pairs = [next(items)]
    overwrite(machine, 100)
    machine.compact(machine.last_applied())
    machine.compact(machine.last_applied())
    overwrite(machine, 100)
    machine.compact(machine.last_applied())
    assert bytes(view or b"") == expected
    assert (b"key-1", expected) in [*pairs, *items]
    assert machine.stats().pinned_bytes > 0
    del view, items
    gc.collect()
    assert machine.stats().pinned_bytes == 0


def test_everything_applied_is_durable_after_it(
    directory: Path, machine_at: Callable[..., FastStateMachine]
) -> None:
    """Everything applied is durable afterwards, including ids without a command, and metadata only in memory."""
    machine = machine_at(directory)
    overwrite(machine, 100)
    machine.update_last_applied((150, 3))
    machine.update_last_snapshot_metadata(SnapshotMetadata(LogId(100, 1), bytes(range(32))))
    machine.compact(100)
    assert machine.durable() == machine.last_applied() == LogId(150, 3)
    machine.close()
    machine = machine_at(directory)
    assert machine.last_applied() == LogId(150, 3)
    assert machine.snapshot_metadata() == SnapshotMetadata(LogId(100, 1), bytes(range(32)))


def test_reads_and_writes_go_on(directory: Path, machine_at: Callable[..., FastStateMachine]) -> None:
    """Chunks applied during a compaction are in the next generation, each completely."""
    machine = machine_at(directory)
    overwrite(machine, 3000)
    applied = []

    def progress(done: int, total: int) -> None:
        overwrite(machine, 7)
        applied.append(machine.last_applied())

    machine.compact(2900, progress=progress)
    assert len(applied) > 3
    assert machine.stats().base == LogId(2900, 1)
    index = machine.last_applied().index
    assert applied[-1].index == index
    assert machine.get(b"key-%d" % (index % 10)) == b"%d" % index * 125
    machine.close()
    machine = machine_at(directory)
    assert machine.last_applied() == applied[-1]
    assert machine.get(b"key-%d" % (index % 10)) == b"%d" % index * 125


# ---- automatic compaction --------------------------------------------------------------------------------


def test_compaction_starts_automatically(directory: Path, machine_at: Callable[..., FastStateMachine]) -> None:
    """Compaction starts when the dead bytes exceed the ratio and the floor, so disk use stays bounded."""
    machine = machine_at(directory, retain_entries=100, compact_floor=200_000)
    most = 0
    for _ in range(2000):
        overwrite(machine, 100)
        most = max(most, disk_bytes(directory))
        if machine.stats().generation >= 5:
            break
        time.sleep(0.002)
    assert machine.stats().generation >= 5
    assert 0 < machine.stats().base.index <= machine.last_applied().index - 100
    assert machine.last_applied().index * 1000 > most
    inside(machine).check()


def test_automatic_compaction_can_be_switched_off(directory: Path, machine_at: Callable[..., FastStateMachine]) -> None:
    """With ``auto_compact=False`` only ``compact()`` compacts."""
    machine = machine_at(directory, auto_compact=False, retain_entries=0, compact_floor=0, compact_ratio=0)
    overwrite(machine, 3000)
    assert machine.stats().generation == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "fastsm-compact"]


def test_policy_counts_what_died_since_the_last_time() -> None:
    """Dead bytes that are retained do not call for compaction again and again."""
    policy = Policy(ratio=0.5, floor=1000)
    assert policy.threshold(live_bytes=100, dead_bytes=0) == 1000
    assert policy.threshold(live_bytes=10_000, dead_bytes=0) == 5000
    assert policy.threshold(live_bytes=10_000, dead_bytes=700) == 5700
    assert policy._replace(enabled=False).threshold(1, 1) == NEVER
    with pytest.raises(ValueError, match="compact_floor"):
        FastStateMachine("never made", compact_floor=-1)


@pytest.mark.parametrize("ratio", [1e308, float("inf")])
def test_any_ratio_is_a_number_of_bytes(
    directory: Path, machine_at: Callable[..., FastStateMachine], ratio: float
) -> None:
    """A ratio so large that no number of dead bytes calls for a compaction: opening, resets and compactions work."""
    options: dict[str, Any] = {"compact_ratio": ratio, "compact_floor": 0, "retain_entries": 0}
    machine = machine_at(directory, **options)
    overwrite(machine, 200)
    machine.compact()
    machine.clear()
    overwrite(machine, 200)
    machine.close()
    machine = machine_at(directory, **options)
    overwrite(machine, 100)
    assert machine.stats().generation <= 3


def test_compaction_stops_at_the_entry_of_a_running_snapshot(
    directory: Path, tmp_path: Path, machine_at: Callable[..., FastStateMachine]
) -> None:
    """While a snapshot as of an entry is written, ``compact()`` goes no further than that entry."""
    machine = machine_at(directory, retain_entries=0)
    model = MemoryStateMachine()
    overwrite(machine, 300)
    overwrite(model, 300)  # type: ignore[arg-type]
    bases = []

    def progress(done: int, total: int) -> None:
        if not bases:
            overwrite(machine, 200)
            machine.compact()
            bases.append(machine.stats().base)

    machine.write_snapshot(tmp_path / "a", (250, 1), progress=progress)
    model.write_snapshot(tmp_path / "b", LogId(250, 1))
    assert bases == [LogId(200, 1)]
    assert (tmp_path / "a" / "snapshot.fsm").read_bytes() == (tmp_path / "b" / "snapshot.fsm").read_bytes()


@pytest.mark.parametrize("ended_by", ["reset", "install", "close"])
def test_reset_install_and_close_end_it(
    directory: Path, tmp_path: Path, machine_at: Callable[..., FastStateMachine], ended_by: str
) -> None:
    """An ended compaction is a ``SnapshotError``, and its files are gone."""
    machine = machine_at(directory)
    overwrite(machine, 300)
    machine.write_snapshot(tmp_path / "file")
    called = []

    def progress(done: int, total: int) -> None:
        if not called:
            called.append(True)
            {
                "reset": machine.clear,
                "install": lambda: machine.install_snapshot(None, tmp_path / "file"),
                "close": machine.close,
            }[ended_by]()

    with pytest.raises(SnapshotError, match=f"compaction was ended by an? {ended_by}"):
        machine.compact(200, progress=progress)
    machine.close()
    generation = 1 if ended_by == "close" else 3
    expected = {"CURRENT", "LOCK", "PUBLISHED", f"log-{generation}"} | ({"base-3"} if ended_by == "install" else set())
    assert set(os.listdir(directory)) == expected


def test_an_interrupted_compaction_leaves_nothing(
    directory: Path, machine_at: Callable[..., FastStateMachine]
) -> None:
    """An exception of ``progress`` is passed on; the old generation is in use and intact."""
    machine = machine_at(directory)
    overwrite(machine, 300)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        machine.compact(200, progress=interrupt)
    assert sorted(os.listdir(directory)) == ["CURRENT", "LOCK", "PUBLISHED", "log-1"]
    inside(machine).check()
    machine.compact(200)
    assert machine.stats().base == LogId(200, 1)


def test_a_compaction_logs_one_line(
    directory: Path, machine_at: Callable[..., FastStateMachine], caplog: pytest.LogCaptureFixture
) -> None:
    """A compaction logs one line with its entry, its time, and the bytes before and after."""
    machine = machine_at(directory)
    overwrite(machine, 300)
    with caplog.at_level(logging.INFO, "fastsm"):
        machine.compact(200)
    assert "compacted up to (200, 1)" in caplog.text


def test_frames_carried_over_last_are_known_to_be_durable(
    directory: Path, tmp_path: Path, machine_at: Callable[..., FastStateMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit in a frame that arrived during a compaction's preparation is damage, and not a torn tail."""
    machine = machine_at(directory)
    overwrite(machine, 100)
    prepare = generation.prepare_next

    def prepare_late(*arguments: Any) -> None:
        prepare(*arguments)
        overwrite(machine, 10)
        machine.write_snapshot(tmp_path / "out")
        overwrite(machine, 10)
        machine.flush()

    monkeypatch.setattr(generation, "prepare_next", prepare_late)
    prepared = inside(machine).log
    machine.compact(100)
    assert inside(machine).log is not prepared
    killed = crash_copy(directory, tmp_path / "killed")
    (log,) = killed.glob("log-*")
    frames = frames_of(log)
    assert len(frames) >= 2
    for start, _ in frames:
        data = bytearray(log.read_bytes())
        data[start + 30] ^= 1
        log.write_bytes(data)
        with pytest.raises(CorruptionError):
            FastStateMachine(killed)
        data[start + 30] ^= 1
        log.write_bytes(data)
    with FastStateMachine(killed) as again:
        assert again.last_applied() == LogId(120, 1)
        assert again.snapshot_metadata() == machine.snapshot_metadata()


@pytest.mark.parametrize("work", ["compact", "write_snapshot"])
def test_a_replaced_log_is_freed_after_a_failure(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """A replaced log frees its room immediately, even after a failed step, without a garbage collection."""
    machine = FastStateMachine(directory, auto_compact=False, retain_entries=0)
    overwrite(machine, 300)
    mapping = weakref.ref(inside(machine).log.mapping)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    gc.collect()
    gc.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr("fastsm.core.compaction.write_snapshot_into", full)
            patch.setattr("fastsm.snapshot.writer.write_snapshot_into", full)
            with contextlib.suppress(StorageError):
                machine.compact() if work == "compact" else machine.write_snapshot(tmp_path / "snapshots")
                pytest.fail("nothing was written")
        machine.compact()
        assert mapping() is None
    finally:
        gc.enable()
    machine.close()


@pytest.mark.parametrize("kind", [int, np.int64, np.uint64, np.int8, lambda index: LogId(index, 1), lambda i: (i, 1)])
def test_compact_takes_any_integer_or_id(tmp_path: Path, kind: Any) -> None:
    """`compact` accepts an index of any integer type, or an id; anything else is a ``TypeError``."""
    with FastStateMachine(tmp_path) as machine:
        for index in range(1, 10):
            machine.apply([(index, 1, fastsm.put(b"a", b"%d" % index))])
        machine.compact(kind(5))
        assert machine.stats().base == LogId(5, 1)
        for wrong in (5.5, "5", (5.5, 1)):
            with pytest.raises(TypeError):
                machine.compact(wrong)


def test_a_close_from_a_callback_ends_a_compaction_that_waits_for_its_own(directory: Path) -> None:
    """One compaction waits for another, whose callback closes the machine: all of them end."""
    machine = FastStateMachine(directory, retain_entries=0, auto_compact=False)
    for index in range(1, 501):
        machine.apply([Entry(index, 1, fastsm.put(b"%d" % (index % 50), bytes(1000)))])
    waits = threading.Event()
    ended: list[BaseException] = []

    def compact_too() -> None:
        waits.set()
        try:
            machine.compact()
        except FastsmError as error:
            ended.append(error)

    other = threading.Thread(target=compact_too)

    def progress(done: int, total: int) -> None:
        if not waits.is_set():
            other.start()
            waits.wait()
            machine.close()

    with pytest.raises(FastsmError):
        machine.compact(progress=progress)
    other.join(60)
    assert not other.is_alive()
    assert len(ended) == 1
    machine.close()
