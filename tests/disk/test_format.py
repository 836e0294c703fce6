"""The disk formats: every offset is recomputed, and every damage to a header or a frame has its own error."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import CorruptionError, FastStateMachine, FormatVersionError, LogId, SnapshotMetadata
from fastsm.disk import format, headers, snapshot_header
from support.by_hand import (
    CLOCK,
    CLOSE,
    CONFIG,
    CURRENT,
    CURRENT_FIELDS,
    DELETE,
    FRAME,
    FRAME_FIELDS,
    GAP,
    IDENTITY,
    LOG,
    LOG_FIELDS,
    PUT,
    RECORD,
    RECORD_FIELDS,
    RUN,
    SNAPSHOT,
    SNAPSHOT_FIELDS,
    SNAPSHOT_HEAD,
    START,
    TABLE,
    TOUCH,
    current,
    frame,
    frame_checksum,
    head_checksum,
    log_head,
    record,
    run,
    seal,
    sealed,
)


def offsets(fields: list[str]) -> list[int]:
    """Return the offset of each field, and of the end of the last one."""
    return [struct.calcsize("<" + "".join(fields[:count])) for count in range(len(fields) + 1)]


# ---- offsets -----------------------------------------------------------------------------------------

def chain_in_source(first: str, last: str) -> list[int]:
    """Return the values of an enum chain in format.pxd, from one name to another."""
    source = (Path(fastsm.__file__).parent / "disk" / "format.pxd").read_text(encoding="utf-8")
    names: dict[str, int] = {}
    for name, left, added in re.findall(r"^    ([A-Z_]+) = (?:([A-Z_]+) \+ )?(\d+)\b", source, re.MULTILINE):
        names[name] = (names[left] if left else 0) + int(added)
    chain = list(names)
    return [names[name] for name in chain[chain.index(first) : chain.index(last) + 1]]


@pytest.mark.parametrize(
    ("first", "last", "fields"),
    [
        ("LOG_MAGIC", "LOG_HEADER_SIZE", LOG_FIELDS),
        ("CURRENT_MAGIC", "CURRENT_SIZE", CURRENT_FIELDS),
        ("FRAME_CHECKSUM", "FRAME_RUNS", FRAME_FIELDS),
        ("RECORD_INDEX", "RECORD_KEY", RECORD_FIELDS),
        ("SNAPSHOT_MAGIC", "SNAPSHOT_HEADER_SIZE", SNAPSHOT_FIELDS),
    ],
)
def test_offsets_are_those_of_the_fields(first: str, last: str, fields: list[str]) -> None:
    """Each offset in the source is where `struct` puts the field."""
    assert chain_in_source(first, last) == offsets(fields)


def test_sizes_that_others_rely_on() -> None:
    """Headers, runs and record headers are multiples of 8, so that everything after them is aligned."""
    assert struct.calcsize(LOG) == headers.LOG_HEADER_BYTES == START
    assert struct.calcsize(CURRENT) == 64
    assert struct.calcsize(SNAPSHOT_HEAD) == snapshot_header.HEADER_BYTES == 160
    assert struct.calcsize(TABLE) == headers.TABLE_HEADER_BYTES == 288
    assert chain_in_source("TERM_RUN_SIZE", "TERM_RUN_SIZE") == [format.TERM_RUN_BYTES] == [24]
    assert headers.SEGMENT_BYTES == struct.calcsize("<4096QII56s") == 32_832
    assert chain_in_source("RUN_SIZE", "RUN_SIZE") == [struct.calcsize(RUN)] == [16]
    assert struct.calcsize(FRAME) == 32
    assert struct.calcsize(RECORD) == 16


# ---- headers -----------------------------------------------------------------------------------------

HEAD = headers.LogHead(
    generation=3, identity=2**64 - 5, base_index=10**12, base_term=77, base_size=4_096, base_checksum=b"\7" * 32
)
NAMED = headers.CurrentFile(
    generation=3, identity=2**64 - 5, durable_offset=123_456, last_frame=123_000, last_checksum=2**64 - 9
)
SAVED = headers.SavedTable(
    identity=IDENTITY, log_offset=200, log_start=131_072, seed0=1, seed1=2**64 - 1, keys=9, live_bytes=300,
    config_place=160, segments=2, depth=1, runs=3, metadata_size=48, dead_words=5, frames=4, last_frame=150,
    last_checksum=2**62, clock=77, clock_place=168, touch_place=176, key_deadlines=3, session_deadlines=1,
    sessions=headers.SavedPart(3, 4, 5, 1, 0), touches=headers.SavedPart(6, 7, 0, 0, 0), ordered=9, body_checksum=2**63,
)
FLAT = (*SAVED[:-4], *SAVED.sessions, *SAVED.touches, SAVED.ordered, SAVED.body_checksum)
ORDER = 65_536 + 2 * 65_536 + 32_832  # the second table's segment starts at the next multiple
TABLE_SIZE = ORDER + 8 * 9


def test_headers_are_what_struct_makes() -> None:
    """Packing a header gives the bytes that `struct` and the reference checksum give."""
    assert headers.pack_log_head(HEAD) == log_head(HEAD.identity, 3, (10**12, 77), 4_096, b"\7" * 32)
    assert headers.pack_current(NAMED) == current(NAMED.identity, 3, 123_456, 123_000, 2**64 - 9)
    assert headers.pack_saved_table(SAVED) == sealed(TABLE, b"FASTSM-T", 0, 0, *FLAT)


def test_headers_come_back() -> None:
    """Unpacking returns what was packed; a log may continue after its header."""
    assert headers.unpack_log_head(headers.pack_log_head(HEAD), "log") == HEAD
    assert headers.unpack_log_head(headers.pack_log_head(HEAD) + b"frames", "log") == HEAD
    assert headers.unpack_current(headers.pack_current(NAMED), "CURRENT") == NAMED
    assert unpack_table(headers.pack_saved_table(SAVED), "table") == SAVED


def unpack_table(data: bytes, path: str) -> headers.SavedTable:
    return headers.unpack_saved_table(data, path, TABLE_SIZE)


HEADERS = [
    (headers.unpack_log_head, headers.pack_log_head(HEAD)),
    (headers.unpack_current, headers.pack_current(NAMED)),
    (unpack_table, headers.pack_saved_table(SAVED)),
]
NAMES = ["log", "CURRENT", "table"]


@pytest.mark.parametrize(("unpack", "packed"), HEADERS, ids=NAMES)
def test_every_flipped_bit_of_a_header_is_corruption(unpack: Any, packed: bytes) -> None:
    """Each bit of a header is covered by the magic or the checksum; the error names the file and the offset."""
    for bit in range(8 * len(packed)):
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError) as caught:
            unpack(bytes(damaged), "some/file")
        assert caught.value.path == "some/file"
        assert caught.value.offset == (0 if bit < 64 else len(packed) - 8)
        assert "some/file" in str(caught.value)
        assert caught.value.expected != caught.value.found


@pytest.mark.parametrize(("unpack", "packed"), HEADERS, ids=NAMES)
def test_a_header_cut_short_is_corruption(unpack: Any, packed: bytes) -> None:
    """A header of any smaller size is refused with its own error."""
    for size in range(len(packed)):
        with pytest.raises(CorruptionError, match=f"{size} bytes") as caught:
            unpack(packed[:size], "file")
        assert caught.value.path == "file"


def test_current_has_one_size() -> None:
    """Bytes after CURRENT's end are refused."""
    with pytest.raises(CorruptionError, match="65 bytes"):
        headers.unpack_current(headers.pack_current(NAMED) + b"\0", "CURRENT")


