"""Bytes that are not verified yet: what an opening from a saved table may find, and must not trust."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from generation.test_saved_table import entries, is_used, many_keys, table_in

import fastsm
import fastsm.core.generations
from fastsm import CorruptionError, FastStateMachine, open_snapshot
from fastsm.disk.headers import LOG_HEADER_BYTES
from support.faulty import contents, crash_copy, memory_directory
from support.inside import inside
from support.tables import TableFile, place_of

Opener = Callable[..., FastStateMachine]
TESTS = Path(__file__).resolve().parent.parent
SIZE = 8  # the offset of a value's size in a record
KEY_SIZE = 12


@pytest.fixture(autouse=True)
def _always_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastsm.core.generations, "SAVE_TABLE_ABOVE", 0)


@pytest.fixture
def state(directory: Path) -> Path:
    """Provide a cleanly closed state with the key ``base`` in its base, ``log`` in its log, and a table."""
    with FastStateMachine(directory) as machine:
        machine.apply(entries(1, [fastsm.put(b"base", b"in the base"), fastsm.config(b"members")]))
        machine.compact(machine.last_applied())
        machine.apply(entries(3, [fastsm.put(b"log", b"in the log"), fastsm.put(b"last", bytes(3_000))]))
    return directory


def overwrite(path: Path, offset: int, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, content, offset)
    os.close(fd)


def damage(state: Path, name: str) -> tuple[Path, int]:
    """Change a byte of a value in the base or the log; return the file, and the offset that its error names."""
    path = state / f"{name}-2"
    overwrite(path, path.read_bytes().index(b"in the " + name.encode()), b"I")
    return path, 128 if name == "base" else LOG_HEADER_BYTES


def record_of(path: Path, key: bytes) -> int:
    """Return the offset of a key's record in a file."""
    return path.read_bytes().index(key + b"in the") - 16


def assert_corrupt(machine: FastStateMachine, path: Path, offset: int) -> None:
    """Check that every call except close and is_running raises the error of the damage."""
    for call in (
        lambda: machine.get(b"log"), lambda: machine.get_many([]), lambda: machine.get_view(b"log"), machine.len,
        lambda: machine.apply([]), machine.flush, machine.last_applied, machine.stats, machine.keys, machine.items,
        lambda: b"log" in machine, machine.membership, machine.durable, lambda: machine.entry_term(1),
        machine.stop, machine.start, machine.clear, machine.save_hard_state, machine.compact, machine.verify,
        lambda: machine.write_snapshot(path.parent / "never"), lambda: machine.update_last_applied((99, 9)),
    ):
        with pytest.raises(CorruptionError) as caught:
            call()
        assert (caught.value.path, caught.value.offset) == (str(path), offset)
    assert machine.is_running()


# ---- verify_on_open --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["base", "log"])
def test_full_verification_finds_damage_before_the_state_can_be_read(state: Path, name: str) -> None:
    """With ``verify_on_open="full"`` opening raises a ``CorruptionError`` with file and offset, and changes nothing."""
    path, offset = damage(state, name)
    before = contents(state)
    with pytest.raises(CorruptionError) as caught:
        FastStateMachine(state, verify_on_open="full")
    assert (caught.value.path, caught.value.offset) == (str(path), offset)
    assert contents(state) == before


def test_full_verification_of_a_sound_state(state: Path, machine_at: Opener) -> None:
    """A sound state is verified when the constructor returns, although the table was used."""
    machine = machine_at(state, verify_on_open="full")
    assert is_used(machine)
    assert machine.stats().verified


@pytest.mark.parametrize("name", ["base", "log"])
@pytest.mark.parametrize("end", ["clean", "killed"])
def test_background_verification_poisons_all_calls(tmp_path: Path, state: Path, name: str, end: str) -> None:
    """Damage found in the background is the error of every call; closing writes nothing, and reopening finds it."""
    if end == "killed":
        with FastStateMachine(state) as machine:
            machine.apply(entries(5, [fastsm.put(b"after", b"the table")]))
            state = crash_copy(state, tmp_path / "killed")
    path, offset = damage(state, name)
    machine = FastStateMachine(state)
    inside(machine).verifying.background.wait()
    assert_corrupt(machine, path, offset)
    before = contents(state)
    machine.close()
    assert not machine.is_running()
    assert contents(state) == before
    machine = FastStateMachine(state)
    inside(machine).verifying.background.wait()
    assert_corrupt(machine, path, offset)
    machine.close()
    table_in(state).unlink()
    with pytest.raises(CorruptionError) as caught:
        FastStateMachine(state, verify_on_open="full")
    assert caught.value.path == str(path)


