"""get, get_many, get_view compared with a dict: hits and misses, with the same and with new key objects."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastsm
from bench.data import chunked, fill, fresh, scaled
from bench.peers import open_peer

SIZES = {"10k": scaled(10_000), "1m": scaled(1_000_000)}
LOOKUPS = scaled(200_000)


@pytest.fixture(scope="module")
def tables(keys: list[bytes], values: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Provide `tables(who, size)`, which returns a store and a dict that hold the same pairs."""
    stores: dict[Any, Any] = {}
    dicts: dict[str, dict[bytes, bytes]] = {}

    def table(who: str, size: str) -> Any:
        count = SIZES[size]
        if size not in dicts:
            dicts[size] = dict(zip(fresh(keys[:count]), fresh(values[:count]), strict=True))
        if (who, size) not in stores:
            directory = tmp_path_factory.mktemp("get") / who
            if who == "fastsm":
                store: Any = fastsm.FastStateMachine(directory)
                fill(store, keys[:count], values[:count])
            else:
                store = open_peer(who, directory)
                for chunk in chunked(list(zip(keys[:count], values[:count], strict=True)), 1000):
                    store.apply(chunk)
            stores[who, size] = store
        return stores[who, size], dicts[size]

    yield table
    for store in stores.values():
        store.close()


def look_up(get: Callable[[bytes], object], wanted: list[bytes]) -> None:
    for key in wanted:
        get(key)


@pytest.mark.parametrize("size", SIZES)
def test_get_fresh(compare: Any, tables: Any, keys: list[bytes], size: str, who: str) -> None:
    store, pairs = tables(who, size)
    source = random.Random(3)

    def prepare() -> Any:
        wanted = source.choices(keys[: SIZES[size]], k=LOOKUPS)
        return (store.get, fresh(wanted)), (pairs.get, fresh(wanted))

    compare(f"get.{size}.fresh", look_up, look_up, LOOKUPS, prepare, who=who)


@pytest.mark.parametrize("size", SIZES)
def test_get_same_objects(compare: Any, tables: Any, size: str, who: str) -> None:
    store, pairs = tables(who, size)
    source = random.Random(4)

    def prepare() -> Any:
        wanted = source.choices(list(pairs), k=LOOKUPS)
        return (store.get, wanted), (pairs.get, wanted)

    compare(f"get.{size}.same", look_up, look_up, LOOKUPS, prepare, who=who)


def test_get_miss(compare: Any, tables: Any, who: str) -> None:
    store, pairs = tables(who, "1m")
    source = random.Random(5)

    def prepare() -> Any:
        wanted = [source.randbytes(16) for _ in range(LOOKUPS)]
        return (store.get, wanted), (pairs.get, fresh(wanted))

    compare("get.1m.miss", look_up, look_up, LOOKUPS, prepare, who=who)


def test_get_many(compare: Any, tables: Any, keys: list[bytes], who: str) -> None:
    store, pairs = tables(who, "1m")
    source = random.Random(6)

    def prepare() -> Any:
        wanted = source.choices(keys, k=LOOKUPS)
        return (chunked(fresh(wanted), 1000),), (chunked(fresh(wanted), 1000),)

    def subject(batches: list[list[bytes]]) -> None:
        for batch in batches:
            store.get_many(batch)

    def base(batches: list[list[bytes]]) -> None:
        for batch in batches:
            list(map(pairs.get, batch))

    compare("get_many.1m", subject, base, LOOKUPS, prepare, who=who)


@pytest.mark.parametrize(("size", "count"), [("4k", scaled(20_000)), ("1m", scaled(200))])
def test_get_view(compare: Any, machine_at: Any, size: str, count: int) -> None:
    """Take views of values: the cost does not depend on the value's size."""
    machine = machine_at()
    source = random.Random(8)
    keys = [source.randbytes(16) for _ in range(count)]
    value = bytes(4096 if size == "4k" else 1 << 20)
    for start in range(0, count, 100):
        some = keys[start : start + 100]
        fill(machine, some, [value] * len(some))
    pairs = {bytes(bytearray(key)): bytes(value) for key in keys}

    def prepare() -> Any:
        wanted = source.choices(keys, k=LOOKUPS)
        return (machine.get_view, fresh(wanted)), (pairs.get, fresh(wanted))

    compare(f"get_view.{size}", look_up, look_up, LOOKUPS, prepare)
