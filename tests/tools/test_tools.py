"""inspect, verify and repair of whole, torn and damaged directories."""

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
from fastsm.disk import headers
from fastsm.errors import CorruptionError, LockedError
from fastsm.tools import inspection, json_lines, repair
from fastsm.tools.records import log_frames
from support.inside import inside


@pytest.fixture
def flushed(directory, machine_at):
    """Provide a closed directory of 60 entries with different keys, one per frame, flushed after each ten."""
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
    """Each chunk is a frame with its runs, including gaps, and its records; a close is the last frame."""
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
    """While a directory is in use, the report names the owner and shows what is applied; the owner is not disturbed."""
    machine = machine_at(directory)
    machine.apply([(1, 1, fastsm.put(b"a", b"1"))])
    report = inspection.inspect(directory)
    assert (report.owner.pid, report.stats.keys, report.problem) == (os.getpid(), 1, None)
    assert "1 key as of entry 1" in inspection.verify(directory)
    assert machine.apply([(2, 1, fastsm.put(b"b", b"2"))]) == [True]
    with pytest.raises(LockedError):
        repair.examine(directory)


def test_inspecting_writes_nothing(flushed):
    """inspect changes neither a byte nor a time of any file."""
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in flushed.iterdir()}
    inspection.inspect(flushed)
    inspection.verify(flushed)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in flushed.iterdir()} == before


def kill_after(path, statements):
    """Run statements on a machine in another process, which ends without closing the machine."""
    code = f"import fastsm, os; machine = fastsm.FastStateMachine({str(path)!r})\n{statements}\nos._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_torn_tail_is_told_and_is_no_damage(directory):
    """The bytes of a torn tail are counted; verify finds the rest whole, and repair has nothing to do."""
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
    """After an unclean end a later frame's watermark proves that a bad frame is damage, not a torn tail.

    inspect and verify report it as an opening would.
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
    """Whatever is cut or flipped, inspect reports a problem if and only if opening raises, and the same torn bytes."""
    draw = random.Random(seed)
    log = flushed / "log-1"
    size = log.stat().st_size
    if draw.random() < 0.5:  # CURRENT of an unclean end: only frames say what is durable
        with fastsm.FastStateMachine(flushed, read_only=True) as machine:
            head = inside(machine).log.head
        current = headers.CurrentFile(head.generation, head.identity, headers.LOG_HEADER_BYTES)
        (flushed / "CURRENT").write_bytes(headers.pack_current(current))
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
    """inspect shows a snapshot's header, runs and membership, given its file or its folder."""
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
    """examine changes nothing; repair keeps the frames before the damaged one, and sets the old log aside."""
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
    """A lost CURRENT is repaired if there is only one log that it can have named."""
    (flushed / "CURRENT").unlink()
    assert repair.examine(flushed).offset is None
    repair.repair(flushed)
    with fastsm.FastStateMachine(flushed) as machine:
        assert machine.last_applied().index == 60


def test_stats_print_in_human_units(flushed):
    """print(machine.stats()) shows keys, log, recovery and flushes in a form for people."""
    with fastsm.FastStateMachine(flushed) as machine:
        text = str(machine.stats())
    for expected in ("60, 4.", "entry 60 of term 4", "a clean close, 61 frames", "0 flushes"):
        assert expected in text


# ---- while an owner writes, and frames larger than a piece --------------------------------------------


def test_looking_while_an_owner_writes_finds_nothing_wrong(directory, machine_at):
    """While an owner appends, flushes and switches generations, every look sees a whole state."""
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
    """A frame that proves damage is found even if it is larger than the pieces in which the log is read."""
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
    """A torn tail that is read in several pieces is counted up to its last byte that is not zero."""
    kill_after(directory, "machine.apply([(1, 1, fastsm.put(b'a', b'1'))]); machine.flush()")
    end = inspection.inspect(directory).stats.log_bytes
    with open(directory / "log-1", "r+b") as log:
        log.seek(end + 9_000_000)
        log.write(b"x")
    assert inspection.inspect(directory).recovery.torn_bytes == 9_000_001
    with fastsm.FastStateMachine(directory) as machine:
        assert machine.stats().recovery.torn_bytes == 9_000_001


def test_repair_after_a_base(flushed):
    """A repair keeps the base and the frames before the damage; if the first frame is damaged, only the base."""
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
