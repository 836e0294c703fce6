"""The order of keys in the saved table: an opening that uses it has the sorted order, or does not use the table."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsm
import fastsm.core.generations
from fastsm import FastStateMachine, Reader
from fastsm.lookup.order import Order
from support.faulty import crash_copy, memory_directory
from support.histories import History
from support.inside import inside
from support.tables import TableFile

Opener = Callable[..., FastStateMachine]
KEYS = [b"%05d" % i for i in range(3_000)]


@pytest.fixture(autouse=True)
def _always_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save tables of states of any size."""
    monkeypatch.setattr(fastsm.core.generations, "SAVE_TABLE_ABOVE", 0)


def applied(machine: FastStateMachine, *commands: bytes) -> None:
    """Apply one chunk, with an entry for each command."""
    first = machine.last_applied().index + 1
    machine.apply([(index, 1, command) for index, command in enumerate(commands, first)])


def put_all(machine: FastStateMachine, keys: list[bytes]) -> None:
    applied(machine, fastsm.put_many(keys, [b"v" + key for key in keys]))


def order_of(machine: FastStateMachine | Reader) -> Order | None:
    order: Order | None = inside(machine).order()
    return order


def is_loaded(machine: FastStateMachine | Reader) -> bool:
    """Return whether the machine has the order of its saved table, and compared no keys for it."""
    order = order_of(machine)
    assert order is None or not order.loaded or order.built
    return order is not None and order.loaded


def assert_in_order(machine: FastStateMachine) -> None:
    """Check that the order gives the keys as ``sorted`` does, from either end."""
    expected = sorted(machine.items())
    assert machine.scan().entries == expected
    assert list(machine.ordered(reverse=True)) == expected[::-1]
    inside(machine).check()


def table_in(path: Path) -> TableFile:
    (table,) = path.glob("table-*")
    return TableFile(table)


def state_in_order(path: Path) -> None:
    """Make a cleanly closed state with keys that were overwritten, deleted, put again, and read in order meanwhile."""
    dice = random.Random(5)
    with FastStateMachine(path, ordered=True) as machine:
        put_all(machine, dice.sample(KEYS, len(KEYS)))
        applied(machine, *(fastsm.delete(key) for key in KEYS[::7]))
        machine.count(b"01000")
        put_all(machine, KEYS[::5])


# ---- used ------------------------------------------------------------------------------------------------

def test_an_order_in_use_is_saved_and_opened_with(directory: Path, machine_at: Opener) -> None:
    """The next opening loads the order without comparing keys, and keeps it up to date with later keys."""
    state_in_order(directory)
    machine = machine_at(directory, verify_on_open="off")
    assert is_loaded(machine)
    order = order_of(machine)
    assert order is not None
    assert (order.entries, order.comparisons) == (machine.len(), 0)
    assert_in_order(machine)
    put_all(machine, [b"new %d" % i for i in range(500)])
    applied(machine, *(fastsm.delete(key) for key in KEYS[::2]))
    assert_in_order(machine)


def test_an_order_that_was_never_used_is_not_saved(directory: Path, machine_at: Opener) -> None:
    """Without an ordered read the table has no order, and neither has the next opening."""
    for _ in range(2):
        with FastStateMachine(directory) as machine:
            put_all(machine, KEYS)
            machine.scan(limit=0)
            assert order_of(machine) is None
        assert table_in(directory).saved.ordered == 0


def test_an_order_asked_for_by_a_reader_is_saved_though_nothing_was_applied(
    directory: Path, machine_at: Opener
) -> None:
    """A machine that only reads saves the order at its close; the next one does not write the table again."""
    with FastStateMachine(directory) as machine:
        put_all(machine, KEYS)
    with FastStateMachine(directory) as machine:
        assert machine.scan(limit=1).entries == [(KEYS[0], b"v" + KEYS[0])]
    assert table_in(directory).saved.ordered == len(KEYS)
    before = table_in(directory).path.stat()
    with FastStateMachine(directory, ordered=True) as machine:
        assert is_loaded(machine)
        assert_in_order(machine)
    assert table_in(directory).path.stat().st_ino == before.st_ino


def test_a_read_only_opening_has_it_too(directory: Path, machine_at: Opener) -> None:
    """A read-only opening loads the saved order, too."""
    state_in_order(directory)
    machine = machine_at(directory, read_only=True)
    assert is_loaded(machine)
    assert machine.count(b"00100", b"00200") == sum(100 <= int(key) < 200 for key in list(machine.keys()))


