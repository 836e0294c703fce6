"""100,000 keys of each kind that an attacker may choose: they need at most three times the probes of random keys.

Work is counted, not timed: the distance of each key from its home slot after all are written. `test_table.py` bounds
the work until the table draws another seed, which a probe causes that is too long or meets too many other keys.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fastsm
from fastsm import FastStateMachine
from fastsm.core import generations
from fastsm.lookup.table import Table
from support.attacks import numbers_and_hashes
from support.power import QuietDirectory
from support.tables import SEGMENT, SLOTS, TableFile

COUNT = 100_000
HOME_SHIFT = 52
WYHASH_SECRET = 0xE7037ED1A0B428DB  # a word that is multiplied by 0 hides the other one
XXH3_SECRET = 0x1CAD21F72C81017C ^ 0xDB979083E96DD4DE


def chosen(wanted: Callable[[np.ndarray], np.ndarray]) -> list[bytes]:
    """Return 8-byte keys whose hashes under seed (0, 0) satisfy a condition."""
    keys: list[bytes] = []
    for start, hashes in numbers_and_hashes():
        keys += [int(n).to_bytes(8, "little") for n in np.nonzero(wanted(hashes))[0] + start]
        if len(keys) >= COUNT:
            break
    return keys[:COUNT]


ATTACKS: dict[str, Callable[[], list[bytes]]] = {
    "one neighbourhood, the seed known": lambda: chosen(lambda h: (h >> np.uint64(12) & np.uint64(0xFFF)) < 16),
    "one segment, the seed known": lambda: chosen(lambda h: h >> np.uint64(56) == 0),
    "wyhash, any seed": lambda: [struct.pack("<QQ", WYHASH_SECRET, n) for n in range(COUNT)],
    "XXH3, any seed": lambda: [struct.pack("<QQ", XXH3_SECRET, n) for n in range(COUNT)],
    "low bits alone": lambda: [(n << 44).to_bytes(8, "little") for n in range(COUNT)],
}


def probes(path: Path, keys: list[bytes], monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the mean number of slots that a lookup of these keys visits, in a table whose first seed is (0, 0)."""
    monkeypatch.setattr(generations, "SAVE_TABLE_ABOVE", 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "urandom", bytes)  # only the first seed is chosen; later ones are random
        assert Table().seed == (0, 0)
        machine = FastStateMachine(path, _files=QuietDirectory)
    for number, start in enumerate(range(0, COUNT, 1000), 1):
        machine.apply([(number, 1, fastsm.put_many(keys[start : start + 1000], [b""] * 1000))])
    assert machine.len() == COUNT
    assert machine.get_many(keys[::97]) == [b""] * len(keys[::97])
    machine.close()
    (file,) = path.glob("table-*")
    table = TableFile(file)
    distances = [
        ((at - table.sections.segments) % SEGMENT // 8 - (slot >> HOME_SHIFT)) % SLOTS for at, slot in table.slots()
    ]
    assert len(distances) == COUNT
    return 1 + sum(distances) / COUNT


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Provide the mean number of slots for random keys."""
    dice = random.Random(1)
    with pytest.MonkeyPatch.context() as patch:
        return probes(tmp_path_factory.mktemp("random") / "state", [dice.randbytes(8) for _ in range(COUNT)], patch)


@pytest.mark.parametrize("attack", ATTACKS)
def test_chosen_keys_take_at_most_three_times_the_probes(
    attack: str, ordinary: float, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 100,000 chosen keys are there, and a lookup visits at most three times as many slots as for random keys."""
    found = probes(directory, ATTACKS[attack](), monkeypatch)
    print(f"{attack}: {found:.2f} slots a lookup; random keys: {ordinary:.2f}")
    assert 1 < ordinary < 4
    assert found <= 3 * ordinary
