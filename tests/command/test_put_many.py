"""put_many: a batch of puts made from columns of any kind."""

from __future__ import annotations

import array
import contextlib
import gc
import random
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastsm
from fastsm import CommandError, FastStateMachine

Opener = Callable[..., FastStateMachine]
Cells = Sequence[bytes]


def as_batch(keys: Cells, values: Cells) -> bytes:
    """Return the command that ``put_many`` must make of these cells: of equal keys only the last pair."""
    last = {key: number for number, key in enumerate(keys)}
    return fastsm.batch([
        fastsm.put(key, value)
        for number, (key, value) in enumerate(zip(keys, values, strict=True)) if last[key] == number])


def arrow(cells: Cells, dtype: str, *, before: bytes = b"", after: bytes = b"") -> tuple[bytes, np.ndarray]:
    """Return the cells as ``(data, offsets)``, with bytes before and after that belong to no cell."""
    offsets = np.cumsum([len(before), *(len(cell) for cell in cells)])
    return before + b"".join(cells) + after, offsets.astype(dtype)


def rows(cells: Cells) -> np.ndarray:
    """Return cells of one size as a 2-D array of uint8."""
    return np.frombuffer(b"".join(cells), np.uint8).reshape(len(cells), len(cells[0]))


FIXED = [b"abcd", b"\x00\x00\x00\x00", b"ab\x00\x00", b"\xff\xff\xff\xff", b"abcd"]
LOOSE = [b"", b"a", b"trailing\x00\x00", b"\x00", b"a" * 1000]

COLUMNS: dict[str, Callable[[Cells], Any]] = {
    "a list": list,
    "a tuple": tuple,
    "an iterator": iter,
    "a dict's keys": lambda cells: dict.fromkeys(cells).keys() if len({*cells}) == len(cells) else cells,
    "bytearrays": lambda cells: [bytearray(cell) for cell in cells],
    "memoryviews": lambda cells: [memoryview(cell) for cell in cells],
    "arrays of the standard library": lambda cells: [array.array("B", cell) for cell in cells],
    "memoryviews with gaps": lambda cells: [memoryview(bytes(b for byte in c for b in (byte, 0)))[::2] for c in cells],
    "data and int32 offsets": lambda cells: arrow(cells, "int32"),
    "data and int64 offsets": lambda cells: arrow(cells, "int64"),
    "a slice of data": lambda cells: arrow(cells, "int32", before=b"before", after=b"after"),
    "data as bytearray": lambda cells: (bytearray(arrow(cells, "int64")[0]), arrow(cells, "int64")[1]),
    "data as array": lambda cells: (np.frombuffer(arrow(cells, "int64")[0], np.uint8), arrow(cells, "int64")[1]),
    "offsets with gaps": lambda cells: (arrow(cells, "int64")[0], np.repeat(arrow(cells, "int64")[1], 2)[::2]),
    "offsets backwards": lambda cells: (arrow(cells, "int32")[0], arrow(cells, "int32")[1][::-1].copy()[::-1]),
}  # fmt: skip
FIXED_COLUMNS: dict[str, Callable[[Cells], Any]] = {
    "rows of uint8": rows,
    "rows with gaps": lambda cells: np.repeat(rows(cells), 3, axis=0)[::3],
    "columns with gaps": lambda cells: np.repeat(rows(cells), 2, axis=1)[:, ::2],
    "rows in Fortran's order": lambda cells: np.asfortranarray(rows(cells)),
    "rows backwards": lambda cells: rows(cells)[::-1].copy()[::-1],
}


# ---- equal to a batch of puts ---------------------------------------------------------------------------


