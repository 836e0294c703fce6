"""Threads: readers see complete chunks, and any two concurrent calls end in right results or typed errors.

All tests run in processes of their own, so that a crash is just a failure with a traceback.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from itertools import combinations_with_replacement
from pathlib import Path

import pytest

PATIENCE = 120

COMMON = """
    import random, sys, threading, time
    import numpy
    import fastsm
    from fastsm import FastsmError, FastStateMachine, NotRunningError

    path = sys.argv[1]
    GROUPS = 8
    MEMBERS = 6
    KEYS = [[b"group-%d:%d" % (group, i) for i in range(MEMBERS)] for group in range(GROUPS)]
    EVERY = [key for keys in KEYS for key in keys]
    ending = threading.Event()
    errors = []

    def chunk(index, size):
        # Every key of every group gets the number of the chunk, by entries of all kinds; sizes differ.
        pad = b"#" * size
        value = b"%d " % index + pad
        entries = []
        for group, keys in enumerate(KEYS):
            if group % 3 == 0:
                commands = [fastsm.put_many(keys, [value] * MEMBERS)]
            elif group % 3 == 1:
                commands = [fastsm.put(key, value) for key in keys]
            else:
                swaps = [(fastsm.delete(key), fastsm.compare_and_swap(key, None, value)) for key in keys]
                commands = [fastsm.batch(swap) for swap in swaps]
            entries += [(index + len(entries) + i, 1, command) for i, command in enumerate(commands)]
        return entries

    def number(value):
        return None if value is None else int(bytes(value).split(b" ")[0])

    def watched(function):
        def run():
            try:
                while not ending.is_set():
                    function()
            except BaseException as error:
                import traceback
                errors.append(traceback.format_exc())
                ending.set()
        return run

    def run_all(functions, seconds):
        threads = [threading.Thread(target=watched(function)) for function in functions]
        for thread in threads:
            thread.start()
        ending.wait(seconds)
        ending.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), f"{thread} hangs"
        assert not errors, errors[0]
"""

TORN_CHUNKS = """
    machine = FastStateMachine(path)
    reads = {}
    numbers = set()

    def one_number(name, values):
        found = set(values)
        assert len(found) == 1, (name, found)
        numbers.update(found)
        reads[name] = reads.get(name, 0) + 1

    def get():
        # Values of two calls may be of two chunks, but the later call never returns an older chunk's.
        before = number(machine.get(EVERY[0])) or 0
        for key in EVERY[1:]:
            now = number(machine.get(key)) or 0
            assert now >= before, (key, now, before)
            before = now
        reads["get"] = reads.get("get", 0) + 1

    def get_many():
        one_number("get_many", map(number, machine.get_many(EVERY)))

    def scan_prefix():
        entries, revision = machine.scan_prefix(b"group-")
        if entries:
            assert [key for key, _ in entries] == sorted(EVERY)
            one_number("scan_prefix", (number(value) for _, value in entries))
            first = number(entries[0][1])
            assert revision == first + len(chunk(first, 0)) - 1, (revision, first)

    def items():
        pairs = dict(machine.items())
        if pairs:
            assert set(pairs) == set(EVERY)
            one_number("items", map(number, pairs.values()))

    held = []
    def get_view():
        view = machine.get_view(random.choice(EVERY))
        if view is not None:
            held.append((view, bytes(view)))
            if len(held) > 100:
                for view, copy in held:
                    assert view == copy
                held.clear()
                reads["get_view"] = reads.get("get_view", 0) + 1

    def get_columns():
        data, offsets, found = machine.get_columns(EVERY)
        cells = [bytes(data[offsets[i]:offsets[i + 1]]) for i in range(len(EVERY))]
        assert found.all() or not found.any()
        if found.all():
            one_number("get_columns", map(number, cells))

    def columns():
        keys, key_offsets, values, offsets = machine.columns()
        if len(offsets) > 1:
            assert len(offsets) == len(EVERY) + 1
            one_number("columns", (number(values[offsets[i]:offsets[i + 1]]) for i in range(len(EVERY))))

    def stats():
        stats = machine.stats()
        assert stats.keys in (0, len(EVERY))
        assert stats.durable <= machine.last_applied()
        assert stats.live_bytes + stats.dead_bytes <= stats.log_bytes
        reads["stats"] = reads.get("stats", 0) + 1

    written = 0
    def write():
        global written
        index = machine.last_applied().index + 1
        entries = chunk(index, random.choice((0, 10, 300, 4000)))
        assert machine.apply(entries) == [True] * len(entries)
        written += 1
        if written % 20 == 0:
            machine.flush()

    run_all([get, get_many, scan_prefix, items, get_view, get_columns, columns, stats, write], 3)
    machine._check()
    last = machine.last_applied()
    machine.close()
    with FastStateMachine(path) as machine:
        assert machine.last_applied() == last
        machine._check()
    assert len(reads) == 8, reads
    assert len(numbers) > 10, numbers
    print("fine", written, "chunks,", reads)
