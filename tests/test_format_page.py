"""docs/format.md is enough: a reader made from that page alone reads what the library writes.

Nothing here but the page is known of the formats; fastsm is used to write, and as the model to compare with.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import xxhash

import fastsm
from fastsm import Entry, FastStateMachine, LogId, MemoryStateMachine, SnapshotMetadata

PAGE = Path(__file__).resolve().parent.parent / "docs" / "format.md"
GAP = 2**64 - 1
SAYS_NOTHING = 2**32 - 1


class Corrupt(Exception):
    pass


@dataclass
class Decoded:
    items: dict[bytes, bytes] = field(default_factory=dict)
    last_applied: tuple[int, int] = (0, 0)
    runs: list[tuple[int, int, int]] = field(default_factory=list)  # first, last, term
    membership: tuple[tuple[int, int], bytes] | None = None
    metadata: tuple[tuple[int, int], bytes] | None = None
    end: int = 64
    known_durable: int = 0
    clean: bool = False
    frames: list[int] = field(default_factory=list)

    def term(self, index: int) -> int | None:
        for first, last, term in self.runs:
            if first <= index <= last:
                return term
        return None


def demand(condition: bool, what: str) -> None:
    if not condition:
        raise Corrupt(what)


def header(data: bytes, magic: bytes) -> tuple[int, int]:
    """The checks that both files share; gives generation and identity."""
    demand(data[:8] == magic, "magic")
    demand(xxhash.xxh64_intdigest(data[:56]) == struct.unpack_from("<Q", data, 56)[0], "checksum of a header")
    version, zero, generation, identity = struct.unpack_from("<IIQQ", data, 8)
    demand(version == 0, "version")
    demand(zero == 0, "a zero")
    return generation, identity


def decode_directory(path: Path) -> Decoded:
    current = (path / "CURRENT").read_bytes()
    demand(len(current) == 64, "size of CURRENT")
    generation, identity = header(current, b"FASTSM-C")
    demand(current[40:56] == bytes(16), "a zero")
    log = (path / f"log-{generation}").read_bytes()
    return decode_log(log, generation, identity, *struct.unpack_from("<Q", current, 32))


def decode_log(log: bytes, generation: int, identity: int, durable_offset: int) -> Decoded:
    demand(header(log, b"FASTSM-L") == (generation, identity), "the log that CURRENT names")
    base_index, base_term = struct.unpack_from("<QQ", log, 32)
    demand(log[48:56] == bytes(8), "a zero")
    state = Decoded(last_applied=(base_index, base_term), known_durable=durable_offset)
    while (watermark := valid_frame(log, state.end, identity)) is not None:
        state.known_durable = max(state.known_durable, watermark)
        state.frames.append(state.end)
        (length,) = struct.unpack_from("<Q", log, state.end + 8)
        decode_frame(state, log[state.end : state.end + length])
        state.end += length
    demand(state.end >= state.known_durable, "durable bytes")
    for offset in range(state.end, len(log), 8):
        watermark = valid_frame(log, offset, identity)
        demand(watermark is None or watermark <= state.end, "durable bytes, says a later frame")
    return state


def valid_frame(log: bytes, offset: int, identity: int) -> int | None:
    """The watermark of a valid frame (0 when it says nothing), or None."""
    left = len(log) - offset
    if left < 24:
        return None
    checksum, length, lag, run_count = struct.unpack_from("<QQII", log, offset)
    if length % 8 or not 24 + 16 * run_count <= length <= left:
        return None
    watermark = 0 if lag == SAYS_NOTHING else offset - 8 * lag
    if lag != SAYS_NOTHING and watermark < 64:
        return None
    if xxhash.xxh64_intdigest(log[offset + 8 : offset + length], identity ^ offset) != checksum:
        return None
    return watermark


def decode_frame(state: Decoded, frame: bytes) -> None:
    (run_count,) = struct.unpack_from("<I", frame, 20)
    before = state.last_applied[0]
    for i in range(run_count):
        last, term = struct.unpack_from("<QQ", frame, 24 + 16 * i)
        decode_run(state, before if i == 0 else struct.unpack_from("<Q", frame, 8 + 16 * i)[0], last, term)
        demand(term != GAP or i + 1 < run_count, "a gap is not last")
    offset = 24 + 16 * run_count
    while offset < len(frame):
        demand(len(frame) - offset >= 16, "a whole record")
        index, value_size, key_size, operation, zero = struct.unpack_from("<QIHBB", frame, offset)
        size = -(-(16 + key_size + value_size) // 8) * 8
        record = frame[offset : offset + size]
        demand(len(record) == size, "a whole record")
        demand(zero == 0 and not any(record[16 + key_size + value_size :]), "a zero")
        if operation <= 3:
            demand(before < index <= state.last_applied[0], "an index of this frame")
            demand(state.term(index) is not None, "an index in no gap")
            before = index - 1
        key, value = record[16 : 16 + key_size], record[16 + key_size : 16 + key_size + value_size]
        decode_record(state, operation, index, key, value)
        offset += size


def decode_run(state: Decoded, behind: int, last: int, term: int) -> None:
    demand(last > behind, "indexes that rise")
    if term == GAP:
        return
    demand(term >= state.last_applied[1], "terms that never fall")
    if state.runs and state.runs[-1][2] == term:
        state.runs[-1] = (state.runs[-1][0], last, term)
    else:
        state.runs.append((behind + 1, last, term))
    state.last_applied = (last, term)


def decode_record(state: Decoded, operation: int, index: int, key: bytes, value: bytes) -> None:
    state.clean = operation == 5
    if operation == 1:
        state.items[key] = value
    elif operation == 2:
        demand(value == b"", "no value")
        state.items.pop(key, None)
    elif operation == 3:
        demand(key == b"", "no key")
        term = state.term(index)
        assert term is not None
        state.membership = ((index, term), value)
    elif operation == 4:
        demand(key == b"" and len(value) >= 8, "a term and a checksum")
        state.metadata = ((index, *struct.unpack_from("<Q", value)), value[8:])
    else:
        demand(operation == 5 and not key and not value, "a known operation")


# ---- what the library writes -------------------------------------------------------------------------

def random_entry(rng: random.Random, index: int, term: int) -> Entry:
    def key() -> bytes:
        return b"key %d" % rng.randrange(40)

    def value() -> bytes:
        return rng.randbytes(rng.choice([0, 1, 7, 8, 9, 100, 3000]))

    def simple() -> bytes:
        return rng.choice([
            lambda: fastsm.put(key(), value()),
            lambda: fastsm.put(key(), b"same"),
            lambda: fastsm.delete(key()),
            lambda: fastsm.compare_and_swap(key(), b"same", value()),
            lambda: fastsm.compare_and_swap(key(), rng.choice([None, b"same"]), None),
            fastsm.noop,
        ])()

    way = rng.randrange(12)
    if way == 0:
        return Entry(index, term, fastsm.config(value()))
    if way == 1:
        return Entry(index, term, fastsm.batch([simple() for _ in range(rng.randrange(5))]))
    return Entry(index, term, simple())


def drive(machine: FastStateMachine, model: MemoryStateMachine, rng: random.Random, contiguous: bool) -> None:
    """Random chunks, terms, gaps, hard state and flushes, to both."""
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
    assert state.items == dict(model.items())
    assert state.last_applied == model.last_applied()
    assert state.membership == model.membership()
    metadata = model.snapshot_metadata()
    assert state.metadata == (metadata and (metadata.last_included, metadata.checksum))
    for index in range(model.last_applied().index + 3):
        assert state.term(index) == model.entry_term(index)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_page_reads_a_closed_directory(directory: Path, seed: int, contiguous: bool) -> None:
    """After a clean close a reader made from the page finds the model's state, all of it known durable."""
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
    """Beside a living owner the reader finds what was flushed; the room ahead is zeros."""
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
        first = header((directory / "CURRENT").read_bytes(), b"FASTSM-C")
        machine.clear()
        machine.apply([(1, 3, fastsm.put(b"new", b"state"))])
    second = header((directory / "CURRENT").read_bytes(), b"FASTSM-C")
    assert (first[0], second[0]) == (1, 2)
    assert first[1] != second[1]
    state = decode_directory(directory)
    assert state.items == {b"new": b"state"}
    assert state.runs == [(1, 1, 3)]


