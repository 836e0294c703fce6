"""apply: results, order, all or nothing, and a state that depends only on the entries."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import CommandError, Entry, FastStateMachine, LogId, OrderError, UnknownCommandError
from support.histories import KEYS, History, model_of, state_of

Opener = Callable[..., FastStateMachine]
UNKNOWN_KIND = b"\x00\xff" + bytes(6)
UNKNOWN_VERSION = b"\x09" + fastsm.noop()[1:]


@pytest.fixture
def machine(directory: Path, machine_at: Opener) -> FastStateMachine:
    return machine_at(directory)


@pytest.fixture
def sparse(directory: Path, machine_at: Opener) -> FastStateMachine:
    """A machine for a host that hands over only commands."""
    return machine_at(directory, contiguous=False)


def puts(first: int, last: int, term: int = 1) -> list[Entry]:
    """One put per entry, each of a key and a value of its own."""
    return [Entry(i, term, fastsm.put(b"key-%d" % i, b"value-%d" % i)) for i in range(first, last + 1)]


# ---- results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "result", "value"),
    [
        (fastsm.put(b"k", b"new"), True, b"new"),
        (fastsm.put(b"k", b""), True, b""),
        (fastsm.delete(b"k"), True, None),
        (fastsm.delete(b"nothing there"), True, b"old"),
        (fastsm.noop(), True, b"old"),
        (fastsm.config(b"nodes"), True, b"old"),
        (fastsm.compare_and_swap(b"k", b"old", b"new"), True, b"new"),
        (fastsm.compare_and_swap(b"k", b"old", None), True, None),
        (fastsm.compare_and_swap(b"k", b"older", b"new"), False, b"old"),
        (fastsm.compare_and_swap(b"k", b"", b"new"), False, b"old"),
        (fastsm.compare_and_swap(b"k", None, b"new"), False, b"old"),
        (fastsm.compare_and_swap(b"nothing there", None, b"new"), True, b"old"),
        (fastsm.compare_and_swap(b"nothing there", None, None), True, b"old"),
        (fastsm.compare_and_swap(b"nothing there", b"", b"new"), False, b"old"),
        (fastsm.batch([]), True, b"old"),
        (fastsm.batch([fastsm.put(b"k", b"1"), fastsm.delete(b"k"), fastsm.put(b"k", b"2")]), True, b"2"),
        (fastsm.batch([fastsm.put(b"k", b"1"), fastsm.compare_and_swap(b"k", b"1", b"2")]), True, b"2"),
        (fastsm.batch([fastsm.put(b"k", b"1"), fastsm.compare_and_swap(b"k", b"old", b"2")]), False, b"old"),
        (fastsm.batch([fastsm.delete(b"k"), fastsm.compare_and_swap(b"x", b"1", b"2")]), False, b"old"),
    ],
)
def test_result_says_whether_the_command_took_effect(
    command: bytes, result: bool, value: bytes | None, machine: FastStateMachine
) -> None:
    """True where it took effect, False where a compare-and-swap or a batch did not match."""
    machine.apply([Entry(1, 1, fastsm.put(b"k", b"old"))])
    assert machine.apply([Entry(2, 1, command)]) == [result]
    assert machine.get(b"k") == value
    assert machine.last_applied() == LogId(2, 1)


def test_empty_value_is_not_an_absent_one(machine: FastStateMachine) -> None:
    """A key whose value is empty exists."""
    machine.apply([Entry(1, 1, fastsm.put(b"", b""))])
    assert machine.get(b"") == b""
    assert b"" in machine
    assert machine.len() == 1
    assert machine.apply([Entry(2, 1, fastsm.compare_and_swap(b"", None, b"x"))]) == [False]
    assert machine.apply([Entry(3, 1, fastsm.compare_and_swap(b"", b"", b"x"))]) == [True]


def test_result_is_as_long_as_the_chunk(machine: FastStateMachine) -> None:
    """There is one result per entry, however many commands the entry has."""
    assert machine.apply([]) == []
    assert machine.last_applied() == LogId(0, 0)
    batch = fastsm.batch([fastsm.put(b"%d" % i, b"") for i in range(1000)])
    assert machine.apply([Entry(1, 1, batch), Entry(2, 1, fastsm.noop())]) == [True, True]


def test_later_entries_of_a_chunk_see_what_earlier_ones_did(machine: FastStateMachine) -> None:
    """A compare-and-swap is judged against everything before it, even in the same chunk."""
    commands = [
        fastsm.put(b"k", b"1"),
        fastsm.compare_and_swap(b"k", b"1", b"2"),
        fastsm.compare_and_swap(b"k", b"1", b"3"),
        fastsm.batch([fastsm.put(b"k", b"4"), fastsm.compare_and_swap(b"other", b"x", None)]),
        fastsm.compare_and_swap(b"k", b"2", None),
        fastsm.compare_and_swap(b"k", None, b"5"),
    ]
    chunk = [Entry(i, 1, command) for i, command in enumerate(commands, 1)]
    assert machine.apply(chunk) == [True, True, False, False, True, True]
    assert machine.get(b"k") == b"5"


@pytest.mark.parametrize("kind", [tuple, list])
def test_chunk_is_any_sequence_and_entries_are_plain_tuples_as_well(kind: type, machine: FastStateMachine) -> None:
    """A chunk is a list or a tuple, of Entry or tuples, with commands of any bytes-like type."""
    command = fastsm.put(b"k", b"v")
    chunk = [(1, 1, command), Entry(2, 1, command), (3, 1, bytearray(command)), (4, 1, memoryview(command))]
    assert machine.apply(kind(chunk)) == [True] * 4
    assert machine.apply(entry for entry in puts(5, 6)) == [True, True]


@pytest.mark.parametrize(
    "item",
    [None, 7, b"abc", [2, 1, b""], (2, 1), (2, 1, b"", 0), ("2", 1, b""), (2, None, b""), (2, 1, "put"), (2, 1, 3)],
)
def test_an_item_that_is_not_an_entry_is_a_type_error(item: Any, machine: FastStateMachine) -> None:
    """An item of another shape raises TypeError, and nothing is applied."""
    with pytest.raises(TypeError):
        machine.apply([Entry(1, 1, fastsm.put(b"k", b"v")), item])
    assert (machine.last_applied(), machine.len()) == (LogId(0, 0), 0)


# ---- order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk", "index"),
    [
        ([(2, 1)], 2),
        ([(1, 1), (3, 1)], 3),
        ([(1, 1), (1, 1)], 1),
        ([(1, 1), (2, 1), (1, 1)], 1),
        ([(1, 2), (2, 1)], 2),
        ([(0, 1), (2, 1)], 2),
        ([(1, 1), (2, 1), (3, 0)], 3),
    ],
)
def test_entry_out_of_order_is_an_order_error(
    chunk: list[tuple[int, int]], index: int, machine: FastStateMachine
) -> None:
    """Indexes rise by one and terms never fall; the error names the entry, and nothing is applied."""
    with pytest.raises(OrderError) as caught:
        machine.apply([Entry(i, t, fastsm.put(b"k", b"v")) for i, t in chunk])
    assert caught.value.index == index
    assert (machine.last_applied(), machine.len()) == (LogId(0, 0), 0)


def test_gap_is_an_order_error_when_contiguous(machine: FastStateMachine) -> None:
    """The first entry after last applied must be exactly one above it."""
    machine.apply(puts(1, 3))
    for first in (5, 4 + 2**40, 2**64 - 2):
        with pytest.raises(OrderError, match="expected entry 4"):
            machine.apply([Entry(first, 1, fastsm.noop())])
    assert machine.apply(puts(4, 4)) == [True]


def test_gap_is_fine_when_only_commands_are_handed_over(sparse: FastStateMachine) -> None:
    """With contiguous=False an entry may be anywhere above the last one, if its term is not lower."""
    assert sparse.apply([Entry(10, 3, fastsm.noop()), Entry(20, 3, fastsm.noop())]) == [True, True]
    assert sparse.apply([Entry(2**64 - 2, 2**64 - 2, fastsm.noop())]) == [True]
    with pytest.raises(OrderError):
        sparse.apply([Entry(2**64 - 1, 2**64 - 2, fastsm.noop())])
    assert sparse.last_applied() == LogId(2**64 - 2, 2**64 - 2)


@pytest.mark.parametrize("number", [-1, 2**64 - 1, 2**64, 10**30])
@pytest.mark.parametrize("field", ["index", "term"])
def test_number_out_of_range_is_an_order_error(field: str, number: int, sparse: FastStateMachine) -> None:
    """Index and term are 0 to 2**64 - 2."""
    entry = Entry(number, 1, fastsm.noop()) if field == "index" else Entry(1, number, fastsm.noop())
    with pytest.raises(OrderError, match=field):
        sparse.apply([entry])


def test_term_below_the_last_one_is_an_order_error(machine: FastStateMachine) -> None:
    """Terms never fall from chunk to chunk."""
    machine.apply(puts(1, 2, term=5))
    with pytest.raises(OrderError, match="terms never fall"):
        machine.apply(puts(3, 3, term=4))


def test_replayed_entries_are_skipped_and_their_commands_not_looked_at(machine: FastStateMachine) -> None:
    """A Raft library may hand over its log again after a restart: the result is None for what was applied before."""
    machine.apply(puts(1, 5))
    replay = [Entry(i, 1, garbage) for i, garbage in enumerate((b"", UNKNOWN_KIND, b"\xff" * 9, b"x"), 1)]
    assert machine.apply(replay) == [None] * 4
    assert machine.apply([*replay[2:], *puts(5, 7)]) == [None, None, None, True, True]
    assert machine.last_applied() == LogId(7, 1)
    assert machine.get(b"key-3") == b"value-3"


def test_replayed_compare_and_swap_is_not_judged_again(machine: FastStateMachine) -> None:
    """A swap that would match now is skipped if it was applied before."""
    swap = Entry(2, 1, fastsm.compare_and_swap(b"k", b"b", b"c"))
    assert machine.apply([Entry(1, 1, fastsm.put(b"k", b"a")), swap]) == [True, False]
    machine.apply([Entry(3, 1, fastsm.put(b"k", b"b"))])
    assert machine.apply([swap]) == [None]
    assert machine.get(b"k") == b"b"


def test_replayed_entry_of_another_term_is_an_order_error(machine: FastStateMachine) -> None:
    """A known term that differs shows that this is another log."""
    machine.apply([*puts(1, 3, term=1), *puts(4, 6, term=2)])
    for index, term in ((2, 2), (3, 2), (4, 1), (6, 3)):
        with pytest.raises(OrderError) as caught:
            machine.apply([Entry(index, term, b""), Entry(7, 9, fastsm.noop())])
        assert caught.value.index == index
    assert machine.last_applied() == LogId(6, 2)


def test_replayed_entry_of_another_term_than_an_id_noted_is_an_order_error(machine: FastStateMachine) -> None:
    """An id given to update_last_applied is known immediately, before any frame records it."""
    machine.update_last_applied(LogId(1, 1))
    with pytest.raises(OrderError):
        machine.apply([Entry(1, 2, fastsm.noop())])
    assert machine.apply([Entry(1, 1, fastsm.noop())]) == [None]


def test_replayed_entry_whose_term_is_not_known_is_skipped(sparse: FastStateMachine) -> None:
    """Between two seen entries of different terms nothing is certain, so nothing is refused."""
    sparse.apply([Entry(10, 1, fastsm.noop()), Entry(20, 5, fastsm.noop())])
    assert sparse.apply([Entry(15, 3, b"")]) == [None]
    with pytest.raises(OrderError):
        sparse.apply([Entry(20, 4, b"")])


# ---- all or none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (b"", CommandError),
        (b"\x00", CommandError),
        (fastsm.put(b"key", b"value")[:-1], CommandError),
        (fastsm.put(b"key", b"value") + b"\x00", CommandError),
        (UNKNOWN_KIND, UnknownCommandError),
        (UNKNOWN_VERSION, UnknownCommandError),
        (fastsm.batch([fastsm.noop()])[:-1], CommandError),
        (fastsm.batch([fastsm.noop()])[:8] + UNKNOWN_KIND, UnknownCommandError),
    ],
)
@pytest.mark.parametrize("position", [0, 3, 99])
def test_malformed_command_raises_before_anything_of_its_chunk_is_applied(
    command: bytes, error: type[CommandError], position: int, machine: FastStateMachine
) -> None:
    """The error's index names the entry; state, order and log continue as if the chunk had never come."""
    machine.apply(puts(1, 1))
    chunk = puts(2, 101)
    chunk[position] = chunk[position]._replace(command=command)
    before = machine.stats()
    with pytest.raises(error) as caught:
        machine.apply(chunk)
    assert caught.value.index == 2 + position
    assert f"entry {2 + position}" in str(caught.value)
    assert machine.stats() == before
    assert machine.entry_term(2) is None
    assert machine.apply(puts(2, 101)) == [True] * 100


