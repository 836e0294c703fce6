"""read_only: the state at the time of opening, also while an owner writes; no file is changed."""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import fastsm
from fastsm import CorruptionError, FastStateMachine, LogId, ReadOnlyError, SnapshotMetadata, StorageError
from support.faulty import crash_copy
from support.histories import History, model_of, state_of
from support.inside import inside

Opener = Callable[..., FastStateMachine]


def look(directory: Path) -> dict[str, tuple[bytes, int, int, int]]:
    """Return every file's bytes, size, modification time and mode, and the directory's own times."""
    found = {}
    for path in sorted(directory.iterdir()):
        status = path.stat()
        found[path.name] = (path.read_bytes(), status.st_size, status.st_mtime_ns, status.st_mode)
    status = directory.stat()
    found["."] = (b"", 0, status.st_mtime_ns, status.st_mode)
    return found


def fill(machine: FastStateMachine, seed: int = 0) -> list[list[fastsm.Entry]]:
    """Apply a random history without a flush; return its chunks."""
    chunks = [chunk for chunk, _ in zip(History(seed), range(40), strict=False)]
    for chunk in chunks:
        machine.apply(chunk)
    return chunks


@pytest.fixture
def closed(directory: Path) -> Path:
    """Provide a cleanly closed directory."""
    with FastStateMachine(directory) as machine:
        fill(machine)
    return directory


# ---- the state that it shows ---------------------------------------------------------------------------


def test_a_read_only_machine_shows_a_closed_directory(directory: Path, machine_at: Opener) -> None:
    """Every read of a read-only machine gives what its owner applied."""
    with FastStateMachine(directory) as owner:
        expected = state_of(model_of(fill(owner)))
    reader = machine_at(directory, read_only=True)
    assert state_of(reader) == expected
    assert reader.is_running()
    inside(reader).check()


def test_a_read_only_machine_shows_the_state_at_its_opening(directory: Path, machine_at: Opener) -> None:
    """A read-only machine shows what the owner applied before, flushed or not, and nothing that it does later."""
    owner = machine_at(directory)
    chunks = fill(owner)
    readers = [machine_at(directory, read_only=True)]
    expected = [state_of(model_of(chunks))]
    history = History(1, after=owner.last_applied())
    for step in (lambda: None, owner.flush, lambda: owner.apply([(owner.last_applied().index + 1, 99, fastsm.noop())])):
        chunks.append(history.chunk())
        owner.apply(chunks[-1])
        readers.append(machine_at(directory, read_only=True))
        expected.append(state_of(model_of(chunks)))
        step()
    owner.clear()
    readers.append(machine_at(directory, read_only=True))
    expected.append(state_of(model_of([])))
    owner.apply([(1, 1, fastsm.put(b"key-1", b"x" * (1 << 20)))])
    owner.close()
    assert [state_of(reader) for reader in readers] == expected
    for reader in readers:
        inside(reader).check()


def test_several_at_once_do_not_exclude_each_other(closed: Path, machine_at: Opener) -> None:
    """Several read-only machines may be open, even in one process, and an owner can still open the directory."""
    readers = [machine_at(closed, read_only=True) for _ in range(5)]
    owner = machine_at(closed)
    assert [reader.last_applied() for reader in readers] == [owner.last_applied()] * 5


def test_expect_applied_is_judged(closed: Path) -> None:
    """``expect_applied`` that the directory does not meet is a ``CorruptionError``."""
    with FastStateMachine(closed, read_only=True) as reader:
        last = reader.last_applied()
    FastStateMachine(closed, read_only=True, expect_applied=last).close()
    with pytest.raises(CorruptionError):
        FastStateMachine(closed, read_only=True, expect_applied=LogId(last.index + 1, last.term))


