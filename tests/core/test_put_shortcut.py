"""Puts are decoded by a faster path than other commands, with the same results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastsm

KEYS = st.binary(max_size=40)
VALUES = st.binary(max_size=300)


@st.composite
def almost_puts(draw: st.DrawFn) -> bytes:
    """Returns the bytes of a put, unchanged, or with one byte changed, cut, or extended."""
    command = bytearray(fastsm.put(draw(KEYS), draw(VALUES)))
    what = draw(st.sampled_from(["nothing", "byte", "cut", "longer"]))
    if what == "byte":
        command[draw(st.integers(0, min(9, len(command) - 1)))] = draw(st.integers(0, 255))
    elif what == "cut":
        del command[draw(st.integers(0, len(command) - 1)) :]
    elif what == "longer":
        command += draw(st.binary(min_size=1, max_size=9))
    return bytes(command)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fastsm.FastStateMachine]:
    with fastsm.FastStateMachine(tmp_path_factory.mktemp("state"), verify_on_open="off") as opened:
        yield opened


@given(command=almost_puts())
def test_what_is_almost_a_put_is_applied_as_decode_says(machine: fastsm.FastStateMachine, command: bytes) -> None:
    """``apply`` accepts a command exactly if ``decode`` does, and refuses it with the same message."""
    index = machine.last_applied().index + 1
    refusal: fastsm.CommandError | None = None
    try:
        decoded = fastsm.decode(command)
    except fastsm.CommandError as error:
        refusal = error
    if refusal is not None:
        with pytest.raises(type(refusal), match=re.escape(str(refusal))):
            machine.apply([(index, 1, command)])
        assert machine.last_applied().index == index - 1
        return
    if isinstance(decoded, fastsm.types.Call):
        return
    machine.apply([(index, 1, command)])
    if isinstance(decoded, fastsm.types.Put):
        assert machine.get(decoded.key) == decoded.value


@pytest.mark.parametrize("count", range(1, 10))
def test_short_lists_and_tuples_are_held_alike(tmp_path: Path, count: int) -> None:
    """However many entries a chunk has, and whatever kind of sequence it is, the result is the same."""
    entries = [(index, 1, fastsm.put(b"key %d" % index, b"value")) for index in range(1, count + 1)]
    states = []
    for number, kind in enumerate((list, tuple, iter)):
        with fastsm.FastStateMachine(tmp_path / str(number)) as machine:
            chunk = kind(entries)
            assert machine.apply(chunk if kind is not iter else list(chunk)) == [True] * count
            swaps = [(count + 1, 1, fastsm.compare_and_swap(b"key 1", b"value", b"new")),
                     (count + 2, 1, fastsm.add(b"number", 2))]  # fmt: skip
            assert machine.apply(kind(swaps) if kind is not iter else swaps) == [True, fastsm.Answer(True, 2)]
            states.append(dict(machine.items()))
    assert states[0] == states[1] == states[2]
    assert len(states[0]) == count + 1
