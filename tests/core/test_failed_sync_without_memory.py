"""A sync that fails while there is no memory to say so: the file is poisoned, as another sync would seem to succeed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import FastStateMachine, LogId, StorageError
from fastsm.disk.files import Directory

Opener = Callable[..., FastStateMachine]


class FailingDisk(Directory):
    """A disk whose next sync fails once."""

    failing = False

    def sync(self, fd: int) -> None:
        if FailingDisk.failing:
            FailingDisk.failing = False
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync(fd)


def fail_next_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrap(*arguments: Any) -> StorageError:
        raise MemoryError

    monkeypatch.setattr(FailingDisk, "failing", True)
    monkeypatch.setattr(StorageError, "wrap", wrap)


def test_a_machine_is_poisoned(directory: Path, machine_at: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushes and writes fail from then on; reads go on."""
    machine = machine_at(directory, _files=FailingDisk)
    machine.apply([(1, 1, fastsm.put(b"key", b"value"))])
    with monkeypatch.context() as patch:
        fail_next_sync(patch)
        with pytest.raises(MemoryError):
            machine.flush()
    for call in (machine.flush, lambda: machine.apply([(2, 1, fastsm.noop())]), machine.close):
        with pytest.raises(StorageError, match="poisoned"):
            call()
        assert not machine.is_running() or (machine.durable(), machine.get(b"key")) == (LogId(0, 0), b"value")


def test_a_raft_log_is_poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncs and appends fail from then on."""
    log = fastsm.RaftLog(tmp_path / "log", _files=FailingDisk)
    log.append([(1, 1, b"a")])
    with monkeypatch.context() as patch:
        fail_next_sync(patch)
        with pytest.raises(MemoryError):
            log.sync()
    for call in (log.sync, lambda: log.append([(2, 1, b"b")])):
        with pytest.raises(StorageError, match="poisoned"):
            call()
    assert log.durable_index == 0
    log.close()
