"""Scans and iterators: one applied state, held still."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastsm
from fastsm import FastStateMachine, MemoryStateMachine, NotRunningError, ScanResult
from support.faulty import memory_directory
from support.histories import History

Opener = Callable[..., FastStateMachine]
Pairs = list[tuple[bytes, bytes]]


def expected_scan(
    pairs: Iterable[tuple[bytes, bytes]], prefix: bytes, limit: int | None = None, after: bytes | None = None
) -> Pairs:
    """Return what a scan of these pairs must return."""
    found = sorted(p for p in pairs if p[0].startswith(prefix) and (after is None or p[0] > after))
    return found if limit is None else found[:limit]


def fill(machine: FastStateMachine, pairs: dict[bytes, bytes]) -> None:
    """Apply one chunk that puts all pairs."""
    index = machine.last_applied().index + 1
    machine.apply([(index, 1, fastsm.put_many(list(pairs), list(pairs.values())))])


TRICKY = {
    key: b"of " + key
    for key in (
        b"", b"\x00", b"\x00\x00", b"a", b"a\x00", b"aa", b"ab", b"b", b"a\xff", b"a\xff\xff", b"a\xff\xff\x00",
        b"\xff", b"\xff\xff", b"\xff\xffz", b"\x7f", b"\x80", b"a" * 65_535, b"a" * 65_534, b"~",
    )
}  # fmt: skip


# ---- what a scan gives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [b"", b"a", b"aa", b"\xff", b"\xff\xff", b"a\xff", b"\x00", b"zz", b"a" * 65_535])
@pytest.mark.parametrize("limit", [None, 0, 1, 3, 10**9])
def test_scan_is_sorted_as_bytes_are(
    directory: Path, machine_at: Opener, prefix: bytes, limit: int | None
) -> None:
    """Pairs are in the order in which ``bytes`` compare: unsigned, and a prefix before longer keys."""
    machine = machine_at(directory)
    fill(machine, TRICKY)
    assert machine.scan_prefix(prefix, limit=limit) == ScanResult(expected_scan(TRICKY.items(), prefix, limit), 1)


@pytest.mark.parametrize("after", [b"", b"a", b"a\xff", b"a\xff\xff\xff", b"\xff\xff\xff", b"aaa", b"\x01"])
def test_scan_starts_after_a_key_that_need_not_be_there(
    directory: Path, machine_at: Opener, after: bytes
) -> None:
    """``start_after`` excludes that key and all keys before it; the empty key is possible too."""
    machine = machine_at(directory)
    fill(machine, TRICKY)
    for prefix in (b"", b"a", b"\xff"):
        found = machine.scan_prefix(prefix, start_after=after, limit=5).entries
        assert found == expected_scan(TRICKY.items(), prefix, 5, after)


@pytest.mark.parametrize("page", [1, 2, 7, 1000])
def test_pages_make_up_the_whole(directory: Path, machine_at: Opener, page: int) -> None:
    """Pages that each start after the last key of the previous one return every pair once."""
    machine = machine_at(directory)
    fill(machine, TRICKY)
    pages: Pairs = []
    entries = machine.scan_prefix(b"", limit=page).entries
    while entries:
        pages += entries
        entries = machine.scan_prefix(b"", limit=page, start_after=entries[-1][0]).entries
    assert pages == machine.scan_prefix(b"").entries == sorted(TRICKY.items())


def test_scan_of_an_empty_state(directory: Path, machine_at: Opener) -> None:
    """Without keys a scan returns no pairs, and the revision of that state."""
    machine = machine_at(directory)
    assert machine.scan_prefix(b"") == ScanResult([], 0)
    machine.apply([(1, 1, fastsm.put(b"a", b"")), (2, 1, fastsm.delete(b"a"))])
    assert machine.scan_prefix(b"") == ScanResult([], 2)
    assert (list(machine.keys()), list(machine.items())) == ([], [])


def test_revision_is_last_applied(directory: Path, machine_at: Opener) -> None:
    """``revision`` counts entries that left no key, and what ``update_last_applied`` noted."""
    machine = machine_at(directory)
    fill(machine, {b"a": b""})
    machine.apply([(2, 1, fastsm.noop())])
    assert machine.scan_prefix(b"").revision == 2
    machine.update_last_applied((7, 2))
    assert machine.scan_prefix(b"a").revision == 7


def test_wrong_arguments_are_refused(directory: Path, machine_at: Opener) -> None:
    """A negative limit is a ValueError, a text prefix a TypeError; any bytes-like object is a prefix."""
    machine = machine_at(directory)
    fill(machine, TRICKY)
    with pytest.raises(ValueError, match="limit"):
        machine.scan_prefix(b"", limit=-1)
    for call in (lambda: machine.scan_prefix("a"), lambda: machine.scan_prefix(b"", start_after="a")):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(TypeError):
        machine.scan_prefix(b"", 3)  # limit is a keyword
    whole = machine.scan_prefix(b"a")
    assert machine.scan_prefix(bytearray(b"a")) == machine.scan_prefix(memoryview(b"a")) == whole


@pytest.mark.parametrize("count", [32_767, 32_768, 32_769, 100_000])
def test_scan_of_many_keys_is_sorted(directory: Path, machine_at: Opener, count: int) -> None:
    """Scans of more keys than are sorted in one piece are sorted too."""
    rng = random.Random(count)
    pairs = {rng.randbytes(rng.randrange(1, 12)): b"%d" % i for i in range(count)}
    while len(pairs) < count:
        pairs[rng.randbytes(11)] = b""
    machine = machine_at(directory)
    fill(machine, pairs)
    assert machine.scan_prefix(b"").entries == sorted(pairs.items())
    assert machine.scan_prefix(b"\xff").entries == expected_scan(pairs.items(), b"\xff")
    middle = sorted(pairs)[count // 2]
    found = machine.scan_prefix(b"", start_after=middle, limit=100).entries
    assert found == expected_scan(pairs.items(), b"", 100, middle)


short_keys = st.binary(max_size=3) | st.lists(st.sampled_from([0, 97, 255]), max_size=4).map(bytes)


@given(
    st.dictionaries(short_keys, st.binary(max_size=3)),
    short_keys,
    st.none() | st.integers(0, 5),
    st.none() | short_keys,
)
def test_scan_does_what_a_sorted_dict_does(
    pairs: dict[bytes, bytes], prefix: bytes, limit: int | None, after: bytes | None
) -> None:
    """Any keys, prefix, limit and start give what sorting a dict's pairs gives."""
    with memory_directory() as path, FastStateMachine(path) as machine:
        fill(machine, pairs)
        found = machine.scan_prefix(prefix, limit=limit, start_after=after)
        assert found == ScanResult(expected_scan(pairs.items(), prefix, limit, after), 1)


