"""Views: the log's own bytes, lent out and unchanged as long as they are held."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

import fastsm
from fastsm import FastStateMachine, NotRunningError
from fastsm.disk import mapping

Opener = Callable[..., FastStateMachine]
LARGE = os.urandom(1 << 20)


@pytest.fixture
def machine(directory: Path, machine_at: Opener) -> FastStateMachine:
    """A machine with a few values, the last of them 1 MiB."""
    machine = machine_at(directory)
    machine.apply([
        (1, 1, fastsm.put(b"key", b"value")),
        (2, 1, fastsm.put(b"empty", b"")),
        (3, 1, fastsm.put(b"large", LARGE)),
    ])  # fmt: skip
    return machine


def apply(machine: FastStateMachine, *commands: bytes) -> None:
    """Apply one chunk."""
    first = machine.last_applied().index + 1
    machine.apply([(first + i, 1, command) for i, command in enumerate(commands)])


def test_a_view_is_the_value(machine: FastStateMachine) -> None:
    """A view shows the bytes that ``get`` copies: none, few, or a megabyte."""
    for key in (b"key", b"empty", b"large"):
        view = machine.get_view(key)
        assert view is not None
        assert (view.format, view.itemsize, view.ndim, view.contiguous) == ("B", 1, 1, True)
        assert (bytes(view), view.nbytes) == (machine.get(key), len(machine.get(key) or b""))
    assert machine.get_view(b"absent") is None


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_bytes_like_object_is_a_key(machine: FastStateMachine, wrap: Callable[[bytes], bytes]) -> None:
    """Views, ``in`` and ``modified`` take the same keys as ``get``."""
    assert bytes(machine.get_view(wrap(b"key")) or b"") == b"value"
    assert wrap(b"key") in machine
    assert wrap(b"absent") not in machine
    assert machine.modified(wrap(b"key")) == (1, 1)


def test_a_view_is_read_only(machine: FastStateMachine) -> None:
    """Nothing can be stored through a view, or through an object made from it."""
    view = machine.get_view(b"key")
    assert view is not None
    assert view.readonly
    for target in (view, view[1:], view.cast("c")):
        with pytest.raises(TypeError):
            target[0] = 0
    assert machine.get(b"key") == b"value"


def test_a_view_stays_as_it_was_through_every_change(machine: FastStateMachine) -> None:
    """Overwrites, deletes, growth of the log, ``clear`` and ``close`` do not change a view."""
    views = {key: machine.get_view(key) for key in (b"key", b"empty", b"large")}
    expected = {key: machine.get(key) for key in views}

    def unchanged() -> bool:
        return {key: bytes(view) for key, view in views.items()} == expected  # type: ignore[arg-type]

    apply(machine, *(fastsm.put(key, b"another") for key in views))
    assert unchanged()
    apply(machine, *(fastsm.delete(key) for key in views))
    assert unchanged()
    for _ in range(40):
        apply(machine, fastsm.put(b"more", os.urandom(1 << 20)))
    machine.flush()
    assert unchanged()
    machine.clear()
    apply(machine, fastsm.put(b"key", b"in the next log"))
    assert unchanged()
    machine.close()
    assert unchanged()
    del machine
    gc.collect()
    assert unchanged()


def test_a_view_outlives_its_machine_and_its_file(tmp_path: Path) -> None:
    """The bytes stay valid after machine, descriptors and directory are gone."""
    machine = FastStateMachine(tmp_path / "state")
    apply(machine, fastsm.put(b"large", LARGE))
    view = machine.get_view(b"large")
    machine.close()
    gone = weakref.ref(machine)
    del machine
    gc.collect()
    assert gone() is None
    for file in (tmp_path / "state").iterdir():
        file.unlink()
    assert view == LARGE


def test_pinned_bytes_rise_and_fall_with_views_of_logs_that_were_left(machine: FastStateMachine) -> None:
    """``stats().pinned_bytes`` counts logs replaced by ``clear`` that views hold; the last view frees them."""
    assert machine.stats().pinned_bytes == 0
    first, second = machine.get_view(b"key"), machine.get_view(b"large")
    assert machine.stats().pinned_bytes == 0, "a view of the present log pins nothing more"
    machine.clear()
    assert machine.stats().pinned_bytes >= len(LARGE)
    del first
    assert machine.stats().pinned_bytes >= len(LARGE), "the second view still holds the log"
    assert second == LARGE
    part = second[-10:]
    del second
    assert machine.stats().pinned_bytes >= len(LARGE), "a part of a view holds the log, too"
    del part
    assert machine.stats().pinned_bytes == 0


def test_iterators_pin_as_views_do(machine: FastStateMachine) -> None:
    """An iterator that is not exhausted holds a log replaced by ``clear``."""
    items = machine.items()
    next(items)
    machine.clear()
    assert machine.stats().pinned_bytes >= len(LARGE)
    del items
    assert machine.stats().pinned_bytes == 0


def test_clear_without_views_pins_nothing(machine: FastStateMachine) -> None:
    """``clear`` frees the old log's pages immediately if they are not held."""
    machine.clear()
    assert machine.stats().pinned_bytes == 0


