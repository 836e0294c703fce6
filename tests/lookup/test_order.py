"""The tree of places that ordered reads use: correct for any keys in any order, at a counted cost."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import fastsm
from fastsm import FastStateMachine
from fastsm.lookup.order import Order
from support.inside import inside

Opener = Callable[..., FastStateMachine]

DICE = random.Random(18)
KILOBYTE = bytes(range(256)) * 4
SHAPES = {
    "random": [DICE.randbytes(16) for _ in range(20_000)],
    "rising": [b"%08d" % i for i in range(20_000)],
    "falling": [b"%08d" % (99_999_999 - i) for i in range(20_000)],
    "a shared kilobyte": [KILOBYTE + DICE.randbytes(8) for _ in range(5_000)],
    "many shared kilobytes": [b"%03d" % (i % 100) + KILOBYTE + b"%d" % i for i in range(5_000)],
    "zeros": [bytes(size) for size in range(3_000)],
    "zeros after text": [b"text" + bytes(i % 97) + b"%d" % (i // 97) * (i % 2) for i in range(6_000)],
    "ones": [b"\xff" * size for size in range(3_000)],
    "one byte of two": [bytes(DICE.choice(b"\x00\xff") for _ in range(DICE.randrange(40))) for _ in range(10_000)],
    "up to the longest": [b"k" * size for size in range(65_535, 65_100, -1)] + [b"", b"k"],
    "eight bytes and a bit": [b"%08d" % (i % 10) + bytes(i % 9) + b"\x01" * (i % 4) for i in range(5_000)],
}


def put_all(machine: FastStateMachine, keys: Iterable[bytes], size: int = 1000) -> None:
    """Put keys, `size` of them in each entry."""
    keys = list(keys)
    for first in range(0, len(keys), size):
        some = keys[first:first + size]
        machine.apply([(machine.last_applied().index + 1, 1, fastsm.put_many(some, [b"v"] * len(some)))])


def delete_all(machine: FastStateMachine, keys: Iterable[bytes]) -> None:
    """Delete keys in one entry."""
    index = machine.last_applied().index + 1
    machine.apply([(index, 1, fastsm.batch([fastsm.delete(key) for key in keys]))])


def order_of(machine: FastStateMachine) -> Order:
    """Return the order, which must be in use."""
    order = inside(machine).order()
    assert order is not None
    return order


# ---- sorted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_of_any_shape_are_sorted(directory: Path, machine_at: Opener, shape: str) -> None:
    """An order that is built from the table, and then updated with new keys, gives the keys as ``sorted`` does."""
    keys = SHAPES[shape]
    machine = machine_at(directory, auto_compact=False)
    put_all(machine, keys[::2])
    assert [key for key, _ in machine.ordered()] == sorted(set(keys[::2]))
    put_all(machine, keys[1::2])  # many between two reads
    inside(machine).check()
    assert [key for key, _ in machine.ordered()] == sorted(set(keys))
    order_of(machine).forget()
    assert [key for key, _ in machine.ordered(reverse=True)] == sorted(set(keys), reverse=True)


@pytest.mark.parametrize("piece", [1, 3, 255, 256, 257, 5_000])
def test_new_keys_come_in_pieces_of_any_size(directory: Path, machine_at: Opener, piece: int) -> None:
    """New keys between two reads, one or thousands, are all in order, together with the earlier ones."""
    machine = machine_at(directory, ordered=True)
    keys = SHAPES["random"][:max(600, 4 * piece)]
    for first in range(0, len(keys), piece):
        put_all(machine, keys[first:first + piece])
        at = keys[first]
        assert machine.scan(at, limit=1).entries == [(at, b"v")]
        assert machine.count(b"") == first + len(keys[first:first + piece])
    assert [key for key, _ in machine.ordered()] == sorted(keys)


def test_a_key_that_comes_again_has_one_entry(directory: Path, machine_at: Opener) -> None:
    """A key that is deleted and put again, once or often, with or without a read between, has one entry."""
    machine = machine_at(directory, ordered=True)
    keys = SHAPES["random"][:50]
    for times in range(1, 8):
        for _ in range(times):
            put_all(machine, keys)
            delete_all(machine, keys)
        put_all(machine, keys)
        assert [key for key, _ in machine.ordered()] == sorted(keys)
        assert order_of(machine).entries == len(keys)
        inside(machine).check()
    delete_all(machine, keys)
    for _ in range(1000):
        put_all(machine, keys[:1])
        delete_all(machine, keys[:1])
    assert machine.scan().entries == []


# ---- the counted cost ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["random", "rising", "falling", "a shared kilobyte", "many shared kilobytes"])
def test_building_looks_at_each_key_a_few_times(directory: Path, machine_at: Opener, shape: str) -> None:
    """Building the order takes fewer than 4 n log n comparisons, however long the keys' common prefixes are."""
    machine = machine_at(directory)
    put_all(machine, SHAPES[shape])
    inside(machine).ask_for_order()
    keys = machine.len()
    assert order_of(machine).comparisons < 4 * keys * math.log2(keys)


