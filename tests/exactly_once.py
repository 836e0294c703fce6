"""Clients that retry while leaders are killed: every command counts once, and the sums are exact.

    python -m tests.exactly_once --minutes 10

Each client deposits through any node, in a session of its own, and submits a deposit again until it has an answer.
Meanwhile leaders are killed, and now and then all nodes. The last line reports kills, commands, and how many were
submitted again; a deposit that counted twice or was lost is an error.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.cluster import Cluster, running
from support.depositors import Depositors

POLICY = {"journal_bytes": 1 << 20, "ratio": 0.0, "least_seconds": 0.5, "trailing_entries": 200}


def kill_leaders(cluster: Cluster, dice: random.Random, depositors: Depositors, kills: int) -> None:
    """Kill the leader under load, `kills` times, every fifth time all nodes; then check the sums."""
    depositors.start()
    try:
        for number in range(kills):
            time.sleep(0.2 + 0.5 * dice.random())
            killed = list(cluster.processes) if number % 5 == 4 else [cluster.leader()]
            cluster.kill(*killed)
            time.sleep(0.5 * dice.random())
            cluster.start(*killed)
            cluster.leader()
    finally:
        depositors.stop()
    cluster.wait_ready()
    depositors.check()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--durable", action="store_true")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**9) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    stop = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as root, running(
        Path(root), durable=arguments.durable, policy=POLICY
    ) as cluster:
        dice = random.Random(seed)
        depositors = Depositors(cluster, dice)
        while time.monotonic() < stop:
            kill_leaders(cluster, dice, depositors, kills=10)
            print(report(cluster, depositors), flush=True)


def report(cluster: Cluster, depositors: Depositors) -> str:
    """Return the counts in one line; the sums have been checked."""
    counts = depositors.counts
    return (
        f"{cluster.kills} kills, {counts['commands']} commands, {counts['retries']} submitted again, "
        "0 applied twice, 0 lost"
    )


if __name__ == "__main__":
    main()