def test_a_torn_tail_is_passed_over_and_not_cut(directory: Path, tmp_path: Path, machine_at: Opener) -> None:
    """A torn tail after the last whole frame is not shown, and is not cut."""
    owner = machine_at(directory)
    chunks = fill(owner)
    end = owner.stats().log_bytes
    crashed = crash_copy(directory, tmp_path / "crashed")
    with (crashed / "log-1").open("r+b") as log:
        log.seek(end)
        log.write(b"torn" * 100)
    before = look(crashed)
    reader = machine_at(crashed, read_only=True)
    assert state_of(reader) == state_of(model_of(chunks))
    reader.verify()
    reader.close()
    assert look(crashed) == before


def test_damage_is_found(closed: Path) -> None:
    """A flipped bit of a closed directory is a ``CorruptionError``, and no file is changed."""
    log = closed / "log-1"
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 1
    log.write_bytes(content)
    before = look(closed)
    with pytest.raises(CorruptionError):
        FastStateMachine(closed, read_only=True)
    assert look(closed) == before


# ---- nothing is changed --------------------------------------------------------------------------------


def test_a_read_only_machine_changes_nothing(closed: Path) -> None:
    """Opening, every kind of read, ``verify``, ``stop`` and ``close`` change no byte, no time and no name."""
    before = look(closed)
    with FastStateMachine(closed, read_only=True) as reader:
        state_of(reader)
        list(reader.items())
        reader.scan_prefix(b"")
        reader.columns()
        reader.stats()
        reader.verify()
        assert look(closed) == before
        reader.stop()
        reader.start()
    assert look(closed) == before


def test_a_directory_that_may_not_be_written_is_opened(closed: Path, tmp_path: Path) -> None:
    """A directory without permission to write can be opened."""
    for path in closed.iterdir():
        path.chmod(0o400)
    closed.chmod(0o500)
    try:
        with FastStateMachine(closed, read_only=True) as reader:
            assert reader.last_applied().index > 0
        assert {stat.S_IMODE(path.stat().st_mode) for path in closed.iterdir()} == {0o400}
    finally:
        closed.chmod(0o700)


def test_no_lock_is_taken(closed: Path, machine_at: Opener) -> None:
    """A read-only machine leaves the lock free, and opens even without LOCK."""
    machine_at(closed, read_only=True)
    with (closed / "LOCK").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (closed / "LOCK").unlink()
    machine_at(closed, read_only=True)
    assert not (closed / "LOCK").exists()


def test_files_of_other_generations_are_left_alone(closed: Path, machine_at: Opener) -> None:
    """Files that an owner would remove stay, because they may be the owner's next generation."""
    (closed / "log-2").write_bytes(b"being made")
    (closed / "CURRENT.tmp").write_bytes(b"being made")
    before = look(closed)
    machine_at(closed, read_only=True).close()
    assert look(closed) == before


def test_every_write_is_refused(closed: Path, machine_at: Opener) -> None:
    """Every call that would change the state or the disk raises ``ReadOnlyError``, and changes nothing."""
    before = look(closed)
    reader = machine_at(closed, read_only=True)
    state = state_of(reader)
    index, term = reader.last_applied()
    metadata = SnapshotMetadata(LogId(index, term), bytes(32))
    put = [(index + 1, term, fastsm.put(b"key-1", b"new"))]
    writes: list[Callable[[], object]] = [
        lambda: reader.apply(put),
        lambda: asyncio.run(reader.apply_chunk(put)),
        lambda: asyncio.run(reader.apply_chunk(put * 100)),
        lambda: reader.update_last_applied(LogId(index + 1, term)),
        lambda: reader.persist_last_applied(LogId(index + 1, term)),
        lambda: reader.update_last_snapshot_metadata(metadata),
        lambda: reader.persist_last_snapshot_metadata(metadata),
        reader.clear,
        lambda: asyncio.run(reader.reset()),
    ]
    for write in writes:
        with pytest.raises(ReadOnlyError, match="read_only"):
            write()
    assert (state_of(reader), reader.snapshot_metadata()) == (state, None)
    reader.close()
    assert look(closed) == before


