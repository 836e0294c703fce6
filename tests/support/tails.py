"""Generated torn tails of every shape: frames of ordinary values, of which a crash kept some pages and lost others."""

from __future__ import annotations

import functools
import random
import struct
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path

import fastsm
from fastsm import FastStateMachine
from fastsm.integrations.pysyncobj.journal import FastJournal as Journal
from support import by_hand

SECTOR = 512
PAGE = 4096
LARGEST = 1 << 20  # bytes of a tail
INDEXES = [0, 8, 512, 4_096, 65_536, 1 << 20, 1_100_000, (1 << 24) + 8, 1 << 32, 1 << 48, 2**63, 2**64 - 4_096]

Shape = Callable[[random.Random, int], bytes]


@functools.cache
def images() -> list[bytes]:
    """Return files of this library: a log, a base, a snapshot, a journal; large ones are cut."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with FastStateMachine(path / "state", retain_entries=20) as machine:
            for index in range(1, 200):
                machine.apply([(index, 1, fastsm.put(b"key %d" % (index % 50), b"value" * (index % 30)))])
                if index % 20 == 0:
                    machine.flush()
            machine.write_snapshot(path)
            machine.compact()
            machine.apply([(index, 2, fastsm.put(b"%d" % index, b"")) for index in range(200, 400)])
        journal = Journal(path / "journal")
        for index in range(1, 100):
            journal.add(b"command" * (index % 9), index, 1)
            if index % 10 == 0:
                journal.sync()
        journal.close()
        for file in (*sorted(path.glob("*/*-*")), path / "snapshot.fsm"):
            found.append(file.read_bytes().rstrip(b"\0")[: LARGEST // 4])
    return found


def words(code: str, step: int) -> Shape:
    """Return a shape of small, rising integers of an array's type."""
    size = array(code).itemsize

    def shape(dice: random.Random, length: int) -> bytes:
        start, count = dice.randrange(200) * 8, length // size
        if size == 1:
            return bytes((start + step * i) & 0x7F for i in range(min(count, 256))) * (length // 256 + 1)
        most = min(count, 4_000)
        return array(code, range(start, start + step * most, step)).tobytes() * (count // max(most, 1) + 1)

    return shape


def headers(dice: random.Random, length: int) -> bytes:
    """Return consecutive frame headers with false fields; their seals are correct for another file or place."""
    found = []
    for _ in range(min(length // 32 + 1, 200)):
        sizes = struct.pack("<QII", dice.randrange(4, 5_000) * 8, dice.randrange(300), dice.randrange(3))
        identity = dice.choice((by_hand.IDENTITY, by_hand.IDENTITY + 1))
        seal = by_hand.seal(sizes, identity, dice.randrange(96, 1 << 20))
        found.append(dice.randbytes(8) + sizes + seal.to_bytes(8, "little"))
    return b"".join(found) * (length // (32 * len(found)) + 1)


def records(dice: random.Random, length: int) -> bytes:
    found = []
    for _ in range(50):
        found.append(by_hand.record(1, 8 * dice.randrange(1 << 18), dice.randbytes(8), bytes(dice.randrange(60))))
    return b"".join(found) * (length // 3_000 + 1)


def image(dice: random.Random, length: int) -> bytes:
    """Return a file of this library, from its start or from anywhere."""
    content = dice.choice(images())
    return content[dice.choice((0, 0, 8, 96, dice.randrange(len(content)))) :]


def floats(dice: random.Random, length: int) -> bytes:
    return array("d", [i / 8 for i in range(min(length // 8 + 1, 3_000))]).tobytes() * (length // 24_000 + 1)


SHAPES: dict[str, Shape] = {
    "zeros": lambda dice, length: bytes(length),
    "noise": lambda dice, length: dice.randbytes(min(length, 4_096)) * (length // 4_096 + 1),
    "text": lambda dice, length: b"the quick brown fox jumps over the lazy dog\n" * (length // 40 + 1),
    "floats": floats,
    "bytes": words("B", 1),
    "integers of two bytes": words("H", 1),
    "integers of four bytes": words("I", 8),
    "integers of eight bytes": words("Q", 8),
    "every word a length": lambda dice, length: struct.pack("<Q", 8 * dice.randrange(4, 1 << 17)) * (length // 8 + 1),
    "headers": headers,
    "records": records,
    "files of this library": image,
}


def size(dice: random.Random, largest: int = LARGEST) -> int:
    """Draw a size, as often small as large."""
    return int(2 ** dice.uniform(0, largest.bit_length() - 1)) - 1


def value(dice: random.Random, length: int) -> bytes:
    return dice.choice(list(SHAPES.values()))(dice, length)[:length]


def frames(dice: random.Random, end: int, durable: int, content: bytes | None = None) -> bytes:
    """Return frames that a writer appended at ``end``; each records that at most ``durable`` bytes were durable."""
    written = b""
    index, term, previous = dice.choice(INDEXES), 1, dice.getrandbits(64)
    for _ in range(dice.choice((1, 1, 2, 3, 9))):
        index = min(index, 2**64 - 3)
        runs = [by_hand.run(index + 1, term)]
        for _ in range(dice.choice((0, 0, 0, 1, 40))):
            runs.append(by_hand.run(index + 1 + 8 * len(runs), term + len(runs)))
        room = max(LARGEST - len(written), 1) if content is None else 0
        inner = value(dice, size(dice, room)) if content is None else content
        body = by_hand.record(1, index + 1, dice.randbytes(dice.randrange(20)), inner)
        at = end + len(written)
        lag = dice.choice(((at - durable) // 8, (at - durable) // 8, (at - 96) // 8, 2**32 - 1))
        frame = by_hand.frame(at, runs, body, lag=min(lag, 2**32 - 1), previous=previous)
        previous = by_hand.frame_checksum(frame)
        index += len(runs) + dice.choice((0, 7))
        written += frame
        if len(written) > LARGEST:
            break
    return written


def tear(dice: random.Random, end: int, tail: bytes) -> bytearray:
    """Return what a crash leaves of bytes at an offset of a file: some pages or sectors are zeros; it may be cut."""
    torn = bytearray(tail)
    unit = dice.choice((PAGE, PAGE, SECTOR))
    chance = dice.choice((0.05, 0.3, 0.7))
    whole = range(-(end % unit), len(torn), unit)
    for start in whole if len(whole) < 300 else dice.sample(whole, 300):
        if dice.random() < chance:
            stop = min(start + unit, len(torn))
            torn[max(start, 0) : stop] = bytes(stop - max(start, 0))
    if dice.random() < 0.2:
        del torn[dice.randrange(len(torn) + 1) :]
    if dice.random() < 0.3:
        torn += bytes(dice.randrange(9_000))
    return torn
