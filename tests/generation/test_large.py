"""Files past 4 GiB. Outside of CI, since it writes some 14 GB: FASTSM_LARGE=1 pytest tests/generation/test_large.py"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

import fastsm

MIB = 1 << 20
VALUES = 4200  # of 1 MiB each, so that the last ones are beyond 4 GiB

pytestmark = pytest.mark.skipif(os.environ.get("FASTSM_LARGE") != "1", reason="FASTSM_LARGE=1 runs it: 14 GB")


def value_of(number: int) -> bytes:
    return number.to_bytes(8, "little") * (MIB // 8)


def check(machine: fastsm.FastStateMachine) -> None:
    """Check values before, around and after 4 GiB."""
    assert machine.len() == VALUES + 1000
    for number in [0, 1, 2047, 2048, 4000, 4090, 4095, 4096, VALUES - 1, *random.Random(1).sample(range(VALUES), 50)]:
        assert machine.get(b"large %d" % number) == value_of(number)
        view = machine.get_view(b"large %d" % number)
        assert view is not None
        assert view[-8:] == number.to_bytes(8, "little")
    assert machine.get_many([b"small %d" % i for i in range(1000)]) == [b"%d" % i for i in range(1000)]


def test_log_base_and_snapshot_past_4_gib(directory: Path, tmp_path: Path) -> None:
    """Offsets above 2**32 work in the log, the table, the base, the snapshot and the map of dead records."""
    with fastsm.FastStateMachine(directory, auto_compact=False, retain_entries=0) as machine:
        for number in range(VALUES):
            machine.apply([(number + 1, 1, fastsm.put(b"large %d" % number, value_of(number)))])
        machine.apply([(VALUES + 1 + i, 1, fastsm.put(b"small %d" % i, b"%d" % i)) for i in range(1000)])
        machine.flush()
        assert machine.stats().log_bytes > 1 << 32
        check(machine)
    with fastsm.FastStateMachine(directory, auto_compact=False, retain_entries=0, verify_on_open="full") as machine:
        check(machine)
        machine.compact()  # the base is now larger than 4 GiB, and the log is stacked on it
        index = machine.last_applied().index
        machine.apply([(index + 1 + i, 1, fastsm.put(b"small %d" % i, b"%d" % i)) for i in range(1000)])
        check(machine)
        machine.write_snapshot(tmp_path / "out")
    with fastsm.FastStateMachine(directory, auto_compact=False) as machine:
        check(machine)
    shutil.rmtree(directory)
    with fastsm.FastStateMachine(directory, auto_compact=False) as machine:
        machine.install_snapshot(None, tmp_path / "out")
        check(machine)
