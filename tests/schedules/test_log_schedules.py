"""Every pair of a Raft log's operations, at every call of the system; and a disk that reports an error once."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from schedules.explorer import quiet_directory
from schedules.log_operations import FIRSTS, MAKE_DURABLE, SECONDS, Template, explore, explore_all, explore_one_error
from schedules.operations import Violation

from fastsm import RaftLog

if not sys.platform.startswith("linux"):
    pytest.skip("the system does not say which threads are blocked", allow_module_level=True)


@pytest.fixture(scope="module", params=["one segment", "many segments"])
def template(request: pytest.FixtureRequest) -> Iterator[Template]:
    with quiet_directory() as root:
        yield Template(root, rotating=request.param != "one segment")


@pytest.mark.parametrize("first", FIRSTS)
def test_any_operation_at_any_seam_of_another_comes_to_what_one_after_the_other_would(
    template: Template, first: str
) -> None:
    """Both operations have the outcome of some order or a typed error; their promises and the disk's content hold."""
    print(first, {second: explore_all(template, (first, second)) for second in SECONDS})


@pytest.mark.parametrize("first", MAKE_DURABLE)
def test_nothing_is_acknowledged_next_to_a_failing_sync(template: Template, first: str) -> None:
    """The system reports a lost page once, so a sync that overlaps the failing one must not count as a success."""
    for second in MAKE_DURABLE:
        seam = 0
        while explore_one_error(template, (first, second), seam).started[1]:
            seam += 1


def test_the_explorer_sees_a_sync_that_is_none(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """The explorer finds a log that acknowledges before it syncs, so the tests above can fail."""
    monkeypatch.setattr(RaftLog, "_sync_to", lambda *_: None)
    for pair in (("vote", "reads"), ("sync", "append")):
        with pytest.raises(Violation):
            explore_all(template, pair)


def test_the_same_seam_is_the_same_place(template: Template) -> None:
    """Schedules are deterministic: in two runs, each seam number means the same place."""
    for seam in range(6):
        places = [explore(template, ("close", "sync"), seam).place for _ in range(2)]
        assert places[0] == places[1]
        assert places[0]
