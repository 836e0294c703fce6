"""A rewritten core of PySyncObj's own test suite: every test runs on PySyncObj's class and on fastsm's.

The original suite (`tests/pysyncobj_suite.py`) runs nightly; PySyncObj's package does not include it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pysyncobj")

from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, SyncObjException, replicated, replicated_sync
from pysyncobj.batteries import ReplCounter, ReplDict, ReplLockManager
from pysyncobj.syncobj_admin import executeAdminCommand

from fastsm.integrations.pysyncobj import DumpPolicy, FastSyncObj
from support.cluster import free_ports
from support.twin_nodes import close_pipe, ticked_until

# Stock PySyncObj leaves closing its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Counting:
    """A replicated counter, with two versions of a method, on either base class."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.total, self.word = 0, ""

    @replicated
    def add(self, number: int) -> int:
        self.total += number
        return self.total

    @replicated_sync
    def add_sync(self, number: int) -> int:
        self.total += number
        return self.total

    @replicated
    def say(self) -> None:
        self.word = "version 0"

    @replicated(ver=1)
    def say(self) -> None:  # noqa: F811  # PySyncObj finds both
        self.word = "version 1"


class OnStock(Counting, SyncObj):
    pass


class OnFastsm(Counting, FastSyncObj):
    pass


class Nodes:
    """Nodes of one class, ticked in turns by the test; the lowest number that runs leads."""

    def __init__(self, root: Path, kind: type[Any]) -> None:
        self.root, self.kind = root, kind
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(4)]
        self.running: dict[Any, Any] = {}

    def start(self, number: int | str, members: int = 2, *, consumers: Any = None, **settings: Any) -> Any:
        """Start a member, by its number, or a read-only node, by any name."""
        is_member = isinstance(number, int)
        own = self.addresses[number] if isinstance(number, int) else None
        least = 0.3 + 0.8 * number if isinstance(number, int) else 5.0
        conf = SyncObjConf(**{
            "autoTick": False, "bindAddress": own, "appendEntriesUseBatch": False, "connectionRetryTime": 0.05,
            "raftMinTimeout": least, "raftMaxTimeout": least + 0.01, "appendEntriesPeriod": 0.02,
            "connectionTimeout": 10.0, "useFork": False, **settings,
        })  # fmt: skip
        others = [address for address in self.addresses[:members] if address != own]
        self.running[number] = self.kind(own, others, conf, consumers=consumers)
        assert is_member or self.running[number].selfNode is None
        return self.running[number]

    def files(self, number: int) -> dict[str, str]:
        return {"journalFile": str(self.root / f"journal-{number}"), "fullDumpFile": str(self.root / f"dump-{number}")}

    def stop(self, *numbers: Any) -> None:
        for number in numbers or list(self.running):
            node = self.running.pop(number)
            node.destroy()
            if not node.conf.autoTick:
                close_pipe(node)

    def until(self, condition: Callable[[], object], without: tuple[int, ...] = ()) -> None:
        ticked = [node for number, node in self.running.items() if number not in without]
        if not ticked_until(condition, lambda: ticked):
            raise AssertionError([node.getStatus() for node in ticked])

    def ready(self) -> list[Any]:
        nodes = list(self.running.values())
        self.until(lambda: all(node.isReady() for node in nodes) and len({node._getLeader() for node in nodes}) == 1)
        return nodes

    def pair(self, **settings: Any) -> list[Any]:
        for number in range(2):
            self.start(number, **settings)
        return self.ready()

    def three(self, **settings: Any) -> list[Any]:
        for number in range(3):
            self.start(number, 3, **settings)
        return self.ready()

    def totals(self, total: int, without: tuple[int, ...] = ()) -> None:
        """Tick until all have this total."""
        nodes = [node for number, node in self.running.items() if number not in without]
        self.until(lambda: all(node.total == total for node in nodes), without)

    def call(self, method: Callable[..., object], *arguments: Any) -> Any:
        told: list[Any] = []
        method(*arguments, callback=lambda *answer: told.append(answer))
        self.until(lambda: told)
        return told[0]

    def admin(self, number: int, *arguments: str) -> str:
        """Return what `syncobj_admin` prints if it is run against a node."""
        said: list[str] = []
        command = ["-conn", self.addresses[number], *arguments]
        thread = threading.Thread(target=lambda: said.append(executeAdminCommand(command)))
        thread.start()
        self.until(lambda: not thread.is_alive())
        return said[0]


