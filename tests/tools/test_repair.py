"""Repair: every state that an opening refuses, what is said of it, and what is left."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastsm import CorruptionError, FastStateMachine, FormatVersionError, LogId, StorageError, config, put
from fastsm.disk import headers
from fastsm.tools import repair
from fastsm.tools.records import log_frames
from support import by_hand
from support.faulty import contents
from support.inside import inside

ROOT = Path(__file__).resolve().parent.parent.parent
BASE, LAST = 40, 60  # entries: of the base, of the state
CUT = 51  # the last entry before the frame that is damaged; one of the frames before it holds metadata


def fill(path: Path) -> None:
    """Generation 2 with a base as of entry 40, and a log of 20 frames of one entry, closed."""
    with FastStateMachine(path, retain_entries=0, auto_compact=False) as machine:
        for index in range(1, LAST + 1):
            command = config(b"nodes") if index == 10 else put(b"key-%d" % (index % 25), b"value-%d" % index)
            machine.apply([(index, 1 + index // 20, command)])
            if index == BASE:
                machine.compact()
            if index == BASE + 5:
                machine.write_snapshot(path.parent / "snapshots")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repair") / "state"
    fill(path)
    assert {"base-2", "log-2", "CURRENT"} <= set(os.listdir(path))
    return path


@pytest.fixture
def state(filled: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(filled, tmp_path / "state")
    return tmp_path / "state"


# ---- kinds of damage -----------------------------------------------------------------------------------

def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def becomes(path: Path, kind: str) -> None:
    path.rename(path.with_name("elsewhere"))
    if kind == "symbolic link":
        path.symlink_to("elsewhere")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)


def offset_of(path: Path, frame: int) -> int:
    with FastStateMachine(path, read_only=True) as machine:
        return list(log_frames(inside(machine).log))[frame].offset


def damage_frame(state: Path) -> None:
    flip(state / "log-2", offset_of(state, 12) + 30)


def sealed_again(path: Path, layout: str, offset: int, value: int, size: int) -> None:
    """Another field in a header, under a right checksum."""
    data = bytearray(path.read_bytes())
    data[offset : offset + size] = value.to_bytes(size, "little")
    head = headers.with_checksum(bytes(data[: struct.calcsize(layout) - 8]))
    path.write_bytes(head + bytes(data[len(head) :]))


def know_nothing(state: Path) -> None:
    """CURRENT as after an unclean end: only the frames say how far the log was durable."""
    (state / "CURRENT").write_bytes(headers.pack_current(
        headers.unpack_current((state / "CURRENT").read_bytes(), "CURRENT")._replace(durable_offset=96)))


def replace_frame(state: Path) -> None:
    """A frame whose checksum is right, and whose content makes no sense."""
    with FastStateMachine(state, read_only=True) as machine:
        identity, (before, frame) = inside(machine).log.head.identity, list(log_frames(inside(machine).log))[11:13]
    data = bytearray((state / "log-2").read_bytes())
    record = by_hand.record(9, frame.runs[0].last, b"k", b"v" * (frame.end - frame.offset - 32 - 16 - 16 - 8))
    made = by_hand.frame(
        frame.offset, [by_hand.run(frame.runs[0].last, 9)], record, identity=identity,
        previous=by_hand.frame_checksum(bytes(data[before.offset : before.end])))
    assert frame.offset + len(made) == frame.end
    data[frame.offset : frame.end] = made
    (state / "log-2").write_bytes(data)


def metadata_ahead(state: Path) -> None:
    """What a release recorded that took any metadata; entries were applied afterwards."""
    with FastStateMachine(state, read_only=True) as machine:
        identity, last = inside(machine).log.head.identity, list(log_frames(inside(machine).log))[-1]
    data = (state / "log-2").read_bytes()
    frame = data[last.offset : last.end]
    value = (4).to_bytes(8, "little") + bytes(32)
    put_after = by_hand.record(by_hand.PUT, LAST + 1, b"after", b"it")
    for runs, record in (
        ([], by_hand.record(by_hand.SNAPSHOT, 1000, b"", value)), ([by_hand.run(LAST + 1, 4)], put_after)
    ):
        frame = by_hand.frame(
            len(data), runs, record, identity=identity, previous=by_hand.frame_checksum(frame))
        data += frame
    (state / "log-2").write_bytes(data)


def another_log(state: Path) -> None:
    fill(state.parent / "another")
    shutil.copy(state.parent / "another" / "log-2", state / "log-2")
    shutil.copy(state.parent / "another" / "base-2", state / "base-2")


def another_base(state: Path) -> None:
    with FastStateMachine(state.parent / "another") as machine:
        machine.apply([(i, 1, put(b"a", b"1")) for i in range(1, BASE + 1)])
        machine.compact(BASE)
        machine.write_snapshot(state.parent / "other")
    shutil.copy(state.parent / "other" / "snapshot.fsm", state / "base-2")


def changed_base(state: Path, change: Callable[[bytearray], None]) -> None:
    """A base whose checksum was made again after a change, and a log that knows that checksum."""
    from support.snapshots import sealed  # noqa: PLC0415

    data = bytearray((state / "base-2").read_bytes())
    change(data)
    made = sealed(bytes(data))
    (state / "base-2").write_bytes(made)
    log = bytearray((state / "log-2").read_bytes())
    log[56:88] = made[128:160]
    (state / "log-2").write_bytes(headers.with_checksum(bytes(log[:88])) + bytes(log[96:]))
    for table in state.glob("table-*"):
        table.unlink()


def change_runs(data: bytearray) -> None:
    start = 160 + int.from_bytes(data[48:56], "little")
    data[start : start + 8] = (30).to_bytes(8, "little")


def change_last_run(data: bytearray) -> None:
    start = 160 + int.from_bytes(data[48:56], "little") + 24 * int.from_bytes(data[40:48], "little")
    data[start - 16 : start - 8] = (BASE + 1).to_bytes(8, "little")


def change_config(data: bytearray) -> None:
    data[160 + 14] = 2  # the operation of the membership's record


def change_record(data: bytearray) -> None:
    start = 160 + int.from_bytes(data[48:56], "little") + 24 * int.from_bytes(data[40:48], "little")
    data[start + 14] = 2


def change_key(data: bytearray) -> None:
    """Two records of one key: fewer keys than the header says."""
    start = 160 + int.from_bytes(data[48:56], "little") + 24 * int.from_bytes(data[40:48], "little")
    keys = [match.start() for match in re.finditer(rb"key-[0-9]", bytes(data[start:]))]
    first, second = start + keys[0], start + keys[1]
    size = min(data[first - 4], data[second - 4])
    data[second : second + size] = data[first : first + size]


def count_one_less(data: bytearray) -> None:
    """Two records of one key, counted as one: each record more than there are keys."""
    change_key(data)
    data[32:40] = (int.from_bytes(data[32:40], "little") - 1).to_bytes(8, "little")


def say_changes(state: Path) -> None:
    """A log without a base that says how many changes the base's last entry had."""
    log = bytearray((state / "log-2").read_bytes())
    log[12:16] = (3).to_bytes(4, "little")
    log[32:88] = bytes(56)
    (state / "log-2").write_bytes(headers.with_checksum(bytes(log[:88])) + bytes(log[96:]))


