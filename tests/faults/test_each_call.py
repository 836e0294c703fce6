"""Each system call, each allocation, each limit: a process is killed there, or refused, once, in every scene.

Unlike the faults of `test_generation_faults.py`, which come through the seam, these come from below, where maps and
memory are asked for as well: from a library between the process and its C library (`support/shim.c`), from the system's
own limits, and from the interpreter's allocator. What is done each time, and what must then be true, is in
`support/at_each_call.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import at_each_call, order_without_memory, shim

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


@pytest.mark.parametrize(("fault", "scenes", "least"), [("kill", (), 500), ("kill after", SOME, 200)])
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


def test_each_allocation_of_a_read_in_order_that_fails_is_a_memory_error(library: Path) -> None:
    """The n-th allocation of building, sorting in, walking or noting fails: a `MemoryError` or what is right, and the
    next read is right.
    """
    found: dict[str, dict[str, int]] = shim.run_with(library, Path(order_without_memory.__file__))
    assert all(ended["MemoryError"] >= 2 for ended in found.values()), found


NESTED_FUNCTION = """
import _testcapi

def outer(value):
    def inner():
        return value
    return inner

for n in range(36):
    _testcapi.set_nomemory(n % 12, n % 12 + 1)
    try:
        outer(n)
    except MemoryError:
        pass
    finally:
        _testcapi.remove_mem_hooks()
"""


def interpreter_survives() -> bool:
    """Whether a function within a function, which `install_snapshot` has, can be defined without memory.

    CPython 3.12 and 3.13 release one reference too many when its object cannot be had, and crash soon after.
    """
    command = [sys.executable, "-c", NESTED_FUNCTION]
    environment = {**os.environ, "PYTHONMALLOC": "debug"}
    return subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize("scene", SOME)
def test_an_interpreter_without_memory_is_a_memory_error(library: Path, scene: str) -> None:
    """The interpreter's n-th allocation fails: the same, with the steps between growing."""
    if scene == "install_snapshot" and not interpreter_survives():
        pytest.skip("this interpreter crashes itself when it has no memory to define a nested function")
    assert all(ended["MemoryError"] >= 10 for ended in outcomes(library, "nomemory", scene).values())


LISTS = """
import _testcapi
import sys
import tempfile
from fastsm import FastStateMachine, batch, delete, put
from fastsm.integrations.pysyncobj import FastJournal

root = tempfile.mkdtemp()
commands = [put(b"key-%03d" % i, b"v" * 20) for i in range(100)]
machine = FastStateMachine(root + "/state", auto_compact=False)
machine.apply([(i + 1, i + 1, command) for i, command in enumerate(commands)])
journal = FastJournal(root + "/journal")
for i in range(100):
    journal.add(b"entry", i + 2, 1)
works = {
    "scan": lambda: machine.scan_prefix(b"key"), "runs": lambda: machine.live_records((50, 50)),
    "batch": lambda: batch(commands), "journal": lambda: journal[10:90],
    "open": lambda: FastStateMachine(root + "/other").close(),
}
for name, work in works.items():
    work()
    refused = n = quiet = 0
    while quiet < 20:
        _testcapi.set_nomemory(n, n + 1)
        try:
            work()
            quiet += 1
        except (MemoryError, RuntimeError, SystemError):  # the interpreter's own ways to say it, at some places
            refused += 1
            quiet = 0
        finally:
            _testcapi.remove_mem_hooks()
        n += 1
    print(name, refused)
    assert refused >= 5, name
"""


def test_a_list_that_cannot_grow_gives_nothing_back_twice() -> None:
    """What compiled code makes lists of is counted right when one cannot grow; else the allocator crashes soon.

    List comprehensions and starred displays that Cython 3.3 compiles give the element back twice.
    """
    ended = subprocess.run([sys.executable, "-c", LISTS], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]


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
