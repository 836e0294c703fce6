"""Pointers: whatever Python code does in the middle of a call, no call reads memory that is no longer its own.

Such code is an ``__index__``, a buffer, a finalizer run by a collection, or another thread. It changes the call's
arguments, or the machine itself.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import Entry, FastStateMachine, LogId
from support.inside import inside

Opener = Callable[..., FastStateMachine]
COUNT = 2000


def fresh(data: bytes) -> bytes:
    """Return a copy that no other code refers to."""
    return bytes(bytearray(data))


def entries_of(first: int, count: int) -> list[Any]:
    """Return plain tuples of commands that only their list refers to."""
    return [
        (i, 1, fresh(fastsm.put(b"key-%d" % i, b"value-%d" % i))) for i in range(first, first + count)]


def expected_of(count: int) -> dict[bytes, bytes]:
    """Return the state after `entries_of(1, count)`."""
    return {b"key-%d" % i: b"value-%d" % i for i in range(1, count + 1)}


def overwrite_free_memory() -> list[bytearray]:
    """Allocates and overwrites the memory of small objects that were just freed."""
    return [bytearray(b"\xff" * size) for size in (32, 48, 64, 80) for _ in range(2000)]


class Meddler:
    """A number of an entry that changes something when its value is read."""

    def __init__(self, number: int, meddle: Callable[[], object]) -> None:
        self.number = number
        self.meddle = meddle

    def __index__(self) -> int:
        self.meddle()
        self.junk = overwrite_free_memory()
        return self.number


@pytest.fixture
def machine(directory: Path, machine_at: Opener) -> FastStateMachine:
    return machine_at(directory)


@pytest.fixture
def busy_threads() -> Iterator[None]:
    """Make threads switch at every opportunity."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


# ---- a chunk is as it was at the call ---------------------------------------------------------------------

