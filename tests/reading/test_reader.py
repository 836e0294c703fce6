"""`Reader`: the same state as its owner's, through everything that an owner does."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsm import (
    CompactedError,
    CorruptionError,
    FastStateMachine,
    LogId,
    NotRunningError,
    OrderError,
    Reader,
    ReentryError,
    SnapshotRangeError,
    StorageError,
    put,
)
from fastsm.disk import published
from fastsm.disk.files import Directory
from fastsm.reading import news
from support.histories import KEYS, History
from support.inside import inside
from support.other_tasks import counting
from support.publishing import checksum_of


def add(machine: FastStateMachine, *commands: bytes) -> LogId:
    """Apply commands as one chunk."""
    index, term = machine.last_applied()
    machine.apply([(index + i, max(term, 1), command) for i, command in enumerate(commands, 1)])
    return machine.last_applied()


def everything(state: FastStateMachine | Reader) -> dict[str, Any]:
    """Return the results of all reads except `durable` and the state of the files."""
    ids = np.arange(max(state.last_applied().index - 50, 0), state.last_applied().index + 3, dtype=np.uint64)
    return {
        "items": list(state.items()),
        "keys": list(state.keys()),
        "length": (len(state), state.is_empty(), bool(state)),
        "last applied": state.last_applied(),
        "membership": state.membership(),
        "get": [state.get(key) for key in KEYS],
        "get_many": state.get_many(KEYS),
        "get_view": [None if view is None else bytes(view) for view in map(state.get_view, KEYS)],
        "in": [key in state for key in KEYS],
        "modified": [state.modified(key) for key in KEYS],
        "columns": [column.tobytes() for column in state.columns()],
        "get_columns": [column.tobytes() for column in state.get_columns(KEYS)],
        "time": (state.clock(), state.next_deadline(), [state.deadline(key) for key in KEYS]),
        "terms": (state.entry_terms(ids).tolist(), [state.entry_term(int(index)) for index in ids]),
        "checksum": state.state_checksum(),
        "scan": (state.scan(b"key-1", b"key-3", reverse=True), state.scan_prefix(b"key-2", limit=3)),
        "ordered": list(state.ordered()),
        "count": (state.count(), state.count(prefix=b"key")),
    }


# ---- the same as the owner ---------------------------------------------------------------------------

STEPS = (
    "apply", "apply", "apply", "apply", "update", "flush", "compact", "snapshot", "install", "reset", "reopen", "kill",
)  # fmt: skip


class Life:
    """An owner and its readers, step by step."""

    def __init__(self, root: Path, seed: int, *, ordered: bool) -> None:
        self.root = root
        self.machine = self.open()
        self.history = History(seed)
        self.dice = random.Random(seed)
        self.snapshots: list[Path] = []
        self.readers = [Reader(root / "state", ordered=ordered) for _ in range(2)]
        self.seldom = self.readers[1]
        self.back = 0

    def open(self) -> FastStateMachine:
        return FastStateMachine(self.root / "state", auto_compact=False, retain_entries=5)

    def take(self, step: str) -> None:
        """Do one step of the owner."""
        machine = self.machine
        before = machine.last_applied()
        if step == "apply":
            machine.apply(self.history.chunk())
        elif step == "update":
            index, term = before
            self.history.last = LogId(index + self.dice.choice((1, 3)), term + self.dice.choice((0, 1)))
            machine.update_last_applied(self.history.last)
        elif step == "flush":
            machine.flush()
        elif step == "compact":
            machine.compact(self.dice.choice((None, before)))
        elif step == "snapshot" and before.index:
            self.snapshots.append(self.root / f"snapshot-{len(self.snapshots)}")
            machine.write_snapshot(self.snapshots[-1])
        elif step == "install" and self.snapshots:
            machine.clear()
            machine.install_snapshot(None, self.dice.choice(self.snapshots))
        elif step == "reset":
            machine.clear()
            self.snapshots.clear()
        elif step == "reopen":
            machine.close()
            self.machine = self.open()
        elif step == "kill":
            inside(machine).release()  # the system keeps what was written, and nothing else
            self.machine = self.open()
        self.history.last = self.machine.last_applied()
        went_back = step == "kill" and self.machine.last_applied() < before  # what was noted, and in no frame, is lost
        self.back += before.index > 0 and (step in ("install", "reset") or went_back)

    def compare(self, reader: Reader) -> None:
        """Check that the reader has the owner's state, and agrees with the machine about all of it."""
        before = reader.last_applied()
        found = reader.refresh()
        expected = self.machine.last_applied()
        if found != expected:  # after a kill an update that no frame carried is lost; its entry has no command
            assert found == before
            assert found.index > expected.index
            assert list(reader.items()) == list(self.machine.items())
        else:
            self.compare_all(reader)
        assert reader.durable().index <= found.index

    def compare_all(self, reader: Reader) -> None:
        shown, expected = everything(reader), everything(self.machine)
        as_of = shown["checksum"][0]
        if as_of != self.machine.last_applied():  # it was noted, in a new term, and no frame has it yet
            assert shown.pop("checksum") == self.machine.state_checksum(as_of)
            known = zip(*shown.pop("terms"), *expected.pop("terms"), strict=True)
            assert all(many in (0, many_there) and one in (None, there) for many, one, many_there, there in known)
            del expected["checksum"]
        assert shown == expected

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        self.machine.close()


