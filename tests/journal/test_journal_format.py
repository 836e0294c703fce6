"""A journal, read from docs/format.md alone."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import xxhash

from fastsm.integrations.pysyncobj.journal import FastJournal as Journal

Item = tuple[int, int, int, bytes]  # kind, index, term, data


def items_of(path: Path) -> Iterator[Item]:
    """Yield the items of a segment, and check every field of header and frames."""
    content = path.read_bytes()
    magic, version, zero, number, identity, zeros, checksum = struct.unpack("<8sIIQQ56sQ", content[:96])
    assert (magic, version, zero, zeros) == (b"FASTSM-J", 0, 0, bytes(56))
    assert path.name == f"journal-{number}"
    assert checksum == xxhash.xxh64_intdigest(content[:88])
    offset, previous = 96, checksum
    while offset + 32 <= len(content):
        checksum, length, lag, runs, seal = struct.unpack_from("<QQIIQ", content, offset)
        if not length:
            break
        frame = content[offset : offset + length]
        assert seal == xxhash.xxh64_intdigest(frame[8:24], identity ^ offset)
        assert checksum == xxhash.xxh64_intdigest(frame[32:], seal ^ previous)
        previous = checksum
        assert runs == 0
        assert 8 * lag <= offset - 96
        index, term, size, kind = struct.unpack_from("<QQII", frame, 32)
        assert length == (56 + size + 7) // 8 * 8
        assert not any(frame[56 + size :])
        yield kind, index, term, frame[56 : 56 + size]
        offset += length
    assert not any(content[offset:])


def newest_of(directory: Path) -> tuple[int, int]:
    """Return the numbers of the newest segment and of the last one given up, from NEWEST; check its identity."""
    content = (directory / "NEWEST").read_bytes()
    magic, version, zero, number, identity, given_up, checksum = struct.unpack("<8sIIQQQQ", content)
    assert (magic, version, zero) == (b"FASTSM-N", 0, 0)
    assert checksum == xxhash.xxh64_intdigest(content[:40])
    assert (directory / f"journal-{number}").read_bytes()[24:32] == struct.pack("<Q", identity)
    return number, given_up


def test_items_are_as_the_page_says(tmp_path: Path) -> None:
    """Each step of a journal is one item of its kind."""
    journal = Journal(tmp_path)
    for index in (1, 2, 3):
        journal.add(b"%d" % index, index, 1)
    journal.set_vote(2, "a:1")
    journal.set_vote(3, None)
    journal.cut(3)
    journal.truncate_before(2)
    journal.set_commit_index(2)
    journal.write_commit_index()
    journal.rebase(b"base", 9, 4)
    journal.clear()
    journal.add(b"4", 4, 5)
    journal.abandon()
    assert newest_of(tmp_path) == (1, 0)
    state, *items = items_of(tmp_path / "journal-1")
    assert state == (7, 1, 0, struct.pack("<10Q", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    assert items == [
        (1, 1, 1, b"1"), (1, 2, 1, b"2"), (1, 3, 1, b"3"), (5, 1, 2, b"a:1"), (5, 0, 3, b""), (2, 3, 0, b""),
        (3, 1, 1, b""), (6, 2, 0, b""), (4, 9, 4, b"base"), (2, 9, 0, b""), (8, 3, 5, b""), (1, 4, 5, b"4"),
    ]  # fmt: skip


def test_a_segment_continues_the_one_before(tmp_path: Path) -> None:
    """The first item of a new segment sums up the earlier segments."""
    journal = Journal(tmp_path, durable=True)
    for index in (5, 6, 7):
        journal.add(bytes(1 << 20), index, 3)
    journal.set_vote(4, "b:2")
    journal.set_commit_index(6)
    journal.truncate_before(6)
    journal.add(b"8", 8, 4)
    journal.abandon()
    first = tmp_path / "journal-1"
    assert [item[:3] for item in items_of(first)] == [(7, 1, 0), (8, 4, 3), (1, 5, 3), (1, 6, 3), (1, 7, 3), (5, 1, 4)]
    last = 96 + (56 + 80) + 56 + 3 * (56 + (1 << 20))
    end = last + 64
    (chain,) = struct.unpack_from("<Q", first.read_bytes(), last)
    state, entry = items_of(tmp_path / "journal-2")
    assert state == (7, 6, 0, struct.pack("<10Q", 6, 7, 4, 1, 6, end, end, 3, chain, 3) + b"b:2")
    assert entry == (1, 8, 4, b"8")
    assert newest_of(tmp_path) == (2, 0)
