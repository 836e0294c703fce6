"""A PySyncObj cluster on fastsm, in real processes with real faults: nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import pytest

pytest.importorskip("pysyncobj")

from exactly_once import kill_leaders, report

from fastsm import Change
from support.cluster import Cluster, NodeError, remove_node, running, wait_for
from support.depositors import Depositors
from support.lock_clients import DATA, KEY, ClusterWithClocksApart, Judge, LockService
from support.lock_clients import report as lock_report

SMALL = {"journal_bytes": 1 << 20, "ratio": 0.0, "least_seconds": 0.5, "trailing_entries": 50}


def shorter_than(cluster: Cluster, number: int, first: int) -> None:
    """Wait until a node's journal begins after an entry."""
    wait_for(lambda: cluster.call(number, "status")["first_index"] > first or None, "a shorter journal")


def test_every_node_writes_reads_and_swaps(tmp_path: Path) -> None:
    """A write through one node is read through any other; a compare-and-swap has one outcome."""
    with running(tmp_path) as cluster:
        for number in range(3):
            key = f"key-{number}"
            assert cluster.call(number, "put", key=key, value="one") is True
            assert cluster.call((number + 1) % 3, "read", key=key) == "one"
            assert cluster.call((number + 2) % 3, "swap", key=key, expected="one", value="two") is True
            assert cluster.call(number, "swap", key=key, expected="one", value="three") is False
            assert cluster.call(number, "read", key=key) == "two"
        assert cluster.call(0, "large", key="large", size=5 << 20) is True
        cluster.call(1, "fill", prefix="many", count=2000, size=100)
        cluster.check()


def test_a_follower_comes_back_by_a_snapshot(tmp_path: Path) -> None:
    """A follower that was away for longer than the journal goes back catches up by a snapshot, then follows."""
    with running(tmp_path, policy=SMALL) as cluster:
        leader = cluster.leader()
        follower = (leader + 1) % 3
        cluster.call(leader, "fill", prefix="before", count=1000, size=100)
        cluster.kill(follower)
        cluster.call(leader, "fill", prefix="while", count=30_000, size=100, batch=100)
        for number in cluster.processes:
            cluster.call(number, "compact")
            shorter_than(cluster, number, 100)
        cluster.start(follower)
        cluster.wait_equal()
        assert cluster.call(follower, "status")["installs"] == 1
        cluster.call(follower, "fill", prefix="after", count=1000, size=100)
        cluster.check()
        cluster.kill(follower)
        cluster.start(follower)
        cluster.wait_ready()
        assert cluster.call(follower, "status")["installs"] == 0
        cluster.check()


def test_a_leader_is_killed_under_load(tmp_path: Path) -> None:
    """If the leader is killed under load, the others continue, and it catches up when it is back."""
    with running(tmp_path) as cluster:
        for attempt in range(3):
            leader = cluster.leader()
            for number in cluster.processes:
                cluster.call(number, "load", prefix=f"load-{attempt}-{number}")
            time.sleep(0.7)
            cluster.kill(leader)
            cluster.leader()
            time.sleep(0.5)
            for number in cluster.processes:
                cluster.call(number, "unload")
            cluster.start(leader)
            cluster.wait_ready()
        assert cluster.check() > 300


@pytest.mark.parametrize("durable", [False, True])
def test_all_are_killed_at_once(tmp_path: Path, durable: bool) -> None:
    """After repeated kills of all nodes at the same time, under load, every acknowledged write is there."""
    dice = random.Random(11)
    with running(tmp_path, durable=durable, policy=SMALL) as cluster:
        for attempt in range(4):
            for number in cluster.processes:
                cluster.call(number, "load", prefix=f"load-{attempt}-{number}", size=500)
            time.sleep(0.5 + dice.random())
            cluster.kill()
            cluster.start()
            cluster.wait_ready()
            acknowledged = cluster.check()
        assert acknowledged > 200


# Places where a process may end between two steps that belong together.
FOLLOWER_WINDOWS = [
    "SnapshotReceiver.finish:before", "SnapshotReceiver.finish:after", "FastStateMachine.install_snapshot:before",
    "FastStateMachine.install_snapshot:after", "FastJournal.rebase:before", "FastJournal.rebase:after",
    "Node._fastsm_restore:before",
]  # fmt: skip
DUMP_WINDOWS = [
    "FastStateMachine.write_snapshot:after", "FastJournal.prepare:after", "Places.remove_incoming:after",
    "FastJournal.rotate:before", "FastJournal.rotate:after", "FastJournal.truncate_before:after",
    "FastJournal.remove_retired:before", "FastJournal.remove_retired:after",
]  # fmt: skip


