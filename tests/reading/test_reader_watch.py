"""`Reader.watch`: the owner's changes as another process sees them, through everything that an owner does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastsm
from fastsm import (
    Change,
    CompactedError,
    FastStateMachine,
    LogId,
    MemoryStateMachine,
    NotRunningError,
    Reader,
    ReentryError,
    delete,
    put,
)
from fastsm.disk import published
from fastsm.disk.files import Directory
from fastsm.reading.watching import Tail
from support.inside import inside
from support.publishing import checksum_of

KEYS = [b"", b"a", b"ab", b"b", b"ba"]
PREFIXES = [b"", b"a", b"b", b"x"]
ALL = 10**6


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[FastStateMachine]:
    """An owner, with one entry."""
    with FastStateMachine(tmp_path / "state", auto_compact=False, retain_entries=0) as opened:
        opened.apply([(1, 1, put(b"a", b"1"))])
        yield opened


def change(index: int, value: bytes | None, key: bytes = b"a") -> Change:
    return Change(index, 1, key, value)


# ---- what it tells -----------------------------------------------------------------------------------


def test_a_watch_continues_without_a_refresh_of_its_reader(machine: FastStateMachine, reader: Reader) -> None:
    """A watch delivers what was applied, while the reader's state does not change."""
    watch = reader.watch(b"a")
    machine.apply([(2, 1, put(b"a", b"2")), (3, 1, put(b"b", b"3")), (4, 1, delete(b"a"))])
    assert watch.read() == [change(2, b"2"), change(4, None)]
    assert reader.last_applied() == (1, 1)
    assert reader.get(b"a") == b"1"
    assert reader.watch(start=1).read(2) == [change(1, b"1"), change(2, b"2")]
    assert watch.read(timeout=0) == []


def test_a_durable_watch_tells_what_is_durable(machine: FastStateMachine, reader: Reader) -> None:
    """What is applied but not flushed yet is not delivered."""
    machine.flush()
    watch = reader.watch(durable=True)
    machine.apply([(2, 1, put(b"a", b"2"))])
    assert watch.read(timeout=0) == []
    machine.flush()
    assert watch.read() == [change(2, b"2")]
    machine.update_last_applied((3, 1))
    machine.apply([(4, 2, put(b"a", b"4"))])
    assert watch.read(timeout=0) == []
    machine.flush()
    assert watch.read(timeout=0) == [Change(4, 2, b"a", b"4")]


def test_positions_mean_the_same_in_owner_and_reader(machine: FastStateMachine, reader: Reader) -> None:
    """A watch of either continues from a position of the other, even in the middle of an entry."""
    machine.apply([(2, 1, fastsm.batch([put(b"a", b"2"), put(b"b", b"2"), put(b"c", b"2")]))])
    watch = reader.watch(start=2)
    first = watch.read(2)
    rest = machine.watch(start=watch.position).read(timeout=0)
    assert [one.key for one in first + rest] == [b"a", b"b", b"c"]
    theirs = machine.watch(start=2)
    assert next(theirs).key == b"a"
    assert [one.key for one in reader.watch(start=theirs.position).read()] == [b"b", b"c"]


# ---- compared with the model -------------------------------------------------------------------------

STEPS = (
    "apply", "apply", "apply", "apply", "apply", "update", "flush", "compact", "snapshot", "install", "reset", "reopen",
    "kill",
)  # fmt: skip


class Follower:
    """A watch of a reader, and what it has delivered. It is lost if entries are gone."""

    def __init__(self, reader: Reader, prefix: bytes, durable: bool, after: int) -> None:
        self.watch: Any = reader.watch(prefix, start=after + 1, durable=durable)
        self.prefix, self.durable, self.after = prefix, durable, after
        self.told: list[Change] = []

    def expected(self, changes: list[Change]) -> list[Change]:
        return [one for one in changes if one.index > self.after and one.key.startswith(self.prefix)]