def test_there_is_nothing_to_flush(closed: Path, machine_at: Opener) -> None:
    """``flush`` and ``save_hard_state`` do nothing, because everything shown came from the disk."""
    before = look(closed)
    reader = machine_at(closed, read_only=True)
    reader.flush()
    asyncio.run(reader.flush_async())
    reader.save_hard_state()
    assert look(closed) == before


# ---- no state ------------------------------------------------------------------------------------------


def test_an_absent_directory_is_a_typed_error_and_is_not_created(tmp_path: Path) -> None:
    """A path that does not exist is a ``StorageError``, and is not created."""
    for path in (tmp_path / "absent", tmp_path / "absent" / "deeper"):
        with pytest.raises(StorageError) as raised:
            FastStateMachine(path, read_only=True)
        assert raised.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_a_typed_error_and_stays_empty(tmp_path: Path) -> None:
    """A directory without a state is a ``CorruptionError`` that says so; nothing is created in it."""
    with pytest.raises(CorruptionError, match="CURRENT"):
        FastStateMachine(tmp_path, read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_directory_is_a_typed_error(tmp_path: Path) -> None:
    """A file or a FIFO in place of the directory is immediately an error, without a wait for a writer."""
    (tmp_path / "file").write_bytes(b"content")
    os.mkfifo(tmp_path / "fifo")
    for name in ("file", "fifo"):
        with pytest.raises(StorageError):
            FastStateMachine(tmp_path / name, read_only=True)
    assert (tmp_path / "file").read_bytes() == b"content"
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


@pytest.mark.parametrize("name", ["CURRENT", "log-1"])
@pytest.mark.parametrize("kind", ["a FIFO", "a directory", "a symbolic link", "nothing", "an empty file"])
def test_anything_in_place_of_a_file_of_the_state_is_a_typed_error(closed: Path, name: str, kind: str) -> None:
    """Anything else in place of a file of the state is immediately a typed error, and is left as it is."""
    path = closed / name
    moved = closed.parent / "moved"
    path.rename(moved)
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a symbolic link":
        path.symlink_to(moved)
    elif kind == "an empty file":
        path.touch()
    before = os.lstat(path) if kind != "nothing" else None
    with pytest.raises((CorruptionError, StorageError)):
        FastStateMachine(closed, read_only=True)
    if before is None:
        assert not path.exists()
    else:
        now = os.lstat(path)
        assert (now.st_mode, now.st_ino, now.st_size) == (before.st_mode, before.st_ino, before.st_size)


# ---- while an owner writes -----------------------------------------------------------------------------


def test_a_read_only_opening_succeeds_at_any_moment_of_an_owner(directory: Path) -> None:
    """While an owner appends, resets, closes and opens, every read-only opening shows a whole state without error."""
    groups = [b"a", b"b", b"c", b"d"]
    FastStateMachine(directory).close()
    ending = threading.Event()
    failures: list[BaseException] = []
    rounds = 0

    def own() -> None:
        nonlocal rounds
        try:
            while not ending.is_set():
                with FastStateMachine(directory) as owner:
                    owner.clear()
                    for index in range(1, 40):
                        size = (10, 3000, 150 << 10)[index % 3]
                        values = [b"%d" % index + bytes(size)] * len(groups)
                        owner.apply([(index, 1, fastsm.put_many(groups, values))])
                        if index % 13 == 0:
                            owner.flush()
                    if rounds % 2:
                        owner.clear()
                rounds += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=own)
    thread.start()
    looks, seen = 0, set()
    try:
        while (rounds < 25 or looks < 200) and not failures and thread.is_alive():
            with FastStateMachine(directory, read_only=True) as reader:
                last = reader.last_applied().index
                values = reader.get_many(groups)
                if last:
                    assert len(set(values)) == 1
                    assert values[0] is not None
                    assert values[0].rstrip(b"\x00") == b"%d" % last
                else:
                    assert values == [None] * len(groups)
                looks += 1
                seen.add(last)
    finally:
        ending.set()
        thread.join()
    assert not failures, failures[0]
    assert len(seen) > 3, f"{looks} looks saw only {seen}"
