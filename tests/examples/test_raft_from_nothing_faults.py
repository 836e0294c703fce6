"""Mistakes planted into the example raft_from_nothing, each with a schedule of messages that shows it.

There are no sockets and no automatic elections: messages arrive unless a node is cut off, the test sets each node's
time, and a node campaigns when the test says so.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastsm
from support.inside import inside, private
from support.linearizability import UNKNOWN, Operation, is_linearizable
from support.small_cluster import imported_example

KEY = b"x"
IN_VAIN = 4  # lost messages after which a node that could answer without them would have answered


class HandLink:
    """A node's connection, whose messages the test delivers."""

    def __init__(self, cluster: Cluster, source: str, target: str) -> None:
        self.cluster, self.source, self.target = cluster, source, target

    async def call(self, message: dict[str, Any], blob: bytes = b"", *, timeout: float) -> Any:
        self._require()
        await asyncio.sleep(0)
        reply = await inside(self.cluster.nodes[self.target]).answer(message, blob)
        self._require()
        return reply

    def _require(self) -> None:
        if {self.source, self.target} & self.cluster.cut:
            self.cluster.in_vain += 1
            raise self.cluster.example.Unreachable("it is cut off")

    def close(self) -> None:
        pass


class Cluster:
    """Three nodes on one event loop, and the results that their clients got for one key."""

    def __init__(self, folder: Path, example: ModuleType) -> None:
        self.example = example
        self.cut: set[str] = set()
        self.in_vain = 0
        self.times = dict.fromkeys("abc", 0.0)
        self.nodes = {name: self._node(name, folder) for name in "abc"}
        self.seen: list[Operation] = []
        self._moments = itertools.count()
        self._clients: set[asyncio.Task[None]] = set()

    def _node(self, name: str, folder: Path) -> Any:
        node = self.example.Node(name, folder / name, {other: (name, other) for other in "abc"}, list("abc"))
        node.now = lambda: self._now(name)
        inside(node).spawn(inside(node).apply())
        return node

    def _now(self, name: str) -> float:
        """Return a node's time, which advances at each call, except for a node that is cut off."""
        self.times[name] += 0 if name in self.cut else 1e-6
        return self.times[name]

    async def campaign(self, name: str) -> None:
        """Let a node campaign, as if it and all others had not heard from a leader for long."""
        for other in self.times:
            self.times[other] += 0 if other in self.cut else 10
        node = self.nodes[name]
        await inside(node).campaign()
        while node.role == "leader" and node.log.term(node.commit) != node.term:
            await asyncio.sleep(0.001)  # its first entry is not committed yet

    async def put(self, name: str, value: bytes) -> None:
        await self._attempt(self._ask(name, "put", value, {"type": "propose"}, fastsm.put(KEY, value)))

    async def get(self, name: str) -> None:
        await self._attempt(self._ask(name, "get", None, {"type": "get"}, KEY))

    async def _attempt(self, work: Awaitable[None]) -> None:
        """Run a client's request until it is answered, or certainly will not be for now."""
        task = asyncio.ensure_future(work)
        self._clients.add(task)
        until = self.in_vain + IN_VAIN
        while not task.done() and self.in_vain < until:
            await asyncio.sleep(0.001)

    async def _ask(self, name: str, kind: str, argument: Any, message: dict[str, Any], blob: bytes) -> None:
        called = next(self._moments)
        reply, value = await inside(self.nodes[name]).answer(message, blob)
        returned = next(self._moments) if "done" in reply else UNKNOWN
        result = (value if reply["found"] else None) if kind == "get" and "done" in reply else None
        self.seen.append(Operation(called, returned, kind, argument, result))

    async def end(self) -> None:
        """Reconnect all nodes, and answer every request."""
        self.cut = set()
        await asyncio.wait_for(asyncio.gather(*self._clients), 60)
        tasks = [task for node in self.nodes.values() for task in node.tasks]
        for node in self.nodes.values():
            inside(node).follow(node.term)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for node in self.nodes.values():
            await node.storage.close()


# ---- schedules -------------------------------------------------------------------------------------------


async def leader_that_was_replaced(cluster: Cluster) -> None:
    """Read from a leader that is cut off, and whose clock stands still, after a write through another leader."""
    await cluster.campaign("a")
    await cluster.put("a", b"1")
    cluster.cut = {"a"}
    await cluster.campaign("b")
    await cluster.put("b", b"2")
    await cluster.get("a")


async def follower_that_is_late(cluster: Cluster) -> None:
    """Read from a follower that is cut off."""
    await cluster.campaign("a")
    await cluster.put("a", b"1")
    cluster.cut = {"c"}
    await cluster.put("a", b"2")
    await cluster.get("c")


async def candidate_that_lacks_an_entry(cluster: Cluster) -> None:
    """Let a node that was cut off during a write campaign while the leader is cut off, and read from it."""
    await cluster.campaign("a")
    cluster.cut = {"c"}
    await cluster.put("a", b"1")
    cluster.cut = {"a"}
    await cluster.campaign("c")
    await cluster.get("c")