def test_a_crash_in_each_window_of_a_dump(tmp_path: Path) -> None:
    """A node that is killed at any step between a dump and the shortened journal restarts with everything."""
    with running(tmp_path, policy=SMALL) as cluster:
        cluster.call(0, "fill", prefix="base", count=10_000, size=200, batch=50)
        for round_number, window in enumerate(DUMP_WINDOWS):
            number = round_number % 3
            cluster.stop(number)
            cluster.start(number, crash=window)
            cluster.leader()
            cluster.call((number + 1) % 3, "fill", prefix=f"round-{round_number}", count=6000, size=200, batch=50)
            if cluster.processes[number].alive:
                with contextlib.suppress(NodeError):
                    cluster.call(number, "compact")
            assert cluster.processes.pop(number).wait() == -9, window
            cluster.start(number)
            cluster.wait_ready()
        cluster.check()
        cluster.kill()
        cluster.start()
        cluster.wait_ready()
        cluster.check()


def test_a_crash_in_each_window_of_an_install(tmp_path: Path) -> None:
    """A follower killed at any step between a snapshot's arrival and the new journal restarts with everything."""
    with running(tmp_path, policy=SMALL) as cluster:
        follower = (cluster.leader() + 1) % 3
        for round_number, window in enumerate(FOLLOWER_WINDOWS):
            cluster.kill(follower)
            others = list(cluster.processes)
            cluster.call(others[0], "fill", prefix=f"round-{round_number}", count=1500, size=200, batch=10)
            last = cluster.wait_equal()
            for number in others:
                cluster.call(number, "compact")
                shorter_than(cluster, number, last - 100)
            cluster.start(follower, crash=window)
            assert cluster.processes.pop(follower).wait() == -9, window
            cluster.start(follower)
            cluster.wait_ready()
        cluster.check()


def test_a_slow_follower_catches_up_under_load(tmp_path: Path) -> None:
    """A follower that was away catches up by a snapshot while writes and dumps continue."""
    with running(tmp_path, policy=SMALL) as cluster:
        leader = cluster.leader()
        follower = (leader + 1) % 3
        cluster.call(leader, "fill", prefix="base", count=20_000, size=200)
        cluster.kill(follower)
        cluster.call(leader, "fill", prefix="gone", count=10_000, size=200, batch=20)
        for number in cluster.processes:
            cluster.call(number, "compact")
        cluster.call(leader, "load", prefix="load", window=300, size=500)
        time.sleep(1)
        cluster.start(follower, slow=0.005)

        def caught_up() -> bool | None:
            here = cluster.call(follower, "status")["applied"][0]
            there = cluster.call(leader, "status")["applied"][0]
            return here > there - 2000 or None

        wait_for(caught_up, "a follower that catches up")
        cluster.call(leader, "unload")
        cluster.check()


@pytest.mark.parametrize("kind", ["list", "queue"])
def test_with_consumers(tmp_path: Path, kind: str) -> None:
    """A ReplList and a FastQueue have each acknowledged entry once, through dumps, kills and installs."""
    with running(tmp_path, policy=SMALL, listed=kind) as cluster:
        leader = cluster.leader()
        follower = (leader + 1) % 3
        for number in cluster.processes:
            cluster.call(number, "load", prefix=f"list-{number}", window=20, listed=True)
        time.sleep(1)
        cluster.call(leader, "compact")
        time.sleep(0.5)
        cluster.kill(follower)
        time.sleep(1)
        for number in cluster.processes:
            cluster.call(number, "unload")
        cluster.call(leader, "fill", prefix="more", count=20_000, size=100, batch=50)
        for number in cluster.processes:
            cluster.call(number, "compact")
            shorter_than(cluster, number, 400)
        cluster.start(follower)
        cluster.wait_ready()
        assert cluster.check() > 50
        cluster.kill()
        cluster.start()
        cluster.wait_ready()
        cluster.check()


@pytest.mark.parametrize("durable", [False, True])
def test_retried_commands_are_applied_once(tmp_path: Path, durable: bool) -> None:
    """Clients that resubmit commands in sessions while leaders are killed have each command applied once."""
    with running(tmp_path, durable=durable, policy=SMALL) as cluster:
        depositors = Depositors(cluster, random.Random(7))
        kill_leaders(cluster, random.Random(8), depositors, kills=5)
        assert depositors.counts["commands"] > 50
        assert depositors.counts["retries"] > 0
        cluster.check()
        print(report(cluster, depositors))


