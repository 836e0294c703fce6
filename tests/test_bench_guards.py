"""The guards against losses of speed judge numbers, which the tests make up. Nothing is timed."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastsm.tools import benchmark

BENCH = Path(__file__).resolve().parent.parent / "bench"

pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="the tests run without the checkout's bench folder")


def load(name: str) -> ModuleType:
    """Import a module of the folder `bench`, which is not part of the installed package."""
    if "bench" not in sys.modules:
        found = importlib.util.spec_from_file_location(
            "bench", BENCH / "__init__.py", submodule_search_locations=[str(BENCH)])
        assert found is not None
        assert found.loader is not None
        sys.modules["bench"] = importlib.util.module_from_spec(found)
        found.loader.exec_module(sys.modules["bench"])
    return importlib.import_module(f"bench.{name}")


def starts(noise: float, head: float) -> list[dict[str, list[tuple[float, float, float]]]]:
    """Return slices as `compare` would measure them if HEAD took `head` times as long, with noise in each slice."""
    compare = load("compare")
    source = random.Random(1)

    def chance() -> float:
        return source.uniform(1 - noise, 1 + noise)

    return [
        {workload: [(chance(), head * chance(), chance()) for _ in range(60)] for workload in compare.WORKLOADS}
        for _ in range(compare.STARTS)
    ]


@pytest.mark.parametrize(
    ("noise", "head", "lost"),
    [(0.05, 1.0, False), (0.05, 1.2, True), (0.05, 1.06, True), (0.05, 0.8, False), (0.01, 1.02, False),
     (0.6, 1.0, False), (0.6, 1.5, True)],
    ids=["equal", "slower", "a little slower", "faster", "too little to tell", "noise alone", "slower than noise"],
)  # fmt: skip
def test_a_loss_is_one_beyond_the_noise(noise: float, head: float, lost: bool) -> None:
    """Only a loss that is larger than the noise of the base compared with itself fails."""
    verdicts = load("compare").judge(starts(noise, head))
    assert {verdict.lost for verdict in verdicts} == {lost}
    assert all(verdict.low <= verdict.ratio <= verdict.high for verdict in verdicts)


def test_counts_fail_above_what_was_recorded() -> None:
    """Instructions may grow by two percent; a page fault in one of twenty operations counts as chance."""
    judge: Any = load("counts").judge
    recorded = {"get": {"instructions": 350.0, "faults": 0.0}}
    assert judge({"get": {"instructions": 356.0, "faults": 0.05}}, recorded) == []
    (loss,) = judge({"get": {"instructions": 370.0, "faults": 0.0}}, recorded)
    assert "get: 370.00 instructions" in loss
    (loss,) = judge({"get": {"instructions": 350.0, "faults": 1.0}}, recorded)
    assert "faults" in loss
    assert judge({"new": {"instructions": 1.0}}, recorded) == []


def test_two_commits_are_counted_as_well() -> None:
    """A comparison reports more instructions as a loss; an operation that the base does not have is not a loss."""
    compare, counts = load("compare"), load("counts")
    before = {"get": {"instructions": 354.0}}
    after = {"get": {"instructions": 386.0}, "new": {"instructions": 9.0}}
    text = compare.render_counts(before, after, counts.judge(after, before))
    assert "| get | 354.00, 386.00 |" in text
    assert "| new | 9.00 |" in text
    assert text.count("LOST: ") == 1


def test_the_users_benchmark_measures_every_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every store gets a time for each kind of work that it can do, and the table shows each of them."""
    for name, small in {"KEYS": 2000, "LOOKUPS": 200, "ENTRIES": 200, "FLUSHES": 2, "ROUNDS": 2}.items():
        monkeypatch.setattr(benchmark, name, small)
    monkeypatch.setattr(benchmark, "memory_of", lambda name, directory: 1.0)
    found = benchmark.run(tmp_path)
    assert [one.store for one in found][:3] == ["fastsm", "dict", "sqlite"]
    assert all(one.median(work) is not None for one in found if one.store != "dict" for work in benchmark.WORKS)
    rows = list(benchmark.table(found))
    assert {len(row) for row in rows} == {len(found) + 1}
    assert len(rows) == len(benchmark.WORKS) + 1
    assert '"stores"' in benchmark.as_json(found)