def test_a_reader_has_it_and_keeps_it_up(directory: Path, machine_at: Opener) -> None:
    """A `Reader` loads the saved order, and does not collect new keys without limit if it never scans."""
    state_in_order(directory)
    machine = machine_at(directory, auto_compact=False)
    with Reader(directory) as reader:
        assert is_loaded(reader)
        for _ in range(4):
            for first in range(0, 12_000, 4_000):
                put_all(machine, [b"new %05d" % i for i in range(first, first + 4_000)])
            applied(machine, fastsm.delete_prefix(b"new"))
            reader.refresh()
            order = order_of(reader)
            assert order is not None
            assert order.fresh_keys <= 8_192
        put_all(machine, KEYS[:50])
        reader.refresh()
        assert reader.scan() == machine.scan()


@pytest.mark.parametrize("what", ["compact", "install", "clear"])
def test_the_next_generation_has_it(tmp_path: Path, machine_at: Opener, what: str) -> None:
    """A state that was opened with an order keeps it through a compaction, an install and a reset."""
    state_in_order(tmp_path / "state")
    machine = machine_at(tmp_path / "state", retain_entries=0)
    if what == "compact":
        machine.compact()
    elif what == "install":
        machine.write_snapshot(tmp_path / "snapshot")
        machine.install_snapshot(None, tmp_path / "snapshot")
    else:
        machine.clear()
    put_all(machine, [b"later"])
    order = order_of(machine)
    assert order is not None
    assert order.built
    assert_in_order(machine)
    copy = crash_copy(tmp_path / "state", tmp_path / "killed")
    machine.close()
    for path in (copy, tmp_path / "state"):
        machine = machine_at(path)
        assert is_loaded(machine) or (what == "clear" and path == copy)  # an empty table has no order
        assert_in_order(machine)


# ---- after a kill ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_keys_after_the_table_are_noted(tmp_path: Path, machine_at: Opener, seed: int) -> None:
    """After a kill, the table's order and the later frames of the log give all keys in order."""
    state_in_order(tmp_path / "state")
    machine = machine_at(tmp_path / "state", retain_entries=0)
    history = History(seed, large=False, after=machine.last_applied())
    for number in range(40 * seed):
        machine.apply(history.chunk())
        if number % 10 == 0:
            machine.scan(limit=5)
    expected = sorted(machine.items())
    copy = crash_copy(tmp_path / "state", tmp_path / "killed")
    machine = machine_at(copy)
    assert is_loaded(machine)
    assert machine.scan().entries == expected
    assert_in_order(machine)


def test_after_a_kill_without_a_table_the_first_flush_saves_it(tmp_path: Path, machine_at: Opener) -> None:
    """The first flush after a kill saves a table with the order; entries after it are read from the log."""
    machine = machine_at(tmp_path / "state", ordered=True)
    put_all(machine, KEYS)
    machine.flush()
    copy = crash_copy(tmp_path / "state", tmp_path / "killed")
    assert not list(copy.glob("table-*"))
    machine = machine_at(copy, ordered=True)
    assert not is_loaded(machine)
    applied(machine, fastsm.delete(KEYS[0]), fastsm.put(KEYS[1], b"again"), fastsm.put(b"new", b""))
    machine.flush()
    assert table_in(copy).saved.ordered == len(KEYS)
    order = order_of(machine)
    assert order is not None
    assert order.open_views == 0
    applied(machine, fastsm.delete(KEYS[2]))
    again = crash_copy(copy, tmp_path / "killed again")
    machine = machine_at(again)
    assert is_loaded(machine)
    assert_in_order(machine)


short_keys = st.binary(max_size=3) | st.lists(st.sampled_from([0, 97, 255]), max_size=4).map(bytes)
changes = st.lists(st.tuples(short_keys, st.booleans()), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(changes, st.sampled_from(["read", "reopen", "kill", "compact", "nothing"])), max_size=8))
def test_any_lives_give_what_a_sorted_dict_does(lives: list[tuple[list[tuple[bytes, bool]], str]]) -> None:
    """Any puts and deletes, with reads, reopenings, kills and compactions between them."""
    state: dict[bytes, bytes] = {}
    with memory_directory() as root:
        path, number = root / "0", 0
        machine = FastStateMachine(path, ordered=True, retain_entries=0)
        try:
            for chunk, what in lives:
                applied(machine, *(fastsm.put(key, key) if put else fastsm.delete(key) for key, put in chunk))
                for key, put in chunk:
                    state.pop(key, None)
                    if put:
                        state[key] = key
                if what == "kill":
                    number += 1
                    copy = crash_copy(path, root / f"{number}")
                    machine.close()
                    path = copy
                if what == "reopen":
                    machine.close()
                if what in ("kill", "reopen"):
                    machine = FastStateMachine(path, retain_entries=0)
                    assert order_of(machine) is not None or not state or what == "kill"
                if what == "compact":
                    machine.compact()
                if what == "read":
                    assert machine.scan().entries == sorted(state.items())
            assert machine.scan().entries == sorted(state.items())
            assert machine.count(b"a") == sum(key >= b"a" for key in state)
            inside(machine).check()
        finally:
            machine.close()


