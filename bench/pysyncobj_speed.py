"""A cluster's commands per second, and their latency: with few and many in flight, at the leader and at a follower."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from pysyncobj_nodes import Cluster

WINDOWS = (1, 100, 1_000, 10_000)
BATCHES_UNDER_WAY = 20
WARM_UP = 0.5  # seconds

Speed = dict[str, float]


def workloads() -> Iterator[tuple[str, int, int]]:
    """Yield the name, the commands in flight and the keys per command of each workload."""
    for window in WINDOWS:
        yield f"{window:,} under way", window, 1
    yield "batches of 100 keys, 20 under way", BATCHES_UNDER_WAY, 100


def measure_speed(variant: str, root: Path, seconds: float) -> dict[str, float]:
    """Measure one round of one variant; each name in the result combines workload, place and figure."""
    cluster = Cluster(variant, root, watched=False)
    found: dict[str, float] = {}
    try:
        cluster.leader()
        cluster.all("protocol", version=2)
        for name, window, batch in workloads():
            for place in ("leader", "follower"):
                leader = cluster.leader()
                number = leader if place == "leader" else (leader + 1) % 3
                cluster.call(number, "measure", window=window, seconds=WARM_UP, batch=batch)
                figures = cluster.call(number, "measure", window=window, seconds=seconds, batch=batch)
                found |= {f"{name}, {place}: {figure}": value for figure, value in figures.items()}
    finally:
        cluster.close()
    return found


def table_of_speed(rounds: dict[str, list[Speed]]) -> str:
    """Return a Markdown table of medians: commands per second, p50 and p99 in ms, of each variant in each workload."""
    variants = list(rounds)
    lines = [
        f"medians of {len(rounds[variants[0]])} rounds: commands per second; 50th, 99th percentile of latency, in ms\n",
        f"| | {' | '.join(variants)} |", f"| --- |{' ---: |' * len(variants)}",
    ]  # fmt: skip
    for name, _, _ in workloads():
        for place in ("leader", "follower"):
            cells = []
            for variant in variants:
                rate, p50, p99 = (
                    statistics.median(each[f"{name}, {place}: {figure}"] for each in rounds[variant])
                    for figure in ("rate", "p50", "p99")
                )
                cells.append(f"{rate:,.0f}; {p50:.3g}, {p99:.3g}")
            lines.append(f"| {name}, {place} | {' | '.join(cells)} |")
    return "\n".join(lines)
