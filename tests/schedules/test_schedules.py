"""Every pair of operations at every seam, random triples, and a disk that reports an error once."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from schedules import operations
from schedules.explorer import quiet_directory
from schedules.operations import (
    MAKE_DURABLE,
    OPERATIONS,
    SECONDS,
    Template,
    Violation,
    explore,
    explore_all,
    explore_one_error,
)

from fastsm import FastStateMachine, Reader
from support.publishing import checksum_of, take_all_news

if not sys.platform.startswith("linux"):
    pytest.skip("the system does not say which threads are blocked", allow_module_level=True)

SEED = random.randrange(2**32)
TRIPLES = 200


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with quiet_directory() as root:
        yield Template(root)


@pytest.mark.parametrize("first", OPERATIONS)
def test_any_operation_at_any_seam_of_another_comes_to_what_one_after_the_other_would(
    template: Template, first: str
) -> None:
    """Both operations have the outcome of some order or a typed error, and the directory opens as the same state."""
    for second in SECONDS:
        explore_all(template, (first, second))


def test_compaction_at_a_seam_of_any_operation_at_a_seam_of_another(template: Template) -> None:
    """Random schedules of three operations, one of them an automatic compaction, have the outcome of some order."""
    print("seed", SEED)
    dice = random.Random(SEED)
    for _ in range(TRIPLES):
        names = dice.choices(list(OPERATIONS), k=3)
        names[dice.randrange(3)] = "compact by itself"
        explore(template, names, (dice.randrange(60), dice.randrange(30)))


@pytest.mark.parametrize("first", MAKE_DURABLE)
@pytest.mark.parametrize("second", MAKE_DURABLE)
def test_nothing_is_acknowledged_next_to_a_failing_sync(template: Template, first: str, second: str) -> None:
    """The system reports a lost page once, so a sync that overlaps the failing one must not count as a success."""
    seam = 0
    while explore_one_error(template, (first, second), seam).started[1]:
        seam += 1
    assert seam > 0


def test_the_explorer_sees_a_missing_epoch(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """The explorer finds a snapshot that does not compare its state's epoch, so the tests above can fail."""
    monkeypatch.setattr(FastStateMachine, "_refuse_replaced", lambda *_: None)
    monkeypatch.setattr(FastStateMachine, "_is_same_state", lambda *_: True)
    with pytest.raises(Violation):
        explore_all(template, ("snapshot", "reset"))


def test_the_explorer_sees_a_reader_that_trusts_an_old_generation(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The explorer finds a reader that does not check the identity of the published log."""

    class Trusting(Reader):
        __slots__ = ()

        def _take_news(self) -> None:
            take_all_news(self)

    monkeypatch.setattr(operations, "Reader", Trusting)
    with pytest.raises(Violation):
        explore_all(template, ("reset", "refresh"))


def test_the_explorer_sees_a_publication_that_is_read_half_written(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The explorer finds a reader that accepts a slot of which only some fields are stored."""

    def tear_unseen(state: Path) -> None:
        slots = np.memmap(state / "PUBLISHED", np.uint64, "r+", 64, (2, 8))
        older, newer = sorted(slots, key=lambda slot: int(slot[0]))
        older[:7] = newer[:7]
        older[0] += np.uint64(1)
        older[4] += np.uint64(1)  # only the last applied entry is the next publication's
        older[7] = checksum_of(older)

    monkeypatch.setattr(operations, "tear", tear_unseen)
    with pytest.raises(Violation):
        explore_all(template, ("apply", "refresh"))


def test_the_same_seam_is_the_same_place(template: Template) -> None:
    """Schedules are deterministic: in two runs, each seam number means the same place."""
    explore(template, ("snapshot", "flush"), (0,))  # so that modules imported at first use are there
    for seam in range(0, 80, 10):
        places = [explore(template, ("snapshot", "flush"), (seam,)).place for _ in range(2)]
        assert places[0] == places[1]