def test_damage_found_while_the_constructor_ends_is_not_forgotten(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage that the verification finds before the constructor ends is the error of every call."""

    class AtOnce(fastsm.core.verifying.BackgroundVerification):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            self.wait()

    monkeypatch.setattr(fastsm.core.verifying, "BackgroundVerification", AtOnce)
    path, offset = damage(state, "base")
    machine = FastStateMachine(state)
    assert_corrupt(machine, path, offset)
    machine.close()


def test_damage_found_during_a_stop_stays(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage that is found while ``stop`` syncs is the error of ``stop`` and of every later call."""
    path, offset = damage(state, "log")
    machine = FastStateMachine(state, verify_on_open="off")
    found = CorruptionError(str(path), offset, "a valid frame", "none")
    sync = inside(type(machine)).sync_to

    def report_then_sync(self: FastStateMachine, mark: object) -> None:
        sync(self, mark)  # type: ignore[arg-type]
        self._set_corrupt(found)

    monkeypatch.setattr(type(machine), "_sync_to", report_then_sync)
    with pytest.raises(CorruptionError):
        machine.stop()
    assert_corrupt(machine, path, offset)
    machine.close()


def test_without_verification_it_is_left_to_verify(state: Path, machine_at: Opener) -> None:
    """With ``verify_on_open="off"`` nothing is verified until ``verify`` is called, which finds damage."""
    machine = machine_at(state, verify_on_open="off")
    assert is_used(machine)
    assert not machine.stats().verified
    machine.apply(entries(5, [fastsm.put(b"more", b"")]))
    assert not machine.stats().verified
    machine.verify()
    assert machine.stats().verified
    machine.close()
    path, offset = damage(state, "base")
    machine = FastStateMachine(state, verify_on_open="off")
    assert machine.get(b"base") == b"In the base"  # damaged as it is on the disk
    with pytest.raises(CorruptionError) as caught:
        machine.verify()
    assert (caught.value.path, caught.value.offset) == (str(path), offset)
    assert not machine.stats().verified
    machine.close()


# ---- damaged sizes ---------------------------------------------------------------------------------------

READ_ALL = """
import sys, fastsm
from fastsm import CorruptionError, FastStateMachine
machine = FastStateMachine(sys.argv[1], verify_on_open="off")
key, others = sys.argv[2].encode(), [b"base", b"log", b"last"]
assert machine._index.loaded
machine.get_many([other for other in others if other != key])
for name, call in {
    "get": lambda: machine.get(key), "get_many": lambda: machine.get_many(others),
    "get_view": lambda: machine.get_view(key), "get_columns": lambda: machine.get_columns(others),
    "items": lambda: list(machine.items()), "columns": machine.columns, "scan_prefix": lambda: machine.scan_prefix(b""),
    "keys": lambda: list(machine.keys()),
}.items():
    try:
        print(name, repr(call()))
    except CorruptionError as error:
        print(name, error.path, error.offset)
index = machine.last_applied().index
try:
    machine.apply([(index + 1, 1, fastsm.compare_and_swap(key, b"x" * 100, b"y"))])
except CorruptionError as error:
    print("compare_and_swap", error.path, error.offset)
assert machine.last_applied().index == index
machine.apply([(index + 1, 1, fastsm.put(key, b"new"))])
assert machine.get(key) == b"new"
assert len(list(machine.items())) == 3
print("end", machine.get_many(others)[1] is not None)
"""


@pytest.mark.parametrize("size", [2**31 - 1, 2**32 - 1, 1 << 20])
@pytest.mark.parametrize("name", ["base", "log"])
def test_a_size_that_was_damaged_to_be_huge_is_an_error_of_every_read(state: Path, name: str, size: int) -> None:
    """Each read and each comparison raises ``CorruptionError`` with file and offset, even before verification."""
    path = state / f"{name}-2"
    at = record_of(path, name.encode())
    overwrite(path, at + SIZE, size.to_bytes(4, "little"))
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(state), name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "end True"
    for line in lines[:-1]:
        assert line.split(" ", 1)[1] == f"{path} {at}", line
    assert len(lines) == 10


GROW = """
import sys, fastsm
from fastsm import FastStateMachine
machine = FastStateMachine(sys.argv[1], verify_on_open="off")
assert machine._index.loaded
for call in (lambda: machine.get_many([b"%d" % i for i in range(30_000)]), lambda: list(machine.keys())):
    try:
        call()
    except fastsm.CorruptionError:
        print("error")
print("grown")
"""


def test_a_key_size_damaged_at_the_end_of_the_log_is_read_within_the_arena(directory: Path, tmp_path: Path) -> None:
    """When segments split, damaged key sizes at the log's end do not cause reads beyond it, even after a cut tail."""
    keys = [b"%d" % i for i in range(24_000)]
    with FastStateMachine(directory) as machine:
        for start in range(0, len(keys), 1_000):
            machine.apply(entries(start + 1, [fastsm.put(key, b"") for key in keys[start : start + 1_000]]))
    places = [place_of(slot) for _, slot in TableFile(table_in(directory)).slots()]
    with FastStateMachine(directory) as machine:
        for start in range(24_000, 25_600, 50):  # the fourth doubling happens while these are recovered
            machine.apply(entries(start + 1, [fastsm.put(b"%d" % i, b"") for i in range(start, start + 50)]))
        state = crash_copy(directory, tmp_path / "killed")
    for place in sorted(places)[-2_000:]:
        overwrite(state / "log-1", place + KEY_SIZE, b"\xff\xff")
    done = subprocess.run([sys.executable, "-c", GROW, str(state)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "error\ngrown\n"), done.stderr


# ---- hostile tables --------------------------------------------------------------------------------------

def test_forged_tables_with_right_checksums_crash_nothing() -> None:
    """Using a forged table gives an error, or wrong values that its forger chose, but never a crash."""
    with memory_directory() as root:
        many_keys(root / "state", ordered=True)
        (root / "scratch").mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "support.hostile_tables", str(root / "state"), str(root / "scratch")],
            capture_output=True, text=True, check=False, cwd=TESTS)  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]}: {done.stderr}"
    assert len(lines) > 160
    assert not [line for line in lines if line.endswith(": wrong")]
    assert sum(line.endswith(": read") for line in lines) > 90  # the table was refused
    assert sum(": believed" in line for line in lines) > 50  # the table was plausible


