"""The lock recipe on a PySyncObj cluster whose leaders are killed and whose clocks are minutes apart.

    python -m tests.lock_service --minutes 10

Clients, whose clocks are wrong as well, acquire one lock, write under it, extend it, pause and release it, through any
node. The last line reports kills, grants and writes. It is an error if, by the order of the log, the lock was granted
while another client held it, or a client wrote that had lost it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.cluster import running
from support.lock_clients import ClusterWithClocksApart, LockService, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**9) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    stop = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as root, running(Path(root), of=ClusterWithClocksApart) as cluster:
        service = LockService(cluster, random.Random(seed))
        service.start()
        while time.monotonic() < stop:
            for _ in range(3):
                service.kill_leader(4)
            service.look()
            print(report(cluster, service.judge, sum((each.counts for each in service.clients), Counter())), flush=True)
        happened = service.stop()
        print(report(cluster, service.judge, happened), dict(happened))


if __name__ == "__main__":
    main()
