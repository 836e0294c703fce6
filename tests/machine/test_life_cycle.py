"""Start, stop, close and clear: what works when, and what is left on disk and in the process."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import Entry, FastStateMachine, LogId, NotRunningError, SnapshotMetadata, StorageError
from support.faulty import Disk, contents, crash_copy, error_of, in_thread, memory_directory
from support.histories import put
from support.inside import inside

Opener = Callable[..., FastStateMachine]
METADATA = SnapshotMetadata(LogId(1, 1), b"c" * 32)


# What a stopped machine still does (its names are those of API section 4), and what it refuses.
WORKS_STOPPED: dict[str, Callable[[FastStateMachine], Any]] = {
    "flush": lambda machine: machine.flush(),
    "flush_async": lambda machine: asyncio.run(machine.flush_async()),
    "save_hard_state": lambda machine: machine.save_hard_state(),
    "is_running": lambda machine: machine.is_running(),
    "len": lambda machine: (machine.len(), len(machine), machine.is_empty(), bool(machine)),
    "last_applied": lambda machine: machine.last_applied(),
    "durable": lambda machine: machine.durable(),
    "entry_term": lambda machine: machine.entry_term(1),
    "snapshot_metadata": lambda machine: machine.snapshot_metadata(),
    "membership": lambda machine: machine.membership(),
    "stats": lambda machine: machine.stats().as_dict(),
    "stop": lambda machine: machine.stop(),
    "repr": repr,
}
REFUSED_STOPPED: dict[str, Callable[[FastStateMachine], Any]] = {
    "get": lambda machine: machine.get(b"key-1"),
    "get of another kind": lambda machine: machine.get(bytearray(b"key-1")),
    "get_many": lambda machine: machine.get_many([b"key-1"]),
    "in": lambda machine: b"key-1" in machine,
    "check": lambda machine: machine.check(fastsm.noop()),
    "scan": lambda machine: machine.scan(),
    "scan_prefix": lambda machine: machine.scan_prefix(b"key"),
    "count": lambda machine: machine.count(),
    "ordered": lambda machine: machine.ordered(),
    "modified": lambda machine: machine.modified(b"key-1"),
    "clock": lambda machine: machine.clock(),
    "deadline": lambda machine: machine.deadline(b"key-1"),
    "next_deadline": lambda machine: machine.next_deadline(),
    "state_checksum": lambda machine: machine.state_checksum(),
    "watch": lambda machine: machine.watch().close(),
    "apply": lambda machine: machine.apply(put(2)),
    "apply of nothing": lambda machine: machine.apply([]),
    "apply_chunk": lambda machine: asyncio.run(machine.apply_chunk(put(2))),
    "apply_chunk of a large chunk": lambda machine: asyncio.run(machine.apply_chunk(put(2, 1 << 20))),
    "update_last_applied": lambda machine: machine.update_last_applied(LogId(2, 1)),
    "persist_last_applied": lambda machine: machine.persist_last_applied(LogId(2, 1)),
    "update_last_snapshot_metadata": lambda machine: machine.update_last_snapshot_metadata(METADATA),
    "persist_last_snapshot_metadata": lambda machine: machine.persist_last_snapshot_metadata(METADATA),
}
RESETS: dict[str, Callable[[FastStateMachine], Any]] = {
    "clear": lambda machine: machine.clear(),
    "reset": lambda machine: asyncio.run(machine.reset()),
}


@pytest.mark.parametrize("name", WORKS_STOPPED)
def test_works_after_stop(name: str, directory: Path, machine_at: Opener) -> None:
    """A stopped machine can be asked and made durable, with the answers of a running one."""
    machine = machine_at(directory)
    machine.apply([Entry(1, 1, fastsm.config(b"nodes"))])
    machine.save_hard_state()
    call = WORKS_STOPPED[name]
    running = call(machine) if name not in ("stop", "is_running", "repr", "stats") else None
    machine.stop()
    stopped = call(machine)
    assert running is None or stopped == running
    assert not machine.is_running()


@pytest.mark.parametrize("name", REFUSED_STOPPED)
def test_refused_after_stop_until_start(name: str, directory: Path, machine_at: Opener) -> None:
    """Everything else is a NotRunningError that says what to do; after start it works."""
    machine = machine_at(directory)
    machine.apply(put(1))
    machine.stop()
    with pytest.raises(NotRunningError, match=r"start\(\)"):
        REFUSED_STOPPED[name](machine)
    assert machine.last_applied() == LogId(1, 1)
    machine.start()
    REFUSED_STOPPED[name](machine)


@pytest.mark.parametrize("name", [*WORKS_STOPPED, *REFUSED_STOPPED, *RESETS, "start"])
def test_refused_after_close(name: str, directory: Path, machine_at: Opener) -> None:
    """After close there is only close and is_running; all else is a NotRunningError."""
    machine = machine_at(directory)
    machine.apply(put(1))
    machine.close()
    calls = {**WORKS_STOPPED, **REFUSED_STOPPED, **RESETS, "start": lambda machine: machine.start()}
    if name in ("is_running", "repr"):
        calls[name](machine)
    else:
        with pytest.raises(NotRunningError, match="closed"):
            calls[name](machine)
    machine.close()
    assert not machine.is_running()


NOT_OF_THE_MODEL = ("stats", "in")


@pytest.mark.parametrize("name", [*WORKS_STOPPED, *REFUSED_STOPPED, *RESETS, "start"])
def test_the_model_ends_as_the_machine_does(name: str, directory: Path) -> None:
    """Everything works, or is refused, after stop and after close as it does there; what was begun goes on."""
    if name in NOT_OF_THE_MODEL:
        pytest.skip("the model has no such call")
    outcomes = []
    for machine in (FastStateMachine(directory), fastsm.MemoryStateMachine()):
        calls: dict[str, Callable[[Any], Any]] = {
            **WORKS_STOPPED, **REFUSED_STOPPED, **RESETS, "start": lambda machine: machine.start()}
        with machine:
            machine.apply(put(1))
            pairs, watch = machine.ordered(), machine.watch()
            found = []
            for end in (machine.stop, machine.close):
                end()
                try:
                    calls[name](machine)
                    found.append("works")
                except NotRunningError:
                    found.append("refused")
                found.append(str(machine.is_running()))
            assert (list(pairs), list(watch)) == ([(b"key-1", b"v" * 10)], [])
        machine.close()
        outcomes.append(found)
    assert outcomes[0] == outcomes[1]


def test_a_machine_is_true_however_empty(directory: Path, machine_at: Opener) -> None:
    """`bool` says that it is there, not that it holds something."""
    machine = machine_at(directory)
    assert machine
    assert len(machine) == 0
    assert machine.is_empty()


def test_start_and_stop_are_idempotent(directory: Path, machine_at: Opener) -> None:
    """Either may be called twice."""
    machine = machine_at(directory)
    machine.start()
    machine.start()
    assert machine.is_running()
    machine.stop()
    machine.stop()
    assert not machine.is_running()
    machine.start()
    assert machine.apply(put(1)) == [True]


def test_stop_makes_everything_applied_durable(directory: Path, tmp_path: Path, machine_at: Opener) -> None:
    """After stop even ids without a command and snapshot metadata would survive a power loss."""
    machine = machine_at(directory)
    machine.apply(put(1))
    machine.update_last_snapshot_metadata(METADATA)
    machine.update_last_applied(LogId(7, 3))
    machine.stop()
    assert machine.durable() == machine.last_applied() == LogId(7, 3)
    with FastStateMachine(crash_copy(directory, tmp_path / "copy"), expect_applied=(7, 3)) as copy:
        assert copy.snapshot_metadata() == METADATA


def test_stop_is_one_step_beside_writers(directory: Path, machine_at: Opener) -> None:
    """A chunk that is applied while stop is under way is durable when stop returns, or is refused."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    gate = disk.hold("sync")
    with in_thread(machine.stop) as stopping:
        gate.wait()
        with in_thread(lambda: machine.apply(put(2))) as applying:
            applying.thread.join(0.2)  # whether it waits for stop or not is its own affair
            gate.open()
    assert stopping.error is None
    assert applying.value == [True] or isinstance(applying.error, NotRunningError)
    assert machine.durable() == machine.last_applied()


