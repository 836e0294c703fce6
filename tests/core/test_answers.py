"""Commands that answer: both machines give the same answers, in chunks of any size, whatever happens in between."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import Answer, FastStateMachine, LogId, MemoryStateMachine
from support.answering import KEYS, PROCEDURES, Commands, same
from support.inside import inside

FULL = 64 << 20


@pytest.fixture(params=["fast", "model"])
def machine(
    request: pytest.FixtureRequest, directory: Path
) -> Iterator[FastStateMachine | MemoryStateMachine]:
    if request.param == "model":
        yield MemoryStateMachine(procedures=PROCEDURES)
    else:
        with FastStateMachine(directory, procedures=PROCEDURES) as fast:
            yield fast


def apply(machine: FastStateMachine | MemoryStateMachine, *commands: bytes) -> list[object]:
    first = machine.last_applied().index + 1
    return list(machine.apply([(first + i, 1, command) for i, command in enumerate(commands)]))


@pytest.mark.parametrize("seed", range(6))
def test_both_machines_come_to_the_same(directory: Path, tmp_path: Path, seed: int) -> None:
    """Answers, values, order and snapshots are equal, across chunk sizes, compactions, reopenings and installs."""
    commands, model = Commands(seed), MemoryStateMachine(procedures=PROCEDURES)
    dice = commands.random
    options = {"procedures": PROCEDURES, "check_procedures": seed % 2 == 0, "retain_entries": 5}
    fast = FastStateMachine(directory, **options)
    try:
        for round_number in range(120):
            chunk = commands.chunk(model.last_applied().index + 1, dice.choice((1, 1, 2, 5, 20)))
            assert fast.apply(chunk) == model.apply(chunk), chunk
            same(fast, model)
            inside(fast).check()
            if round_number % 10 == 5:
                fast.compact()
            if round_number % 10 == 7:
                fast.close()
                fast = FastStateMachine(directory, **options)
            if round_number % 20 == 9:
                wanted = LogId(*dice.choice(inside(model).state.seen[-5:]))
                sums = [each.write_snapshot(tmp_path / name, wanted) for name, each in (("f", fast), ("m", model))]
                assert sums[0] == sums[1]
            if round_number % 40 == 39:
                fast.install_snapshot(fast.write_snapshot(tmp_path / "f"), tmp_path / "f")
                model.install_snapshot(model.write_snapshot(tmp_path / "m"), tmp_path / "m")
    finally:
        fast.close()
    without = FastStateMachine(directory)  # recovery runs no procedure, and needs none
    same(without, model)
    without.close()


@pytest.mark.parametrize("seed", range(3))
def test_chunk_sizes_make_no_difference(tmp_path: Path, seed: int) -> None:
    """The same entries in one chunk and one by one: same answers, same snapshot."""
    entries = Commands(seed).chunk(1, 300)
    answers, checksums = [], []
    for size in (1, 7, 300):
        with FastStateMachine(tmp_path / str(size), procedures=PROCEDURES) as machine:
            answers.append([
                answer for first in range(0, 300, size) for answer in machine.apply(entries[first : first + size])])
            checksums.append(machine.write_snapshot(tmp_path / f"snapshot-{size}").checksum)
    assert answers[0] == answers[1] == answers[2]
    assert len(set(checksums)) == 1


def test_add_counts(machine: FastStateMachine | MemoryStateMachine) -> None:
    """An add gives the new value; without a key it starts from `initial`; the value is plain text."""
    assert apply(machine, fastsm.add(b"n", 5), fastsm.add(b"n", -7), fastsm.add(b"m", 1, initial=40)) == [
        Answer(True, 5), Answer(True, -2), Answer(True, 41)]
    assert (machine.get(b"n"), machine.get(b"m")) == (b"-2", b"41")


@pytest.mark.parametrize(
    "text", [b"", b"-", b"-0", b"00", b"01", b"+1", b" 1", b"1 ", b"1\n", b"0x1", b"9223372036854775808",
             b"-9223372036854775809", b"99999999999999999999", "\u0663".encode()])
def test_add_refuses_what_is_no_number(machine: FastStateMachine | MemoryStateMachine, text: bytes) -> None:
    """Anything but exactly `0` or `-?[1-9][0-9]*` of 64 bits stays as it is."""
    assert apply(machine, fastsm.put(b"n", text), fastsm.add(b"n", 0))[1] == Answer(False, None, "not a number")
    assert machine.get(b"n") == text
    assert machine.modified(b"n") == LogId(1, 1)


@pytest.mark.parametrize("number", [0, 1, -1, 10, 2**63 - 1, -(2**63), 123456789012345678])
def test_add_reads_every_number_that_it_writes(
    machine: FastStateMachine | MemoryStateMachine, number: int
) -> None:
    """The smallest and the largest number are read; one more overflows."""
    assert apply(machine, fastsm.add(b"n", 0, initial=number), fastsm.add(b"n", 0)) == [Answer(True, number)] * 2
    assert machine.get(b"n") == str(number).encode()
    beyond = Answer(False, None, "overflow")
    if number == 2**63 - 1:
        assert apply(machine, fastsm.add(b"n", 1)) == [beyond]
    if number == -(2**63):
        assert apply(machine, fastsm.add(b"n", -1)) == [beyond]


def test_a_transaction_takes_one_branch_or_the_other(machine: FastStateMachine | MemoryStateMachine) -> None:
    """Each command of the branch sees the earlier ones, and gives a value."""
    move = fastsm.transaction(
        [fastsm.value_is(b"a", b"1"), fastsm.absent(b"b"), fastsm.exists(b"a"), fastsm.modified_at(b"a", 1)],
        [fastsm.delete(b"a"), fastsm.put(b"b", b"1"), fastsm.read(b"b"), fastsm.read(b"a"), fastsm.add(b"b", 1)],
        [fastsm.read(b"b"), fastsm.add(b"missed", 1)])
    assert apply(machine, fastsm.put(b"a", b"1"), move, move) == [
        True, Answer(True, [True, True, b"1", None, 2]), Answer(False, [b"2", 1], "mismatch")]
    assert machine.items() is not None
    assert dict(machine.items()) == {b"b": b"2", b"missed": b"1"}


def test_the_first_reason_to_refuse_an_entry_is_its_answer(machine: FastStateMachine | MemoryStateMachine) -> None:
    """Commands are done in order: once one is too large, the rest is not examined."""
    add, reads = fastsm.add(b"text", 1), [fastsm.read(b"k")] * 3
    values = [fastsm.put(b"k", bytes(FULL // 3)), fastsm.put(b"text", b"text")]
    assert apply(machine, *values, *(fastsm.transaction([], each) for each in ([*reads, add], [add, *reads]))) == [
        True, True, Answer(False, None, "too large"), Answer(False, None, "not a number")]


def test_an_add_that_cannot_refuses_all_of_its_entry(machine: FastStateMachine | MemoryStateMachine) -> None:
    """An addition that cannot be done refuses its whole transaction or batch, and undoes the earlier commands."""
    refused = Answer(False, None, "not a number")
    both = [fastsm.put(b"a", b"x"), fastsm.delete_range(None, None), fastsm.put(b"n", b"?"), fastsm.add(b"n", 1)]
    assert apply(machine, fastsm.put(b"a", b"1"), fastsm.transaction([], both), fastsm.batch(both)) == [
        True, refused, refused]
    assert dict(machine.items()) == {b"a": b"1"}


def test_answers_of_batches(machine: FastStateMachine | MemoryStateMachine) -> None:
    """A batch with a command that answers gives an Answer; a batch of other commands gives True or False."""
    mismatch = fastsm.compare_and_swap(b"k", b"no", b"")
    assert apply(
        machine, fastsm.batch([fastsm.put(b"k", b"v"), fastsm.noop()]), fastsm.batch([mismatch]),
        fastsm.batch([fastsm.add(b"n", 1), fastsm.delete(b"k"), fastsm.delete_prefix(b"n")]),
        fastsm.batch([fastsm.add(b"n", 1), mismatch]),
    ) == [True, False, Answer(True, [1, True, 1]), Answer(False, None, "mismatch")]
    assert dict(machine.items()) == {}


def test_ranges_count_what_they_remove(machine: FastStateMachine | MemoryStateMachine) -> None:
    """Keys of earlier entries of the chunk are removed too; an empty range is not an error."""
    puts = [fastsm.put(key, b"") for key in KEYS]
    assert apply(machine, *puts[:5]) == [True] * 5
    assert apply(
        machine, *puts[5:], fastsm.delete_prefix(b"a/"), fastsm.delete_prefix(b"a/"), fastsm.delete_range(b"b", b"a"),
        fastsm.delete_prefix(b"\xff"), fastsm.delete_range(b"a", b"b\xff"), fastsm.delete_range(None, None),
    )[5:] == [Answer(True, number) for number in (2, 0, 0, 2, 2, 4)]
    assert machine.len() == 0


def test_an_answer_too_large_changes_nothing(machine: FastStateMachine | MemoryStateMachine) -> None:
    """The limit is 64 MiB: of a value, or of all values in a list, each with its head of five bytes."""
    large, half = bytes(fastsm.MAX_ANSWER_SIZE), bytes(FULL // 2 - 5)
    assert apply(machine, fastsm.put(b"k", large), fastsm.read(b"k"))[1] == Answer(True, large)
    assert apply(machine, fastsm.put(b"k", large + b"x"), fastsm.read(b"k"))[1] == Answer(False, None, "too large")
    reads = [fastsm.read(b"h"), fastsm.read(b"h")]
    both, twice = fastsm.transaction([], reads), fastsm.transaction([], [fastsm.put(b"other", b""), *reads])
    assert apply(machine, fastsm.put(b"h", half), both, twice)[1:] == [
        Answer(True, [half, half]), Answer(False, None, "too large")]
    assert machine.get(b"other") is None


def test_an_answer_of_a_procedure_is_as_large_as_any(directory: Path) -> None:
    """A value of exactly the limit is an answer, one byte more is not."""
    def make(tx: Any, payload: bytes) -> Any:
        return [bytes(FULL + len(payload) - 5)] if payload[:1] == b"[" else bytes(FULL + len(payload))

    procedures = [fastsm.procedure(make)]
    calls = [fastsm.call("make", payload) for payload in (b"", b"x")]
    with FastStateMachine(directory, procedures=procedures) as fast:
        for machine in (fast, MemoryStateMachine(procedures=procedures)):
            assert [answer.ok for answer in apply(machine, *calls)] == [True, False]


def test_replayed_entries_give_none(machine: FastStateMachine | MemoryStateMachine) -> None:
    """An entry that was applied already is neither examined nor answered again."""
    entries = [(1, 1, fastsm.add(b"n", 1)), (2, 1, fastsm.add(b"n", 1))]
    machine.apply(entries[:1])
    assert machine.apply(entries) == [None, Answer(True, 2)]


def test_an_answer_is_an_immutable_triple() -> None:
    """An answer compares, hashes, prints and pickles by its three fields."""
    answer = Answer.failed(KeyError("this replica"))
    assert answer == Answer(False, None, "failed") == (False, None, "failed")
    assert hash(answer) == hash(Answer(False, None, "failed"))
    assert repr(answer) == "Answer(ok=False, value=None, reason='failed')"
    assert isinstance(answer.error, KeyError)
    again = pickle.loads(pickle.dumps(answer))
    assert (type(again), again, again.error) == (Answer, answer, None)
    assert not answer
    assert Answer(True, None)
    for name in ("ok", "error", "other"):
        with pytest.raises(AttributeError):
            setattr(answer, name, 1)


@pytest.mark.parametrize(
    "make", [lambda: fastsm.add(b"k", 2**63), lambda: fastsm.add(b"k", 0, initial=-(2**63) - 1),
             lambda: fastsm.add(b"k" * 65536, 1), lambda: fastsm.modified_at(b"k", -1),
             lambda: fastsm.call("p", version=2**32), lambda: fastsm.call("p" * 65536), lambda: fastsm.call("\ud800"),
             lambda: fastsm.transaction([fastsm.put(b"k", b"")], []),
             lambda: fastsm.transaction([], [fastsm.compare_and_swap(b"k", None, b"")]),
             lambda: fastsm.transaction([], [fastsm.transaction([], [])]), lambda: fastsm.transaction([], [b""]),
             lambda: fastsm.transaction([], [fastsm.call("p")]), lambda: fastsm.transaction([], [fastsm.noop()]),
             lambda: fastsm.batch([fastsm.read(b"k")]), lambda: fastsm.batch([fastsm.call("p")]),
             lambda: fastsm.batch([fastsm.transaction([], [])])])
def test_an_invalid_command_is_refused_when_it_is_made(make: object) -> None:
    """Numbers beyond 64 bits, and commands where they are not allowed, are refused."""
    with pytest.raises(fastsm.CommandError):
        make()  # type: ignore[operator]
