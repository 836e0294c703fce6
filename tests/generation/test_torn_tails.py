"""Logs and journals with torn tails and values of every shape: they open, and everything whole is there."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import fastsm
from fastsm import Entry, FastStateMachine, LogId, MemoryStateMachine
from fastsm.integrations.pysyncobj.journal import FastJournal as Journal
from support import tails
from support.faulty import crash_copy, frames_of, memory_directory

SMALL = int(os.environ.get("FASTSM_TAILS", "10000")) // 40
LARGE = SMALL // 10


def tear_file(dice: random.Random, file: Path, end: int) -> list[tuple[int, int]]:
    """Lose pages of a file after an offset; return the frames before the first one that is not whole."""
    frames, before = frames_of(file), file.read_bytes()
    used = frames[-1][1]
    after = before[:end] + bytes(tails.tear(dice, end, before[end:used]))
    file.write_bytes(after)
    whole = []
    for start, stop in frames:
        if after[start:stop] != before[start:stop]:
            break
        whole.append((start, stop))
    return whole


def chunk_of_values(dice: random.Random, index: int, largest: int) -> list[Entry]:
    """Return entries from an index on, with values of one shape."""
    shape = dice.choice(list(tails.SHAPES.values()))
    count = dice.choice((1, 2, 40))
    step = dice.choice((1, 1, 8))
    found = []
    for number in range(count):
        data = shape(dice, tails.size(dice, max(largest // count, 2)))[:largest]
        found.append(Entry(index + step * number, 1, fastsm.put(dice.randbytes(dice.randrange(20)), data)))
    return found


def chunk_of_records(dice: random.Random, index: int) -> list[Entry]:
    """Return some megabytes of small records, some of whose rising indexes look like lengths of frames."""
    count = dice.randrange(20_000, 40_000)
    return [Entry(index + number, 1, fastsm.put(dice.randbytes(16), b"v" * 40)) for number in range(count)]


def open_torn(root: Path, dice: random.Random, first: int, chunks: list[list[Entry]]) -> None:
    """Apply chunks after a flush, tear them in the log, open it, and check that exactly the whole chunks are there."""
    path = root / "state"
    with FastStateMachine(path, contiguous=False, auto_compact=False) as machine:
        machine.apply([(first, 1, fastsm.put(b"first", b"of all"))])
        machine.flush()
        durable = machine.stats().log_bytes
        for chunk in chunks:
            machine.apply(chunk)
        torn = crash_copy(path, root / "torn")
    whole = tear_file(dice, torn / "log-1", durable)
    model = MemoryStateMachine(contiguous=False)
    model.apply([(first, 1, fastsm.put(b"first", b"of all"))])
    for chunk in chunks[: len(whole) - 1]:
        model.apply(chunk)
    with FastStateMachine(torn, read_only=True, contiguous=False, verify_on_open="off") as machine:
        assert machine.last_applied() == model.last_applied()
    with FastStateMachine(torn, contiguous=False, auto_compact=False) as machine:
        assert machine.last_applied() == model.last_applied()
        assert list(machine.items()) == list(model.items())
        assert machine.stats().recovery.log_bytes == whole[-1][1]


@pytest.mark.parametrize("part", range(2))
def test_a_log_with_a_torn_tail_opens_whatever_its_values_are(part: int) -> None:
    """A log with a torn tail opens even if values hold frames, records or files of this library, at any index."""
    for number in range(part, SMALL, 2):
        dice = random.Random(f"open {number}")
        index = first = dice.choice(tails.INDEXES[:-1]) + 1
        chunks = []
        for _ in range(dice.randrange(1, 5)):
            chunks.append(chunk_of_values(dice, index + dice.choice((1, 7)), 1 << 16))
            index = chunks[-1][-1].index
        with memory_directory() as root:
            open_torn(root, dice, first, chunks)


def test_a_log_past_its_millionth_entry_with_a_torn_chunk_of_megabytes_opens() -> None:
    """A torn chunk opens whose record indexes look like lengths of frames: multiples of 8 within the tail's length."""
    for number in range(LARGE):
        dice = random.Random(f"large {number}")
        first = dice.choice((65_536, 1 << 20, 1_100_000, 1_500_000))
        chunks = [chunk_of_records(dice, first + 1)]
        with memory_directory() as root:
            open_torn(root, dice, first, chunks)


def test_a_journal_with_a_torn_tail_opens_whatever_its_commands_are() -> None:
    """A journal with a torn tail opens with exactly the entries whose frames are whole."""
    for number in range(SMALL):
        dice = random.Random(f"journal {number}")
        with memory_directory() as root:
            journal = Journal(root / "journal")
            first = dice.choice(tails.INDEXES[:-1]) + 1
            commands = []
            for index in range(first, first + dice.randrange(2, 30)):
                commands.append(tails.value(dice, tails.size(dice, 1 << 14)))
                journal.add(commands[-1], index, 1)
                if index == first:
                    journal.sync()
                    durable = journal.size
            torn = crash_copy(root / "journal", root / "torn")
            journal.close()
            whole = tear_file(dice, torn / "journal-1", durable)
            journal = Journal(torn)
            try:
                count = len(whole) - (1 if first == 1 else 2)  # not the frames of state and of the start
                expected = [(command, first + i, 1) for i, command in enumerate(commands[:count])]
                assert journal[:] == expected, f"journal {number}"
            finally:
                journal.close()


def test_a_tail_that_proves_a_loss_is_refused_by_openings_and_tools(tmp_path: Path) -> None:
    """An opening, a verification and a repair notice a loss by a later header, even if its own frame is torn."""
    from fastsm.tools import inspection, repair  # noqa: PLC0415

    path = tmp_path / "state"
    with FastStateMachine(path) as machine:
        for index in range(1, 4):
            machine.apply([(index, 1, fastsm.put(b"key", b"v" * 100_000))])
            machine.flush()
        crash_copy(path, tmp_path / "torn")
    log = tmp_path / "torn" / "log-1"
    frames = frames_of(log)
    data = bytearray(log.read_bytes())
    data[frames[1][0] : frames[2][0]] = bytes(frames[2][0] - frames[1][0])  # a durable frame, including its header
    data[frames[2][0] + 32 :] = bytes(len(data) - frames[2][0] - 32)  # the last frame, except its header
    log.write_bytes(data)
    for look in (
        lambda: FastStateMachine(tmp_path / "torn"), lambda: inspection.verify(tmp_path / "torn"),
    ):
        with pytest.raises(fastsm.CorruptionError, match=f"offset {frames[2][0]} says") as caught:
            look()
        assert (caught.value.path, caught.value.offset) == (str(log), frames[1][0])
    damage = repair.examine(tmp_path / "torn")
    assert damage is not None
    assert (damage.offset, damage.kept) == (frames[1][0], LogId(1, 1))