def test_failed_stop_runs_on_poisoned(directory: Path, machine_at: Opener) -> None:
    """When the sync of stop fails, the machine has not stopped: reads go on, writes raise."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    disk.fail("sync")
    with pytest.raises(StorageError):
        machine.stop()
    assert machine.is_running()
    assert machine.get(b"key-1") == b"v" * 10
    with pytest.raises(StorageError, match="poisoned"):
        machine.apply(put(2))
    with pytest.raises(StorageError):
        machine.close()


# ---- close ------------------------------------------------------------------------------------------------


def test_leaving_the_block_closes(directory: Path) -> None:
    """The machine is a context manager, closed by an error in the block as well."""
    with FastStateMachine(directory) as machine:
        assert machine.apply(put(1)) == [True]
    assert not machine.is_running()

    def fail() -> None:
        with FastStateMachine(directory) as machine:
            machine.apply(put(2))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    with FastStateMachine(directory) as machine:
        assert machine.last_applied() == LogId(2, 1)


def test_close_makes_everything_durable_and_trims(directory: Path, machine_at: Opener) -> None:
    """After close the log holds its frames and nothing more, and the next opening knows that all is durable."""
    machine = machine_at(directory)
    for index in range(1, 20):
        machine.apply(put(index, 1000))
    machine.update_last_applied(LogId(25, 2))
    assert (directory / "log-1").stat().st_size > 2 * machine.stats().log_bytes
    machine.close()
    with machine_at(directory) as machine:
        assert machine.stats().log_bytes == (directory / "log-1").stat().st_size
        assert machine.stats().recovery.clean
        assert machine.durable() == machine.last_applied() == LogId(25, 2)


def test_opening_and_closing_changes_nothing(directory: Path, machine_at: Opener) -> None:
    """A directory that was closed cleanly is left byte for byte as it was by reading it."""
    with machine_at(directory) as machine:
        machine.apply(put(1))
    before = contents(directory)
    for _ in range(3):
        with machine_at(directory) as machine:
            assert machine.get(b"key-1") == b"v" * 10
    assert contents(directory) == before


def test_close_after_clear_syncs_however_long_the_new_log_is(directory: Path, machine_at: Opener) -> None:
    """That the new log ends where the old one ended cleanly does not mean that it is durable."""
    with machine_at(directory) as machine:
        machine.apply(put(1, 100))
    end = (directory / "log-1").stat().st_size
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.clear()
    machine.apply(put(1, 100 + 48))  # 48: the frame that a clean close writes
    assert machine.stats().log_bytes == end
    disk.forget()
    machine.close()
    assert disk.count("sync") > 0
    with machine_at(directory) as machine:
        assert machine.get(b"key-1") == b"v" * 148
        assert machine.stats().recovery.clean


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_close_gives_back_descriptors_and_maps(directory: Path, machine_at: Opener) -> None:
    """Opening, clearing and closing many times, also in vain, leaves no descriptor and no mapping behind."""

    def count() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count(str(directory))
        return len(os.listdir("/proc/self/fd")), maps

    machine_at(directory).close()
    before = count()
    for index in range(20):
        with machine_at(directory) as machine:
            machine.apply(put(1, 300_000 * (index % 2) + 1))
            with pytest.raises(fastsm.LockedError):
                FastStateMachine(directory)
            machine.clear()
        with pytest.raises(fastsm.CorruptionError):
            FastStateMachine(directory, expect_applied=(9, 9))
    del machine
    assert count() == before


@pytest.mark.parametrize("close", [True, False])
def test_hundreds_of_machines_fit_into_one_process(close: bool) -> None:
    """A host of many Raft groups opens one machine for each; closed ones hold no address space."""
    with ExitStack() as stack:
        root = stack.enter_context(memory_directory())
        machines = []
        for number in range(300):
            machine = stack.enter_context(FastStateMachine(root / f"{number}"))
            machines.append(machine)
            machine.apply(put(1))
            if close:
                machine.close()
        assert all(machine.is_running() is not close for machine in machines)


def test_machine_that_is_dropped_warns_and_gives_its_lock_back(directory: Path) -> None:
    """Without close there is a ResourceWarning, and the directory can be opened again."""

    def drop() -> None:
        machine = FastStateMachine(directory)
        machine.apply(put(1))

    with pytest.warns(ResourceWarning, match="never closed"):
        drop()
    with FastStateMachine(directory) as machine:
        assert machine.last_applied() == LogId(1, 1)
        assert not machine.stats().recovery.clean


def test_close_while_others_read_and_write_is_an_error_for_them(directory: Path, machine_at: Opener) -> None:
    """Threads that use a machine while it is closed meet NotRunningError, never a crash."""
    machine = machine_at(directory)

    def use() -> None:
        index = 0
        while True:
            index += 1
            machine.apply(put(index))
            machine.get_many([b"key-1"] * 50)
            machine.flush()

    def read() -> None:
        while True:
            machine.get(b"key-1")
            machine.stats()

    with in_thread(use) as user, in_thread(read) as reader:
        while machine.last_applied().index < 50:
            pass
        machine.close()
    assert isinstance(user.error, NotRunningError)
    assert isinstance(reader.error, NotRunningError)


# ---- clear ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESETS)
@pytest.mark.parametrize("running", [True, False])
def test_clear_is_back_to_the_initial_state(
    name: str, running: bool, directory: Path, tmp_path: Path, machine_at: Opener
) -> None:
    """Empty in memory and on disk, durable on return; whether it is running stays as it was."""
    machine = machine_at(directory)
    machine.apply([*put(1), Entry(2, 5, fastsm.config(b"nodes"))])
    machine.persist_last_snapshot_metadata(METADATA)
    if not running:
        machine.stop()
    RESETS[name](machine)
    assert machine.is_running() is running
    with FastStateMachine(crash_copy(directory, tmp_path / "copy")) as copy:
        inside(copy).check()
        for one in (machine, copy):
            assert one.last_applied() == one.durable() == LogId(0, 0)
            assert (one.len(), one.membership(), one.snapshot_metadata()) == (0, None, None)
            assert (one.entry_term(1), one.entry_term(2)) == (None, None)
        assert copy.stats().recovery.clean
    machine.start()
    assert machine.get(b"key-1") is None
    assert machine.apply(put(1)) == [True]
    assert [path.name for path in sorted(directory.iterdir())] == ["CURRENT", "LOCK", "PUBLISHED", "log-2"]


@pytest.mark.parametrize(
    "method", ["create_file", "write", "sync", "sync_directory", "rename", "open_file", "unlink", "names"]
)
@pytest.mark.parametrize("done", [False, True])
def test_clear_that_fails_leaves_the_old_state_or_a_poisoned_one(
    method: str, done: bool, directory: Path, tmp_path: Path, machine_at: Opener
) -> None:
    """Whichever call fails, memory shows the old state; it goes on, unless nobody knows what the disk names."""
    for nth in range(1, 30):
        disk = Disk()
        path = directory.with_name(f"state-{nth}")
        machine = machine_at(path, _files=disk.files)
        machine.apply(put(1))
        machine.flush()
        disk.forget()
        rule = disk.fail(method, errno.EIO, nth=nth, done=done)
        error = error_of(machine.clear)
        rule.last = 0
        if error is None:
            assert (machine.len(), machine.last_applied()) == (0, LogId(0, 0))
            if not rule.struck:
                return
            assert method in ("unlink", "names", "open_file")  # of what is left over: the next opening removes it
            continue
        assert error.errno == errno.EIO
        assert machine.get(b"key-1") == b"v" * 10
        assert (machine.last_applied(), machine.durable()) == (LogId(1, 1), LogId(1, 1))
        if error_of(lambda machine=machine: machine.apply(put(2))):
            with pytest.raises(StorageError):
                machine.close()
            kept = {LogId(0, 0), LogId(1, 1)}
        else:
            machine.flush()
            kept = {LogId(2, 1)}
        with FastStateMachine(crash_copy(path, tmp_path / f"copy-{nth}")) as copy:
            assert copy.last_applied() in kept
        machine.close()
    pytest.fail(f"{method} was called more often than expected")


def test_clear_waits_for_a_sync_under_way(directory: Path, machine_at: Opener) -> None:
    """A flush that was begun before ends well, and says nothing of the new state."""
    disk = Disk()
    machine = machine_at(directory, _files=disk.files)
    machine.apply(put(1))
    gate = disk.hold("sync")
    with in_thread(machine.flush) as flushing:
        gate.wait()
        with in_thread(machine.clear) as clearing:
            gate.open()
    assert (flushing.error, clearing.error) == (None, None)
    assert machine.durable() == LogId(0, 0)
    machine.apply(put(1))
    machine.flush()
    assert machine.durable() == LogId(1, 1)


def test_stats_are_flat_for_metrics(directory: Path, machine_at: Opener) -> None:
    """`as_dict` gives one name and one plain value each."""
    machine = machine_at(directory)
    machine.apply([*put(1), *put(2)])
    machine.apply([Entry(3, 2, fastsm.delete(b"key-1"))])
    machine.flush()
    stats = machine.stats()
    assert (stats.keys, stats.term_runs, stats.flush_count) == (1, 2, 1)
    assert (stats.last_applied, stats.durable) == (LogId(3, 2), LogId(3, 2))
    assert 0 < stats.live_bytes < stats.dead_bytes + stats.live_bytes < stats.log_bytes
    flat = stats.as_dict()
    assert (flat["keys"], flat["last_applied_index"], flat["durable_term"]) == (1, 3, 2)
    assert all(isinstance(value, (int, float, bool)) for value in flat.values())
