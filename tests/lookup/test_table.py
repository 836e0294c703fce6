"""The hash table: compared with a dict, growing and emptied, and attacked with keys that collide."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest

from fastsm.disk.hashing import siphash
from fastsm.lookup.table import Table
from support.attacks import hashes_of_numbers, key_of, numbers_and_hashes

SEGMENT_SLOTS = 4096


class Records:
    """An arena of put records that only grows, as a log does."""

    def __init__(self) -> None:
        self.arena = bytearray(64)

    def add(self, key: bytes) -> int:
        """Append a record with an empty value; return its place."""
        place = len(self.arena)
        self.arena += struct.pack("<QIHBB", 1, 0, len(key), 1, 0) + key + bytes(-len(key) % 8)
        return place


def filled(keys: Iterable[bytes], **options: object) -> tuple[Table, Records, dict[bytes, int]]:
    """Return a table with a record for each key."""
    table, records, model = Table(**options), Records(), {}
    for key in keys:
        model[key] = records.add(key)
        assert table.insert(records.arena, model[key]) is None
    return table, records, model


def assert_same(table: Table, records: Records, model: dict[bytes, int]) -> None:
    assert len(table) == len(model)
    assert all(table.lookup(records.arena, key) == place for key, place in model.items())
    table.check(records.arena)


# ---- compared with a dict ----------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_table_does_what_a_dict_does(seed: int) -> None:
    """Random inserts, overwrites, deletes and lookups return what a dict does, including old places."""
    rng = random.Random(seed)
    table, records, model = Table(), Records(), {}
    keys = [rng.randbytes(rng.choice([0, 1, 7, 8, 9, 30, 500])) for _ in range(6_000)]
    for step in range(30_000):
        key = rng.choice(keys)
        way = rng.random()
        if way < 0.5:
            place = records.add(key)
            assert table.insert(records.arena, place) == model.get(key)
            model[key] = place
        elif way < 0.8:
            assert table.discard(records.arena, key) == model.pop(key, None)
        else:
            assert table.lookup(records.arena, key) == model.get(key)
        if step % 10_000 == 0:
            assert_same(table, records, model)
    assert_same(table, records, model)
    assert all(table.lookup(records.arena, key) is None for key in keys if key not in model)


def test_keys_of_any_length_and_content_are_told_apart() -> None:
    """The empty key, keys of zeros, and prefixes of other keys are different keys, up to the largest size."""
    keys = [bytes(size) for size in range(300)] + [bytes(65_535), bytes(65_534) + b"\1", b"\xff" * 65_535]
    table, records, model = filled(keys)
    assert len(model) == 303
    assert_same(table, records, model)


def test_table_grows_segment_by_segment() -> None:
    """50,000 keys are all there, and memory grows one segment at a time, to 8 to 24 bytes per key."""
    table, records, model = Table(), Records(), {}
    sizes = set()
    for number in range(50_000):
        key = b"key %d" % number
        model[key] = records.add(key)
        table.insert(records.arena, model[key])
        sizes.add(table.size)
        if len(table) > 3 * SEGMENT_SLOTS:
            assert 8 < table.size / len(table) < 24
    assert_same(table, records, model)
    assert table.rebuilds == 0
    assert 0.33 < table.load < 0.79
    growths = [b - a for a, b in zip(sorted(sizes), sorted(sizes)[1:], strict=False)]
    assert max(growths) < 40_000, "one step of growth is one segment, and the directory"


def test_segments_do_not_split_all_at_once() -> None:
    """At most five segments split within 1,000 keys, because their limits differ: many splits would be a pause."""
    table, records = Table((1, 2)), Records()
    sizes = []
    for number in range(210_000):
        table.insert(records.arena, records.add(b"key %d" % number))
        if number % 1000 == 0:
            sizes.append(table.size)
    splits = [(b - a) // (8 * SEGMENT_SLOTS) for a, b in pairwise(sizes)]
    assert sum(splits) > 63
    assert max(splits) <= 5


def test_table_empties_and_fills_again() -> None:
    """After deleting every key, again and again, nothing has grown, and lookups of missing keys end."""
    table, records, model = filled(b"key %d" % number for number in range(20_000))
    size = table.size
    for _ in range(3):
        for key in model:
            assert table.discard(records.arena, key) == model[key]
        table.check(records.arena)
        assert len(table) == 0
        assert table.load == 0
        assert all(table.lookup(records.arena, key) is None for key in model)
        for place in model.values():
            assert table.insert(records.arena, place) is None
        assert_same(table, records, model)
        assert table.size == size


def test_long_deletion_leaves_the_table_sound() -> None:
    """Inserting and deleting for long, as in a queue, leaves the table sound and no larger."""
    table, records, model = filled(b"key %d" % number for number in range(2_500))
    size = table.size
    for number in range(2_500, 15_000):
        key = b"key %d" % number
        oldest = next(iter(model))
        assert table.discard(records.arena, oldest) == model.pop(oldest)
        assert table.discard(records.arena, oldest) is None
        model[key] = records.add(key)
        table.insert(records.arena, model[key])
        if number % 2_500 == 0:
            assert_same(table, records, model)
    assert_same(table, records, model)
    assert table.size == size


def test_misses_end_in_a_full_segment() -> None:
    """In the fullest possible table, a lookup of a missing key ends, for every home slot."""
    table, records, model = filled([])
    one_segment = table.size
    while table.size == one_segment:
        full = dict(model)
        key = b"key %d" % len(model)
        model[key] = records.add(key)
        table.insert(records.arena, model[key])
    table, records, model = filled(full)
    assert table.size == one_segment
    assert 0.65 < table.load < 0.79
    assert all(table.lookup(records.arena, b"absent %d" % number) is None for number in range(20_000))
    assert_same(table, records, model)


# ---- seeds -------------------------------------------------------------------------------------------

def test_each_table_draws_its_own_seed() -> None:
    """Two tables have different seeds, unless a seed is given."""
    assert Table().seed != Table().seed
    assert Table(seed=(3, 4)).seed == (3, 4)


def test_attackers_hash_is_the_tables() -> None:
    """The hashes that the attacks below use are the table's own."""
    hashes = hashes_of_numbers(1_000, 1_100)
    assert hashes.tolist() == [siphash(key_of(number)) for number in range(1_000, 1_100)]