@pytest.mark.parametrize("version", [1, 2**32 - 1])
def test_a_foreign_version_is_told_from_damage(version: int) -> None:
    """Another version with a correct checksum is a ``FormatVersionError``; with a wrong one it is damage."""
    log = sealed(LOG, b"FASTSM-L", version, 0, 1, 2, 3, 4, 0, bytes(32))
    named = sealed(CURRENT, b"FASTSM-C", version, 0, 1, 2, 3, 0, 0)
    saved = sealed(TABLE, b"FASTSM-T", version, 0, *FLAT)
    for unpack, packed in ((headers.unpack_log_head, log), (headers.unpack_current, named), (unpack_table, saved)):
        with pytest.raises(FormatVersionError, match=f"version {version}") as caught:
            unpack(packed, "file")
        assert (caught.value.path, caught.value.expected, caught.value.found) == ("file", 0, version)
        with pytest.raises(CorruptionError):
            unpack(packed[:-1] + bytes([packed[-1] ^ 1]), "file")


def test_a_foreign_version_in_other_fields_is_still_a_version() -> None:
    """The version is checked first, because a later version may use fields that are zero in this one."""
    packed = sealed(LOG, b"FASTSM-L", 1, 99, 1, 2, 2**64 - 1, 2**64 - 1, 2**64 - 1, b"anything")
    with pytest.raises(FormatVersionError):
        headers.unpack_log_head(packed, "file")