@pytest.mark.parametrize("seed", range(5))
def test_every_way_to_read_the_state_agrees_with_the_model(
    directory: Path, machine_at: Opener, seed: int
) -> None:
    """After a random history, and after reopening, all reads agree with the model."""
    history = History(seed, large=False)
    machine, model = machine_at(directory), MemoryStateMachine()
    written: dict[bytes, fastsm.LogId] = {}
    for entry in (history.entry() for _ in range(400)):
        before = dict(model.items())
        places = dict(machine.items())
        machine.apply([entry])
        model.apply([entry])
        assert places == before
        for key, value in model.items():
            # After a write of the same value only the machine knows the entry.
            if before.get(key) != value:
                written[key] = fastsm.LogId(entry.index, entry.term)
                assert machine.modified(key) == written[key]
    machine.close()
    machine = machine_at(directory)
    pairs = dict(model.items())
    assert dict(machine.items()) == pairs
    assert sorted(machine.keys()) == sorted(pairs)
    assert all(key in machine for key in pairs)
    assert b"no such key" not in machine
    assert machine.scan_prefix(b"key-1").entries == expected_scan(pairs.items(), b"key-1")
    for key, log_id in written.items():
        if key in pairs:
            modified = machine.modified(key)
            assert modified is not None
            assert modified >= log_id


def test_keys_and_items_come_in_the_order_of_their_entries(directory: Path, machine_at: Opener) -> None:
    """Iterators return keys in the order of the entries that last wrote them, the same on every replica."""
    machine = machine_at(directory)
    machine.apply([(i, 1, fastsm.put(b"%d" % i, b"")) for i in range(1, 6)])
    machine.apply([(6, 1, fastsm.put(b"2", b"again")), (7, 1, fastsm.delete(b"4"))])
    assert list(machine.keys()) == [b"1", b"3", b"5", b"2"]
    assert list(machine.items()) == [(b"1", b""), (b"3", b""), (b"5", b""), (b"2", b"again")]


# ---- held still ----------------------------------------------------------------------------------------


def test_iterators_stay_at_their_state(directory: Path, machine_at: Opener) -> None:
    """An iterator shows the state as of its call, whatever is applied, cleared or closed before it is exhausted."""
    machine = machine_at(directory)
    fill(machine, TRICKY)
    iterators = [machine.items() for _ in range(4)]
    taken: list[Pairs] = [[] for _ in iterators]

    def step() -> None:
        for iterator, pairs in zip(iterators, taken, strict=True):
            pairs.append(next(iterator))

    step()
    fill(machine, dict.fromkeys(TRICKY, b"overwritten"))
    step()
    machine.apply([(3, 1, fastsm.batch([fastsm.delete(key) for key in TRICKY]))])
    step()
    machine.clear()
    fill(machine, {b"new": b"new"})
    step()
    machine.close()
    step()
    for iterator, pairs in zip(iterators, taken, strict=True):
        assert sorted(pairs + list(iterator)) == sorted(TRICKY.items())


