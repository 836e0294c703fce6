"""The table's hash of millions of keys at a time, to find keys that collide under a known seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def hashes_of_numbers(start: int, stop: int) -> np.ndarray:
    """Return the SipHash-1-3, under seed (0, 0), of each number as an 8-byte key."""
    v = [np.full(stop - start, word, dtype=np.uint64) for word in (
        0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)]

    def rotate(words: np.ndarray, bits: int) -> np.ndarray:
        return words << np.uint64(bits) | words >> np.uint64(64 - bits)

    def sip_round() -> None:
        v[0] += v[1]
        v[2] += v[3]
        v[1] = rotate(v[1], 13) ^ v[0]
        v[3] = rotate(v[3], 16) ^ v[2]
        v[0] = rotate(v[0], 32)
        v[2] += v[1]
        v[0] += v[3]
        v[1] = rotate(v[1], 17) ^ v[2]
        v[3] = rotate(v[3], 21) ^ v[0]
        v[2] = rotate(v[2], 32)

    for word in (np.arange(start, stop, dtype=np.uint64), np.uint64(8 << 56)):
        v[3] ^= word
        sip_round()
        v[0] ^= word
    v[2] ^= np.uint64(0xFF)
    for _ in range(3):
        sip_round()
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def numbers_and_hashes() -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, 1 << 30, 1 << 15):
        yield start, hashes_of_numbers(start, start + (1 << 15))


def key_of(number: int) -> bytes:
    return int(number).to_bytes(8, "little")
