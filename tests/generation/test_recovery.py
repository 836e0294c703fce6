"""What opening a damaged directory does: a torn tail is cut, anything else is a CorruptionError.

Two subjects. The *unclean* one was killed: three chunks that a later frame knows to be durable, three that no
frame knows of, zeros after them. The *clean* one was closed: CURRENT knows how long its log is.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

import fastsm
from fastsm import CorruptionError, Entry, FastStateMachine, LogId
from fastsm.disk import headers
from fastsm.disk.published import MAGIC
from support.faulty import Disk, contents, crash_copy, frames_of
from support.histories import History
from support.inside import inside

PAGE = 4096
HEADER = headers.LOG_HEADER_BYTES
CHUNKS = [
    [Entry(1, 1, fastsm.put(b"a", b"1" * 40)), Entry(2, 1, fastsm.put(b"b", b"2"))],
    [Entry(3, 1, fastsm.delete(b"a"))],
    [Entry(4, 2, fastsm.config(b"three nodes")), Entry(5, 2, fastsm.put(b"c", b"3" * 3 * PAGE))],
    [Entry(6, 2, fastsm.compare_and_swap(b"b", b"2", b"4"))],
    [Entry(7, 3, fastsm.put(b"d", b"5" * 3 * PAGE))],
    [Entry(8, 3, fastsm.put(b"e", b"6" * 50)), Entry(9, 3, fastsm.delete(b"b"))],
]
KEYS = [b"a", b"b", b"c", b"d", b"e"]
FLUSHED = 3  # chunks before the flush


class Subject:
    """A directory to be damaged, and where its log's frames are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log-1"
        self.current = directory / "CURRENT"
        self.frames = frames_of(self.log)
        self.end = self.frames[-1][1]

    def patch(self, offset: int, data: bytes) -> None:
        """Overwrites a piece of the log."""
        with self.log.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def flip(self, offset: int, bit: int = 0) -> None:
        """Flips one bit of the log."""
        with self.log.open("rb") as file:
            file.seek(offset)
            (byte,) = file.read(1)
        self.patch(offset, bytes([byte ^ 1 << bit]))

    def cut(self, size: int) -> None:
        os.truncate(self.log, size)

    def piece(self, start: int, stop: int) -> bytes:
        return self.log.read_bytes()[start:stop]


def apply_all(machine: FastStateMachine, chunks: list[list[Entry]]) -> None:
    for number, chunk in enumerate(chunks, 1):
        machine.apply(chunk)
        if number == FLUSHED:
            machine.flush()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The two subjects, as they were left."""
    root = tmp_path_factory.mktemp("subjects")
    with FastStateMachine(root / "clean") as machine:
        apply_all(machine, CHUNKS)
        unclean = crash_copy(root / "clean", root / "unclean")
    return root / "clean", unclean


@pytest.fixture
def clean(originals: tuple[Path, Path], tmp_path: Path) -> Subject:
    return Subject(crash_copy(originals[0], tmp_path / "clean"))


@pytest.fixture
def unclean(originals: tuple[Path, Path], tmp_path: Path) -> Subject:
    copy = crash_copy(originals[1], tmp_path / "unclean")
    (copy / "PUBLISHED").unlink()  # as after a reboot: no reader has seen what is cut, and the log is cut in place
    return Subject(copy)


def expected_state(chunks: int) -> tuple[LogId, list[bytes | None]]:
    model = fastsm.MemoryStateMachine()
    for chunk in CHUNKS[:chunks]:
        model.apply(chunk)
    return model.last_applied(), model.get_many(KEYS)


def assert_recovers(directory: Path, chunks: int, **options: object) -> fastsm.Stats:
    """The state is that after so many chunks, and that again after the process was killed once more."""
    with FastStateMachine(directory, **options) as machine:
        inside(machine).check()
        assert (machine.last_applied(), machine.get_many(KEYS)) == expected_state(chunks)
        stats = machine.stats()
        again = crash_copy(directory, directory.with_name("again"))
        with FastStateMachine(again, **options) as second:
            assert (second.last_applied(), second.get_many(KEYS)) == expected_state(chunks)
            assert second.durable() == machine.durable()
            assert second.stats().recovery.torn_bytes == 0
        shutil.rmtree(again)
    return stats


def assert_corrupt(directory: Path, name: str = "log-1", **options: object) -> CorruptionError:
    """Opening raises a CorruptionError that names the file, twice the same, and touches nothing."""
    before = contents(directory)
    messages = []
    for _ in range(2):
        with pytest.raises(CorruptionError) as caught:
            FastStateMachine(directory, **options)
        assert contents(directory) == before
        assert caught.value.path == str(directory / name)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    return caught.value


def reseal(data: bytearray, at: int) -> None:
    """Computes a fixed header's checksum anew."""
    data[at : at + 8] = xxhash.xxh64_intdigest(bytes(data[:at])).to_bytes(8, "little")