# ---- snapshots of unverified bytes -----------------------------------------------------------------------

@pytest.mark.parametrize("name", ["base", "log"])
@pytest.mark.parametrize("options", [{}, {"verify_on_open": "off"}, {"read_only": True}])
def test_no_snapshot_is_written_of_damaged_bytes(
    state: Path, tmp_path: Path, name: str, options: dict[str, object]
) -> None:
    """A snapshot, which would give damaged bytes a correct checksum, is a ``CorruptionError`` without a file."""
    path, _ = damage(state, name)
    if options.get("read_only") and name == "log":  # a read-only opening checks the log's frames
        with pytest.raises(CorruptionError):
            FastStateMachine(state, **options)  # type: ignore[arg-type]
        return
    machine = FastStateMachine(state, **options)  # type: ignore[arg-type]
    with pytest.raises(CorruptionError) as caught:
        machine.write_snapshot(tmp_path / "snapshot")
    machine.close()
    assert caught.value.path == str(path)
    assert not (tmp_path / "snapshot").exists() or not os.listdir(tmp_path / "snapshot")


@pytest.mark.parametrize("name", ["base", "log"])
@pytest.mark.parametrize("verify", ["background", "off"])
def test_damaged_bytes_are_not_compacted(state: Path, name: str, verify: str) -> None:
    """A compaction of damaged bytes raises ``CorruptionError``, and makes no generation."""
    path, _ = damage(state, name)
    machine = FastStateMachine(state, verify_on_open=verify, retain_entries=0)  # type: ignore[arg-type]
    with pytest.raises(CorruptionError) as caught:
        machine.compact()
    assert caught.value.path == str(path)
    names = sorted(path.name for path in state.iterdir())
    assert names == ["CURRENT", "LOCK", "PUBLISHED", "base-2", "log-2", "table-2"]
    machine.close()


def test_a_snapshot_waits_for_the_verification(state: Path, tmp_path: Path, machine_at: Opener) -> None:
    """A snapshot is written after all bytes were verified, whichever way the state was opened."""
    for number, options in enumerate(({}, {"verify_on_open": "off"}, {"read_only": True})):
        machine = machine_at(state, **options)
        machine.write_snapshot(tmp_path / str(number))
        assert machine.stats().verified
        with open_snapshot(tmp_path / str(number)) as snapshot:
            snapshot.verify()
        machine.close()
