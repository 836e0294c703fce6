"""A cluster in real processes that is written to and killed for as long as you like.

    python -m tests.chaos --minutes 30

Each round writes through all nodes, then does one thing at random: kill -9 of one node, of two, of the leader or of
all; a crash in a window between two steps; a clean restart; the loss of a node's directory; paused nodes; a transfer of
leadership. With `--members` a living or dead node may also be removed and added again, with or without its directory.
With `--raising` functions of the user's raise all the time; with `--apart` the nodes' clocks run at different rates
from different times. Meanwhile clients make deposits in sessions (batches, transactions and procedures in turns), and
submit each again until they have its answer; keys are written and removed by their prefix, and others expire. After
each round all nodes must have equal contents and state checksums, and every acknowledged write exactly once; each
deposit counts once; removed keys stay removed; no node has stopped by itself. The last line sums up the run.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.cluster import Cluster, NodeError, remove_node, running
from support.depositors import Depositors

POLICY = {"journal_bytes": 2 << 20, "ratio": 0.0, "least_seconds": 0.5, "trailing_entries": 200}
WINDOWS = (
    "FastStateMachine.write_snapshot:after", "FastJournal.prepare:after", "FastJournal.rotate:before",
    "FastJournal.rotate:after", "FastJournal.truncate_before:after", "FastJournal.remove_retired:before",
    "FastJournal.remove_retired:after", "SnapshotReceiver.finish:before", "SnapshotReceiver.finish:after",
    "FastStateMachine.install_snapshot:before", "FastStateMachine.install_snapshot:after", "FastJournal.rebase:before",
    "FastJournal.rebase:after",
)  # fmt: skip


class Chaos:
    """One cluster, and counts of what was done to it."""

    def __init__(self, cluster: Cluster, dice: random.Random, listed: str | None, members: bool) -> None:
        self.cluster, self.dice, self.listed, self.members = cluster, dice, listed, members
        self.counts: Counter[str] = Counter()
        self.depositors = Depositors(cluster, dice, threads=1, clients=10)
        self.round = 0

    def play_round(self) -> None:
        self.round += 1
        cluster, dice = self.cluster, self.dice
        for number in cluster.processes:
            cluster.call(
                number, "load", prefix=f"{'list' if self.listed else 'load'}-{self.round}-{number}",
                window=dice.choice((1, 20, 200)), size=dice.choice((10, 200, 2000)), listed=bool(self.listed),
            )  # fmt: skip
        self.depositors.start()
        time.sleep(dice.random() * 1.5)
        what = dice.choice((
            self.kill_one, self.kill_leader, self.kill_two, self.kill_all, self.kill_all, self.crash_in_window,
            self.crash_in_window, self.stop_one, self.take_away, self.compact, self.pause, self.pause, self.transfer,
            *((self.remove_alive, self.remove_dead, self.remove_dead, self.replace, self.replace) * self.members),
        ))  # fmt: skip
        what()
        self.counts[what.__name__] += 1
        for number in cluster.processes:
            with contextlib.suppress(NodeError):
                cluster.call(number, "unload")
        missing = set(range(3)) - set(cluster.processes)
        if missing:
            cluster.start(*missing)
        self.depositors.stop()
        cluster.wait_ready()
        self.counts["acknowledged"] = cluster.check()
        self.depositors.check()
        self.counts |= self.depositors.counts

    def kill_one(self) -> None:
        self.cluster.kill(self.dice.randrange(3))
        time.sleep(self.dice.random() * 3)

    def kill_leader(self) -> None:
        self.cluster.kill(self.cluster.leader())
        time.sleep(self.dice.random() * 3)

    def kill_two(self) -> None:
        self.cluster.kill(*self.dice.sample(range(3), 2))
        time.sleep(self.dice.random())

    def kill_all(self) -> None:
        self.cluster.kill()

    def stop_one(self) -> None:
        self.cluster.stop(self.dice.randrange(3))
        time.sleep(self.dice.random())

    def pause(self) -> None:
        """Pause one or two nodes, mostly for longer than an election takes, so that their messages are outdated."""
        numbers = self.dice.sample(range(3), self.dice.choice((1, 1, 2)))
        if self.dice.random() < 0.5:
            numbers = [self.cluster.leader()]
        self.cluster.pause(*numbers)
        time.sleep(self.dice.random() * 6)
        self.cluster.resume(*numbers)

    def transfer(self) -> None:
        self.cluster.call(self.cluster.leader(), "transfer")
        time.sleep(self.dice.random())

    def a_follower(self) -> int:
        leader = self.cluster.leader()
        return self.dice.choice([number for number in range(3) if number != leader])

    def remove_alive(self) -> None:
        """Remove a running follower, kill it, and add it again with its files."""
        number = self.a_follower()
        self.cluster.change_members("remove", number)
        time.sleep(self.dice.random())
        self.cluster.kill(number)
        self.cluster.change_members("add", number)

    def remove_dead(self) -> None:
        number = self.a_follower()
        self.cluster.kill(number)
        self.cluster.change_members("remove", number)
        if self.dice.random() < 0.5:
            self.compact_living()
        time.sleep(self.dice.random())
        self.cluster.change_members("add", number)

    def replace(self) -> None:
        """Replace a follower by a new machine under the same address, without files."""
        number = self.a_follower()
        self.cluster.change_members("remove", number)
        self.cluster.kill(number)
        remove_node(self.cluster, number)
        self.compact_living()
        self.cluster.change_members("add", number)

    def compact_living(self) -> None:
        for number in self.cluster.processes:
            self.cluster.call(number, "compact")

    def compact(self) -> None:
        for number in self.cluster.processes:
            self.cluster.call(number, "compact")
        time.sleep(self.dice.random())
        self.cluster.kill(self.dice.randrange(3))

    def take_away(self) -> None:
        """Lose a node's disk, after the others have all entries."""
        for number in self.cluster.processes:
            self.cluster.call(number, "unload")
        self.cluster.wait_equal()
        number = self.dice.randrange(3)
        self.cluster.kill(number)
        remove_node(self.cluster, number)

    def crash_in_window(self) -> None:
        number, window = self.dice.randrange(3), self.dice.choice(WINDOWS)
        self.cluster.kill(number)
        time.sleep(self.dice.random())
        self.cluster.start(number, crash=window)
        stop = time.monotonic() + 4
        while self.cluster.processes[number].alive and time.monotonic() < stop:
            with contextlib.suppress(NodeError):
                self.cluster.call(number, "compact")
            time.sleep(0.2)
        if self.cluster.processes[number].alive:
            self.cluster.kill(number)
        else:
            self.cluster.processes.pop(number).end(kill=True)
            self.cluster.kills += 1
            self.counts["crashed in a window"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--durable", action="store_true")
    parser.add_argument("--listed", choices=("list", "queue"), help="a consumer: ReplList or FastQueue")
    parser.add_argument("--members", action="store_true", help="remove and add nodes, too")
    parser.add_argument("--raising", action="store_true", help="let functions of the user's raise")
    parser.add_argument("--apart", action="store_true", help="let the nodes' clocks differ")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**9) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    stop = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as root, running(
        Path(root), durable=arguments.durable, policy=POLICY, listed=arguments.listed, members=arguments.members,
        raising=arguments.raising, apart=arguments.apart,
    ) as cluster:
        chaos = Chaos(cluster, random.Random(seed), arguments.listed, arguments.members)
        while time.monotonic() < stop:
            chaos.play_round()
            print(f"round {chaos.round}: {dict(chaos.counts)}, {cluster.kills} kills", flush=True)
    acknowledged = chaos.counts["acknowledged"]
    print(f"{chaos.round} rounds, {cluster.kills} kills, {acknowledged} acknowledged writes, 0 lost, 0 doubled; "
          f"{chaos.counts['commands']} deposits, {chaos.counts['retries']} submitted again, 0 lost, 0 doubled")


if __name__ == "__main__":
    main()