class Life:
    """An owner, the model's list of its changes, and watches of two readers."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.dice = random.Random(seed)
        self.machine = self.open()
        self.model = MemoryStateMachine()
        self.all = self.model.watch(start=1)
        self.changes: list[Change] = []
        self.base = 0
        self.readers = [Reader(root / "state") for _ in range(2)]
        self.followers: list[Follower] = []
        self.lost = self.compared = 0

    def open(self) -> FastStateMachine:
        return FastStateMachine(self.root / "state", auto_compact=False, retain_entries=3)

    def command(self) -> bytes:
        key = self.dice.choice(KEYS)
        return self.dice.choice([
            put(key, os.urandom(self.dice.choice((0, 5, 50)))), delete(key), fastsm.noop(), fastsm.delete_prefix(key),
            fastsm.batch([put(key, b"x"), put(b"ab", b"y"), delete(key)])])  # fmt: skip

    def chunk(self) -> list[tuple[int, int, bytes]]:
        index, term = self.model.last_applied()
        term = max(term, 1) + (self.dice.random() < 0.1)
        return [(index + i, term, self.command()) for i in range(1, self.dice.choice((1, 2, 5)) + 1)]

    def take(self, step: str) -> None:
        if step == "apply":
            chunk = self.chunk()
            self.machine.apply(chunk)
            self.model.apply(chunk)
        elif step == "update":
            index, term = self.model.last_applied()
            for one in (self.machine, self.model):
                one.update_last_applied(LogId(index + 1, max(term, 1)))
            self.machine.flush()  # a kill would lose it
        elif step == "flush":
            self.machine.flush()
        elif step == "compact":
            self.machine.compact()
        elif step in ("install", "reset"):
            self.replace(step)
        elif step == "reopen":
            self.machine.close()
            self.machine = self.open()
        elif step == "kill":
            self.kill()
        self.changes += self.all.read(ALL, timeout=0)
        self.base = self.machine.stats().base.index

    def replace(self, step: str) -> None:
        if step == "install":
            self.model.write_snapshot(self.root / "snapshot")
            for one in (self.machine, self.model):
                one.install_snapshot(None, self.root / "snapshot")
        else:
            self.machine.clear()
            self.model.clear()
        for follower in self.followers:
            with pytest.raises(CompactedError) as caught:
                follower.watch.read(timeout=0)
            assert caught.value.oldest == self.machine.stats().base.index + 1
        self.followers, self.changes = [], []
        self.all = self.model.watch()

    def kill(self) -> None:
        """Make another process the owner for a few chunks, which ends by SIGKILL."""
        self.machine.close()
        chunks = []
        for _ in range(self.dice.randrange(4)):
            chunks.append(self.chunk())
            self.model.apply(chunks[-1])
        pid = os.fork()
        if pid == 0:
            machine = self.open()
            for chunk in chunks:
                machine.apply(chunk)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        if self.dice.random() < 0.5:
            self.read_all()  # while there is no owner
        self.machine = self.open()

    def begin(self) -> None:
        reader = self.dice.choice(self.readers)
        after = max(self.base, self.model.last_applied().index - self.dice.randrange(4))
        self.followers.append(Follower(reader, self.dice.choice(PREFIXES), self.dice.random() < 0.3, after))
        if len(self.followers) > 6:
            self.followers.pop(0).watch.close()

    def read_all(self) -> None:
        for follower in self.followers[:]:
            if self.dice.random() < 0.3:
                continue
            limit = self.dice.choice((1, 3, ALL))
            place = follower.watch.position
            self.changes += self.all.read(ALL, timeout=0)
            error = None
            try:
                found = follower.watch.read(limit, timeout=0)
            except CompactedError as caught:
                error = caught
            if error is not None:
                assert place.index <= self.base, error
                assert error.oldest == self.base + 1
                self.followers.remove(follower)
                self.lost += 1
                continue
            follower.told += found
            expected = follower.expected(self.changes)
            assert follower.told == expected[: len(follower.told)]
            if len(found) < limit and not follower.durable:
                assert follower.told == expected
            self.compared += len(found)


@pytest.mark.parametrize("seed", range(6))
def test_watches_agree_with_the_models_list_of_changes(tmp_path: Path, seed: int) -> None:
    """With random compactions, installs, resets, restarts and kills, each change is delivered once, in order."""
    life = Life(tmp_path, seed)
    for _ in range(250):
        life.take(life.dice.choice(STEPS))
        if life.dice.random() < 0.4:
            life.begin()
        if life.dice.random() < 0.6:
            life.read_all()
    life.machine.flush()
    for follower in life.followers:
        try:
            follower.told += follower.watch.read(ALL, timeout=0)
        except CompactedError:
            continue
        assert follower.told == follower.expected(life.changes)
    assert life.compared > 100
    life.machine.close()
    for reader in life.readers:
        reader.close()


# ---- what an owner does meanwhile --------------------------------------------------------------------


def test_a_reset_is_told_to_a_watch_that_has_told_everything(machine: FastStateMachine, reader: Reader) -> None:
    """Every read after a reset raises, even if the new state has as many entries."""
    watch = reader.watch()
    machine.clear()
    machine.apply([(1, 1, put(b"a", b"1"))])
    for _ in range(2):
        with pytest.raises(CompactedError) as caught:
            watch.read(timeout=0)
        assert caught.value.oldest == 1
    assert reader.watch(start=1).read() == [change(1, b"1")]


def test_a_compaction_of_what_was_not_told_is_an_error(machine: FastStateMachine, reader: Reader) -> None:
    """A watch that is ahead of the base continues; one that is not, and a new one starting there, raise."""
    late, early = reader.watch(), reader.watch(start=1)
    machine.apply([(2, 1, put(b"a", b"2"))])
    assert late.read() == [change(2, b"2")]
    machine.compact()
    machine.apply([(3, 1, put(b"a", b"3"))])
    assert late.read() == [change(3, b"3")]
    with pytest.raises(CompactedError) as caught:
        early.read(timeout=0)
    assert caught.value.oldest == 3
    with pytest.raises(CompactedError):
        reader.watch(start=2)


def test_a_restored_directory_is_another_state(machine: FastStateMachine, tmp_path: Path) -> None:
    """If the directory was replaced by another one, a watch raises."""
    with FastStateMachine(tmp_path / "other") as other:
        other.apply([(1, 1, put(b"a", b"other")), (2, 1, put(b"a", b"more"))])
    reader = Reader(machine.path)
    watch = reader.watch()
    machine.close()
    shutil.move(machine.path, tmp_path / "old")
    shutil.move(tmp_path / "other", machine.path)
    with pytest.raises(CompactedError):
        next(watch)  # it is noticed within a second
    assert [one.value for one in reader.watch(start=1).read()] == [b"other", b"more"]
    reader.close()


# ---- how it waits ------------------------------------------------------------------------------------


def test_a_waiting_read_is_woken(machine: FastStateMachine, reader: Reader) -> None:
    """Reads and iterations on threads wait for a change of their prefix, and end with the reader."""
    told: list[list[Change]] = [[] for _ in range(3)]
    watches = [reader.watch(prefix) for prefix in (b"", b"a", b"x")]
    threads = [threading.Thread(target=lambda one, list_: list_.extend(one), args=pair)
               for pair in zip(watches, told, strict=True)]  # fmt: skip
    for thread in threads:
        thread.start()
    last = reader.watch()
    for index in range(2, 50):
        machine.apply([(index, 1, put(b"a" if index % 2 else b"b", b""))])
        assert [one.index for one in last.read()] == [index]
    while any(watch.position.index < 49 for watch in watches[:2]):
        os.sched_yield()
    reader.close()
    for thread in threads:
        thread.join(60)
    assert [len(one) for one in told] == [48, 24, 0]


def test_close_ends_a_waiting_read(reader: Reader) -> None:
    """If its watch or its reader is closed, a waiting read raises `NotRunningError`, as later ones do."""
    for closes in (lambda watch: watch.close(), lambda _: reader.close()):
        watch = reader.watch()
        timer = threading.Timer(0.05, closes, (watch,))
        timer.start()
        with pytest.raises(NotRunningError):
            watch.read()
        timer.join()
        assert list(watch) == []
    with pytest.raises(NotRunningError):
        reader.watch()


def test_a_second_concurrent_read_of_a_readers_watch_is_refused(reader: Reader) -> None:
    """A second concurrent read of a watch is a `ReentryError`, and the first one continues."""
    watch = reader.watch()

    async def both() -> None:
        first = asyncio.ensure_future(watch.read_async(timeout=60))
        await asyncio.sleep(0)
        with pytest.raises(ReentryError):
            watch.read(timeout=0)
        watch.close()
        with pytest.raises(NotRunningError):
            await first

    asyncio.run(both())


def test_a_cancelled_read_loses_nothing(machine: FastStateMachine, reader: Reader) -> None:
    """A task that is cancelled while it waits leaves the watch where it was."""

    async def run() -> list[Change]:
        watch = reader.watch()
        found: list[Change] = []
        for index in range(2, 40):
            task = asyncio.ensure_future(watch.read_async())
            for _ in range(index % 4):
                await asyncio.sleep(0)
            machine.apply([(index, 1, put(b"a", b""))])
            if index % 2:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                found += await task
            if index % 3 == 0:
                found += await watch.read_async(timeout=0)
                machine.compact()
        found += await watch.read_async(timeout=0)
        asyncio.get_running_loop().call_later(0.02, reader.close)
        return found + [one async for one in watch]

    assert [one.index for one in asyncio.run(run())] == list(range(2, 40))


def test_much_news_is_not_taken_on_the_event_loop(
    machine: FastStateMachine, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a watch has to take much of a log, or another log, another thread does that first; nothing is lost."""
    takers: list[int] = []
    taken = Tail._take_news

    def take_news(self: Tail) -> None:
        if self.has_much_news():
            takers.append(threading.get_ident())
        taken(self)

    def has_much_news(self: Tail) -> bool:
        seen = self._lookout.publication.peek()
        return seen.identity != self._log.head.identity or seen.end > self._taken_up_to() + (1 << 20)

    monkeypatch.setattr(Tail, "has_much_news", has_much_news, raising=False)
    monkeypatch.setattr(Tail, "_take_news", take_news)
    watch = reader.watch()
    machine.apply([(2, 1, put(b"a", bytes(2 << 20)))])

    async def main() -> None:
        assert [change.index for change in await watch.read_async()] == [2]
        machine.compact()
        machine.apply([(3, 1, put(b"a", b""))])
        assert [change.index for change in await watch.read_async()] == [3]

    asyncio.run(main())
    assert len(takers) == 2
    assert threading.get_ident() not in takers


