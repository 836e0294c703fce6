"""Two commits beside each other: built apart, measured in turns, judged by the noise of the same run.

Each commit gets a worktree and a virtual environment of its own. Both run the same suite, HEAD's `guard.py`, in
alternating order. A round gives, for each workload, HEAD's ratio to its dict over BASE's. The noise is what the same
numbers say of chance: the spread of those rounds, and of BASE beside itself. HEAD fails where it is slower by
more than that, and by more than SMALLEST_LOSS.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench.machine import describe

SMALLEST_LOSS = 1.05
LEAST_ROUNDS = 5
MOST_ROUNDS = 25
CHECKOUT = Path(__file__).resolve().parent.parent
Round = dict[str, tuple[float, float]]


class Verdict(NamedTuple):
    workload: str
    ratio: float  # of HEAD to BASE, median
    low: float  # of the median, 95 %
    high: float
    limit: float
    lost: bool


def build(commit: str, directory: Path) -> Path:
    """A worktree of the commit with a virtual environment in it; returns the environment's Python."""
    git = ["git", "-C", str(CHECKOUT)]
    subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(directory), commit], check=True)
    environment = directory / ".venv-compare"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(directory)], check=True)
    return python


def run_round(python: Path, directory: Path) -> Round:
    """One process of the suite, on files of its own."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        # In the scratch directory, so that no checkout hides the installed package.
        command = [str(python), "-P" if sys.version_info >= (3, 11) else "-I", str(directory / "guard.py"), scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=scratch)
    return {name: (mine, theirs) for name, (mine, theirs) in json.loads(done.stdout).items()}


def judge(base: list[Round], head: list[Round]) -> list[Verdict]:
    """For each workload HEAD over BASE, and whether that is a loss beyond what chance makes of BASE over BASE."""
    verdicts = []
    for workload in base[0]:
        before = [turn[workload][0] / turn[workload][1] for turn in base]
        after = [turn[workload][0] / turn[workload][1] for turn in head]
        rounds = [new / old for new, old in zip(after, before, strict=True)]
        # Two commits that are equal would differ by as much: from round to round, BASE beside itself.
        itself = [max(a, b) / min(a, b) for a, b in itertools.pairwise(before)]
        noise = statistics.median(itself) ** (1.5 / len(rounds) ** 0.5)
        low, high = interval(rounds)
        limit = max(SMALLEST_LOSS, noise)
        ratio = statistics.median(rounds)
        verdicts.append(Verdict(workload, ratio, low, high, limit, ratio > limit and low > 1))
    return verdicts


def interval(values: list[float]) -> tuple[float, float]:
    """Between these two lies the median of all rounds there could be, 19 times of 20 (order statistics)."""
    ordered = sorted(values)
    skip = max(0, int((len(ordered) - 1.96 * len(ordered) ** 0.5) / 2))
    return ordered[skip], ordered[-1 - skip]


def render(base: str, head: str, verdicts: list[Verdict], rounds: int) -> str:
    lines = [
        f"# {head} beside {base}", "",
        f"{rounds} interleaved rounds. Below 1: {head} is faster.", "",
        "| workload | ratio | 95 % of medians | limit | |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [
        f"| {v.workload} | {v.ratio:.3f} | {v.low:.3f} to {v.high:.3f} | {v.limit:.3f} | {'LOST' if v.lost else ''} |"
        for v in verdicts
    ]
    return "\n".join(lines) + "\n"


def compare(base: str, head: str, minutes: float, out: Path) -> int:
    """Builds, measures, reports; 1 when HEAD lost anything beyond the noise."""
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # worktrees are removed on the way out
    with tempfile.TemporaryDirectory(prefix="fastsm-compare-", dir=out) as name:
        directory = Path(name).resolve()
        shutil.copy(CHECKOUT / "bench" / "guard.py", directory)
        try:
            pythons = [build(commit, directory / label) for commit, label in ((base, "base"), (head, "head"))]
            found = interleaved(pythons, directory, minutes)
        finally:
            for label in ("base", "head"):
                worktree = str(directory / label)
                subprocess.run(["git", "-C", str(CHECKOUT), "worktree", "remove", "--force", worktree], check=False)
    verdicts = judge(*found)
    document = {
        "about": describe(out), "base": base, "head": head, "rounds": dict(zip(("base", "head"), found, strict=True)),
        "verdicts": [verdict._asdict() for verdict in verdicts],
    }  # fmt: skip
    (out / "compare.json").write_text(json.dumps(document, indent=1) + "\n")
    text = render(base, head, verdicts, len(found[0]))
    (out / "compare.md").write_text(text)
    print(text)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        Path(summary).write_text(text)
    return 1 if any(verdict.lost for verdict in verdicts) else 0


def interleaved(pythons: list[Path], directory: Path, minutes: float) -> tuple[list[Round], list[Round]]:
    """Rounds of both in alternating order, at least LEAST_ROUNDS, then as many as the time allows."""
    both: tuple[list[Round], list[Round]] = ([], [])
    started = time.monotonic()
    for python in pythons:
        run_round(python, directory)  # the first run of each pays for cold caches
    while len(both[0]) < MOST_ROUNDS:
        turn = len(both[0])
        per_round = (time.monotonic() - started) / (turn + 1)
        if turn >= LEAST_ROUNDS and time.monotonic() - started + per_round > 60 * minutes:
            break
        for which in (0, 1) if turn % 2 else (1, 0):
            both[which].append(run_round(pythons[which], directory))
    return both
