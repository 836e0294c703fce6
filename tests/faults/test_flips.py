"""Flipped bits of a snapshot of 8 KiB: every bit of a received file, and a bit of each byte of a log's base.

With those of a log of 4 KiB (`test_log_bits.py`) these are 98,304 bits.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

import fastsm
from fastsm import CorruptionError, FastsmError, FastStateMachine, FormatVersionError, SnapshotError, open_snapshot
from support.faulty import memory_directory
from support.power import QuietDirectory
from support.simulation import kill

SIZE = 8192


@pytest.fixture(scope="module")
def written() -> Iterator[Path]:
    """Provide a directory with a snapshot of exactly 8 KiB, and a state with the same bytes as its base."""
    with memory_directory() as root:
        machine = FastStateMachine(root / "state", retain_entries=0, _files=QuietDirectory)
        for index in range(1, 21):
            machine.apply([(index, 1 + index // 8, fastsm.put(b"key-%d" % index, bytes([index]) * 200))])
        machine.write_snapshot(root)
        spare = SIZE - (root / "snapshot.fsm").stat().st_size
        machine.apply([(21, 3, fastsm.put(b"last", bytes(range(1, 256)) * 20))])
        machine.write_snapshot(root)
        spare = SIZE - (root / "snapshot.fsm").stat().st_size
        machine.apply([(22, 3, fastsm.put(b"last", bytes(255 * 20 + spare)))])
        machine.write_snapshot(root)
        machine.compact()
        machine.close()
        assert (root / "snapshot.fsm").stat().st_size == SIZE
        yield root


@contextmanager
def flipped(file: BinaryIO, content: bytearray, bit: int) -> Iterator[None]:
    """Flip a bit of a file for the block."""
    byte = content[bit >> 3]
    try:
        os.pwrite(file.fileno(), bytes([byte ^ 1 << (bit & 7)]), bit >> 3)
        yield
    finally:
        os.pwrite(file.fileno(), bytes([byte]), bit >> 3)


def test_every_flipped_bit_of_a_snapshot_is_found(written: Path) -> None:
    """Each flipped bit is a typed error of open or verify; one in 64 is also installed, which fails without effect."""
    content = bytearray((written / "snapshot.fsm").read_bytes())
    path = written / "flipped" / "snapshot.fsm"
    path.parent.mkdir()
    machine = FastStateMachine(written / "installing", _files=QuietDirectory)
    machine.apply([(1, 1, fastsm.put(b"mine", b"value"))])
    found = 0
    with path.open("w+b", buffering=0) as file:
        file.write(content)
        for bit in range(8 * SIZE):
            with flipped(file, content, bit):
                try:
                    with open_snapshot(path) as snapshot:
                        snapshot.verify()
                except FastsmError:
                    found += 1
                if bit % 64 == bit // 64 % 8:
                    with pytest.raises(FastsmError):
                        machine.install_snapshot(None, path)
    assert found == 8 * SIZE
    assert dict(machine.items()) == {b"mine": b"value"}
    machine.close()


def test_every_cut_of_a_snapshot_is_found(written: Path) -> None:
    """A snapshot that is cut to any length is refused by open or verify."""
    content = (written / "snapshot.fsm").read_bytes()
    path = written / "cut.fsm"
    for size in range(SIZE):
        path.write_bytes(content[:size])
        with pytest.raises(SnapshotError), open_snapshot(path) as snapshot:
            snapshot.verify()


def open_and_verify(state: Path, mode: str) -> None:
    """Open a state so that everything is read, by the opening or by `verify`."""
    machine = FastStateMachine(state, verify_on_open=mode, _files=QuietDirectory)  # type: ignore[arg-type]
    try:
        machine.verify()
    finally:
        kill(machine)


@pytest.mark.parametrize("mode", ["full", "off"])
def test_every_flipped_byte_of_a_base_is_found(written: Path, mode: str) -> None:
    """A flipped bit of a base, any in its header or one in a later byte, is an error that names the base."""
    state = written / "state"
    (base,) = state.glob("base-*")
    content = bytearray(base.read_bytes())
    dice = random.Random(1)
    bits = [*range(8 * 160), *(8 * byte + dice.randrange(8) for byte in range(160, len(content)))]
    with base.open("r+b", buffering=0) as file:
        for bit in bits if mode == "full" else bits[::4]:
            with flipped(file, content, bit), pytest.raises((CorruptionError, FormatVersionError)) as caught:
                open_and_verify(state, mode)
            assert caught.value.path == str(base)
    with FastStateMachine(state, verify_on_open="full") as machine:
        assert machine.len() == 21
