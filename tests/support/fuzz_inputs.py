"""Parts of inputs for decoders: values, answers, deadlines, and whole snapshots, with lies."""

from __future__ import annotations

import random
import struct

from support import by_hand, snapshots
from support.mutation import change_bytes, shuffle_some, sometimes

LAST = 2**64 - 2


def value(dice: random.Random) -> bytes:
    return dice.choice((b"", b"v", b"seven b", b"eight by", b"nine byte", b"x" * 300))


def some_session(dice: random.Random) -> bytes:
    """The value of a session's record, with lies."""
    sequence = dice.choice((0, 1, 5, 2**64 - 1))
    result = change_bytes(dice, some_result(dice)) if dice.random() < 0.1 else some_result(dice)
    return struct.pack("<QQ", sequence, some_deadline(dice)) + (result if sequence else b"")


def some_result(dice: random.Random) -> bytes:
    kind = dice.choice((0, 1, 2, 3, 10)) if dice.random() < 0.97 else 11
    return bytes([kind]) + (some_answer(dice, 0) if kind > 1 else b"")


def some_answer(dice: random.Random, depth: int) -> bytes:
    kind = dice.choice((0, 1, 2, 3, 4, 5, 5)) if dice.random() < 0.97 else 6
    if kind == 3:
        return b"\3" + dice.randbytes(8)
    if kind == 4:
        data = value(dice)
        return b"\4" + struct.pack("<I", sometimes(dice, 0.05, len(data), 1 << 32)) + data
    if kind == 5:
        deep = dice.random() < 0.1
        members = [some_answer(dice, depth + 1) for _ in range(1 if deep and depth < 10 else dice.randrange(3))]
        if depth > 10:
            members = []
        return b"\5" + struct.pack("<I", sometimes(dice, 0.05, len(members), 1 << 32)) + b"".join(members)
    return bytes([kind])


def some_deadline(dice: random.Random) -> int:
    good, bad = (0, 1, 5, 5, 9, 2**31 - 1, 2**63 - 1), (2**63, 2**64 - 1)
    return dice.choice(good if dice.random() < 0.9 else bad)


def flat_snapshot(dice: random.Random) -> bytes:
    """A flat snapshot with lies, under right checksums."""
    runs, known, index, term = [], [], 0, 0
    for _ in range(dice.randrange(4)):
        first = index + dice.choice((1, 1, 3))
        index, term = first + dice.randrange(3), term + dice.choice((1, 1, 2))
        known += range(first, index + 1)
        runs.append((sometimes(dice, 0.02, first), sometimes(dice, 0.02, index), sometimes(dice, 0.02, term)))
    writers = sorted(dice.choices(known, k=dice.randrange(4)) if known else [])
    records = [
        by_hand.record(
            sometimes(dice, 0.02, 1, 256), sometimes(dice, 0.02, each), b"key %d" % at, value(dice),
            some_deadline(dice) if dice.random() < 0.3 else None)
        for at, each in enumerate(writers)]
    keys, sessions = len(records), 0
    for _ in range(dice.randrange(3) if writers else 0):
        touched = dice.randrange(len(writers) + (dice.random() < 0.05))
        records.append(by_hand.record(
            8, known[-1], b"key %d" % touched, b"", some_deadline(dice) if dice.random() < 0.6 else None))
    for number in range(dice.randrange(3) if known else 0):
        records.append(by_hand.record(
            6, known[-1], struct.pack("<Q", number * (dice.random() < 0.95)), some_session(dice)))
        sessions += 1
    membership = b""
    if known and dice.random() < 0.3:
        membership = by_hand.record(sometimes(dice, 0.02, 3, 256), dice.choice(known), b"", value(dice))
    if dice.random() < 0.05:
        shuffle_some(dice, records, lambda: by_hand.record(1, index, b"key 0", b""))
    if dice.random() < 0.05:
        shuffle_some(dice, runs, lambda: (index + 1, index + 1, term + 1))
    last = (sometimes(dice, 0.02, index), sometimes(dice, 0.02, term))
    data = by_hand.snapshot(
        last, [by_hand.term_run(*run) for run in runs], records, membership=membership,
        attachment=value(dice) if dice.random() < 0.3 else b"", keys=sometimes(dice, 0.02, keys),
        sessions=sometimes(dice, 0.02, sessions), clock=some_deadline(dice) if known and dice.random() < 0.3 else 0)
    if dice.random() < 0.1:
        name = dice.choice(sorted(snapshots.FIELDS))
        limit = 1 << 8 * struct.calcsize(snapshots.FIELDS[name][1])
        data = snapshots.with_field(data, name, sometimes(dice, 0.9, snapshots.field(data, name), limit))
    return data