@settings(max_examples=40)
@given(steps=st.lists(st.sampled_from(STEPS), max_size=30), seed=st.integers(0, 1 << 20), ordered=st.booleans())
def test_a_reader_shows_what_its_owner_has(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], seed: int, ordered: bool
) -> None:
    """After each refresh every read returns what it does in the owner, through everything that an owner does."""
    life = Life(tmp_path_factory.mktemp("life"), seed, ordered=ordered)
    try:
        for step in steps:
            life.take(step)
            life.compare(life.readers[0])
            if life.dice.random() < 0.2:
                life.compare(life.seldom)
        life.compare(life.seldom)
        assert life.readers[0].stats().rebuilt <= life.back
    finally:
        life.close()


def test_the_state_stands_still_between_refreshes(machine: FastStateMachine, reader: Reader) -> None:
    """What is applied is visible after a refresh, and not before."""
    add(machine, put(b"color", b"red"))
    assert (reader.get(b"color"), reader.last_applied().index) == (b"blue", 1)
    assert reader.refresh() == (2, 1)
    assert reader.get(b"color") == b"red"


def test_a_reader_says_what_is_durable(machine: FastStateMachine, reader: Reader) -> None:
    """`durable` follows the owner's flushes, even if nothing is applied afterwards; metadata comes with its frame."""
    add(machine, put(b"color", b"red"))
    reader.refresh()
    assert reader.durable().index < 2
    machine.flush()
    reader.refresh()
    assert reader.durable() == (2, 1)
    metadata = machine.write_snapshot(Path(machine.path).with_name("snapshot"))
    assert reader.snapshot_metadata() is None
    reader.refresh()
    assert reader.snapshot_metadata() == metadata


def test_an_entry_without_a_command_is_seen(machine: FastStateMachine, reader: Reader) -> None:
    """`update_last_applied` is visible before a frame records it, with its entry's term, but not terms in between."""
    machine.update_last_applied((5, 1))
    assert (reader.refresh(), reader.entry_term(3)) == ((5, 1), 1)
    machine.update_last_applied((9, 3))
    assert (reader.refresh(), reader.entry_term(7), reader.entry_term(9)) == ((9, 3), None, 3)
    machine.update_last_applied((12, 4))
    assert (reader.refresh(), reader.entry_term(9), reader.entry_term(12)) == ((12, 4), None, 4)
    add(machine, put(b"color", b"red"))
    assert reader.refresh() == (13, 4)
    assert [reader.entry_term(index) for index in range(14)] == [machine.entry_term(index) for index in range(14)]


