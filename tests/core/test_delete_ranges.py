"""Deleting ranges: completely or not at all, in any kind of command, with any number of keys."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsm
from fastsm import Answer, FastStateMachine, MemoryStateMachine
from fastsm.types import Call
from support.faulty import crash_copy, memory_directory
from support.inside import inside

Opener = Callable[..., FastStateMachine]
MANY = 20_000


def applied(machine: FastStateMachine | MemoryStateMachine, *commands: bytes) -> list[object]:
    """Apply one chunk, with an entry for each command."""
    first = machine.last_applied().index + 1
    return list(machine.apply([(index, 1, command) for index, command in enumerate(commands, first)]))


def put_all(machine: FastStateMachine, keys: list[bytes]) -> None:
    applied(machine, fastsm.put_many(keys, [b"value"] * len(keys)))


def commands_for(kind: str) -> bytes:
    """A command that deletes every key that starts with `k`, and puts one key."""
    delete, put = fastsm.delete_prefix(b"k"), fastsm.put(b"done", b"")
    if kind == "batch":
        return fastsm.batch([delete, put])
    if kind == "transaction":
        return fastsm.transaction([fastsm.absent(b"done")], [put, delete])
    return delete


KINDS = ("command", "batch", "transaction")
ANSWERS = {"command": MANY, "batch": [MANY, True], "transaction": [True, MANY]}

# ---- the model -------------------------------------------------------------------------------------------

short = st.binary(max_size=2) | st.lists(st.sampled_from([0, 97, 98, 255]), max_size=3).map(bytes)
bound = st.none() | short
plain = st.one_of(
    st.builds(fastsm.put, short, st.binary(max_size=1)), st.builds(fastsm.delete, short),
    st.builds(fastsm.delete_range, bound, bound), st.builds(fastsm.delete_prefix, short),
)  # fmt: skip
command = st.one_of(
    plain, st.lists(plain, max_size=5).map(fastsm.batch),
    st.builds(
        lambda key, then, otherwise: fastsm.transaction([fastsm.exists(key)], then, otherwise),
        short, st.lists(plain, max_size=4), st.lists(plain, max_size=4)),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(command, min_size=1, max_size=6), max_size=6), st.booleans(), bound)
def test_any_chunks_do_what_the_model_does(chunks: list[list[bytes]], reads: bool, start: bytes | None) -> None:
    """In chunks, batches and transactions, with puts and deletes of the same keys; iterators do not change."""
    model = MemoryStateMachine()
    with memory_directory() as path, FastStateMachine(path) as machine:
        iterators = []
        for chunk in chunks:
            if reads:
                assert machine.scan(start) == model.scan(start)
                iterators.append((machine.ordered(start), model.scan(start).entries))
            assert applied(machine, *chunk) == applied(model, *chunk)
            assert list(machine.items()) == model.items()
        assert machine.scan(start).entries == model.scan(start).entries
        inside(machine).check()
        for iterator, expected in iterators:
            assert list(iterator) == expected


# ---- many keys -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_never_sees_half_of_it(directory: Path, machine_at: Opener, kind: str) -> None:
    """Counts, scans, gets and iterators during deletes of many keys see all of the keys, or none."""
    machine = machine_at(directory, auto_compact=False)
    keys = [b"k%05d" % i for i in range(MANY)]
    first, last = keys[0], keys[-1]
    wrong: list[object] = []
    moments = set()
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            count = machine.count(b"k", b"l")
            some = machine.get_many([first, last])
            ends = [machine.scan(prefix=b"k", limit=1, reverse=way).entries for way in (False, True)]
            left = sum(1 for _ in machine.ordered(prefix=b"k"))
            moments.add(count)
            if {count, left} - {0, MANY} or some.count(None) == 1 or any(len(end) > 1 for end in ends):
                wrong.append((count, left, some))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(2):
            put_all(machine, keys)
            results = applied(machine, commands_for(kind))
            assert machine.count(prefix=b"k") == 0
            applied(machine, fastsm.delete(b"done"))
            assert results == [Answer(True, ANSWERS[kind])]
    finally:
        ended.set()
        for reader in readers:
            reader.join()
    assert not wrong
    assert moments <= {0, MANY}
    inside(machine).check()


def test_a_deleted_range_takes_one_record_for_each_key(directory: Path, machine_at: Opener) -> None:
    """The log grows by a delete record for each key, and not for absent keys."""
    machine = machine_at(directory, auto_compact=False, ordered=True)
    keys = [b"k%07d" % i for i in range(MANY)]
    put_all(machine, keys)
    log = inside(machine).log
    before = log.end
    assert applied(machine, fastsm.delete_range(b"k", b"l")) == [Answer(True, MANY)]
    record = 16 + 8
    assert MANY * record <= log.end - before <= MANY * record + 100
    before = log.end
    assert applied(machine, fastsm.delete_range(b"k", b"l")) == [Answer(True, 0)]
    assert log.end - before < 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_torn_frame_leaves_all_of_the_keys(tmp_path: Path, machine_at: Opener, kind: str) -> None:
    """If a crash cuts any part off the command's frame, no key is deleted."""
    machine = machine_at(tmp_path / "state", auto_compact=False)
    keys = [b"k%04d" % i for i in range(2_000)]
    put_all(machine, keys)
    log = inside(machine).log
    begin = log.end
    applied(machine, commands_for(kind))
    end = log.end
    dice = random.Random(kind)
    for number, kept in enumerate([8, *(dice.randrange(begin, end - 1) - begin for _ in range(6)), end - begin]):
        copy = crash_copy(tmp_path / "state", tmp_path / f"{number}")
        content = (copy / "log-1").read_bytes()
        (copy / "log-1").write_bytes(content[: begin + kept] + bytes(len(content) - begin - kept))
        other = machine_at(copy)
        whole = not any(content[begin + kept : end])
        assert other.count(b"k", b"l") == (0 if whole else len(keys))
        assert (b"done" in other) == (whole and kind != "command")
        other.close()


