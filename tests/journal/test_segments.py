"""New and removed segments of the journal, with failing calls, other threads and damaged bytes in between."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fastsm import CorruptionError, StorageError
from fastsm.disk.files import Directory
from fastsm.integrations.pysyncobj.journal import FastJournal as Journal

LARGE = bytes(40_000)


def files_that(**changes: Callable[..., Any]) -> type[Directory]:
    """Return a seam to the system with some of its methods replaced."""
    return type("Files", (Directory,), changes)


def name_of(fd: Any) -> str:
    return os.path.basename(os.readlink(f"/proc/self/fd/{int(fd)}"))


def segments_in(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if name.startswith("journal-"))


def filled(path: Path, files: type[Directory] = Directory, *, durable: bool = True, segments: int = 1) -> Journal:
    """Return a journal with a number of full segments, and a last one with a single entry."""
    journal = Journal(path, durable=durable, _files=files)
    journal.set_vote(7, "me")
    index = 0
    for _ in range(segments):
        for _ in range(30):
            index += 1
            journal.add(LARGE, index, 7)
        journal.sync()
        journal.rotate()
    journal.add(b"last", index + 1, 7)
    journal.sync()
    return journal


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("goes_on", [False, True])
def test_after_a_segment_that_could_not_be_synced_nothing_more_is_written(
    tmp_path: Path, prepared: bool, goes_on: bool
) -> None:
    """If a new segment's first sync fails, the journal takes no more entries, and synced entries are there."""
    failing = threading.Event()

    def sync(self: Any, fd: Any) -> None:
        if failing.is_set() and name_of(fd) == "journal-2" and os.fstat(int(fd)).st_size > 96:
            raise OSError(errno.EIO, "injected")
        os.fdatasync(int(fd))

    journal = Journal(tmp_path / "j", durable=True, _files=files_that(sync=sync))
    for index in range(1, 40):
        journal.add(LARGE, index, 1)
    journal.sync()
    if prepared:
        journal.prepare()
    failing.set()
    with pytest.raises(StorageError):
        journal.rotate()
    failing.clear()
    if goes_on:
        with pytest.raises(StorageError):
            journal.add(b"more", 40, 1)
    journal.abandon()
    with closing(Journal(tmp_path / "j", durable=True)) as journal:
        assert (journal.first_index, journal.last_index) == (1, 39)


def test_a_segment_set_aside_during_a_removal_stays_until_the_next_one(tmp_path: Path) -> None:
    """A segment that is set aside during a removal is removed by the next one, whose syncs cover its replacement."""
    during: list[Callable[[], None]] = []

    def sync(self: Any, fd: Any) -> None:
        os.fdatasync(int(fd))
        if during:
            thread = threading.Thread(target=during.pop())
            thread.start()
            thread.join()

    journal = filled(tmp_path / "j", files_that(sync=sync), durable=False, segments=2)
    journal.truncate_before(31)  # the first one is set aside
    for index in range(62, 92):
        journal.add(LARGE, index, 7)

    def set_another_aside() -> None:
        journal.rotate()
        journal.truncate_before(91)

    during.append(set_another_aside)
    journal.remove_retired()
    assert not during
    assert segments_in(tmp_path / "j") == ["journal-2", "journal-3", "journal-4"]
    journal.remove_retired()
    assert segments_in(tmp_path / "j") == ["journal-3", "journal-4"]
    journal.close()


def test_segments_go_one_after_the_other(tmp_path: Path) -> None:
    """A failed removal is retried, and each is durable before the next one, so that numbers never have a gap."""
    calls: list[str] = []
    failing = threading.Event()

    def unlink(self: Any, name: str) -> None:
        calls.append(name)
        if failing.is_set():
            failing.clear()
            raise OSError(errno.EIO, "injected")
        Directory.unlink(self, name)

    def sync_directory(self: Any) -> None:
        calls.append("directory")
        Directory.sync_directory(self)

    journal = filled(tmp_path / "j", files_that(unlink=unlink, sync_directory=sync_directory), segments=2)
    journal.truncate_before(61)
    calls.clear()
    failing.set()
    with pytest.raises(StorageError):
        journal.remove_retired()
    journal.remove_retired()
    assert calls == ["journal-1", "journal-1", "directory", "journal-2", "directory"]
    journal.close()
    with closing(Journal(tmp_path / "j", durable=True)) as journal:
        assert (journal.first_index, journal.last_index) == (61, 61)


def test_a_journal_that_lost_its_beginning_is_no_new_one(tmp_path: Path) -> None:
    """Damage in the first frame of the only segment is corruption: its term and vote must not be forgotten."""
    journal = filled(tmp_path / "j", durable=False)
    journal.truncate_before(31)
    journal.remove_retired()
    journal.abandon()
    path = tmp_path / "j" / "journal-2"
    data = bytearray(path.read_bytes())
    data[96 + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError):
        Journal(tmp_path / "j", durable=False)
    assert path.read_bytes() == bytes(data)