@pytest.fixture(params=[OnStock, OnFastsm])
def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path, request.param)
    yield made
    made.stop()


# ---- a cluster -------------------------------------------------------------------------------------------


def test_one_node_alone_and_two_together(nodes: Nodes) -> None:
    """A node alone applies calls; of two, both apply the calls of either, and callbacks get result and reason."""
    alone = nodes.start(3, 0)
    nodes.ready()
    assert nodes.call(alone.add, 150) == (150, FAIL_REASON.SUCCESS)
    nodes.stop(3)
    first, second = nodes.pair()
    assert first._getLeader().address == nodes.addresses[0] == second._getLeader().address
    first.add(150)
    second.add(200)
    nodes.totals(350)
    assert nodes.call(second.add, 3) == (353, FAIL_REASON.SUCCESS)


def test_quorum(nodes: Nodes) -> None:
    """One node of two has no quorum until the other one is there."""
    first = nodes.start(0)
    for _ in range(100):
        first.doTick(0.001)
    assert (first.hasQuorum, first.isReady()) == (False, False)
    nodes.start(1)
    nodes.ready()
    assert first.hasQuorum


def test_a_leader_fails_and_comes_back(nodes: Nodes) -> None:
    """If a leader fails, the others elect another one, and the old leader catches up."""
    nodes.three()
    nodes.running[0].add(150)
    nodes.running[1].add(200)
    nodes.totals(350)
    nodes.until(lambda: nodes.running[1]._getLeader() == nodes.running[1].selfNode, without=(0,))
    nodes.running[2].add(50)
    nodes.totals(400, without=(0,))
    assert nodes.running[0].total == 350
    nodes.totals(400)


def test_a_leader_without_followers_gives_up(nodes: Nodes) -> None:
    """A leader without followers steps down after `leaderFallbackTimeout`."""
    first, _ = nodes.pair(leaderFallbackTimeout=0.3)
    assert first._isLeader()
    nodes.until(lambda: not first._isLeader(), without=(1,))


def test_the_log_stays_short(nodes: Nodes) -> None:
    """`logCompactionMinEntries` and `logCompactionMinTime` keep the log short; a late node gets a snapshot."""
    nodes.three(logCompactionMinEntries=100, logCompactionMinTime=0.1, appendEntriesUseBatch=True)
    short = lambda: all(node._getRaftLogSize() <= 100 for node in nodes.running.values())  # noqa: E731
    for number in range(250):
        nodes.running[number % 2].add(1)
    nodes.totals(250)
    nodes.until(short)
    for number in range(250):
        nodes.running[number % 2].add(1)
    nodes.totals(500, without=(2,))
    assert nodes.running[2].total == 250
    nodes.totals(500)
    nodes.until(short)


@pytest.mark.parametrize("dumped", [True, False])
def test_all_stop_and_come_back(nodes: Nodes, dumped: bool) -> None:
    """Nodes that all stopped are restored from their dumps, or from their journals alone."""
    for number in range(2):
        nodes.start(number, **nodes.files(number))
    first, second = nodes.ready()
    first.add(150)
    second.add(200)
    nodes.totals(350)
    if dumped:
        for node in (first, second):
            node.forceLogCompaction()
        for _ in range(200):
            first.doTick(0.001)
            second.doTick(0.001)
    nodes.stop()
    for number in range(2):
        nodes.start(number, **nodes.files(number))
    nodes.ready()
    nodes.totals(350)