def test_a_checksum_is_of_what_frames_tell(machine: FastStateMachine, reader: Reader) -> None:
    """An entry of a new term that is in no frame counts later: another may have been noted before it."""
    machine.update_last_applied((5, 2))
    reader.refresh()
    machine.update_last_applied((9, 3))
    assert reader.refresh() == (9, 3)
    assert reader.state_checksum() == reader.state_checksum((1, 1)) == machine.state_checksum((1, 1))
    with pytest.raises(SnapshotRangeError, match="no frame has it yet"):
        reader.state_checksum((9, 3))
    machine.flush()
    reader.refresh()
    assert reader.state_checksum() == machine.state_checksum()
    assert reader.state_checksum()[0] == (9, 3)


def test_a_reader_works_without_an_owner(tmp_path: Path) -> None:
    """After a clean close and after a kill it shows what opening would find, and continues with the next owner."""
    for ends_well in (True, False):
        path = tmp_path / str(ends_well)
        machine = FastStateMachine(path)
        add(machine, *(put(b"%d" % i, b"value") for i in range(100)))
        machine.close() if ends_well else inside(machine).release()
        with Reader(path) as reader:
            assert (len(reader), reader.owner()) == (100, None)
            with FastStateMachine(path) as machine:
                assert reader.owner() == os.getpid()
                add(machine, put(b"more", b""))
                assert (reader.refresh().index, len(reader), reader.stats().rebuilt) == (101, 101, 0)


def test_a_directory_without_a_publication_is_read(machine: FastStateMachine, tmp_path: Path) -> None:
    """A directory without that file, or older than it, can be read; the first owner's publication is found."""
    machine.flush()
    copy = tmp_path / "copy"
    shutil.copytree(machine.path, copy, ignore=shutil.ignore_patterns("LOCK", published.NAME))
    with Reader(copy) as reader:
        assert (reader.get(b"color"), reader.refresh()) == (b"blue", (1, 1))
        with FastStateMachine(copy) as owner:
            add(owner, put(b"color", b"red"))
            assert (reader.refresh(), reader.get(b"color"), reader.stats().rebuilt) == ((2, 1), b"red", 0)


def test_reading_only_publishes_nothing(machine: FastStateMachine) -> None:
    """`read_only=True` leaves the publication to the owner, and readers write nothing at all."""
    before = (Path(machine.path) / published.NAME).read_bytes()
    with FastStateMachine(machine.path, read_only=True), Reader(machine.path) as reader:
        reader.refresh()
    assert (Path(machine.path) / published.NAME).read_bytes() == before


# ---- going back --------------------------------------------------------------------------------------

def test_a_reset_and_an_older_snapshot_are_told(machine: FastStateMachine, reader: Reader) -> None:
    """`rebuilt` counts when the state went back, and not when it continued."""
    metadata = machine.write_snapshot(Path(machine.path).with_name("snapshot"))
    add(machine, put(b"color", b"red"))
    machine.compact(machine.last_applied())
    reader.refresh()
    assert reader.stats().rebuilt == 0
    machine.install_snapshot(metadata, Path(machine.path).with_name("snapshot"), allow_older=True)
    assert (reader.refresh(), reader.get(b"color"), reader.stats().rebuilt) == ((1, 1), b"blue", 1)
    machine.clear()
    assert (reader.refresh(), len(reader), reader.stats().rebuilt) == ((0, 0), 0, 2)
    machine.install_snapshot(metadata, Path(machine.path).with_name("snapshot"))
    assert (reader.refresh(), reader.stats().rebuilt) == ((1, 1), 2)


def lose_last_frame(path: Path, of: FastStateMachine) -> None:
    """Simulates a failed sync: published pages are gone from the cache, and were never on the disk."""
    log = inside(of).log
    start, end = log.last_frame, log.end
    with open(path / log.name, "r+b") as file:
        file.seek(start)
        file.write(bytes(end - start))