def test_wrong_order_is_found_before_anything_of_its_chunk_is_applied(machine: FastStateMachine) -> None:
    """An error in the last of many entries leaves no trace of the first."""
    chunk = puts(1, 1000)
    chunk[-1] = chunk[-1]._replace(index=2000)
    with pytest.raises(OrderError):
        machine.apply(chunk)
    assert (machine.len(), machine.last_applied(), machine.entry_term(1)) == (0, LogId(0, 0), None)
    assert machine.apply(puts(1, 1000)) == [True] * 1000


def test_refused_chunk_is_not_in_the_log(directory: Path, machine_at: Opener) -> None:
    """A chunk that raised is not found by the next opening."""
    with machine_at(directory) as machine:
        machine.apply(puts(1, 2))
        with pytest.raises(CommandError):
            machine.apply([*puts(3, 4), Entry(5, 1, b"")])
        machine.apply([Entry(3, 2, fastsm.delete(b"key-1"))])
    with machine_at(directory) as machine:
        assert machine.last_applied() == LogId(3, 2)
        assert machine.get_many([b"key-1", b"key-2", b"key-3"]) == [None, b"value-2", None]


def test_command_that_does_not_match_counts_as_applied(directory: Path, machine_at: Opener) -> None:
    """A refused swap moves last applied and its term is known, even after reopening."""
    with machine_at(directory) as machine:
        assert machine.apply([Entry(1, 4, fastsm.compare_and_swap(b"k", b"x", b"y"))]) == [False]
    with machine_at(directory) as machine:
        assert (machine.last_applied(), machine.entry_term(1), machine.len()) == (LogId(1, 4), 4, 0)


