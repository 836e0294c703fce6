"""Any bytes as a command: decoded as the page of formats says, or refused, in memory of their size."""

from __future__ import annotations

import random
import struct
import tracemalloc
from typing import Any

import fastsm
from fastsm import CommandError
from support import page_reader
from support.command_bytes import (
    ABSENT,
    COMPARE_AND_SWAP,
    CONFIG,
    DELETE,
    NOOP,
    PUT,
    PUT_UNTIL,
    SWAP_UNTIL,
    TICK,
    TOUCH,
)
from support.fuzz_targets import plain_form


class Refused(Exception):
    """The plain decoder below refuses; `past_header` says whether sizes were looked at by then."""

    def __init__(self, past_header: bool) -> None:
        self.past_header = past_header


def plainly_decode(data: bytes) -> Any:
    """By the page of formats, slowly and without any of the library's code."""
    try:
        return page_reader.decode_command(data)
    except page_reader.Corrupt as error:
        raise Refused(len(data) >= 8 and data[0] == 0 and data[1] in page_reader.LAYOUTS) from error


def random_command(rng: random.Random, depth: int = 0) -> bytes:  # noqa: PLR0911, PLR0912  # one for each kind
    def data(limit: int) -> bytes:
        return rng.randbytes(rng.randrange(limit))

    kind = rng.choice((range(1, 19), (1, 2, 3, 7, 9, 15, 16, 17), (1, 2, 7, 9, 15, 17))[depth])
    deadline = rng.choice((0, 5, 2**63 - 1))
    if kind == PUT_UNTIL:
        return fastsm.put(data(20), data(80), expires=deadline)
    if kind == SWAP_UNTIL:
        return fastsm.compare_and_swap(data(20), rng.choice([None, data(40)]), data(40), expires=deadline)
    if kind == TOUCH:
        return fastsm.touch(data(20), rng.choice((None, deadline)))
    if kind == TICK:
        return fastsm.tick(deadline, limit=rng.choice((None, 0, 7)))
    if kind == 7:
        return fastsm.add(data(20), rng.randrange(-9, 9), initial=rng.choice((0, 2**63 - 1)))
    if kind == 8:
        return fastsm.read(data(20))
    if kind == 9:
        return fastsm.delete_range(data(4), rng.choice([None, data(4)]))
    if kind == 10:
        condition = rng.choice((fastsm.exists(data(9)), fastsm.value_is(b"k", data(9)), fastsm.modified_at(b"k", 7)))
        return fastsm.transaction([condition], [random_command(rng, 2)], [fastsm.read(b"k"), random_command(rng, 2)])
    if kind == 12:
        return fastsm.open_session(expires=rng.choice((None, 0, 2**63 - 1)))
    if kind == 13:
        return fastsm.once(rng.randrange(9), rng.randrange(1, 9), random_command(rng, 1))
    if kind == 14:
        return fastsm.forget(rng.randrange(9))
    if kind == 11:
        return fastsm.call(rng.choice(("name", "n\u00e4me")), data(30), version=rng.randrange(3))
    if kind == PUT:
        return fastsm.put(data(20), data(80))
    if kind == DELETE:
        return fastsm.delete(data(20))
    if kind == COMPARE_AND_SWAP:
        return fastsm.compare_and_swap(
            data(20), rng.choice([None, data(40)]), rng.choice([None, data(40)]))
    if kind == NOOP:
        return fastsm.noop()
    if kind == CONFIG:
        return fastsm.config(data(60))
    return fastsm.batch([random_command(rng, 1) for _ in range(rng.randrange(6))])


def mutate(rng: random.Random, command: bytes) -> bytes:
    """One to three of: bytes flipped, cut, extended, a size tampered with, another command spliced in."""
    data = bytearray(command)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        way = rng.randrange(5)
        if way == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif way == 1:
            del data[at:]
        elif way == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 12))
        elif way == 3 and len(data) >= 8:
            layout, place = rng.choice([("<H", 2), ("<I", 4), ("<I", 8), ("<I", 12)])
            number = rng.choice([0, 1, len(data) - 8, len(data) - 7, 255, 2**31 - 1, 2**31, ABSENT])
            if len(data) >= place + 4:
                struct.pack_into(layout, data, place, number & 0xFFFF if place == 2 else number)
        else:
            data[at:] = random_command(rng)
    return bytes(data)


def test_no_bytes_hurt_the_decoder() -> None:
    """100,000 random and mutated inputs decode as the format says or are refused, in memory of their size."""
    rng = random.Random(20)
    past_header = accepted = 0
    tracemalloc.start()
    try:
        for round_number in range(100_000):
            way = round_number % 10
            if way == 0:
                data = rng.randbytes(rng.randrange(40))
            elif way == 1:
                data = bytes([0, rng.randrange(8)]) + rng.randbytes(rng.randrange(30))
            else:
                data = mutate(rng, random_command(rng))
            try:
                expected = plainly_decode(data)
                past_header += 1
            except Refused as refusal:
                expected = None
                past_header += refusal.past_header
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                found = plain_form(fastsm.decode(data))
            except CommandError:
                found = None
            assert tracemalloc.get_traced_memory()[1] - before < 16_384 + 64 * len(data), data.hex()
            assert found == expected, data.hex()
            accepted += expected is not None
    finally:
        tracemalloc.stop()
    assert past_header > 30_000
    assert accepted > 5_000
