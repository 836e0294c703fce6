"""Repeated openings after kills: what the first sync made durable is neither read nor written again."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import fastsm
from fastsm import FastStateMachine, LogId
from fastsm.core import generations
from support.faulty import Disk, crash_copy, in_thread
from support.inside import inside

Opener = Callable[..., FastStateMachine]
FRAME_HEADER = 32


def killed(path: Path, copy: Path, entries: int) -> Path:
    """Return a copy as a kill leaves it: flushed entries of a kilobyte, without a frame that records the flush."""
    with FastStateMachine(path, auto_compact=False) as machine:
        for first in range(1, entries + 1, 100):
            indexes = range(first, first + 100)
            machine.apply([(index, 1, fastsm.put(b"key %d" % index, bytes(1000))) for index in indexes])
        machine.flush()
        return crash_copy(path, copy)


def test_a_first_flush_of_much_saves_a_table_for_the_opening_after_another_kill(tmp_path: Path) -> None:
    """After a kill a large log is read, rewritten and synced once; openings after further kills use a saved table."""
    copy = killed(tmp_path / "state", tmp_path / "first", 5_000)
    with FastStateMachine(copy, auto_compact=False) as machine:
        assert machine.stats().recovery.suspect_bytes > 5_000_000
        machine.flush()
        size = machine.stats().log_bytes
        copy = crash_copy(copy, tmp_path / "second")
    for number in range(3):
        disk = Disk()
        with FastStateMachine(copy, auto_compact=False, _files=disk.files) as machine:
            recovery = machine.stats().recovery
            assert inside(machine).index.loaded
            assert (recovery.suspect_bytes, recovery.log_bytes) == (0, size)
            assert machine.durable() == machine.last_applied() == LogId(5_000, 1)
            assert machine.get(b"key 5000") == bytes(1000)
            machine.verify()
            inside(machine).check()
            disk.forget()
            machine.flush()
            assert [call.method for call in disk.calls if call.method in ("write", "sync")] == []
            copy = crash_copy(copy, tmp_path / f"again {number}")
            assert machine.stats().log_bytes == size


def test_a_first_flush_of_less_is_noted_in_a_frame(tmp_path: Path) -> None:
    """A short log gets no table; it is not written again after later kills, and does not grow with each of them."""
    copy = killed(tmp_path / "state", tmp_path / "first", 200)
    sizes = []
    for number in range(4):
        with FastStateMachine(copy) as machine:
            recovery = machine.stats().recovery
            assert recovery.suspect_bytes == FRAME_HEADER if number else recovery.suspect_bytes > 200_000
            assert not inside(machine).index.loaded
            machine.flush()
            assert machine.durable() == machine.last_applied() == LogId(200, 1)
            copy = crash_copy(copy, tmp_path / f"again {number}")
            sizes.append(machine.stats().log_bytes)
    assert len(set(sizes)) == 1


def test_the_note_leaves_what_no_frame_carries_yet(tmp_path: Path) -> None:
    """An applied entry without a command is in the saved table if it came before the flush, not if it came after."""
    copy = killed(tmp_path / "state", tmp_path / "first", 5_000)
    with FastStateMachine(copy, auto_compact=False) as machine:
        machine.update_last_applied((5_001, 2))
        machine.flush()
        machine.update_last_applied((5_002, 2))
        copy = crash_copy(copy, tmp_path / "second")
    with FastStateMachine(copy) as machine:
        assert inside(machine).index.loaded
        assert machine.last_applied() == LogId(5_001, 2)
        assert (machine.entry_term(5_001), machine.entry_term(5_002)) == (2, None)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_note_without_room_is_no_error(tmp_path: Path, error: int, machine_at: Opener) -> None:
    """If there is no room to record the first flush, the flush succeeds all the same, and so do later ones."""
    copy = killed(tmp_path / "state", tmp_path / "first", 200)
    disk = Disk()
    machine = machine_at(copy, _files=disk.files)
    disk.fail("allocate", error)
    disk.fail("allocate", error)
    machine.flush()
    assert machine.durable() == LogId(200, 1)
    machine.apply([(201, 1, fastsm.put(b"more", b""))])
    machine.flush()
    assert machine.durable() == LogId(201, 1)


def test_a_first_sync_that_fails_is_not_noted(tmp_path: Path, machine_at: Opener) -> None:
    """A first sync that fails records nothing, so that the next opening treats all bytes as suspect again."""
    copy = killed(tmp_path / "state", tmp_path / "first", 5_000)
    disk = Disk()
    machine = machine_at(copy, _files=disk.files)
    suspect = machine.stats().recovery.suspect_bytes
    disk.fail("sync")
    with pytest.raises(fastsm.StorageError):
        machine.flush()
    again = crash_copy(copy, tmp_path / "second")
    with pytest.raises(fastsm.StorageError):
        machine.close()
    with FastStateMachine(again) as machine:
        assert machine.stats().recovery.suspect_bytes == suspect
        assert not inside(machine).index.loaded


@pytest.mark.parametrize("meanwhile", ["apply", "clear", "compact", "close"])
def test_writers_do_not_wait_while_the_table_is_saved(
    tmp_path: Path, meanwhile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a first flush saves the table, other calls need not wait, and the saved table is correct."""
    monkeypatch.setattr(generations, "SAVE_TABLE_ABOVE", 0)
    copy = killed(tmp_path / "state", tmp_path / "first", 200)
    disk = Disk()
    machine = FastStateMachine(copy, auto_compact=False, retain_entries=0, _files=disk.files)
    gate = disk.hold("pace_writeback")
    with in_thread(machine.flush) as flushing:
        gate.wait()
        if meanwhile == "close":
            with in_thread(machine.close):
                while not inside(machine).jobs.closed:
                    time.sleep(0.001)
                gate.open()
        else:
            machine.apply([(201, 1, fastsm.put(b"key 7", b"newer"))])
            if meanwhile != "apply":
                getattr(machine, meanwhile)()
            gate.open()
    assert flushing.error is None
    if meanwhile != "close":
        machine.flush()
        killed_again = crash_copy(copy, tmp_path / "second")
        state = dict(machine.items())
        machine.close()
        with FastStateMachine(killed_again, verify_on_open="full") as again:
            assert inside(again).index.loaded or meanwhile == "clear"
            inside(again).check()
            assert dict(again.items()) == state
    tables = {path.name for path in copy.iterdir() if path.name.startswith("table-")}
    assert len(tables) <= 1
    assert not any(name.endswith(".tmp") for name in tables)