GONE = "gone"  # nothing can be kept
OTHER = "other release"  # no damage
EVERY: dict[str, tuple[Callable[[Path], object], int | str]] = {
    # what is damaged: how, and the last entry that repair keeps
    "CURRENT is lost": (lambda s: (s / "CURRENT").unlink(), LAST),
    "CURRENT is empty": (lambda s: cut(s / "CURRENT", 0), LAST),
    "CURRENT is cut": (lambda s: cut(s / "CURRENT", 40), LAST),
    "CURRENT's magic": (lambda s: flip(s / "CURRENT", 1), LAST),
    "CURRENT's checksum": (lambda s: flip(s / "CURRENT", 20), LAST),
    "CURRENT's reserved field": (lambda s: sealed_again(s / "CURRENT", by_hand.CURRENT, 12, 1, 4), LAST),
    "CURRENT's last frame": (lambda s: sealed_again(s / "CURRENT", by_hand.CURRENT, 48, 7, 8), LAST),
    "CURRENT's generation": (lambda s: sealed_again(s / "CURRENT", by_hand.CURRENT, 16, 7, 8), LAST),
    "CURRENT's identity": (lambda s: sealed_again(s / "CURRENT", by_hand.CURRENT, 24, 7, 8), LAST),
    "CURRENT's version": (lambda s: sealed_again(s / "CURRENT", by_hand.CURRENT, 8, 9, 4), OTHER),
    "CURRENT is a link": (lambda s: becomes(s / "CURRENT", "symbolic link"), LAST),
    "CURRENT is a directory": (lambda s: becomes(s / "CURRENT", "directory"), LAST),
    "CURRENT is a FIFO": (lambda s: becomes(s / "CURRENT", "FIFO"), LAST),
    "the log is lost": (lambda s: (s / "log-2").unlink(), BASE),
    "the log is empty": (lambda s: cut(s / "log-2", 0), BASE),
    "the log is a link": (lambda s: becomes(s / "log-2", "symbolic link"), BASE),
    "the log is a directory": (lambda s: becomes(s / "log-2", "directory"), BASE),
    "the log's header is cut": (lambda s: cut(s / "log-2", 50), BASE),
    "the log's magic": (lambda s: flip(s / "log-2", 1), LAST),
    "the log's checksum": (lambda s: flip(s / "log-2", 20), LAST),
    "the log's base index": (lambda s: sealed_again(s / "log-2", by_hand.LOG, 32, 2**64 - 1, 8), LAST),
    "the log's base size": (
        lambda s: (
            sealed_again(s / "log-2", by_hand.LOG, 12, 0, 4), sealed_again(s / "log-2", by_hand.LOG, 48, 0, 8)), LAST),
    "the log's base changes": (say_changes, LAST),
    "the log's version": (lambda s: sealed_again(s / "log-2", by_hand.LOG, 8, 9, 4), OTHER),
    "the log and base of another": (another_log, LAST),
    "the log's tail is lost": (lambda s: cut(s / "log-2", offset_of(s, 12) + 10), CUT),
    "a frame is damaged": (damage_frame, CUT),
    "a frame is damaged, as a later one proves": (lambda s: (damage_frame(s), know_nothing(s)), CUT),
    "a frame makes no sense": (replace_frame, CUT),
    "metadata is ahead": (metadata_ahead, LAST + 1),
    "header and frame are damaged": (lambda s: (damage_frame(s), flip(s / "log-2", 20)), CUT),
    "CURRENT and header are damaged": (lambda s: (flip(s / "CURRENT", 20), flip(s / "log-2", 20)), BASE),
    "the base is lost": (lambda s: (s / "base-2").unlink(), GONE),
    "the base is cut": (lambda s: cut(s / "base-2", 300), GONE),
    "the base is a link": (lambda s: becomes(s / "base-2", "symbolic link"), GONE),
    "the base's header": (lambda s: flip(s / "base-2", 1), GONE),
    "the base's checksum": (lambda s: flip(s / "base-2", 130), GONE),
    "a record of the base": (lambda s: flip(s / "base-2", 700), GONE),
    "the base of another": (another_base, GONE),
    "the base's padding": (lambda s: changed_base(s, lambda data: None) or pad(s), GONE),
    "the base's runs": (lambda s: changed_base(s, change_runs), GONE),
    "the base's last run": (lambda s: changed_base(s, change_last_run), GONE),
    "the base's membership": (lambda s: changed_base(s, change_config), GONE),
    "the base's records": (lambda s: changed_base(s, change_record), GONE),
    "the base's sessions": (
        lambda s: changed_base(s, lambda data: data.__setitem__(slice(64, 72), (1).to_bytes(8, "little"))), GONE),
    "the base's count of keys": (lambda s: changed_base(s, count_one_less), GONE),
    "the base's keys": (lambda s: changed_base(s, change_key), GONE),
    "PUBLISHED is not made by fastsm": (lambda s: flip(s / "PUBLISHED", 1), LAST),
    "PUBLISHED is a link": (lambda s: becomes(s / "PUBLISHED", "symbolic link"), LAST),
    "PUBLISHED is a directory": (lambda s: becomes(s / "PUBLISHED", "directory"), LAST),
    "PUBLISHED is a FIFO": (lambda s: becomes(s / "PUBLISHED", "FIFO"), LAST),
    "PUBLISHED and a frame are damaged": (lambda s: (damage_frame(s), flip(s / "PUBLISHED", 1)), CUT),
    "PUBLISHED and CURRENT are lost": (lambda s: (flip(s / "CURRENT", 20), becomes(s / "PUBLISHED", "FIFO")), LAST),
    "base and log are lost": (lambda s: ((s / "base-2").unlink(), (s / "log-2").unlink()), GONE),
}


