"""The two hash functions, compared with independent implementations."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import xxhash

from fastsm.disk.hashing import checksum, siphash

# SipHash-1-3 under key (0, 0), as CPython 3.11 computed it (PYTHONHASHSEED=0) for bytes(range(size)).
VECTORS = {
    1: 0x68A914128E01E473,
    2: 0x010BAC45C41E3669,
    7: 0x2F098AB0C751325A,
    8: 0xEAD411E67EBE2EEA,
    9: 0x75927F9D95124362,
    15: 0xF30EB725BB91C9EA,
    16: 0x8972188433A5C5B7,
    17: 0x4883C49A2C009C1D,
    31: 0x169739443111D49B,
    63: 0x385D3E39E5F37359,
    64: 0x75E05FD5BBC870C6,
    255: 0x5DC1F93EA135EB43,
}

HASH_IN_PYTHON = """
import json, sys
print(json.dumps([hash(bytes.fromhex(line.strip())) for line in sys.stdin]))
"""


def as_hash(hashed: int) -> int:
    """Return a SipHash as CPython's signed hash, which is never -1, because -1 marks an error."""
    signed = hashed - (1 << 64) if hashed >> 63 else hashed
    return -2 if signed == -1 else signed


@pytest.mark.parametrize(("size", "expected"), VECTORS.items())
def test_siphash_gives_recorded_vectors(size: int, expected: int) -> None:
    """SipHash-1-3 gives the recorded results of an independent implementation, on every interpreter."""
    assert siphash(bytes(range(size))) == expected


@pytest.mark.skipif(sys.hash_info.algorithm != "siphash13", reason="this Python hashes bytes another way")
def test_siphash_is_that_of_the_interpreter() -> None:
    """CPython, told to use the key (0, 0), hashes bytes of every length to the same number."""
    rng = random.Random(1)
    inputs = [rng.randbytes(size) for size in range(1, 130)] + [rng.randbytes(100_000)]
    answer = subprocess.run(
        [sys.executable, "-c", HASH_IN_PYTHON],
        input="\n".join(data.hex() for data in inputs),
        env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=True,
    )
    assert json.loads(answer.stdout) == [as_hash(siphash(data)) for data in inputs]


def test_siphash_depends_on_every_bit_of_seed_and_input() -> None:
    """Flipping any bit of the seed or of the input gives another hash."""
    data = bytes(range(23))
    hashes = {siphash(data)}
    hashes |= {siphash(data, 1 << bit, 0) for bit in range(64)}
    hashes |= {siphash(data, 0, 1 << bit) for bit in range(64)}
    number = int.from_bytes(data, "little")
    hashes |= {siphash((number ^ 1 << bit).to_bytes(23, "little")) for bit in range(8 * 23)}
    assert len(hashes) == 1 + 64 + 64 + 8 * 23


def test_siphash_tells_lengths_of_zeros_apart() -> None:
    """Strings of zeros of different lengths, including the empty one, have different hashes."""
    assert len({siphash(bytes(size)) for size in range(64)}) == 64


def test_checksum_is_xxh64() -> None:
    """Every length from 0 to 300, under random seeds, has the checksum that the reference library gives."""
    rng = random.Random(2)
    for size in range(301):
        data = rng.randbytes(size)
        seed = rng.getrandbits(64)
        assert checksum(data) == xxhash.xxh64_intdigest(data)
        assert checksum(data, seed) == xxhash.xxh64_intdigest(data, seed)


def test_checksum_of_a_large_unaligned_buffer() -> None:
    """A large buffer that starts at an odd address has the same checksum as its copy elsewhere."""
    data = random.Random(3).randbytes(3_000_001)
    for start in range(8):
        assert checksum(memoryview(data)[start:], 7) == xxhash.xxh64_intdigest(data[start:], 7)


@pytest.mark.parametrize("function", [siphash, checksum])
def test_hashes_refuse_text(function) -> None:
    """A `str` is a ``TypeError``."""
    with pytest.raises(TypeError):
        function("text")