def test_many_new_keys_at_the_close_are_in_it(directory: Path, machine_at: Opener) -> None:
    """New keys are sorted into the order before a close saves it."""
    machine = machine_at(directory, ordered=True, auto_compact=False)
    put_all(machine, KEYS)
    machine.scan(limit=1)
    put_all(machine, [b"new %05d" % i for i in range(5_000)])
    order = order_of(machine)
    assert order is not None
    assert order.fresh_keys == 5_000
    machine.close()
    assert table_in(directory).saved.ordered == len(KEYS) + 5_000
    machine = machine_at(directory)
    assert is_loaded(machine)
    assert_in_order(machine)


# ---- refused ---------------------------------------------------------------------------------------------

def move(table: TableFile, place: int) -> None:
    """Change two entries of the order, one of them to a given place, so that the sum of all stays the same."""
    places = table.ordered()
    at_end = table.saved.log_start + table.saved.log_offset == place
    a, b = sorted(range(len(places)), key=places.__getitem__, reverse=at_end)[:2]
    places[a], places[b] = place, (places[a] + places[b] - place) % 2**64
    table.set_ordered(places)


UNSOUND: dict[str, Callable[[TableFile], Any]] = {
    "one key less": lambda t: t.set_ordered(t.ordered()[:-1]),
    "one key more": lambda t: t.set_ordered([*t.ordered(), t.ordered()[-1]]),
    "another number in the header": lambda t: t.change(ordered=t.saved.ordered - 1),
    "none in the header": lambda t: t.change(ordered=0),
    "a key twice, another not at all": lambda t: t.set_ordered([t.ordered()[1], *t.ordered()[1:]]),
    "an older record of a key": lambda t: t.set_ordered([t.ordered()[0] - 16, *t.ordered()[1:]]),
    "a place that is not aligned": lambda t: t.set_ordered(
        [t.ordered()[0] + 1, t.ordered()[1] - 1, *t.ordered()[2:]]),
    "a place in the log's header": lambda t: move(t, 8),
    "a place beyond the end": lambda t: move(t, t.saved.log_start + t.saved.log_offset),
    "the largest place": lambda t: move(t, 2**64 - 8),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_an_unsound_order_with_right_checksums_is_not_believed(
    directory: Path, machine_at: Opener, kind: str
) -> None:
    """If the order does not match the table, the table is not used: base and log are read."""
    state_in_order(directory)
    table = table_in(directory)
    UNSOUND[kind](table)
    table.write()
    machine = machine_at(directory, read_only=True)
    assert not inside(machine).index.loaded
    assert order_of(machine) is None
    assert_in_order(machine)


def test_the_order_of_another_generation_is_not_believed(directory: Path, machine_at: Opener) -> None:
    """An order with as many keys and correct checksums, but the places of another generation, is not used."""
    state_in_order(directory)
    before = table_in(directory).ordered()
    with FastStateMachine(directory, retain_entries=0) as machine:
        put_all(machine, [key for key, _ in machine.scan().entries])
    table = table_in(directory)
    assert table.saved.ordered == len(before)
    table.set_ordered(before)
    table.write()
    machine = machine_at(directory, read_only=True)
    assert not inside(machine).index.loaded
    assert_in_order(machine)


def test_every_flipped_byte_of_the_order_is_noticed(directory: Path, machine_at: Opener) -> None:
    """Every flipped byte of the order is noticed, because the table's checksum covers it."""
    state_in_order(directory)
    table = table_in(directory)
    content = table.path.read_bytes()
    for offset in {*range(table.sections.order, len(content), 1_231), table.sections.order, len(content) - 1}:
        table.path.write_bytes(
            content[:offset] + bytes([content[offset] ^ 1 << offset % 8]) + content[offset + 1 :])
        machine = machine_at(directory, read_only=True)
        assert not inside(machine).index.loaded
        machine.close()


def test_an_order_without_memory_is_left_out(
    directory: Path, machine_at: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the order was dropped for want of memory, the table is saved without it, and the next read builds it."""
    with FastStateMachine(directory, ordered=True) as machine:
        put_all(machine, KEYS)
        order = order_of(machine)
        assert order is not None
        order.forget()
    assert table_in(directory).saved.ordered == 0
    machine = machine_at(directory)
    assert inside(machine).index.loaded
    assert order_of(machine) is None
    assert_in_order(machine)
