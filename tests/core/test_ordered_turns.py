"""Ordered reads, and what may happen between two pieces of their work: on other threads, and on top of their own.

The order is built, and many new keys are sorted into it, without the GIL and in pieces. Between two pieces the thread
runs signal handlers: the tests replace them by a function that is called between any two pieces, and so at the same
moments in every run.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import Answer, FastStateMachine
from support.faulty import PATIENCE
from support.inside import inside

Opener = Callable[..., FastStateMachine]
Pairs = list[tuple[bytes, bytes]]
pytestmark = pytest.mark.usefixtures("a_hang_ends")
KEYS = [b"k%05d" % (i * 7919 % 100_003) for i in range(8_000)]
NEW = [b"n%05d" % (i * 7919 % 100_003) for i in range(2_000)]


def applied(machine: FastStateMachine, *commands: bytes) -> list[Any]:
    """Apply one chunk, with an entry for each command."""
    first = machine.last_applied().index + 1
    return list(machine.apply([(index, 1, command) for index, command in enumerate(commands, first)]))


def put_all(machine: FastStateMachine, keys: list[bytes], value: bytes = b"v") -> None:
    applied(machine, fastsm.put_many(keys, [value] * len(keys)))


def work_on_order(machine: FastStateMachine, work: str, tick: Callable[[], object] | None) -> None:
    """Builds the order, or sorts many new keys in, with a call of `tick` between two pieces."""
    if work == "build":
        inside(machine).order().forget()
    else:
        put_all(machine, NEW)
        assert inside(machine).order().fresh_keys == len(NEW)
    inside(machine).order_next(inside(machine).index, inside(machine).log.mapping, tick)


# ---- at any moment of the work ---------------------------------------------------------------------------

class Meddler:
    """What happens in between: reads are compared with the state of their moment, iterators at the end."""

    def __init__(self, machine: FastStateMachine, root: Path) -> None:
        self.machine, self.root = machine, root
        self.held: list[tuple[Iterator[tuple[bytes, bytes]], Pairs]] = []
        self.closed = False

    def state(self) -> Pairs:
        return sorted(self.machine.items())

    def scan(self) -> None:
        assert self.machine.scan().entries == self.state()

    def count(self) -> None:
        assert self.machine.count(b"k1", b"n5") == sum(b"k1" <= key < b"n5" for key, _ in self.state())

    def iterate(self) -> None:
        pairs = self.machine.ordered(reverse=True)
        first = next(pairs)
        expected = self.state()[::-1]
        assert first == expected[0]
        self.held.append((pairs, expected[1:]))

    def put_few(self) -> None:
        put_all(self.machine, [b"a", b"k00000+", KEYS[7], b"z"], b"newer")

    def put_many(self) -> None:
        put_all(self.machine, [b"m%05d" % i for i in range(3_000)])

    def delete(self) -> None:
        applied(self.machine, fastsm.batch([fastsm.delete(key) for key in [*KEYS[::3], *NEW[::3]]]))
        put_all(self.machine, KEYS[:30:3])

    def delete_range(self) -> None:
        (answer,) = applied(self.machine, fastsm.delete_range(b"k02", b"n02"))
        assert answer.ok

    def build(self) -> None:
        inside(self.machine).order().forget()
        self.machine.scan(limit=1)

    def compact(self) -> None:
        self.machine.compact()

    def install(self) -> None:
        self.machine.write_snapshot(self.root / "snapshot")
        put_all(self.machine, [b"lost"])
        self.machine.install_snapshot(None, self.root / "snapshot", allow_older=True)

    def reset(self) -> None:
        self.machine.clear()
        put_all(self.machine, KEYS[::2])

    def close(self) -> None:
        self.machine.close()
        self.closed = True


MEDDLING = [name for name in vars(Meddler) if not name.startswith("_") and name != "state"]


@pytest.mark.parametrize("work", ["build", "sort in"])
@pytest.mark.parametrize("place", ["on top", "on another thread"])
@pytest.mark.parametrize("what", MEDDLING)
def test_whatever_comes_between_two_pieces(
    tmp_path: Path, machine_at: Opener, what: str, place: str, work: str
) -> None:
    """The result is the same as without it, no thread waits for its own frames, and the order then has all keys."""
    for moment in itertools.count():
        machine = machine_at(tmp_path / f"{moment}", auto_compact=False, retain_entries=0)
        put_all(machine, KEYS)
        machine.scan(limit=1)
        came: list[int] = []
        meddler = Meddler(machine, tmp_path)
        errors: list[BaseException] = []

        def meddle(meddler: Meddler = meddler, errors: list[BaseException] = errors) -> None:
            try:
                getattr(meddler, what)()
            except BaseException as error:
                errors.append(error)

        def tick(meddle: Callable[[], None] = meddle, came: list[int] = came, moment: int = moment) -> None:
            came.append(len(came))
            if came[-1] != moment:
                return
            if place == "on top":
                meddle()
                return
            thread = threading.Thread(target=meddle)
            thread.start()
            thread.join()  # a handler may wait for any other thread

        work_on_order(machine, work, tick)
        assert errors == []
        if len(came) <= moment:  # the pivots of the sort are drawn, and with them how many pieces there are
            assert moment > 1
            break
        if not meddler.closed:
            meddler.scan()
            inside(machine).check()
            machine.close()
        for pairs, expected in meddler.held:
            assert list(pairs) == expected


@pytest.mark.parametrize("work", ["build", "sort in"])
def test_a_handler_on_top_of_a_read_that_writes_next_to_another_writer(
    directory: Path, machine_at: Opener, work: str
) -> None:
    """The other writer deletes a range in its turn, and needs the order that the interrupted read is building."""
    machine = machine_at(directory, auto_compact=False)
    put_all(machine, KEYS)
    machine.scan(limit=1)
    results: list[Any] = []
    writer = threading.Thread(target=lambda: results.extend(applied(machine, fastsm.delete_range(b"k", b"k01"))))

    def handle() -> None:
        if writer.ident is not None:
            return
        writer.start()
        while inside(machine).turns.is_free() and not results:
            time.sleep(0.001)
        machine.apply([(machine.last_applied().index + 1, 1, fastsm.noop())])

    in_range = sum(key < b"k01" for key in KEYS)
    work_on_order(machine, work, handle)
    writer.join()
    assert results == [Answer(True, in_range)]
    assert machine.scan().entries == sorted(machine.items())


def test_many_threads_that_wait_for_a_handler_which_waits_for_them(directory: Path, machine_at: Opener) -> None:
    """Threads that wait for a handler build the order themselves; the first to finish finishes it for all."""
    machine = machine_at(directory, auto_compact=False)
    put_all(machine, KEYS)
    machine.scan(limit=1)
    found: list[int] = []
    readers = [threading.Thread(target=lambda: found.append(len(machine.scan().entries))) for _ in range(5)]

    def handle() -> None:
        if not found:
            for reader in readers:
                reader.start()
            put_all(machine, NEW)
            for reader in readers:
                reader.join()

    work_on_order(machine, "build", handle)
    assert set(found) <= {len(KEYS), len(KEYS) + len(NEW)}
    assert len(found) == 5
    assert machine.scan().entries == sorted(machine.items())


# ---- one iterator, many threads --------------------------------------------------------------------------

def test_threads_that_share_an_iterator_get_each_pair_once(directory: Path, machine_at: Opener) -> None:
    """All of them reach the end at the same time; the tree that only the iterator holds is freed with it."""
    machine = machine_at(directory)
    put_all(machine, KEYS)
    for _ in range(15):
        pairs = machine.ordered()
        inside(machine).order().forget()  # the tree is the iterator's own by now
        taken: list[Pairs] = [[] for _ in range(4)]
        begin = threading.Barrier(len(taken))

        def take(
            into: Pairs, pairs: Iterator[tuple[bytes, bytes]] = pairs, begin: threading.Barrier = begin
        ) -> None:
            begin.wait()
            into.extend(pairs)
            assert next(pairs, None) is None

        threads = [threading.Thread(target=take, args=(into,)) for into in taken]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(pair for some in taken for pair in some) == sorted((key, b"v") for key in KEYS)
        assert all(some == sorted(some) for some in taken)


# ---- an arena that is remapped ---------------------------------------------------------------------------

OUTGROWN = """
    import gc, sys, threading, weakref
    import fastsm, fastsm.disk.mapping

    fastsm.disk.mapping.RESERVATIONS = ()  # as under a limit of address space: only the needed size is reserved
    root = sys.argv[1]

    def put(machine, count, value):
        index = machine.last_applied().index + 1
        keys = [b"%d-%05d" % (index, i) for i in range(count)]
        machine.apply([(index, 1, fastsm.put_many(keys, [value] * count))])

    def outgrow(machine):
        for _ in range(3):
            put(machine, 4_000, bytes(200))

    def check(machine):
        pairs = machine.items()
        assert machine.scan().entries == sorted(pairs)
        assert machine.count(b"1") == machine.len()

    # ---- while an order is made: the first collection falls on the n-th allocation, and other threads go on

    active = False
    collections = 0

    def between(phase, info):
        global active, collections
        if active and phase == "start":
            active = False
            collections += 1
            writer = threading.Thread(target=outgrow, args=(machine,))
            writer.start()
            writer.join()

    gc.callbacks.append(between)
    for threshold in range(1, 20):
        machine = fastsm.FastStateMachine(f"{root}/{threshold}", auto_compact=False)
        put(machine, 10, b"v")
        gc.collect()
        active = True
        gc.set_threshold(threshold)
        machine.scan(limit=1)
        active = False
        gc.set_threshold(100_000)
        check(machine)
        machine._check()
        machine.close()
    gc.callbacks.remove(between)
    assert sys.version_info >= (3, 12) or collections > 5, collections

    # ---- between the building of the next generation's order and the step to it

    order_next = fastsm.FastStateMachine._order_next
    ended = []

    def and_outgrow(self, index, mapping, tick=None):
        order_next(self, index, mapping, tick)
        ended.append(weakref.ref(mapping, lambda _: check(self)))
        outgrow(self)

    fastsm.FastStateMachine._order_next = and_outgrow
    machine = fastsm.FastStateMachine(f"{root}/compacted", auto_compact=False, retain_entries=0, ordered=True)
    stop = False
    def read():
        while not stop:
            entries, revision = machine.scan(limit=2000)
            assert machine.get_many([key for key, _ in entries]) == [value for _, value in entries]
    put(machine, 1000, b"v")
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(5):
        machine.compact()
        check(machine)
    stop = True
    for reader in readers:
        reader.join()
    assert [ref() for ref in ended[:-1]] == [None] * 4
    machine._check()
    print("fine")
"""


def test_an_order_in_an_arena_that_is_mapped_anew(tmp_path: Path) -> None:
    """A log outgrows its address space while its order is made, or while the next generation's is waiting."""
    program = ["-X", "faulthandler", "-W", "ignore::ResourceWarning", "-c", textwrap.dedent(OUTGROWN)]
    ended = subprocess.run(
        [sys.executable, *program, str(tmp_path)], capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    assert (ended.returncode, ended.stdout, "Traceback" in ended.stderr) == (0, "fine\n", False), ended.stderr[-3000:]
