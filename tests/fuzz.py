"""Fuzzes every decoder for as long as you like: ``python -m tests.fuzz --minutes 60``, or ``--inputs 10000000``.

Each target runs in a process of its own, compared with the plain reader of docs/format.md if there is one. The first
finding stops the run with status 1 and instructions to reproduce it. Input n of a seed is the same everywhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.fuzz_worker import PROGRESS, TARGETS

TESTS = Path(__file__).resolve().parent
# Shares of inputs that take about equally long.
SHARES = {"commands": 62, "logs": 13, "snapshots": 13, "receivers": 8, "tables": 1, "journals": 3}
ROUND = 1000  # inputs of each share, for a process


class Process:
    """A process that runs some inputs of one target."""

    def __init__(self, target: str, seed: int, first: int, last: int, keep: str) -> None:
        self.target, self.seed, self.first = target, seed, first
        with tempfile.NamedTemporaryFile(delete=False) as file:
            file.write(bytes(PROGRESS.size))
        self.shared = Path(file.name)
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "support.fuzz_worker", target, *map(str, (seed, first, last)),
             file.name, keep],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TESTS)  # fmt: skip

    def end(self, totals: Totals) -> str | None:
        """Wait for the process; return its finding, or None."""
        out, problem = self.process.communicate()
        number, _ = PROGRESS.unpack(self.shared.read_bytes())
        self.shared.unlink()
        if self.process.returncode == 0:
            totals.add(self.target, json.loads(out))
            return None
        again = f"python -m tests.fuzz --targets {self.target} --seed {self.seed} --first {number} --inputs 1"
        return f"{self.target}: status {self.process.returncode} at input {number}; again: {again}\n{problem}"


class Totals:
    """The sums of all processes' results."""

    def __init__(self) -> None:
        self.inputs: Counter[str] = Counter()
        self.deep: Counter[str] = Counter()
        self.endings: dict[str, Counter[str]] = {name: Counter() for name in TARGETS}
        self.hit: set[tuple[str, int]] = set()
        self.lines: set[tuple[str, int]] = set()

    def add(self, target: str, seen: dict[str, Any]) -> None:
        self.inputs[target] += seen["inputs"]
        self.deep[target] += seen["deep"]
        self.endings[target].update(seen["endings"])
        self.hit |= {(file, line) for file, line in seen["hit"]}
        self.lines |= {(file, line) for file, line in seen["lines"]}

    def show(self, endings: bool = False) -> None:
        for name, count in self.inputs.items():
            share = f"{self.deep[name] / count:4.0%} past the header, {len(self.endings[name])} endings"
            print(f"{name:>10}  {count:>12,} inputs, {share}", flush=True)
            for ending, number in self.endings[name].most_common() if endings else ():
                print(f"{number:>25,}  {ending or 'accepted'}")
        for file in sorted({file for file, _ in self.lines}):
            lines = {line for name, line in self.lines if name == file}
            missed = sorted(lines - {line for name, line in self.hit if name == file})
            rest = f", but {', '.join(map(str, missed))}" if missed else ""
            print(f"{file:>18}  {1 - len(missed) / len(lines):.1%} of {len(lines)} lines{rest}", flush=True)


def run(options: argparse.Namespace) -> int:
    totals = Totals()
    first = dict.fromkeys(options.targets, options.first)
    started = told = time.monotonic()
    while True:
        processes = []
        for target in options.targets:
            last = first[target] + ROUND * SHARES[target]
            if options.inputs:
                last = min(last, options.first + options.inputs)
            if last > first[target]:
                processes.append(Process(target, options.seed, first[target], last, options.keep))
            if len(processes) >= options.jobs or target == options.targets[-1]:
                problems = [problem for process in processes if (problem := process.end(totals))]
                processes.clear()
                if problems:
                    totals.show()
                    print("FOUND " + "\nFOUND ".join(problems))
                    return 1
            first[target] = max(first[target], last)
        now = time.monotonic()
        done = options.inputs and all(number >= options.first + options.inputs for number in first.values())
        if done or (options.minutes and now - started > 60 * options.minutes):
            break
        if now - told > 10:
            told = now
            counts = ", ".join(f"{number:,} {name}" for name, number in totals.inputs.items())
            print(f"{now - started:7.0f} s  {counts}", flush=True)
    totals.show(options.endings)
    print(f"{time.monotonic() - started:.0f} s, {totals.inputs.total():,} inputs of seed {options.seed}, no finding")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="stop then")
    parser.add_argument("--inputs", type=int, help="stop after so many of each target")
    parser.add_argument("--seed", type=int, help="by default one that depends on the time")
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--keep", default="", help="a folder for the smallest input of each ending")
    parser.add_argument("--endings", action="store_true", help="show how the inputs ended")
    options = parser.parse_args()
    options.minutes = options.minutes or (None if options.inputs else 10)
    options.seed = int(time.time()) if options.seed is None else options.seed
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
