"""Arguments of a wrong kind: the message names the argument, and says what to pass instead."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastsm
from fastsm import FastStateMachine, LogId, MemoryStateMachine, Reader, SnapshotMetadata, StorageError
from fastsm.generation.watch import Watch

TEXT = "is a str: encode it first"
NO_BUFFER = "key: a bytes-like object is required, not 'int'"
PAIR = r"expected a LogId\(index, term\) or a tuple of both, found"
NO_COMMAND = "not made by fastsm's commands .* or by those of a newer release"

# A method, its arguments, the error, a part of its message, and whether the model has the method, too.
WRONG: list[tuple[str, tuple[Any, ...], type[Exception], str, bool]] = [
    ("get", ("a",), TypeError, f"key {TEXT}", True),
    ("get", (5,), TypeError, NO_BUFFER, True),
    ("get_view", ("a",), TypeError, f"key {TEXT}", False),
    ("modified", ("a",), TypeError, f"key {TEXT}", True),
    ("__contains__", ("a",), TypeError, f"key {TEXT}", False),
    ("get_many", ("a",), TypeError, f"key {TEXT}", True),
    ("get_many", ([b"a", "b"],), TypeError, f"key {TEXT}", True),
    ("get_columns", (["a"],), TypeError, f"key {TEXT}", False),
    ("scan_prefix", ("a",), TypeError, f"prefix {TEXT}", False),
    ("apply", ([(1, 1)],), TypeError, r"position 0 of the chunk: .* found a tuple of 2", True),
    ("apply", ([(1, 1, fastsm.noop()), b"x"],), TypeError, "position 1 of .* found bytes; a chunk is", True),
    ("apply", ((1, 1, fastsm.noop()),), TypeError, r"found int; a chunk is a list of entries", True),
    ("apply", ([(1, 1, "put")],), TypeError, f"command {TEXT}", False),
    ("apply", ([(1, 2, b"hello")],), fastsm.UnknownCommandError, f"entry 1: .*{NO_COMMAND}.* upgrade", True),
    ("update_last_applied", (5,), TypeError, f"last applied: {PAIR} 5", True),
    ("persist_last_applied", ((5,),), TypeError, f"last applied: {PAIR}", True),
    ("write_snapshot", ("somewhere", 5), TypeError, f"last_included: {PAIR} 5; entry_term", True),
    ("write_snapshot", ("somewhere", (5,)), TypeError, f"last_included: {PAIR}", True),
    ("update_last_applied", (b"ab",), TypeError, f"last applied: {PAIR} b'ab'", True),
    ("persist_last_applied", ({7, 8},), TypeError, f"last applied: {PAIR}", True),
    ("update_last_applied", ({7: 1, 8: 1},), TypeError, f"last applied: {PAIR}", True),
    ("write_snapshot", ("somewhere", b"ab"), TypeError, f"last_included: {PAIR} b'ab'", True),
    ("write_snapshot", ("somewhere", (-1, 1)), fastsm.SnapshotRangeError, r"0 to 2\*\*64 - 2", True),
    ("state_checksum", (5,), TypeError, f"last_included: {PAIR} 5", True),
    ("state_checksum", ((0, 0, 0),), TypeError, f"last_included: {PAIR}", True),
    ("state_checksum", ((2**64 - 1, 1),), fastsm.SnapshotRangeError, r"0 to 2\*\*64 - 2", True),
    ("entry_term", (1.0,), TypeError, "integer", True),
    ("entry_term", ("1",), TypeError, "integer", True),
    ("entry_terms", ([1.5],), TypeError, "ids: expected an array of uint64, found one of float64", False),
    ("entry_terms", (["1"],), TypeError, "ids: expected an array of uint64", False),
    ("update_last_snapshot_metadata", (SnapshotMetadata((0, 0, 0), bytes(32)),), TypeError, PAIR, True),  # type: ignore[arg-type]
    ("update_last_snapshot_metadata", (SnapshotMetadata(None, bytes(32)),), TypeError, PAIR, True),  # type: ignore[arg-type]
    ("persist_last_snapshot_metadata", (SnapshotMetadata(LogId(), "x" * 32),), TypeError, f"checksum {TEXT}", True),  # type: ignore[arg-type]
    ("live_records", (5,), TypeError, f"last_included: {PAIR} 5", False),
]


@pytest.fixture
def fast(directory: Path) -> Iterator[FastStateMachine]:
    """Provide a machine in a directory."""
    with FastStateMachine(directory) as machine:
        yield machine


@pytest.mark.parametrize(("method", "arguments", "error", "says", "everywhere"), WRONG)
def test_the_error_of_a_wrong_argument_names_it_and_says_what_to_do(
    fast: FastStateMachine, method: str, arguments: tuple[Any, ...], error: type[Exception], says: str, everywhere: bool
) -> None:
    """The implementation and the model raise the same error, and nothing is applied."""
    for machine in [fast, MemoryStateMachine()] if everywhere else [fast]:
        with pytest.raises(error, match=says):
            getattr(machine, method)(*arguments)
        assert machine.last_applied() == (0, 0)


def test_expect_applied_is_a_pair(directory: Path) -> None:
    """An index alone is refused before anything is opened."""
    with pytest.raises(TypeError, match=f"expect_applied: {PAIR} 5"):
        FastStateMachine(directory, expect_applied=5)  # type: ignore[arg-type]
    assert not directory.exists()


@pytest.mark.parametrize("expected", [(-1, 1), (1, -1), (2**64 - 1, 1), (2**70, 1)])
def test_expect_applied_is_an_id_that_an_entry_can_have(directory: Path, expected: tuple[int, int]) -> None:
    """An id that no recovery could ever reach is refused before anything is opened."""
    with pytest.raises(ValueError, match=r"expect_applied=.*: expected 0 to 2\*\*64 - 2 each"):
        FastStateMachine(directory, expect_applied=expected)
    assert not directory.exists()


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("retain_entries", "5", TypeError),
        ("retain_entries", None, TypeError),
        ("retain_bytes", float("nan"), ValueError),
        ("compact_ratio", -1, ValueError),
        ("compact_floor", "64", TypeError),
        ("lock_timeout", None, TypeError),
        ("lock_timeout", -0.5, ValueError),
        ("mode", "0o700", TypeError),
        ("mode", 448.0, TypeError),
        ("snapshot_attachment", "text", TypeError),
        ("snapshot_attachment", 5, TypeError),
    ],
)
def test_an_option_of_a_wrong_kind_is_refused_before_anything_is_made(
    directory: Path, option: str, value: object, error: type[Exception]
) -> None:
    """The error names the option; an option that would fail at the first snapshot fails at the opening."""
    with pytest.raises(error, match=f"{option}"):
        FastStateMachine(directory, **{option: value})  # type: ignore[arg-type]
    assert not directory.exists()


def test_terms_of_indexes_that_no_entry_has(fast: FastStateMachine) -> None:
    """Indexes may be of any integer type; a negative index, like one beyond the last entry, has the term 0."""
    fast.update_last_applied((3, 2))
    assert fast.entry_terms(np.array([-1, -2, 3], np.int64)).tolist() == [0, 0, 2]
    assert fast.entry_terms(np.array([3, 4], np.uint8)).tolist() == [2, 0]
    assert fast.entry_terms([]).tolist() == []
    assert fast.entry_terms(np.array([[3, 1]], ">u4")).tolist() == [[2, 0]]
    assert fast.entry_terms([np.uint64(3), 1]).tolist() == [2, 0]
    assert fast.entry_terms([[3, 2**63]]).tolist() == [[2, 0]]


@pytest.mark.parametrize(
    ("chunk", "error"),
    [
        ([(1, 1, b"hello"), (3, 1, fastsm.noop())], fastsm.UnknownCommandError),
        ([(1, 1, fastsm.noop()), (3, 1, b"hello")], fastsm.OrderError),
        ([(1, 1, b"hello"), (1, 1)], fastsm.UnknownCommandError),
        ([(1, 1, "text"), (3, 1, fastsm.noop())], TypeError),
        ([(1, 1, fastsm.noop()), (2, 0, None)], fastsm.OrderError),
    ],
)
def test_the_first_invalid_entry_of_a_chunk_is_the_one_in_the_error(
    fast: FastStateMachine, chunk: list[Any], error: type[Exception]
) -> None:
    """The implementation and the model check a chunk's entries one after the other, each its order first."""
    for machine in (fast, MemoryStateMachine()):
        with pytest.raises(error):
            machine.apply(chunk)
        assert machine.last_applied() == (0, 0)