def test_a_log_is_never_cut_below_what_was_published(machine: FastStateMachine, reader: Reader) -> None:
    """If recovery finds less than was published, it continues in another generation: no reader is killed."""
    path = Path(machine.path)
    machine.flush()
    value = b"x" * 100_000
    add(machine, put(b"large", value))
    reader.refresh()
    view = reader.get_view(b"large")
    log, generation = path / inside(machine).log.name, machine.stats().generation
    lose_last_frame(path, machine)
    inside(machine).release()
    with FastStateMachine(path) as owner:
        assert (owner.last_applied(), owner.stats().generation) == ((1, 1), generation + 1)
        assert not log.exists()
        assert view is not None
        assert bytes(view) == bytes(len(value))  # lost, and still mapped
        assert (reader.refresh(), reader.get(b"color"), reader.stats().rebuilt) == ((1, 1), b"blue", 1)
        add(owner, put(b"color", b"red"))
        assert (reader.refresh(), reader.get(b"color")) == ((2, 1), b"red")
        assert everything(reader) == everything(owner)
    with FastStateMachine(path) as owner:
        assert owner.get(b"color") == b"red"


def test_a_base_moves_with_its_log(machine: FastStateMachine, reader: Reader) -> None:
    """A log with a base, and metadata of a snapshot, has the same state in the generation that it moves to."""
    path = Path(machine.path)
    metadata = machine.write_snapshot(path.with_name("snapshot"))
    machine.compact(machine.last_applied())
    add(machine, put(b"kept", b"1"))
    machine.flush()
    before = machine.state_checksum()
    add(machine, put(b"lost", b"2"))
    lose_last_frame(path, machine)
    inside(machine).release()
    with FastStateMachine(path, verify_on_open="full") as owner:
        assert (owner.state_checksum(), owner.snapshot_metadata()) == (before, metadata)
        assert owner.durable() == owner.last_applied()
        owner.verify()
    reader.refresh()
    assert reader.state_checksum() == before


