"""docs/format.md is complete: a reader made from that page alone reads what the library writes.

The reader is support/page_reader.py; fastsm is used to write, and as the model to compare with.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsm
import fastsm.core.generations
from fastsm import Entry, FastStateMachine, LogId, MemoryStateMachine, SnapshotMetadata
from support.faulty import crash_copy
from support.inside import inside
from support.page_reader import Corrupt, Decoded, check_table, decode_directory, decode_log, decode_snapshot, header

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "format.md"
FILE = "snapshot.fsm"

# ---- what the library writes -------------------------------------------------------------------------

def random_entry(rng: random.Random, index: int, term: int) -> Entry:
    def key() -> bytes:
        return b"key %d" % rng.randrange(40)

    def value() -> bytes:
        return rng.randbytes(rng.choice([0, 1, 7, 8, 9, 100, 3000]))

    def simple() -> bytes:
        return rng.choice([
            lambda: fastsm.put(key(), value()),
            lambda: fastsm.put(key(), value(), expires=rng.randrange(1_000)),
            lambda: fastsm.touch(key(), rng.choice((None, rng.randrange(1_000)))),
            lambda: fastsm.put(key(), b"same"),
            lambda: fastsm.delete(key()),
            lambda: fastsm.compare_and_swap(key(), b"same", value()),
            lambda: fastsm.compare_and_swap(key(), rng.choice([None, b"same"]), None),
            fastsm.noop,
        ])()

    way = rng.randrange(15)
    if way == 0:
        return Entry(index, term, fastsm.config(value()))
    if way == 12:
        return Entry(index, term, fastsm.open_session(expires=rng.choice((None, rng.randrange(1_000)))))
    if way == 13:
        session = rng.randrange(max(1, index - 40), index + 1)
        return Entry(index, term, fastsm.once(session, rng.randrange(1, 5), simple(), expires=rng.randrange(1_000)))
    if way == 14:
        return Entry(index, term, fastsm.tick(rng.randrange(1_000), limit=rng.randrange(4)))
    if way == 1:
        return Entry(index, term, fastsm.batch([simple() for _ in range(rng.randrange(5))]))
    return Entry(index, term, simple())


def drive(machine: FastStateMachine, model: MemoryStateMachine, rng: random.Random, contiguous: bool) -> None:
    """Apply random chunks, terms, gaps, hard state and flushes to both."""
    for _ in range(60):
        index, term = model.last_applied()
        chunk = []
        for _ in range(rng.randrange(12)):
            term += rng.choice([0, 0, 0, 0, 1, 4])
            index += 1 if contiguous else rng.choice([1, 1, 1, 2, 50])
            chunk.append(random_entry(rng, index, term))
        assert machine.apply(chunk) == model.apply(chunk)
        index, term = model.last_applied()
        metadata = SnapshotMetadata(LogId(index, term), rng.randbytes(32))
        way = rng.randrange(6)
        for each in (machine, model):
            if way == 0:
                each.flush()
            elif way == 1:
                each.update_last_applied((index + 1, term + 1))
            elif way == 2:
                each.update_last_snapshot_metadata(metadata)
            elif way == 3:
                each.persist_last_snapshot_metadata(metadata)


def assert_same(state: Decoded, model: MemoryStateMachine) -> None:
    assert list(state.items.items()) == model.items()
    assert state.last_applied == model.last_applied()
    assert state.membership == model.membership()
    assert state.clock == model.clock()
    assert state.deadlines == {key: model.deadline(key) for key in state.items}
    assert state.sessions == inside(model).state.sessions
    metadata = model.snapshot_metadata()
    assert state.metadata == (metadata and (metadata.last_included, metadata.checksum))
    for index in range(model.last_applied().index + 3):
        assert state.term(index) == model.entry_term(index)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_page_reads_a_closed_directory(directory: Path, seed: int, contiguous: bool) -> None:
    """After a clean close a reader made from the page finds the model's state, all of it durable."""
    rng = random.Random(seed)
    model = MemoryStateMachine(contiguous=contiguous)
    with FastStateMachine(directory, contiguous=contiguous) as machine:
        drive(machine, model, rng, contiguous)
    with FastStateMachine(directory, contiguous=contiguous) as machine:
        drive(machine, model, rng, contiguous)
    state = decode_directory(directory)
    assert_same(state, model)
    assert state.clean
    assert state.end == state.known_durable == (directory / "log-1").stat().st_size
    with FastStateMachine(directory) as machine:
        assert machine.stats().recovery.frames == len(state.frames)