def test_read_only_nodes(nodes: Nodes) -> None:
    """Read-only nodes follow and may call, but do not count for the quorum."""
    members = nodes.pair()
    reader = nodes.start("reader")
    members[0].add(150)
    nodes.totals(150)
    assert nodes.call(reader.add, 50) == (200, FAIL_REASON.SUCCESS)
    nodes.until(lambda: [node.getStatus()["readonly_nodes_count"] for node in members] == [1, 1])
    nodes.stop("reader")
    nodes.until(lambda: [node.getStatus()["readonly_nodes_count"] for node in members] == [0, 0])


def test_members_come_and_go(nodes: Nodes) -> None:
    """A member is added, calls, and is removed again."""
    first, second = nodes.pair(dynamicMembershipChange=True)
    assert nodes.call(first.addNodeToCluster, nodes.addresses[2])[1] == FAIL_REASON.SUCCESS
    third = nodes.start(2, 3, dynamicMembershipChange=True)
    nodes.ready()
    third.add(5)
    nodes.totals(5)
    assert nodes.call(first.removeNodeFromCluster, nodes.addresses[2])[1] == FAIL_REASON.SUCCESS
    nodes.stop(2)
    second.add(5)
    nodes.totals(10)
    assert [node.getStatus()["partner_nodes_count"] for node in (first, second)] == [1, 1]


def test_versions_of_the_code(nodes: Nodes) -> None:
    """The old version of a method runs until the code version is raised; an unknown version is refused."""
    first, second = nodes.pair()
    nodes.call(first.say)
    nodes.until(lambda: (first.word, second.word) == ("version 0",) * 2)
    with pytest.raises(Exception, match="wrong version"):
        first.setCodeVersion(5)
    first.setCodeVersion(1)
    nodes.until(lambda: [node.getCodeVersion() for node in (first, second)] == [1, 1])
    nodes.call(second.say)
    nodes.until(lambda: (first.word, second.word) == ("version 1",) * 2)


def test_consumers(nodes: Nodes) -> None:
    """PySyncObj's structures work together with a class that has replicated methods, through a dump."""
    kept = [[ReplCounter(), ReplDict(), ReplLockManager(30)] for _ in range(2)]
    for number in range(2):
        nodes.start(number, consumers=kept[number], **nodes.files(number))
    first, _ = nodes.ready()
    assert nodes.call(kept[0][0].add, 7)[0] == 7
    nodes.call(kept[1][1].set, "a", "b")
    assert nodes.call(kept[0][2].tryAcquire, "lock")[0] is True
    assert nodes.call(kept[1][2].tryAcquire, "lock")[0] is False
    first.add(9)
    nodes.totals(9)
    for manager in (kept[0][2], kept[1][2]):
        manager.destroy()
    nodes.running[1].forceLogCompaction()
    for _ in range(200):
        for node in nodes.running.values():
            node.doTick(0.001)
    nodes.stop(1)
    kept[1] = [ReplCounter(), ReplDict(), ReplLockManager(30)]
    nodes.start(1, consumers=kept[1], **nodes.files(1))
    nodes.ready()
    nodes.totals(9)
    assert (kept[1][0].get(), kept[1][1].get("a")) == (7, "b")
    kept[1][2].destroy()


def test_ticks_of_its_own(nodes: Nodes) -> None:
    """With `autoTick`, waiting calls, `waitReady`, `waitBinded` and tick callbacks work."""
    ticks: list[int] = []
    own = [nodes.start(number, autoTick=True, autoTickPeriod=0.01) for number in range(2)]
    own[0].addOnTickCallback(lambda: ticks.append(1))
    for node in own:
        node.waitBinded()
        node.waitReady()
    assert own[1].add_sync(150, timeout=20) == 150
    assert own[0].add(50, sync=True, timeout=20) == 200
    assert ticks
    stands, goes_on = threading.Event(), threading.Event()
    own[0].addOnTickCallback(lambda: stands.set() or goes_on.wait())
    assert stands.wait(20)
    try:
        with pytest.raises(SyncObjException):  # nothing is committed while the node's ticks stand still
            own[0].add(1, sync=True, timeout=0)
    finally:
        goes_on.set()