def test_another_run_of_the_machine_has_no_readers(machine: FastStateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart of the computer a log is cut as usual, since no reader has mapped it."""
    path = Path(machine.path)
    generation = machine.stats().generation
    machine.flush()
    add(machine, put(b"lost", b""))
    lose_last_frame(path, machine)
    inside(machine).release()
    monkeypatch.setattr(published, "BOOT_ID", "/dev/null")
    with FastStateMachine(path) as owner:
        assert (owner.last_applied(), owner.stats().generation) == ((1, 1), generation)


def test_another_history_of_the_same_log_is_noticed(machine: FastStateMachine, reader: Reader, tmp_path: Path) -> None:
    """A directory restored from a copy of itself continues differently: the last frame's checksum shows it."""
    machine.flush()
    copy = tmp_path / "copy"
    shutil.copytree(machine.path, copy)
    add(machine, put(b"color", b"red"), put(b"more", b"1"))
    assert reader.refresh().index == 3
    machine.close()
    for name in ("CURRENT", "log-1"):
        os.replace(copy / name, Path(machine.path) / name)
    with FastStateMachine(machine.path) as owner:
        owner.apply([(2, 2, put(b"color", b"green")), (3, 2, put(b"other", b"2"))])
        assert (reader.refresh(), reader.get(b"color"), reader.stats().rebuilt) == ((3, 2), b"green", 1)
        assert everything(reader) == everything(owner)


def test_a_restored_history_that_is_ahead_is_told(machine: FastStateMachine, reader: Reader, tmp_path: Path) -> None:
    """Files of another history replace the old ones, with more entries: the state went back nevertheless."""
    watch = reader.watch()
    with FastStateMachine(tmp_path / "other", auto_compact=False, retain_entries=0) as other:
        add(other, *(put(b"color", b"%d" % index) for index in range(20)))
        other.compact()
        add(other, put(b"color", b"theirs"))
        generation = other.stats().generation
    machine.close()
    for name in ("CURRENT", f"base-{generation}", f"log-{generation}"):
        shutil.copy(tmp_path / "other" / name, Path(machine.path) / name)
    with FastStateMachine(machine.path) as owner:
        add(owner, put(b"more", b""))
        assert (reader.refresh(), reader.get(b"color"), reader.stats().rebuilt) == ((22, 1), b"theirs", 1)
        assert everything(reader) == everything(owner)
        with pytest.raises(CompactedError):
            watch.read(timeout=0)


def test_another_directory_at_the_same_path_is_found(machine: FastStateMachine, reader: Reader, tmp_path: Path) -> None:
    """A directory that replaced the old one is found at most a second later."""
    machine.close()
    os.rename(machine.path, tmp_path / "old")
    with FastStateMachine(machine.path) as owner:
        add(owner, put(b"other", b""))
        while reader.refresh() and b"other" not in reader:  # a second, as the page says
            inside(reader).await_news(0.1)
        assert everything(reader) == everything(owner)
        assert reader.stats().rebuilt == 1


# ---- the publication, from outside -------------------------------------------------------------------

def test_a_frame_that_is_not_whole_is_never_shown(
    machine: FastStateMachine, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner that publishes too early is a `CorruptionError` with log and offset; the state does not change."""
    add(machine, put(b"color", b"red"))
    newest = newest_slot(machine.path)
    newest[3] += 48
    newest[7] = checksum_of(newest)
    assert reader.refresh() == (2, 1)  # the next owner may be recovering from just that; whole frames are taken
    assert reader.last_applied() == (2, 1)
    monkeypatch.setattr(news, "RECOVERY_SECONDS", 0.0)
    with pytest.raises(CorruptionError, match="as its owner has published"):
        reader.refresh()
    assert reader.last_applied() == (2, 1)
    add(machine, put(b"color", b"green"))
    assert (reader.refresh(), reader.get(b"color")) == ((3, 1), b"green")


def test_frames_that_are_lost_are_no_error_while_the_next_owner_recovers(tmp_path: Path) -> None:
    """A reader keeps its state until the owner publishes what is left; damage is reported if the owner continues."""
    with FastStateMachine(tmp_path) as machine:
        add(machine, put(b"color", b"blue"))
        reader = Reader(tmp_path)
        watch = reader.watch()
        add(machine, put(b"color", b"red"))
    newest = newest_slot(tmp_path)
    newest[3] += 48
    newest[7] = checksum_of(newest)
    directory = Directory(tmp_path)
    directory.lock()  # the next owner, who recovers
    for _ in range(3):
        assert reader.refresh() == (2, 1)
        with pytest.raises(TimeoutError):
            reader.wait(3, 0.01)
        assert watch.read(timeout=0) == []  # a watch delivers only entries that are published as a whole
    for number in (1, 2):  # the same owner continues as if nothing had happened
        newest[0] += 2 * number
        newest[7] = checksum_of(newest)
        with pytest.raises(CorruptionError, match="as its owner has published"):
            reader.refresh()
        with pytest.raises(CorruptionError, match="as its owner has published"):
            watch.read(timeout=0)
    directory.close()
    with FastStateMachine(tmp_path) as machine:
        add(machine, put(b"color", b"green"))
        assert reader.refresh() == machine.last_applied()
        assert reader.get(b"color") == b"green"
    reader.close()


def newest_slot(directory: str | os.PathLike[str]) -> Any:
    """Return the newest publication, to be written to."""
    slots = np.memmap(Path(directory) / published.NAME, np.uint64, "r+", 64, (2, 8))
    return slots[int(slots[1][0] > slots[0][0])]


@pytest.mark.parametrize("content", [b"", bytes(4096), b"FASTSM-P\1".ljust(4096, b"\0"), b"FASTSM-P"])
def test_an_invalid_or_older_published_file_is_replaced(tmp_path: Path, content: bytes) -> None:
    """An empty, zeroed or cut file, and one of another version, is replaced by the next owner."""
    path = tmp_path / published.NAME
    with FastStateMachine(tmp_path) as machine:
        add(machine, put(b"color", b"blue"))
    path.write_bytes(content)
    with FastStateMachine(tmp_path) as machine, Reader(tmp_path) as reader:
        assert reader.get(b"color") == b"blue"
        add(machine, put(b"color", b"red"))
        assert (reader.refresh().index, reader.get(b"color")) == (2, b"red")
        assert os.stat(path).st_blocks > 0  # stores into it never lack a block


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """A file of that name that fastsm did not make is an error that says so, and is left alone."""
    (tmp_path / published.NAME).write_bytes(b"my notes")
    with pytest.raises(CorruptionError, match="not made by fastsm"):
        FastStateMachine(tmp_path)
    assert (tmp_path / published.NAME).read_bytes() == b"my notes"


def test_an_owner_who_cannot_publish_says_so(tmp_path: Path) -> None:
    """If the file cannot be made, opening is a `StorageError` that names it, and the next opening works."""

    class Full(Directory):
        def allocate(self, fd: Any, old_size: int, new_size: int) -> None:
            raise OSError(28, "No space left on device")

    with FastStateMachine(tmp_path / "before"):
        pass
    (tmp_path / "before" / published.NAME).unlink()
    with pytest.raises(StorageError, match=published.NAME):
        FastStateMachine(tmp_path / "before", _files=Full)
    with FastStateMachine(tmp_path / "before"):
        pass


# ---- where there is nothing yet ----------------------------------------------------------------------

def test_no_state_is_said_at_once(tmp_path: Path) -> None:
    """No directory, an empty one, and one that a tool is filling are a `StorageError` with ENOENT."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    with FastStateMachine(tmp_path / "half"):
        pass
    shutil.copy(tmp_path / "half" / "LOCK", tmp_path / "empty")
    for name in ("missing", "empty"):
        with pytest.raises(StorageError) as caught:
            Reader(tmp_path / name)
        assert caught.value.errno == 2


def test_a_reader_waits_for_an_owner(tmp_path: Path) -> None:
    """With `wait_for_owner` the constructor returns once there is a state."""
    opened: list[Reader] = []
    thread = threading.Thread(target=lambda: opened.append(Reader(tmp_path / "state", wait_for_owner=60)))
    thread.start()
    with FastStateMachine(tmp_path / "state"):
        thread.join()
    with opened[0] as reader:
        assert reader.is_empty()
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="wait_for_owner"):
            Reader(tmp_path, wait_for_owner=wrong)


# ---- waiting -----------------------------------------------------------------------------------------

def test_waiting_ends_with_the_entry(machine: FastStateMachine, reader: Reader) -> None:
    """`wait` returns once the entry is there, on threads and event loops; `TimeoutError` if it does not come."""
    with pytest.raises(TimeoutError, match="last applied is"):
        reader.wait(2, 0.01)
    with pytest.raises(ValueError, match="timeout"):
        reader.wait(2, -1)
    for wrong, error in ((1.5, TypeError), (None, TypeError), (-1, OrderError), (2**64 - 1, OrderError)):
        with pytest.raises(error):
            reader.wait(wrong, 0)  # type: ignore[arg-type]
        with pytest.raises(error):
            asyncio.run(reader.wait_async(wrong, 0))  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: add(machine, put(b"color", b"red")))
    thread.start()
    assert reader.wait(2).index >= 2
    thread.join()

    async def both() -> tuple[LogId, LogId]:
        waiting = [asyncio.ensure_future(reader.wait_async(index)) for index in (3, 4)]
        await asyncio.sleep(0)
        add(machine, put(b"color", b"green"))
        machine.compact(machine.last_applied())
        add(machine, put(b"color", b"white"))
        return await waiting[0], await waiting[1]

    assert [position.index >= 3 for position in asyncio.run(both())] == [True, True]
    assert reader.get(b"color") == b"white"

    async def too_long() -> None:
        await asyncio.wait_for(reader.wait_async(1000), 0.01)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(too_long())
    for seconds in (0, 0.01):
        with pytest.raises(TimeoutError, match="last applied is"):
            asyncio.run(reader.wait_async(1000, timeout=seconds))
    with pytest.raises(ValueError, match="timeout"):
        asyncio.run(reader.wait_async(2, float("nan")))
    assert asyncio.run(reader.wait_async(3, timeout=0)).index >= 3


