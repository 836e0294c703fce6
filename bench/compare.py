"""Two commits compared: built apart, measured in turns, judged by the noise of the same run.

Each commit gets its own worktree and virtual environment, and both run the same suite, this checkout's `guard.py`.
Three processes take turns, in slices of some milliseconds: BASE, HEAD, and BASE once more. The result is the ratio of
HEAD to BASE; the ratio of BASE to BASE differs from 1 by chance alone, so it measures the noise. The processes are
restarted several times, because a process's place in memory is a matter of chance, too. HEAD fails if it is slower by
more than the noise and by more than SMALLEST_LOSS.

Timing cannot show a loss of one percent: the noise is larger. So the instructions and the system's work of both
commits are counted as well, which vary little: instructions fail at two percent.
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
STARTS = 6  # how often the three processes are started; each start gets its share of the minutes
WORKLOADS = ("get", "get.hot", "get_many", "apply.1", "apply.100", "apply.hot", "flush", "snapshot", "open")
CHECKOUT = Path(__file__).resolve().parent.parent
COUNTING = 60  # seconds of the minutes that are set aside for counting
Slices = dict[str, list[tuple[float, float, float]]]  # by workload: seconds of BASE, of HEAD, and of BASE again


class Verdict(NamedTuple):
    workload: str
    ratio: float  # of HEAD to BASE, median
    low: float  # low and high: the 95 % confidence interval of the median
    high: float
    noise: float  # a ratio up to this may be chance, judging by BASE over BASE
    lost: bool


def build(commit: str, directory: Path) -> Path:
    """Make a worktree of the commit with a virtual environment in it; return the environment's Python."""
    git = ["git", "-C", str(CHECKOUT)]
    subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(directory), commit], check=True)
    environment = directory / ".venv-compare"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, cwd=directory.parent)
    python = environment / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(directory)], check=True, cwd=directory.parent)
    return python


class Runner:
    """A process that runs the suite, one slice of work per request."""

    def __init__(self, python: Path, directory: Path, name: str) -> None:
        self.scratch = directory / name
        self.scratch.mkdir()
        # It runs in the scratch directory, so that no checkout hides the installed package.
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
        """Run one slice; return its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(workload + "\n")
        self.process.stdin.flush()
        return float(self.answer())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        shutil.rmtree(self.scratch)


def take_turns(pythons: list[Path], directory: Path, seconds: float, turn: int) -> Slices:
    """Start the three processes once; run slices of every workload, in changing order, for a number of seconds.

    The order of the starts differs in each turn: the first process may get better places in memory and on the disk.
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
    """Return, by workload, the ratio of HEAD to BASE and whether it is a loss beyond the noise of BASE to BASE."""
    verdicts = []
    for workload in WORKLOADS:
        slices = [start[workload] for start in starts]
        heads = [ratio for start in slices for ratio in middles([head / base for base, head, _ in start])]
        bases = [ratio for start in slices for ratio in middles([twin / base for base, _, twin in start])]
        low, high = interval(heads)
        again = interval(bases)
        noise = max(again[1], 1 / again[0]) ** 1.5  # widened, so that none of nine workloads fails by chance
        verdicts.append(Verdict(
            workload, statistics.median(heads), low, high, noise, low > 1 and
            statistics.median(heads) > max(SMALLEST_LOSS, noise)))  # fmt: skip
    return verdicts


def middles(ratios: list[float]) -> list[float]:
    """Return the median of every six slices, one for each order; single slices mostly show the machine's other work."""
    groups = [ratios[i : i + 6] for i in range(0, max(len(ratios) - 5, 1), 6)]
    return [statistics.median(group) for group in groups]


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the median, by order statistics."""
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
    """Count both; return no counts without Linux's /proc, and none of a base whose functions had other names."""
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
        return "\nInstructions and system calls were not counted: this system or the base does not allow it.\n"
    lines = ["", "Counts per operation, before and after:", ""]
    lines += ["| | " + " | ".join(kinds) + " |", "| --- |" + " --- |" * len(kinds)]
    for name, numbers in after.items():
        old = before.get(name, {})
        cells = [f"{old[kind]:.2f}, {numbers[kind]:.2f}" if kind in old else f"{numbers[kind]:.2f}" for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"LOST: {loss}" for loss in losses)]) + "\n"


def compare(base: str, head: str, minutes: float, out: Path) -> int:
    """Build, measure and report; return 1 if HEAD is slower beyond the noise, otherwise 0."""
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
