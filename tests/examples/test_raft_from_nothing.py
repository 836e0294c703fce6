"""The example raft_from_nothing: with nodes killed, cut off and paused, it stays linearizable and loses nothing."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import pytest

from support.linearizability import UNKNOWN, Operation, is_linearizable
from support.small_cluster import EXAMPLE, trial

SECONDS = 20


@pytest.mark.parametrize("changes", [False, True], ids=["same members", "members change"])
def test_a_cluster_that_is_killed_and_cut_stays_linearizable(tmp_path: Path, changes: bool) -> None:
    """Reads, writes and swaps of single keys are linearizable, each addition counts once, and all replicas are equal.

    This holds even while nodes, including killed ones and those cut off, are added and removed.
    """
    seed = random.randrange(1 << 32)
    print("seed", seed)
    found = asyncio.run(trial(tmp_path, SECONDS, seed, snapshot_every=50 if changes else 300, changes=changes))
    assert not changes or found["befell"]["members"] > 0
    print({key: len(seen) for key, seen in found["seen"].items()}, found["befell"], found["counted"])
    for key, seen in found["seen"].items():
        assert len(seen) > 20, key
        assert is_linearizable(seen), f"seed {seed}: {key!r}: {sorted(seen)}"
    assert found["count"] == found["counted"] > 0
    assert len(set(found["states"])) == 1


def test_the_demonstration_shows_what_the_docs_say(tmp_path: Path) -> None:
    """Without arguments the example writes, loses its leader, gains a member, and ends."""
    shown = subprocess.run(
        [sys.executable, EXAMPLE], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "200 additions came to: b'200'" in shown.stdout
    assert shown.stdout.endswith("it has caught up: b'blue'\n")


@pytest.mark.parametrize(
    ("right", "operations"),
    [
        (True, [Operation(0, 2, "put", 1), Operation(1, 3, "get", None, 1)]),
        (True, [Operation(0, 2, "put", 1), Operation(1, 3, "get", None, None)]),
        (False, [Operation(0, 2, "put", 1), Operation(3, 4, "get", None, None)]),
        (True, [Operation(0, UNKNOWN, "put", 1), Operation(1, 2, "get"), Operation(3, 4, "get", None, 1)]),
        (False, [Operation(0, UNKNOWN, "put", 1), Operation(1, 2, "get", None, 1), Operation(3, 4, "get")]),
        (False, [Operation(0, 1, "put", 1), Operation(2, 3, "swap", (1, 2), False)]),
        (False, [Operation(0, 3, "swap", (None, 1), True), Operation(0, 3, "swap", (None, 2), True)]),
        (True, [Operation(0, 3, "swap", (None, 1), True), Operation(0, 3, "swap", (None, 2), False)]),
        (True, [Operation(0, UNKNOWN, "swap", (None, 1)), Operation(5, 6, "swap", (1, 2), True)]),
        (False, [Operation(5, UNKNOWN, "put", 1), Operation(1, 2, "get", None, 1)]),
    ],
)
def test_the_checker_knows_right_from_wrong(right: bool, operations: list[Operation]) -> None:
    """The checker finds a stale read, a value never or not yet written, and two swaps from one value; others pass."""
    assert is_linearizable(operations) is right