# ---- damage, as a table of sentences --------------------------------------------------------------------
# Each: what is done to the unclean subject, and the number of chunks that are recovered, or the corrupt file
# and the offset that the error names ("frame n": where that frame starts).


def garbage(size: int) -> bytes:
    return History(5).random.randbytes(size)


def frame_of_another_log(subject: Subject) -> None:
    """An equal history in a directory of its own: the same frames, but for the identity of their file."""
    other = subject.directory.with_name("other")
    with FastStateMachine(other) as machine:
        apply_all(machine, CHUNKS)
        start, stop = subject.frames[5]
        foreign = (other / "log-1").read_bytes()[start:stop]
    assert struct.unpack_from("<Q", foreign, 8)[0] == stop - start
    subject.patch(start, foreign)


def earlier_frame_moved_to_the_end(subject: Subject) -> None:
    subject.patch(subject.end, subject.piece(*subject.frames[3]))


def last_frame_where_another_was(subject: Subject) -> None:
    subject.patch(subject.frames[3][0], subject.piece(*subject.frames[5]))


def foreign_log(subject: Subject) -> None:
    other = subject.directory.with_name("other")
    with FastStateMachine(other) as machine:
        apply_all(machine, CHUNKS)
    shutil.copy(other / "log-1", subject.log)


def replace_by(kind: str, name: str) -> Callable[[Subject], None]:
    def damage(subject: Subject) -> None:
        path = subject.directory / name
        path.rename(subject.directory.with_name("elsewhere"))
        if kind == "FIFO":
            os.mkfifo(path)
        else:
            path.symlink_to(subject.directory.with_name("elsewhere"))

    return damage


def page_in(subject: Subject, frame: int) -> int:
    """The start of a page that lies within the frame."""
    start, stop = subject.frames[frame]
    page = (start + 2 * PAGE - 1) // PAGE * PAGE
    assert start + 100 < page <= stop - PAGE
    return page


