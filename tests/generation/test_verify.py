"""verify: every byte on disk is read again and checked, while others read and write."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import fastsm
from fastsm import CorruptionError, FastStateMachine, NotRunningError
from fastsm.disk.headers import LOG_HEADER_BYTES

Opener = Callable[..., FastStateMachine]
LOG = "log-1"


@pytest.fixture
def machine(directory: Path, machine_at: Opener) -> FastStateMachine:
    """Provide a machine with some frames, the last of them of 9 MiB."""
    machine = machine_at(directory)
    for index in range(1, 40):
        machine.apply([(index, 1, fastsm.put(b"%d" % index, os.urandom(300)))])
    machine.apply([(40, 1, fastsm.put(b"large", os.urandom(9 << 20)))])
    machine.flush()
    return machine


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit on disk; a second call flips it back."""
    fd = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, offset)[0]
        os.pwrite(fd, bytes([byte ^ 1 << bit]), offset)
    finally:
        os.close(fd)


def frame_starts(machine: FastStateMachine, path: Path) -> list[int]:
    """Return the offsets at which the log's frames start, and at which the last one ends."""
    content = path.read_bytes()
    starts = [LOG_HEADER_BYTES]
    while starts[-1] < machine.stats().log_bytes:
        starts.append(starts[-1] + int.from_bytes(content[starts[-1] + 8 : starts[-1] + 16], "little"))
    assert starts[-1] == machine.stats().log_bytes
    return starts


def test_a_sound_directory_is_sound(machine: FastStateMachine, directory: Path, machine_at: Opener) -> None:
    """``verify`` returns None while the log grows, after a reset, and after it was opened again."""
    assert machine.verify() is None
    machine.apply([(41, 1, fastsm.noop())])
    assert machine.verify() is None
    machine.close()
    machine = machine_at(directory)
    assert machine.verify() is None
    machine.clear()
    assert machine.verify() is None
    machine.apply([(1, 1, fastsm.put(b"a", b""))])
    assert machine.verify() is None


def test_every_flipped_bit_is_found_and_named(machine: FastStateMachine, directory: Path) -> None:
    """Any bit of the log that flips on disk is a ``CorruptionError`` that names the file and the frame's offset."""
    path = directory / LOG
    starts = frame_starts(machine, path)
    rng = random.Random(1)
    near = [start + i for start in starts[:3] for i in range(48)]
    for offset in (*near, *(rng.randrange(LOG_HEADER_BYTES, starts[-1]) for _ in range(20))):
        bit = rng.randrange(8)
        flip(path, offset, bit)
        with pytest.raises(CorruptionError) as raised:
            machine.verify()
        flip(path, offset, bit)
        assert raised.value.path == str(path)
        assert raised.value.offset == max(start for start in starts if start <= offset)
    assert machine.verify() is None


@pytest.mark.parametrize("offset", [0, 8, 12, 16, 24, 32, 40, 48, LOG_HEADER_BYTES - 1])
def test_a_flipped_bit_of_the_header_is_found(machine: FastStateMachine, directory: Path, offset: int) -> None:
    """The log's header is checked as well as its frames."""
    flip(directory / LOG, offset)
    with pytest.raises((CorruptionError, fastsm.FormatVersionError)) as raised:
        machine.verify()
    assert raised.value.path == str(directory / LOG)
    flip(directory / LOG, offset)
    assert machine.verify() is None


def test_damage_to_current_is_found(machine: FastStateMachine, directory: Path) -> None:
    """CURRENT is verified, too: a flipped bit, an empty file and a missing one are found."""
    current = directory / "CURRENT"
    content = current.read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), b"", content[:20]):
        current.write_bytes(damaged)
        with pytest.raises(CorruptionError) as raised:
            machine.verify()
        assert raised.value.path == str(current)
    current.unlink()
    with pytest.raises(CorruptionError) as raised:
        machine.verify()
    assert raised.value.path == str(current)
    current.write_bytes(content)
    assert machine.verify() is None


def test_bytes_allocated_ahead_are_not_verified(machine: FastStateMachine, directory: Path) -> None:
    """Bytes after the log's end are not part of the state, and no damage whatever they are."""
    path = directory / LOG
    assert path.stat().st_size > machine.stats().log_bytes, "nothing is allocated ahead"
    flip(path, path.stat().st_size - 1)
    assert machine.verify() is None


def test_progress_rises_to_the_total(machine: FastStateMachine) -> None:
    """``progress`` gets the bytes done and the total; done never falls, and ends at the total."""
    machine.compact(machine.last_applied())
    machine.apply([(machine.last_applied().index + 1, 1, fastsm.put(b"more", bytes(200 << 10)))])
    calls: list[tuple[int, int]] = []
    machine.verify(lambda done, total: calls.append((done, total)))
    assert len(calls) > 1  # for base and log
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert {total for _, total in calls} == {done[-1]}
    assert done[-1] > machine.stats().log_bytes