def test_a_damaged_snapshot_is_loud(tmp_path: Path) -> None:
    """A node with a damaged snapshot does not start; without its directory it catches up by its leader's snapshot."""
    with running(tmp_path, policy=SMALL) as cluster:
        cluster.call(0, "fill", prefix="base", count=5000, size=200, batch=20)
        for number in cluster.processes:
            cluster.call(number, "compact")
            wait_for(lambda number=number: cluster.call(number, "status")["dumps"] or None, "a dump")
        victim = (cluster.leader() + 1) % 3
        cluster.stop(victim)
        path = cluster.directory(victim) / "snapshot" / "snapshot.fsm"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        cluster.start(victim)
        assert cluster.processes.pop(victim).wait() == 1
        assert "ChecksumMismatchError" in (tmp_path / f"node-{victim}.log").read_text()
        assert cluster.call(cluster.leader(), "put", key="meanwhile", value="x") is True
        remove_node(cluster, victim)
        cluster.start(victim)
        cluster.wait_ready()
        cluster.check()


@pytest.mark.parametrize(
    "failing", ["journal.allocate:ENOSPC", "state.allocate:ENOSPC", "journal.sync:EIO"], ids=str
)
def test_a_disk_that_fails_stops_one_node(tmp_path: Path, failing: str) -> None:
    """A node whose disk is full or broken stops with a failure, the others continue, and a restart recovers it."""
    durable = "sync" in failing
    with running(tmp_path, durable=durable) as cluster:
        leader = cluster.leader()
        for victim in (leader, (leader + 1) % 3):
            cluster.stop(victim)
            cluster.start(victim, failing=failing)
            cluster.wait_ready()
            other = (victim + 1) % 3
            cluster.call(other, "load", prefix=f"load-{victim}", size=5000, window=20)
            cluster.call(victim, "fail")
            wait_for(lambda victim=victim: cluster.call(victim, "status")["failure"], "a node that stops")
            with pytest.raises(NodeError, match="NotRunningError"):
                cluster.call(victim, "put", key="a", value="b")
            time.sleep(0.7)  # the others continue
            cluster.call(other, "unload")
            cluster.kill(victim)
            cluster.start(victim)
            cluster.wait_ready()
        assert cluster.check() > 10


def test_malformed_and_unknown_commands(tmp_path: Path) -> None:
    """A malformed command has the result False on all nodes; one of an unknown version stops nodes that apply it."""
    with running(tmp_path) as cluster:
        assert cluster.call(1, "submit_raw", command="0001ffff") == [False, 0]
        assert cluster.call(2, "put", key="after", value="x") is True
        cluster.check()
        cluster.call(0, "submit_raw", command="07010000" + "00" * 4)

        def stopped() -> list[str] | None:
            failures = [cluster.call(number, "status")["failure"] for number in cluster.processes]
            return [failure for failure in failures if failure] if sum(map(bool, failures)) >= 2 else None

        # The third node may never learn that the entry is committed.
        assert all("UnknownCommandError" in failure for failure in wait_for(stopped, "nodes that stop"))


def test_a_stock_node_is_refused(tmp_path: Path) -> None:
    """A node without fastsm is refused before its first command; the others continue, and one with fastsm joins."""
    from pysyncobj import SyncObj, SyncObjConf  # noqa: PLC0415

    with Cluster(tmp_path) as cluster:
        cluster.start(0, 1)
        cluster.leader()
        conf = SyncObjConf(bindAddress=cluster.addresses[2], connectionRetryTime=0.2)
        stock = SyncObj(cluster.addresses[2], cluster.addresses[:2], conf)
        try:
            wait_for(lambda: cluster.call(0, "status")["refused"].get(cluster.addresses[2]), "a node that is refused")
            assert cluster.call(1, "put", key="a", value="b") is True
            assert stock.raftCommitIndex <= 1
        finally:
            stock.destroy_synchronous()
        cluster.start(2)
        cluster.wait_ready()
        assert cluster.call(0, "status")["refused"] == {}
        cluster.check()


def test_never_two_holders_on_real_nodes(tmp_path: Path) -> None:
    """By the order of the log the lock is only granted when it is free, tokens rise, and only its holder writes."""
    with running(tmp_path, of=ClusterWithClocksApart) as cluster:
        service = LockService(cluster, random.Random(17))
        service.start()
        for _ in range(2):
            service.kill_leader(1.5)
        wait_for(service.has_seen_all, "grants, writes and ends")
        happened = service.stop()
        print(lock_report(cluster, service.judge, happened), dict(happened))
        assert cluster.kills == 2


@pytest.mark.parametrize(
    ("changes", "found"),
    [([Change(1, 1, KEY, b"a"), Change(2, 1, KEY, b"b")], "took the lock"),
     ([Change(1, 1, DATA, b"1")], "without a holder"),
     ([Change(1, 1, KEY, b"a"), Change(2, 1, KEY, None), Change(3, 1, KEY, b"b"), Change(4, 1, DATA, b"1")],
      "who lost the lock")])
def test_the_judge_finds_what_is_wrong(changes: list[Change], found: str) -> None:
    """The judge finds two holders, and writes of a client that lost the lock or never had it."""
    with pytest.raises(AssertionError, match=found):
        Judge().take(changes, 9)
