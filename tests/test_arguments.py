"""Arguments of a wrong kind: the message names the argument, and says what to hand over instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import FastStateMachine, MemoryStateMachine

TEXT = "is a str: encode it first"
NO_BUFFER = "key: a bytes-like object is required, not 'int'"
PAIR = r"expected a LogId\(index, term\) or a tuple of both, found"
NO_COMMAND = "not made by fastsm's commands .* or by those of a newer release"

# A method, its arguments, the error, and what its message says; the last column: whether the model has the method, too.
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
    ("live_records", (5,), TypeError, f"last_included: {PAIR} 5", False),
]


@pytest.fixture
def fast(directory: Path) -> Iterator[FastStateMachine]:
    """A machine in a directory."""
    with FastStateMachine(directory) as machine:
        yield machine


@pytest.mark.parametrize(("method", "arguments", "error", "says", "everywhere"), WRONG)
def test_a_wrong_argument_is_named_and_told_what_to_do(
    fast: FastStateMachine, method: str, arguments: tuple[Any, ...], error: type[Exception], says: str, everywhere: bool
) -> None:
    """The implementation and the model say the same, and nothing is applied."""
    for machine in [fast, MemoryStateMachine()] if everywhere else [fast]:
        with pytest.raises(error, match=says):
            getattr(machine, method)(*arguments)
        assert machine.last_applied() == (0, 0)


def test_expect_applied_is_a_pair(directory: Path) -> None:
    """An index alone is refused before anything is opened."""
    with pytest.raises(TypeError, match=f"expect_applied: {PAIR} 5"):
        FastStateMachine(directory, expect_applied=5)  # type: ignore[arg-type]
    assert not directory.exists()


@pytest.mark.parametrize("function", [fastsm.decode, fastsm.check, lambda command: fastsm.batch([command])])
def test_bytes_of_another_make_are_called_so_before_an_upgrade_is_advised(function: Callable[[bytes], object]) -> None:
    """Most often such bytes are no command at all; a newer release comes second."""
    with pytest.raises(fastsm.UnknownCommandError, match=f"{NO_COMMAND}.* version 104, .* upgrade"):
        function(b"hello")
