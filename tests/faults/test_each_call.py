"""A kill or a failure at each system call, each allocation and each limit, in every scene.

The faults of `test_generation_faults.py` come through the seam. These come from below it, where maps and memory are
requested, too: from a library between the process and its C library (`support/shim.c`), from the system's own limits,
and from the interpreter's allocator. The scenes, and what must hold afterwards, are in `support/at_each_call.py`.
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
    """Run scenes with a fault; check that nothing was violated, and return the counts of outcomes by scene."""
    found: dict[str, Any] = shim.run_with(library, PROGRAM, fault, *scenes)
    print(fault, found["outcomes"])
    assert not found["violations"], "\n\n".join(found["violations"][:5])
    assert set(found["outcomes"]) == set(scenes or at_each_call.ALL)
    return found["outcomes"]


@pytest.mark.parametrize(("fault", "scenes", "least"), [("kill", (), 500), ("kill after", SOME, 200)])
def test_a_kill_at_each_system_call_leaves_a_whole_state(
    library: Path, fault: str, scenes: tuple[str, ...], least: int
) -> None:
    """A kill before or after the n-th call, or within a write, leaves the old state or the next one.

    Every acknowledged chunk is there, for every n.
    """
    found = outcomes(library, fault, *scenes)
    assert sum(ended["killed"] for ended in found.values()) >= least
    assert min(ended["killed"] for ended in found.values()) >= 5


def test_each_system_call_that_fails_is_a_typed_error(library: Path) -> None:
    """A failing n-th call is a typed error or does not matter; the old state stays usable, nothing is left open."""
    for name, ended in outcomes(library, "fail", *SOME, "close, table").items():
        assert sum(count for outcome, count in ended.items() if outcome.startswith("StorageError")) >= 5, name


def test_a_write_that_is_cut_short_is_continued(library: Path) -> None:
    """The system writes only the first byte of the n-th piece of a frame: the frame becomes whole."""
    for ended in outcomes(library, "short", "apply and flush", "apply, judged").values():
        assert set(ended) == {"gone around"}
        assert sum(ended.values()) >= 5


def test_each_allocation_that_fails_is_a_memory_error(library: Path) -> None:
    """A failing n-th allocation of a compiled module is a `MemoryError`; the old state stays usable."""
    assert all(ended.get("MemoryError", 0) >= 2 for ended in outcomes(library, "malloc").values())


def test_each_allocation_of_a_read_in_order_that_fails_is_a_memory_error(library: Path) -> None:
    """If the n-th allocation of an ordered read fails, the read raises `MemoryError` or is correct.

    The next read is correct.
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
    """Return whether a nested function, which `install_snapshot` has, can be defined without memory.

    CPython 3.12 and 3.13 release one reference too many if its object cannot be allocated, and crash soon after.
    """
    command = [sys.executable, "-c", NESTED_FUNCTION]
    environment = {**os.environ, "PYTHONMALLOC": "debug"}
    return subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize("scene", [*SOME, "apply, judged"])
def test_an_interpreter_without_memory_is_a_memory_error(library: Path, scene: str) -> None:
    """A failing n-th allocation of the interpreter is a `MemoryError`; the old state stays usable."""
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
        except (MemoryError, RuntimeError, SystemError):  # the interpreter reports a lack of memory in different ways
            refused += 1
            quiet = 0
        finally:
            _testcapi.remove_mem_hooks()
        n += 1
    print(name, refused)
    assert refused >= 5, name
"""


def test_a_list_that_cannot_grow_gives_nothing_back_twice() -> None:
    """If a list in compiled code cannot grow, its elements' references are released once.

    List comprehensions and starred displays compiled by Cython 3.3 release an element twice, so that the allocator
    crashes soon.
    """
    ended = subprocess.run([sys.executable, "-c", LISTS], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]


@pytest.mark.parametrize(
    ("fault", "said"), [("descriptors", "StorageError EMFILE"), ("file size", "StorageError EFBIG")]
)
def test_a_limit_is_a_storage_error(library: Path, fault: str, said: str) -> None:
    """A limit of descriptors or file size is a `StorageError` with the system's errno; the old state stays usable."""
    found = outcomes(library, fault, *SOME)
    assert sum(ended.get(said, 0) > 0 for ended in found.values()) >= 4
    assert all(ended["gone around"] >= 3 for ended in found.values())


def test_a_limit_of_address_space_is_an_error(library: Path) -> None:
    """A limit of address space is a `MemoryError` or the system's ENOMEM, and never a hang."""
    found = outcomes(library, "address space", *SOME)
    assert sum(len(ended) > 1 for ended in found.values()) >= 4
