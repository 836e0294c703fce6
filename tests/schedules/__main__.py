"""Runs all schedules of two or three operations: `python -m tests.schedules --help`."""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from schedules.explorer import Deadlock
from schedules.operations import MAKE_DURABLE, OPERATIONS, Template, Violation, explore, explore_one_error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--triples", action="store_true", help="all triples at all pairs of seams (hours)")
    parser.add_argument("--seed", type=int, help="so many random triples with a compaction, see --count")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", choices=OPERATIONS, action="append", help="only pairs that begin with this one")
    parser.add_argument("--second", choices=OPERATIONS, action="append", help="only these at the seams")
    parser.add_argument("--errors", action="store_true", help="only the disk that tells of an error once")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    began = time.process_time()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        template = Template(Path(root))
        totals: Counter[str] = Counter()
        violations: Counter[str] = Counter()
        shown: Counter[str] = Counter()

        def note(label: str, function: object, *called: object) -> object:
            totals[label] += 1
            try:
                return function(*called)  # type: ignore[operator]
            except Violation as error:
                violations[label] += 1
                shown[label] += 1
                if arguments.verbose or shown[label] == 1:
                    print(str(error)[:600], flush=True)
                return error

        try:
            if not arguments.errors:
                run(arguments, template, note)
            for pair in itertools.product(MAKE_DURABLE if arguments.errors or not arguments.first else (), repeat=2):
                for seam in range(400):
                    schedule = note("one error, " + " / ".join(pair), explore_one_error, template, pair, seam)
                    if not isinstance(schedule, Violation) and not schedule.started[1]:  # type: ignore[attr-defined]
                        break
        except Deadlock as error:
            print("DEADLOCK", error)
            violations["deadlock"] += 1
        for label, count in violations.items():
            print(f"{label}: {count} of {totals[label]} schedules")
        print(f"{sum(violations.values())} violations in {sum(totals.values())} schedules, "
              f"{time.process_time() - began:.1f} s of CPU")  # fmt: skip
    return 1 if violations else 0


def run(arguments: argparse.Namespace, template: Template, note: object) -> None:
    if arguments.seed is not None or arguments.triples:
        dice = random.Random(arguments.seed)
        print("seed", arguments.seed)
        everything = itertools.product(OPERATIONS, OPERATIONS, OPERATIONS)
        for _ in range(0 if arguments.triples else arguments.count):
            names = [dice.choice(list(OPERATIONS)) for _ in range(3)]
            names[dice.randrange(3)] = "compact by itself"
            note(" / ".join(names), explore, template, names, (dice.randrange(80), dice.randrange(40)))  # type: ignore[operator]
        for names in everything if arguments.triples else ():
            for seams in itertools.product(range(400), repeat=2):
                schedule = note(" / ".join(names), explore, template, names, seams)  # type: ignore[operator]
                if not isinstance(schedule, Violation) and not all(schedule.started):
                    break
        return
    for pair in itertools.product(arguments.first or OPERATIONS, arguments.second or OPERATIONS):
        for seam in range(2000):
            schedule = note(" / ".join(pair), explore, template, pair, (seam,))  # type: ignore[operator]
            if not isinstance(schedule, Violation) and not schedule.started[1]:
                break


if __name__ == "__main__":
    sys.exit(main())
