"""A log with every bit flipped, cut to every length, and with frames where they do not belong.

Three subjects, each with a log of 4 KiB:

- *clean*: closed, so that its CURRENT records the log's length;
- *expected*: killed after a flush of everything, and opened with ``expect_applied``;
- *unclean*: killed with chunks after the last flush, and opened without ``expect_applied``.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastsm
from fastsm import CorruptionError, Entry, FastStateMachine, LogId, MemoryStateMachine
from fastsm.disk import headers
from support.faulty import crash_copy, memory_directory
from support.histories import state_of
from support.power import QuietDirectory
from support.simulation import kill

SIZE = 4096
SECTOR = 512
HEADER = headers.LOG_HEADER_BYTES
FLUSHES = (3, 6)  # the numbers of chunks after which the unclean subject is flushed
KINDS = ("clean", "expected", "unclean")


def chunks_of(padding: int) -> list[list[Entry]]:
    """Return chunks with all operations, batches, noops, misses, configs and two terms; the second one is padded."""
    commands = [
        [fastsm.put(b"key-1", b"one"), fastsm.put(b"key-2", b"two" * 9), fastsm.put(b"", b"no key")],
        [fastsm.put(b"key-3", bytes(range(1, 256)) * 2 + b"p" * padding)],
        [fastsm.config(b"three members"), fastsm.delete(b"key-1"), fastsm.noop()],
        [fastsm.compare_and_swap(b"key-2", b"no such value", b"x")],
        [fastsm.batch([fastsm.put(b"key-4", b"four"), fastsm.compare_and_swap(b"key-2", b"two" * 9, b"2")])],
        [fastsm.put(b"key-5", b"five" * 60), fastsm.put(b"\x00", b"\x00")],
        [fastsm.delete(b"key-5"), fastsm.put(b"key-6", b"six")],
        [fastsm.noop()],
        [fastsm.config(b"four members"), fastsm.put(b"key-7", b"seven" * 30)],
        [fastsm.put(b"key-1", b"one again"), fastsm.delete(b"key-2")],
    ]
    chunks, index = [], 0
    for number, group in enumerate(commands):
        chunk = []
        for command in group:
            index += 1
            chunk.append(Entry(index, 1 + number // 3, command))
        chunks.append(chunk)
    return chunks


class Subject:
    """A directory whose log is damaged again and again, and the states that may be found then."""

    def __init__(self, kind: str, path: Path, padding: int) -> None:
        chunks = chunks_of(padding)
        model = MemoryStateMachine()
        self.states = [state_of(model)]
        for chunk in chunks:
            model.apply(chunk)
            self.states.append(state_of(model))
        self.kind = kind
        self.least = FLUSHES[-1] if kind == "unclean" else len(chunks)
        self.expected = model.last_applied() if kind == "expected" else None
        self.path = path
        with FastStateMachine(path.with_name("original"), _files=QuietDirectory) as machine:
            for number, chunk in enumerate(chunks, 1):
                machine.apply(chunk)
                if number in (FLUSHES[0], self.least):
                    machine.flush()
            if kind != "clean":
                crash_copy(path.with_name("original"), path)
        if kind == "clean":
            crash_copy(path.with_name("original"), path)
        shutil.rmtree(path.with_name("original"))
        self.log_path = path / "log-1"
        self.current_path = path / "CURRENT"
        self.end = frames_of(self.log_path.read_bytes())[-1][1]
        if kind != "clean":
            os.truncate(self.log_path, SIZE)  # drop most of the room allocated ahead
        self.log = self.log_path.read_bytes()
        self.current = self.current_path.read_bytes()
        self.frames = frames_of(self.log)
        self.found: Counter[str] = Counter()

    def proven(self, intact: int) -> int:
        """Return how many chunks must be found if only the first `intact` frames are left, by their watermarks."""
        if self.kind != "unclean":
            return self.least
        return max([0, *(flushed for flushed in FLUSHES if intact > flushed)])

    def open_damaged(self, log: bytes, current: bytes | None = None, least: int | None = None) -> str:
        """Damage the directory, open it and check the outcome; return the number of chunks, or "error"."""
        put(self.log_path, log)
        put(self.current_path, current or self.current)
        found = self._open()
        if isinstance(found, CorruptionError):
            assert found.path == str(self.current_path if current else self.log_path)
            assert found.offset is not None
            assert 0 <= found.offset <= SIZE
            assert self.log_path.read_bytes() == log, "an error, but the file was changed"
            self.found["error"] += 1
            return "error"
        at_least = self.least if least is None else least
        assert found in self.states[at_least:], f"applied {found['applied']}"
        number = str(self.states.index(found))
        self.found[number] += 1
        return number

    def _open(self) -> dict[str, object] | CorruptionError:
        try:
            machine = FastStateMachine(self.path, expect_applied=self.expected, _files=QuietDirectory)
        except CorruptionError as error:
            return error
        try:
            return state_of(machine)
        finally:
            kill(machine)


def put(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    os.pwrite(fd, content, 0)
    os.ftruncate(fd, len(content))
    os.close(fd)


def frames_of(log: bytes) -> list[tuple[int, int]]:
    """Return the start and the end of each frame."""
    frames, offset = [], HEADER
    while offset + 16 <= len(log):
        checksum, length = struct.unpack_from("<QQ", log, offset)
        if not (checksum or length):
            break
        frames.append((offset, offset + length))
        offset += length
    return frames


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit >> 3] ^= 1 << (bit & 7)
    return bytes(damaged)


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def root() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


def subject_of(kind: str, root: Path, name: str = "subject") -> Subject:
    """Return the subject with a log of 4 KiB; the clean one's frames fill it to the last byte."""
    spare = SIZE - Subject(kind, root / "measure", 0).end
    shutil.rmtree(root / "measure")
    return Subject(kind, root / name, spare if kind == "clean" else spare - 200)


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest, root: Path) -> Subject:
    subject = subject_of(request.param, root)
    assert len(subject.log) == SIZE
    assert subject.open_damaged(subject.log) == str(len(subject.states) - 1)
    subject.found.clear()
    return subject


