"""Two commits compared: built apart, measured in turns, judged by the noise of the same run.

Each commit gets a worktree and a virtual environment of its own, and both run the same suite, this checkout's
`guard.py`. Three processes take turns, slice by slice of some milliseconds: BASE, HEAD, and BASE once more. HEAD over
BASE is the result; BASE over BASE, which differs by chance alone, says how much chance makes of it. The processes
are started anew several times, for where a process lies in memory is chance, too. HEAD fails where it is slower by
more than chance, and by more than SMALLEST_LOSS.

A loss of a hundredth is less than what chance makes of times. So both commits' instructions, and what they ask of the
system, are counted as well, which chance does not move: there two hundredths fail.
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

from bench import counts
from bench.machine import describe

SMALLEST_LOSS = 1.03
STARTS = 6  # of the three processes, each time as a part of the minutes
WORKLOADS = ("get", "get.hot", "get_many", "apply.1", "apply.100", "apply.hot", "flush", "snapshot", "open")
CHECKOUT = Path(__file__).resolve().parent.parent
COUNTING = 60  # seconds of the minutes
Slices = dict[str, list[tuple[float, float, float]]]  # by workload: seconds of BASE, HEAD and BASE again


class Verdict(NamedTuple):
    workload: str
    ratio: float  # of HEAD to BASE, median
    low: float  # of the median, 95 %
    high: float
    noise: float  # what chance makes of BASE over BASE
    lost: bool


def build(commit: str, directory: Path) -> Path:
    """A worktree of the commit with a virtual environment in it; returns the environment's Python."""
    git = ["git", "-C", str(CHECKOUT)]
    subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(directory), commit], check=True)
    environment = directory / ".venv-compare"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, cwd=directory.parent)
    python = environment / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(directory)], check=True, cwd=directory.parent)
    return python