@pytest.mark.parametrize("change", ["clear", "replace", "shorten", "grow"])
@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("field", ["index", "term"])
def test_a_number_of_an_entry_changes_the_list(machine: FastStateMachine, change: str, where: str, field: str) -> None:
    """A chunk whose list is changed by the ``__index__`` of one of its numbers is applied as it was at the call."""
    chunk = entries_of(1, COUNT)
    changes: dict[str, Callable[[], object]] = {
        "clear": chunk.clear,
        "replace": lambda: chunk.__setitem__(slice(None), [None] * COUNT),
        "shorten": lambda: chunk.__delitem__(slice(COUNT // 2, None)),
        "grow": lambda: chunk.extend([None] * 100_000),
    }
    position = 0 if where == "first" else COUNT - 1
    index, term, command = chunk[position]
    meddler = Meddler(index if field == "index" else term, changes[change])
    chunk[position] = (meddler, term, command) if field == "index" else (index, meddler, command)
    del command
    assert machine.apply(chunk) == [True] * COUNT
    assert dict(machine.items()) == expected_of(COUNT)


@pytest.mark.parametrize("kind", [bytearray, memoryview], ids=["bytearray", "memoryview"])
def test_a_command_that_is_a_buffer_is_copied(machine: FastStateMachine, kind: Callable[[bytes], Any]) -> None:
    """A buffer that is overwritten after ``apply`` has passed its entry does not change what is applied."""
    chunk = entries_of(1, COUNT)
    buffer = bytearray(chunk[0][2])
    chunk[0] = (1, 1, buffer if kind is bytearray else memoryview(buffer))

    def overwrite() -> None:
        buffer[:] = bytes(len(buffer))

    chunk[-1] = (Meddler(COUNT, overwrite), 1, chunk[-1][2])
    machine.apply(chunk)
    assert dict(machine.items()) == expected_of(COUNT)


def test_a_subclass_of_bytes_is_what_its_bytes_are(machine: FastStateMachine) -> None:
    """The memory of a command counts, whatever its class claims."""
    class Liar(bytes):
        def __len__(self) -> int:
            return 1 << 30

        def __bytes__(self) -> bytes:
            return b""

        def __getitem__(self, item: Any) -> Any:
            return 0

    machine.apply([(1, 1, Liar(fastsm.put(b"k", b"v")))])
    assert dict(machine.items()) == {b"k": b"v"}


def test_a_subclass_of_tuple_is_what_it_holds(machine: FastStateMachine) -> None:
    """The items of an entry count, whatever its class claims."""
    class Liar(tuple):
        __slots__ = ()

        def __len__(self) -> int:
            return 0

        def __getitem__(self, item: Any) -> Any:
            return None

        def __iter__(self) -> Any:
            return iter(())

    machine.apply([Liar((1, 1, fastsm.put(b"k", b"v")))])
    assert dict(machine.items()) == {b"k": b"v"}


def test_an_iterator_may_be_a_chunk_that_reads_the_machine(machine: FastStateMachine) -> None:
    """A chunk given as an iterator is complete before any of it is examined."""
    def making() -> Iterator[Entry]:
        for i in range(1, 100):
            assert machine.last_applied() == LogId(0, 0)
            yield Entry(i, 1, fresh(fastsm.put(b"key-%d" % i, b"value-%d" % i)))

    machine.apply(making())  # type: ignore[arg-type]
    assert dict(machine.items()) == expected_of(99)


def test_a_chunk_may_apply_a_chunk_while_it_is_made(machine: FastStateMachine) -> None:
    """Making the chunk comes before the writer's turn, so an iterator that writes simply writes first."""
    def making() -> Iterator[Entry]:
        machine.apply(entries_of(1, 5))
        yield from (Entry(*entry) for entry in entries_of(6, 5))

    machine.apply(making())  # type: ignore[arg-type]
    assert dict(machine.items()) == expected_of(10)


def test_a_collection_that_changes_the_list(machine: FastStateMachine) -> None:
    """A finalizer run at any allocation of ``apply`` never finds a list that is half read."""
    chunk: list[Any] = []

    class Garbage:
        def __del__(self) -> None:
            chunk.clear()
            self.junk = overwrite_free_memory()

    threshold = gc.get_threshold()
    try:
        for _ in range(50):
            first = machine.last_applied().index + 1
            chunk.extend(entries_of(first, 200))
            garbage = Garbage()
            garbage.itself = garbage  # type: ignore[attr-defined]
            del garbage
            gc.set_threshold(1)
            results = machine.apply(chunk)
            gc.set_threshold(*threshold)
            assert results in ([True] * 200, [])
            chunk.clear()
    finally:
        gc.set_threshold(*threshold)
    assert dict(machine.items()) == expected_of(machine.last_applied().index)


@pytest.mark.usefixtures("busy_threads")
@pytest.mark.parametrize("size", [40, 4000], ids=["small frames", "frames without the GIL"])
def test_a_thread_that_changes_the_list(machine: FastStateMachine, size: int) -> None:
    """A thread that clears the list during ``apply`` does not change the chunk, which was taken completely."""
    given: list[list[Any]] = []
    over = threading.Event()

    def meddle() -> None:
        while not over.is_set():
            if given:
                given.pop().clear()
                overwrite_free_memory()

    thread = threading.Thread(target=meddle)
    thread.start()
    try:
        for _ in range(60):
            first = machine.last_applied().index + 1
            chunk = [
                (i, 1, fresh(fastsm.put(b"key-%d" % i, b"value-%d" % i + bytes(size))))
                for i in range(first, first + 200)]
            given.append(chunk)
            machine.apply(chunk)
    finally:
        over.set()
        thread.join()
    for key, value in machine.items():
        assert value == b"value-" + key[4:] + bytes(size)


def test_a_coroutine_takes_the_list_at_the_call(machine: FastStateMachine) -> None:
    """A list that is changed while its chunk is queued is applied as it was when the task started."""
    async def main() -> None:
        chunk = entries_of(1, COUNT)
        task = asyncio.ensure_future(machine.apply_chunk(chunk))
        await asyncio.sleep(0)
        chunk.clear()
        await task

    with inside(machine).turns:
        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        while not inside(machine).worker.jobs:
            thread.join(0.001)
    thread.join()
    assert dict(machine.items()) == expected_of(COUNT)


# ---- arguments that are asked for their value -------------------------------------------------------------

class Large(int):
    """A number that claims to be less than any other."""

    def __lt__(self, other: object) -> bool:
        return True

    def __gt__(self, other: object) -> bool:
        return False


class Growing:
    """A number that is small when compared, and large when used."""

    def __lt__(self, other: Any) -> bool:
        return bool(other > 3)

    def __index__(self) -> int:
        return 1 << 40


@pytest.mark.parametrize(
    ("limit", "count"), [(Large(1 << 40), 10), (Growing(), 10), (Large(3), 3)], ids=["large", "growing", "small"])
def test_a_limit_is_asked_for_once(machine: FastStateMachine, limit: Any, count: int) -> None:
    """A scan's limit is converted to a number once, whatever its comparisons claim."""
    machine.apply(entries_of(1, 10))
    assert len(machine.scan_prefix(b"", limit=limit).entries) == count


@pytest.mark.skipif(sys.version_info < (3, 12), reason="buffers in Python code came with 3.12")
@pytest.mark.parametrize("moment", ["taken", "given back"])
@pytest.mark.parametrize("change", ["clear", "close", "install"])
@pytest.mark.parametrize("method", ["get", "get_view", "modified", "__contains__", "get_many", "get_columns"])
def test_a_key_changes_the_machine(
    machine: FastStateMachine, tmp_path: Path, method: str, change: str, moment: str
) -> None:
    """A key whose buffer resets, installs or closes is looked up in the machine as it is then, or it is an error."""
    machine.apply(entries_of(1, COUNT))
    metadata = machine.write_snapshot(tmp_path)
    machine.apply([(COUNT + 1, 1, fastsm.put(b"key-7", b"newer" * 100_000))])
    changes: dict[str, Callable[[], object]] = {
        "clear": machine.clear,
        "close": machine.close,
        "install": lambda: machine.install_snapshot(metadata, tmp_path / "snapshot.fsm", allow_older=True),
    }

    class Key:
        changed = False

        def change(self, now: str) -> None:
            if now == moment and not self.changed:
                self.changed = True
                changes[change]()

        def __buffer__(self, flags: int) -> memoryview:
            self.change("taken")
            return memoryview(b"key-7")

        def __release_buffer__(self, view: memoryview) -> None:
            self.change("given back")

    key: Any = Key()
    held = machine.get_view(b"key-7")
    call = getattr(machine, method)
    argument = [key] if method in ("get_many", "get_columns") else key
    try:
        found = call(argument)
    except fastsm.NotRunningError:
        assert change == "close"
    else:
        outcomes: dict[str, Any] = {
            "clear": {"get_columns": found, "get_many": [None], "__contains__": False},
            "install": {
                "get": b"value-7", "get_view": b"value-7", "modified": LogId(7, 1), "__contains__": True,
                "get_many": [b"value-7"], "get_columns": found,
            },
        }
        assert found == outcomes[change].get(method)
    assert key.changed
    assert held is not None
    assert bytes(held) == b"newer" * 100_000


@pytest.mark.usefixtures("busy_threads")
def test_threads_read_while_the_machine_is_closed(directory: Path, machine_at: Opener) -> None:
    """A read during a close returns a value or raises ``NotRunningError``, and uses nothing that is gone."""
    machines: list[FastStateMachine] = []
    over = threading.Event()
    wrong: list[BaseException] = []

    def read() -> None:
        while not over.is_set():
            if not machines:
                continue
            machine = machines[-1]
            try:
                repr(inside(machine).log.mapping)
                repr((inside(machine).index, inside(machine).table, inside(machine).terms))
                inside(machine).bytes()
                machine.stats()
            except fastsm.NotRunningError:
                pass
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            machine = machine_at(directory)
            machines.append(machine)
            machine.apply(entries_of(machine.last_applied().index + 1, 2000))
            machine.close()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == []
