"""The power-loss simulator and kill -9 for as long as one likes: ``python tests/soak.py --minutes 60``.

Each round is one story of the simulator with a seed of its own; every few rounds a real process is killed. Stops
with status 1 at the first round in which something was violated, and says how to get it again.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import test_kill

from fastsm import FastsmError
from support.faulty import memory_directory
from support.simulation import Simulation

KILL_EVERY = 4  # stories
LIVES = 5  # of a directory, each ended by a kill
MAJOR = ("states", "with holes", "torn within a page", "names lost", "lives", "failed syncs", "processes killed")


def kill_processes(seed: int, root: Path, counts: Counter[str]) -> list[str]:
    """A few lives of one directory, each ended by kill -9, each checked."""
    dice = random.Random(f"soak {seed}")
    name = dice.choice(sorted(test_kill.SETTINGS))
    setting = test_kill.SETTINGS[name]
    last = None
    for life in range(LIVES):
        killed = test_kill.run_and_kill(root / "killed", seed, setting, dice)
        counts["processes killed"] += 1
        counts[f"killed while {killed.phase}"] += 1
        if last and not killed.opened:  # it changed nothing: what is known is what was known before
            killed = last._replace(phase=killed.phase)
        last = killed
        try:
            test_kill.assert_right(root / "killed", seed, setting, killed)
        except (AssertionError, FastsmError) as error:
            return [f"kill -9, seed {seed}, {name}, life {life}, {killed}: {error!r}"]
    return []


def run_round(seed: int, counts: Counter[str], *, kills: bool) -> list[str]:
    """One story, and perhaps some kills; the directories are gone afterwards. Returns violations."""
    with memory_directory() as root:
        simulation = Simulation(seed, root).run()
        counts += simulation.counts
        return simulation.violations + (kill_processes(seed, root, counts) if kills else [])


def show(counts: Counter[str]) -> None:
    for name, count in sorted(counts.items(), key=lambda item: (item[0] not in MAJOR, item[0])):
        print(f"{count:>12,}  {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--states", type=int, help="stop behind so many crash states, if that is earlier")
    parser.add_argument("--seed", type=int, help="the first story; by default one that depends on the time")
    parser.add_argument("--stories", type=int, help="stop behind so many stories, if that is earlier")
    options = parser.parse_args()
    logging.getLogger("fastsm").setLevel(logging.CRITICAL + 1)
    first = int(time.time()) if options.seed is None else options.seed
    started = told = time.monotonic()
    counts: Counter[str] = Counter()
    status = 0
    seed = first
    print(f"fastsm soak: {options.minutes} minutes, stories from seed {first}, process {os.getpid()}", flush=True)
    try:
        while True:
            violations = run_round(seed, counts, kills=(seed - first) % KILL_EVERY == 0)
            if violations:
                print(f"VIOLATED in the story of seed {seed} (again: --seed {seed} --stories 1):")
                print("\n".join(violations))
                status = 1
                break
            seed += 1
            now = time.monotonic()
            if now - told > 10:
                told = now
                major = ", ".join(f"{counts[name]:,} {name}" for name in MAJOR)
                print(f"{now - started:7.0f} s  seed {seed - 1}: {major}", flush=True)
            if now - started > 60 * options.minutes or seed - first == options.stories:
                break
            if options.states is not None and counts["states"] >= options.states:
                break
    except KeyboardInterrupt:
        print("interrupted")
        status = 130
    show(counts)
    print(f"{time.monotonic() - started:.0f} s, {seed - first} stories without a violation")
    return status


if __name__ == "__main__":
    sys.exit(main())
