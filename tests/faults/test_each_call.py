"""Each system call, each allocation, each limit: a process is killed there, or refused, once, in every scene.

Unlike the faults of `test_generation_faults.py`, which come through the seam, these come from below, where maps and
memory are asked for as well: from a library between the process and its C library (`support/shim.c`), from the system's
own limits, and from the interpreter's allocator. What is done each time, and what must then be true, is in
`support/at_each_call.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import at_each_call, shim

PROGRAM = Path(at_each_call.__file__)
SOME = ("write_snapshot", "install_snapshot", "compact, table", "clear", "apply and flush", "open, killed")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shim.compiled(tmp_path_factory.mktemp("shim"))


def outcomes(library: Path, fault: str, *scenes: str) -> dict[str, dict[str, int]]:
    """How often each scene ended how, under a fault; nothing was violated."""
    found: dict[str, Any] = shim.run_with(library, PROGRAM, fault, *scenes)
    print(fault, found["outcomes"])
    assert not found["violations"], "\n\n".join(found["violations"][:5])
    assert set(found["outcomes"]) == set(scenes or at_each_call.ALL)
    return found["outcomes"]


@pytest.mark.parametrize(("fault", "scenes", "least"), [("kill", (), 500), ("kill behind", SOME, 200)])
def test_a_kill_at_each_system_call_leaves_a_whole_state(
    library: Path, fault: str, scenes: tuple[str, ...], least: int
) -> None:
    """Killed before the n-th call, or when it is done (a write half), for every n: the old state or the next one, and
    every chunk that was acknowledged.
    """
    found = outcomes(library, fault, *scenes)
    assert sum(ended["killed"] for ended in found.values()) >= least
    assert min(ended["killed"] for ended in found.values()) >= 5


def test_each_system_call_that_fails_is_a_typed_error(library: Path) -> None:
    """The n-th call fails: a typed error, or a way around; the old state whole and usable, nothing left open."""
    for name, ended in outcomes(library, "fail", *SOME, "close, table").items():
        assert sum(count for outcome, count in ended.items() if outcome.startswith("StorageError")) >= 5, name


def test_each_allocation_that_fails_is_a_memory_error(library: Path) -> None:
    """The n-th allocation of the compiled modules fails: a `MemoryError`, and the same."""
    assert all(ended.get("MemoryError", 0) >= 2 for ended in outcomes(library, "malloc").values())


def test_an_interpreter_without_memory_is_a_memory_error(library: Path) -> None:
    """The interpreter's n-th allocation fails: the same, with the steps between growing."""
    assert all(ended["MemoryError"] >= 10 for ended in outcomes(library, "nomemory", *SOME).values())


@pytest.mark.parametrize(
    ("fault", "said"), [("descriptors", "StorageError EMFILE"), ("file size", "StorageError EFBIG")]
)
def test_a_limit_is_a_storage_error(library: Path, fault: str, said: str) -> None:
    """RLIMIT_NOFILE and RLIMIT_FSIZE, step by step up to where there is room: the system's own error, and the same."""
    found = outcomes(library, fault, *SOME)
    assert sum(ended.get(said, 0) > 0 for ended in found.values()) >= 4
    assert all(ended["gone around"] >= 3 for ended in found.values())


def test_a_limit_of_address_space_is_an_error(library: Path) -> None:
    """RLIMIT_AS: a `MemoryError`, or the system's ENOMEM, and no thread that is waited for in vain."""
    found = outcomes(library, "address space", *SOME)
    assert sum(len(ended) > 1 for ended in found.values()) >= 4
