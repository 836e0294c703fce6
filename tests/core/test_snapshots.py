"""Writing snapshots: exact as of any entry, equal on every replica, and blocking no other call."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastsm
from fastsm import (
    Entry,
    FastStateMachine,
    LogId,
    MemoryStateMachine,
    SnapshotError,
    SnapshotMetadata,
    SnapshotRangeError,
    StorageError,
    open_snapshot,
)
from support.faulty import Disk, crash_copy, in_thread, memory_directory
from support.histories import History
from support.inside import inside

FILE = "snapshot.fsm"


def file_of(machine: FastStateMachine | MemoryStateMachine, path: Path, last_included: LogId | None = None) -> bytes:
    """Return the bytes of a snapshot."""
    machine.write_snapshot(path, last_included)
    return (path / FILE).read_bytes()


def swap_heavy(history: History) -> list[Entry]:
    """Return a chunk that leaves few records: noops, failed compare-and-swaps, configs where the term changes."""
    dice = history.random.random()
    if dice < 0.3:
        index, term = history.last
        history.last = LogId(index, term + 1)
        border = [history.entry()._replace(command=fastsm.config(history.value()))]
        return [*border, history.entry()._replace(command=fastsm.noop())]
    if dice < 0.6:
        command = fastsm.compare_and_swap(b"key-1", b"never there", b"x")
        return [history.entry()._replace(command=command) for _ in range(3)]
    return history.chunk()


def history_of(seed: int, *, contiguous: bool = True, chunks: int = 40) -> list[Entry]:
    history = History(seed, contiguous=contiguous, large=False)
    return [entry for _ in range(chunks) for entry in swap_heavy(history)]


def replica(
    path: Path, entries: list[Entry], seed: int, *, contiguous: bool = True, restless: bool = False
) -> FastStateMachine:
    """A machine that applied the entries in its own chunks; `restless`: with restarts, kills and compactions."""
    dice = random.Random(seed)
    lives = 0
    path.mkdir(exist_ok=True)
    machine = FastStateMachine(path / "0", contiguous=contiguous, retain_entries=0)
    at = 0
    while at < len(entries):
        size = dice.choice((1, 2, 3, 10, 50))
        machine.apply(entries[at : at + size])
        at += size
        if not restless or dice.random() < 0.6:
            continue
        what = dice.choice(("close", "kill", "compact", "compact", "install", "flush", "snapshot"))
        if what == "compact":
            machine.compact(dice.randint(machine.stats().base.index, machine.last_applied().index))
        elif what == "install":
            machine.install_snapshot(None, path / "installed" if machine.write_snapshot(path / "installed") else "")
        elif what == "snapshot":
            machine.write_snapshot(path / "aside")
        elif what == "flush":
            machine.flush()
        else:
            lives += 1
            if what == "kill":
                crash_copy(path / str(lives - 1), path / str(lives))
                machine.close()
            else:
                machine.close()
                (path / str(lives - 1)).rename(path / str(lives))
            machine = FastStateMachine(path / str(lives), contiguous=contiguous, retain_entries=0)
    inside(machine).check()
    return machine


# ---- exact -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_snapshot_is_exact_as_of_every_entry(tmp_path: Path, seed: int, contiguous: bool) -> None:
    """A snapshot as of each applied entry, even within a chunk, equals the model's, byte for byte."""
    entries = history_of(seed, contiguous=contiguous)
    model = MemoryStateMachine(contiguous=contiguous)
    model.apply(entries)
    with replica(tmp_path, entries, seed, contiguous=contiguous) as machine:
        for log_id in [LogId(), *(LogId(entry.index, entry.term) for entry in entries[:: 1 + len(entries) // 60])]:
            assert file_of(machine, tmp_path / "a", log_id) == file_of(model, tmp_path / "b", log_id), log_id


def test_an_entry_that_was_only_passed_over_can_be_the_last_one(tmp_path: Path, directory: Path) -> None:
    """Ids of ``update_last_applied``, and ids in gaps of one term; in other gaps they mean the previous entry."""
    with FastStateMachine(directory, contiguous=False) as machine:
        model = MemoryStateMachine(contiguous=False)
        for one in (machine, model):
            one.apply([(5, 2, fastsm.put(b"a", b"1")), (9, 4, fastsm.put(b"a", b"2"))])
            one.update_last_applied((12, 4))
        for log_id in ((12, 4), (10, 4), (9, 4), (7, 2), (7, 3), (7, 4), (5, 2), (3, 1), (3, 2), (0, 0)):
            assert file_of(machine, tmp_path / "a", LogId(*log_id)) == file_of(model, tmp_path / "b", LogId(*log_id))
        for impossible in ((12, 5), (13, 4), (10, 3), (9, 3), (7, 1), (7, 5), (5, 1), (3, 3), (0, 1)):
            with pytest.raises(SnapshotRangeError):
                machine.write_snapshot(tmp_path / "a", LogId(*impossible))


def test_every_retained_entry_can_be_had_while_compaction_follows_each_chunk() -> None:
    """``write_snapshot(last_applied - k)`` is exact for each k up to ``retain_entries``, despite compactions."""
    entries = history_of(7)
    model = MemoryStateMachine()
    applied: list[LogId] = []
    with memory_directory() as root, FastStateMachine(root / "state", retain_entries=12) as machine:
        dice = random.Random(7)
        at = 0
        while at < len(entries):
            chunk = entries[at : at + dice.choice((1, 3, 7))]
            at += len(chunk)
            machine.apply(chunk)
            model.apply(chunk)
            applied += [LogId(entry.index, entry.term) for entry in chunk]
            machine.compact()
            for log_id in dice.sample(applied[-13:], min(len(applied), 4)) + applied[-13:-12]:
                assert file_of(machine, root / "a", log_id) == file_of(model, root / "b", log_id)
        assert machine.stats().base.index > len(entries) - 40
        inside(machine).check()


def test_policy_never_takes_what_is_retained(tmp_path: Path, directory: Path) -> None:
    """If every chunk calls for automatic compaction, snapshots of all retained entries are possible."""
    entries = history_of(8)
    model = MemoryStateMachine()
    with FastStateMachine(directory, retain_entries=20, compact_ratio=0, compact_floor=0) as machine:
        for at in range(0, len(entries), 5):
            machine.apply(entries[at : at + 5])
            model.apply(entries[at : at + 5])
            index, term, _ = entries[max(0, len(entries[: at + 5]) - 21)]
            assert file_of(machine, tmp_path / "a", LogId(index, term)) == file_of(
                model, tmp_path / "b", LogId(index, term)
            )
    with FastStateMachine(directory) as machine:
        assert machine.stats().generation > 1
        assert machine.last_applied() == model.last_applied()


# ---- equal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_replicas_write_equal_files(tmp_path: Path, seed: int, contiguous: bool) -> None:
    """Hash seeds, chunks, restarts, kills, compactions and installs leave no trace in a snapshot."""
    entries = history_of(100 + seed, contiguous=contiguous)
    model = MemoryStateMachine(contiguous=contiguous)
    model.apply(entries)
    expected = file_of(model, tmp_path / "model")
    for number in range(3):
        machine = replica(
            tmp_path / str(number), entries, 10 * seed + number, contiguous=contiguous, restless=number > 0
        )
        with machine:
            assert file_of(machine, tmp_path / "file") == expected
            assert machine.last_applied() == model.last_applied()
            assert [machine.entry_term(i) for i in range(entries[-1].index + 2)] == [
                model.entry_term(i) for i in range(entries[-1].index + 2)
            ]


def test_state_checksum_does_not_depend_on_attachment_and_codec(tmp_path: Path, directory: Path) -> None:
    """Attachment and codec belong to the file, not to the state."""
    with FastStateMachine(directory) as machine:
        machine.apply(history_of(1))
        sums = set()
        for attachment in (b"", b"x", b"raft's own" * 100):
            for compress in ("none", "zstd"):
                machine.write_snapshot(tmp_path, compress=compress, attachment=attachment)
                with open_snapshot(tmp_path) as snapshot:
                    snapshot.verify()
                    assert snapshot.attachment == attachment
                    assert snapshot.codec == compress
                    assert snapshot.membership == machine.membership()
                    sums.add(snapshot.state_checksum)
        assert len(sums) == 1


# ---- what it leaves --------------------------------------------------------------------------------------


def test_metadata_is_recorded_durably_if_newer(tmp_path: Path, directory: Path) -> None:
    """The metadata of the newest snapshot is known after reopening; an older one does not replace it."""
    entries = history_of(2)
    with FastStateMachine(directory) as machine:
        machine.apply(entries)
        newest = machine.write_snapshot(tmp_path / "a")
        assert machine.snapshot_metadata() == newest
        assert newest.last_included == machine.last_applied() == machine.durable()
        older = machine.write_snapshot(tmp_path / "b", LogId(entries[9].index, entries[9].term))
        assert older != newest == machine.snapshot_metadata()
        copy = crash_copy(directory, tmp_path / "copy")
    with FastStateMachine(copy) as machine:
        assert machine.snapshot_metadata() == newest


def test_all_that_it_includes_is_durable_on_return(tmp_path: Path, directory: Path) -> None:
    """Entries up to the last included one are synced in the state's own directory."""
    with FastStateMachine(directory) as machine:
        machine.apply([(1, 1, fastsm.put(b"a", b"1"))])
        machine.update_last_applied((4, 2))
        assert machine.durable() == LogId()
        machine.write_snapshot(tmp_path, (4, 2))
        assert machine.durable() == LogId(4, 2)


def test_directory_is_made_and_file_replaced_whole(tmp_path: Path, directory: Path) -> None:
    """A missing directory and its parents are made; a later snapshot replaces the file; nothing else is left."""
    target = tmp_path / "not" / "there"
    with FastStateMachine(directory) as machine:
        for index in range(1, 4):
            machine.apply([(index, 1, fastsm.put(b"a", b"%d" % index))])
            metadata = machine.write_snapshot(target)
            with open_snapshot(target) as snapshot:
                assert snapshot.metadata == metadata == SnapshotMetadata(LogId(index, 1), metadata.checksum)
            assert os.listdir(target) == [FILE]


def test_read_only_writes_a_snapshot_and_records_nothing(tmp_path: Path, directory: Path) -> None:
    """A tool may take a snapshot next to a running owner, whose directory does not change."""
    with FastStateMachine(directory) as owner:
        owner.apply(history_of(3))
        owner.flush()
        before = {path.name: path.read_bytes() for path in directory.iterdir()}
        with FastStateMachine(directory, read_only=True) as reader:
            assert file_of(reader, tmp_path / "a") == file_of_without_trace(owner, tmp_path)
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def file_of_without_trace(machine: FastStateMachine, tmp_path: Path) -> bytes:
    model = MemoryStateMachine()
    model.apply(history_of(3))
    return file_of(model, tmp_path / "model")


def test_options_of_the_machine_are_those_of_the_trait(tmp_path: Path, directory: Path) -> None:
    """``generate_snapshot_data`` uses the codec and attachment of the machine's options; returns the checksum."""

    async def story() -> None:
        checksum = await machine.generate_snapshot_data(tmp_path, LogId(2, 1))
        with open_snapshot(tmp_path) as snapshot:
            snapshot.verify()
            assert snapshot.metadata == SnapshotMetadata(LogId(2, 1), checksum) == machine.snapshot_metadata()
            assert (snapshot.codec, snapshot.attachment) == ("zstd", b"up to 2")

    attachment: Callable[[LogId], bytes] = lambda log_id: b"up to %d" % log_id.index  # noqa: E731
    with FastStateMachine(directory, snapshot_compress="zstd", snapshot_attachment=attachment) as machine:
        machine.apply([(index, 1, fastsm.put(b"a", b"%d" % index)) for index in range(1, 5)])
        asyncio.run(story())


def test_point_of_a_coroutine_is_fixed_when_its_task_starts(tmp_path: Path, directory: Path) -> None:
    """What is applied after the start of ``generate_snapshot_data`` is not in the snapshot."""

    async def story() -> None:
        task = asyncio.create_task(machine.generate_snapshot_data(tmp_path, None))
        await asyncio.sleep(0)
        await machine.apply_chunk([(2, 1, fastsm.put(b"a", b"later"))])
        await task

    with FastStateMachine(directory) as machine:
        machine.apply([(1, 1, fastsm.put(b"a", b"before"))])
        asyncio.run(story())
        with open_snapshot(tmp_path) as snapshot:
            assert snapshot.metadata.last_included == LogId(1, 1)


# ---- errors ----------------------------------------------------------------------------------------------


def test_entries_before_the_base_and_after_last_applied_are_refused(tmp_path: Path, directory: Path) -> None:
    """The message says which entries are possible; nothing is written."""
    entries = history_of(4)
    with FastStateMachine(directory) as machine:
        machine.apply(entries[:50])
        machine.apply(entries[50:])
        machine.compact(60)
        base = machine.stats().base
        assert base == LogId(entries[49].index, entries[49].term)
        for log_id in (entries[48][:2], (entries[-1].index + 1, entries[-1].term)):
            with pytest.raises(SnapshotRangeError, match=f"index={base.index}, .*last applied"):
                machine.write_snapshot(tmp_path / "target", log_id)
        assert not (tmp_path / "target").exists()
        machine.write_snapshot(tmp_path / "target", base)


def test_wrong_options_are_refused_before_anything_is_done(tmp_path: Path, directory: Path) -> None:
    """An unknown codec is a ValueError that names the known ones."""
    with pytest.raises(ValueError, match="zstd"):
        FastStateMachine(directory, snapshot_compress="gzip")  # type: ignore[arg-type]
    with FastStateMachine(directory) as machine, pytest.raises(ValueError, match="zstd"):
        machine.write_snapshot(tmp_path / "target", compress="gzip")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("ended_by", ["reset", "install", "close"])
def test_reset_install_and_close_end_a_running_snapshot(tmp_path: Path, directory: Path, ended_by: str) -> None:
    """An ended snapshot is a ``SnapshotError``; it leaves no file and no metadata, and an older file is unchanged."""
    with FastStateMachine(directory) as machine:
        machine.apply(history_of(5))
        other = machine.write_snapshot(tmp_path / "other")
        old = file_of(machine, tmp_path / "target", LogId(1, 1))
        called = []

        def progress(done: int, total: int) -> None:
            if not called:
                called.append(True)
                {
                    "reset": machine.clear,
                    "install": lambda: machine.install_snapshot(None, tmp_path / "other"),
                    "close": machine.close,
                }[ended_by]()

        with pytest.raises(SnapshotError, match=f"ended by an? {ended_by}"):
            machine.write_snapshot(tmp_path / "target", progress=progress)
        assert called
        assert os.listdir(tmp_path / "target") == [FILE]
        assert (tmp_path / "target" / FILE).read_bytes() == old
        if ended_by != "close":
            assert machine.snapshot_metadata() == (None if ended_by == "reset" else other)


def test_an_interrupted_snapshot_leaves_nothing(tmp_path: Path, directory: Path) -> None:
    """An exception of ``progress`` is passed on; the machine continues; no file is left."""

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with FastStateMachine(directory) as machine:
        machine.apply(history_of(6))
        with pytest.raises(KeyboardInterrupt):
            machine.write_snapshot(tmp_path / "target", progress=interrupt)
        assert not (tmp_path / "target").exists() or os.listdir(tmp_path / "target") == []
        assert machine.snapshot_metadata() is None
        machine.write_snapshot(tmp_path / "target")


def test_progress_is_told_in_bytes(tmp_path: Path, directory: Path) -> None:
    """``progress(done, total)`` never goes back, and ends with all bytes of the records."""
    told: list[tuple[int, int]] = []
    with FastStateMachine(directory) as machine:
        machine.apply(history_of(6))
        machine.write_snapshot(tmp_path, progress=lambda done, total: told.append((done, total)))
        assert told == sorted(told)
        assert told[-1] == (machine.stats().live_bytes, machine.stats().live_bytes)
        told.clear()
        machine.compact(machine.last_applied(), progress=lambda done, total: told.append((done, total)))
        assert told[-1] == (machine.stats().live_bytes, machine.stats().live_bytes)


def test_values_larger_than_a_piece_are_written(tmp_path: Path, directory: Path) -> None:
    """A record that is larger than a piece is written in parts."""
    with FastStateMachine(directory) as machine:
        model = MemoryStateMachine()
        dice = random.Random(1)
        chunk = [(index, 1, fastsm.put(b"%d" % index, dice.randbytes(size))) for index, size in enumerate(
            (1, 9 << 20, 20 << 20, 0, 300 << 10, 1 << 20, 7), start=1)]  # fmt: skip
        machine.apply(chunk)
        model.apply(chunk)
        assert file_of(machine, tmp_path / "a") == file_of(model, tmp_path / "b")
    shutil.rmtree(directory)


def test_no_call_waits_while_a_snapshot_gets_its_name(tmp_path: Path) -> None:
    """An apply proceeds while the disk makes a snapshot's name durable; a reset waits, and then ends nothing."""
    disk = Disk()
    with FastStateMachine(tmp_path / "state", _files=disk.files) as machine:
        machine.apply([(1, 1, fastsm.put(b"a", b"1"))])
        (tmp_path / "out").mkdir()
        disk.forget()
        renamed = disk.hold("rename")
        with in_thread(lambda: machine.write_snapshot(tmp_path / "out")) as written:
            renamed.wait()
            synced = disk.hold("sync_directory")
            renamed.open()
            synced.wait()
            assert machine.apply([(2, 1, fastsm.put(b"a", b"2"))]) == [True]
            with in_thread(machine.clear) as cleared:
                time.sleep(0.05)
                assert not cleared.done
                synced.open()
        assert cleared.error is None
        assert written.error is None
        assert written.value.last_included == (1, 1)
        assert machine.snapshot_metadata() is None
        assert machine.last_applied() == (0, 0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_state_disk_does_not_fail_a_snapshot_on_another(tmp_path: Path, code: int) -> None:
    """The file exists and its content is durable, so the call returns; the next frame that has room records it."""
    disk = Disk()
    with FastStateMachine(tmp_path / "state", _files=disk.files) as machine:
        machine.apply([(1, 1, fastsm.put(b"a", b"1"))])
        full = disk.fail("allocate", code, times=float("inf"))
        index = 1
        with contextlib.suppress(StorageError):
            while index < 100_000:
                machine.apply([(index + 1, 1, fastsm.noop())])
                index += 1
        assert full.struck
        metadata = machine.write_snapshot(tmp_path / "elsewhere")
        assert metadata.last_included == machine.durable() == (index, 1)
        assert machine.snapshot_metadata() == metadata
        machine.update_last_applied((index + 1, 1))
        with pytest.raises(StorageError):  # this entry is in no frame: a snapshot of it could be all there is
            machine.write_snapshot(tmp_path / "elsewhere")
        disk.rules.remove(full)
        machine.save_hard_state()
        crash_copy(tmp_path / "state", tmp_path / "copy")
    with fastsm.open_snapshot(tmp_path / "elsewhere") as snapshot, FastStateMachine(tmp_path / "copy") as machine:
        assert machine.snapshot_metadata() == snapshot.metadata


@pytest.mark.parametrize(
    "attachment",
    [
        np.zeros(1, np.uint8), np.array([[1, 2], [3, 4]], ">u2"), np.array([[1, 2], [3, 4]], np.uint16).T,
        memoryview(b"abcdef")[::2], b"", bytearray(b"x"),
    ],
)
@pytest.mark.parametrize("given", ["to the call", "at the opening", "by a function"])
def test_an_attachment_is_any_buffer(directory: Path, tmp_path: Path, attachment: Any, given: str) -> None:
    """An attachment's bytes are kept unchanged, even if the object counts as false, or as neither; the model agrees."""
    option = {"at the opening": attachment, "by a function": lambda last: attachment}.get(given)
    to_the_call = attachment if given == "to the call" else None
    with FastStateMachine(directory, snapshot_attachment=option) as machine:
        machine.write_snapshot(tmp_path / "real", attachment=to_the_call)
    MemoryStateMachine().write_snapshot(tmp_path / "model", attachment=attachment)
    for name in ("real", "model"):
        with open_snapshot(tmp_path / name) as snapshot:
            assert snapshot.attachment == bytes(memoryview(attachment))


@pytest.mark.parametrize("attachment", [0, "", False, "text", [1]])
def test_an_attachment_that_is_no_buffer_is_refused(directory: Path, tmp_path: Path, attachment: Any) -> None:
    """An attachment that is not a buffer is a TypeError, even if it counts as false, and nothing is written."""
    with FastStateMachine(directory) as machine:
        for writer in (machine, MemoryStateMachine()):
            with pytest.raises(TypeError):
                writer.write_snapshot(tmp_path / "out", attachment=attachment)
    assert not (tmp_path / "out" / "snapshot.fsm").exists()