async def leader_that_is_alone(cluster: Cluster) -> None:
    """Write to a leader that is cut off, and read from its successor."""
    await cluster.campaign("a")
    cluster.cut = {"a"}
    await cluster.put("a", b"1")
    await cluster.campaign("b")
    await cluster.get("b")


SCHEDULES = (leader_that_was_replaced, follower_that_is_late, candidate_that_lacks_an_entry, leader_that_is_alone)


# ---- mistakes --------------------------------------------------------------------------------------------


async def asks_no_majority(node: Any) -> int:
    if node.role != "leader":
        raise type(node).not_leader(node.leader)
    index: int = node.commit
    return index


async def asks_nobody(node: Any) -> int:
    index: int = node.commit
    return index


def votes_for_anybody(on_vote: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    return lambda node, request: on_vote(node, request | {"last": [2**62, 2**62]})


def commits_what_it_has(node: Any) -> None:
    if node.role == "leader" and node.log.durable_index > node.commit:
        node.commit = node.log.durable_index
        node.committed.set()


def plant(mistake: str, example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = example.Node
    monkeypatch.setattr(kind, "not_leader", example.NotLeader, raising=False)
    name, wrong = {
        "a read asks no majority": ("read_index", asks_no_majority),
        "a read asks nobody": ("read_index", asks_nobody),
        "a vote for an older log": (private("on_vote"), votes_for_anybody(inside(kind).on_vote)),
        "a commit without a majority": (private("advance"), commits_what_it_has),
    }[mistake]
    monkeypatch.setattr(kind, name, wrong)


SHOWN_BY = {
    "a read asks no majority": leader_that_was_replaced,
    "a read asks nobody": follower_that_is_late,
    "a vote for an older log": candidate_that_lacks_an_entry,
    "a commit without a majority": leader_that_is_alone,
}


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """Provide the example's module ``node``."""
    with imported_example() as node:
        yield node


def seen_in(
    schedule: Callable[[Cluster], Awaitable[None]], folder: Path, example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> list[Operation]:
    async def run() -> list[Operation]:
        cluster = Cluster(folder, example)
        monkeypatch.setattr(example, "Link", lambda address: HandLink(cluster, *address))
        try:
            await schedule(cluster)
        finally:
            await cluster.end()
        return cluster.seen

    return asyncio.run(run())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_example_is_linearizable_where_mistakes_show(
    tmp_path: Path, example: ModuleType, monkeypatch: pytest.MonkeyPatch, schedule: Callable[[Cluster], Awaitable[None]]
) -> None:
    """Without a mistake the example is linearizable in every schedule: it does not answer what it cannot know."""
    seen = seen_in(schedule, tmp_path, example, monkeypatch)
    assert is_linearizable(seen), seen
    assert any(one.returned != UNKNOWN for one in seen)


@pytest.mark.parametrize("mistake", SHOWN_BY)
def test_a_planted_mistake_is_seen_at_once(
    tmp_path: Path, example: ModuleType, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """With the mistake the same schedule gives a history that no order explains."""
    plant(mistake, example, monkeypatch)
    seen = seen_in(SHOWN_BY[mistake], tmp_path, example, monkeypatch)
    assert all(one.returned != UNKNOWN for one in seen), seen
    assert not is_linearizable(seen), seen


# ---- the checker -----------------------------------------------------------------------------------------


def is_explained(operations: list[Operation]) -> bool:
    """Return whether any order of the operations, with or without unanswered ones, explains the results."""
    said = [one for one in operations if one.returned != UNKNOWN]
    maybe = [one for one in operations if one.returned == UNKNOWN]
    return any(
        explains(order)
        for count in range(len(maybe) + 1)
        for some in itertools.combinations(maybe, count)
        for order in itertools.permutations([*said, *some])
    )


def explains(order: Sequence[Operation]) -> bool:
    value: object = None
    for i, one in enumerate(order):
        possible, value = one.after(value) if one.kind != "get" or one.returned != UNKNOWN else (True, value)
        if not possible or any(later.returned < one.called for later in order[i + 1 :]):
            return False
    return True


def history(dice: random.Random) -> list[Operation]:
    """Return a few operations with mostly random results."""
    found = []
    for _ in range(dice.choice((3, 4, 5))):
        called = dice.randrange(8)
        returned = dice.choice((UNKNOWN, called + dice.randrange(1, 5), called + dice.randrange(1, 5)))
        kind = dice.choice(("get", "put", "swap"))
        new = dice.randrange(3)
        argument: Any = {"get": None, "put": new, "swap": (dice.choice((None, 0, 1)), new)}[kind]
        result: Any = {"get": dice.choice((None, 0, 1, 2)), "put": None, "swap": dice.random() < 0.5}[kind]
        found.append(Operation(called, returned, kind, argument, result))
    return found


def test_the_checker_agrees_with_trying_every_order() -> None:
    """The checker agrees with a search of all orders for thousands of short histories, many of them linearizable."""
    dice = random.Random(21)
    right = 0
    for _ in range(3000):
        operations = history(dice)
        expected = is_explained(operations)
        assert is_linearizable(operations) is expected, operations
        right += expected
    assert 300 < right < 2700, right
