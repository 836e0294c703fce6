"""Timing of a subject and its base in interleaved rounds, and the JSON that a run writes.

Absolute times on a shared machine mean little; the ratio of two things timed alternately means more.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROUNDS = 7
Prepare = Callable[[], tuple[tuple[Any, ...], tuple[Any, ...]]]


@dataclass
class Result:
    """The measurements of one row: a value per round and, for ratios, the seconds that they were computed from."""

    row: str
    who: str
    unit: str  # "ratio", "ns", "us", "ms", "bytes"
    values: list[float]
    items: int = 1
    subject: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        text = f"{self.row:<26} {self.who:<10} {self.median:9.3g} {self.unit:<6}"
        text += f"({min(self.values):.3g} to {max(self.values):.3g})"
        if self.subject and self.base:
            mine, theirs = (statistics.median(times) / self.items * 1e9 for times in (self.subject, self.base))
            text += f"  {mine:,.0f} ns, base {theirs:,.0f} ns"
        return text


def timed(function: Callable[..., object], *arguments: Any) -> float:
    """Time one call, in seconds, with the garbage collector off: it would visit millions of prepared objects."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - start
    finally:
        gc.enable()


def interleave(
    subject: Callable[..., object], base: Callable[..., object], prepare: Prepare, rounds: int = ROUNDS
) -> tuple[list[float], list[float]]:
    """Time both once per round, in alternating order; return the seconds of each. `prepare` makes the arguments."""
    mine: list[float] = []
    theirs: list[float] = []
    for turn in range(rounds):
        arguments, base_arguments = prepare()
        if turn % 2:
            theirs.append(timed(base, *base_arguments))
        mine.append(timed(subject, *arguments))
        if not turn % 2:
            theirs.append(timed(base, *base_arguments))
    return mine, theirs


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in another process, in an empty folder: in a checkout it would import the unbuilt `fastsm/`."""
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)


OWN_MEMORY = """
import json, sys

def own_memory():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024

"""


def measured(code: str, *arguments: object) -> Any:
    """Run code as `run_python` does, with a function `own_memory()` (in bytes); return what it prints as JSON."""
    ended = run_python(OWN_MEMORY + code, *arguments)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def write_results(path: Path, results: list[Result], about: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"about": about, "results": [vars(result) for result in results]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def read_results(path: Path) -> tuple[dict[str, Any], list[Result]]:
    document = json.loads(path.read_text())
    return document["about"], [Result(**result) for result in document["results"]]