# ---- the page's own example --------------------------------------------------------------------------

def printed_files() -> tuple[bytes, bytes]:
    """CURRENT and log-1 as the page prints them."""
    blocks = re.findall(r"```\n((?:[0-9a-f]{4}  [0-9a-f ]+\n)+)```", PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == 2
    files = []
    for block in blocks:
        content = bytearray()
        for line in block.splitlines():
            offset, row = line.split("  ")
            assert int(offset, 16) == len(content)
            content += bytes.fromhex(row)
        files.append(bytes(content))
    return files[0], files[1]


def test_printed_example_decodes(directory: Path) -> None:
    """The bytes that the page prints mean what the page says, to the page's reader and to the library."""
    directory.mkdir()
    for name, content in zip(("CURRENT", "log-1"), printed_files(), strict=True):
        (directory / name).write_bytes(content)
    state = decode_directory(directory)
    assert state.items == {b"color": b"red"}
    assert state.last_applied == (3, 2)
    assert state.runs == [(1, 2, 1), (3, 3, 2)]
    assert state.frames == [0x40, 0x88, 0xC8]
    assert state.clean
    with FastStateMachine(directory, expect_applied=(3, 2)) as machine:
        assert machine.get(b"color") == b"red"
        assert machine.stats().recovery.clean


def test_page_reader_notices_every_flipped_byte() -> None:
    """No byte of the printed files can change unnoticed: the page's checksums cover everything."""
    current, log = printed_files()
    for offset in range(len(log)):
        damaged = bytearray(log)
        damaged[offset] ^= 0x40
        with pytest.raises(Corrupt):
            decode_log(bytes(damaged), 1, 0x0807060504030201, len(log))
    for offset in range(len(current)):
        damaged = bytearray(current)
        damaged[offset] ^= 0x40
        with pytest.raises(Corrupt):
            header(bytes(damaged), b"FASTSM-C")
