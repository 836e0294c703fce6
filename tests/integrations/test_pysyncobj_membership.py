"""Nodes that are removed, added again and replaced, compared with a stock PySyncObj cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("pysyncobj")

from pysyncobj import FAIL_REASON

from support.twin_nodes import Nodes, twins

# PySyncObj's own journal leaves closing a file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

def removed_alive(nodes: Nodes) -> None:
    nodes.append(1, "a")
    nodes.remove(2, alive=True)
    nodes.dump()
    nodes.append(1, "b")


def removed_and_added_again(nodes: Nodes) -> None:
    """Remove and add nodes again, so that each side in turn is the one that connects."""
    for number in (2, 1):
        nodes.append(0, f"before {number}")
        nodes.remove(number, alive=True)
        nodes.stop(number)
        nodes.add(number)
        nodes.start(number)
        nodes.settle()
        nodes.append(number, f"after {number}")
    nodes.dump()


def replaced(nodes: Nodes) -> None:
    nodes.append(0, "a")
    nodes.dump()
    nodes.replace(2)
    nodes.append(2, "b")
    nodes.replace(1)
    nodes.append(1, "c")
    nodes.dump()


def one_more_and_a_dead_one_less(nodes: Nodes) -> None:
    nodes.append(2, "a")
    nodes.add(3)
    nodes.start(3)
    nodes.settle()
    nodes.append(3, "b")
    nodes.remove(1, alive=False)
    nodes.append(3, "c")
    nodes.dump()
    nodes.stop(0)
    nodes.until(lambda: any(node._isLeader() for node in nodes.running.values()))
    nodes.settle()
    nodes.append(3, "d")


def what_is_denied(nodes: Nodes) -> None:
    leader = nodes.leader()
    nodes.call("add a member", leader.addNodeToCluster, nodes.addresses[1])
    nodes.call("remove a stranger", leader.removeNodeFromCluster, nodes.addresses[3])
    nodes.call("remove the leader itself", leader.removeNodeFromCluster, leader.selfNode)
    nodes.call("transfer at a follower", nodes.running[1].transferLeadership)
    nodes.call("transfer to a stranger", leader.transferLeadership, nodes.addresses[3])
    nodes.settle()
    nodes.append(0, "a")


STORIES = [removed_alive, removed_and_added_again, replaced, one_more_and_a_dead_one_less, what_is_denied]


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[Callable[[bool], Nodes]]:
    with twins(tmp_path) as make:
        yield make


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_membership_changes_are_seen_as_in_stock(
    clusters: Callable[[bool], Nodes], story: Callable[[Nodes], None]
) -> None:
    """Answers, indexes, members, status and contents are those of stock PySyncObj after each step."""
    seen = []
    for fast in (False, True):
        nodes = clusters(fast)
        story(nodes)
        seen.append(nodes.seen)
        if fast:
            assert [node.failure for node in nodes.running.values()] == [None] * len(nodes.running)
    stock, fastsm = seen
    for step, (there, here) in enumerate(zip(stock, fastsm, strict=True)):
        assert here == there, step
    assert any(answer[1] == FAIL_REASON.SUCCESS for what, answer in stock if what != "settled")


def test_a_node_that_was_removed_is_not_connected(clusters: Callable[[bool], Nodes]) -> None:
    """A removed node is in no table keyed by node any more, on the leader or on a follower."""
    nodes = clusters(True)
    nodes.append(0, "a")
    gone = next(node for node in nodes.leader().otherNodes if nodes.number(node) == 2)
    nodes.remove(2, alive=True)
    for number in (0, 1):
        node = nodes.running[number]
        assert not node.isNodeConnected(gone)
        transport = node._fastsm_transport
        tables = {
            **{name: value for name, value in vars(node).items() if name != "_SyncObj__lastResponseTime"},
            **vars(transport),
        }
        keeps = [name for name, table in tables.items() if isinstance(table, (dict, set)) and gone in table]
        assert keeps == []