TORN = {
    "nothing is wrong": (lambda s: None, 6),
    "the zeros after the end are gone": (lambda s: s.cut(s.end), 6),
    "the last frame is cut in its middle": (lambda s: s.cut(sum(s.frames[5]) // 2 & ~7), 5),
    "the last frame is gone, zeros in its place": (lambda s: s.patch(s.frames[5][0], bytes(100)), 5),
    "one bit of the last frame's value is flipped": (lambda s: s.flip(s.frames[5][0] + 80), 5),
    "one bit of the last frame's length is flipped": (lambda s: s.flip(s.frames[5][0] + 8, 6), 5),
    "the last frame's length is huge": (lambda s: s.patch(s.frames[5][0] + 8, b"\xf8" * 8), 5),
    "the last frame's run count is huge": (lambda s: s.patch(s.frames[5][0] + 20, b"\xff" * 4), 5),
    "only the header of the last frame was written": (lambda s: s.patch(s.frames[5][0] + 24, bytes(200)), 5),
    "a bit is flipped after the watermark, a later frame is whole": (lambda s: s.flip(s.frames[4][0] + 99), 4),
    "a page is zero after the watermark, a later frame is whole": (
        lambda s: s.patch(page_in(s, 4), bytes(PAGE)), 4),
    "the first frame after the watermark is zero, later ones are whole": (
        lambda s: s.patch(s.frames[3][0], bytes(s.frames[3][1] - s.frames[3][0])), 3),
    "everything after the watermark is garbage": (
        lambda s: s.patch(s.frames[3][0], garbage(s.end - s.frames[3][0])), 3),
    "garbage follows the end": (lambda s: s.patch(s.end, garbage(10_000)), 6),
    "garbage follows the end, after a hole": (lambda s: s.patch(s.end + 50_000, garbage(10_000)), 6),
    "a frame of another log of the same history takes the last one's place": (frame_of_another_log, 5),
    "an earlier frame of this log is repeated after the end": (earlier_frame_moved_to_the_end, 6),
    "the last frame is found where another one was": (last_frame_where_another_was, 3),
    "one byte follows the end": (lambda s: (s.cut(s.end), s.patch(s.end, b"x")), 6),
    "a sparse tail of 1 TiB follows the end": (lambda s: s.cut(1 << 40), 6),
    "a sparse tail of 1 TiB follows the end, with garbage at its end": (
        lambda s: (s.cut(1 << 40), s.patch((1 << 40) - 64, garbage(64))), 6),
}


@pytest.mark.parametrize("sentence", TORN)
def test_torn_tail_is_cut(sentence: str, unclean: Subject) -> None:
    """What is wrong after the last watermark is torn: the whole chunks before it are recovered."""
    damage, chunks = TORN[sentence]
    damage(unclean)
    stats = assert_recovers(unclean.directory, chunks)
    assert stats.recovery.log_bytes == unclean.frames[chunks - 1][1]
    assert not stats.recovery.clean
    # What told the watermark is a frame after it: without one, nothing is known to be durable.
    assert stats.durable == (LogId(5, 2) if chunks > FLUSHED else LogId(0, 0))
    if chunks < 6:
        assert stats.recovery.torn_bytes > 0 or "gone" in sentence or "zero" in sentence
    else:
        after = any(word in sentence for word in ("garbage", "repeated", "one byte"))
        assert (stats.recovery.torn_bytes > 0) == after


CORRUPT = {
    "the log's header is cut short": (lambda s: s.cut(HEADER // 2), "log-1", 0),
    "the log is empty": (lambda s: s.cut(0), "log-1", 0),
    "the log's magic is another": (lambda s: s.patch(0, b"SQLite 3"), "log-1", 0),
    "one bit of the log's header is flipped": (lambda s: s.flip(17), "log-1", HEADER - 8),
    "the log is gone": (lambda s: s.log.unlink(), "log-1", None),
    "the log is that of another directory": (foreign_log, "log-1", 16),
    "CURRENT is gone": (lambda s: s.current.unlink(), "CURRENT", None),
    "CURRENT is empty": (lambda s: s.current.write_bytes(b""), "CURRENT", None),
    "CURRENT is too long": (lambda s: s.current.write_bytes(s.current.read_bytes() + b"\0"), "CURRENT", None),
    "CURRENT is zero": (lambda s: s.current.write_bytes(bytes(len(s.current.read_bytes()))), "CURRENT", 0),
    "the first frame is zero": (lambda s: s.patch(HEADER, bytes(100)), "log-1", "frame 0"),
    "a bit of a frame before the watermark is flipped": (lambda s: s.flip(s.frames[1][0] + 30), "log-1", "frame 1"),
    "a bit of the last frame before the watermark is flipped": (
        lambda s: s.flip(s.frames[2][0] + 5000), "log-1", "frame 2"),
    "a page before the watermark is zero": (lambda s: s.patch(page_in(s, 2), bytes(PAGE)), "log-1", "frame 2"),
    "two frames before the watermark are exchanged": (
        lambda s: s.patch(HEADER, s.piece(*s.frames[1]) + s.piece(*s.frames[0])), "log-1", "frame 0"),
    "frames before the watermark and all but the last after it are garbage": (
        lambda s: s.patch(HEADER, garbage(s.frames[5][0] - HEADER)), "log-1", "frame 0"),
    "a FIFO is in the place of the log": (replace_by("FIFO", "log-1"), "log-1", None),
    "a symbolic link is in the place of the log": (replace_by("link", "log-1"), "log-1", None),
    "a FIFO is in the place of CURRENT": (replace_by("FIFO", "CURRENT"), "CURRENT", None),
    "a symbolic link is in the place of CURRENT": (replace_by("link", "CURRENT"), "CURRENT", None),
    "a FIFO is in the place of LOCK": (replace_by("FIFO", "LOCK"), "LOCK", None),
    "a symbolic link is in the place of LOCK": (replace_by("link", "LOCK"), "LOCK", None),
}


@pytest.mark.parametrize("sentence", CORRUPT)
def test_corruption_is_an_error_and_nothing_is_touched(sentence: str, unclean: Subject) -> None:
    """Bytes known to be durable that are not there are a CorruptionError that names the place; no file changes."""
    damage, name, offset = CORRUPT[sentence]
    if isinstance(offset, str):
        offset = unclean.frames[int(offset.split()[1])][0]
    damage(unclean)
    error = assert_corrupt(unclean.directory, name)
    assert error.offset == offset


@pytest.mark.parametrize("name", ["log-1", "CURRENT"])
def test_directory_in_place_of_a_file_is_a_typed_error(name: str, unclean: Subject) -> None:
    """A folder where a file should be is told as an error of this library."""
    (unclean.directory / name).unlink()
    (unclean.directory / name).mkdir()
    with pytest.raises((CorruptionError, fastsm.StorageError)):
        FastStateMachine(unclean.directory)


@pytest.mark.parametrize(("name", "at"), [("log-1", HEADER - 8), ("CURRENT", headers.CURRENT_STRUCT.size)])
@pytest.mark.parametrize("version", [1, 7, 2**32 - 1])
def test_files_of_another_version_are_refused_and_not_touched(
    name: str, at: int, version: int, unclean: Subject
) -> None:
    """A whole file of an unknown format version is a FormatVersionError, not corruption."""
    path = unclean.directory / name
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 8, version)
    reseal(data, at)
    path.write_bytes(data)
    before = contents(unclean.directory)
    with pytest.raises(fastsm.FormatVersionError) as caught:
        FastStateMachine(unclean.directory)
    assert (caught.value.path, caught.value.found) == (str(path), version)
    assert contents(unclean.directory) == before


def test_last_frame_cut_at_every_byte_is_torn(originals: tuple[Path, Path], tmp_path: Path) -> None:
    """However much of the last frame reached the file, the chunks before it are recovered and no more."""
    start, stop = Subject(originals[1]).frames[5]
    for size in range(start, stop + 1):
        directory = crash_copy(originals[1], tmp_path / "cut")
        os.truncate(directory / "log-1", size)
        with FastStateMachine(directory) as machine:
            chunks = 6 if size == stop else 5
            assert (machine.last_applied(), machine.get_many(KEYS)) == expected_state(chunks)
        shutil.rmtree(directory)


def test_log_cut_at_any_frame_after_a_clean_close_is_corrupt(clean: Subject) -> None:
    """A clean close says how long the log is, so that whole frames cut from its end are noticed."""
    for start, _ in reversed(clean.frames):
        clean.cut(start)
        assert assert_corrupt(clean.directory).offset == start


def test_log_damaged_after_a_clean_close_is_corrupt(clean: Subject) -> None:
    """After a clean close no frame is torn: a bit flipped in any of them is a CorruptionError."""
    for start, stop in clean.frames:
        clean.flip(stop - 1)
        assert assert_corrupt(clean.directory).offset == start
        clean.flip(stop - 1)
    assert_recovers(clean.directory, 6)


def test_tail_of_zeros_after_a_clean_close_is_only_trimmed(clean: Subject) -> None:
    """Zeros after the end of a log are room that was allocated ahead."""
    clean.cut(clean.end + 300_000)
    stats = assert_recovers(clean.directory, 6)
    assert stats.recovery.torn_bytes == 0
    assert clean.log.stat().st_size < 300_000


def test_without_proof_the_prefix_before_the_damage_is_recovered(unclean: Subject) -> None:
    """When no frame is left to tell that bytes were durable, the whole chunks before the damage remain."""
    unclean.cut(unclean.frames[2][1])
    unclean.flip(unclean.frames[2][0] + 50)
    assert_recovers(unclean.directory, 2)


# ---- expect_applied ------------------------------------------------------------------------------------


@pytest.mark.parametrize("expected", [(0, 0), (1, 1), (5, 2), (9, 3), LogId(9, 3)])
def test_expectation_that_is_met_changes_nothing(expected: tuple[int, int], unclean: Subject) -> None:
    """With expect_applied at or before what is recovered, opening is as without it."""
    assert_recovers(unclean.directory, 6, expect_applied=expected)


@pytest.mark.parametrize(
    ("expected", "said"),
    [((10, 3), "(index=9, term=3)"), ((2**63, 3), "(index=9, term=3)"), ((9, 4), "term 3"), ((4, 1), "term 2")],
)
def test_expectation_that_is_not_met_is_corruption(expected: tuple[int, int], said: str, unclean: Subject) -> None:
    """Recovering less than the embedder knows of, or another term there, is a CorruptionError; nothing is cut."""
    unclean.patch(unclean.end, garbage(100))
    error = assert_corrupt(unclean.directory, expect_applied=expected)
    assert said in str(error)
    assert_recovers(unclean.directory, 6, expect_applied=(9, 3))


def test_expectation_is_judged_before_a_torn_tail_is_cut(unclean: Subject) -> None:
    """A torn frame that held an expected entry stays for people to look at."""
    unclean.flip(unclean.frames[5][1] - 1)
    assert_corrupt(unclean.directory, expect_applied=(9, 3))
    assert_recovers(unclean.directory, 5, expect_applied=(7, 3))


def test_empty_directory_with_an_expectation_is_corruption(directory: Path) -> None:
    """A directory that should hold something and holds nothing is an error, each time it is opened."""
    for _ in range(2):
        with pytest.raises(CorruptionError):
            FastStateMachine(directory, expect_applied=(1, 1))


# ---- what counts as durable after an unclean end --------------------------------------------------------


def test_first_flush_writes_again_what_no_sync_is_known_to_cover(unclean: Subject) -> None:
    """After an unclean end everything after the watermark is written again, byte for byte, before the sync."""
    start, stop = unclean.frames[2][1], unclean.end
    expected = unclean.piece(start, stop)
    disk = Disk()
    with FastStateMachine(unclean.directory, _files=disk.files) as machine:
        assert machine.durable() == LogId(5, 2)
        assert machine.stats().recovery.suspect_bytes == stop - start
        disk.forget()
        machine.flush()
        writes = [(call.arguments[2], call.arguments[1]) for call in disk.calls if call.method == "write"]
        assert writes == [(start, expected)]
        assert [call.method for call in disk.calls] == ["write", "sync"]
        assert machine.durable() == LogId(9, 3)
        disk.forget()
        machine.apply([Entry(10, 3, fastsm.noop())])
        machine.flush()
        assert start not in [call.arguments[2] for call in disk.calls if call.method == "write"]


def test_large_suspect_range_is_written_again_whole(directory: Path, tmp_path: Path) -> None:
    """What is written again in several pieces has no gap, and is in the file as it was."""
    with FastStateMachine(directory) as machine:
        for index in range(1, 9):
            machine.apply([Entry(index, 1, fastsm.put(b"%d" % index, garbage(500_000 + index)))])
        copy = crash_copy(directory, tmp_path / "copy")
    subject = Subject(copy)
    disk = Disk()
    with FastStateMachine(copy, _files=disk.files) as machine:
        disk.forget()
        machine.flush()
        position = HEADER
        calls = iter(disk.calls)
        while (call := next(calls)).method == "write":
            _, data, offset = call.arguments
            assert offset == position
            assert data == subject.piece(offset, offset + len(data))
            position += len(data)
        assert (position, call.method) == (subject.end, "sync")


def test_clean_end_leaves_nothing_suspect(clean: Subject) -> None:
    """After a clean close everything is durable at once, and a flush has nothing to do."""
    disk = Disk()
    with FastStateMachine(clean.directory, _files=disk.files) as machine:
        assert machine.stats().recovery.clean
        assert machine.durable() == machine.last_applied() == LogId(9, 3)
        disk.forget()
        machine.flush()
        assert disk.calls == []


def test_torn_tail_is_gone_from_the_disk_before_anything_is_written(unclean: Subject) -> None:
    """The cut is synced at opening, so that a torn frame cannot come back after new ones."""
    unclean.flip(unclean.frames[5][0] + 30)
    disk = Disk()
    with FastStateMachine(unclean.directory, _files=disk.files) as machine:
        methods = [call.method for call in disk.calls]
        assert methods.index("truncate") < methods.index("sync")
        written = [call.arguments[1] for call in disk.calls if call.method == "write"]
        assert all(bytes(data).startswith(MAGIC) for data in written)  # of a new file, which readers look at
        machine.apply([Entry(8, 3, fastsm.put(b"e", b"another"))])
        assert machine.get(b"e") == b"another"
    with FastStateMachine(unclean.directory) as machine:
        assert machine.last_applied() == LogId(8, 3)


def test_crash_while_a_directory_is_created_leaves_one_that_opens(directory: Path, tmp_path: Path) -> None:
    """Whatever names and bytes a creation had left when it was killed, opening starts from empty."""
    FastStateMachine(directory).close()
    log, current = (directory / "log-1").read_bytes(), (directory / "CURRENT").read_bytes()
    leftovers: list[dict[str, bytes]] = [
        {},
        {"LOCK": b""},
        {"log-1": b""},
        {"log-1": log[:20]},
        {"log-1": log[:HEADER]},
        {"log-1": log[:HEADER], "CURRENT.tmp": b""},
        {"log-1": log[:HEADER], "CURRENT.tmp": current},
    ]
    for number, files in enumerate(leftovers):
        target = tmp_path / f"leftover-{number}"
        target.mkdir()
        for name, data in files.items():
            (target / name).write_bytes(data)
        with FastStateMachine(target) as machine:
            assert machine.last_applied() == LogId(0, 0)
            machine.apply(CHUNKS[0])
        with FastStateMachine(target) as machine:
            assert machine.last_applied() == LogId(2, 1)
        assert not (target / "CURRENT.tmp").exists()


def test_files_of_other_generations_are_removed(clean: Subject) -> None:
    """What a crash left of another generation goes at the next opening: empty, zeros, or with a magic of ours."""
    removed = ("log-2", "log-77", "base-9", "base-9.tmp", "table-3", "table-3.tmp", "CURRENT.tmp", "CURRENT-2.tmp")
    for content in (b"", bytes(500), b"FASTSM-L" + bytes(88), b"FASTSM-S" + b"x" * 200, b"FASTSM-T", b"FASTSM-C"):
        for name in (*removed, "log-1.orig", "notes.txt"):
            (clean.directory / name).write_bytes(content)
        with FastStateMachine(clean.directory) as machine:
            assert machine.last_applied() == LogId(9, 3)
            names = {path.name for path in clean.directory.iterdir()}
        assert set(removed) & names == set()
        assert {"log-1.orig", "notes.txt", "log-1", "CURRENT"} <= names
