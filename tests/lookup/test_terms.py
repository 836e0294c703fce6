"""The entry-term index, compared with a dict of every entry."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsm.lookup.terms import Terms

GAP = 2**64 - 1
LARGEST = 2**64 - 2


def naive(runs: list[tuple[int, int]], seen: int) -> dict[int, int]:
    """Return the certain term of every index, from runs `(last, term)` as frames carry them."""
    terms: dict[int, int] = {}
    entries: list[tuple[int, int]] = []  # index and term of entries that were certainly seen: the ends of runs
    for last, term in runs:
        if term != GAP:
            terms.update(dict.fromkeys(range(seen + 1, last + 1), term))
            for index, before in reversed(entries):
                if before != term:
                    break
                terms.update(dict.fromkeys(range(index, last), term))
            entries.append((last, term))
        seen = last
    return terms


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """Runs as a machine may write them: terms that never fall, and gaps only in front of another run."""
    seen = draw(st.integers(0, 5))
    last, term, runs = seen, draw(st.integers(0, 3)), []
    steps = st.tuples(st.integers(1, 6), st.integers(0, 2), st.integers(0, 3))
    for length, rise, gap in draw(st.lists(steps)):
        if gap:
            last += gap
            runs.append((last, GAP))
        last += length
        term += rise
        runs.append((last, term))
    return seen, runs


@given(histories())
def test_terms_say_what_is_certain_and_no_more(history: tuple[int, list[tuple[int, int]]]) -> None:
    """Every index has the term that a dict of all entries proves, and None where it proves nothing."""
    seen, runs = history
    terms = Terms(seen)
    for last, term in runs:
        terms.extend(last, term)
        terms.check()
    expected = naive(runs, seen)
    end = runs[-1][0] if runs else seen
    assert [terms.get(index) for index in range(end + 4)] == [expected.get(index) for index in range(end + 4)]
    assert terms.seen == end
    assert len(terms) == terms.count == len({term for _, term in runs} - {GAP})
    rebuilt = {index: term for first, last, term in terms.runs() for index in range(first, last + 1)}
    assert rebuilt == expected


@given(histories(), st.lists(st.integers(0, 60), max_size=30))
def test_many_are_found_as_one_by_one(
    history: tuple[int, list[tuple[int, int]]], ids: list[int]
) -> None:
    """`get_many` gives what `get` gives, with 0 for None, in an array of unsigned numbers."""
    seen, runs = history
    terms = Terms(seen)
    for last, term in runs:
        terms.extend(last, term)
    found = terms.get_many(np.array(ids, dtype=np.uint64))
    assert found.dtype == np.uint64
    assert found.tolist() == [terms.get(index) or 0 for index in ids]


def test_many_keep_their_shape_and_take_any_layout() -> None:
    """The result has the shape of the ids, which may be strided, empty, or of another integer type."""
    terms = Terms()
    terms.extend(10, 1)
    terms.extend(20, 2)
    ids = np.arange(24, dtype=np.uint64)
    flat = terms.get_many(ids)
    assert flat.tolist() == [0] + [1] * 10 + [2] * 10 + [0] * 3
    assert np.array_equal(terms.get_many(ids.reshape(2, 3, 4)), flat.reshape(2, 3, 4))
    assert np.array_equal(terms.get_many(ids[::-3]), flat[::-3])
    assert np.array_equal(terms.get_many(ids.astype(np.int32)), flat)
    assert terms.get_many(np.array([], dtype=np.uint64)).tolist() == []


def test_memory_grows_with_elections_not_with_entries() -> None:
    """100 million entries in 5 terms take less than 4 KiB, one by one or a million at a time."""
    terms = Terms()
    for last in range(1_000_000, 100_000_001, 1_000_000):
        terms.extend(last, 1 + last // 20_000_001)
    assert terms.size < 4096
    assert terms.runs() == [
        (1 + 20_000_000 * i, 20_000_000 * (i + 1), i + 1) for i in range(5)
    ]
    one_by_one = Terms()
    for last in range(1, 100_001):
        one_by_one.extend(last, 7)
    assert one_by_one.size < 4096
    assert one_by_one.runs() == [(1, 100_000, 7)]


def test_many_elections_are_found() -> None:
    """20,000 terms of random length, with gaps, are all found again."""
    rng = random.Random(4)
    terms, last, expected = Terms(), 0, []
    for term in range(1, 20_001):
        if rng.random() < 0.3:
            last += rng.randrange(1, 1000)
            terms.extend(last, GAP)
            expected.append((last, None))
        last += rng.randrange(1, 1_000_000)
        terms.extend(last, term)
        expected.append((last, term))
    terms.check()
    assert len(terms) == 20_000
    assert terms.size < 20_000 * 3 * 8 * 2 + 4096
    first = 1
    for last, term in expected:
        for index in (first, (first + last) // 2, last):
            assert terms.get(index) == term
        first = last + 1


def test_gaps_are_unknown_until_both_sides_have_one_term() -> None:
    """An index in a gap has a known term only if the entries on both sides have the same term."""
    terms = Terms()
    terms.extend(5, GAP)
    assert [terms.get(index) for index in (0, 1, 5, 6)] == [None] * 4
    terms.extend(8, 3)
    terms.extend(10, GAP)
    terms.extend(12, 3)
    terms.extend(14, GAP)
    terms.extend(15, 4)
    assert [terms.get(index) for index in range(5, 17)] == [
        None, 3, 3, 3, 3, 3, 3, 3, None, None, 4, None]
    assert terms.runs() == [(6, 12, 3), (15, 15, 4)]


def test_terms_after_a_base() -> None:
    """An index that starts after a base does not know the terms of the base's entry and earlier ones."""
    terms = Terms(1_000)
    assert terms.seen == 1_000
    terms.extend(1_003, 9)
    assert [terms.get(index) for index in (0, 999, 1_000, 1_001, 1_003, 1_004)] == [None] * 3 + [9, 9, None]


def test_largest_indexes_and_terms() -> None:
    """The largest index, the largest term and the term 0 are valid."""
    terms = Terms(LARGEST - 2)
    terms.extend(LARGEST - 1, 0)
    terms.extend(LARGEST, LARGEST)
    terms.check()
    assert [terms.get(index) for index in (LARGEST - 2, LARGEST - 1, LARGEST)] == [None, 0, LARGEST]
    assert terms.get_many(np.array([LARGEST], dtype=np.uint64)).tolist() == [LARGEST]


@pytest.mark.parametrize("wrong", [-1, 2**64])
def test_indexes_that_are_none(wrong: int) -> None:
    """A number outside of unsigned 64 bits is an ``OverflowError``, and does not wrap to another index."""
    with pytest.raises(OverflowError):
        Terms().get(wrong)