def pad(state: Path) -> None:
    """An attachment of one byte, and padding that is not zero."""
    data = bytearray((state / "base-2").read_bytes())
    data[160:160] = b"a" + b"\1" * 7
    data[112:120] = (1).to_bytes(8, "little")
    (state / "base-2").write_bytes(data)
    log = bytearray((state / "log-2").read_bytes())
    log[48:56] = len(data).to_bytes(8, "little")
    (state / "log-2").write_bytes(headers.with_checksum(bytes(log[:88])) + bytes(log[96:]))


def opening(path: Path) -> FastStateMachine:
    return FastStateMachine(path, verify_on_open="full", auto_compact=False, retain_entries=0)


@pytest.mark.parametrize("name", EVERY)
def test_repair_knows_every_state_that_opening_refuses(state: Path, name: str) -> None:
    """It says what is wrong and how much is kept, does that, and the state opens with just that; nothing is destroyed.

    Where nothing can be kept, or another release wrote it, it says so and changes nothing.
    """
    damage, kept = EVERY[name]
    damage(state)
    before = contents(state)
    with pytest.raises((CorruptionError, FormatVersionError)):
        opening(state)
    if kept in (GONE, OTHER):
        for tool in (repair.examine, repair.repair):
            with pytest.raises(repair.RepairError if kept == GONE else FormatVersionError) as refused:
                tool(state)
            assert kept == OTHER or "from a snapshot or a replica" in str(refused.value)
        assert contents(state) == before
        return
    found = repair.examine(state)
    assert found is not None
    assert contents(state) == before
    assert found.kept.index == kept
    assert f"ends with entry {kept}" in str(found)
    assert (found.offset is not None) == ("bytes are lost, with" in str(found))
    done = repair.repair(state)
    assert done is not None
    assert done[0] == found
    after = contents(state)
    assert set(before.values()) - set(after.values()) <= {before.get("table-2"), before.get("CURRENT")}
    assert repair.examine(state) is None
    with opening(state) as machine:
        assert machine.last_applied().index == machine.durable().index == kept
        assert machine.get(b"key-%d" % (BASE % 25)) == b"value-%d" % BASE
        assert machine.membership() == (LogId(10, 1), b"nodes")
        metadata = machine.snapshot_metadata()
        if kept >= BASE + 5:
            assert metadata is not None
            assert metadata.last_included == (BASE + 5, 3)
        machine.apply([(kept + 1, 9, put(b"new", b"1"))])
    with opening(state) as machine:
        assert machine.get(b"new") == b"1"
    if name == "metadata is ahead":
        assert done[1] is not None