def test_waiting_lets_other_tasks_run_however_fast_the_owner_is(machine: FastStateMachine, directory: Path) -> None:
    """There is news whenever `wait_async` looks: still other tasks of the event loop run between any two looks."""

    class Chased(Reader):
        def refresh(self) -> LogId:
            looks.append(turns[0])
            position = super().refresh()
            add(machine, put(b"color", b"blue"))
            return position

    looks: list[int] = []
    turns = [0]

    async def wait_with_another_task() -> None:
        with Chased(directory) as chased:
            async with counting(turns):
                await chased.wait_async(machine.last_applied().index + 20)

    asyncio.run(wait_with_another_task())
    assert len(looks) >= 20
    assert sorted(set(looks)) == looks


# ---- threads, signals, forks, ends -------------------------------------------------------------------

def test_threads_see_whole_chunks(machine: FastStateMachine, reader: Reader) -> None:
    """While one thread refreshes, others never see half a chunk, even during compactions and resets."""
    keys = [b"part-%d" % i for i in range(50)]
    torn: list[Any] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            values = set(reader.get_many(keys))
            if len(values) != 1:
                torn.append(values)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(300):
            add(machine, *(put(key, b"%d" % number) for key in keys))
            if number % 50 == 17:
                machine.compact(machine.last_applied())
            if number % 100 == 55:
                machine.clear()
            if number % 3 == 0:
                reader.refresh()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert torn == []


