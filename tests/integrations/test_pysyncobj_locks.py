"""``FastLockManager``: never two holders, however wrong the nodes' clocks are, and whichever node pauses."""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pysyncobj")

from pysyncobj import FAIL_REASON, SyncObjConf
from pysyncobj import batteries as stock

import fastsm
from fastsm.integrations.pysyncobj import ReplicatedStateMachine, applying, locks, operations
from fastsm.integrations.pysyncobj.batteries import FastLockManager, FastSet
from fastsm.integrations.pysyncobj.ticking import LocksTimer
from support.cluster import free_ports

TIME = 10.0  # seconds after which a lock expires


class Log:
    """Committed entries, and a machine that applies each immediately."""

    def __init__(self) -> None:
        self.term = 1
        self.entries: list[fastsm.Entry] = []
        self.machine = fastsm.MemoryStateMachine(procedures=operations.procedures_of({}))

    def apply(self, command: bytes) -> Any:
        self.entries.append(fastsm.Entry(len(self.entries) + 1, self.term, command))
        return operations.value_of(self.machine.apply(self.entries[-1:])[0])


class World(Log):
    """Nodes that apply the log at random times, each with a clock that is wrong by a different amount."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self.dice, self.now = dice, 1e6
        self.nodes = [FakeNode(self, dice.uniform(-1e5, 1e5)) for _ in range(3)]
        self.leader = self.nodes[0]
        self.counts: Counter[str] = Counter()

    def step(self) -> None:
        dice = self.dice
        self.now += dice.choice([0.01, 0.1, 0.5, 1.0, 2.0])
        if dice.random() < 0.03:
            self.term += 1
            self.leader = dice.choice(self.nodes)
            self.counts["leaders"] += 1
        if dice.random() < 0.04:
            node = dice.choice(self.nodes)
            node.cut_off = not node.cut_off
        if not self.leader.cut_off:
            self.leader.follow(len(self.entries))
            command = self.leader.timer.tick(self.now + self.leader.ahead, self.term)
            if command is not None:
                self.leader.sent.append((command, None, self.term))
        for node in self.nodes:
            if not node.cut_off:
                while node.sent and dice.random() < 0.7:
                    node.commit(*node.sent.popleft())
                node.follow(dice.randint(node.machine.last_applied().index, len(self.entries)))


class FakeNode(ReplicatedStateMachine):
    """The parts of a node that a lock manager needs."""

    def __init__(self, world: World, ahead: float) -> None:
        self.world, self.ahead, self.cut_off = world, ahead, False
        self.machine: Any = fastsm.MemoryStateMachine(procedures=operations.procedures_of({}))
        self.sent: deque[Any] = deque()
        self.waiting: dict[int, Any] = {}
        self.manager = FastLockManager(TIME, f"manager {id(self)}")
        self.manager.destroy()  # the test decides when locks are extended
        self.manager._consumer()._syncObj = self
        self.timer = self.manager._consumer().timer(self.machine)

    @property
    def state_machine(self) -> Any:
        return self.machine

    def _getLeader(self) -> Any:
        return None if self.cut_off else self.world.leader

    def _fastsm_submit(
        self, content: bytes, mark: int, sync: bool = False, callback: Any = None, timeout: Any = None,
        take: Callable[[Any], Any] | None = None,
    ) -> None:
        if callback is not None and take is not None:
            callback = applying._taking(take, callback)
        self.sent.append((content, callback, None))

    def commit(self, content: bytes, callback: Any, term: int | None) -> None:
        """Commit a command, or lose it at random; a leader's own command may also be lost with its term."""
        if self.world.dice.random() < 0.05 or (term not in (None, self.world.term) and self.world.dice.random() < 0.5):
            return
        self.world.apply(content)
        if callback is not None:
            self.waiting[len(self.world.entries)] = callback

    def follow(self, index: int) -> None:
        for entry in self.world.entries[self.machine.last_applied().index : index]:
            result = self.machine.apply([entry])[0]
            if entry.index in self.waiting:
                self.waiting.pop(entry.index)(result, FAIL_REASON.SUCCESS)


