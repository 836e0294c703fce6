"""Clients that retry until they have an answer: each deposit counts once, however many nodes die meanwhile."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

from support.cluster import Cluster, NodeError

TIMEOUT = 1.5  # seconds after which a client asks again, mostly another node
PATIENCE = 60.0


class Depositors:
    """Threads with some clients each, which deposit through any node; they pause between `stop` and `start`.

    A client has one command in flight. It submits that command, in its session, until it has an answer.
    """

    def __init__(self, cluster: Cluster, dice: random.Random, *, threads: int = 2, clients: int = 10) -> None:
        self.cluster = cluster
        self.counts: Counter[str] = Counter()
        self.totals: list[int] = []  # the total after each deposit, as answered
        self.errors: list[BaseException] = []
        self._seeds = [dice.randrange(2**32) for _ in range(threads)]
        self._clients = clients
        self._sequences = [[1] * clients for _ in range(threads)]  # of the command in flight, or the next one
        self._sessions: list[list[int]] = [[] for _ in range(threads)]
        self._running: list[threading.Thread] = []
        self._end = threading.Event()

    def start(self) -> None:
        self._end.clear()
        self._running = [
            threading.Thread(target=self._guarded, args=(number,), daemon=True) for number in range(len(self._seeds))]
        for thread in self._running:
            thread.start()

    def stop(self) -> None:
        """Wait until every client has the answer to its command; raise the first client's error, if there is one."""
        self._end.set()
        for thread in self._running:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def check(self) -> None:
        """Check, after `stop` and with equal nodes, that every deposit counted once and none is missing."""
        done = sum(sequence - 1 for sequences in self._sequences for sequence in sequences)
        self.counts["commands"] = done
        assert sorted(self.totals) == list(range(1, done + 1)), "a deposit counted twice, or was lost"
        for node in list(self.cluster.processes):
            assert self.cluster.call(node, "value", key="once-total") == done
            for thread, sequences in enumerate(self._sequences):
                for client, sequence in enumerate(sequences):
                    value = self.cluster.call(node, "value", key=account(thread, client))
                    assert value == sequence - 1, f"{account(thread, client)}: {value} of {sequence - 1}"

    # ---- a thread ----------------------------------------------------------------------------------------

    def _guarded(self, thread: int) -> None:
        try:
            self._deposit(thread)
        except BaseException as error:
            self.errors.append(error)

    def _deposit(self, thread: int) -> None:
        dice = random.Random(self._seeds[thread])
        while not self._sessions[thread]:
            self._sessions[thread] = self._ask(dice, "open_sessions", count=self._clients) or []
        unknown: set[int] = set()
        while unknown or not self._end.is_set():
            wanted = sorted(unknown) if self._end.is_set() else list(range(self._clients))
            items = [
                (self._sessions[thread][client], self._sequences[thread][client], account(thread, client))
                for client in wanted]  # fmt: skip
            answers = self._ask(dice, "deposit", items=items, timeout=TIMEOUT) or [None] * len(items)
            self.counts["retries"] += len(unknown)
            unknown = {client for client, answer in zip(wanted, answers, strict=True) if answer is None}
            for client, answer in zip(wanted, answers, strict=True):
                if answer is not None:
                    self._take(thread, client, answer)

    def _take(self, thread: int, client: int, answer: tuple[bool, list[int], str | None]) -> None:
        sequence = self._sequences[thread][client]
        ok, value, reason = answer
        assert ok, f"{account(thread, client)}, sequence {sequence}: {reason}"
        assert value[1] == sequence, f"{account(thread, client)}: deposit {sequence} made it {value[1]}"
        self.totals.append(value[0])
        self._sequences[thread][client] += 1

    def _ask(self, dice: random.Random, name: str, **arguments: object) -> list[object] | None:
        """Return a random node's answer; None if it could not give one."""
        stop = time.monotonic() + PATIENCE
        while time.monotonic() < stop:
            nodes = list(self.cluster.processes.values())
            if not nodes:
                time.sleep(0.05)
                continue
            answer: list[object] | None = None
            try:
                answer = dice.choice(nodes).call(name, **arguments)
            except NodeError as error:
                if not any(known in str(error) for known in ("has ended", "NotRunningError", "SubmitError")):
                    raise
                self.counts["nodes without an answer"] += 1
            return answer
        raise AssertionError(f"no node answered {name}")


def account(thread: int, client: int) -> str:
    return f"once-{thread}-{client}"