def test_page_reads_a_living_directory(
    directory: Path, machine_at: Callable[..., FastStateMachine]
) -> None:
    """While an owner has the directory open, the reader finds everything flushed; the room ahead is zeros."""
    model = MemoryStateMachine()
    machine = machine_at(directory)
    drive(machine, model, random.Random(9), True)
    for each in (machine, model):
        each.save_hard_state()
    state = decode_directory(directory)
    assert_same(state, model)
    assert not state.clean
    assert state.end == machine.stats().log_bytes
    assert not any((directory / "log-1").read_bytes()[state.end :])


def test_page_reads_the_next_generation(directory: Path) -> None:
    """After a reset CURRENT names the next log, which starts from the empty state, under another identity."""
    with FastStateMachine(directory) as machine:
        machine.apply([(1, 1, fastsm.put(b"old", b"state"))])
        machine.flush()
        first = header((directory / "CURRENT").read_bytes(), b"FASTSM-C", 64)
        machine.clear()
        machine.apply([(1, 3, fastsm.put(b"new", b"state"))])
    second = header((directory / "CURRENT").read_bytes(), b"FASTSM-C", 64)
    assert (first[0], second[0]) == (1, 2)
    assert first[1] != second[1]
    state = decode_directory(directory)
    assert state.items == {b"new": b"state"}
    assert state.runs == [(1, 1, 3)]


@pytest.fixture
def saved_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save tables of states of any size."""
    monkeypatch.setattr(fastsm.core.generations, "SAVE_TABLE_ABOVE", 0)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_page_reads_a_base_and_a_saved_table(
    directory: Path, tmp_path: Path, seed: int, contiguous: bool, saved_tables: None
) -> None:
    """After compactions, a restart, an install and a kill, base, log and table are as the page describes them."""
    rng = random.Random(seed)
    model = MemoryStateMachine(contiguous=contiguous)
    with FastStateMachine(directory, contiguous=contiguous, retain_entries=100) as machine:
        drive(machine, model, rng, contiguous)
        machine.compact()
        drive(machine, model, rng, contiguous)
    state = decode_directory(directory)
    assert_same(state, model)
    assert state.log_start >= 131_072
    assert check_table(*table_log_base(directory)).frames == state.frames
    with FastStateMachine(directory, contiguous=contiguous, retain_entries=100) as machine:
        drive(machine, model, rng, contiguous)
        if seed % 2:
            for each in (machine, model):
                each.write_snapshot(tmp_path)
                each.install_snapshot(None, tmp_path)
        for each in (machine, model):
            each.save_hard_state()
        crash_copy(directory, tmp_path / "killed")
        machine.compact()
    for path in (directory, tmp_path / "killed"):
        state = decode_directory(path)
        assert_same(state, model)
        known = check_table(*table_log_base(path))
        assert len(known.frames) <= len(state.frames)
    assert len(known.frames) < len(state.frames) or seed % 2


def table_log_base(path: Path) -> tuple[bytes, bytes, bytes]:
    (table,) = path.glob("table-*")
    generation = table.name.removeprefix("table-")
    return tuple((path / f"{name}-{generation}").read_bytes() for name in ("table", "log", "base"))  # type: ignore[return-value]


def test_page_reads_a_table_of_many_segments(directory: Path, saved_tables: None) -> None:
    """Every key is in a slot where its hash belongs, however often segments were split."""
    with FastStateMachine(directory) as machine:
        for start in range(0, 30_000, 1_000):
            machine.apply([(i, 1, fastsm.put(b"%d" % i, b"")) for i in range(start + 1, start + 1_001)])
        machine.apply([(30_000 + i, 1, fastsm.delete(b"%d" % i)) for i in range(1, 5_000)])
        machine.compact(20_000)
    assert len(decode_directory(directory).items) == 25_001


class Remembering(MemoryStateMachine):
    """The model, which also records the entries that it applied."""

    applied: tuple[Entry, ...] = ()

    def apply(self, chunk: Any) -> Any:
        before = self.last_applied().index
        results = super().apply(chunk)
        self.applied += tuple(Entry(*entry) for entry in chunk if entry[0] > before)
        return results


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize("seed", range(3))
def test_page_reads_snapshots(directory: Path, tmp_path: Path, seed: int, compress: str) -> None:
    """The page reads snapshots with any attachment and codec, as of any entry: they have the model's state."""
    rng = random.Random(seed)
    model = Remembering(contiguous=False)
    with FastStateMachine(directory, contiguous=False) as machine:
        for life in range(3):
            drive(machine, model, rng, False)
            attachment = rng.randbytes(life * 5)
            metadata = machine.write_snapshot(tmp_path, compress=compress, attachment=attachment)
            data = (tmp_path / FILE).read_bytes()
            assert data[160 : 160 + len(attachment)] == attachment
            assert metadata.checksum == data[128:160]
            state = decode_snapshot(data)
            model.update_last_snapshot_metadata(metadata)
            state.metadata = (metadata.last_included, metadata.checksum)
            assert_same(state, model)
        for _ in range(10):
            last = LogId(*rng.choice(inside(model).state.seen))
            machine.write_snapshot(tmp_path, last, compress=compress)
            earlier = MemoryStateMachine(contiguous=False)
            earlier.apply([entry for entry in model.applied if entry.index <= last.index])
            earlier.update_last_applied(last)
            state = decode_snapshot((tmp_path / FILE).read_bytes())
            assert list(state.items.items()) == earlier.items()
            assert state.deadlines == {key: earlier.deadline(key) for key in state.items}
            assert state.sessions == inside(earlier).state.sessions
            assert state.clock == earlier.clock()
            assert (state.last_applied, state.membership) == (last, earlier.membership())