def test_every_flipped_bit(subject: Subject) -> None:
    """A flipped bit is an error that names file and offset, or loses nothing that was durable."""
    for bit in range(8 * SIZE):
        subject.open_damaged(flipped(subject.log, bit))
    assert subject.found.total() == 8 * SIZE
    assert subject.found["error"] >= 8 * subject.frames[subject.least - 1][1]  # all of it was durable
    if subject.least < len(subject.states) - 1:
        assert len(subject.found) == 2 + len(subject.states) - 1 - subject.least  # each whole prefix, and errors


def test_every_flipped_bit_of_current(subject: Subject) -> None:
    """A flipped bit of CURRENT is an error."""
    for bit in range(8 * len(subject.current)):
        assert subject.open_damaged(subject.log, flipped(subject.current, bit)) == "error"


def test_every_length(subject: Subject) -> None:
    """A log cut anywhere is an error that names file and offset, or loses nothing that was provably durable."""
    for size in range(SIZE):
        intact = sum(stop <= size for _, stop in subject.frames)
        # Without a later frame as proof, and without `expect_applied`, a log that ends early is only torn.
        found = subject.open_damaged(subject.log[:size], least=subject.proven(intact))
        if size < HEADER or subject.kind == "clean" or (subject.kind == "expected" and intact < subject.least):
            assert found == "error"
        else:
            assert found == str(intact)


def test_every_zeroed_sector(subject: Subject) -> None:
    """A sector of zeros is an error, or loses nothing that was durable."""
    for start in range(0, SIZE, SECTOR):
        damaged = subject.log[:start] + bytes(SECTOR) + subject.log[start + SECTOR :]
        found = subject.open_damaged(damaged)
        if start < subject.frames[subject.least - 1][1]:
            assert found == "error"


def test_every_frame_of_another_log(subject: Subject, root: Path, request: pytest.FixtureRequest) -> None:
    """A frame of another log at the same offset is not accepted as one of this log."""
    other = subject_of(request.node.callspec.params["subject"], root, "other")
    assert other.frames == subject.frames
    for number, (start, stop) in enumerate(subject.frames):
        found = subject.open_damaged(subject.log[:start] + other.log[start:stop] + subject.log[stop:])
        assert found == ("error" if number < subject.least or subject.kind == "clean" else str(number))
        found = subject.open_damaged(subject.log[:start] + other.log[start:], least=subject.proven(number))
        assert found == ("error" if number < subject.proven(number) or subject.kind == "clean" else str(number))
    other.current = subject.current
    assert other.open_damaged(other.log) == "error"


def test_every_frame_at_another_place(subject: Subject) -> None:
    """A frame of this log is not accepted in another frame's place, nor after the last frame."""
    for number, (start, _) in enumerate(subject.frames):
        for other_start, other_stop in subject.frames:
            if other_start == start:
                continue
            stop = start + other_stop - other_start
            moved = subject.log[:start] + subject.log[other_start:other_stop] + subject.log[stop:]
            last_is_left = subject.frames[-1][0] >= stop
            known = subject.proven(len(subject.frames) if last_is_left else number)
            found = subject.open_damaged(moved[:SIZE], least=known)
            assert found == ("error" if number < known or subject.kind == "clean" else str(number))
    start, stop = subject.frames[0]
    if subject.end + stop - start <= SIZE:
        again = subject.log[: subject.end] + subject.log[start:stop]
        assert subject.open_damaged(again.ljust(SIZE, b"\0")) == str(len(subject.states) - 1)


def test_frame_of_an_older_generation(root: Path) -> None:
    """Frames of the log before a reset, at the same offsets, are not accepted in the log after it."""
    chunks = chunks_of(0)
    with FastStateMachine(root / "state") as machine:
        for chunk in chunks[:2]:
            machine.apply(chunk)
        machine.flush()
        older = (root / "state" / "log-1").read_bytes()
        machine.clear()
        machine.apply(chunks[0])
        machine.flush()
        crash_copy(root / "state", root / "killed")
    log = root / "killed" / "log-2"
    (_, stop), (_, older_stop) = frames_of(log.read_bytes())[-1], frames_of(older)[-1]
    content = log.read_bytes()
    put(log, content[:stop] + older[stop:older_stop] + content[older_stop:])
    last = LogId(*chunks[0][-1][:2])
    for expected in (None, last):
        again = crash_copy(root / "killed", root / f"again-{expected}")
        with FastStateMachine(again, expect_applied=expected) as machine:
            assert machine.last_applied() == last
    put(log, content[:HEADER] + older[HEADER:older_stop] + content[older_stop:])
    with pytest.raises(CorruptionError) as caught:
        FastStateMachine(root / "killed", expect_applied=last)
    assert (caught.value.path, caught.value.offset) == (str(log), HEADER)
