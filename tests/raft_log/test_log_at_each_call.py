"""``RaftLog`` with injected faults: killed, or refused, at each system call and each allocation of each operation."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import log_at_each_call, shim


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shim.compiled(tmp_path_factory.mktemp("shim"))


def outcomes(library: Path, fault: str, *names: str) -> dict[str, dict[str, int]]:
    """Return the counts of outcomes by scene, under a fault; check that nothing was violated."""
    found = shim.run_with(library, Path(log_at_each_call.__file__), fault, *names)
    print(fault, found["outcomes"])
    assert not found["violations"], "\n\n".join(found["violations"][:5])
    assert set(found["outcomes"]) == set(names or log_at_each_call.SCENES)
    ended: dict[str, dict[str, int]] = found["outcomes"]
    return ended


@pytest.mark.parametrize("fault", ["kill", "kill after"])
def test_a_kill_at_each_system_call_leaves_what_had_returned(library: Path, fault: str) -> None:
    """A kill at the n-th call, for every n, loses nothing that had returned, and no vote that was given.

    The log is as after the calls that had returned, or after the next one, or with a prefix of its entries.
    """
    ended = outcomes(library, fault)
    assert sum(counts["killed"] for counts in ended.values()) >= 200
    assert min(counts["killed"] for counts in ended.values()) >= 2


@pytest.mark.parametrize("fault", ["fail", "fail, done"])
def test_each_system_call_that_fails_changes_nothing(library: Path, fault: str) -> None:
    """A failure of the n-th call is a ``StorageError`` or avoided; the log is unchanged, works, and nothing stays open.

    If it is poisoned, reopening finds it unchanged, or with the vote that could not be synced.
    """
    ended = outcomes(library, fault)
    assert sum(counts.get("StorageError", 0) for counts in ended.values()) >= 50


def test_each_allocation_that_fails_changes_nothing(library: Path) -> None:
    """The same for the n-th allocation of the compiled modules: a ``MemoryError``."""
    ended = outcomes(library, "malloc")
    assert sum(counts.get("MemoryError", 0) for counts in ended.values()) >= 10


def test_an_interpreter_without_memory_changes_nothing(library: Path) -> None:
    """The same for the interpreter's n-th allocation, whatever it is for: a ``MemoryError``."""
    pytest.importorskip("_testcapi")
    ended = outcomes(library, "nomemory", "append, sync", "new segments", "compact", "save_hard_state", "close", "open")
    assert sum(counts.get("MemoryError", 0) for counts in ended.values()) >= 100