def test_a_signal_ends_a_long_delete_of_a_range(directory: Path, machine_at: Opener) -> None:
    """If its handler raises, all keys remain, also those of the command's own chunk; the next try deletes them."""
    machine = machine_at(directory, auto_compact=False, ordered=True)
    keys = [b"k%06d" % i for i in range(5 * MANY)]
    put_all(machine, keys)
    machine.count(b"k")
    last = machine.last_applied()

    class Interrupted(Exception):
        pass

    def handler(*_: object) -> None:
        assert machine.get(keys[-1]) == b"value"
        with pytest.raises(fastsm.ReentryError):
            machine.apply([])
        raise Interrupted

    chunk = [(last.index + 1, 1, fastsm.put(b"k", b"")), (last.index + 2, 1, fastsm.delete_prefix(b"k"))]
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        with pytest.raises(Interrupted):
            machine.apply(chunk)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert machine.last_applied() == last
    assert machine.count(b"k") == len(keys)
    assert machine.apply(chunk)[1] == Answer(True, len(keys) + 1)


MEMORY = """
import resource, sys, fastsm
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
count = int(sys.argv[2])
machine = fastsm.FastStateMachine(sys.argv[1], auto_compact=False, ordered=True)
for first in range(0, count, 1000):
    keys = [b"k%015d" % i for i in range(first, first + 1000)]
    machine.apply([(first // 1000 + 1, 1, fastsm.put_many(keys, [b""] * 1000))])
machine.count(b"k")
before = peak()
(answer,) = machine.apply([(machine.last_applied().index + 1, 1, fastsm.delete_prefix(b"k"))])
print((peak() - before) / count, answer.value)
"""