def test_address_space_goes_back_with_the_last_view(directory: Path) -> None:
    """Fifty rounds of view, ``clear`` and release take no more address space than a few."""
    def address_space() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc/self/statm")
    with FastStateMachine(directory) as machine:
        sizes = []
        for _ in range(50):
            apply(machine, fastsm.put(b"key", b"value"))
            view = machine.get_view(b"key")
            machine.clear()
            assert view == b"value"
            del view
            sizes.append(address_space())
    assert max(sizes[10:]) - sizes[10] < min(mapping.RESERVATIONS)


def test_modified_is_the_entry_that_last_wrote_the_key(machine: FastStateMachine) -> None:
    """``modified`` follows puts, swaps and batches that took effect, and nothing else."""
    assert machine.modified(b"absent") is None
    machine.apply([(4, 2, fastsm.compare_and_swap(b"key", b"other", b"")), (5, 2, fastsm.noop())])
    assert machine.modified(b"key") == (1, 1)
    machine.apply([(6, 2, fastsm.compare_and_swap(b"key", b"value", b"value"))])
    assert machine.modified(b"key") == fastsm.LogId(6, 2)
    machine.apply([(7, 4, fastsm.put_many([b"key", b"empty"], [b"", b""])), (8, 4, fastsm.delete(b"empty"))])
    assert machine.modified(b"key") == fastsm.LogId(7, 4)
    assert machine.modified(b"empty") is None


def test_reads_of_a_stopped_and_of_a_closed_machine_are_refused(machine: FastStateMachine) -> None:
    """After ``stop`` and after ``close`` every way to read a key raises ``NotRunningError``."""
    calls: list[Callable[[], object]] = [
        lambda: machine.get(b"key"), lambda: machine.get_view(b"key"), lambda: b"key" in machine,
        lambda: machine.modified(b"key"), lambda: machine.get_many([b"key"]), lambda: machine.get_columns([b"key"]),
        machine.columns, machine.keys, machine.items, lambda: machine.scan_prefix(b""), machine.verify,
    ]  # fmt: skip
    for end in (machine.stop, machine.close):
        end()
        for call in calls:
            with pytest.raises(NotRunningError):
                call()
    for call in (machine.stats, machine.len, machine.last_applied, lambda: machine.entry_terms([1])):
        with pytest.raises(NotRunningError):
            call()


OUTGROWN = """
    import errno, sys, threading
    import fastsm, fastsm.disk.descriptors, fastsm.disk.mapping
    from fastsm.disk.files import Directory

    fastsm.disk.mapping.RESERVATIONS = ()  # as under a limit of address space: only the needed size is reserved
    failing = False

    class Files(Directory):
        @staticmethod
        def write(fd, content, offset):
            if failing:
                raise OSError(errno.EIO, "no")
            fastsm.disk.descriptors.write_at(fd, content, offset)

    machine = fastsm.FastStateMachine(sys.argv[1], _files=Files)
    machine.apply([(1, 1, fastsm.put(b"key", b"value"))])
    view = machine.get_view(b"key")
    stop = False
    def read():
        while not stop:
            assert machine.get(b"key") == machine.get_view(b"key") == b"value"
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for index in range(2, 40):
        machine.apply([(index, 1, fastsm.put(b"%d" % index, bytes(1 << 20)))])
    stop = True
    for reader in readers:
        reader.join()
    failing = True
    try:
        machine.apply([(40, 1, fastsm.put(b"large", bytes(150 << 20)))])
    except fastsm.StorageError:
        pass
    else:
        raise AssertionError("the write did not fail")
    assert machine.get(b"key") == b"value" == bytes(view)
    machine._check()
    print("fine")
"""


def test_a_log_that_outgrows_its_address_space_disturbs_no_reader(directory: Path) -> None:
    """If the log has to be mapped again, concurrent reads, earlier views and a failing write are safe."""
    program = ["-X", "faulthandler", "-W", "ignore::ResourceWarning", "-c", textwrap.dedent(OUTGROWN)]
    ended = subprocess.run(
        [sys.executable, *program, str(directory)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "fine\n"), ended.stderr[-3000:]