SITE = re.compile(r"CorruptionError\(\s*[^,]+(?:\([^()]*\))?[^,]*,\s*[^,]+,\s*(f?\"[^\"]*\"|[\w.]+)")


def raise_sites() -> Iterator[tuple[str, str]]:
    """The ``expected`` of each CorruptionError in what an opening runs, as it stands in the source."""
    disk = ("disk/base.py", "disk/headers.pyx", "disk/snapshot_header.pyx", "disk/files.py", "disk/published.pyx")
    for pattern in (*disk, "lookup/*.pyx", "generation/*.py*"):
        for path in sorted((ROOT / "fastsm").glob(pattern)):
            if path.suffix not in (".py", ".pyx"):
                continue
            source = path.read_text(encoding="utf-8")
            for match in SITE.finditer(source):
                yield str(path.relative_to(ROOT)), match[1]


# Raised by an opening of another kind than a writer's, or never seen outside of it.
ELSEWHERE = {
    "entries up to {expected} (expect_applied)": "only the host that passes expect_applied can judge",
    "entry {expected.index} of term {expected.term} (expect_applied)": "the same",
    "the file CURRENT of a state directory": "read-only",
    "a complete state": "read-only",
    "self.draft.frame": "a watch, while it is open",
    "a directory of a state machine, or an empty one": "a Raft log's directory: there is no state to repair",
    "an index and a term": "the saved table is made again",
    "sections that add up to the file's size": "the saved table is made again",
    "a record within the file": "while it is open",
    "head": "verify, while it is open",
    "a valid frame": "verify, while it is open",
    "{base.size} bytes": "verify, while it is open",
    "a last frame of checksum {chain:#018x}": "verify, while it is open",
    "BLAKE3 {base.head.checksum.hex()}": "a record of the base: expected is the checksum itself",
    "a torn tail": "made by an attacker",
    "expected": "handed on",
}