@pytest.mark.parametrize("shape", ["random", "rising", "falling", "a shared kilobyte"])
def test_an_insert_and_a_scan_in_turns_cost_a_search(directory: Path, machine_at: Opener, shape: str) -> None:
    """An insert and a scan take a few dozen comparisons, whether the new key is the smallest, the greatest or any."""
    machine = machine_at(directory, ordered=True)
    put_all(machine, SHAPES[shape][:-2000])
    machine.scan(limit=1)
    order = order_of(machine)
    before, looks = order.comparisons, order.looks
    for key in SHAPES[shape][-2000:]:
        put_all(machine, [key])
        assert machine.scan(key, limit=1).entries == [(key, b"v")]
    steps = math.log2(machine.len())
    assert order.comparisons - before < 2000 * 5 * steps
    assert order.looks - looks <= 2000
    inside(machine).check()


def test_deletes_of_a_prefix_between_scans_are_paid_once(directory: Path, machine_at: Opener) -> None:
    """Only the first scan across 60,000 deleted keys walks over them, in both directions."""
    machine = machine_at(directory)  # fewer deletes than a thread would be started for
    put_all(machine, [b"b%06d" % i for i in range(60_000)] + [b"a", b"c"])
    for reverse in (False, True):
        machine.scan()
        order = order_of(machine)
        delete_all(machine, [b"b%06d" % i for i in range(60_000)])
        bounds = {"reverse": reverse, "limit": 2}
        before = order.looks
        assert {key for key, _ in machine.scan(**bounds).entries} == {b"a", b"c"}
        first, before = order.looks - before, order.looks
        assert 60_000 <= first < 62_000
        assert machine.count(b"a", b"d") == len(machine.scan(**bounds).entries) == 2
        assert order.looks - before < 500
        assert order.entries < 1_000
        assert order.size < 200_000
        inside(machine).check()
        put_all(machine, [b"b%06d" % i for i in range(60_000)])


@pytest.mark.parametrize("held", [False, True])
def test_deletes_between_scans_cost_the_same_in_turns(directory: Path, machine_at: Opener, held: bool) -> None:
    """In a queue, a put, a delete and a scan of its head have a constant cost, with and without an open iterator."""
    machine = machine_at(directory)
    put_all(machine, [b"%08d" % i for i in range(5_000)])
    iterator = machine.ordered() if held else None
    machine.scan(limit=1)
    order = order_of(machine)
    before = order.looks
    for i in range(5_000):
        put_all(machine, [b"%08d" % (5_000 + i)])
        delete_all(machine, [b"%08d" % i])
        assert machine.scan(limit=1).entries == [(b"%08d" % (i + 1), b"v")]
    assert order.looks - before < 5_000 * 70
    assert order.entries < 5_000 + 70
    if iterator is not None:
        assert [key for key, _ in iterator] == [b"%08d" % i for i in range(5_000)]


def test_more_deletes_than_that_are_cleared_away_by_a_thread(directory: Path, machine_at: Opener) -> None:
    """If most entries belong to deleted keys, the tree is rebuilt, and reads before that are correct."""
    machine = machine_at(directory)
    put_all(machine, [b"b%06d" % i for i in range(100_000)] + [b"a", b"c"])
    assert machine.count(b"a", b"d") == 100_002
    delete_all(machine, [b"b%06d" % i for i in range(100_000)])
    assert machine.count(b"a", b"d") == 2
    inside(machine).keep_order()
    assert order_of(machine).entries == 2


def test_overwrites_cost_a_lookup_once(directory: Path, machine_at: Opener) -> None:
    """Overwrites add neither entries nor new keys to the order, and a scan and a count then find every key."""
    machine = machine_at(directory, ordered=True)
    keys = SHAPES["rising"]
    put_all(machine, keys)
    machine.scan()
    entries = order_of(machine).entries
    for _ in range(3):
        put_all(machine, keys)
    assert (order_of(machine).entries, order_of(machine).fresh_keys) == (entries, 0)
    assert len(machine.scan().entries) == machine.count(b"") == len(keys)


