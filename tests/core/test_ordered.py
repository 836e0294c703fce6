"""Ordered reads: scan, count and ordered return what sorting the state would, whatever happens in between."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsm
from fastsm import FastStateMachine, MemoryStateMachine, NotRunningError, ScanResult
from support.faulty import memory_directory
from support.histories import History
from support.inside import inside

Opener = Callable[..., FastStateMachine]
Pairs = list[tuple[bytes, bytes]]
Bounds = dict[str, Any]

TRICKY = (
    b"", b"\x00", b"\x00\x00", b"a", b"a\x00", b"aa", b"ab", b"b", b"a\xff", b"a\xff\xff", b"a\xff\xff\x00", b"\xff",
    b"\xff\xff", b"\xff\xff\x00", b"\xff\xffz", b"\x7f", b"\x80", b"a" * 65_535, b"a" * 65_534, b"p" * 1024,
    b"p" * 1024 + b"\x00", b"p" * 1023, b"p" * 1024 + b"q",
)  # fmt: skip
ODD_BOUNDS = (None, *TRICKY, b"a" * 70_000, b"\xff" * 70_000, b"between")


def put_all(machine: Any, pairs: dict[bytes, bytes]) -> None:
    """Apply one entry that puts all pairs."""
    machine.apply([(machine.last_applied().index + 1, 1, fastsm.put_many(list(pairs), list(pairs.values())))])


def cut(pairs: Pairs, start: bytes | None, end: bytes | None, prefix: bytes | None) -> Pairs:
    """Return the pairs of a range in their order, as the methods should."""
    return sorted(
        (key, value) for key, value in pairs
        if (start is None or key >= start) and (end is None or key < end) and key.startswith(prefix or b""))


def assert_range(machine: Any, pairs: Pairs, start: Any, end: Any, prefix: Any) -> None:
    """Check that every way to read a range returns these pairs."""
    expected = cut(pairs, start, end, prefix)
    bounds: Bounds = {"start": start, "end": end, "prefix": prefix}
    revision = machine.last_applied().index
    assert machine.scan(**bounds) == ScanResult(expected, revision)
    assert machine.scan(**bounds, reverse=True) == ScanResult(expected[::-1], revision)
    for limit in (0, 1, 3):
        assert machine.scan(**bounds, limit=limit).entries == expected[:limit]
        assert machine.scan(**bounds, limit=limit, reverse=True).entries == expected[::-1][:limit]
    assert machine.count(**bounds) == len(expected)
    assert list(machine.ordered(**bounds)) == expected
    assert list(machine.ordered(**bounds, reverse=True)) == expected[::-1]


# ---- what a range is -----------------------------------------------------------------------------------


@pytest.fixture(params=["fast", "read-only", "model"])
def tricky(request: pytest.FixtureRequest, directory: Path, machine_at: Opener) -> Any:
    """A machine of each kind with the tricky keys."""
    if request.param == "model":
        model = MemoryStateMachine()
        put_all(model, {key: b"of " + key for key in TRICKY})
        return model
    machine = machine_at(directory)
    put_all(machine, {key: b"of " + key for key in TRICKY})
    if request.param == "fast":
        return machine
    machine.close()
    return machine_at(directory, read_only=True)


def test_ranges_of_tricky_keys(tricky: Any) -> None:
    """Any two bounds and any prefix: empty, of no key, longer than a key may be, or with start above end."""
    pairs = [(key, b"of " + key) for key in TRICKY]
    dice = random.Random(8)
    for start in ODD_BOUNDS:
        for end in ODD_BOUNDS:
            assert_range(tricky, pairs, start, end, dice.choice(ODD_BOUNDS) if dice.random() < 0.5 else None)
    for prefix in ODD_BOUNDS:
        assert_range(tricky, pairs, None, None, prefix)


def test_wrong_arguments_are_refused(tricky: Any) -> None:
    """A negative limit is a ValueError, a text bound a TypeError; limit, prefix and reverse are keywords."""
    for call in (lambda: tricky.scan(limit=-1), lambda: tricky.scan(b"z", b"a", limit=-1)):
        with pytest.raises(ValueError, match="limit"):
            call()
    for call in (
        lambda: tricky.scan("a"), lambda: tricky.scan(None, "a"), lambda: tricky.scan(prefix="a"),
        lambda: tricky.count("a"), lambda: tricky.ordered("a"), lambda: tricky.scan(limit="1"), lambda: tricky.scan(3),
        lambda: tricky.scan(b"", b"", b""), lambda: tricky.scan_prefix(None), lambda: tricky.scan(limit=1.0),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            call()


def test_bounds_are_any_bytes_like_object(tricky: Any) -> None:
    """Bytes, bytearrays and memoryviews, even of every second byte, mean the same."""
    expected = tricky.scan(b"a", b"b", prefix=b"a")
    for wrap in (bytearray, memoryview):
        assert tricky.scan(wrap(b"a"), wrap(b"b"), prefix=wrap(b"a")) == expected
        assert tricky.count(wrap(b"a"), wrap(b"b")) == len(expected.entries)
        assert list(tricky.ordered(wrap(b"a"), wrap(b"b"))) == expected.entries
    assert tricky.scan(memoryview(b"a-b-")[::2], limit=1).entries == [(b"ab", b"of ab")]


def test_a_machine_that_does_not_run_refuses(tricky: Any) -> None:
    """After stop each ordered read raises NotRunningError at the call, even for an empty range."""
    tricky.stop()
    for call in (
        tricky.scan, tricky.count, tricky.ordered, lambda: tricky.scan(b"b", b"a"), lambda: tricky.scan(limit=0),
        lambda: tricky.count(b"b", b"a"), lambda: tricky.ordered(b"b", b"a"), lambda: tricky.scan_prefix(b""),
        lambda: tricky.count(b"a"),
    ):  # fmt: skip
        with pytest.raises(NotRunningError):
            call()


def test_an_empty_machine_has_no_order_but_answers(directory: Path, machine_at: Opener) -> None:
    """Without keys every range is empty, before and after keys existed."""
    for machine in (machine_at(directory, ordered=True), MemoryStateMachine()):
        for _ in range(2):
            assert_range(machine, [], None, None, None)
            assert_range(machine, [], b"a", None, b"a")
            put_all(machine, dict.fromkeys(TRICKY, b""))
            machine.scan(limit=1)
            machine.clear()


class Closing:
    """A bound whose buffer runs code, which closes, resets or reads the machine."""

    def __init__(self, action: Callable[[], Any], content: bytes) -> None:
        self.action, self.content = action, content

    def __buffer__(self, flags: int) -> memoryview:
        self.action()
        return memoryview(self.content)

    def __release_buffer__(self, buffer: memoryview) -> None:
        self.action()


@pytest.mark.skipif(not hasattr(memoryview, "__buffer__"), reason="buffers in Python code came with 3.12")
@pytest.mark.parametrize("name", ["close", "clear", "scan", "apply"])
def test_bounds_whose_buffers_run_code(directory: Path, machine_at: Opener, name: str) -> None:
    """A bound may close, reset, read or write the machine: the call uses what is there then, or is refused."""
    machine = machine_at(directory)
    actions: dict[str, Callable[[], Any]] = {
        "close": machine.close, "clear": machine.clear, "scan": machine.scan,
        "apply": lambda: put_all(machine, {b"%d" % machine.last_applied().index: b""}),
    }
    for read in (machine.scan, machine.count, lambda *bounds: list(machine.ordered(*bounds))):
        if machine.is_running():
            put_all(machine, dict.fromkeys(TRICKY, b""))
        bound = Closing(actions[name], b"a")
        try:
            read(bound, bound)
            read(bound)
        except NotRunningError:
            assert name == "close"


@pytest.mark.parametrize("name", ["close", "clear", "ordered"])
def test_arguments_that_run_code(directory: Path, machine_at: Opener, name: str) -> None:
    """A limit and a flag may run code as well."""
    machine = machine_at(directory)
    put_all(machine, dict.fromkeys(TRICKY, b""))

    class Odd:
        def __index__(self) -> int:
            getattr(machine, name)()
            return 3

        def __bool__(self) -> bool:
            getattr(machine, name)()
            return True

    for call in (lambda: machine.scan(limit=Odd()), lambda: machine.scan(reverse=Odd())):
        try:
            found = [key for key, _ in call().entries]
            assert found in ([sorted(TRICKY)[:3], sorted(TRICKY)[::-1]] if name == "ordered" else [[]])
        except NotRunningError:
            assert name == "close"


# ---- next to everything else ---------------------------------------------------------------------------

short_keys = st.binary(max_size=3) | st.lists(st.sampled_from([0, 97, 255]), max_size=4).map(bytes)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.tuples(short_keys, st.none() | st.binary(max_size=2)), max_size=12), max_size=8),
    st.none() | short_keys, st.none() | short_keys, st.none() | short_keys,
)  # fmt: skip
def test_ranges_do_what_a_sorted_dict_does(
    chunks: list[list[tuple[bytes, bytes | None]]], start: bytes | None, end: bytes | None, prefix: bytes | None
) -> None:
    """Any puts and deletes, read after each chunk, and iterators of each moment read at the end."""
    state: dict[bytes, bytes] = {}
    open_iterators: list[tuple[Iterator[tuple[bytes, bytes]], Pairs]] = []
    with memory_directory() as path, FastStateMachine(path) as machine:
        for number, chunk in enumerate(chunks, 1):
            machine.apply([(number, 1, fastsm.batch([
                fastsm.delete(key) if value is None else fastsm.put(key, value) for key, value in chunk]))])
            for key, value in chunk:
                state.pop(key, None)
                if value is not None:
                    state[key] = value
            assert_range(machine, list(state.items()), start, end, prefix)
            pairs = cut(list(state.items()), start, end, prefix)
            iterator = machine.ordered(start, end, prefix=prefix)
            open_iterators.append((iterator, pairs[1:]))
            next(iterator, None)
        inside(machine).check()
        for iterator, rest in open_iterators:
            assert list(iterator) == rest


def change(name: str, machine: FastStateMachine, root: Path, reopen: Callable[[], FastStateMachine]) -> Any:
    """Replaces or moves the state; returns the machine to continue with."""
    if name == "compact":
        machine.compact()
    elif name == "snapshot and install":
        machine.write_snapshot(root / "snapshot")
        machine.install_snapshot(None, root / "snapshot")
    elif name == "reset":
        machine.clear()
    elif name == "stop and start":
        machine.stop()
        machine.start()
    else:
        machine.close()
        return reopen()
    return machine


CHANGES = ("compact", "snapshot and install", "reset", "stop and start", "reopen")


@pytest.mark.parametrize("seed", range(4))
def test_a_random_history_with_everything_in_between(tmp_path: Path, machine_at: Opener, seed: int) -> None:
    """With compactions, installs, resets, stops and reopenings, reads are those of the model at that moment."""
    dice = random.Random(seed)

    def open_machine() -> FastStateMachine:
        return machine_at(tmp_path / "state", retain_entries=0, ordered=dice.random() < 0.5)

    machine, model = open_machine(), MemoryStateMachine()
    history = History(seed, large=False)
    iterators: list[tuple[Iterator[tuple[bytes, bytes]], Iterator[tuple[bytes, bytes]]]] = []
    bounds = (None, b"", b"k", b"key-1", b"key-15", b"key-2", b"l")
    for _ in range(250):
        chunk = history.chunk()
        assert machine.apply(chunk) == model.apply(chunk)
        if dice.random() < 0.15:
            name = dice.choice(CHANGES)
            machine = change(name, machine, tmp_path, open_machine)
            if name == "reset":
                model.clear()
                history = History(dice.randrange(2**32), large=False)
        start, end = dice.choice(bounds), dice.choice(bounds)
        reverse = dice.random() < 0.5
        if dice.random() < 0.5:
            limit = dice.choice((None, 1, 4))
            assert machine.scan(start, end, limit=limit, reverse=reverse) == model.scan(
                start, end, limit=limit, reverse=reverse)
            assert machine.count(start, end) == model.count(start, end)
        if dice.random() < 0.3:
            iterators.append((machine.ordered(start, end, reverse=reverse), model.ordered(start, end, reverse=reverse)))
        for real, expected in iterators:
            if dice.random() < 0.2:
                assert next(real, None) == next(expected, None)
        if dice.random() < 0.1:
            inside(machine).check()
    inside(machine).check()
    machine.close()
    for real, expected in iterators:
        assert list(real) == list(expected)


@pytest.mark.parametrize("ended", [*CHANGES, "close", "overwrite", "delete", "delete and put again", "nothing"])
@pytest.mark.parametrize("begun", [False, True])
def test_an_iterator_stays_at_its_moment(tmp_path: Path, machine_at: Opener, ended: str, begun: bool) -> None:
    """Whatever happens to the state, an iterator returns the pairs as of its call, whether it has begun or not."""
    machine = machine_at(tmp_path / "state", retain_entries=0)
    pairs = {b"%04d" % i: b"value %d" % i for i in range(3000)}
    put_all(machine, pairs)
    put_all(machine, {key: pairs[key] for key in list(pairs)[::3]})  # entries of older records, too
    machine.scan(limit=1)
    put_all(machine, {key: pairs[key] for key in list(pairs)[::5]})
    expected = sorted(pairs.items())
    forward, backward = machine.ordered(), machine.ordered(reverse=True)
    taken: tuple[Pairs, Pairs] = ([], [])
    for iterator, some in zip((forward, backward), taken, strict=True):
        some += [next(iterator) for _ in range(1000 if begun else 0)]
    keys = list(pairs)
    if ended == "overwrite":
        put_all(machine, dict.fromkeys(pairs, b"newer"))
        put_all(machine, dict.fromkeys(pairs, b"newest"))
    elif ended.startswith("delete"):
        machine.apply([(machine.last_applied().index + 1, 1, fastsm.batch([fastsm.delete(key) for key in keys]))])
        if ended != "delete":
            put_all(machine, dict.fromkeys(keys, b"again"))
        assert machine.count(b"") == (0 if ended == "delete" else len(keys))
        machine.scan()
    elif ended == "close":
        machine.close()
    elif ended != "nothing":
        machine = change(ended, machine, tmp_path, lambda: machine_at(tmp_path / "state"))
        put_all(machine, dict.fromkeys([*keys, b"other"], b"newer"))
        machine.scan()
    assert taken[0] + list(forward) == expected
    assert taken[1] + list(backward) == expected[::-1]


def test_iterators_that_are_dropped_leave_nothing(directory: Path, machine_at: Opener) -> None:
    """An exhausted or dropped iterator holds nothing, notes nothing, and needs no garbage collection."""
    machine = machine_at(directory)
    put_all(machine, {b"%04d" % i: b"" for i in range(2000)})
    machine.scan(limit=1)
    order = inside(machine).order()
    assert order is not None
    gc.collect()
    gc.disable()
    try:
        for number in range(100):
            iterators = [machine.ordered() for _ in range(3)]
            assert order.open_views == 3
            next(iterators[0])
            list(iterators[1])
            put_all(machine, {b"%04d" % number: b"new"})
            del iterators
            assert order.open_views == 0
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_scans_next_to_a_writer_are_of_one_state(directory: Path, machine_at: Opener) -> None:
    """In long scans, counts and iterators every key has the number of one chunk, and none is missing."""
    machine = machine_at(directory, ordered=True)
    keys = [b"%05d" % i for i in range(20_000)]
    chunks = 25

    def write() -> None:
        for index in range(1, chunks + 1):
            odd = index % 2
            machine.apply([(index, 1, fastsm.put_many(keys, [b"%d" % index] * len(keys)) if odd else fastsm.batch(
                [fastsm.delete(key) for key in keys[::2]]))])

    writer = threading.Thread(target=write)
    writer.start()
    moments = set()
    while writer.is_alive():
        entries, revision = machine.scan()
        odd = revision - 1 + revision % 2
        assert {value for _, value in entries} == ({b"%d" % odd} if revision else set())
        assert [key for key, _ in entries] == (keys if revision % 2 else keys[1::2] if revision else [])
        assert machine.count(b"0") in (0, len(keys) // 2, len(keys))
        pairs = list(machine.ordered(reverse=True))
        assert len({value for _, value in pairs}) <= 1
        assert len(pairs) in (0, len(keys) // 2, len(keys))
        moments.add(revision)
    writer.join()
    assert len(moments) > 1, "no scan fell between two chunks"


def test_many_first_readers_at_the_same_time(directory: Path, machine_at: Opener) -> None:
    """Several threads need the order at the same time, during writes: all of them see all keys."""
    machine = machine_at(directory)
    keys = {b"%06d" % (i * 7919 % 1_000_003): b"" for i in range(50_000)}
    put_all(machine, keys)
    found: list[int] = []

    def read() -> None:
        for _ in range(3):
            found.append(len(machine.scan().entries))

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for number in range(50):
        put_all(machine, {b"new %d %d" % (number, i): b"" for i in range(400)})
    for reader in readers:
        reader.join()
    assert all((count - len(keys)) % 400 == 0 for count in found), found
    assert len(found) == 12
    inside(machine).check()
    assert machine.count(b"") == len(keys) + 50 * 400


def test_the_places_of_a_range_are_in_order(directory: Path, machine_at: Opener) -> None:
    """Commands on ranges find the newest record of each key of a range."""
    machine = machine_at(directory)
    keys = [b"%04d" % i for i in range(3000)]
    put_all(machine, dict.fromkeys(keys, b""))
    put_all(machine, dict.fromkeys(keys[::2], b"newer"))
    for start, end in ((None, None), (b"0100", b"2500"), (b"2", None), (b"5", b"1"), (None, b"0000")):
        assert inside(machine).keys_of_range(start, end) == [key for key, _ in machine.scan(start, end).entries]