def test_every_refusal_of_the_source_is_in_the_table(filled: Path, tmp_path: Path) -> None:
    """Each place that raises a CorruptionError while a writer opens is met by one of the damages above."""
    seen = set()
    for number, (damage, _) in enumerate(EVERY.values()):
        (tmp_path / f"{number}").mkdir()
        path = tmp_path / f"{number}" / "state"
        shutil.copytree(filled, path)
        damage(path)
        with contextlib.suppress(FormatVersionError):
            try:
                opening(path)
            except CorruptionError as error:
                seen.add(str(error.expected))
    sites = set(raise_sites())
    assert len(sites) > 15
    missing = []
    for path, text in sites:
        plain = text.removeprefix("f").strip('"')
        pattern = ".*".join(map(re.escape, re.split(r"\{[^}]*\}", plain)))
        if plain not in ELSEWHERE and not any(re.match(pattern, expected) for expected in seen):
            missing.append((path, text))
    assert missing == []


# ---- more than one generation --------------------------------------------------------------------------

def test_of_two_logs_the_one_that_reaches_further_is_kept(state: Path) -> None:
    """Without CURRENT nobody can tell which it named; the other one is set aside, not removed."""
    with opening(state) as machine:
        shutil.copytree(state, state.parent / "older")
        machine.apply([(LAST + 1, 4, put(b"a", b"1"))])
        machine.compact()
    shutil.copy(state.parent / "older" / "log-2", state / "log-2")
    shutil.copy(state.parent / "older" / "base-2", state / "base-2")
    (state / "CURRENT").unlink()
    found = repair.examine(state)
    assert found is not None
    assert (found.generation, found.kept) == (3, (LAST + 1, 4))
    repair.repair(state)
    assert "log-2.set-aside" in os.listdir(state)
    with opening(state) as machine:
        assert machine.last_applied() == (LAST + 1, 4)
    assert "log-2.set-aside" in os.listdir(state)


