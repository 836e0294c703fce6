"""Kills, cuts off and pauses nodes of a cluster of `examples/raft_from_nothing`, for as long as you like.

In every other trial its members change meanwhile.

    python -m tests.raft_from_nothing --minutes 30 [--seed N]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.linearizability import UNKNOWN, is_linearizable
from support.small_cluster import trial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the first trial")
    options = parser.parse_args()
    stop = time.monotonic() + 60 * options.minutes
    seed, befell, operations, unknown, counted = options.seed, Counter[str](), 0, 0, 0
    while time.monotonic() < stop:
        print("seed", seed, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            seconds = min(30, max(1, stop - time.monotonic()))
            found = asyncio.run(trial(Path(folder), seconds, seed, snapshot_every=50, changes=seed % 2 == 0))
        for key, seen in found["seen"].items():
            operations += len(seen)
            unknown += sum(one.returned == UNKNOWN for one in seen)
            if not is_linearizable(seen):
                print(f"seed {seed}: what was seen of {key!r} is not linearizable")
                return 1
        if found["count"] != found["counted"] or len(set(found["states"])) != 1:
            print(f"seed {seed}: {found['counted']} additions came to {found['count']}; states {found['states']}")
            return 1
        befell += found["befell"]
        counted += found["counted"]
        seed += 1
    print(f"{operations:,} operations, {unknown} without an answer: linearizable. {counted:,} additions: once each.")
    print("it went through", ", ".join(f"{count} × {name}" for name, count in sorted(befell.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
