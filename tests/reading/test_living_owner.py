"""Readers of an owner that is killed again and again never see anything impossible. See `tests/readers.py`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import readers

from fastsm import Reader
from fastsm.disk import published
from fastsm.disk.files import Directory
from fastsm.reading.reader import ReaderStats

SECONDS = float(os.environ.get("FASTSM_READERS_SECONDS", "20"))


def test_readers_never_see_what_cannot_be(tmp_path: Path) -> None:
    """There is no half, lost or duplicate chunk, and no unreported step back, whenever an owner is killed."""
    counts, violations = readers.run(SECONDS, readers=4, seed=1, root=tmp_path)
    print(dict(counts))
    assert not violations, "\n".join(violations[:5])
    # How much happens in these seconds depends on the machine.
    assert all(counts[name] > 0 for name in ("kills", "with news", "entries", "changes")), counts
    assert counts["generations"] >= 4 + counts["rebuilt"]


def test_readers_where_the_system_has_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same if the publication is written instead of stored, and runs of the machine have no number, as on macOS."""
    monkeypatch.setattr(Directory, "stores_are_safe", lambda *_: False)
    monkeypatch.setattr(published, "BOOT_ID", str(tmp_path / "missing"))
    counts, violations = readers.run(SECONDS / 4, readers=2, seed=3, root=tmp_path)
    assert not violations, "\n".join(violations[:5])
    assert all(counts[name] > 0 for name in ("kills", "with news", "entries", "changes")), counts


class Silent(Reader):
    """A planted fault: it does not report when the state went back."""

    __slots__ = ()

    def stats(self) -> ReaderStats:
        return dataclasses.replace(super().stats(), rebuilt=0)


class SilentWatcher(readers.Watcher):
    kind = Silent


def step_with_resets(owner: readers.Owner) -> None:
    """Apply entries, and reset often."""
    if owner.dice.random() < 0.02:
        owner.machine.clear()
    else:
        owner.apply()


def test_a_planted_mistake_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that does not report that its state went back is detected."""
    monkeypatch.setattr(readers.Owner, "step", step_with_resets)
    _, violations = readers.run(5, readers=2, seed=2, root=tmp_path, watcher=SilentWatcher)
    assert any("say" in violation for violation in violations), violations