def test_reserved_bytes_are_refused() -> None:
    """Reserved bytes that are not zero are refused, even if the checksum is correct."""
    for packed, unpack, offset in (
        (sealed(LOG, b"FASTSM-L", 0, 1, 1, 2, 3, 4, 0, bytes(32)), headers.unpack_log_head, 12),
        (sealed(CURRENT, b"FASTSM-C", 0, 1, 1, 2, 3, 0, 0), headers.unpack_current, 12),
        (sealed(TABLE, b"FASTSM-T", 0, 1, *FLAT), unpack_table, 12),
    ):
        with pytest.raises(CorruptionError) as caught:
            unpack(packed, "file")
        assert caught.value.offset == offset


@pytest.mark.parametrize(
    ("base", "size", "offset"), [((2**64 - 1, 0), 0, 32), ((0, 2**64 - 1), 0, 40), ((1, 1), 2**39 + 1, 48)]
)
def test_a_base_that_cannot_be_is_corruption(base: tuple[int, int], size: int, offset: int) -> None:
    """A log head with an impossible base entry or base size is refused."""
    headers.unpack_log_head(log_head(base=(2**64 - 2, 2**64 - 2), size=2**39), "log")
    with pytest.raises(CorruptionError) as caught:
        headers.unpack_log_head(log_head(base=base, size=size), "log")
    assert caught.value.offset == offset


def test_sections_of_a_saved_table_lie_one_after_the_other() -> None:
    """Each section starts at a multiple of 8, the segments at one of 65,536, and the order ends the file."""
    # Two entries of a directory take 8 bytes, and one is padded to 8; the touches have no segments, hence no directory.
    assert SAVED.sections == (
        288, 360, 408, (448, 456, 464), (464, 512), 528, (65_536, 196_608, 229_440), ORDER, TABLE_SIZE)
    assert SAVED._replace(ordered=0).sections.end == ORDER
    assert SAVED._replace(metadata_size=0, dead_words=0).sections[:4] == (288, 360, 360, (360, 368, 376))
    assert SAVED._replace(metadata_size=9).sections.dead == 360 + 16
    assert SAVED._replace(depth=14).sections.segments == (131_072, 262_144, 294_976)


@pytest.mark.parametrize("field", ["runs", "metadata_size", "dead_words", "segments", "depth", "ordered"])
@pytest.mark.parametrize("number", [2**17, 2**31, 2**61, 2**64 - 1])
def test_sections_that_do_not_add_up_are_refused(field: str, number: int) -> None:
    """A saved table whose counts do not match its file's size is refused, however large they are."""
    packed = headers.pack_saved_table(SAVED._replace(**{field: number}))
    with pytest.raises(CorruptionError, match="sections"):
        unpack_table(packed, "table")