# ---- syncobj_admin ---------------------------------------------------------------------------------------


def test_admin(nodes: Nodes) -> None:
    """PySyncObj's own admin program shows status, and changes members, code version and leadership."""
    first, second = nodes.pair(dynamicMembershipChange=True)
    for number, node in enumerate((first, second)):
        said = dict(line.split(": ", 1) for line in nodes.admin(number, "-status").splitlines())
        assert said.keys() == {str(key) for key in node.getStatus()}
        assert said["leader"] == nodes.addresses[0]
    assert nodes.admin(0, "-add", nodes.addresses[2]) == f"SUCCESS ADD {nodes.addresses[2]}"
    nodes.start(2, 3, dynamicMembershipChange=True)
    nodes.ready()
    assert nodes.admin(1, "-remove", nodes.addresses[2]) == f"SUCCESS REMOVE {nodes.addresses[2]}"
    nodes.stop(2)
    assert nodes.admin(0, "-set_version", "1") == "SUCCESS SET_VERSION 1"
    nodes.until(lambda: [node.getCodeVersion() for node in (first, second)] == [1, 1])
    assert "FAIL" in nodes.admin(1, "-transfer", nodes.addresses[1])  # this node does not lead
    assert "SUCCESS" in nodes.admin(0, "-transfer", nodes.addresses[1])
    nodes.until(lambda: second._isLeader() and first._getLeader() == second.selfNode)
    first.add(1)
    nodes.totals(1)


def test_admin_and_members_with_a_password(nodes: Nodes) -> None:
    """With a password the cluster and the admin program work; a node with another password does not join."""
    pytest.importorskip("cryptography")
    nodes.pair(password="abc")
    nodes.running[1].add(2)
    nodes.totals(2)
    assert f"leader: {nodes.addresses[0]}" in nodes.admin(0, "-pass", "abc", "-status")
    other = nodes.start(2, 3, password="wrong")
    nodes.running[0].add(2)
    nodes.totals(4, without=(2,))
    assert (other.total, other.isReady()) == (0, False)


# ---- PySyncObj's settings of dumps -----------------------------------------------------------------------


def settings(**given: Any) -> Any:
    from fastsm.integrations.pysyncobj.configuration import policy_of  # noqa: PLC0415

    policy = given.pop("policy", None)
    return policy_of(SyncObjConf(**given), policy)


def test_settings_of_dumps_become_the_policy() -> None:
    """Each of PySyncObj's settings of dumps becomes part of the policy; conflicting or invalid ones are refused."""
    assert settings() == settings(useFork=False, logCompactionSplit=True) == DumpPolicy()
    by_entries = settings(logCompactionMinEntries=1000)
    assert (by_entries.entries, by_entries.most_seconds, by_entries.trailing_entries) == (1000, 300, 500)
    assert by_entries.journal_bytes > 2**60
    by_time = settings(logCompactionMinTime=2)
    assert (by_time.entries, by_time.most_seconds, by_time.least_seconds) == (5000, 2, 2)
    assert settings(logCompactionBatchSize=1000) == DumpPolicy(piece_bytes=1000)
    own = DumpPolicy(entries=7)
    assert settings(policy=own) is own
    for wrong, message in (
        ({"policy": own, "logCompactionMinTime": 7}, "conf.logCompactionMinTime: set, although policy= is given"),
        ({"logCompactionBatchSize": 1 << 30}, "piece_bytes"), ({"policy": DumpPolicy(entries=0)}, "entries=0"),
        ({"policy": DumpPolicy(piece_bytes=0)}, "piece_bytes=0"), ({"policy": DumpPolicy(ratio=-1)}, "ratio=-1"),
        ({"policy": DumpPolicy(journal_bytes=-1)}, "journal_bytes"), ({"logCompactionMinTime": -1}, "seconds=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(**wrong)