# ---- readers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_size", [10, 2000])
def test_readers_never_see_half_a_chunk(value_size: int, machine: FastStateMachine) -> None:
    """Every key of a chunk is read as of before the chunk or after it, however large its frame is."""
    keys = [b"key-%d" % number for number in range(100)]
    stop = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not stop.is_set():
            seen = set(machine.get_many(keys))
            if len(seen) != 1:
                wrong.append(seen)

    readers = [threading.Thread(target=read) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for reader in readers:
            reader.start()
        for index in range(1, 201):
            value = b"%d" % index * (value_size // len(b"%d" % index))
            machine.apply([Entry(index, 1, fastsm.batch([fastsm.put(key, value) for key in keys]))])
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        for reader in readers:
            reader.join()
    assert wrong == []


def test_writers_take_turns(sparse: FastStateMachine) -> None:
    """Chunks of many threads are applied one after another, each completely or refused."""
    counter = iter(range(1, 10**6))
    lock = threading.Lock()
    applied: list[int] = []

    def write() -> None:
        for _ in range(50):
            with lock:
                first = 10 * next(counter)
            chunk = [Entry(first + i, 1, fastsm.put(b"%d" % (first + i), b"v" * 3000)) for i in range(5)]
            try:
                sparse.apply(chunk)
            except OrderError:
                continue  # another thread's later chunk was first
            applied.append(first)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert applied == sorted(applied)
    assert sparse.len() == 5 * len(applied)
    assert sparse.last_applied().index == applied[-1] + 4


# ---- a function of the entries ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("contiguous", [True, False])
def test_state_and_results_are_a_function_of_the_entries(
    seed: int, contiguous: bool, directory: Path, machine_at: Opener
) -> None:
    """Other chunk sizes, restarts and table seeds give the same results and the same state."""
    chunks = list(islice(History(seed, contiguous=contiguous), 150))
    entries = [entry for chunk in chunks for entry in chunk]
    model = fastsm.MemoryStateMachine(contiguous=contiguous)
    results = [result for chunk in chunks for result in model.apply(chunk)]
    dice = random.Random(seed)
    found: list[bool | None] = []
    position = 0
    while position < len(entries):
        with machine_at(directory, contiguous=contiguous) as machine:
            for _ in range(dice.randrange(1, 8)):
                size = dice.choice((1, 2, 5, 40))
                found += machine.apply(entries[position : position + size])
                position += size
    assert found == results
    with machine_at(directory, contiguous=contiguous) as machine:
        assert state_of(machine) == state_of(model)


def test_history_has_all_that_it_says() -> None:
    """The random histories hit and miss, delete existing keys, and leave gaps: otherwise they prove nothing."""
    chunks = list(islice(History(1, contiguous=False), 400))
    model = fastsm.MemoryStateMachine(contiguous=False)
    results = [result for chunk in chunks for result in model.apply(chunk)]
    kinds = {type(fastsm.decode(entry.command)).__name__ for chunk in chunks for entry in chunk}
    assert kinds == {
        "Add", "Batch", "CompareAndSwap", "Config", "Delete", "DeleteRange", "Forget", "Noop", "Once", "OpenSession",
        "Put", "Tick", "Touch", "Transaction",
    }
    assert results.count(True) > 500
    assert results.count(False) > 50
    assert model.last_applied().index > len(results) + 100
    assert model.last_applied().term > 10
    assert 0 < model.len() < len(KEYS)
    assert state_of(model) == state_of(model_of(chunks, contiguous=False))


# ---- terms and membership -----------------------------------------------------------------------------------


def test_term_is_known_where_it_is_certain(sparse: FastStateMachine) -> None:
    """The term is known for an entry that was seen, and between two of the same term; nowhere else."""
    for index, term in ((10, 2), (20, 2), (30, 5), (31, 6)):
        sparse.apply([Entry(index, term, fastsm.noop())])
    known = {index: sparse.entry_term(index) for index in (0, 1, 9, 10, 11, 19, 20, 21, 29, 30, 31, 32, 2**64)}
    assert known == {
        0: None, 1: None, 9: None, 10: 2, 11: 2, 19: 2, 20: 2, 21: None, 29: None, 30: 5, 31: 6, 32: None,
        2**64: None,
    }
    assert sparse.entry_term(-1) is None


def test_membership_is_the_newest_config_with_its_id(directory: Path, machine_at: Opener) -> None:
    """A config is kept with the id of the entry that carried it, and is not a key."""
    with machine_at(directory) as machine:
        assert machine.membership() is None
        machine.apply([Entry(1, 1, fastsm.config(b"a")), Entry(2, 2, fastsm.config(b"b")), *puts(3, 3, term=3)])
        assert machine.membership() == (LogId(2, 2), b"b")
        assert machine.len() == 1
    with machine_at(directory) as machine:
        assert machine.membership() == (LogId(2, 2), b"b")
        machine.apply([Entry(4, 3, fastsm.config(b""))])
        assert machine.membership() == (LogId(4, 3), b"")


def test_largest_key_and_large_values_come_back(directory: Path, machine_at: Opener) -> None:
    """Sizes around every limit of the frame writer survive, before and after a reopening."""
    sizes = [0, 1, 7, 8, 4000, 4096, 65_400, 65_536, 65_537, 1 << 20, 17 << 20]
    value = random.Random(3).randbytes(17 << 20)
    with machine_at(directory) as machine:
        for index, size in enumerate(sizes, 1):
            machine.apply([Entry(index, 1, fastsm.put(b"%d" % size, value[:size]))])
        machine.apply([Entry(len(sizes) + 1, 1, fastsm.put(b"k" * fastsm.MAX_KEY_SIZE, b"largest key"))])
        assert machine.get(b"k" * (fastsm.MAX_KEY_SIZE + 1)) is None
    with machine_at(directory) as machine:
        for size in sizes:
            assert machine.get(b"%d" % size) == value[:size]
        assert machine.get(b"k" * fastsm.MAX_KEY_SIZE) == b"largest key"
