"""Clients of the lock in ``examples/recipes`` on a cluster of real nodes, and the judge that checks the log."""

from __future__ import annotations

import pickle
import random
import threading
import time
from collections import Counter
from typing import Any

import fastsm
from support.cluster import Cluster, NodeError
from support.lock_holder import DATA, Holder
from support.recipes import recipe

lock = recipe("lock")
MINUTE = 60_000
LEASE = 2_000
KEY = lock.lock_key("disk")
TIMEOUT = 1.5  # seconds after which the outcome of a proposal is unknown


class Unknown(Exception):
    """It is unknown whether the proposal was committed."""


class ClusterWithClocksApart(Cluster):
    """A cluster whose nodes' clocks are minutes apart."""

    def clock_of(self, number: int) -> dict[str, Any]:
        return {"clock": (1.0, (0.0, 180.0, -240.0)[number])}


class Client(Holder, threading.Thread):
    """A client that takes the lock, writes, pauses at times, and believes its own clock, which is wrong."""

    def __init__(self, cluster: Cluster, number: int, seed: int, ended: threading.Event) -> None:
        Holder.__init__(self, LEASE)
        threading.Thread.__init__(self, daemon=True)
        self.cluster, self.number, self.ended = cluster, number, ended
        self.dice = random.Random(seed)
        self.offset = (number % 5 - 2) * MINUTE
        self.counts: Counter[str] = Counter()
        self.error: BaseException | None = None
        self.lock: Any = None
        self.is_asking = self.asks_again = False  # it waits for the lock; its last attempt has an unknown outcome

    @property
    def now(self) -> int:
        return time.time_ns() // 1_000_000 + self.offset

    def propose(self, command: bytes) -> Any:
        try:
            node = self.dice.choice(list(self.cluster.processes.values()))
            return pickle.loads(bytes.fromhex(node.call("submit", command=command.hex(), timeout=TIMEOUT)))
        except (NodeError, IndexError) as error:
            if isinstance(error, NodeError) and not any(
                known in str(error) for known in ("has ended", "NotRunningError", "SubmitError")
            ):
                raise
            self.counts["of unknown outcome"] += 1
            raise Unknown from None

    def run(self) -> None:
        try:
            while not self.ended.wait(self.dice.random() * 0.1):
                try:
                    self.step()
                except Unknown:
                    self.asks_again = self.is_asking
        except BaseException as error:
            self.error = error

    def step(self) -> None:
        dice = self.dice
        if self.lock is None:
            self.lock = lock.Lock(self.propose, "disk", f"client {self.number}")
        if self.now >= self.until:
            if self.lock.token and not self.asks_again:
                self.lock.release()  # by the log it may still be this client's, because clocks differ
            self.is_asking = True
            self.acquire(again=self.asks_again)
            self.is_asking = self.asks_again = False
        elif dice.random() < 0.5:
            self.write()
        elif dice.random() < 0.4:
            self.keep_alive()
        elif dice.random() < 0.3:
            self.release()
        elif dice.random() < 0.3:
            time.sleep(1.5 * LEASE / 1_000)
            self.until += 10 * MINUTE * (dice.random() < 0.5)  # as if it did not read its clock before the next write


class Judge:
    """Follows the changes in the log: which token holds the lock, and with which token each write came."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.next = 1  # the first entry that it has not seen
        self.holder = 0  # the holder's token; 0 if there is no holder
        self.newest = 0

    def take(self, changes: list[fastsm.Change], up_to: int) -> None:
        """Judge all changes from `next` on, up to an entry."""
        for change in changes:
            if change.index > up_to:
                break
            assert change.index >= self.next
            if change.key == KEY and change.value is None:
                self.counts["ends"] += self.holder > 0
                self.holder = 0
            elif change.key == KEY:
                assert not self.holder, f"entry {change.index}: {change.value!r} took the lock of token {self.holder}"
                assert change.index > self.newest, f"entry {change.index}: a token that does not rise"
                self.holder = self.newest = change.index
                self.counts["grants"] += 1
            elif change.key == DATA:
                assert self.holder, f"entry {change.index}: a write without a holder"
                assert change.value == b"%d" % self.holder, f"entry {change.index}: a write of one who lost the lock"
                self.counts["writes"] += 1
        self.next = up_to + 1


class LockService:
    """A cluster whose leaders are killed, clients of one lock, and the judge."""

    def __init__(self, cluster: Cluster, dice: random.Random, clients: int = 4) -> None:
        self.cluster, self.dice, self.judge = cluster, dice, Judge()
        self.ended = threading.Event()
        self.clients = [
            Client(cluster, number, dice.randrange(2**32), self.ended) for number in range(clients)]

    def start(self) -> None:
        for client in self.clients:
            client.start()

    def kill_leader(self, seconds: float) -> None:
        """Kill the leader after some time, and restart it after some time; return when there is a leader."""
        time.sleep(seconds * self.dice.random())
        leader = self.cluster.leader()
        self.cluster.kill(leader)
        time.sleep(seconds * self.dice.random())
        self.cluster.start(leader)
        self.cluster.leader()

    def look(self) -> None:
        """Judge the changes that all nodes have applied, and check that the nodes have the same ones."""
        found = []
        for number in self.cluster.processes:
            told = self.cluster.call(number, "changes", start=self.judge.next)
            if told is not None:
                applied, changes = pickle.loads(bytes.fromhex(told))
                found.append((applied, changes))
        up_to = min(applied for applied, _ in found)
        if up_to < self.judge.next:
            return  # a node has just restarted
        cut = [[change for change in changes if change.index <= up_to] for _, changes in found]
        assert all(changes == cut[0] for changes in cut), "nodes differ"
        self.judge.take(cut[0], up_to)

    def has_seen_all(self) -> bool | None:
        """Return True if the judge has seen grants, writes and ends; otherwise None."""
        self.look()
        return min(self.judge.counts[name] for name in ("grants", "writes", "ends")) > 0 or None

    def stop(self) -> Counter[str]:
        """End the clients, and judge the rest of the log; return the clients' counts."""
        self.ended.set()
        for client in self.clients:
            client.join()
            if client.error is not None:
                raise client.error
        self.cluster.wait_ready()
        self.look()
        return sum((client.counts for client in self.clients), Counter())


def report(cluster: Cluster, judge: Judge, happened: Counter[str]) -> str:
    """Return the counts in one line; the judge has found nothing wrong."""
    counts = judge.counts
    return (
        f"{cluster.kills} kills, {counts['grants']} grants, {counts['writes']} writes, {counts['ends']} ends, "
        f"{happened['fenced off']} writes fenced off, {happened['of unknown outcome']} of unknown outcome, "
        "two holders 0")
