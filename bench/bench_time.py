"""Deadlines: what they add to the cost of puts, what a tick costs, and their memory."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

import fastsm
from bench.data import chunked, scaled
from bench.harness import measured

ENTRIES = scaled(100_000)
TIMED = scaled(1_000_000)
DUE = scaled(10_000)
TICKS = scaled(5_000)
CHUNK = 100
LATER = 1 << 45  # milliseconds; no tick here reaches it


def test_puts_with_a_deadline(compare: Any, machine_at: Any, keys: list[bytes], values: list[bytes]) -> None:
    """Overwrite keys that have a deadline by puts with another deadline; compared with the same without deadlines."""
    timed, plain = machine_at(auto_compact=False), machine_at(auto_compact=False)
    dice = random.Random(8)
    drawn = keys[:ENTRIES]

    def chunks(machine: fastsm.FastStateMachine, order: list[int], has_deadline: bool) -> Any:
        first = machine.last_applied().index + 1
        made = [
            (first + i, 1, fastsm.put(drawn[k], values[k], expires=LATER + dice.randrange(1 << 30) if has_deadline
                                      else None))
            for i, k in enumerate(order)
        ]  # fmt: skip
        return machine, chunked(made, CHUNK)

    def apply_all(machine: fastsm.FastStateMachine, made: list[Any]) -> None:
        for chunk in made:
            machine.apply(chunk)

    def prepare() -> Any:
        order = dice.sample(range(len(drawn)), len(drawn))
        return chunks(timed, order, True), chunks(plain, order, False)

    for machine, made in prepare():
        apply_all(machine, made)
    compare("time.put", apply_all, apply_all, len(drawn), prepare)


def fill_timed(machine: fastsm.FastStateMachine, count: int, deadlines: Any) -> None:
    for first in range(1, count + 1, 1000):
        machine.apply([
            (index, 1, fastsm.put(b"key-%012d" % index, b"value", expires=next(deadlines)))
            for index in range(first, min(first + 1000, count + 1))
        ])  # fmt: skip


def test_ticks(note: Any, machine_at: Any) -> None:
    """Tick with a million deadlines: when none is due, less the time of a noop; and when ten thousand are due."""
    machine = machine_at(auto_compact=False)
    dice = random.Random(9)
    fill_timed(machine, TIMED, iter(lambda: LATER + dice.randrange(1 << 30), None))
    index, now = TIMED, 0
    more, removals = [], []
    for _ in range(5):
        spent = []
        for make in (fastsm.tick, lambda _: fastsm.noop()):
            made = []
            for _ in range(TICKS):
                index, now = index + 1, now + 1
                made.append([(index, 1, make(now))])
            begun = time.perf_counter()
            for chunk in made:
                machine.apply(chunk)
            spent.append((time.perf_counter() - begun) / TICKS * 1e6)
        more.append(spent[0] - spent[1])
    for number in range(5):
        machine.apply([
            (index + i, 1, fastsm.put(b"due-%d" % dice.randrange(1 << 60), b"value", expires=now + 1 + i % 500))
            for i in range(1, DUE + 1)
        ])  # fmt: skip
        index, now = index + DUE + 1, now + 1000
        begun = time.perf_counter()
        answer, = machine.apply([(index, 1, fastsm.tick(now))])
        removals.append((time.perf_counter() - begun) * 1e3)
        assert answer == fastsm.Answer(True, DUE), (number, answer)
    note("time.tick", "us", more)
    note("time.tick.due", "ms", removals)


CHILD = """
import random
import fastsm

directory, count, has_deadlines = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
machine, dice, index = fastsm.FastStateMachine(directory, auto_compact=False), random.Random(3), 0
machine.apply([(1, 1, fastsm.noop())])
before = own_memory()
for _ in range(2):  # the second round overwrites the keys
    for first in range(0, count, 1000):
        machine.apply([
            (2 + index + i, 1, fastsm.put(
                b"key-%012d" % (first + i), b"value", expires=dice.randrange(1 << 40) if has_deadlines else None))
            for i in range(1000)])
        index += 1000
print(json.dumps((own_memory() - before) / count))
machine.close()
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell")
def test_memory_of_a_deadline(note: Any, place: Path) -> None:
    """Note the bytes of memory that a deadline adds to a key, after all keys were overwritten once."""
    timed, plain = (measured(CHILD, place / str(each), max(TIMED, 1000), each) for each in (True, False))
    note("time.memory", "bytes", [timed - plain])