# ---- the page's own example --------------------------------------------------------------------------

def printed_files() -> list[bytes]:
    """Return CURRENT, log-1 and the snapshot that the page prints."""
    blocks = re.findall(r"```\n((?:[0-9a-f]{4}  [0-9a-f ]+\n)+)```", PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == 3
    files = []
    for block in blocks:
        content = bytearray()
        for line in block.splitlines():
            offset, row = line.split("  ")
            assert int(offset, 16) == len(content)
            content += bytes.fromhex(row)
        files.append(bytes(content))
    return files


def test_printed_example_decodes(directory: Path) -> None:
    """The page's reader and the library both read the printed bytes as the page says."""
    directory.mkdir()
    for name, content in zip(("CURRENT", "log-1", FILE), printed_files(), strict=True):
        (directory / name).write_bytes(content)
    state = decode_directory(directory)
    assert state.items == {b"color": b"red"}
    assert state.last_applied == (3, 2)
    assert state.runs == [(1, 2, 1), (3, 3, 2)]
    assert state.frames == [0x60, 0xB0, 0xF8]
    assert state.clean
    snapshot = decode_snapshot((directory / FILE).read_bytes())
    assert (snapshot.items, snapshot.runs, snapshot.places) == (state.items, state.runs, {b"color": 0xD0})
    with FastStateMachine(directory, expect_applied=(3, 2)) as machine:
        assert machine.get(b"color") == b"red"
        assert machine.stats().recovery.clean
        machine.write_snapshot(directory / "again")
    assert (directory / "again" / FILE).read_bytes() == (directory / FILE).read_bytes()


def test_page_reader_notices_every_flipped_byte() -> None:
    """No byte of the printed files can change unnoticed: the page's checksums cover everything."""
    current, log, snapshot = printed_files()
    for offset in range(len(log)):
        damaged = bytearray(log)
        damaged[offset] ^= 0x40
        with pytest.raises(Corrupt):
            decode_log(bytes(damaged), 1, 0x0807060504030201, len(log))
    for offset in range(len(current)):
        damaged = bytearray(current)
        damaged[offset] ^= 0x40
        with pytest.raises(Corrupt):
            header(bytes(damaged), b"FASTSM-C", 64)
    for offset in range(len(snapshot)):
        damaged = bytearray(snapshot)
        damaged[offset] ^= 0x40
        with pytest.raises(Corrupt):
            decode_snapshot(bytes(damaged))
