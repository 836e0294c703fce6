"""``RaftLog`` between threads, coroutines, signal handlers and finalizers."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import CompactedError, Entry, FastsmError, NotRunningError, RaftLog, ReentryError, StorageError
from support.faulty import PATIENCE, Call, Disk, in_thread
from support.list_log import state_of

pytestmark = pytest.mark.usefixtures("quiet")


def append_one(log: RaftLog) -> None:
    log.append([Entry(log.last_index + 1, log.last_term, b"again")])


# ---- group commit ---------------------------------------------------------------------------------------


def test_one_sync_serves_all_who_wait(tmp_path: Path) -> None:
    """Twenty threads that sync while one sync is held up need at most two more: one now, and one to come."""
    disk = Disk()
    with RaftLog(tmp_path / "log", _files=disk.files) as log:
        append_one(log)
        gate = disk.hold("sync")
        with in_thread(log.sync) as first:
            gate.wait()
            before = disk.count("sync")
            threads = [threading.Thread(target=log.sync) for _ in range(20)]
            append_one(log)
            for thread in threads:
                thread.start()
            assert not first.done
            gate.open()
            for thread in threads:
                thread.join(PATIENCE)
        assert disk.count("sync") - before <= 2
        assert log.durable_index == 2


def test_a_coroutine_that_syncs_while_the_log_is_closed_is_told(tmp_path: Path) -> None:
    """A sync during the sync of a close raises `NotRunningError` instead of waiting for ever."""
    disk = Disk()
    log = RaftLog(tmp_path / "log", _files=disk.files)
    append_one(log)
    asyncio.run(log.sync_async())
    append_one(log)
    gate = disk.hold("sync")
    with in_thread(log.close):
        gate.wait()
        try:
            with pytest.raises(NotRunningError):
                asyncio.run(asyncio.wait_for(log.sync_async(), PATIENCE / 2))
        finally:
            gate.open()


def test_one_sync_serves_all_coroutines(tmp_path: Path) -> None:
    """Two hundred coroutines that append one entry and wait need one running sync, and one to come."""
    disk = Disk()

    async def all_of_them(log: RaftLog) -> None:
        async def one() -> None:
            append_one(log)
            mine = log.last_index
            await log.sync_async()
            assert log.durable_index >= mine

        await asyncio.gather(*(one() for _ in range(200)))

    with RaftLog(tmp_path / "log", _files=disk.files) as log:
        before = disk.count("sync")
        asyncio.run(all_of_them(log))
        assert disk.count("sync") - before <= 4
        assert log.durable_index == 200


def test_a_coroutine_hears_of_the_sync_that_failed(tmp_path: Path) -> None:
    """Every coroutine that waits for the sync gets the error; a cancelled wait stops nothing."""
    disk = Disk()
    with RaftLog(tmp_path / "log", _files=disk.files) as log:

        async def cancelled() -> None:
            append_one(log)
            task = asyncio.ensure_future(log.sync_async())
            await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await log.sync_async()

        async def failing() -> list[Any]:
            append_one(log)
            disk.fail("sync")
            return await asyncio.gather(*(log.sync_async() for _ in range(5)), return_exceptions=True)

        asyncio.run(cancelled())
        assert log.durable_index == 1
        assert all(isinstance(found, StorageError) for found in asyncio.run(failing()))
        assert log.durable_index == 1


def test_appends_and_reads_go_on_during_a_sync(tmp_path: Path) -> None:
    """A sync that is held up holds up nothing else; what is appended meanwhile is not durable by it."""
    disk = Disk()
    with RaftLog(tmp_path / "log", _files=disk.files) as log:
        append_one(log)
        gate = disk.hold("sync")
        with in_thread(log.sync):
            gate.wait()
            append_one(log)
            assert [entry.index for entry in log.entries(1, 9)] == [1, 2]
            log.compact((1, 0))
            assert (log.first_index, log.durable_index) == (2, 0)
            gate.open()
        assert log.durable_index == 1


def test_a_truncation_during_a_sync_is_not_undone_by_it(tmp_path: Path) -> None:
    """The sync covered entries that are gone: those that replaced them are not durable."""
    disk = Disk()
    with RaftLog(tmp_path / "log", _files=disk.files) as log:
        log.append([(index, 1, b"one") for index in range(1, 9)])
        gate = disk.hold("sync")
        with in_thread(log.sync):
            gate.wait()
            log.truncate_after(3)
            log.append([(index, 2, b"two") for index in range(4, 9)])
            gate.open()
        assert log.durable_index <= 3
        log.sync()
        assert log.durable_index == 8


def test_a_vote_is_shown_once_it_is_durable(tmp_path: Path) -> None:
    """During its sync other threads see the previous vote; another vote in that term is refused already."""
    disk = Disk()
    with RaftLog(tmp_path / "log", _files=disk.files) as log:
        log.save_hard_state(1, b"a")
        gate = disk.hold("sync")
        with in_thread(lambda: log.save_hard_state(2, b"b")):
            gate.wait()
            assert log.hard_state() == (1, b"a")
            with pytest.raises(fastsm.OrderError):
                log.save_hard_state(2, b"c")
            gate.open()
        assert log.hard_state() == (2, b"b")


def test_a_vote_that_could_not_be_synced_is_not_shown(tmp_path: Path) -> None:
    """The vote must not be trusted, since it is unknown what the disk holds."""
    disk = Disk()
    with RaftLog(tmp_path / "log", _files=disk.files) as log:
        log.save_hard_state(1, b"a")
        disk.fail("sync")
        with pytest.raises(StorageError):
            log.save_hard_state(2, b"b")
        assert log.hard_state() == (1, b"a")


# ---- many threads ---------------------------------------------------------------------------------------


def test_threads_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """During concurrent writes, reads, syncs and compactions each read is from one moment, and the log stays intact."""
    monkeypatch.setattr(fastsm.raft_log, "SEGMENT_BYTES", 50_000)
    log = RaftLog(tmp_path / "log")
    wrong: list[BaseException] = []
    numbers = itertools.count()
    stop = threading.Event()

    def guarded(work: Callable[[random.Random], None]) -> None:
        rng = random.Random(next(numbers))
        try:
            while not stop.is_set():
                work(rng)
        except BaseException as error:
            wrong.append(error)
            stop.set()

    def write(rng: random.Random) -> None:
        with suppress(fastsm.OrderError):  # another writer was faster
            last, term = log.last_index, log.last_term
            chunk = range(last + 1, last + rng.randrange(2, 30))
            log.append([Entry(index, term + 1, b"%d %d" % (index, term + 1)) for index in chunk])
        if rng.random() < 0.1:
            with suppress(fastsm.OrderError):
                log.truncate_after(max(log.first_index, log.last_index - rng.randrange(20)))

    def read(rng: random.Random) -> None:
        with suppress(CompactedError):
            found = log.entries(log.first_index, log.last_index)
            for entry, following in itertools.pairwise(found):
                assert following.index == entry.index + 1
                assert following.term >= entry.term
            assert all(entry.command == b"%d %d" % entry[:2] for entry in found)

    def keep(rng: random.Random) -> None:
        log.sync()
        if rng.random() < 0.3:
            up_to = log.last_index - 50
            term = log.term(up_to) if up_to > 0 else None
            if term is not None:
                with suppress(fastsm.OrderError):
                    log.compact((up_to, term))
        log.verify()

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (write, write, read, read, keep)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline and not stop.is_set():
        stop.wait(0.1)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert not wrong, wrong
    assert log.last_index > 100
    state = state_of(log)
    log.close()
    with RaftLog(tmp_path / "log") as log:
        assert state_of(log) == state


def test_a_close_ends_who_waits(tmp_path: Path) -> None:
    """Threads that wait for a turn or a sync at that time get an error or their result, and none hangs."""
    disk = Disk()
    log = RaftLog(tmp_path / "log", _files=disk.files)
    append_one(log)
    gate = disk.hold("sync")
    outcomes: list[str] = []

    def call(method: Callable[[], object]) -> None:
        try:
            method()
            outcomes.append("done")
        except FastsmError as error:
            outcomes.append(type(error).__name__)

    with in_thread(log.sync):
        gate.wait()
        methods = (log.sync, log.close, lambda: append_one(log), lambda: log.save_hard_state(2, b"x"), log.close)
        threads = [threading.Thread(target=call, args=(method,)) for method in methods]
        for thread in threads:
            thread.start()
        gate.open()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
    assert len(outcomes) == 5
    assert set(outcomes) <= {"done", "NotRunningError"}
    RaftLog(tmp_path / "log").close()


# ---- re-entry -------------------------------------------------------------------------------------------

SEAMS = ("sync", "write", "truncate", "allocate", "rename", "sync_directory", "open_file", "create_file", "unlink")
OUTER: dict[str, Callable[[RaftLog], object]] = {
    "append": append_one,
    "append much": lambda log: log.append([Entry(log.last_index + 1, log.last_term, bytes(3 << 20))]),
    "truncate_after": lambda log: log.truncate_after(log.last_index - 1),
    "compact": lambda log: log.compact((log.first_index, log.term(log.first_index) or 0)),
    "compact beyond": lambda log: log.compact((log.last_index + 5, log.last_term)),
    "save_hard_state": lambda log: log.save_hard_state(log.hard_state()[0] + 1, b"again"),
    "sync": lambda log: log.sync(),
}
INNER = OUTER | {
    "entries": lambda log: log.entries(log.first_index, log.last_index),
    "term": lambda log: log.term(log.last_index),
    "stats": lambda log: log.stats(),
    "hard_state": lambda log: log.hard_state(),
    "verify": lambda log: log.verify(),
    "close": lambda log: log.close(),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", OUTER)
def test_a_call_on_top_of_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outer: str, inner: str) -> None:
    """A call by a signal handler within another call, at any system call, works or is refused; the log stays intact."""
    monkeypatch.setattr(fastsm.raft_log, "SEGMENT_BYTES", 20_000)
    for nth in range(40):
        path = tmp_path / f"log-{nth}"
        disk = Disk(stores=False if nth % 2 else None)
        log = RaftLog(path, _files=disk.files)
        log.append([Entry(index, 1, bytes(5000)) for index in range(1, 9)])
        seen = 0
        met: list[BaseException | None] = []

        def handle(call: Call, log: RaftLog = log, nth: int = nth, met: list[BaseException | None] = met) -> None:
            nonlocal seen
            if met or call.method not in SEAMS:
                return
            seen += 1
            if seen == nth + 1:
                met.append(None)
                try:
                    INNER[inner](log)
                except FastsmError as error:
                    met[0] = error

        disk.before = handle
        with suppress(NotRunningError):
            OUTER[outer](log)
        disk.before = None
        assert not met or met[0] is None or isinstance(met[0], (ReentryError, NotRunningError, fastsm.OrderError))
        if inner == "close" and met:
            with pytest.raises(NotRunningError):
                log.sync()
        log.close()
        with RaftLog(path) as log:
            log.verify()
            assert log.last_index >= log.first_index - 1
            append_one(log)
        if not met:
            break


def test_a_signal_handler_may_close(tmp_path: Path) -> None:
    """A real SIGTERM during a sync: the sync completes, and the log is closed."""
    disk = Disk()
    log = RaftLog(tmp_path / "log", _files=disk.files)
    append_one(log)
    sent = False

    def before(call: Call) -> None:
        nonlocal sent
        if call.method == "sync" and not sent:
            sent = True
            signal.raise_signal(signal.SIGTERM)

    old = signal.signal(signal.SIGTERM, lambda *_: log.close())
    try:
        disk.before = before
        log.sync()
    finally:
        signal.signal(signal.SIGTERM, old)
    assert sent
    with pytest.raises(NotRunningError):
        log.sync()
    with RaftLog(tmp_path / "log") as log:
        assert log.last_index == 1


def test_an_interrupt_while_waiting_for_a_sync_loses_nothing(tmp_path: Path) -> None:
    """Ctrl-C during a thread's wait ends only that call; its vote is written, and visible once it is durable."""
    disk = Disk()
    log = RaftLog(tmp_path / "log", _files=disk.files)
    append_one(log)
    gate = disk.hold("sync")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with in_thread(log.sync):
            gate.wait()
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                log.save_hard_state(7, b"me")
            gate.open()
    finally:
        signal.signal(signal.SIGALRM, old)
    with pytest.raises(fastsm.OrderError):
        log.save_hard_state(7, b"other")
    log.save_hard_state(7, b"me")
    assert log.hard_state() == (7, b"me")
    log.close()
