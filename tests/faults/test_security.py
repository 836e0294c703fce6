"""Hostile files in a directory: links are not followed, and everything that is made is private to its owner."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

import fastsm
from fastsm import FastsmError, FastStateMachine, RaftLog, SnapshotReceiver, open_snapshot, raft_log
from fastsm.core import generations
from fastsm.integrations.pysyncobj.journal import FastJournal as Journal

CHUNK = [(1, 1, fastsm.put(b"key", b"value"))]
SECRET = b"nobody's business"


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save tables of any size, and let each entry of a Raft log begin a segment."""
    monkeypatch.setattr(generations, "SAVE_TABLE_ABOVE", 0)
    monkeypatch.setattr(raft_log, "SEGMENT_BYTES", 1)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Provide a closed state with every kind of file: base, log, table, CURRENT, LOCK."""
    path = tmp_path / "state"
    with FastStateMachine(path, retain_entries=0) as machine:
        machine.apply(CHUNK)
        machine.compact()
    assert {name.split("-")[0] for name in os.listdir(path)} == {"base", "log", "table", "CURRENT", "LOCK", "PUBLISHED"}
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Provide a file elsewhere, which must stay unchanged."""
    path = tmp_path / "outside"
    path.write_bytes(SECRET)
    path.chmod(0o640)
    return path


def fill(log: RaftLog) -> None:
    """Make every kind of file of a log: three segments, NEWEST, LOCK."""
    for index in range(1, 4):
        log.append([(index, 1, b"entry")])
    log.save_hard_state(1, b"me")


def use(path: Path) -> None:
    """Call everything that writes."""
    with FastStateMachine(path, retain_entries=0) as machine:
        machine.apply([(machine.last_applied().index + 1, 1, fastsm.put(b"key", b"another"))])
        machine.flush()
        machine.compact()
        machine.clear()
    with Opened(path / "journal") as journal:
        journal.add(b"entry", 1, 1)
        journal.sync()


class Opened:
    def __init__(self, path: Path) -> None:
        self.journal = Journal(path)

    def __enter__(self) -> Journal:
        return self.journal

    def __exit__(self, *_: object) -> None:
        self.journal.close()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_everything_that_is_made_is_private_to_its_owner(umask: int, tmp_path: Path) -> None:
    """Directories of states, snapshots, receivers and logs have mode 0700, and files 0600, whatever the umask is."""
    before = os.umask(umask)
    try:
        with FastStateMachine(tmp_path / "state", retain_entries=0) as machine:
            machine.apply(CHUNK)
            machine.compact()
            machine.write_snapshot(tmp_path / "snapshots")
        with open_snapshot(tmp_path / "snapshots") as snapshot, SnapshotReceiver(tmp_path / "received") as receiver:
            receiver.write(0, snapshot.read_at(0, snapshot.size))
            receiver.finish()
        with Opened(tmp_path / "journal") as journal, RaftLog(tmp_path / "raft-log") as log:
            journal.add(b"entry", 1, 1)
            fill(log)
    finally:
        os.umask(before)
    made = [path for top in tmp_path.iterdir() for path in (top, *top.rglob("*"))]
    assert len(made) >= 5 + 8 + 5
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("kind", ["base", "log", "table", "CURRENT", "LOCK"])
@pytest.mark.parametrize("target", ["a file outside", "itself, elsewhere", "nothing"])
def test_a_link_in_place_of_a_file_is_refused(kind: str, target: str, state: Path, outside: Path) -> None:
    """A link in place of a file is an error, or is ignored in place of a table; its target stays unchanged."""
    (name,) = (name for name in os.listdir(state) if name.split("-")[0] == kind)
    moved = outside.with_name("moved")
    (state / name).rename(moved)
    content = moved.read_bytes()
    leads_to = {"a file outside": outside, "itself, elsewhere": moved, "nothing": outside.with_name("nothing")}[target]
    (state / name).symlink_to(leads_to)
    with nullcontext() if kind == "table" else pytest.raises(FastsmError, match="symbolic link"):
        use(state)
    assert (outside.read_bytes(), outside.stat().st_mode & 0o777) == (SECRET, 0o640)
    assert moved.read_bytes() == content
    assert not outside.with_name("nothing").exists()