def test_memory_of_a_deleted_range_is_in_proportion_to_the_keys(tmp_path: Path) -> None:
    """A command that deletes many keys takes about a hundred bytes per key until it is applied, without objects."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "state"), "200000"], capture_output=True, text=True, check=True)
    each, keys = done.stdout.split()
    assert int(keys) == 200_000
    assert float(each) < 200


# ---- many in one chunk -------------------------------------------------------------------------------------


@fastsm.procedure
def take_first(tx: Any, payload: bytes) -> bytes | None:
    """Removes the first key that starts with the payload; the last one, where it ends with a minus."""
    found = tx.scan(prefix=payload.rstrip(b"-"), limit=1, reverse=payload.endswith(b"-"))
    if not found:
        return None
    tx.delete(found[0][0])
    key: bytes = found[0][0]
    return key


NUMBER = 2_000
EACH_FEW = 40  # keys that are looked at in vain for each command
PUTS = [fastsm.put(b"k%04d" % i, b"") for i in range(NUMBER)]
PATTERNS = {
    "the first, one by one": [fastsm.call("take_first", b"k")] * NUMBER,
    "the last, one by one": [fastsm.call("take_first", b"k-")] * NUMBER,
    "put and taken in turns": [each for put in PUTS for each in (put, fastsm.call("take_first", b"k"))],
    "ranges": [fastsm.delete_prefix(b"k")] * NUMBER,
    "ranges of one batch": [fastsm.batch([fastsm.delete_prefix(b"k")] * NUMBER)],
    "ranges that overlap": [fastsm.delete_range(b"k%04d" % i, None) for i in reversed(range(NUMBER))],
    "puts and ranges of one batch": [
        fastsm.batch([each for put in PUTS for each in (put, fastsm.delete_prefix(b"k"))])],
}


@pytest.mark.parametrize("commands", PATTERNS.values(), ids=PATTERNS.keys())
def test_deleted_keys_are_not_passed_again_and_again(
    directory: Path, machine_at: Opener, commands: list[bytes]
) -> None:
    """The cost of a chunk, counted in keys passed, grows with its commands and keys, not with their product."""
    machine = machine_at(directory, procedures=[take_first])
    put_all(machine, [b"k%04d" % i for i in range(NUMBER)])
    applied(machine, *commands)
    assert inside(machine).looked_past() < EACH_FEW * NUMBER
    assert machine.count(b"k") in (0, NUMBER)  # puts between the ranges restore all keys


@pytest.mark.parametrize("seed", range(12))
def test_many_ranges_of_one_chunk_do_what_the_model_does(directory: Path, machine_at: Opener, seed: int) -> None:
    """Chunks of hundreds of entries, many of them refused after they removed something, do what the model does."""
    dice = random.Random(seed)
    keys = [b"%03d" % i for i in range(400)]

    def some() -> bytes:
        low, high = sorted(dice.choices([None, *keys], k=2), key=lambda key: key or b"")
        kind = dice.randrange(6)
        if kind == 0:
            return fastsm.delete_range(low, high if dice.random() < 0.5 else low and low + b"\xff")
        if kind == 1:
            return fastsm.put(dice.choice(keys), b"v")
        return fastsm.delete(dice.choice(keys)) if kind == 2 else fastsm.call(
            "take_first", dice.choice((b"", b"-", b"1", b"2-", b"11")))

    def refused() -> bytes:
        members = [each for each in (some() for _ in range(9)) if not isinstance(fastsm.decode(each), Call)]
        return fastsm.batch([*members, fastsm.compare_and_swap(b"x", b"no", b"")])

    machine, model = machine_at(directory, procedures=[take_first]), MemoryStateMachine(procedures=[take_first])
    for _ in range(6):
        mixed = [some() if dice.random() < 0.8 else refused() for _ in range(250)]
        for commands in ([fastsm.put_many(keys, keys)], mixed):
            assert applied(machine, *commands) == applied(model, *commands)
        assert machine.scan() == model.scan()
        assert machine.state_checksum() == model.state_checksum()
