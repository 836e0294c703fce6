"""The saved table: an opening that uses it has the same state as one that reads base and log; or it is not used."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsm
import fastsm.core.generations
from fastsm import Entry, FastStateMachine, LogId, MemoryStateMachine, SnapshotMetadata
from fastsm.disk.headers import LOG_HEADER_BYTES
from support.faulty import crash_copy, memory_directory
from support.histories import History
from support.inside import inside
from support.tables import TableFile, sections_of

Opener = Callable[..., FastStateMachine]
MANY = 7_000  # keys: three segments


@pytest.fixture(autouse=True)
def _always_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save tables of states of any size."""
    monkeypatch.setattr(fastsm.core.generations, "SAVE_TABLE_ABOVE", 0)


def is_used(machine: FastStateMachine) -> bool:
    return inside(machine).index.loaded


def observed(machine: FastStateMachine) -> dict[str, Any]:
    """Return everything that can be read of a machine."""
    keys = sorted(machine.keys())
    return {
        "items": list(machine.items()),
        "found": machine.get_many(keys),
        "modified": [machine.modified(key) for key in keys],
        "applied": machine.last_applied(),
        "membership": machine.membership(),
        "metadata": machine.snapshot_metadata(),
        "runs": inside(machine).terms.runs(),
        "frames": inside(machine).log.frames,
        "live_bytes": machine.stats().live_bytes,
        "dead_bytes": machine.stats().dead_bytes,
    }


def small_state(path: Path) -> dict[str, Any]:
    """Make a cleanly closed state with a base, a log and a table of one segment; return what it holds."""
    history = History(1, large=False)
    machine = FastStateMachine(path, retain_entries=0)
    for _ in range(30):
        machine.apply(history.chunk())
    machine.apply([history.entry()._replace(command=fastsm.config(b"in the base"))])
    machine.compact()
    for _ in range(30):
        machine.apply(history.chunk())
    machine.apply([history.entry()._replace(command=fastsm.config(b"in the log"))])
    machine.persist_last_snapshot_metadata(SnapshotMetadata(machine.last_applied(), bytes(range(32))))
    machine.close()
    with FastStateMachine(path) as machine:
        return observed(machine)


def table_in(path: Path) -> Path:
    (table,) = path.glob("table-*")
    return table


def entries(start: int, commands: list[bytes]) -> list[Entry]:
    return [Entry(index, 1, command) for index, command in enumerate(commands, start)]


def many_keys(path: Path, **options: Any) -> MemoryStateMachine:
    """Make a cleanly closed state with a base and a log of MANY keys; return the model."""
    model = MemoryStateMachine()
    machine = FastStateMachine(path, **options)
    for number in range(0, MANY, 500):
        chunk = entries(number + 1, [fastsm.put(b"%d" % i, b"value %d" % i) for i in range(number, number + 500)])
        machine.apply(chunk)
        model.apply(chunk)
        if number == MANY // 2:
            machine.compact(machine.last_applied())
    machine.close()
    return model


# ---- used ------------------------------------------------------------------------------------------------

def test_a_clean_close_lets_the_next_opening_read_no_log(directory: Path, machine_at: Opener) -> None:
    """Opening from the table gives the state with all its counts, and does not read the log's frames."""
    small_state(directory)
    table = table_in(directory)
    saved = table.read_bytes()
    table.unlink()
    machine = machine_at(directory)
    expected = observed(machine)
    assert not is_used(machine)
    machine.close()
    table.write_bytes(saved)
    machine = machine_at(directory, verify_on_open="off")
    assert is_used(machine)
    assert observed(machine) == expected
    assert machine.stats().recovery.frames == expected["frames"]
    assert machine.stats().recovery.clean
    assert not machine.stats().verified
    machine.verify()
    assert machine.stats().verified
    assert observed(machine) == expected
    machine.close()
    flip(directory / "log-2", LOG_HEADER_BYTES + 30)  # a byte of a frame's runs, which are in the table
    assert observed(machine_at(directory, verify_on_open="off")) == expected


