"""An owner and a reader next to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastsm import FastStateMachine, Reader, put


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[FastStateMachine]:
    """An owner, with one entry."""
    with FastStateMachine(tmp_path / "state", auto_compact=False) as opened:
        opened.apply([(1, 1, put(b"color", b"blue"))])
        yield opened


@pytest.fixture
def reader(machine: FastStateMachine) -> Iterator[Reader]:
    """A reader next to it."""
    with Reader(machine.path) as opened:
        yield opened