def test_a_directory_of_another_version_is_left_alone(directory: Path) -> None:
    """Opening files of another version raises ``FormatVersionError`` and writes nothing to them."""
    directory.mkdir()
    for current_version, log_version in ((1, 0), (0, 1)):
        files = {
            "CURRENT": sealed(CURRENT, b"FASTSM-C", current_version, 0, 1, 2, START, 0, 0),
            "log-1": sealed(LOG, b"FASTSM-L", log_version, 0, 1, 2, 0, 0, 0, bytes(32)) + b"frames of the future",
        }
        for name, content in files.items():
            (directory / name).write_bytes(content)
        with pytest.raises(FormatVersionError, match="CURRENT" if current_version else "log-1"):
            FastStateMachine(directory)
        assert {name: (directory / name).read_bytes() for name in files} == files


def test_a_log_that_current_does_not_name_is_corruption(directory: Path) -> None:
    """A log of another identity or generation, or a missing log, is corruption that names the log."""
    directory.mkdir()
    (directory / "CURRENT").write_bytes(current())
    for content in (None, log_head(identity=IDENTITY + 1), log_head(generation=2)):
        if content is not None:
            (directory / "log-1").write_bytes(content)
        with pytest.raises(CorruptionError, match="CURRENT") as caught:
            FastStateMachine(directory)
        assert caught.value.path == str(directory / "log-1")
    assert (directory / "log-1").read_bytes() == log_head(generation=2)


# ---- frames and records ------------------------------------------------------------------------------

def write_log(directory: Path, *frames: bytes, durable: int = START) -> None:
    directory.mkdir()
    (directory / "CURRENT").write_bytes(current(durable=durable))
    (directory / "log-1").write_bytes(log_head() + b"".join(frames))


