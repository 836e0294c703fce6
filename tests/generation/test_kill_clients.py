"""kill -9 while clients use sessions and leases: answers are true, and no command counts twice or is lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from support.killed_clients import SETTINGS, Service, Setting, report

LIVES = 3


def live(service: Service) -> None:
    for _ in range(LIVES):
        service.live()


def test_each_command_counts_once_whenever_the_process_is_killed(tmp_path: Path) -> None:
    """Deposits that are repeated until they are answered count once; the state and the clock are the model's."""
    counts: Counter[str] = Counter()
    for seed, setting in enumerate(SETTINGS.values()):
        service = Service(tmp_path / f"{seed}", seed, setting)
        live(service)
        service.end()
        counts.update(service.counts)
    print(report(counts))
    assert (counts["applied twice"], counts["lost"]) == (0, 0)
    assert counts["kills"] == LIVES * len(SETTINGS)
    assert min(counts[name] for name in ("commands", "asked again", "never committed", "acknowledged")) > 100


@pytest.mark.parametrize("fault", ["forgets", "loses", "mistakes"])
def test_a_session_that_is_wrong_is_found(tmp_path: Path, fault: str) -> None:
    """The test finds sessions that repeat commands, do nothing, or return another client's answer."""
    service = Service(tmp_path / "state", 0, Setting(fault=fault))
    with pytest.raises(AssertionError):
        live(service)