@pytest.mark.parametrize("why", ["no publication", "lost frames"])
def test_waiting_threads_look_seldom(why: str, machine: FastStateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """If nothing is published yet, or what was published is missing, a wait does not poll continuously."""
    machine.close()
    path = Path(machine.path) / published.NAME
    if why == "no publication":
        path.unlink()
    looks: list[int] = []
    taken = {kind: inside(kind).take_news for kind in (Tail, Reader)}
    for kind in (Tail, Reader):
        monkeypatch.setattr(kind, "_take_news", lambda self: (looks.append(1), taken[type(self)](self)))
    with Reader(machine.path) as reader:
        watch = reader.watch()
        directory = Directory(machine.path)
        directory.lock()  # the next owner, who recovers
        if why == "lost frames":
            slots = np.memmap(path, np.uint64, "r+", 64, (2, 8))
            newest = slots[int(slots[1][0] > slots[0][0])]
            newest[0] += 2
            newest[3] += 48
            newest[7] = checksum_of(newest)
        looks.clear()
        assert watch.read(timeout=0.05) == []
        assert asyncio.run(watch.read_async(timeout=0.05)) == []
        with pytest.raises(TimeoutError):
            reader.wait(2, 0.05)

        async def too_long() -> None:
            await asyncio.wait_for(reader.wait_async(2), 0.05)

        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(too_long())
        directory.close()
    assert len(looks) <= 12


def test_a_read_that_forks_goes_on_in_both(machine: FastStateMachine, reader: Reader) -> None:
    """Even if the log in which it is was replaced, and only the watch holds it."""
    count = 30_000
    machine.apply([(index, 1, put(b"a", b"v" * 100)) for index in range(2, count)])
    watch, other = reader.watch(start=2), reader.watch()

    async def main() -> tuple[int, int]:
        reading = asyncio.ensure_future(watch.read_async(count, max_bytes=1 << 30))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        machine.compact()
        machine.apply([(count, 1, put(b"a", b""))])
        assert len(other.read()) == 1  # the tail has gone on, and the event loop has not
        assert not reading.done()
        pid = os.fork()
        try:
            if pid == 0:
                signal.alarm(60)
            return pid, len(await reading)
        except BaseException:
            if pid == 0:
                os._exit(3)
            raise

    pid, told = asyncio.run(main())
    if pid == 0:
        os._exit(0 if told == count - 2 else 2)
    assert told == count - 2
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_watch_goes_on_in_a_forked_child(machine: FastStateMachine, reader: Reader) -> None:
    """Even one that another thread was reading at the moment of the fork; the parent's continues independently."""
    watch, read = reader.watch(), reader.watch()
    thread = threading.Thread(target=list, args=(read,))
    thread.start()
    (back, to), (go, start) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.read(go, 1)
            found = [watch.read(), read.read(), reader.watch(start=2).read()]
            assert found == [[change(2, b"2")]] * 3
            reader.refresh()
            assert reader.get(b"a") == b"2"
            os.write(to, b"1")
            status = 0
        finally:
            os._exit(status)
    machine.apply([(2, 1, put(b"a", b"2"))])
    os.write(start, b"1")
    assert os.waitpid(pid, 0)[1] == 0
    assert os.read(back, 1) == b"1"
    assert watch.read() == [change(2, b"2")]
    reader.close()
    thread.join(60)
    for descriptor in (back, to, go, start):
        os.close(descriptor)
