"""Nothing grows, however often a state is written, snapshotted, installed, compacted, read and closed.

``python -m tests.leaks --rounds 5000`` is the same for longer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells what a process holds"),
    pytest.mark.skipif("FASTSM_SANITIZED" in os.environ, reason="a sanitizer keeps what was freed"),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TESTS / "leaks.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_memory_and_descriptors_do_not_grow() -> None:
    """Memory, descriptors, maps and Python's blocks are the same after a hundred rounds as after twenty."""
    ended = run("--rounds", "100")
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("kind", ["private_bytes", "virtual_bytes", "descriptors", "maps", "blocks"])
def test_a_leak_is_found(kind: str) -> None:
    """A leak of each kind, if it occurs in every round, is found."""
    ended = run("--rounds", "25", "--plant", kind)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert f"{kind} grow" in ended.stdout