def test_a_small_state_needs_no_table(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a limit no table is written, because reading the log is as fast."""
    monkeypatch.undo()
    small_state(directory)
    assert not list(directory.glob("table-*"))


@pytest.mark.parametrize("seed", range(6))
def test_frames_after_the_table_are_read(tmp_path: Path, seed: int, machine_at: Opener) -> None:
    """After a kill the table is used for its part of the log, and later frames are read."""
    path = tmp_path / "state"
    before = small_state(path)
    machine = machine_at(path)
    history = History(seed, large=False, after=machine.last_applied())
    for _ in range(seed * 7):
        machine.apply(history.chunk())
    if seed == 3:
        machine.write_snapshot(tmp_path)
    expected = observed(machine)
    crash_copy(path, tmp_path / "copy")
    machine = machine_at(tmp_path / "copy")
    assert is_used(machine)
    found = observed(machine)
    if seed != 3:  # with seed 3 a snapshot's metadata is in a later frame
        assert found["metadata"] == before["metadata"]
    assert found == expected
    assert machine.stats().recovery.frames == expected["frames"]
    machine.verify()


def test_snapshot_metadata_is_in_the_table(tmp_path: Path, directory: Path) -> None:
    """The next opening knows metadata that was set by a write, a compaction, an install or a reset."""
    with FastStateMachine(directory, retain_entries=0) as machine:
        machine.apply(entries(1, [fastsm.put(b"a", b"1"), fastsm.put(b"a", b"2")]))
        first = machine.write_snapshot(tmp_path / "1")
    for step in ("nothing", "write", "compact", "reopen", "install", "clear"):
        with FastStateMachine(directory, retain_entries=0) as machine:
            assert is_used(machine)
            assert machine.snapshot_metadata() == first
            index = machine.last_applied().index
            machine.apply(entries(index + 1, [fastsm.put(b"a", b"%d" % index)]))
            if step == "write":
                first = machine.write_snapshot(tmp_path / "2")
            elif step == "compact":
                first = machine.write_snapshot(tmp_path / "3")
                machine.compact()
            elif step == "install":
                machine.install_snapshot(None, tmp_path / "1", allow_older=True)
                first = machine.snapshot_metadata()
                assert first.last_included == (2, 1)
            elif step == "clear":
                machine.clear()
    with FastStateMachine(directory) as machine:
        assert machine.snapshot_metadata() is None


def test_compaction_and_install_save_a_table_too(tmp_path: Path, directory: Path) -> None:
    """After a kill, the table that a compaction or an install saved is used."""
    with FastStateMachine(directory) as machine:
        machine.apply(entries(1, [fastsm.put(b"%d" % i, b"%d" % i) for i in range(100)]))
        machine.compact(machine.last_applied())
        machine.apply(entries(101, [fastsm.put(b"later", b"")]))
        compacted = observed(machine)
        crash_copy(directory, tmp_path / "compacted")
        machine.write_snapshot(tmp_path)
        machine.install_snapshot(None, tmp_path)
        installed = observed(machine)
        crash_copy(directory, tmp_path / "installed")
    for name, expected in (("compacted", compacted), ("installed", installed)):
        with FastStateMachine(tmp_path / name) as machine:
            assert is_used(machine)
            assert observed(machine) == expected


# ---- changed after opening -------------------------------------------------------------------------------

def test_a_table_from_a_file_grows_and_shrinks(directory: Path, machine_at: Opener) -> None:
    """Keys are added, overwritten and removed in a loaded table of several segments; its file stays unchanged."""
    model = many_keys(directory)
    content = table_in(directory).read_bytes()
    for life in range(3):
        machine = machine_at(directory)
        assert is_used(machine)
        inside(machine).check()
        index = machine.last_applied().index
        commands = [fastsm.put(b"%d" % i, b"again %d" % life) for i in range(life, MANY, 3)]
        commands += [fastsm.delete(b"%d" % i) for i in range(life, MANY, 5)]
        commands += [fastsm.put(b"new %d %d" % (life, i), b"") for i in range(9_000)]
        for start in range(0, len(commands), 1_000):
            chunk = entries(index + 1 + start, commands[start : start + 1_000])
            machine.apply(chunk)
            model.apply(chunk)
        assert table_in(directory).read_bytes() == content
        assert list(machine.items()) == model.items()
        inside(machine).check()
        machine.close()
        content = table_in(directory).read_bytes()
    machine = machine_at(directory)
    for start in range(0, len(model.items()), 500):
        index = machine.last_applied().index
        machine.apply(entries(index + 1, [fastsm.delete(key) for key, _ in model.items()[start : start + 500]]))
    assert (machine.len(), machine.get(b"1")) == (0, None)
    machine.close()
    assert machine_at(directory).is_empty()


def test_chosen_keys_rebuild_a_table_from_a_file(directory: Path, machine_at: Opener) -> None:
    """Keys that collide under the saved seed cause a rebuild with a new seed, with which the next table is saved."""
    with FastStateMachine(directory) as machine:
        machine.apply(entries(1, [fastsm.noop()]))
    table = TableFile(table_in(directory))
    table.change(seed0=0, seed1=0)  # correct for a table without keys
    table.write()
    numbers = [  # of one tag, see test_table.py
        2794220, 6026069, 8756600, 10737208, 13393613, 16260512, 17865118, 22924672, 23599826,
        25180619, 26412239, 26416387, 33162295, 35825907, 37149159, 39151976, 43312423, 49667820,
    ]
    keys = [b"%d" % i for i in range(2_000)] + [number.to_bytes(8, "little") for number in numbers]
    machine = machine_at(directory)
    assert is_used(machine)
    assert inside(machine).table.seed == (0, 0)
    machine.apply(entries(2, [fastsm.put(key, key) for key in keys[:-18]]))
    machine.apply(entries(2_002, [fastsm.put(key, key) for key in keys[-18:]]))
    assert inside(machine).table.rebuilds == 1
    for _ in range(2):
        assert machine.get_many(keys) == keys
        inside(machine).check()
        seed = inside(machine).table.seed
        assert seed != (0, 0)
        machine.close()
        machine = machine_at(directory)
        assert is_used(machine)
        assert inside(machine).table.seed == seed


# ---- refused ---------------------------------------------------------------------------------------------

def flip(path: Path, offset: int, mask: int = 0x10) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def assert_read_instead(path: Path, expected: dict[str, Any], why: object) -> None:
    with FastStateMachine(path, verify_on_open="off", read_only=True) as machine:  # a close would save a new one
        assert not is_used(machine), why
        assert observed(machine) == expected, why


def test_every_flipped_byte_is_noticed() -> None:
    """If any byte of header or sections, or one of many in the segments, is flipped, base and log are read."""
    with memory_directory() as root:
        expected = small_state(root / "state")
        path = table_in(root / "state")
        table = TableFile(path)
        size = path.stat().st_size
        slots = [at for at, _ in table.slots()]
        offsets = [
            *range(table.sections.directory + 4), *range(table.sections.directory, table.sections.segments, 1_001),
            *slots, *range(table.sections.segments, size, 257), *range(size - 64, size),
        ]
        assert len(offsets) > 500
        for offset in offsets:
            flip(path, offset, 1 << offset % 8)
            assert_read_instead(root / "state", expected, offset)
            flip(path, offset, 1 << offset % 8)
        for length in (0, 7, 8, 287, 288, 1_000, 65_536, size - 1, size + 1):
            content = path.read_bytes()
            path.write_bytes(content[:length].ljust(length, b"\0"))
            assert_read_instead(root / "state", expected, f"{length} bytes")
            path.write_bytes(content)
        with FastStateMachine(root / "state") as machine:
            assert is_used(machine)


def test_a_table_of_another_log_is_not_believed(tmp_path: Path) -> None:
    """The table of an equal state in another directory, or of the generation before, is not used."""
    expected = small_state(tmp_path / "a")
    small_state(tmp_path / "b")
    path = table_in(tmp_path / "a")
    own = path.read_bytes()
    path.write_bytes(table_in(tmp_path / "b").read_bytes())
    assert_read_instead(tmp_path / "a", expected, "another directory's")
    path.write_bytes(own)
    with FastStateMachine(tmp_path / "a", retain_entries=0) as machine:
        machine.compact()
    with FastStateMachine(tmp_path / "a") as machine:
        expected = observed(machine)
    table_in(tmp_path / "a").write_bytes(own)
    assert_read_instead(tmp_path / "a", expected, "the generation before")


def test_a_table_of_another_kind_of_file_is_not_believed(tmp_path: Path) -> None:
    """If a symbolic link or a directory is in the table's place, base and log are read."""
    expected = small_state(tmp_path / "state")
    path = table_in(tmp_path / "state")
    path.rename(tmp_path / "table")
    path.symlink_to(tmp_path / "table")
    assert_read_instead(tmp_path / "state", expected, "a link")
    path.unlink()
    path.mkdir()
    assert_read_instead(tmp_path / "state", expected, "a directory")


def test_a_log_shorter_than_its_table_says_is_corruption(directory: Path) -> None:
    """A log that lacks frames which its table includes is corruption."""
    small_state(directory)
    log = directory / "log-2"
    content = log.read_bytes()
    log.write_bytes(content[:-24])
    with pytest.raises(fastsm.CorruptionError) as caught:
        FastStateMachine(directory)
    assert caught.value.path == str(log)
    log.write_bytes(content[:50])
    with pytest.raises(fastsm.CorruptionError):
        FastStateMachine(directory)


HEADER = 288  # bytes of a table's header


def wrong_in_runs(table: TableFile) -> None:
    table.set("Q", table.sections.runs, 0)


def full_segment(table: TableFile) -> None:
    (_, slot), *_ = table.slots()
    start = table.sections.segments
    table.set("4096Q", start, *[slot] * 4096)
    table.set("I", start + 8 * 4096, 4096)
    table.change(keys=4096)


def last_slot(table: TableFile) -> int:
    return max(at for at, _ in table.slots())


def set_dead(table: TableFile, words: int) -> None:
    """Set a dead map of a number of words, with all bits set."""
    front = 8 * table.saved.dead_words
    start = table.sections.dead - HEADER
    rest = table.body[start + front : table.sections.directory - HEADER + (4 << table.saved.depth)]
    segments = table.body[table.sections.segments - HEADER :]
    table.change(dead_words=words)
    table.sections = sections_of(table.saved)
    table.body[start:] = b"\xff" * (8 * words) + rest
    table.body += bytes(table.sections.segments - HEADER - len(table.body)) + segments


UNSOUND: dict[str, Callable[[TableFile], object]] = {
    "an offset before the frames": lambda t: t.change(log_offset=88),
    "an offset of 0": lambda t: t.change(log_offset=0),
    "an offset that is no frame's": lambda t: t.change(log_offset=t.saved.log_offset - 1),
    "an offset after the log": lambda t: t.change(log_offset=t.saved.log_offset + 8),
    "the largest offset": lambda t: t.change(log_offset=2**64 - 1),
    "another place of the log": lambda t: t.change(log_start=t.saved.log_start + 65_536),
    "one key more": lambda t: t.change(keys=t.saved.keys + 1),
    "no keys": lambda t: t.change(keys=0),
    "more live bytes than there are": lambda t: t.change(live_bytes=2**63),
    "a config place after the end": lambda t: t.change(config_place=2**64 - 16),
    "a config place just after the end": lambda t: t.change(config_place=t.saved.log_start + t.saved.log_offset - 8),
    "a config place that is a put's": lambda t: t.change(config_place=next(t.slots())[1] % 2**36 * 8),
    "a config place in the header": lambda t: t.change(config_place=8),
    "a config place between base and log": lambda t: t.change(config_place=t.saved.log_start - 16),
    "a config place that is not aligned": lambda t: t.change(config_place=t.saved.config_place + 1),
    "a run of entry 0": wrong_in_runs,
    "runs that fall": lambda t: t.set("QQ", t.sections.runs, 2, 1),
    "metadata of another size": lambda t: t.change(metadata_size=41),
    "one dead word too many": lambda t: set_dead(t, ((t.saved.log_start + t.saved.log_offset) >> 10) + 2),
    "a directory entry after the segments": lambda t: t.set("I", t.sections.directory, t.saved.segments),
    "the largest directory entry": lambda t: t.set("I", t.sections.directory, 2**32 - 1),
    "a full segment": full_segment,
    "a segment that counts more": lambda t: t.set("I", t.sections.segments + 8 * 4096, 1),
    "a segment that is too deep": lambda t: t.set("I", t.sections.segments + 8 * 4096 + 4, t.saved.depth + 1),
    "the deepest segment": lambda t: t.set("I", t.sections.segments + 8 * 4096 + 4, 2**32 - 1),
    "a place of 0": lambda t: t.move(last_slot(t), 0),
    "a place in the first record": lambda t: t.move(last_slot(t), 8),
    "a place after the end": lambda t: t.move(last_slot(t), t.saved.log_start + t.saved.log_offset - 8),
    "the largest place": lambda t: t.move(last_slot(t), 2**39 - 8),
    "bytes that are not zero in a segment": lambda t: t.set("Q", t.sections.segments + 8 * 4096 + 8, 1),
    "bytes that are not zero before the segments": lambda t: t.set("Q", t.sections.segments - 8, 1),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_an_unsound_table_with_right_checksums_is_not_believed(directory: Path, kind: str) -> None:
    """Impossible content is noticed even if its checksums are correct: base and log are read."""
    expected = small_state(directory)
    table = TableFile(table_in(directory))
    UNSOUND[kind](table)
    table.write()
    assert_read_instead(directory, expected, kind)


def test_the_place_of_the_config_may_be_in_the_base(directory: Path) -> None:
    """A membership that only the base holds is found with the table and without it."""
    with FastStateMachine(directory) as machine:
        machine.apply(entries(1, [fastsm.put(b"a", b"1"), fastsm.config(b"three members")]))
        machine.compact(machine.last_applied())
    for with_table in (True, False):
        if not with_table:
            table_in(directory).unlink()
        with FastStateMachine(directory, verify_on_open="off") as machine:
            assert is_used(machine) == with_table
            assert machine.membership() == (LogId(2, 1), b"three members")


def test_log_offset_is_where_the_frames_end(directory: Path) -> None:
    """The header names the log by its identity, and the end of its last frame."""
    small_state(directory)
    saved = TableFile(table_in(directory)).saved
    log = (directory / "log-2").read_bytes()
    assert (saved.identity,) == struct.unpack_from("<Q", log, 24)
    assert saved.log_offset == len(log)


def test_a_table_that_was_not_believed_is_made_again_by_the_next_close(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close saves a table that the opening did not have, even if nothing was applied in between."""
    monkeypatch.setattr(fastsm.core.generations, "SAVE_TABLE_ABOVE", 0)
    with FastStateMachine(directory) as machine:
        machine.apply([(1, 1, fastsm.put(b"key", b"value"))])
    (directory / "table-1").unlink()
    for loaded in (False, True):
        with FastStateMachine(directory) as machine:
            assert inside(machine).index.loaded == loaded
            assert machine.get(b"key") == b"value"
