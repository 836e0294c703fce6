"""The search for torn tails: any tail that a crash leaves is torn, and every proof of a loss is found."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from fastsm import CorruptionError
from fastsm.disk.headers import LOG_HEADER_BYTES
from fastsm.disk.torn_tail import search_bytes, search_tail, torn_tail_end
from support import by_hand, tails

IDENTITY = by_hand.IDENTITY
MANY = int(os.environ.get("FASTSM_TAILS", "10000"))
PIECE = 1 << 20  # bytes of a file that are read at a time


def last_word(data: bytes | bytearray, end: int) -> int:
    """Return the end of the last word that is not zero; within a partial word at the end, that of the last byte."""
    used = len(bytes(data).rstrip(b"\0"))
    return end + (used if used > len(data) & ~7 else used + -used % 8)


def header(offset: int, watermark: int, length: int = 64) -> bytes:
    """Return the header of a frame without the rest of it; the header records how far the file was durable."""
    sizes = struct.pack("<QII", length, (offset - watermark) // 8, 0)
    return struct.pack("<Q16sQ", 1, sizes, by_hand.seal(sizes, IDENTITY, offset))


@pytest.mark.parametrize("part", range(4))
def test_whatever_a_crash_leaves_is_torn(part: int) -> None:
    """Ordinary frames with values of every shape and lost pages never prove a loss, and the tail's end is correct."""
    for number in range(part, MANY, 4):
        dice = random.Random(f"tail {number}")
        durable = LOG_HEADER_BYTES + 8 * dice.randrange(1 << dice.randrange(1, 30))
        end = durable + 8 * dice.randrange(1 << dice.randrange(1, 20))
        torn = tails.tear(dice, end, tails.frames(dice, end, durable))
        found, expected, words = search_bytes(torn, IDENTITY, end, end), last_word(torn, end), len(torn) // 8
        assert (found.proof, found.torn_end) == (0, expected), f"tail {number}"
        assert found.looks <= words


def test_a_header_that_proves_a_loss_is_found_in_every_tail() -> None:
    """A header that says that more was durable is found as the proof of a loss, whatever is around it."""
    for number in range(1_000):
        dice = random.Random(f"proof {number}")
        end = LOG_HEADER_BYTES + 8 * dice.randrange(1 << dice.randrange(1, 30))
        torn = tails.tear(dice, end, tails.frames(dice, end, end, tails.value(dice, tails.size(dice, 1 << 16))))
        torn += bytes(64 + -len(torn) % 8)
        at = end + 8 + 8 * dice.randrange((len(torn) - 40) // 8)
        watermark = dice.choice((end + 8, at, min(at, end + 8 * dice.randrange(1, 1 << 16))))
        length = 8 * dice.randrange(4, 1 << 30 if dice.random() < 0.1 else 90)
        torn[at - end : at - end + 32] = header(at, watermark, length)
        found = search_bytes(torn, IDENTITY, end, end)
        assert (found.proof, found.watermark) == (at, watermark), f"proof {number}"


@pytest.mark.parametrize("lost", [8, 16, 24])
def test_a_header_whose_seal_does_not_match_proves_nothing(lost: int) -> None:
    """A header proves a loss only if its seal matches; the frame's checksum before it need not be right."""
    end = 4_096
    data = bytearray(bytes(64) + header(end + 64, end + 8))
    assert search_bytes(data, IDENTITY, end, end).proof == end + 64
    data[64:72] = b"anything"
    assert search_bytes(data, IDENTITY, end, end).proof == end + 64
    data[64 + lost] ^= 1
    assert search_bytes(data, IDENTITY, end, end).proof == 0


def test_a_header_of_another_file_or_place_proves_nothing() -> None:
    """A header copied from another file or offset proves nothing, because its seal includes both."""
    end, data = 4_096, bytes(64) + header(4_096 + 64, 4_104)
    assert search_bytes(data, IDENTITY, end, end).proof
    assert not search_bytes(data, IDENTITY + 1, end, end).proof
    assert not search_bytes(bytes(8) + data, IDENTITY, end, end).proof
    assert not search_bytes(data, IDENTITY, end + 8, end).proof, "the frames reach as far as it says"


HOSTILE = {
    "each word is a length and a lag": struct.pack("<Q", 64),
    "each second word is a large length": struct.pack("<QQ", 1 << 20, 3),
    "right sizes everywhere": struct.pack("<QII", 64, 2, 1),
    "headers with right seals for one place": header(4_096 + 512, 4_096 + 8),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_tail_costs_one_look_a_word(kind: str) -> None:
    """The search looks at each word of a tail at most once, however many headers the tail seems to hold."""
    end, size = 4_096, 4 << 20
    for first in (0, 8, 16):
        data = (bytes(first) + HOSTILE[kind] * (size // len(HOSTILE[kind])))[:size]
        found = search_bytes(data, IDENTITY, end, end)
        assert found.looks <= size // 8
        assert found.looks > size // 64 or found.proof


def written(path: Path, *parts: tuple[int, bytes], size: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.truncate(path, size)
    for offset, data in parts:
        os.pwrite(descriptor, data, offset)
    return descriptor


@pytest.mark.parametrize("distance", range(-48, 24, 8))
def test_a_proof_over_the_seam_of_two_pieces_is_found(tmp_path: Path, distance: int) -> None:
    """A header that spans two pieces of the file is found, because pieces overlap by a header."""
    end = 8 * 500
    at = end + PIECE + distance
    noise = random.Random(1).randbytes(2 * PIECE)
    descriptor = written(tmp_path / "file", (end, noise), (at, header(at, at)), size=end + 2 * PIECE)
    try:
        assert search_tail(descriptor, IDENTITY, end, end + 2 * PIECE).proof == at
        with pytest.raises(CorruptionError, match=f"offset {at} says") as caught:
            torn_tail_end(descriptor, IDENTITY, end, end + 2 * PIECE, "file")
        assert (caught.value.path, caught.value.offset) == ("file", end)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("before", [0, 8])
def test_a_proof_at_the_edge_of_a_hole_is_found(tmp_path: Path, before: int) -> None:
    """A header is found even if the frame's checksum, which the seal does not cover, is in a lost page."""
    page = 1 << 20
    at = page - before
    descriptor = written(tmp_path / "file", (page, header(at, at)[before:]), size=1 << 40)
    try:
        found = search_tail(descriptor, IDENTITY, 4_096, 1 << 40)
        assert (found.proof, found.looks) == (at, 1)
    finally:
        os.close(descriptor)


def test_a_file_that_ends_within_a_header_is_torn(tmp_path: Path) -> None:
    """A header that is cut at any byte proves nothing, and the tail's end is within the file."""
    end, proof = 4_096, header(4_096 + 64, 4_104)
    for size in range(len(proof)):
        descriptor = written(tmp_path / f"{size}", (end + 64, proof[:size]), size=end + 64 + size)
        try:
            found = search_tail(descriptor, IDENTITY, end, end + 64 + size)
        finally:
            os.close(descriptor)
        assert not found.proof
        assert end + 64 + len(proof[:size].rstrip(b"\0")) <= found.torn_end <= end + 64 + size or not any(proof[:size])
