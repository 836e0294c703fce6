"""The transfer of a snapshot to a follower, which succeeds whatever messages are lost. No processes, no real clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("pysyncobj")

from fastsm.integrations.pysyncobj import dumping
from support.simulated_cluster import ADDRESSES, Clock, SimulatedCluster


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedCluster]:
    """Provide a cluster with a leader and a follower that lacks more entries than the others' journals hold."""
    monkeypatch.setattr(dumping, "WINDOW", 4000)
    random.seed(1)  # PySyncObj's own random numbers
    cluster = SimulatedCluster(
        tmp_path, Clock(monkeypatch), random.Random(1), durable=False, watched=False, piece_bytes=1000)
    try:
        cluster.settle()
        follower = next(address for address in ADDRESSES if address != cluster.leader())
        cluster.disconnect(follower)
        wait(cluster, lambda: shortened(cluster, follower), write=True)
        cluster.connect(follower)
        yield cluster
    finally:
        cluster.end()


def wait(cluster: SimulatedCluster, condition: Callable[[], object], *, write: bool = False) -> None:
    for _ in range(4000):
        if condition():
            return
        cluster.step()
        if write:
            cluster.write()
    raise AssertionError("the condition never held")


def shortened(cluster: SimulatedCluster, follower: str) -> bool:
    """Return whether no other journal goes back to the follower's last entry."""
    after = cluster.nodes[follower].journal.last_index
    others = [node for address, node in cluster.nodes.items() if address != follower]
    return all(node.journal.first_index > after + 1 for node in others)


def sending(cluster: SimulatedCluster) -> tuple[str, str]:
    """Run until the first pieces are sent; return the leader that sends a snapshot and the follower that gets it."""
    found: list[tuple[str, str]] = []

    def begun() -> bool:
        found[:] = [
            (address, follower.id)
            for address, node in cluster.nodes.items()
            for follower, transfer in node._fastsm_transfers.items() if node._isLeader() and transfer.taken
        ]  # fmt: skip
        return bool(found)

    wait(cluster, begun)
    return found[0]


def arrives(cluster: SimulatedCluster, follower: str) -> None:
    """Check that the follower installs the snapshot, and that all nodes become equal."""
    cluster.settle()
    assert cluster.nodes[follower].installs


def test_nothing_is_lost(cluster: SimulatedCluster) -> None:
    """A snapshot in many pieces is installed."""
    arrives(cluster, sending(cluster)[1])


def test_the_follower_is_killed_between_two_pieces(cluster: SimulatedCluster) -> None:
    """The leader sends everything again, even if the new connection came before the end of the old one was noticed."""
    _, follower = sending(cluster)
    cluster.restart(follower)
    arrives(cluster, follower)


def test_the_follower_is_killed_after_the_last_piece(
    cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that arrived whole, but is not installed, is sent again."""
    _, follower = sending(cluster)
    # Otherwise it may be installed in the step in which its last piece arrives.
    monkeypatch.setattr(cluster.nodes[follower], "_fastsm_begin_install", lambda: None)
    wait(cluster, lambda: cluster.nodes[follower]._fastsm_complete)
    cluster.restart(follower)
    arrives(cluster, follower)


@pytest.mark.parametrize("to_follower", [True, False], ids=["pieces", "confirmations"])
def test_messages_are_lost(cluster: SimulatedCluster, to_follower: bool) -> None:
    """If pieces or confirmations are lost, they are sent again, and the snapshot is installed."""
    leader, follower = sending(cluster)
    link = (leader, follower) if to_follower else (follower, leader)
    for _ in range(50):
        cluster.network.links[link].clear()
        cluster.step()
    arrives(cluster, follower)


def test_the_leader_loses_its_term_and_wins_the_next(cluster: SimulatedCluster) -> None:
    """A leader that loses its term and wins a later one does not rely on pieces that it sent in the old term."""
    leader, follower = sending(cluster)
    third = next(address for address in ADDRESSES if address not in (leader, follower))
    cluster.silence(leader)
    wait(cluster, cluster.nodes[third]._isLeader)
    wait(cluster, lambda: cluster.nodes[third]._fastsm_transfers)
    cluster.hear(leader)
    cluster.silence(third)
    wait(cluster, lambda: cluster.nodes[leader]._isLeader() and cluster.nodes[leader].raftCurrentTerm > 2)
    cluster.hear(third)
    arrives(cluster, follower)


def test_the_leader_makes_newer_snapshots_meanwhile(cluster: SimulatedCluster) -> None:
    """A transfer continues to its end although the leader makes newer snapshots."""
    leader, follower = sending(cluster)
    dumps = cluster.nodes[leader].dumps
    transfer = next(iter(cluster.nodes[leader]._fastsm_transfers.values()))
    cluster.nodes[leader].forceLogCompaction()
    wait(cluster, lambda: cluster.nodes[leader].dumps > dumps, write=True)
    assert transfer in cluster.nodes[leader]._fastsm_transfers.values() or cluster.nodes[follower].installs
    arrives(cluster, follower)


def test_a_follower_that_takes_its_time_is_heard(cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader stays leader while its only follower is busy with a snapshot."""
    leader, follower = sending(cluster)
    node = cluster.nodes[leader]
    node.conf.leaderFallbackTimeout = 1.0
    with monkeypatch.context() as patch:
        patch.setattr(type(node), "_fastsm_begin_install", lambda self: None)
        third = next(address for address in ADDRESSES if address not in (leader, follower))
        cluster.disconnect(third)
        term, until = node.raftCurrentTerm, cluster.clock.now + 5
        wait(cluster, lambda: cluster.clock.now > until)
        assert (node._isLeader(), node.raftCurrentTerm) == (True, term)
    cluster.connect(third)
    arrives(cluster, follower)


@pytest.mark.parametrize("tail", [2, 5, 9])
def test_a_leader_that_was_cut_off_with_a_tail_of_its_own_catches_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: int
) -> None:
    """An old leader's unconfirmed entries are replaced by the next leader's, which come in several messages."""
    random.seed(2)
    cluster = SimulatedCluster(tmp_path, Clock(monkeypatch), random.Random(2), durable=False, watched=False)
    try:
        for node in cluster.nodes.values():
            node._fastsm_policy = dumping.DumpPolicy(journal_bytes=1 << 40)  # journals are not replaced by snapshots
        cluster.settle()
        old = cluster.leader()
        assert old is not None
        cluster.silence(old)
        for number in range(tail):
            cluster.nodes[old].put(b"lost-%d" % number, b"value")
        wait(cluster, lambda: any(a != old and node._isLeader() for a, node in cluster.nodes.items()))
        new = next(a for a, node in cluster.nodes.items() if a != old and node._isLeader())
        for number in range(100):
            cluster.nodes[new].put(b"kept-%d" % number, bytes(3000))
            cluster.step()
        wait(cluster, lambda: cluster.nodes[new].get(b"kept-99") is not None)
        cluster.hear(old)
        cluster.settle()
        assert cluster.nodes[old].get(b"kept-99") == bytes(3000)
        assert cluster.nodes[old].get(b"lost-0") is None
    finally:
        cluster.end()
