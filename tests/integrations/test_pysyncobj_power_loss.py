"""Power loss of two or all nodes of a durable cluster at the same time: no promise or acknowledged write is lost."""

from __future__ import annotations

import logging
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pysyncobj")

from fastsm import FastsmError, FastStateMachine, LogId, SnapshotReceiver, put
from fastsm.integrations.pysyncobj import ReplicatedStateMachine
from fastsm.integrations.pysyncobj.places import Places, Restart, restart
from support.faulty import memory_directory
from support.power import Platter, Point, QuietDirectory
from support.simulated_cluster import ADDRESSES, Clock, Moment, SimulatedCluster, state_checksum

OPTIONS = {"verify_on_open": "off", "auto_compact": False}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    levels = [(logger := logging.getLogger(name), logger.level) for name in ("fastsm", "pysyncobj.syncobj")]
    for logger, _ in levels:
        logger.setLevel(logging.CRITICAL + 1)
    yield
    for logger, level in levels:
        logger.setLevel(level)


def live(
    root: Path, clock: Clock, seed: int, node: type[ReplicatedStateMachine] = ReplicatedStateMachine, steps: int = 700
) -> SimulatedCluster:
    """Run a cluster that writes, dumps, loses contact with a follower, and changes its leader."""
    rng = random.Random(seed)
    random.seed(seed)  # PySyncObj's own random numbers
    cluster = SimulatedCluster(root, clock, rng, node=node)
    cluster.settle()
    away, until = None, 0
    for step in range(steps):
        cluster.step()
        if rng.random() < 0.5:
            cluster.write()
        if away is None and rng.random() < 0.004:
            away, until = rng.choice(ADDRESSES), step + rng.choice((20, 150))
            cluster.silence(away)
        elif away is not None and step > until:
            cluster.hear(away)
            away = None
    if away is not None:
        cluster.hear(away)
    cluster.end()
    return cluster


def holds(found: Restart, index: int, term: int) -> bool:
    """Return whether an entry is in the journal or in the state."""
    there = found.journal.term_at(index)
    return there == term if there is not None else found.machine.entry_term(index) == term


def judge(moment: Moment, root: Path, counts: Counter[str]) -> None:
    """Check that every node keeps its promises, and that each that may be elected has every acknowledged write."""
    found = {}
    try:
        for number, address in enumerate(ADDRESSES):
            places = Places(root / f"node-{number}", lambda part: QuietDirectory)
            found[address] = restart(places, durable=True, has_others=False, options=dict(OPTIONS))
        for address, state in found.items():
            promises = moment.promises[address]
            assert state.journal.term >= promises.term, f"{address}: a term is lost"
            if promises.vote and promises.vote[0] == state.journal.term:
                assert state.journal.vote == promises.vote[1], f"{address}: a vote is lost"
            for index, term in promises.entries.items():
                if not holds(state, index, term):
                    # Another leader may have replaced the entry, but never an acknowledged one.
                    counts["replaced"] += 1
        logs = {address: (state.journal[-1][2], state.journal.last_index) for address, state in found.items()}
        for address, state in found.items():
            voters = sum(logs[address] >= log for log in logs.values())
            if voters < 2:
                continue
            counts["electable"] += 1
            for key, (_, entry) in moment.acknowledged.items():
                assert holds(state, *entry), f"{address} may lead without {key!r}, {entry}"
    finally:
        for state in found.values():
            end(state)


def end(state: Restart) -> None:
    """End a restarted node as a kill would."""
    state.journal.abandon()
    state.machine._worker.abandon()
    state.machine._release()


def run_again(moment: Moment, root: Path, clock: Clock, rng: random.Random) -> None:
    """Start the cluster from a moment; check that it agrees, and that every acknowledged write is there."""
    cluster = SimulatedCluster(root, clock, rng, watched=False)
    try:
        cluster.settle()
        sums = set()
        for number, node in enumerate(cluster.nodes.values()):
            for key, (value, _) in moment.acknowledged.items():
                assert node.get(key) == value, f"{key!r} is lost"
            sums.add(state_checksum(node.state_machine, root / f"sum-{number}"))
        assert len(sums) == 1
    finally:
        cluster.end()