def assert_defended(keys: list[bytes]) -> None:
    """Check that a table with the seed that the keys were chosen for draws a new seed, and loses nothing."""
    table, records, model = filled(keys, seed=(0, 0))
    assert table.rebuilds == 1
    assert table.seed != (0, 0)
    assert_same(table, records, model)
    assert table.size < 3 * 32_900 + 24 * len(table), "the attack takes memory out of proportion"
    for key in keys[::2]:
        assert table.discard(records.arena, key) == model.pop(key)
    assert_same(table, records, model)


def test_keys_of_one_tag_make_a_new_seed() -> None:
    """18 keys whose hashes agree in home and tag, found among 50 million, make the table draw a new seed."""
    numbers = [
        2794220, 6026069, 8756600, 10737208, 13393613, 16260512, 17865118, 22924672, 23599826,
        25180619, 26412239, 26416387, 33162295, 35825907, 37149159, 39151976, 43312423, 49667820,
    ]
    keys = [key_of(number) for number in numbers]
    assert {siphash(key) & 0xFFFFFF for key in keys} == {0xA7B1D2}
    assert_defended(keys)


def test_sixteen_keys_of_one_tag_are_no_attack() -> None:
    """16 keys of one tag, the most that a probe may meet, do not change the seed."""
    numbers = [
        2794220, 6026069, 8756600, 10737208, 13393613, 16260512, 17865118, 22924672, 23599826,
        25180619, 26412239, 26416387, 33162295, 35825907, 37149159, 39151976,
    ]
    table, records, model = filled(map(key_of, numbers), seed=(0, 0))
    assert table.rebuilds == 0
    assert table.seed == (0, 0)
    assert_same(table, records, model)


def test_keys_of_one_neighbourhood_make_a_new_seed() -> None:
    """Keys whose homes are all within 16 slots, which would need long probes, make the table draw a new seed."""
    numbers: list[int] = []
    for start, hashes in numbers_and_hashes():
        numbers += (np.nonzero((hashes >> np.uint64(12) & np.uint64(0xFFF)) < 16)[0] + start).tolist()
        if len(numbers) >= 1_200:
            break
    assert_defended([key_of(number) for number in numbers[:1_200]])


def keys_of_one_segment(bits: int, count: int, one_a_home: bool) -> list[bytes]:
    """Return keys whose hashes start with `bits` zero bits, so that splitting segments does not separate them."""
    numbers: list[int] = []
    homes: set[int] = set()
    for start, hashes in numbers_and_hashes():
        for i in np.nonzero(hashes >> np.uint64(64 - bits) == 0)[0].tolist():
            home = int(hashes[i]) >> 12 & 0xFFF
            if not one_a_home or home not in homes:
                numbers.append(start + i)
                homes.add(home)
        if len(numbers) >= count:
            return [key_of(number) for number in numbers[:count]]
    raise AssertionError("not found")


def test_keys_that_share_their_segment_make_a_new_seed() -> None:
    """More keys than a segment holds, which no split can separate, cause a new seed, not an error."""
    assert_defended(keys_of_one_segment(9, 4_300, one_a_home=False))


def test_keys_that_share_their_segment_but_no_home_make_a_new_seed() -> None:
    """Keys that no split can separate cause a new seed even if each has a home slot of its own."""
    assert_defended(keys_of_one_segment(9, 4_060, one_a_home=True))


def test_a_rebuilt_table_goes_on() -> None:
    """After a rebuild with a new seed the table grows and shrinks as before."""
    numbers: list[int] = []
    for start, hashes in numbers_and_hashes():
        numbers += (np.nonzero((hashes >> np.uint64(12) & np.uint64(0xFFF)) < 16)[0] + start).tolist()
        if len(numbers) >= 1_200:
            break
    table, records, model = filled([key_of(number) for number in numbers], seed=(0, 0))
    for number in range(20_000):
        key = b"later %d" % number
        model[key] = records.add(key)
        table.insert(records.arena, model[key])
    assert_same(table, records, model)
    for key in list(model):
        assert table.discard(records.arena, key) == model.pop(key)
    assert_same(table, records, model)
    assert table.rebuilds == 1
