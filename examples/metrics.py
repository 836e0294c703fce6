"""``stats().as_dict()`` for Prometheus: a gauge or a counter for each number. Needs ``pip install prometheus_client``.

Run: ``python examples/metrics.py``, which prints what Prometheus would scrape.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

import fastsm

COUNTERS = {"flush_count", "flush_seconds"}


class StateMachineCollector:
    """Calls ``stats()`` at each scrape, which takes microseconds and never waits."""

    def __init__(self, machine: fastsm.FastStateMachine) -> None:
        self.machine = machine

    def collect(self) -> Iterator[Metric]:
        for name, value in self.machine.stats().as_dict().items():
            family = CounterMetricFamily if name in COUNTERS else GaugeMetricFamily
            yield family(f"fastsm_{name}", f"fastsm: {name.replace('_', ' ')}", value=float(value))


def main(folder: Path) -> None:
    with fastsm.FastStateMachine(folder / "state") as machine:
        registry = CollectorRegistry()
        registry.register(StateMachineCollector(machine))  # start_http_server(8000, registry=registry) serves it
        machine.apply([(1, 1, fastsm.put(b"key", b"value"))])
        machine.flush()
        print(generate_latest(registry).decode())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