class Runner:
    """A process of the suite, which does a slice of work at a time."""

    def __init__(self, python: Path, directory: Path, name: str) -> None:
        self.scratch = directory / name
        self.scratch.mkdir()
        # There, so that no checkout hides the installed package.
        self.process = subprocess.Popen(
            [str(python), str(directory / "guard.py"), str(self.scratch)], cwd=self.scratch, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the suite ended with status {self.process.wait()}")
        return line

    def slice(self, workload: str) -> float:
        """Seconds of one slice."""
        assert self.process.stdin is not None
        self.process.stdin.write(workload + "\n")
        self.process.stdin.flush()
        return float(self.answer())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        shutil.rmtree(self.scratch)


def take_turns(pythons: list[Path], directory: Path, seconds: float, turn: int) -> Slices:
    """One start of the three processes: slices of every workload, in changing order, for so many seconds.

    Who starts first is another one in each turn: it may get the better places in memory and on the disk.
    """
    found: Slices = {workload: [] for workload in WORKLOADS}
    base, head = pythons
    orders = list(itertools.permutations(range(3)))
    started_as = {which: Runner((base, head, base)[which], directory, f"process-{which}") for which in orders[turn % 6]}
    runners = [started_as[which] for which in range(3)]
    try:
        for workload in WORKLOADS:
            for runner in runners:
                runner.slice(workload)  # the first of each pays for cold caches
        started = time.monotonic()
        for order in itertools.cycle(orders):
            for workload in WORKLOADS:
                times = {which: runners[which].slice(workload) for which in order}
                found[workload].append((times[0], times[1], times[2]))
            if time.monotonic() - started > seconds:
                return found
        raise AssertionError("unreachable")
    finally:
        for runner in runners:
            runner.end()


def judge(starts: list[Slices]) -> list[Verdict]:
    """For each workload HEAD over BASE, and whether that is a loss beyond what chance makes of BASE over BASE."""
    verdicts = []
    for workload in WORKLOADS:
        slices = [start[workload] for start in starts]
        heads = [ratio for start in slices for ratio in middles([head / base for base, head, _ in start])]
        bases = [ratio for start in slices for ratio in middles([twin / base for base, _, twin in start])]
        low, high = interval(heads)
        again = interval(bases)
        noise = max(again[1], 1 / again[0]) ** 1.5  # of nine workloads, none should fail by chance
        verdicts.append(Verdict(
            workload, statistics.median(heads), low, high, noise, low > 1 and
            statistics.median(heads) > max(SMALLEST_LOSS, noise)))  # fmt: skip
    return verdicts


def middles(ratios: list[float]) -> list[float]:
    """Medians of every six slices, one of each order: single ones are mostly what the machine did meanwhile."""
    groups = [ratios[i : i + 6] for i in range(0, max(len(ratios) - 5, 1), 6)]
    return [statistics.median(group) for group in groups]


def interval(values: list[float]) -> tuple[float, float]:
    """Between these two lies the median of all there could be, 19 times of 20 (order statistics)."""
    ordered = sorted(values)
    skip = max(0, int((len(ordered) - 1.96 * len(ordered) ** 0.5) / 2))
    return ordered[skip], ordered[-1 - skip]


def render(base: str, head: str, verdicts: list[Verdict], count: int) -> str:
    lines = [
        f"# {head} compared with {base}", "",
        f"{count} slices of each workload, in turns. Below 1: {head} is faster.", "",
        "| workload | ratio | 95 % of medians | noise | |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [
        f"| {v.workload} | {v.ratio:.3f} | {v.low:.3f} to {v.high:.3f} | {v.noise:.3f} | {'LOST' if v.lost else ''} |"
        for v in verdicts
    ]
    return "\n".join(lines) + "\n"


def count(base: Path, head: Path) -> tuple[counts.Counts, counts.Counts]:
    """The counts of both; none without Linux's /proc, nor of a base so old that its functions had other names."""
    if not counts.can_count():
        return {}, {}
    try:
        before = counts.measure(str(base))
    except RuntimeError as error:
        print(f"the base cannot be counted, only timed: {error}", file=sys.stderr)
        before = {}
    return before, counts.measure(str(head))


def render_counts(before: counts.Counts, after: counts.Counts, losses: list[str]) -> str:
    kinds = sorted({kind for numbers in after.values() for kind in numbers})
    if not before:
        return "\nNothing was counted next to it: this system or the base cannot be counted.\n"
    lines = ["", "What is counted, an operation, before and after:", ""]
    lines += ["| | " + " | ".join(kinds) + " |", "| --- |" + " --- |" * len(kinds)]
    for name, numbers in after.items():
        old = before.get(name, {})
        cells = [f"{old[kind]:.2f}, {numbers[kind]:.2f}" if kind in old else f"{numbers[kind]:.2f}" for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"LOST: {loss}" for loss in losses)]) + "\n"


def compare(base: str, head: str, minutes: float, out: Path) -> int:
    """Builds, measures, reports; 1 when HEAD lost anything beyond the noise."""
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # worktrees are removed on the way out
    with tempfile.TemporaryDirectory(prefix="fastsm-compare-", dir=out) as name:
        directory = Path(name).resolve()
        shutil.copy(CHECKOUT / "bench" / "guard.py", directory)
        try:
            pythons = [build(commit, directory / label) for commit, label in ((base, "base"), (head, "head"))]
            before, after = count(*pythons)
            seconds = (60 * minutes - COUNTING) / STARTS - 10  # a start takes some seconds by itself
            starts = [take_turns(pythons, directory, seconds, turn) for turn in range(STARTS)]
        finally:
            for label in ("base", "head"):
                worktree = str(directory / label)
                subprocess.run(["git", "-C", str(CHECKOUT), "worktree", "remove", "--force", worktree], check=False)
    verdicts, losses = judge(starts), counts.judge(after, before)
    document = {
        "about": describe(out), "base": base, "head": head, "starts": starts, "counts": [before, after],
        "verdicts": [verdict._asdict() for verdict in verdicts],
    }  # fmt: skip
    (out / "compare.json").write_text(json.dumps(document, indent=1) + "\n")
    text = render(base, head, verdicts, sum(len(start[WORKLOADS[0]]) for start in starts))
    text += render_counts(before, after, losses)
    (out / "compare.md").write_text(text)
    print(text)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        Path(summary).write_text(text)
    return 1 if losses or any(verdict.lost for verdict in verdicts) else 0