@pytest.mark.parametrize("function", [fastsm.decode, fastsm.check, lambda command: fastsm.batch([command])])
def test_bytes_that_are_no_command_are_called_so_before_an_upgrade(function: Callable[[bytes], object]) -> None:
    """The error first says that the bytes may be no command at all, and then that a newer release may know them."""
    with pytest.raises(fastsm.UnknownCommandError, match=f"{NO_COMMAND}.* version 104, .* upgrade"):
        function(b"hello")


@pytest.mark.parametrize("kind", [FastStateMachine, fastsm.RaftLog, Reader, fastsm.SnapshotReceiver])
@pytest.mark.parametrize("path", ["", "relative"])
def test_a_directory_that_the_system_does_not_find(
    kind: Any, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty path is not the current directory, and one in a current directory that is gone is a `StorageError`."""
    monkeypatch.chdir(tmp_path)
    if path:
        gone = tmp_path / "gone"
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()
    with pytest.raises(StorageError) as found:
        kind(path)
    assert found.value.errno == errno.ENOENT
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", Watch.__subclasses__())
def test_a_watch_that_no_method_has_made(kind: type[Watch]) -> None:
    """Reading it raises an error that says so, and is no segmentation fault."""
    for read in (Watch.read, next, lambda watch: asyncio.run(watch.read_async())):
        with pytest.raises(TypeError, match="use the method `watch`"):
            read(kind.__new__(kind))