def test_an_iterator_is_taken_at_the_call(directory: Path, machine_at: Opener) -> None:
    """``keys()`` and ``items()`` of a stopped machine raise at the call, not at the first step."""
    machine = machine_at(directory)
    machine.stop()
    for call in (machine.keys, machine.items):
        with pytest.raises(NotRunningError):
            call()


def test_scans_next_to_a_writer_see_whole_chunks(directory: Path, machine_at: Opener) -> None:
    """Each scan is of one state: every key has the number of the chunk that the revision names."""
    machine = machine_at(directory)
    keys = [b"%05d" % i for i in range(40_000)]
    chunks = 25

    def write() -> None:
        for index in range(1, chunks + 1):
            machine.apply([(index, 1, fastsm.put_many(keys, [b"%d" % index] * len(keys)))])

    writer = threading.Thread(target=write)
    writer.start()
    revisions = set()
    while writer.is_alive():
        entries, revision = machine.scan_prefix(b"")
        assert {value for _, value in entries} == ({b"%d" % revision} if revision else set())
        assert [key for key, _ in entries] == (keys if revision else [])
        values = {value for _, value in machine.items()}
        assert len(values) <= 1
        revisions.add(revision)
    writer.join()
    assert machine.scan_prefix(b"", limit=1).revision == chunks
    assert len(revisions) > 1, "no scan fell between two chunks"


COLLECTED = """
    # The collector may run at any allocation, and with it Python code, so that other threads run: here a writer does,
    # and the first collection comes at the n-th allocation of each read.
    import faulthandler, gc, sys, threading
    import fastsm
    import numpy

    faulthandler.enable()
    machine = fastsm.FastStateMachine(sys.argv[1])
    each = 5000   # keys that each entry puts: so a state of n entries holds n * each
    active = False
    collections = 0

    def write():
        index = machine.last_applied().index + 1
        if index == 20:
            machine.clear()
            index = 1
        keys = [b"%d-%d" % (index, j) for j in range(each)]
        machine.apply([(index, 1, fastsm.put_many(keys, keys))])

    def between(phase, info):
        global active, collections
        if active and phase == "start":
            active = False
            collections += 1
            writer = threading.Thread(target=write)
            writer.start()
            writer.join()

    def check(name, result):
        if name == "count":
            assert result % each == 0, result
        elif name == "scan":
            assert all(key == value for key, value in result.entries)
            assert len(result.entries) == each * result.revision, (len(result.entries), result.revision)
        elif name == "columns":
            keys, offsets, values, ends = result
            assert (len(offsets) - 1) % each == 0
            assert bytes(keys) == bytes(values)
        elif name == "get_columns":
            data, offsets, found = result
            assert found.all() or not found.any()
            for j in range(0, len(wanted) if found.all() else 0, 100):
                assert bytes(data[offsets[j]:offsets[j + 1]]) == wanted[j]
        elif name == "get_many":
            assert result == wanted or result == [None] * len(wanted)
        else:
            pairs = list(result)
            assert len(pairs) % each == 0
            assert name == "keys" or all(key == value for key, value in pairs)

    wanted = [b"1-%d" % j for j in range(each)]
    reads = {
        "scan": lambda: machine.scan_prefix(b""),
        "count": lambda: machine.count(b"1"),
        "ordered": machine.ordered,
        "columns": machine.columns,
        "keys": machine.keys,
        "items": machine.items,
        "get_columns": lambda: machine.get_columns(wanted),
        "get_many": lambda: machine.get_many(wanted),
    }
    gc.callbacks.append(between)
    for name, read in reads.items():
        for threshold in range(1, 25, 4 if name in ("count", "ordered") else 1):
            write()
            gc.collect()
            active = True
            gc.set_threshold(threshold)
            try:
                result = read()
            finally:
                active = False
                gc.set_threshold(100_000)
            check(name, result)
            del result
    assert collections > 20, collections
    machine._check()
    machine.close()
    print("fine")
"""


def test_reads_are_of_one_state_whenever_the_collector_runs(directory: Path) -> None:
    """A chunk or a ``clear`` in the middle of a read's own allocations does not change what it reads."""
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COLLECTED), str(directory)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "fine\n"), ended.stderr[-3000:]


def test_iterators_that_are_dropped_give_their_memory_back(directory: Path, machine_at: Opener) -> None:
    """Iterators and scans leave no garbage that only the collector could find."""
    machine = machine_at(directory)
    fill(machine, TRICKY)
    machine.scan_prefix(b"")
    list(machine.items())
    gc.collect()
    gc.disable()
    try:
        for _ in range(100):
            iterator = machine.items()
            next(iterator)
            machine.scan_prefix(b"a")
        del iterator
        assert gc.collect() == 0
    finally:
        gc.enable()
