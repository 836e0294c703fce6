"""A PySyncObj cluster on fastsm compared with stock PySyncObj: three processes on one machine, in turns.

    python bench/bench_pysyncobj.py --keys 200000 --rounds 3     # dumps, restarts, memory
    python bench/bench_pysyncobj.py --speed                      # 1 to 10,000 commands in flight, leader and follower

The variants:

- `stock`: a `ReplDict` with PySyncObj's own dumps (fork, gzip) and journal;
- `pickle5`: the same, but a serializer of a few lines pickles with protocol 5 and syncs, in the tick thread, and
  commands are pickled with protocol 4;
- `fastsm`; and `durable`, which is fastsm with `durable=True`;
- `fastdict`: a `FastDict` in place of the `ReplDict`; part of the default only with `--speed`.

Keys have 16 bytes, values 100, and a command writes 100 keys. `--speed` compares stock, fastsm, durable and fastdict
unless `--variants` says otherwise: single commands, and batches of 100 keys.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from pysyncobj_nodes import Cluster
from pysyncobj_speed import measure_speed, table_of_speed

VARIANTS = "stock,pickle5,fastsm,durable"
SPEED_VARIANTS = "stock,fastsm,durable,fastdict"
QUIET = 3.0  # seconds without a dump, as the baseline for ticks


def measure(variant: str, keys: int, root: Path, patience: float) -> dict[str, float]:
    """Measure one round of one variant."""
    cluster = Cluster(variant, root)
    found: dict[str, float] = {}
    try:
        leader = cluster.leader()
        empty = cluster.call(leader, "status")["memory"]
        # The rate is measured on a fifth of the keys, with the variant's own settings; the rest is filled quickly.
        part = keys // 5
        found["batched writes, keys/s"] = part / cluster.call(leader, "fill", first=0, count=part)
        cluster.all("protocol", version=4)
        cluster.call(cluster.leader(), "fill", first=part, count=keys - part)
        cluster.all("protocol", version=4 if variant == "pickle5" else 2)
        cluster.settle()
        full = cluster.call(leader, "status")["memory"]
        found["memory, anonymous bytes/key"] = (full["Anonymous"] - empty["Anonymous"]) / keys
        found["memory, resident bytes/key"] = (full["Rss"] - empty["Rss"]) / keys
        found |= measure_dump(cluster, keys)
        found |= measure_restart(cluster, keys, patience)
    finally:
        cluster.close()
    return found


def measure_dump(cluster: Cluster, keys: int) -> dict[str, float]:
    leader = cluster.leader()
    cluster.all("take_gaps")
    time.sleep(QUIET)
    found = longest("of an idle node", cluster)
    cluster.call(leader, "begin_writes", first=0, count=keys, rate=1000)
    time.sleep(1)
    cluster.all("take_gaps")
    time.sleep(QUIET)
    found |= longest("under writes", cluster)
    changes = sum(status["changes"] for status in cluster.all("status"))
    seconds = []
    for number in cluster.children:
        seconds.append(cluster.call(number, "dump"))
        time.sleep(0.3)
    found |= longest("in a dump of one node", cluster)
    at_once = cluster.all("dump")
    time.sleep(0.3)
    found |= longest("in a dump of all three at once", cluster)
    cluster.all("compact")
    time.sleep(0.3)
    found |= longest("in a compaction of all three at once", cluster)
    time.sleep(1.5)
    changed = sum(status["changes"] for status in cluster.all("status")) - changes
    cluster.call(leader, "end_writes")
    return {
        **found, "leadership changes": changed,
        "dump, s": statistics.median(seconds), "dump of all three at once, s": max(at_once),
        "child's own memory, MB": max(cluster.all("child_memory")) / 1e6,
    }  # fmt: skip


def longest(when: str, cluster: Cluster) -> dict[str, float]:
    """Return the longest tick of any node since the last call."""
    whole, own = (max(gaps) for gaps in zip(*cluster.all("take_gaps"), strict=True))
    return {f"longest tick {when}, ms": 1000 * whole, "… without waiting for a core, ms, " + when: 1000 * own}


def measure_restart(cluster: Cluster, keys: int, patience: float) -> dict[str, float]:
    leader = cluster.leader()
    cluster.call(leader, "dump") if cluster.call(leader, "status") else None
    follower = next(number for number in cluster.children if number != leader)
    found = {}
    cluster.settle()
    cluster.kill(follower)
    cluster.start(follower)
    found["restart, s"] = cluster.call(follower, "wait_keys", count=keys, patience=patience)
    time.sleep(1)
    cluster.kill(follower)
    shutil.rmtree(cluster.root / str(follower))
    cluster.start(follower)
    found["empty follower's catch-up, s"] = cluster.call(follower, "wait_keys", count=keys, patience=patience)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", help=f"{VARIANTS} unless given; with --speed {SPEED_VARIANTS}")
    parser.add_argument("--speed", action="store_true", help="measure throughput and latency")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement of --speed")
    parser.add_argument("--directory", default=None, help="where the nodes' files go; a temporary one by default")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds after which a node counts as hung")
    arguments = parser.parse_args()
    variants = (arguments.variants or (SPEED_VARIANTS if arguments.speed else VARIANTS)).split(",")
    rounds: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for number in range(arguments.rounds):
        for variant in variants:
            with tempfile.TemporaryDirectory(dir=arguments.directory) as root:
                rounds[variant].append(
                    measure_speed(variant, Path(root), arguments.seconds) if arguments.speed
                    else measure(variant, arguments.keys, Path(root), arguments.patience))
            print(f"round {number + 1}, {variant}: {json.dumps(rounds[variant][-1])}", file=sys.stderr, flush=True)
    if arguments.speed:
        print(table_of_speed(rounds))
        return
    print(f"{arguments.keys} keys, {arguments.rounds} rounds: median (least to greatest)\n")
    print("| |", " | ".join(variants), "|")
    print("| --- |", " | ".join("---" for _ in variants), "|")
    for name in rounds[variants[0]][0]:
        cells = []
        for variant in variants:
            values = [each[name] for each in rounds[variant]]
            cells.append(f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