@pytest.mark.parametrize("seed", range(6))
def test_never_two_holders(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """There are never two holders, with leaders' clocks days apart, cut-off and late nodes, and lost commands."""
    world = World(random.Random(seed))
    monkeypatch.setattr(locks, "now", lambda: world.now)
    dice, counts, last = world.dice, world.counts, None
    for _ in range(3000):
        world.step()
        node = dice.choice(world.nodes)
        what = dice.random()
        if what < 0.3:
            node.manager.tryAcquire("lock")
        elif what < 0.34 and node.manager.isAcquired("lock"):
            node.manager.release("lock")
        elif what < 0.9:
            node.manager._prolongate_now()
        holders = [number for number, each in enumerate(world.nodes) if each.manager.isAcquired("lock")]
        assert len(holders) <= 1, f"{holders} hold it"
        if holders and holders[0] != last:
            counts["holders"] += 1
            last = holders[0]
    assert counts["holders"] > 10
    assert counts["leaders"] > 10


def test_a_holder_that_lives_keeps_its_lock_over_changes_of_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A living holder keeps its lock over changes of leader, however far a new leader's clock is ahead."""
    world = World(random.Random(1))
    monkeypatch.setattr(locks, "now", lambda: world.now)
    holder, other, third = world.nodes
    holder.manager.tryAcquire("lock")

    def settle() -> None:
        for node in world.nodes:
            while node.sent:
                world.apply(node.sent.popleft()[0])
        for node in world.nodes:
            node.follow(len(world.entries))

    holder.commit(*holder.sent.popleft())
    settle()
    for number in range(100):
        world.now += 2.0
        world.term += number % 3 == 0
        leader = (other, third)[number % 6 < 3]
        command = leader.timer.tick(world.now + leader.ahead, world.term)
        if command is not None:
            world.apply(command)
        other.manager.tryAcquire("lock")
        holder.manager._prolongate_now()
        while holder.sent:
            holder.waiting[len(world.entries) + 1] = holder.sent[0][1]
            world.apply(holder.sent.popleft()[0])
        settle()
        assert holder.manager.isAcquired("lock")
        assert not other.manager.isAcquired("lock")


def test_a_dead_holders_lock_is_free_before_long() -> None:
    """With one leader, a dead holder's lock is free after its time, and before one and a half times that."""
    log = Log()
    holder = FastLockManager(TIME, "holder")
    holder.destroy()
    consumer = holder._consumer()
    timer = consumer.timer(log.machine)  # type: ignore[arg-type]
    now = 500.0
    key = consumer.key("lock")

    def take(who: bytes) -> Any:
        return log.apply(operations.encode(operations.lock_take, consumer.prefix, key, who, consumer._lease))

    assert timer.tick(now, 1) is None  # no lock is held, so no time is counted
    assert take(b"holder")
    for _ in range(10_000):
        now += 0.05
        if command := timer.tick(now, 1):
            log.apply(command)
        if take(b"other"):
            break
    assert TIME <= now - 500.0 <= 1.5 * TIME


def test_locks_are_what_they_are_in_stock() -> None:
    """Answers and holders are those of PySyncObj's lock manager, for random calls of three holders."""
    log = Log()
    manager = FastLockManager(TIME, "a")
    manager.destroy()
    consumer, model = manager._consumer(), stock._ReplLockManagerImpl(1.25 * TIME)
    chance, counted, answers = random.Random(5), 0, set()

    def operate(function: Callable[..., Any], *arguments: bytes) -> Any:
        return log.apply(operations.encode(function, *arguments))

    for _ in range(400):
        counted += chance.choice([0, 500, 2000, 2499])
        operate(operations.locks_pass, consumer.prefix, b"1", b"%d" % counted, consumer._most)
        lock, holder, now = chance.choice(["x", "y", 3]), chance.choice("abc"), counted / 1000
        kind = chance.choice(["acquire", "acquire", "prolongate", "release"])
        key, name = consumer.key(lock), holder.encode()
        if kind == "acquire":
            answer = bool(operate(operations.lock_take, consumer.prefix, key, name, consumer._lease))
            assert answer == model.acquire(lock, holder, now, _doApply=True)
            answers.add(answer)
        elif kind == "prolongate":
            operate(operations.locks_keep, consumer.prefix, name, consumer._lease)
            model.prolongate(holder, now, _doApply=True)
        else:
            operate(operations.lock_give_back, key, name, b"0")
            model.release(lock, holder, _doApply=True)
        for each in ("x", "y", 3):
            owner, since = model._ReplLockManagerImpl__locks.get(each, (None, now))
            found = log.machine.get(consumer.key(each))
            expected = owner if now - since <= 1.25 * TIME else None
            assert (None if found is None else operations.lock_of(found).holder.decode()) == expected
    assert answers == {True, False}


def test_a_late_release_is_not_one_of_a_later_lock() -> None:
    """A release of an earlier acquisition does not release a later one."""
    log = Log()
    manager = FastLockManager(TIME, "a")
    manager.destroy()
    consumer = manager._consumer()
    key = consumer.key("x")
    take = operations.encode(operations.lock_take, consumer.prefix, key, b"a", consumer._lease)
    first, second = log.apply(take), log.apply(take)
    assert second > first
    log.apply(operations.encode(operations.lock_give_back, key, b"a", b"%d" % first))
    assert log.machine.get(key) is not None
    log.apply(operations.encode(operations.lock_give_back, key, b"a", b"%d" % second))
    assert log.machine.get(key) is None


def test_time_counts_once_and_in_its_own_term() -> None:
    """A report of time that is late, repeated or of another term adds nothing; a long gap adds only the limit."""
    log = Log()
    prefix = b"locks\0"

    def passed(term: int, counted: int) -> int:
        log.apply(operations.encode(operations.locks_pass, prefix, b"%d" % term, b"%d" % counted, b"1000"))
        return operations.locks_time_of(log.machine.get(prefix))[0]

    assert [passed(1, 700), passed(1, 900), passed(1, 900), passed(1, 800), passed(1, 1000)] == [0, 200, 200, 200, 300]
    assert passed(1, 10**6) == 1300
    log.term = 5
    assert [passed(1, 2 * 10**6), passed(5, 10**9), passed(5, 10**9 + 5)] == [1300, 1300, 1305]


def test_the_leaders_count_begins_with_its_term() -> None:
    """A leader counts time from the start of its term, and proposes it every two seconds while a lock is held."""
    has = [False]
    timer = LocksTimer(lambda: has[0], lambda term, counted: b"%d %d" % (term, counted), 2.0)
    assert timer.tick(100.0, 1) is None
    has[0] = True
    assert [timer.tick(at, 1) for at in (101.0, 102.0, 103.5)] == [b"1 1000", None, b"1 3500"]
    assert [timer.tick(at, 2) for at in (104.0, 105.0, 106.0)] == [b"2 0", None, b"2 2000"]


def test_a_lock_manager_keeps_its_locks(tmp_path: Path) -> None:
    """tryAcquire, isAcquired and release work as in PySyncObj; held locks are extended automatically."""
    one, other = (FastLockManager(60.0, name, name=f"locks of {name}") for name in ("one", "other"))
    told: list[Any] = []
    address = f"127.0.0.1:{free_ports(1)[0]}"
    conf = SyncObjConf(bindAddress=address, appendEntriesUseBatch=False)
    items = FastSet()
    node = ReplicatedStateMachine(address, [], tmp_path / "node", conf=conf, consumers=[one, other, items])
    try:
        other._locks.prefix = one._locks.prefix  # as if on another node
        assert one.tryAcquire("a", sync=True, timeout=30) is True
        assert other.tryAcquire("a", sync=True, timeout=30) is False
        heard = threading.Event()
        other.tryAcquire("a", callback=lambda *answer: (told.append(answer), heard.set()))
        assert heard.wait(30)
        assert told == [(False, FAIL_REASON.SUCCESS)]
        assert (one.isAcquired("a"), other.isAcquired("a")) == (True, False)
        one.release("a", sync=True, timeout=30)
        assert (one.isAcquired("a"), other.tryAcquire("a", sync=True, timeout=30)) == (False, True)
        assert one._prolongate_now()
        with pytest.raises(KeyError, match="nobody"):
            items.remove("nobody", sync=True, timeout=30)
    finally:
        node.destroy_synchronous()
        one.destroy()
        other.destroy()
    assert one._prolongate_now() is False
