"""Commands that answer, compared with commands that only write; made before the timing starts, in chunks of 100."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsm
from bench.data import chunked, fill, random_keys, scaled
from bench.harness import measured

KEYS = scaled(100_000)
ENTRIES = scaled(20_000)
SESSIONS = scaled(200_000)
SESSION = KEYS + 1  # a session's number is the index of the entry that opened it
CHUNK = 100
Make = Callable[[random.Random, list[bytes], int], bytes]


@fastsm.procedure
def increment(tx: Any, payload: bytes) -> int:
    """Add to a number with one get and one put."""
    key, amount = payload[:16], int(payload[16:])
    number = int(tx.get(key) or b"0") + amount
    tx.put(key, b"%d" % number)
    return number


def swap(dice: random.Random, keys: list[bytes], _: int) -> bytes:
    return fastsm.compare_and_swap(dice.choice(keys), b"100", b"100")


def add(dice: random.Random, keys: list[bytes], _: int) -> bytes:
    return fastsm.add(dice.choice(keys), 0)


def two_puts(dice: random.Random, keys: list[bytes]) -> list[bytes]:
    return [fastsm.put(key, b"100") for key in dice.sample(keys, 2)]


def batch(dice: random.Random, keys: list[bytes], _: int) -> bytes:
    return fastsm.batch(two_puts(dice, keys))


def transaction(dice: random.Random, keys: list[bytes], _: int) -> bytes:
    return fastsm.transaction([fastsm.exists(dice.choice(keys))], two_puts(dice, keys))


def put(dice: random.Random, keys: list[bytes], _: int) -> bytes:
    return fastsm.put(dice.choice(keys), b"100")


def once(dice: random.Random, keys: list[bytes], index: int) -> bytes:
    return fastsm.once(SESSION, index, fastsm.put(dice.choice(keys), b"100"))


ROWS: dict[str, tuple[Make, Make]] = {
    "answer.add": (add, swap), "answer.transaction": (transaction, batch), "answer.once": (once, put),
}  # fmt: skip


def opened(machine_at: Any, keys: list[bytes]) -> fastsm.FastStateMachine:
    machine: fastsm.FastStateMachine = machine_at(auto_compact=False, procedures=[increment])
    fill(machine, keys, [b"100"] * len(keys))
    machine.apply([(SESSION, 1, fastsm.open_session())])
    return machine


def chunks_of(machine: fastsm.FastStateMachine, make: Make, keys: list[bytes], seed: int) -> list[Any]:
    dice, first = random.Random(seed), machine.last_applied().index + 1
    return chunked([(first + i, 1, make(dice, keys, first + i)) for i in range(ENTRIES)], CHUNK)


def apply_all(machine: fastsm.FastStateMachine, chunks: list[Any]) -> None:
    for chunk in chunks:
        machine.apply(chunk)


@pytest.mark.parametrize("row", ROWS)
def test_commands_that_answer(compare: Any, machine_at: Any, row: str) -> None:
    """Run both kinds on two machines with the same hundred thousand keys; each round draws the same keys for both."""
    keys = random_keys(KEYS)
    mine, theirs = opened(machine_at, keys), opened(machine_at, keys)
    subject, base = ROWS[row]
    seeds = iter(range(1000))

    def prepare() -> Any:
        seed = next(seeds)
        return (mine, chunks_of(mine, subject, keys, seed)), (theirs, chunks_of(theirs, base, keys, seed))

    compare(row, apply_all, apply_all, ENTRIES, prepare)


class Replicated:
    """The same function as a library that pickles would run it: on a dict, with pickled arguments in a log."""

    def __init__(self, keys: list[bytes], log: Path) -> None:
        self.pairs = dict.fromkeys(keys, b"100")
        self.log = log.open("ab")

    def increment(self, key: bytes, amount: int) -> int:
        number = int(self.pairs.get(key) or b"0") + amount
        self.pairs[key] = b"%d" % number
        return number

    def apply(self, chunks: list[list[bytes]]) -> None:
        for chunk in chunks:
            results = []
            for command in chunk:
                self.log.write(command)
                name, arguments = pickle.loads(command)
                results.append(getattr(self, name)(*arguments))
            self.log.flush()


def test_a_procedure(compare: Any, machine_at: Any, place: Path) -> None:
    """Run one get and one put, as a procedure and as a replicated method on a dict with a buffered log."""
    keys = random_keys(KEYS)
    machine, replicated = opened(machine_at, keys), Replicated(keys, place / "log")
    dice = random.Random(6)

    def prepare() -> Any:
        drawn, first = [dice.choice(keys) for _ in range(ENTRIES)], machine.last_applied().index + 1
        calls = [(first + i, 1, fastsm.call("increment", key + b"1")) for i, key in enumerate(drawn)]
        pickled = [pickle.dumps(("increment", (key, 1))) for key in drawn]
        return (machine, chunked(calls, CHUNK)), (chunked(pickled, CHUNK),)

    compare("answer.procedure", apply_all, replicated.apply, ENTRIES, prepare)
    replicated.log.close()


CHILD = """
import fastsm

machine, count = fastsm.FastStateMachine(sys.argv[1], auto_compact=False), int(sys.argv[2])
machine.apply([(1, 1, fastsm.open_session())])
before = own_memory()
for first in range(2, count, 1000):
    machine.apply([(index, 1, fastsm.open_session()) for index in range(first, first + 1000)])
print(json.dumps((own_memory() - before) / count))
machine.close()
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell")
def test_memory_of_a_session(note: Any, place: Path) -> None:
    """Note the growth of the process's own memory; mapped pages belong to the page cache and are not counted."""
    note("answer.session", "bytes", [measured(CHILD, place / "state", SESSIONS)])
