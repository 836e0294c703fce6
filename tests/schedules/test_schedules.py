"""Every pair of operations at every seam, triples by a seed, and a disk that tells of an error once."""

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
    """Each is as if alone, or ended with a typed error; what is on disk opens, and is what memory was."""
    for second in SECONDS:
        explore_all(template, (first, second))


def test_compaction_at_a_seam_of_any_operation_at_a_seam_of_another(template: Template) -> None:
    """Three at once, drawn: with a compaction by itself among them."""
    print("seed", SEED)
    dice = random.Random(SEED)
    for _ in range(TRIPLES):
        names = dice.choices(list(OPERATIONS), k=3)
        names[dice.randrange(3)] = "compact by itself"
        explore(template, names, (dice.randrange(60), dice.randrange(30)))


@pytest.mark.parametrize("first", MAKE_DURABLE)
@pytest.mark.parametrize("second", MAKE_DURABLE)
def test_nothing_is_acknowledged_next_to_a_failing_sync(template: Template, first: str, second: str) -> None:
    """The system tells of a lost page once: who syncs at that time must not take its silence for success."""
    seam = 0
    while explore_one_error(template, (first, second), seam).started[1]:
        seam += 1
    assert seam > 0


def test_the_explorer_sees_a_missing_epoch(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot that does not compare the epoch of its state is found, so that the tests above can fail."""
    monkeypatch.setattr(FastStateMachine, "_refuse_replaced", lambda *_: None)
    monkeypatch.setattr(FastStateMachine, "_is_same_state", lambda *_: True)
    with pytest.raises(Violation):
        explore_all(template, ("snapshot", "reset"))


def test_the_explorer_sees_a_reader_that_trusts_an_old_generation(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that does not look at the identity of the log that is published is found."""

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
    """A slot that is torn between its fields, and made to look whole, is found: a reader must not take it."""

    def tear_unseen(state: Path) -> None:
        slots = np.memmap(state / "PUBLISHED", np.uint64, "r+", 64, (2, 8))
        older, newer = sorted(slots, key=lambda slot: int(slot[0]))
        older[:7] = newer[:7]
        older[0] += np.uint64(1)
        older[4] += np.uint64(1)  # the last applied entry is the next one's, all else is not
        older[7] = checksum_of(older)

    monkeypatch.setattr(operations, "tear", tear_unseen)
    with pytest.raises(Violation):
        explore_all(template, ("apply", "refresh"))


def test_the_same_seam_is_the_same_place(template: Template) -> None:
    """Schedules are deterministic: run twice, each number of a seam means the same place."""
    explore(template, ("snapshot", "flush"), (0,))  # what is imported when it is first used
    for seam in range(0, 80, 10):
        places = [explore(template, ("snapshot", "flush"), (seam,)).place for _ in range(2)]
        assert places[0] == places[1]