@pytest.mark.parametrize("pattern", ["rising", "falling", "random", "a gap"])
def test_at_rest_a_key_takes_less_than_twelve_bytes(directory: Path, machine_at: Opener, pattern: str) -> None:
    """The order takes less than 12 bytes per key, in whatever order keys are put."""
    keys = {
        "rising": [b"%08d" % i for i in range(60_000)], "falling": [b"%08d" % -i for i in range(-60_000, 0)],
        "random": [b"%08d" % i for i in random.Random(1).sample(range(60_000), 60_000)],
        "a gap": [b"a%08d" % i for i in range(5_000)] + [b"c%08d" % i for i in range(5_000)]
        + [b"b%08d" % i for i in range(50_000)],
    }[pattern]  # fmt: skip
    machine = machine_at(directory, ordered=True)
    scratch = order_of(machine).size
    for first in range(0, len(keys), 100):
        put_all(machine, keys[first:first + 100])
        machine.scan(limit=1)
    assert (order_of(machine).size - scratch) / len(keys) < 9.5


def test_without_reads_the_order_stays_in_proportion_to_the_keys(directory: Path, machine_at: Opener) -> None:
    """Without reads, the order's entries stay below twice the number of live keys, plus a constant."""
    machine = machine_at(directory, ordered=True)
    keys = [b"%08d" % i for i in range(200_000)]
    for first in range(0, len(keys), 2_000):
        put_all(machine, keys[first:first + 2_000])
        if first >= 20_000:
            delete_all(machine, keys[first - 20_000:first - 18_000])
        inside(machine).keep_order()  # done by a thread when it is due
    order = order_of(machine)
    assert order.entries + order.fresh_keys < 2 * machine.len() + (1 << 16) + 10_000
    assert [key for key, _ in machine.ordered()] == keys[-20_000:]


def test_there_is_no_order_before_the_first_ordered_read(directory: Path, machine_at: Opener) -> None:
    """Without an ordered read there is no order, and compaction, reset and reopening do not build one."""
    machine = machine_at(directory, retain_entries=0)
    put_all(machine, SHAPES["random"])
    machine.compact()
    assert dict(machine.items())
    assert machine.count() == len(SHAPES["random"])  # answered from the table
    assert inside(machine).order() is None
    machine.clear()
    machine.close()
    machine = machine_at(directory)
    assert inside(machine).order() is None
    machine.scan(limit=0)
    assert inside(machine).order() is None


# ---- the next generation -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_compaction_makes_the_order_anew(directory: Path, machine_at: Opener, shape: str) -> None:
    """A compaction builds the order of the next generation, with new and without deleted keys, before the switch."""
    keys = SHAPES[shape]
    machine = machine_at(directory, auto_compact=False, retain_entries=0)
    third = len(keys) // 3
    put_all(machine, keys[:2 * third])
    machine.scan(limit=1)
    delete_all(machine, keys[third // 2:third])
    put_all(machine, keys[2 * third:])
    before = order_of(machine)
    assert before.fresh_keys
    machine.compact()
    order = order_of(machine)
    assert order is not before
    assert order.built
    inside(machine).check()
    left = set(keys) - set(keys[third // 2:third]) | set(keys[2 * third:])
    assert [key for key, _ in machine.ordered()] == sorted(left)


def test_keys_applied_during_a_compaction_are_in_order(directory: Path, machine_at: Opener) -> None:
    """Keys that are new, deleted, or put again during a compaction are correct, and once, in the next order."""
    dice = random.Random(7)
    keys = SHAPES["random"][:3000]
    expected = set(keys)
    machine = machine_at(directory, auto_compact=False, retain_entries=0, ordered=True)
    put_all(machine, keys)

    def meddle(done: int, total: int) -> None:
        some = dice.sample(keys, 20)
        delete_all(machine, some)
        again = some[:10] + [dice.randbytes(16) for _ in range(10)]
        put_all(machine, again)
        delete_all(machine, again[:2])
        expected.difference_update(some)
        expected.update(again[2:])
        if dice.random() < 0.5:
            machine.scan(again[2], limit=1)  # removes entries of deleted keys, and sorts new ones in

    for _ in range(3):
        machine.compact(progress=meddle)
        inside(machine).check()
        assert [key for key, _ in machine.ordered()] == sorted(expected)