"""

PAIRS = """
    names = sys.argv[2].split()
    machine = FastStateMachine(path)
    calls = {}

    def fill(machine):
        index = machine.last_applied().index + 1
        return machine.apply(chunk(index, random.choice((0, 2000, 20000))))

    def apply():
        try:
            results = fill(machine)
            assert set(results) in ({True}, {None}), results  # None: another writer was first
        except fastsm.OrderError:
            pass  # a clear came first

    def read():
        kind = random.randrange(8)
        if kind == 0:
            values = machine.get_many(EVERY)
            assert len({number(value) for value in values}) == 1, values
        elif kind == 1:
            values = {number(value) for _, value in machine.scan_prefix(b"").entries}
            assert len(values) <= 1, values
        elif kind == 2:
            pairs = list(machine.items())
            assert len({number(value) for _, value in pairs}) <= 1
        elif kind == 3:
            view = machine.get_view(EVERY[0])
            assert view is None or number(view) > 0
        elif kind == 4:
            number(machine.get(EVERY[0]))
        elif kind == 5:
            data, offsets, found = machine.get_columns(EVERY)
            assert found.all() or not found.any()
        elif kind == 6:
            _, _, values, offsets = machine.columns()
            assert len({number(values[offsets[i]:offsets[i + 1]]) for i in range(len(offsets) - 1)}) <= 1
        else:
            stats = machine.stats()
            assert stats.keys in (0, len(EVERY)), stats
            machine.entry_terms(numpy.arange(5, dtype=numpy.uint64))
            machine.membership(), machine.durable(), machine.last_applied()

    def flush():
        before = machine
        mark = before.last_applied()
        before.flush()
        # Durable, unless there was a clear meanwhile.
        assert "clear" in names or before.durable() >= mark

    def clear():
        machine.clear()

    def close():
        # Closes the machine that the other threads use, and opens it again for them.
        global machine
        time.sleep(random.random() / 200)
        machine.close()
        machine = FastStateMachine(path)
        if machine.last_applied().index == 0:
            fill(machine)

    def verify():
        machine.verify()

    lock = threading.Lock()

    def tolerant(name, function):
        def run():
            if name == "close":
                # Two owners cannot both open it: they take turns, as they would in a program.
                with lock:
                    function()
            else:
                try:
                    function()
                except NotRunningError:
                    assert "close" in names
            calls[name] = calls.get(name, 0) + 1
        return run

    fill(machine)
    functions = {"apply": apply, "flush": flush, "clear": clear, "close": close, "verify": verify, "read": read}
    run_all([tolerant(name, functions[name]) for name in names for _ in range(1 + (len(set(names)) > 1))], 0.5)
    if not machine.is_running():
        machine = FastStateMachine(path)
    machine._check()
    values = {number(value) for value in machine.get_many(EVERY)}
    assert len(values) == 1
    machine.verify()
    state = dict(machine.items())
    machine.close()
    with FastStateMachine(path) as machine:
        machine._check()
        assert dict(machine.items()) == state
    assert set(calls) == set(names), calls
    print("fine", calls)
"""


def run(program: str, *arguments: str) -> None:
    """Run a program in a process of its own; a crash, an error or a hang is a failure."""
    source = textwrap.dedent(COMMON) + textwrap.dedent(program)
    command = [sys.executable, "-X", "faulthandler", "-c", source, *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"it hangs: {expired.stderr!r}")
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.startswith("fine"), ended.stdout
    print(ended.stdout)


def test_no_reader_sees_a_torn_chunk(directory: Path) -> None:
    """Eight readers of every kind, during writes, always see the number of one chunk in all keys of a group."""
    run(TORN_CHUNKS, str(directory))


PAIRS_OF_CALLS = list(combinations_with_replacement(("apply", "flush", "clear", "close", "verify", "read"), 2))


@pytest.mark.parametrize("names", PAIRS_OF_CALLS, ids=" and ".join)
def test_any_two_calls_at_once_end_well(directory: Path, names: tuple[str, str]) -> None:
    """Two methods, each called by several threads, give right results or ``NotRunningError``, and a sound state."""
    run(PAIRS, str(directory), " ".join(names))
