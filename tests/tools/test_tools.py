"""Looking from outside, and repair: what inspect, verify and repair say of whole, torn and damaged directories."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fastsm
from fastsm.disk import format
from fastsm.errors import CorruptionError, LockedError
from fastsm.tools import inspection, json_lines, repair
from fastsm.tools.records import log_frames
from support.inside import inside


@pytest.fixture
def flushed(directory, machine_at):
    """A closed directory of 60 entries in frames of one, flushed after each ten; keys differ."""
    with machine_at(directory) as machine:
        for index in range(1, 61):
            machine.apply([(index, 1 + index // 20, fastsm.put(b"key-%d" % index, b"value" * 9))])
            if index % 10 == 0:
                machine.flush()
    return directory


def frames_of(path):
    with fastsm.FastStateMachine(path, read_only=True) as machine:
        return list(log_frames(inside(machine).log))


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# ---- frames ------------------------------------------------------------------------------------------


def test_frames_say_what_was_applied(directory, machine_at):
    """Each chunk is a frame with its runs, gaps included, and its records; a close is the last."""
    with machine_at(directory, contiguous=False) as machine:
        machine.apply([(1, 1, fastsm.put(b"a", b"1")), (2, 1, fastsm.noop()), (5, 2, fastsm.delete(b"a"))])
        machine.flush()
        machine.apply([(6, 2, fastsm.config(b"c"))])
        found = list(log_frames(inside(machine).log))
    assert [frame.runs for frame in found] == [((1, 2, 1), (3, 4, None), (5, 5, 2)), ((6, 6, 2),)]
    assert found[0].records == ((1, "put", b"a", b"1", None), (5, "delete", b"a", b"", None))
    assert found[1].records == ((6, "config", b"", b"c", None),)
    assert found[1].offset == found[0].end == found[1].watermark
    assert [record.operation for record in frames_of(directory)[-1].records] == ["close"]


# ---- inspect and verify ------------------------------------------------------------------------------


def test_a_directory_in_use_is_looked_at_and_goes_on(directory, machine_at):
    """The report names the owner, shows what is applied, and the owner notices nothing."""
    machine = machine_at(directory)
    machine.apply([(1, 1, fastsm.put(b"a", b"1"))])
    report = inspection.inspect(directory)
    assert (report.owner.pid, report.stats.keys, report.problem) == (os.getpid(), 1, None)
    assert "1 key as of entry 1" in inspection.verify(directory)
    assert machine.apply([(2, 1, fastsm.put(b"b", b"2"))]) == [True]
    with pytest.raises(LockedError):
        repair.examine(directory)


def test_inspecting_writes_nothing(flushed):
    """Every file is as it was, byte and time."""
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in flushed.iterdir()}
    inspection.inspect(flushed)
    inspection.verify(flushed)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in flushed.iterdir()} == before


def kill_after(path, statements):
    """Runs statements on a machine at a path in a process of its own, which ends without closing it."""
    code = f"import fastsm, os; machine = fastsm.FastStateMachine({str(path)!r})\n{statements}\nos._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_torn_tail_is_told_and_is_no_damage(directory):
    """What opening would cut is counted; verify calls the rest whole, repair has nothing to do."""
    kill_after(directory, "machine.apply([(1, 1, fastsm.put(b'a', b'1'))]); machine.flush()")
    report = inspection.inspect(directory)
    assert report.recovery.torn_bytes == 0
    end = report.stats.log_bytes
    with open(directory / "log-1", "r+b") as log:
        log.seek(end)
        log.write(b"torn" * 50)
    report = inspection.inspect(directory)
    assert report.recovery.torn_bytes == 200
    assert "a torn tail of 200 B" in dict(report.rows())["opening it"]
    assert "torn tail of 200 B" in inspection.verify(directory)
    assert repair.examine(directory) is None
    with fastsm.FastStateMachine(directory) as machine:
        assert machine.stats().recovery.torn_bytes == 200


def test_damage_that_only_a_later_frame_proves_is_found(directory):
    """After an unclean end CURRENT knows little: it is a later frame's watermark that tells damage from a torn tail.

    inspect and verify say what opening would say.
    """
    kill_after(
        directory,
        "for i in range(1, 40):\n"
        "    machine.apply([(i, 1, fastsm.put(b'k%d' % i, b'v' * 99))])\n"
        "    i % 10 or machine.flush()\n",
    )
    frames = frames_of(directory)
    assert inspection.inspect(directory).problem is None
    flip(directory / "log-1", frames[4].offset + 30)
    with pytest.raises(CorruptionError) as raised:
        inspection.verify(directory)
    assert raised.value.offset == frames[4].offset
    report = inspection.inspect(directory)
    assert f"offset {frames[4].offset}" in report.problem
    assert report.as_dict()["problem"] == report.problem
    with pytest.raises(CorruptionError, match=f"offset {frames[4].offset}"):
        fastsm.FastStateMachine(directory)


@pytest.mark.parametrize("seed", range(40))
def test_inspect_foresees_what_opening_finds(tmp_path, flushed, seed):
    """Whatever is cut or flipped, inspect names a problem exactly where opening raises, and the same torn bytes."""
    draw = random.Random(seed)
    log = flushed / "log-1"
    size = log.stat().st_size
    if draw.random() < 0.5:  # CURRENT of an unclean end: nothing is known durable but by the frames
        with fastsm.FastStateMachine(flushed, read_only=True) as machine:
            head = inside(machine).log.head
        current = format.CurrentFile(head.generation, head.identity, format.LOG_HEADER_BYTES)
        (flushed / "CURRENT").write_bytes(format.pack_current(current))
    for _ in range(draw.randrange(3)):
        flip(log, draw.randrange(96, size))
    if draw.random() < 0.4:
        with open(log, "r+b") as file:
            file.truncate(draw.randrange(96, size))
    try:
        foreseen = inspection.inspect(flushed)
        shutil.copytree(flushed, tmp_path / "copy")
        with fastsm.FastStateMachine(tmp_path / "copy") as machine:
            found = machine.stats().recovery
    except CorruptionError:
        assert foreseen.problem is not None
    else:
        assert foreseen.problem is None
        assert (foreseen.recovery.torn_bytes, foreseen.recovery.frames) == (found.torn_bytes, found.frames)


def test_a_snapshot_is_looked_at_without_a_directory(flushed, tmp_path):
    """Its header, its runs, its membership; a folder that holds one will do."""
    with fastsm.FastStateMachine(flushed) as machine:
        machine.apply([(61, 9, fastsm.config(b"nodes"))])
        metadata = machine.write_snapshot(tmp_path / "out")
    report = inspection.inspect(tmp_path / "out")
    assert report.metadata == metadata
    assert report.runs[-1] == (61, 61, 9)
    assert report.membership == ((61, 9), b"nodes")
    assert dict(report.rows())["membership"] == "nodes (5 B, from entry 61 of term 9)"
    assert inspection.verify(tmp_path / "out" / "snapshot.fsm").startswith("60 keys as of entry 61 of term 9")
    flip(tmp_path / "out" / "snapshot.fsm", 900)
    with pytest.raises(fastsm.ChecksumMismatchError):
        inspection.verify(tmp_path / "out")


# ---- repair ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 7, 30, 60])
def test_repair_keeps_what_is_before_the_damage(flushed, at):
    """Examining changes nothing; repairing keeps the frames before the damaged one, and the old log aside."""
    frames = frames_of(flushed)
    log = flushed / "log-1"
    flip(log, frames[at].offset + 30)
    whole = log.read_bytes()
    damage = repair.examine(flushed)
    assert log.read_bytes() == whole
    assert damage.offset == frames[at].offset
    assert damage.kept == (at, 1 + at // 20 if at else 0)
    assert damage.lost == ((60, 4) if at < 59 else None)
    _, kept = repair.repair(flushed)
    assert Path(kept).read_bytes() == whole
    with fastsm.FastStateMachine(flushed, verify_on_open="full") as machine:
        assert machine.last_applied().index == machine.len() == machine.durable().index == at
        machine.apply([(at + 1, 9, fastsm.put(b"new", b"1"))])
    assert repair.repair(flushed) is None


def test_repair_of_a_lost_current(flushed):
    """With one log there is no doubt which one it named."""
    (flushed / "CURRENT").unlink()
    assert repair.examine(flushed).offset is None
    repair.repair(flushed)
    with fastsm.FastStateMachine(flushed) as machine:
        assert machine.last_applied().index == 60


def test_stats_print_in_human_units(flushed):
    """print(machine.stats()) is a page for people; as_dict is for programs."""
    with fastsm.FastStateMachine(flushed) as machine:
        text = str(machine.stats())
    for expected in ("60, 4.", "entry 60 of term 4", "a clean close, 61 frames", "0 flushes"):
        assert expected in text


# ---- next to an owner, and beyond a piece -------------------------------------------------------------


def test_looking_while_an_owner_writes_finds_nothing_wrong(directory, machine_at):
    """However often the owner appends, flushes and goes on to another generation, every look sees a whole state."""
    machine = machine_at(directory, auto_compact=False)
    stop = threading.Event()

    def own():
        index = 0
        while not stop.is_set():
            entries = [(index + i, 1, fastsm.put(b"%d" % (i % 7), b"v" * 99)) for i in range(1, 21)]
            machine.apply(entries)
            index += len(entries)
            if index % 100 == 0:
                machine.flush()
            if index % 700 == 0:
                machine.compact(index - 10)

    thread = threading.Thread(target=own)
    thread.start()
    try:
        for _ in range(25):
            assert inspection.inspect(directory).problem is None
            inspection.verify(directory)
            assert sum(1 for _ in json_lines.dump_state(directory)) <= 9  # 7 keys and two marks
    finally:
        stop.set()
        thread.join()


def test_proof_of_damage_is_found_in_large_frames(directory):
    """A frame that proves damage may be larger than what is read at once, and lie across two readings."""
    kill_after(
        directory,
        "for i in range(1, 5):\n"
        "    machine.apply([(i, 1, fastsm.put(b'k%d' % i, bytes(range(256)) * 12_000))])\n"
        "machine.flush()\n"
        "machine.apply([(5, 1, fastsm.put(b'k5', bytes(range(256)) * 20_000))])\n",
    )
    first = frames_of(directory)[0]
    flip(directory / "log-1", first.offset + 5000)
    problem = inspection.inspect(directory).problem
    assert f"offset {first.offset}: expected a frame, since the one at offset" in problem
    damage = repair.examine(directory)
    assert (damage.offset, damage.lost) == (first.offset, (5, 1))


def test_a_large_torn_tail_is_counted(directory):
    """What is after the end is read in pieces; the last byte that is not zero counts."""
    kill_after(directory, "machine.apply([(1, 1, fastsm.put(b'a', b'1'))]); machine.flush()")
    end = inspection.inspect(directory).stats.log_bytes
    with open(directory / "log-1", "r+b") as log:
        log.seek(end + 9_000_000)
        log.write(b"x")
    assert inspection.inspect(directory).recovery.torn_bytes == 9_000_001
    with fastsm.FastStateMachine(directory) as machine:
        assert machine.stats().recovery.torn_bytes == 9_000_001


def test_repair_after_a_base(flushed):
    """The base stays, and what the log holds before the damage; cut at its first frame, the base alone is left."""
    with fastsm.FastStateMachine(flushed) as machine:
        machine.compact(40)
        machine.write_snapshot(flushed.parent / "snapshots")
    for at, left in ((5, 45), (0, 40)):
        frames = frames_of(flushed)
        flip(next(flushed.glob("log-[0-9]")), frames[at].offset + 40)
        damage = repair.examine(flushed)
        assert (damage.offset, damage.kept.index) == (frames[at].offset, left)
        repair.repair(flushed)
        with fastsm.FastStateMachine(flushed, verify_on_open="full") as machine:
            assert machine.last_applied().index == machine.len() == left
            assert machine.snapshot_metadata() is None
