"""get, get_many, get_view beside a dict: hits and misses, with new key objects."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from conftest import fill, fresh

import fastsm

SIZES = [10_000, 1_000_000]
LOOKUPS = 200_000


@pytest.fixture(scope="module")
def tables(
    keys: list[bytes], values: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    made: dict[int, tuple[fastsm.FastStateMachine, dict[bytes, bytes]]] = {}
    for size in SIZES:
        machine = fastsm.FastStateMachine(tmp_path_factory.mktemp("get") / "state")
        fill(machine, keys[:size], values[:size])
        made[size] = machine, dict(zip(fresh(keys[:size]), fresh(values[:size]), strict=True))
    yield made
    for machine, _ in made.values():
        machine.close()


def look_up(get: Callable[[bytes], object], wanted: list[bytes]) -> None:
    for key in wanted:
        get(key)


@pytest.mark.parametrize("size", SIZES)
def test_get_fresh(compare: Any, tables: Any, keys: list[bytes], size: int) -> None:
    machine, pairs = tables[size]
    source = random.Random(3)

    def prepare() -> Any:
        wanted = source.choices(keys[:size], k=LOOKUPS)
        return (machine.get, fresh(wanted)), (pairs.get, fresh(wanted))

    compare(look_up, look_up, LOOKUPS, prepare)


@pytest.mark.parametrize("size", SIZES)
def test_get_same_objects(compare: Any, tables: Any, keys: list[bytes], size: int) -> None:
    machine, pairs = tables[size]
    source = random.Random(4)

    def prepare() -> Any:
        wanted = source.choices(list(pairs), k=LOOKUPS)
        return (machine.get, wanted), (pairs.get, wanted)

    compare(look_up, look_up, LOOKUPS, prepare)


def test_get_miss(compare: Any, tables: Any) -> None:
    machine, pairs = tables[SIZES[-1]]
    source = random.Random(5)

    def prepare() -> Any:
        wanted = [source.randbytes(16) for _ in range(LOOKUPS)]
        return (machine.get, wanted), (pairs.get, fresh(wanted))

    compare(look_up, look_up, LOOKUPS, prepare)


def test_get_many(compare: Any, tables: Any, keys: list[bytes]) -> None:
    machine, pairs = tables[SIZES[-1]]
    source = random.Random(6)

    def prepare() -> Any:
        wanted = source.choices(keys, k=LOOKUPS)
        mine, theirs = fresh(wanted), fresh(wanted)
        return (
            ([mine[i : i + 1000] for i in range(0, LOOKUPS, 1000)],),
            ([theirs[i : i + 1000] for i in range(0, LOOKUPS, 1000)],),
        )

    def subject(batches: list[list[bytes]]) -> None:
        for batch in batches:
            machine.get_many(batch)

    def base(batches: list[list[bytes]]) -> None:
        for batch in batches:
            list(map(pairs.get, batch))

    compare(subject, base, LOOKUPS, prepare)