def violations(
    clock: Clock, seeds: range, counts: Counter[str], node: type[ReplicatedStateMachine] = ReplicatedStateMachine,
    *, moments: int = 60, draws: int = 4, again: float = 0.05,
) -> list[str]:  # fmt: skip
    wrong = []
    with memory_directory() as top:
        for seed in seeds:
            cluster = live(top / f"life-{seed}", clock, seed, node)
            counts.update(acknowledged=len(cluster.acknowledged), moments=len(cluster.moments))
            rng = random.Random(seed)
            for moment in rng.sample(cluster.moments, min(moments, len(cluster.moments))):
                for draw in range(draws):
                    lost = ADDRESSES if draw else tuple(rng.sample(ADDRESSES, 2))
                    root = top / "drawn"
                    shutil.rmtree(root, ignore_errors=True)
                    moment.build(root, rng, lost)
                    counts["states"] += 1
                    try:
                        judge(moment, root, counts)
                        if rng.random() < again:
                            counts["run again"] += 1
                            run_again(moment, root, clock, rng)
                    except (AssertionError, FastsmError) as error:
                        wrong.append(f"seed {seed}, {moment.where}: {error!r}"[:500])
                        if len(wrong) > 5:
                            return wrong
    return wrong


def test_nothing_acknowledged_is_lost(clock: Clock) -> None:
    """After power losses of two or all nodes, terms, votes and acknowledged writes are there."""
    counts: Counter[str] = Counter()
    wrong = violations(clock, range(5), counts)
    print(dict(counts))
    assert not wrong, "\n".join(wrong)
    assert counts["states"] >= 1000
    assert counts["acknowledged"] >= 500
    assert counts["run again"] >= 20


class RepliesNotHeld(ReplicatedStateMachine):
    """A follower that replies before it syncs its new entries."""

    def _fastsm_begin(self) -> None:
        super()._fastsm_begin()
        self._fastsm_transport.holding = False


class NothingSynced(ReplicatedStateMachine):
    """A node that delays its replies, but sends them without a sync."""

    def _fastsm_make_durable(self) -> None:
        self._fastsm_transport.release()


class LeaderCountsItself(ReplicatedStateMachine):
    """A leader that counts its own entries before they are synced."""

    def _fastsm_make_durable(self) -> None:
        if not self._isLeader():
            super()._fastsm_make_durable()
        else:
            self._fastsm_transport.release()


@pytest.mark.parametrize("planted", [RepliesNotHeld, NothingSynced, LeaderCountsItself])
def test_planted_faults_are_seen(clock: Clock, planted: Any) -> None:
    """The simulator finds a cluster that makes promises before they are durable."""
    assert violations(clock, range(6), Counter(), planted, moments=100, draws=6, again=0)


def test_a_snapshot_that_a_killed_process_put_in_place_stays(tmp_path: Path) -> None:
    """A snapshot that a killed process renamed, but did not sync, is synced before the next process relies on it.

    A later power loss does not take it, although the journal begins after it.
    """
    with FastStateMachine(tmp_path / "leader", contiguous=False) as leader:
        leader.apply([(50, 3, put(b"color", b"blue"))])
        leader.write_snapshot(tmp_path / "sent", attachment=b"of the others")
    renamed: list[Point] = []
    with memory_directory() as root:
        first = Platter(lambda where: renamed.append(Point(first, where)) if where == "after rename" else None)
        first.folder(str(root))
        with SnapshotReceiver(root / "incoming", _files=first.files) as receiver:
            receiver.write(0, (tmp_path / "sent" / "snapshot.fsm").read_bytes())
            receiver.finish()
        second = Platter(lambda _: None)
        second.folder(str(root))
        second.take_over(root, renamed[0].killed(), renamed[0])
        end(restart(Places(root, lambda _: second.files), durable=True, has_others=True, options=dict(OPTIONS)))
        now = Point(second, "now")
        for seed in range(30):
            now.draw(random.Random(seed)).build(root / "drawn")
            places = Places(root / "drawn", lambda _: QuietDirectory)
            found = restart(places, durable=True, has_others=True, options=dict(OPTIONS))
            assert (found.snapshot, found.last_applied, found.attachment) == (LogId(50, 3), 50, b"of the others")
            end(found)
        first.close()
        second.close()