def without_address(cell: object) -> str:
    """Return a cell's repr without an address, so that it is the same in each process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(cell))


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_kind_of_column_makes_the_same_command(kind: str) -> None:
    """Cells of any size make the bytes that a batch of puts makes, as keys and as values."""
    make = COLUMNS[kind]
    for cells in (LOOSE, FIXED, [b""], [b"one"], [b""] * 3, []):
        others = [b"%d" % i for i in range(len(cells))]
        assert fastsm.put_many(make(cells), others) == as_batch(cells, others)
        assert fastsm.put_many(others, make(cells)) == as_batch(others, cells)
        assert fastsm.put_many(make(cells), make(cells)) == as_batch(cells, cells)


@pytest.mark.parametrize("kind", FIXED_COLUMNS)
def test_rows_are_taken_whole(kind: str) -> None:
    """A 2-D uint8 array gives each row whole, including NULs at its end, in any memory layout."""
    for cells in (FIXED, FIXED[:1], [b"x"] * 4):
        column = FIXED_COLUMNS[kind](cells)
        others = [b"%d" % i for i in range(len(cells))]
        assert fastsm.put_many(column, others) == as_batch(cells, others)
        assert fastsm.put_many(others, column) == as_batch(others, cells)


def test_s_arrays_leave_trailing_nuls_out() -> None:
    """NULs at the end of an `S` cell are padding, as NumPy defines it; those inside are not."""
    cells = [b"ab", b"", b"a\x00b", b"\x00", b"a\x00", b"\x00a", b"full"]
    column = np.array(cells, dtype="S4")
    taken = [b"ab", b"", b"a\x00b", b"", b"a", b"\x00a", b"full"]
    assert column.tolist() == taken
    assert fastsm.put_many(column, column) == as_batch(taken, taken)
    assert fastsm.put_many(column[::2], column[::-2]) == as_batch(taken[::2], taken[::-2])
    assert fastsm.put_many(column.astype("S1000"), column) == as_batch(taken, taken)


def test_numpy_scalars_are_cells() -> None:
    """A sequence of NumPy's own bytes is a column of any length, even two of them in a tuple."""
    for count in (1, 2, 3):
        cells = tuple(np.array([b"key-%d" % i for i in range(count)]))
        plain = [bytes(cell) for cell in cells]
        assert fastsm.put_many(cells, list(cells)) == as_batch(plain, plain)


@pytest.mark.parametrize(
    "empty",
    [
        [], (), iter(()), np.array([], dtype="S5"), np.zeros((0, 4), np.uint8), np.zeros((0, 0), np.uint8),
        (b"", np.array([0])), (b"data", np.array([2], dtype=np.int32)),
    ],
    ids=without_address,
)  # fmt: skip
def test_no_rows_make_an_empty_batch(empty: Any) -> None:
    """Columns without cells make an empty batch."""
    assert fastsm.put_many(empty, []) == fastsm.batch([])


def test_rows_without_columns_are_empty_cells() -> None:
    """An array of n rows of no bytes is a column of n empty cells."""
    assert fastsm.put_many(np.zeros((2, 0), np.uint8), [b"a", b"b"]) == as_batch([b"", b""], [b"a", b"b"])


def test_later_pairs_win(directory: Path, machine_at: Opener) -> None:
    """If keys are equal, the key gets the value of the last pair."""
    machine = machine_at(directory)
    keys = [b"a", b"b", b"a", b"a", b"b"]
    command = fastsm.put_many(keys, [b"%d" % i for i in range(5)])
    assert machine.apply([(1, 1, command)]) == [True]
    assert dict(machine.items()) == {b"a": b"3", b"b": b"4"}
    assert machine.len() == 2


def test_equal_keys_become_one_pair(directory: Path, machine_at: Opener) -> None:
    """The command has one pair per key, even with many equal keys and similar ones, so a watch has one change each."""
    rng = random.Random(2)
    sizes = [rng.randrange(12) for _ in range(5000)]
    keys = [b"k" * size + b"%d" % rng.randrange(20) + b"z" * size for size in sizes]
    command = fastsm.put_many(keys, [b"%d" % i for i in range(5000)])
    assert command == as_batch(keys, [b"%d" % i for i in range(5000)])
    machine = machine_at(directory)
    watch = machine.watch()
    machine.apply([(1, 1, command)])
    assert len(watch.read(10_000)) == len(set(keys)) == machine.len()


def test_put_many_returns_a_valid_command(directory: Path, machine_at: Opener) -> None:
    """``check`` and ``decode`` accept the command, and ``apply`` returns one result for it."""
    command = fastsm.put_many([b"a"], [b"1"])
    fastsm.check(command)
    assert fastsm.decode(command) == fastsm.decode(fastsm.batch([fastsm.put(b"a", b"1")]))
    assert machine_at(directory).apply([(1, 1, command)]) == [True]


def test_many_rows_come_back(directory: Path, machine_at: Opener) -> None:
    """A hundred thousand pairs of several sizes, put by columns, are read back unchanged."""
    rng = random.Random(1)
    pairs = {b"%d" % i: rng.randbytes(rng.randrange(40)) for i in range(100_000)}
    machine = machine_at(directory)
    machine.apply([(1, 1, fastsm.put_many(arrow(list(pairs), "int32"), arrow(list(pairs.values()), "int64")))])
    assert dict(machine.items()) == pairs