def test_another_generation_takes_the_place_of_one_whose_base_is_damaged(state: Path) -> None:
    """What a crash left of the generation before is better than nothing."""
    shutil.copytree(state, state.parent / "older")
    with opening(state) as machine:
        machine.apply([(LAST + 1, 4, put(b"a", b"1"))])
        machine.compact()
    shutil.copy(state.parent / "older" / "log-2", state / "log-2")
    shutil.copy(state.parent / "older" / "base-2", state / "base-2")
    flip(state / "base-3", 700)
    found = repair.examine(state)
    assert found is not None
    assert (found.generation, found.kept.index) == (2, LAST)
    repair.repair(state)
    with opening(state) as machine:
        assert machine.last_applied().index == LAST


def test_what_was_set_aside_is_never_replaced(state: Path) -> None:
    """A second repair finds another name for what it sets aside."""
    for expected in ("log-2.set-aside", "log-3.set-aside", "log-4.set-aside"):
        (state / expected).write_bytes(b"kept before")
        log = next(state.glob("log-[0-9]"))
        flip(log, log.stat().st_size - 60)
        done = repair.repair(state)
        assert done is not None
        assert done[1] == str(state / f"{expected}-2")
        assert (state / expected).read_bytes() == b"kept before"
        with opening(state) as machine:
            last = machine.last_applied()
            machine.apply([(last.index + 1, 9, put(b"a", b"1"))])


@pytest.mark.parametrize("content", ["nothing", "a file", "a lock", "foreign names"])
def test_a_folder_that_is_no_state_is_told_apart(tmp_path: Path, content: str) -> None:
    """It says so, and leaves nothing in it."""
    if content == "a file":
        (tmp_path / "notes.txt").write_bytes(b"hello")
    elif content == "a lock":
        (tmp_path / "LOCK").write_bytes(b"")
    elif content == "foreign names":
        (tmp_path / "log-1").write_bytes(b"hello")
    before = sorted(os.listdir(tmp_path))
    for tool in (repair.examine, repair.repair):
        with pytest.raises(repair.RepairError, match="not a state's directory"):
            tool(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    with pytest.raises(StorageError):
        repair.examine(tmp_path / "nowhere")


def test_what_opening_mends_by_itself_is_no_damage(state: Path) -> None:
    """A damaged table, a creation or a restore that was interrupted, files of others: nothing to repair."""
    for name in ("table-2", "log-77", "base-9"):
        (state / name).mkdir()
    assert repair.examine(state) is None
    with opening(state) as machine:
        assert machine.last_applied().index == LAST
    (state.parent / "new").mkdir()
    (state.parent / "new" / "log-1").write_bytes(b"")
    assert repair.examine(state.parent / "new") is None


def test_a_repair_that_fails_leaves_the_directory_as_it_was(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for the new generation: what was made of it is removed, and it can be tried again."""
    damage_frame(state)
    before = contents(state)

    def full(*_: object) -> None:
        raise StorageError(28, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(repair, "append_metadata", full)
        with pytest.raises(StorageError):
            repair.repair(state)
    assert contents(state) == before
    assert repair.repair(state) is not None


@pytest.mark.parametrize("step", range(1, 40))
def test_a_repair_that_is_killed_is_repaired_again(state: Path, step: int) -> None:
    """After each of its steps the directory opens as repaired, or another repair does it."""
    from fastsm.disk.files import Directory  # noqa: PLC0415

    damage_frame(state)
    pid = os.fork()
    if pid == 0:
        left = [step]

        def counted(name: str) -> Callable[..., object]:
            function = getattr(Directory, name)

            def method(self: Directory, *arguments: object, **options: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), 9)
                return function(self, *arguments, **options)

            return method

        for name in ("create_file", "write_file", "rename", "unlink", "sync_directory", "close_file"):
            setattr(Directory, name, counted(name))
        repair.repair(state)
        os._exit(0)
    os.waitpid(pid, 0)
    if repair.examine(state) is not None:
        repair.repair(state)
    with opening(state) as machine:
        assert machine.last_applied().index == CUT