@pytest.mark.parametrize(
    "name", ["CURRENT.tmp", "CURRENT-3.tmp", "log-3", "base-3", "base-3.tmp", "table-3", "table-3.tmp"]
)
def test_a_link_where_a_file_would_be_made_is_not_followed(name: str, state: Path, outside: Path) -> None:
    """A link with the name of a file to be made is replaced, or stays and its number is skipped."""
    (state / name).symlink_to(outside)
    use(state)
    assert (outside.read_bytes(), outside.stat().st_mode & 0o777) == (SECRET, 0o640)
    left = [path.name for path in state.rglob("*") if path.is_symlink()]
    assert left == ([] if name == "CURRENT.tmp" else [name])


@pytest.mark.parametrize("name", ["journal-1", "LOCK"])
def test_a_link_in_a_journal_is_refused(name: str, tmp_path: Path, outside: Path) -> None:
    """A link in place of a journal's file is refused; its target stays unchanged."""
    with Opened(tmp_path / "journal") as journal:
        journal.add(b"entry", 1, 1)
    (tmp_path / "journal" / name).unlink()
    (tmp_path / "journal" / name).symlink_to(outside)
    with pytest.raises(FastsmError, match="symbolic link"):
        Journal(tmp_path / "journal")
    assert (outside.read_bytes(), outside.stat().st_mode & 0o777) == (SECRET, 0o640)


@pytest.mark.parametrize("name", ["journal-2", "journal-4", "NEWEST", "LOCK"])
@pytest.mark.parametrize("target", ["a file outside", "itself, elsewhere", "nothing"])
def test_a_link_in_a_raft_log_is_refused(name: str, target: str, tmp_path: Path, outside: Path) -> None:
    """A link in place of any file of a Raft log is refused; its target stays unchanged."""
    path = tmp_path / "raft-log"
    with RaftLog(path) as log:
        fill(log)
    moved = outside.with_name("moved")
    (path / name).rename(moved)
    content = moved.read_bytes()
    leads_to = {"a file outside": outside, "itself, elsewhere": moved, "nothing": outside.with_name("nothing")}[target]
    (path / name).symlink_to(leads_to)
    with pytest.raises(FastsmError, match="symbolic link"):
        RaftLog(path)
    assert (outside.read_bytes(), outside.stat().st_mode & 0o777) == (SECRET, 0o640)
    assert moved.read_bytes() == content
    assert not outside.with_name("nothing").exists()


@pytest.mark.parametrize("name", ["NEWEST.tmp", "journal-5"])
def test_a_link_where_a_raft_log_would_make_a_file_is_not_followed(name: str, tmp_path: Path, outside: Path) -> None:
    """A link where a Raft log would make a file does not hinder an append; its target stays unchanged."""
    path = tmp_path / "raft-log"
    with RaftLog(path) as log:
        fill(log)
        (path / name).symlink_to(outside)
        log.append([(4, 1, b"another segment")])
    with RaftLog(path) as log:
        assert log.last_index == 4
    assert (outside.read_bytes(), outside.stat().st_mode & 0o777) == (SECRET, 0o640)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["FIFO", "directory"])
@pytest.mark.parametrize("kind", ["base", "log", "CURRENT", "LOCK"])
def test_anything_but_a_regular_file_is_refused(kind: str, make: Callable[[Path], object], state: Path) -> None:
    """A FIFO or a directory in place of a file is immediately a typed error, without a wait for a FIFO's writer."""
    (name,) = (name for name in os.listdir(state) if name.split("-")[0] == kind)
    (state / name).unlink()
    make(state / name)
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            use(state)
        except FastsmError as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(30)
    assert len(errors) == 1, "it blocks" if thread.is_alive() else "there was no error"