def test_frames_are_what_struct_makes(directory: Path) -> None:
    """A log written by the library equals, byte for byte, the one that this file makes from the same history."""
    with FastStateMachine(directory, contiguous=False) as machine:
        machine.apply([
            (2, 1, fastsm.put(b"key", b"value")), (3, 1, fastsm.noop()), (7, 4, fastsm.delete(b"k")),
        ])
        machine.apply([(8, 4, fastsm.config(b"a,b,c"))])
        machine.update_last_applied((9, 5))
        machine.persist_last_snapshot_metadata(SnapshotMetadata(LogId(8, 4), b"\7" * 32))
        machine.apply([(10, 5, fastsm.compare_and_swap(b"key", b"no", b""))])
    written = (directory / "log-1").read_bytes()
    _, _, _, _, identity, *_ = struct.unpack_from(LOG, written)
    expected = log_head(identity)
    durable = len(expected)
    offset, previous = 0, head_checksum(expected)
    for runs, records, synced in (
        ([run(1, GAP), run(3, 1), run(6, GAP), run(7, 4)],
         record(PUT, 2, b"key", b"value") + record(DELETE, 7, b"k"), False),
        ([run(8, 4)], record(CONFIG, 8, b"", b"a,b,c"), False),
        ([run(9, 5)], record(SNAPSHOT, 8, b"", struct.pack("<Q", 4) + b"\7" * 32), True),
        ([run(10, 5)], b"", True),
        ([], record(CLOSE, 10), False),
    ):
        offset = len(expected)
        expected += frame(
            offset, runs, records, lag=(offset - durable) // 8, identity=identity, previous=previous)
        previous = frame_checksum(expected[offset:])
        if synced:
            durable = len(expected)
    assert written == expected
    assert (directory / "CURRENT").read_bytes() == current(identity, 1, len(expected), offset, previous)


def test_a_log_made_by_hand_opens(directory: Path) -> None:
    """Frames made by hand from docs/format.md are read: state, terms and last applied."""
    first = frame(START, [run(4, GAP), run(6, 2)], record(PUT, 5, b"a", b"1") + record(PUT, 6, b"b", b""))
    second = frame(
        START + len(first), [run(7, 3)], record(DELETE, 7, b"b"), lag=2**32 - 1, previous=frame_checksum(first))
    write_log(directory, first, second, durable=START + len(first) + len(second))
    with FastStateMachine(directory) as machine:
        assert (machine.get(b"a"), machine.get(b"b")) == (b"1", None)
        assert machine.last_applied() == machine.durable() == (7, 3)
        assert [machine.entry_term(index) for index in range(4, 9)] == [None, 2, 2, 3, None]


GOOD = record(PUT, 1, b"k", b"v")

MALFORMED = {
    "an index that does not rise": ([run(1, 1), run(1, 2)], GOOD),
    "an index of zero": ([run(0, 1)], b""),
    "the index that is a mark": ([run(2**64 - 1, 1)], GOOD),
    "a term that falls": ([run(1, 2), run(2, 1)], GOOD),
    "a gap at the end": ([run(1, 1), run(2, GAP)], GOOD),
    "a record of no entry": ([], GOOD),
    "a record before its frame's entries": ([run(1, 1)], record(PUT, 0, b"k", b"v")),
    "a record after its frame's entries": ([run(1, 1)], record(PUT, 2, b"k", b"v")),
    "half a record": ([run(1, 1)], GOOD[:8]),
    "a key that reaches past the frame": ([run(1, 1)], struct.pack(RECORD, 1, 0, 9, PUT, 0) + bytes(8)),
    "a value that reaches past the frame": ([run(1, 1)], struct.pack(RECORD, 1, 9, 0, PUT, 0) + bytes(8)),
    "the largest value size": ([run(1, 1)], struct.pack(RECORD, 1, 2**32 - 1, 65_535, PUT, 0)),
    "operation 0": ([run(1, 1)], record(0, 1)),
    "operation 10": ([run(1, 1)], record(10, 1)),
    "a touch with a value": ([run(1, 1)], record(TOUCH, 1, b"k", b"v")),
    "a touch in a gap": ([run(1, GAP), run(2, 1)], record(TOUCH, 1, b"k")),
    "a deadline out of range": ([run(1, 1)], record(PUT, 1, b"k", b"v", 2**63)),
    "a touch with a deadline out of range": ([run(1, 1)], record(TOUCH, 1, b"k", b"", 2**64 - 1)),
    "a byte that promises a deadline beyond the frame": ([run(1, 1)], record(PUT, 1, b"k", b"v", timed=1)),
    "a byte that promises two deadlines": ([run(1, 1)], record(PUT, 1, b"k", b"v", 5, timed=2) + bytes(8)),
    "a delete with a deadline": ([run(1, 1)], record(DELETE, 1, b"k", b"", 5)),
    "a config with a deadline": ([run(1, 1)], record(CONFIG, 1, b"", b"v", 5)),
    "padding that is not zero before a deadline": (
        [run(1, 1)], record(PUT, 1, b"k", b"v", 5, timed=1)[:-9] + b"\1" + bytes(8)),
    "a clock with a key": ([run(1, 1)], record(CLOCK, 1, b"k", b"\1" + bytes(7))),
    "a clock cut short": ([run(1, 1)], record(CLOCK, 1, b"", b"\1" + bytes(6))),
    "a clock of 0": ([run(1, 1)], record(CLOCK, 1, b"", bytes(8))),
    "a clock out of range": ([run(1, 1)], record(CLOCK, 1, b"", bytes(7) + b"\x80")),
    "a session without a number": ([run(1, 1)], record(6, 1, b"", bytes(16))),
    "a session cut short": ([run(1, 1)], record(6, 1, bytes(8), bytes(15))),
    "a session with a result before its first command": ([run(1, 1)], record(6, 1, bytes(8), bytes(17))),
    "a session without a result": ([run(1, 1)], record(6, 1, bytes(8), b"\1" + bytes(15))),
    "a session with half a result": ([run(1, 1)], record(6, 1, bytes(8), b"\1" + bytes(15) + b"\2")),
    "a session with a deadline that cannot be": ([run(1, 1)], record(6, 1, bytes(8), bytes(15) + b"\x80")),
    "a session of no entry": ([], record(6, 1, bytes(8), bytes(16))),
    "a session in a gap": ([run(1, GAP), run(2, 1)], record(6, 1, bytes(8), bytes(16))),
    "a forgotten session with a value": ([run(1, 1)], record(7, 1, bytes(8), b"v")),
    "a forgotten session without a number": ([run(1, 1)], record(7, 1, bytes(7))),
    "a byte that must be zero": ([run(1, 1)], struct.pack(RECORD, 1, 0, 0, PUT, 1)),
    "padding that is not zero": ([run(1, 1)], record(PUT, 1, b"k", b"v")[:-1] + b"\1"),
    "metadata without a term": ([], record(SNAPSHOT, 1, b"", b"1234567")),
    "metadata with a key": ([], record(SNAPSHOT, 1, b"k", bytes(40))),
    "a delete with a value": ([run(1, 1)], record(DELETE, 1, b"k", b"v")),
    "a config with a key": ([run(1, 1)], record(CONFIG, 1, b"k", b"v")),
    "a close with a key": ([], record(CLOSE, 0, b"k")),
    "a close with a value": ([], record(CLOSE, 0, b"", b"v")),
    "a put in a gap": ([run(1, GAP), run(2, 1)], GOOD),
    "a config in a gap": ([run(1, GAP), run(2, 1)], record(CONFIG, 1, b"", b"v")),
    "an index that falls": ([run(2, 1)], record(PUT, 2, b"k") + record(PUT, 1, b"k")),
}


@pytest.mark.parametrize(("runs", "records"), MALFORMED.values(), ids=MALFORMED.keys())
def test_content_that_does_not_add_up_is_corruption(
    directory: Path, runs: list[bytes], records: bytes
) -> None:
    """Malformed content with a correct checksum is corruption at the frame's offset, and the log stays unchanged."""
    write_log(directory, frame(START, runs, records))
    before = (directory / "log-1").read_bytes()
    with pytest.raises(CorruptionError, match="malformed") as caught:
        FastStateMachine(directory)
    assert caught.value.path == str(directory / "log-1")
    assert caught.value.offset == START
    assert (directory / "log-1").read_bytes() == before



def sealed_sizes(length: int, lag: int, count: int) -> bytes:
    """Return a frame's header alone, with a correct seal."""
    sizes = struct.pack("<QII", length, lag, count)
    return struct.pack("<Q16sQ", 1, sizes, seal(sizes, IDENTITY, START))


NO_FRAME = {
    "a length that is no multiple of 8": frame(START, [], b"1234"),
    "a length below the header's": sealed_sizes(24, 0, 0),
    "a length after the end of the file": sealed_sizes(2**38, 0, 0),
    "the largest length": sealed_sizes(2**64 - 8, 0, 0),
    "a watermark inside the header": frame(START, [], b"", lag=1),
    "more runs than the frame holds": frame(START, [run(1, 1)], b"", count=2),
    "the largest run count": frame(START, [run(1, 1)], b"", count=2**32 - 1),
    "a frame of another place": frame(START + 8, [run(1, 1)], GOOD),
    "a wrong checksum": b"\xff" + frame(START, [run(1, 1)], GOOD)[1:],
    "a wrong seal": frame(START, [run(1, 1)], GOOD)[:24] + b"\xff" + frame(START, [run(1, 1)], GOOD)[25:],
    "a frame of another log": frame(START, [run(1, 1)], GOOD, identity=IDENTITY + 1),
    "a frame of another history": frame(START, [run(1, 1)], GOOD, previous=1),
    "half a header": frame(START, [run(1, 1)], GOOD)[:20],
    "half a frame": frame(START, [run(1, 1)], GOOD)[:-8],
}


@pytest.mark.parametrize("content", NO_FRAME.values(), ids=NO_FRAME.keys())
def test_what_is_no_frame_is_torn_or_corrupt(tmp_path: Path, content: bytes) -> None:
    """The same bytes are a torn tail if they were not known to be durable, and corruption if they were."""
    write_log(tmp_path / "torn", content)
    with FastStateMachine(tmp_path / "torn") as machine:
        assert machine.last_applied() == (0, 0)
        assert 0 < machine.stats().recovery.torn_bytes <= len(content)
    write_log(tmp_path / "corrupt", content, durable=START + len(content))
    with pytest.raises(CorruptionError, match="known durable") as caught:
        FastStateMachine(tmp_path / "corrupt")
    assert caught.value.offset == START
    assert (tmp_path / "corrupt" / "log-1").read_bytes() == log_head() + content
