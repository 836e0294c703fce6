"""PySyncObj's public calls in fixed and random schedules: user code sees the same on fastsm and on stock PySyncObj.

Both clusters play the same story, one after the other; answers, order, indexes, members, status, callbacks and contents
are recorded after each step, and compared.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("pysyncobj")

from pysyncobj.syncobj_admin import executeAdminCommand

from support.twin_nodes import Nodes, twins

# PySyncObj's own journal leaves closing a file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[Callable[[bool], Nodes]]:
    with twins(tmp_path) as make:
        yield make


def compared(clusters: Callable[[bool], Nodes], story: Callable[[Nodes], None]) -> None:
    """Play a story on both clusters, and compare the records step by step."""
    seen = []
    for fast in (False, True):
        nodes = clusters(fast)
        try:
            story(nodes)
        except AssertionError as error:
            raise AssertionError(f"on {'fastsm' if fast else 'stock'}: {error}; {nodes.seen[-3:]}") from error
        if fast:
            assert [node.failure for node in nodes.running.values()] == [None] * len(nodes.running)
        seen.append(nodes.seen)
        nodes.end()
    for step, (there, here) in enumerate(zip(*seen, strict=True)):
        assert here == there, (step, seen[0][max(0, step - 2) : step])


# ---- steps -----------------------------------------------------------------------------------------------


def change_value(nodes: Nodes, number: int, chance: random.Random) -> None:
    """Make a random call of a ReplDict at one node."""
    values, key = nodes.values[number], chance.choice("abc")
    name, *arguments = chance.choice([
        ("set", key, chance.randrange(9)), ("setdefault", key, "default"), ("pop", key), ("pop", key, "none"),
        ("update", {key: 1, "more": None}), ("clear",),
    ])  # fmt: skip
    nodes.call(f"{name} {arguments} at {number}", getattr(values, name), *arguments)
    nodes.settle()


def burst(nodes: Nodes, number: int, count: int) -> None:
    """Make many calls at the same time, each of which gets one callback, in order."""
    answers: list[object] = []
    for each in range(count):
        nodes.items[number].append(f"burst {each}", callback=lambda *answer: answers.append(answer))
        if each % 3 == 0:
            nodes.values[number].set("burst", each)
    nodes.until(lambda: len(answers) == count)
    nodes.note("burst", answers)
    nodes.settle()


def restart(nodes: Nodes, number: int) -> None:
    nodes.stop(number)
    nodes.until_leader()
    nodes.start(number)
    nodes.settle()


def pause(nodes: Nodes, number: int) -> None:
    """Pause a node while the others continue; then let it catch up."""
    others = [other for other in nodes.members if other != number]
    nodes.paused.add(number)
    nodes.until_leader()
    nodes.call("while it stands", nodes.items[others[-1]].append, f"without {number}")
    nodes.paused.discard(number)
    nodes.settle()


def transfer(nodes: Nodes, number: int) -> None:
    leader = nodes.leader()
    nodes.call(f"transfer to {number}", leader.transferLeadership, nodes.addresses[number])
    if nodes.number(leader.selfNode) != number:
        nodes.until(nodes.running[number]._isLeader)
    nodes.settle()


def raise_version(nodes: Nodes, number: int) -> None:
    nodes.call("version", nodes.running[number].setCodeVersion, 1)
    nodes.settle()


def random_story(seed: int) -> Callable[[Nodes], None]:
    """Return a story of random steps, on a cluster of three, of which a node is away for at most one step."""

    def story(nodes: Nodes) -> None:
        chance = random.Random(seed)
        for number in range(14):
            at = chance.choice(nodes.members)
            kind = chance.choices(
                ["append", "value", "burst", "dump", "restart", "pause", "transfer", "replace", "remove"],
                [5, 5, 3, 3, 3, 3, 2, 2, 2])[0]  # fmt: skip
            nodes.note(number, kind, at)
            if kind in ("replace", "remove") and nodes.running[at]._isLeader():
                kind = "append"  # PySyncObj denies it
            if kind == "append":
                nodes.append(at, f"item {number}")
            elif kind == "value":
                change_value(nodes, at, chance)
            elif kind == "burst":
                burst(nodes, at, chance.randrange(2, 40))
            elif kind == "dump":
                nodes.dump()
            elif kind == "restart":
                restart(nodes, at)
            elif kind == "pause":
                pause(nodes, at)
            elif kind == "transfer":
                transfer(nodes, at)
            elif kind == "replace":
                nodes.replace(at)
            else:
                nodes.remove(at, alive=chance.random() < 0.5)
                nodes.stop_if_running(at)
                nodes.add(at)
                nodes.start(at)
                nodes.settle()
        raise_version(nodes, chance.choice(nodes.members))  # at the end, because stock forgets it when it loads a dump
        nodes.append(nodes.members[0], "the end")

    return story


SEEDS = int(os.environ.get("FASTSM_SCHEDULES", "5"))


def without_a_majority(nodes: Nodes) -> None:
    """Without a leader, let calls wait, or get an immediate answer if the configuration says so."""
    nodes.append(0, "a")
    for number in range(3):
        nodes.stop(number)
    nodes.start(2)
    alone = nodes.running[2]
    nodes.note(alone.hasQuorum, alone._getLeader())
    for waits in (True, False):
        alone.conf.commandsWaitLeader = waits
        answers: list[object] = []
        nodes.items[2].append(f"waits {waits}", callback=lambda *answer, answers=answers: answers.append(answer))
        for _ in range(100):
            alone.doTick(0.001)
        nodes.note("without a leader", waits, answers)
    alone.conf.commandsWaitLeader = True
    nodes.note("ready", alone.isReady(), alone.tick_thread_alive())
    nodes.start(0)
    nodes.start(1)
    nodes.settle()


def what_is_wrong_raises(nodes: Nodes) -> None:
    """Use missing versions, missing keys and full queues, for equal exceptions and answers."""
    node = nodes.running[1]
    for call in (
        lambda: node.setCodeVersion(2), lambda: node.setCodeVersion("1"),
        lambda: nodes.values[1]["nothing"], node.waitBinded, lambda: node.getStatus()["version"],
    ):  # fmt: skip
        try:
            nodes.note("gives", call())
        except Exception as error:
            nodes.note("raises", type(error), str(error))
    answers: list[object] = []
    for number in range(60):
        nodes.items[1].append(str(number), callback=lambda *answer: answers.append(answer))
    nodes.note("full", list(answers))
    nodes.until(lambda: len(answers) == 60)
    nodes.note("full", answers)
    nodes.settle()


def versions(nodes: Nodes) -> None:
    """Call a method of a later version from each node after the version was raised."""
    nodes.append(2, "before")
    raise_version(nodes, 1)
    for number in range(3):
        nodes.append(number, "after")
        nodes.note("version", nodes.running[number].getCodeVersion())


def admin(nodes: Nodes, number: int, *arguments: str) -> None:
    """Run `syncobj_admin` at a node; record its output, except for times, files and log lengths."""
    said: list[str] = []
    command = ["-conn", nodes.addresses[number], *arguments]
    thread = threading.Thread(target=lambda: said.append(executeAdminCommand(command)))
    thread.start()
    nodes.until(lambda: said)
    thread.join()
    text = said[0]
    for other, address in enumerate(nodes.addresses):
        text = text.replace(address, f"node {other}")
    passed_over = "uptime", "log_len", "next_node_idx_server"
    kept = [line for line in sorted(text.split("\n")) if not line.startswith(passed_over)]
    nodes.note("admin", number, arguments[0], kept)


def by_the_admin_tool(nodes: Nodes) -> None:
    """Run every command of the admin tool, at the leader and at a follower, including denied ones."""
    nodes.append(0, "a")
    admin(nodes, 0, "-status")
    admin(nodes, 1, "-remove", nodes.addresses[1])  # itself
    admin(nodes, 1, "-remove", nodes.addresses[2])
    nodes.members.remove(2)
    nodes.stop(2)
    nodes.settle()
    admin(nodes, 0, "-add", nodes.addresses[1])  # already a member
    admin(nodes, 1, "-add", nodes.addresses[2])
    nodes.members.append(2)
    nodes.start(2)
    nodes.settle()
    for version in ("2", "1", "0"):
        admin(nodes, 2, "-set_version", version)
    nodes.settle()
    admin(nodes, 1, "-transfer")  # not the leader
    admin(nodes, 0, "-transfer", nodes.addresses[1])
    nodes.until(nodes.running[1]._isLeader)
    nodes.settle()
    admin(nodes, 1, "-status")


STORIES = [without_a_majority, versions, what_is_wrong_raises, by_the_admin_tool]


@pytest.mark.parametrize("story", STORIES, ids=lambda each: each.__name__)
def test_calls_are_seen_as_in_stock(clusters: Callable[[bool], Nodes], story: Callable[[Nodes], None]) -> None:
    """In fixed stories, answers, exceptions and status are those of stock PySyncObj."""
    compared(clusters, story)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_schedules_are_seen_as_in_stock(clusters: Callable[[bool], Nodes], seed: int) -> None:
    """In random stories with dumps, restarts, pauses and changes of leader, version and members, all is as in stock."""
    compared(clusters, random_story(seed))
