"""What every benchmark shares: seeded data, and ratios to a base timed in the same rounds.

`pytest bench -q` prints, for each workload, the median and the spread of the ratio to its base. Absolute times on a
shared machine say little; a ratio of two things timed in alternation says more.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import fastsm

KEYS = 1_000_000
KEY_BYTES = 16
VALUE_BYTES = 100
ROUNDS = 7


@dataclass
class Comparison:
    """Times of a subject and its base, in seconds, one of each a round."""

    name: str
    items: int
    subject: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)

    def ratios(self) -> list[float]:
        return sorted(mine / theirs for mine, theirs in zip(self.subject, self.base, strict=True))

    def __str__(self) -> str:
        ratios = self.ratios()
        mine, theirs = (statistics.median(times) / self.items * 1e9 for times in (self.subject, self.base))
        return (
            f"{self.name:<44} {statistics.median(ratios):6.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            f"  {mine:8.0f} ns  base {theirs:8.0f} ns"
        )


_comparisons: list[Comparison] = []


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Comparison]:
    """`compare(subject, base, items, prepare=...)` times both in alternating order, and notes the ratio.

    `prepare()` makes the arguments of both before each round: a pair of tuples.
    """

    def run(
        subject: Callable[..., object],
        base: Callable[..., object],
        items: int,
        prepare: Callable[[], tuple[tuple[Any, ...], tuple[Any, ...]]],
        rounds: int = ROUNDS,
    ) -> Comparison:
        comparison = Comparison(request.node.name.removeprefix("test_"), items)
        prepared: list[tuple[Any, ...]] = []

        def time_base() -> None:
            comparison.base.append(timed(base, *prepared.pop()))

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            mine, theirs = prepare()
            prepared.append(theirs)
            if len(comparison.subject) % 2:
                time_base()
            return mine, {}

        def timed_subject(*arguments: Any) -> None:
            comparison.subject.append(timed(subject, *arguments))

        def teardown(*_: Any) -> None:
            if prepared:
                time_base()

        benchmark.pedantic(timed_subject, setup=setup, teardown=teardown, rounds=rounds)
        benchmark.extra_info.update(ratio=statistics.median(comparison.ratios()), ratios=comparison.ratios())
        _comparisons.append(comparison)
        return comparison

    return run


def timed(function: Callable[..., object], *arguments: Any) -> float:
    """Seconds of one call, without the garbage collector: millions of prepared objects are its work, not ours."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - start
    finally:
        gc.enable()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _comparisons:
        terminalreporter.write_sep("=", "ratio to the base: median (spread)")
        for comparison in _comparisons:
            terminalreporter.write_line(str(comparison))


def fresh(items: list[bytes]) -> list[bytes]:
    """Equal bytes as new objects: no hash is cached in them, as with keys from a network."""
    return [bytes(bytearray(item)) for item in items]


@pytest.fixture(scope="session")
def keys() -> list[bytes]:
    source = random.Random(1)
    return [source.randbytes(KEY_BYTES) for _ in range(KEYS)]


@pytest.fixture(scope="session")
def values() -> list[bytes]:
    source = random.Random(2)
    return [source.randbytes(VALUE_BYTES) for _ in range(KEYS)]


@pytest.fixture
def machine_at(tmp_path: Path) -> Iterator[Callable[..., fastsm.FastStateMachine]]:
    """Opens state machines below a temporary directory, and closes them."""
    opened: list[fastsm.FastStateMachine] = []

    def open_machine(**options: Any) -> fastsm.FastStateMachine:
        opened.append(fastsm.FastStateMachine(tmp_path / f"state-{len(opened)}", **options))
        return opened[-1]

    yield open_machine
    for machine in opened:
        machine.close()


def fill(machine: fastsm.FastStateMachine, keys: list[bytes], values: list[bytes], first_index: int = 1) -> None:
    """Puts all pairs, in chunks of 1,000."""
    for start in range(0, len(keys), 1000):
        pairs = zip(keys[start : start + 1000], values[start : start + 1000], strict=True)
        machine.apply([(first_index + start + i, 1, fastsm.put(*pair)) for i, pair in enumerate(pairs)])