cells_of_any_kind = st.lists(st.binary(max_size=6), max_size=8)


@given(cells_of_any_kind, st.data())
def test_any_cells_in_any_columns(cells: list[bytes], data: st.DataObject) -> None:
    """Whatever the cells and the kinds of the two columns, the command is the batch of puts."""
    values = data.draw(st.lists(st.binary(max_size=6), min_size=len(cells), max_size=len(cells)))
    kinds = st.sampled_from(sorted(COLUMNS))
    keys_as, values_as = COLUMNS[data.draw(kinds)], COLUMNS[data.draw(kinds)]
    assert fastsm.put_many(keys_as(cells), values_as(values)) == as_batch(cells, values)


# ---- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ([b"a"], []),
        ([], [b"a"]),
        ([b"a", b"b"], np.array([b"1", b"2", b"3"])),
        (np.zeros((3, 2), np.uint8), (b"abcd", np.array([0, 2, 4]))),
    ],
)
def test_columns_of_different_lengths_are_refused(keys: Any, values: Any) -> None:
    """Columns of different lengths are a ``ValueError`` that names both lengths."""
    with pytest.raises(ValueError, match=r"\d keys, but \d values"):
        fastsm.put_many(keys, values)


@pytest.mark.parametrize(
    "offsets",
    [
        [-1, 4], [0, -1], [-(2**31), 0], [0, 3, 2], [0, 5], [5, 5], [0, 2, 5], [3, 1], [0, 2**31 - 1], [4, 0, 4],
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_offsets_that_fall_or_lead_out_of_the_data_are_refused(offsets: list[int], dtype: str) -> None:
    """Offsets that are negative, fall, or exceed the data are a ``ValueError``."""
    column = (b"data", np.array(offsets, dtype=dtype))
    others = [b"x"] * (len(offsets) - 1)
    for keys, values in ((column, others), (others, column)):
        with pytest.raises(ValueError, match="offsets"):
            fastsm.put_many(keys, values)


@pytest.mark.parametrize("offsets", [[0, 2**63 - 1], [-(2**63), 4], [2**62, 2**63 - 1], [0, 2**32 + 4]], ids=repr)
def test_offsets_beyond_32_bits_do_not_wrap(offsets: list[int]) -> None:
    """Offsets near the limits of 64 bits are refused, and do not wrap."""
    with pytest.raises(ValueError, match="offsets"):
        fastsm.put_many((b"data", np.array(offsets, dtype=np.int64)), [b"x"])


def test_a_single_offset_is_checked_too() -> None:
    """An empty array of offsets is a ``TypeError``, because even a column without cells has one offset."""
    with pytest.raises(TypeError):
        fastsm.put_many((b"data", np.array([], dtype=np.int64)), [])


@pytest.mark.parametrize(
    "column",
    [
        (b"ab", np.array([0.0, 1.0, 2.0])),
        (b"ab", np.array([0, 1, 2], dtype=np.uint64)),
        (b"ab", np.array([0, 1, 2], dtype=np.int16)),
        (b"ab", np.array([0, 1, 2], dtype=">i8")),
        (b"ab", np.array([[0, 1, 2]])),
        ("ab", np.array([0, 1, 2])),
        np.array(["a", "b"]),
        np.array([1, 2]),
        np.array([1, 2], dtype=np.uint8),
        np.zeros((2, 2), np.int8),
        np.zeros((2, 2, 2), np.uint8),
        np.array([[b"a"], [b"b"]]),
        b"ab",
        bytearray(b"ab"),
        memoryview(b"ab"),
        "ab",
        ["a", "b"],
        [1, 2],
        [b"a", None],
        None,
        7,
    ],
    ids=without_address,
)
def test_an_invalid_column_is_a_type_error(column: Any) -> None:
    """Other types are a ``TypeError``, above all a single ``bytes`` in place of a column."""
    for keys, values in ((column, [b"1", b"2"]), ([b"1", b"2"], column)):
        with pytest.raises(TypeError):
            fastsm.put_many(keys, values)


def test_a_key_has_a_limit_here_too() -> None:
    """A key over the limit is a ``CommandError`` that names its pair, in any kind of column."""
    long = b"k" * (fastsm.MAX_KEY_SIZE + 1)
    columns: list[Any] = [
        [b"a", long], (b"a" + long, np.array([0, 1, 1 + len(long)])), np.array([b"a", long]),
    ]  # fmt: skip
    for column in columns:
        with pytest.raises(CommandError, match="pair 1"):
            fastsm.put_many(column, [b"1", b"2"])
    assert fastsm.put_many([long[1:]], [b""]) == as_batch([long[1:]], [b""])


def test_a_value_has_a_limit_here_too() -> None:
    """A value over the limit is a ``CommandError`` before anything is copied."""
    zeros = np.zeros(2**31, np.uint8)  # its pages are never touched
    with pytest.raises(CommandError, match="pair 0"):
        fastsm.put_many([b"k"], (zeros, np.array([0, 2**31])))


def test_a_command_has_a_limit_here_too() -> None:
    """Pairs of more than 4 GiB in all are a ``CommandError`` before anything is copied."""
    cell = bytes(1 << 22)  # the same object in every pair, so that they take no memory
    with pytest.raises(CommandError, match="the limit is"):
        fastsm.put_many([b"%d" % i for i in range(1025)], [cell] * 1025)


def test_a_column_that_a_collection_changes_is_taken_whole() -> None:
    """A garbage collection that empties the caller's list while it is copied does no harm."""
    keys = [b""]

    class Node:
        def __del__(self) -> None:
            keys.clear()

    before = gc.get_threshold()
    held = []
    try:
        for threshold in range(1, 12):
            keys[:] = [b"key-%06d" % i for i in range(50_000)]
            held.append([[] for _ in range(300)])
            gc.collect()
            gc.disable()
            node: Any = Node()
            node.itself = node
            del node
            gc.set_threshold(threshold, 0, 0)
            gc.enable()
            with contextlib.suppress(ValueError):  # raised if the list was empty before its size was taken
                fastsm.put_many(keys, (b"v",) * 50_000)
    finally:
        gc.set_threshold(*before)
        gc.enable()


# ---- columns with false attributes ----------------------------------------------------------------------------

class Claim:
    """An object that claims to be an array of many cells, but has no buffer."""

    dtype = np.dtype("S64")
    ndim = 1
    shape = (100_000,)
    size = 6_400_000

    class flags:
        c_contiguous = True

    def reshape(self, _: int) -> np.ndarray:
        return np.zeros(8, np.uint8)

    def copy(self) -> np.ndarray:
        return np.zeros(8, np.uint8)


class Offsets(np.ndarray):
    """Offsets that claim a length of a hundred thousand."""

    @property
    def shape(self) -> tuple[int]:  # type: ignore[override]
        return (100_000,)


@pytest.mark.parametrize(
    "column", [Claim(), (b"data", Claim())], ids=["cells", "offsets"],
)  # fmt: skip
def test_an_object_that_only_looks_like_an_array_is_a_type_error(column: Any) -> None:
    """An object with an array's attributes, but without a buffer, is a ``TypeError`` that names the column."""
    for keys, values in ((column, [b""] * 100_000), ([b""] * 100_000, column)):
        with pytest.raises(TypeError, match=r"(keys|values): expected .* found Claim"):
            fastsm.put_many(keys, values)


def test_the_length_of_offsets_is_that_of_their_buffer() -> None:
    """Offsets of a subclass that claims a greater length have the length of their buffer."""
    offsets = np.array([0, 1, 2]).view(Offsets)
    assert fastsm.put_many((b"ab", offsets), [b"1", b"2"]) == as_batch([b"a", b"b"], [b"1", b"2"])


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_offsets_are_taken_before_they_are_checked(dtype: str) -> None:
    """Offsets are copied first, so that the other column's iteration cannot change them."""
    offsets = np.array([0, 4, 8], dtype)

    def values() -> Any:
        yield b"x"
        offsets[:] = [1 << 30, (1 << 30) + 4, (1 << 30) + 8]
        yield b"y"

    assert fastsm.put_many((b"aaaabbbb", offsets), values()) == as_batch([b"aaaa", b"bbbb"], [b"x", b"y"])


def test_data_cannot_shrink_between_the_columns() -> None:
    """A bytearray that holds the keys cannot be resized by the other column's iteration."""
    data = bytearray(b"aaaabbbb")

    def values() -> Any:
        yield b"x"
        with pytest.raises(BufferError):
            data.clear()
        yield b"y"

    assert fastsm.put_many((data, np.array([0, 4, 8])), values()) == as_batch([b"aaaa", b"bbbb"], [b"x", b"y"])
    data.clear()  # its buffer is released


@pytest.mark.parametrize("kind", ["cells", "data", "offsets"])
def test_masked_cells_are_refused(kind: str) -> None:
    """A masked cell is a ``TypeError`` that says what to do; the bytes below the mask are never used."""
    cells = np.ma.array([b"a", b"secret"], mask=[False, True])
    data = np.ma.array(np.frombuffer(b"ab", np.uint8), mask=[False, True])
    offsets = np.ma.array([0, 1, 2], mask=[False, True, False])
    column: Any = {"cells": cells, "data": (data, np.array([0, 1, 2])), "offsets": (b"ab", offsets)}[kind]
    for keys, values in ((column, [b"1", b"2"]), ([b"1", b"2"], column)):
        with pytest.raises(TypeError, match="masked"):
            fastsm.put_many(keys, values)
    unmasked = np.ma.array([b"a", b"b"])
    assert fastsm.put_many(unmasked, [b"1", b"2"]) == as_batch([b"a", b"b"], [b"1", b"2"])


def test_an_array_that_a_thread_overwrites_without_the_gil() -> None:
    """Cells that another thread changes meanwhile make a valid command or a ``ValueError``, and no overflow."""
    short = np.array([b"a"] * 20_000, "S40")
    long = np.array([b"a" * 40] * 20_000, "S40")
    cells = short.copy()
    over = threading.Event()

    def meddle() -> None:
        while not over.is_set():
            cells[:] = long  # NumPy copies without the GIL
            cells[:] = short

    thread = threading.Thread(target=meddle)
    thread.start()
    try:
        for _ in range(300):
            with contextlib.suppress(ValueError):
                fastsm.check(fastsm.put_many(cells, cells))
    finally:
        over.set()
        thread.join()


# ---- deadlines -----------------------------------------------------------------------------------------

DEADLINES: dict[str, Callable[[list[int]], Any]] = {
    "a list": list,
    "a tuple": tuple,
    "int64": lambda numbers: np.array(numbers, np.int64),
    "uint64": lambda numbers: np.array(numbers, np.uint64),
    "with gaps": lambda numbers: np.repeat(np.array(numbers, np.int64), 2)[::2],
}


@pytest.mark.parametrize("form", DEADLINES.values(), ids=DEADLINES.keys())
def test_a_column_of_deadlines_gives_each_pair_its_own(form: Callable[[list[int]], Any]) -> None:
    """A column of deadlines, of any kind, makes the batch of puts with these deadlines."""
    numbers = [0, 5, 2**63 - 1]
    expected = fastsm.batch([fastsm.put(b"k%d" % i, b"v", expires=number) for i, number in enumerate(numbers)])
    assert fastsm.put_many([b"k0", b"k1", b"k2"], [b"v"] * 3, expires=form(numbers)) == expected


def test_where_a_column_of_deadlines_says_none_a_pair_has_none() -> None:
    """Pairs whose deadline is None in the column have none; without the column no pair has one."""
    expected = fastsm.batch([fastsm.put(b"a", b"1"), fastsm.put(b"b", b"2", expires=9)])
    assert fastsm.put_many([b"a", b"b"], [b"1", b"2"], expires=[None, 9]) == expected
    assert fastsm.put_many([b"a"], [b"1"], expires=None) == fastsm.batch([fastsm.put(b"a", b"1")])


@pytest.mark.parametrize("deadline", [0, 2**63 - 1, True, np.uint64(7), np.array(7)], ids=repr)
def test_one_deadline_applies_to_all_pairs(deadline: Any) -> None:
    """An int is the deadline of all pairs; one out of range is refused as it is in a column."""
    expected = fastsm.batch([fastsm.put(key, b"v", expires=deadline) for key in (b"a", b"b")])
    assert fastsm.put_many([b"a", b"b"], [b"v", b"v"], expires=deadline) == expected
    assert fastsm.put_many([], [], expires=deadline) == fastsm.batch([])
    with pytest.raises(CommandError, match="expires -1"):
        fastsm.put_many([b"a"], [b"v"], expires=-1)


def test_a_column_of_deadlines_is_as_long_as_the_others() -> None:
    """A column of another length is a ``ValueError`` with both lengths; an invalid deadline's error has its place."""
    with pytest.raises(ValueError, match="2 keys, but 1 deadlines"):
        fastsm.put_many([b"a", b"b"], [b"1", b"2"], expires=[5])
    with pytest.raises(CommandError, match="deadline 1: expires -1"):
        fastsm.put_many([b"a", b"b"], [b"1", b"2"], expires=[5, -1])
    for column in (5.0, b"12", "12", np.zeros((2, 1), np.int64), np.zeros(2)):
        with pytest.raises(TypeError):
            fastsm.put_many([b"a", b"b"], [b"1", b"2"], expires=column)
