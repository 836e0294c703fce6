"""``RaftLog`` under the shim: killed or refused at each system call and each allocation of whatever it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import log_at_each_call, shim


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shim.compiled(tmp_path_factory.mktemp("shim"))


def outcomes(library: Path, fault: str, *names: str) -> dict[str, dict[str, int]]:
    """How often each scene ended how, under a fault; nothing was violated."""
    found = shim.run_with(library, Path(log_at_each_call.__file__), fault, *names)
    print(fault, found["outcomes"])
    assert not found["violations"], "\n\n".join(found["violations"][:5])
    assert set(found["outcomes"]) == set(names or log_at_each_call.SCENES)
    ended: dict[str, dict[str, int]] = found["outcomes"]
    return ended


@pytest.mark.parametrize("fault", ["kill", "kill after"])
def test_a_kill_at_each_system_call_leaves_what_had_returned(library: Path, fault: str) -> None:
    """Killed before the n-th call, or when it is done (a write half), for every n: the log after the calls that had
    returned, or after the next one, or with a prefix of its entries; and no vote that was given is gone.
    """
    ended = outcomes(library, fault)
    assert sum(counts["killed"] for counts in ended.values()) >= 200
    assert min(counts["killed"] for counts in ended.values()) >= 2


@pytest.mark.parametrize("fault", ["fail", "fail, done"])
def test_each_system_call_that_fails_changes_nothing(library: Path, fault: str) -> None:
    """The n-th call fails: a ``StorageError``, or a way around; the log is as before, goes on, and leaves nothing open.
    Where it is poisoned, it is so after opening it again: as before, or with the vote that could not be synced.
    """
    ended = outcomes(library, fault)
    assert sum(counts.get("StorageError", 0) for counts in ended.values()) >= 50


def test_each_allocation_that_fails_changes_nothing(library: Path) -> None:
    """The n-th allocation of the compiled modules fails: a ``MemoryError``, and the same."""
    ended = outcomes(library, "malloc")
    assert sum(counts.get("MemoryError", 0) for counts in ended.values()) >= 10


def test_an_interpreter_without_memory_changes_nothing(library: Path) -> None:
    """The interpreter's n-th allocation fails, whatever it is for: a ``MemoryError``, and the same."""
    pytest.importorskip("_testcapi")
    ended = outcomes(library, "nomemory", "append, sync", "new segments", "compact", "save_hard_state", "close", "open")
    assert sum(counts.get("MemoryError", 0) for counts in ended.values()) >= 100