def test_a_refresh_within_a_refresh_is_refused(
    machine: FastStateMachine, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler on top of a refresh of its thread gets an error; its close takes effect afterwards."""
    add(machine, put(b"color", b"red"))
    taken = Reader._take_news

    def interrupted(self: Reader) -> None:
        with pytest.raises(ReentryError):
            self._follow()
        self.close()
        assert self.get(b"color") == b"blue"
        taken(self)

    monkeypatch.setattr(Reader, "_take_news", interrupted)
    reader.refresh()
    for call in (reader.refresh, reader.last_applied, reader.stats, lambda: reader.get(b"color")):
        with pytest.raises(NotRunningError):
            call()
    reader.close()


def test_views_and_iterators_outlive_the_reader(machine: FastStateMachine) -> None:
    """What a reader lent out does not change, through compaction, reset and close."""
    reader = Reader(machine.path)
    view, pairs, ordered = reader.get_view(b"color"), reader.items(), reader.ordered()
    machine.compact(machine.last_applied())
    machine.clear()
    reader.refresh()
    reader.close()
    machine.close()
    assert view is not None
    assert (bytes(view), list(pairs), list(ordered)) == (b"blue", [(b"color", b"blue")], [(b"color", b"blue")])
    assert repr(reader).endswith("closed>")


def test_a_checksum_is_computed_off_the_event_loop(machine: FastStateMachine, reader: Reader) -> None:
    """`state_checksum_async` returns what `state_checksum` does, as of the entry at which its task started."""

    async def main() -> None:
        expected = machine.state_checksum()
        task = asyncio.ensure_future(reader.state_checksum_async())
        await asyncio.sleep(0)
        add(machine, put(b"color", b"red"))
        reader.refresh()
        assert await task == expected
        assert await reader.state_checksum_async() == reader.state_checksum() == machine.state_checksum()

    asyncio.run(main())
