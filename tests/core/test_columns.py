"""Columns: many values as NumPy arrays, and the terms of many entries."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastsm
from fastsm import FastStateMachine
from support.faulty import memory_directory
from support.histories import KEYS, History
from support.inside import inside

Opener = Callable[..., FastStateMachine]


def cells(data: np.ndarray, offsets: np.ndarray) -> list[bytes]:
    """Return the cells of a column, one by one."""
    return [bytes(data[offsets[i] : offsets[i + 1]]) for i in range(len(offsets) - 1)]


def check_column(data: np.ndarray, offsets: np.ndarray, count: int) -> None:
    """Check what holds for every column: bytes without gaps, and one more offset than cells."""
    assert (data.dtype, data.ndim, data.flags.c_contiguous) == (np.uint8, 1, True)
    assert (offsets.dtype, offsets.shape) == (np.int64, (count + 1,))
    assert offsets[0] == 0
    assert offsets[-1] == len(data)
    assert (np.diff(offsets) >= 0).all()


@pytest.fixture
def machine(directory: Path, machine_at: Opener) -> FastStateMachine:
    """A machine with values of several sizes, including an empty one."""
    machine = machine_at(directory)
    values = {b"empty": b"", b"": b"of the empty key", b"large": bytes(range(256)) * 4096, b"nuls": b"a\x00\x00"}
    machine.apply([(1, 1, fastsm.put_many(list(values), list(values.values())))])
    return machine


# ---- get_columns, get_many -----------------------------------------------------------------------------


def test_get_columns_tells_empty_from_absent(machine: FastStateMachine) -> None:
    """An empty value is found, with no bytes; an absent key is not found, with no bytes either."""
    keys = [b"empty", b"absent", b"nuls", b"empty", b"", b"large", b"nuls"]
    data, offsets, found = machine.get_columns(keys)
    check_column(data, offsets, len(keys))
    assert (found.dtype, found.shape) == (np.bool_, (len(keys),))
    assert found.tolist() == [True, False, True, True, True, True, True]
    assert cells(data, offsets) == [machine.get(key) or b"" for key in keys]


@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 64, 1000])
def test_get_many_and_get_columns_do_what_get_does(directory: Path, machine_at: Opener, count: int) -> None:
    """Any number of keys, present or not, give what ``get`` returns for each."""
    machine = machine_at(directory)
    rng = random.Random(count)
    pool = [b"%d" % i for i in range(2 * count + 2)]
    present = pool[::2]
    machine.apply([(1, 1, fastsm.put_many(present, [rng.randbytes(rng.randrange(50)) for _ in present]))])
    keys = [rng.choice(pool) for _ in range(count)]
    expected = [machine.get(key) for key in keys]
    assert machine.get_many(keys) == expected
    data, offsets, found = machine.get_columns(keys)
    check_column(data, offsets, count)
    assert [cell if there else None for cell, there in zip(cells(data, offsets), found, strict=True)] == expected


@pytest.mark.parametrize(
    "wrap",
    [
        list, tuple, iter, lambda keys: np.array(keys, dtype="S"), lambda keys: [bytearray(key) for key in keys],
        lambda keys: [memoryview(key) for key in keys],
    ],
    ids=["list", "tuple", "iterator", "S array", "bytearrays", "memoryviews"],
)  # fmt: skip
def test_keys_come_in_any_sequence(machine: FastStateMachine, wrap: Callable[[list[bytes]], object]) -> None:
    """Lists, tuples, iterators and arrays of bytes-like keys are all accepted."""
    keys = [b"nuls", b"absent", b"empty"]
    assert machine.get_many(wrap(keys)) == [b"a\x00\x00", None, b""]
    data, offsets, found = machine.get_columns(wrap(keys))
    assert cells(data, offsets) == [b"a\x00\x00", b"", b""]
    assert found.tolist() == [True, False, True]


def test_keys_too_long_to_be_there_are_absent(machine: FastStateMachine) -> None:
    """A key over the limit cannot be in the state; looking it up is not an error."""
    keys = [b"x" * 65_536, b"nuls", b"x" * 10**6]
    assert machine.get_many(keys) == [None, b"a\x00\x00", None]
    assert machine.get_columns(keys)[2].tolist() == [False, True, False]
    assert machine.get_view(keys[0]) is None
    assert keys[0] not in machine


def test_a_key_that_is_not_bytes_is_a_type_error(machine: FastStateMachine) -> None:
    """Text and numbers are not keys."""
    for wrong in (["text"], [1], [None], [b"nuls", "text"]):
        for read in (machine.get_many, machine.get_columns):
            with pytest.raises(TypeError):
                read(wrong)
    for read in (machine.get, machine.get_view, machine.modified, machine.__contains__):
        with pytest.raises(TypeError):
            read("text")


def test_columns_are_the_callers(machine: FastStateMachine) -> None:
    """The arrays are copies: writing into them changes no state, and they outlive ``close``."""
    data, _, _ = machine.get_columns([b"nuls"])
    values = machine.columns()[2]
    data[:] = 0
    values[:] = 0
    assert machine.get(b"nuls") == b"a\x00\x00"
    inside(machine).check()
    machine.verify()
    machine.close()
    assert not values.any()


# ---- the whole state -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_columns_are_the_whole_state(directory: Path, machine_at: Opener, seed: int) -> None:
    """``columns`` returns every pair, keys and values in two columns, in the order of ``items``."""
    machine = machine_at(directory)
    history = History(seed)
    for _ in range(60):
        machine.apply(history.chunk())
    key_data, key_offsets, value_data, value_offsets = machine.columns()
    check_column(key_data, key_offsets, machine.len())
    check_column(value_data, value_offsets, machine.len())
    pairs = list(zip(cells(key_data, key_offsets), cells(value_data, value_offsets), strict=True))
    assert pairs == list(machine.items())
    assert dict(pairs) == {key: value for key in KEYS if (value := machine.get(key)) is not None}


def test_columns_of_an_empty_state(directory: Path, machine_at: Opener) -> None:
    """Without keys the arrays are empty, and the offsets a single zero."""
    machine = machine_at(directory)
    key_data, key_offsets, value_data, value_offsets = machine.columns()
    check_column(key_data, key_offsets, 0)
    check_column(value_data, value_offsets, 0)
    data, offsets, found = machine.get_columns([])
    check_column(data, offsets, 0)
    assert (found.dtype, found.shape) == (np.bool_, (0,))


def test_columns_of_many_keys(directory: Path, machine_at: Opener) -> None:
    """A state with more keys than are copied in one piece is returned completely."""
    machine = machine_at(directory)
    count = 70_000
    keys = np.arange(count, dtype=">u4").view(np.uint8).reshape(count, 4)
    values = (np.arange(count, dtype=np.uint64) * 7).view(np.uint8).reshape(count, 8)
    machine.apply([(1, 1, fastsm.put_many(keys, values))])
    key_data, key_offsets, value_data, value_offsets = machine.columns()
    assert (key_data.reshape(count, 4) == keys).all()
    assert (value_data.reshape(count, 8) == values).all()
    assert (np.diff(key_offsets) == 4).all()
    assert (np.diff(value_offsets) == 8).all()
    data, offsets, found = machine.get_columns([bytes(key) for key in keys[::-1]])
    assert found.all()
    assert (data.reshape(count, 8) == values[::-1]).all()
    assert (np.diff(offsets) == 8).all()


def test_columns_go_back_in_by_put_many(machine: FastStateMachine, tmp_path: Path, machine_at: Opener) -> None:
    """``put_many`` accepts what ``columns`` returns, and makes the same state in another directory."""
    key_data, key_offsets, value_data, value_offsets = machine.columns()
    other = machine_at(tmp_path / "other")
    other.apply([(1, 1, fastsm.put_many((key_data, key_offsets), (value_data, value_offsets)))])
    assert list(other.items()) == list(machine.items())


# ---- terms ---------------------------------------------------------------------------------------------

steps = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), max_size=12)


@given(steps, st.lists(st.integers(0, 60), max_size=40))
def test_entry_terms_does_what_entry_term_does(history: list[tuple[int, int]], ids: list[int]) -> None:
    """Any array of indexes gives what ``entry_term`` returns for each, with 0 for None."""
    with memory_directory() as path, FastStateMachine(path, contiguous=False) as machine:
        index, term = 0, 1
        for index_step, term_step in history:
            index, term = index + index_step, term + term_step
            machine.apply([(index, term, fastsm.noop())])
        found = machine.entry_terms(np.array(ids, dtype=np.uint64))
        assert found.dtype == np.uint64
        assert found.tolist() == [machine.entry_term(i) or 0 for i in ids]


def test_entry_terms_keeps_the_shape(directory: Path, machine_at: Opener) -> None:
    """Arrays of any number of dimensions and any layout give arrays of the same shape."""
    machine = machine_at(directory)
    machine.apply([(i, (i + 4) // 5, fastsm.noop()) for i in range(1, 31)])
    ids = np.arange(60, dtype=np.uint64)
    terms = machine.entry_terms(ids)
    assert terms[:32].tolist() == [0, *(((i + 4) // 5) for i in range(1, 31)), 0]
    for view in (
        ids.reshape(3, 4, 5), ids.reshape(3, 4, 5).T, ids[::2], ids[::-1], ids.reshape(6, 10)[:, 3:5],
        np.asfortranarray(ids.reshape(6, 10)), np.array(7, dtype=np.uint64), ids[:0], np.zeros((3, 0, 2), np.uint64),
    ):  # fmt: skip
        found = machine.entry_terms(view)
        assert (found.dtype, found.shape) == (np.uint64, view.shape)
        assert (found == terms[view.astype(np.int64)]).all()


def test_entry_terms_of_the_largest_index(directory: Path, machine_at: Opener) -> None:
    """Indexes up to 2**64 - 1 may be looked up."""
    machine = machine_at(directory)
    machine.update_last_applied((2**64 - 2, 2**64 - 2))
    ids = np.array([0, 1, 2**64 - 3, 2**64 - 2, 2**64 - 1], dtype=np.uint64)
    assert machine.entry_terms(ids).tolist() == [0, 0, 0, 2**64 - 2, 0]


def test_entry_terms_work_on_a_stopped_machine(directory: Path, machine_at: Opener) -> None:
    """``entry_terms`` works after ``stop``, like ``entry_term``."""
    machine = machine_at(directory)
    machine.apply([(1, 3, fastsm.noop())])
    machine.stop()
    assert machine.entry_terms(np.array([1, 2], dtype=np.uint64)).tolist() == [3, 0]