def test_progress_of_an_empty_log_is_told_its_end(directory: Path, machine_at: Opener) -> None:
    """``progress`` ends at the total even if there is nothing to read."""
    calls: list[tuple[int, int]] = []
    machine_at(directory).verify(lambda done, total: calls.append((done, total)))
    assert calls
    assert calls[-1] == (LOG_HEADER_BYTES, LOG_HEADER_BYTES)


def test_an_error_of_progress_ends_the_verification(machine: FastStateMachine) -> None:
    """An error of ``progress`` ends ``verify``, which raises it and leaves nothing open."""
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Enough

    for _ in range(20):
        with pytest.raises(Enough):
            machine.verify(stop)
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors
    assert machine.verify() is None


def test_verify_runs_next_to_a_writer(machine: FastStateMachine) -> None:
    """``verify`` finds no damage while chunks of all sizes are applied and flushed."""
    ending = threading.Event()
    sizes = (10, 5000, 300 << 10)

    def write() -> None:
        index = machine.last_applied().index
        while not ending.is_set():
            index += 1
            machine.apply([(index, 1, fastsm.put(b"%d" % (index % 50), bytes(sizes[index % 3])))])
            if index % 10 == 0:
                machine.flush()

    before = machine.last_applied().index
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(15):
            assert machine.verify() is None
    finally:
        ending.set()
        writer.join()
    assert machine.last_applied().index > before


@pytest.mark.parametrize("step", ["clear", "close"])
def test_reset_or_close_in_the_middle_is_no_damage(directory: Path, machine_at: Opener, step: str) -> None:
    """A verification during which the machine is reset succeeds; after a close it may raise ``NotRunningError``."""
    machine = machine_at(directory)
    for index in (1, 2, 3):
        machine.apply([(index, 1, fastsm.put(b"large", bytes(20 << 20)))])
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            getattr(machine, step)()

    # After a close, verify may finish with the files that it has open; after a reset it must not raise.
    with contextlib.suppress(*([NotRunningError] if step == "close" else [])):
        machine.verify(interrupt)
    assert calls
    if step == "clear":
        assert machine.verify() is None
        return
    with pytest.raises(NotRunningError):
        machine.verify()


def test_verify_of_a_stopped_machine_is_refused(machine: FastStateMachine) -> None:
    """After ``stop``, ``verify`` raises ``NotRunningError``; after ``start`` it works again."""
    machine.stop()
    with pytest.raises(NotRunningError):
        machine.verify()
    machine.start()
    assert machine.verify() is None


def test_a_log_cut_short_is_found(machine: FastStateMachine, directory: Path) -> None:
    """If the log's file is cut short, ``verify`` raises ``CorruptionError``; it does not read through the mapping."""
    path = directory / LOG
    end = machine.stats().log_bytes
    last = frame_starts(machine, path)[-2]
    content = path.read_bytes()
    os.truncate(path, end - 100)
    with pytest.raises(CorruptionError) as raised:
        machine.verify()
    assert (raised.value.path, raised.value.offset) == (str(path), last)
    with path.open("r+b") as file:
        file.write(content)
    assert machine.verify() is None


def test_damage_is_found_before_anything_is_changed(directory: Path, machine_at: Opener) -> None:
    """An opening with ``verify_on_open="full"`` does not cut a torn tail from the log if the base is damaged."""
    machine = machine_at(directory)
    for index in range(1, 40):
        machine.apply([(index, 1, fastsm.put(b"%d" % index, os.urandom(300)))])
    machine.compact(20)
    machine.close()
    log, base = directory / "log-2", directory / "base-2"
    log.write_bytes(log.read_bytes() + b"torn")
    flip(base, base.stat().st_size - 100)
    before = {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "LOCK"}  # holds the time
    with pytest.raises(CorruptionError, match="base-2"):
        FastStateMachine(directory, verify_on_open="full")
    assert {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "LOCK"} == before


def test_a_read_only_machine_verifies(machine: FastStateMachine, directory: Path, machine_at: Opener) -> None:
    """While an owner has the directory open, a read-only machine verifies the state that it shows."""
    reader = machine_at(directory, read_only=True)
    machine.apply([(41, 1, fastsm.put(b"later", b""))])
    assert reader.verify() is None
    flip(directory / LOG, LOG_HEADER_BYTES + 50)
    with pytest.raises(CorruptionError):
        reader.verify()
    flip(directory / LOG, LOG_HEADER_BYTES + 50)
