"""The batteries on fastsm, compared with PySyncObj's own: random operations, restarts, dumps and installs."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pysyncobj")

from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf
from pysyncobj import batteries as stock

import fastsm
from fastsm.integrations.pysyncobj import DumpPolicy, ReplicatedStateMachine
from fastsm.integrations.pysyncobj.batteries import (
    FastCounter,
    FastDict,
    FastPriorityQueue,
    FastQueue,
    FastSet,
)
from fastsm.integrations.pysyncobj.codecs import KEYS, VALUES
from support.cluster import free_ports
from support.twin_nodes import ticked_until

Calls = Callable[[random.Random], tuple[str, tuple[Any, ...]]]

DENIED = "cannot be done"


class Cluster:
    """Nodes that the test ticks in turns, each with batteries of its own; the first one leads."""

    def __init__(self, root: Path, make: Callable[[], list[Any]], size: int = 1) -> None:
        self.root, self.make = root, make
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(size)]
        self.nodes: dict[int, ReplicatedStateMachine] = {}
        self.batteries: dict[int, list[Any]] = {}
        for number in range(size):
            self.start(number)
        self.settle()

    def start(self, number: int) -> None:
        least = 0.1 + 0.6 * number
        conf = SyncObjConf(
            autoTick=False, bindAddress=self.addresses[number], appendEntriesUseBatch=False, connectionRetryTime=0.05,
            raftMinTimeout=least, raftMaxTimeout=least + 0.01, appendEntriesPeriod=0.02,
        )  # fmt: skip
        others = [address for other, address in enumerate(self.addresses) if other != number]
        self.batteries[number] = self.make()
        self.nodes[number] = ReplicatedStateMachine(
            self.addresses[number], others, self.root / str(number), conf=conf, consumers=self.batteries[number],
            policy=DumpPolicy(trailing_entries=2))

    def stop(self, number: int, *, wiped: bool = False) -> None:
        self.nodes.pop(number).destroy()
        if wiped:
            shutil.rmtree(self.root / str(number))

    def end(self) -> None:
        for number in list(self.nodes):
            self.stop(number)

    def until(self, condition: Callable[[], object]) -> None:
        if not ticked_until(condition, self.nodes.values):
            raise AssertionError([node.failure for node in self.nodes.values()])

    def settle(self) -> None:
        self.until(lambda: all(node.isReady() for node in self.nodes.values()) and len({
            (node._getLeader(), node.raftLastApplied, node.raftCommitIndex, node.journal.last_index)
            for node in self.nodes.values()}) == 1)  # fmt: skip

    def dump(self) -> None:
        for node in self.nodes.values():
            node.forceLogCompaction()
            made = node.dumps
            self.until(lambda node=node, made=made: node.dumps > made or not node._SyncObj__forceLogCompaction)

    def call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Make a call; return the result that its callback is given, or DENIED if it cannot be done."""
        told: list[Any] = []
        method(*arguments, callback=lambda *answer: told.append(answer))
        self.until(lambda: told)
        result, reason = told[0]
        if reason == FAIL_REASON.REQUEST_DENIED:
            return DENIED
        assert reason == FAIL_REASON.SUCCESS
        return result


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(batteries: Callable[[], list[Any]], size: int = 1) -> Cluster:
        made.append(Cluster(tmp_path, batteries, size))
        return made[-1]

    yield make
    for each in made:
        each.end()


def by_model(method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method of PySyncObj's own class directly; return its result, or DENIED if it raises."""
    try:
        return method(*arguments, _doApply=True)
    except (KeyError, TypeError):
        return DENIED


# ---- random calls --------------------------------------------------------------------------------------------

KEYS_USED = ["", "a", "ä", b"", b"a", b"\0\xff", 0, -1, 2**70, None, ("a", 1), ("a", (b"b", None)), True]
VALUES_USED = ["", "text", b"bytes", 0, 1.5, None, [1, {"a": (2,)}], True]


def of_dict(chance: random.Random) -> tuple[str, tuple[Any, ...]]:
    key, value = chance.choice(KEYS_USED), chance.choice(VALUES_USED)
    some = {chance.choice(KEYS_USED): chance.choice(VALUES_USED) for _ in range(chance.randrange(4))}
    kind = chance.choices(["set", "setdefault", "update", "pop", "default", "clear", "reset"], [8, 4, 4, 8, 4, 1, 1])[0]
    return {
        "set": ("set", (key, value)), "setdefault": ("setdefault", (key, value)), "update": ("update", (some,)),
        "pop": ("pop", (key,)), "default": ("pop", (key, value)), "clear": ("clear", ()), "reset": ("reset", (some,)),
    }[kind]  # fmt: skip


def of_set(chance: random.Random) -> tuple[str, tuple[Any, ...]]:
    item, some = chance.choice(KEYS_USED), set(chance.sample(KEYS_USED, chance.randrange(4)))
    kind = chance.choices(["add", "remove", "discard", "update", "clear", "reset"], [8, 6, 6, 4, 1, 1])[0]
    return kind, () if kind == "clear" else (some,) if kind in ("update", "reset") else (item,)


def of_counter(chance: random.Random) -> tuple[str, tuple[Any, ...]]:
    kind = chance.choice(["set", "add", "sub", "inc"])
    return kind, () if kind == "inc" else (chance.choice([0, 1, -7, 2**80, 0.25]),)


def of_queue(chance: random.Random) -> tuple[str, tuple[Any, ...]]:
    if chance.random() < 0.55:
        return "put", (chance.choice(VALUES_USED),)
    return "get", chance.choice([(), ("nothing",)])


def of_priority_queue(chance: random.Random) -> tuple[str, tuple[Any, ...]]:
    if chance.random() < 0.6:  # equal but distinguishable items, so that their order shows
        return "put", (chance.choice([1, 1.0, True, 2, 0, -3, 2.5]),)
    return "get", chance.choice([(), ("nothing",)])


def content(battery: Any) -> Any:
    """Return everything that can be read from a battery of fastsm or of PySyncObj."""
    if hasattr(battery, "rawData"):
        raw = battery.rawData()
        found: Any = dict(raw) if isinstance(raw, dict) else set(raw)
        assert len(battery) == len(found)
        assert all(key in battery for key in found)
        assert ("a" in battery) == ("a" in found)
        if isinstance(found, dict):
            assert {key: battery[key] for key in battery.keys()} == found  # noqa: SIM118  # PySyncObj's has no iteration
            assert sorted(map(repr, battery.values())) == sorted(map(repr, found.values()))
            assert dict(battery.items()) == found
            assert battery.get("no such key", 7) == 7
        return found
    if hasattr(battery, "qsize"):
        return battery.qsize(), battery.empty(), battery.full(), len(battery)
    return battery.get()


KINDS = [
    (FastDict, stock.ReplDict, of_dict, ()),
    (FastSet, stock.ReplSet, of_set, ()),
    (FastCounter, stock.ReplCounter, of_counter, ()),
    (FastQueue, stock.ReplQueue, of_queue, ()),
    (FastQueue, stock.ReplQueue, of_queue, (3,)),
    (FastPriorityQueue, stock.ReplPriorityQueue, of_priority_queue, ()),
    (FastPriorityQueue, stock.ReplPriorityQueue, of_priority_queue, (5,)),
]


@pytest.mark.parametrize(("ours", "theirs", "calls", "arguments"), KINDS)
def test_a_battery_is_what_it_is_in_stock(
    cluster: Callable[..., Cluster], ours: type[Any], theirs: type[Any], calls: Calls, arguments: tuple[Any, ...]
) -> None:
    """A battery has the answers and content of PySyncObj's after each random call, with restarts and dumps."""
    nodes = cluster(lambda: [ours(*arguments)])
    model = theirs(*arguments)
    chance = random.Random(f"{ours.__name__} {arguments}")
    for number in range(250):
        name, given = calls(chance)
        answer = nodes.call(getattr(nodes.batteries[0][0], name), *given)
        expected = by_model(getattr(model, name), *given)
        assert (type(answer), answer) == (type(expected), expected), (number, name, given)
        assert content(nodes.batteries[0][0]) == content(model), (number, name, given)
        if number % 100 == 40:
            nodes.dump()
        if number % 50 == 49:
            nodes.stop(0)
            nodes.start(0)
            nodes.settle()


def test_replicas_have_the_same_batteries(cluster: Callable[..., Cluster]) -> None:
    """All nodes have equal content and state, after calls at every node and a catch-up by a snapshot."""

    def make() -> list[Any]:
        return [FastDict(), FastDict("other", keys=str, values=bytes), FastSet(), FastCounter(), FastQueue(),
                FastPriorityQueue()]  # fmt: skip

    nodes = cluster(make, 3)
    models = [stock.ReplDict(), stock.ReplDict(), stock.ReplSet(), stock.ReplCounter(), stock.ReplQueue(),
              stock.ReplPriorityQueue()]  # fmt: skip
    chance = random.Random(16)
    for number in range(120):
        which = chance.randrange(6)
        if which == 1:
            name, given = "set", (chance.choice("abc"), chance.choice((b"", b"x")))
        else:
            name, given = (of_dict, None, of_set, of_counter, of_queue, of_priority_queue)[which](chance)  # type: ignore[misc]
        at = chance.choice(sorted(nodes.nodes))
        assert nodes.call(getattr(nodes.batteries[at][which], name), *given) == by_model(
            getattr(models[which], name), *given)
        if number == 30:
            nodes.stop(2, wiped=True)
        if number == 70:
            nodes.dump()
            nodes.start(2)
            nodes.settle()
            assert nodes.nodes[2].installs == 1
        if number == 90:
            nodes.stop(1)
            nodes.start(1)
            nodes.settle()
    nodes.settle()
    for number in range(3):
        assert [content(each) for each in nodes.batteries[number]] == [content(each) for each in models]
    assert len({tuple(node.state_machine.items()) for node in nodes.nodes.values()}) == 1
    assert [node.failure for node in nodes.nodes.values()] == [None] * 3


def test_an_operation_is_not_done_twice(cluster: Callable[..., Cluster]) -> None:
    """An entry that the state machine has already is skipped, as after a journal lost its end."""
    nodes = cluster(lambda: [FastCounter(), FastQueue()])
    counter, queue = nodes.batteries[0]
    assert [nodes.call(counter.inc), nodes.call(queue.put, "a"), nodes.call(queue.put, "b")] == [1, True, True]
    assert nodes.call(queue.get) == "a"
    node, journal = nodes.nodes[0], nodes.nodes[0].journal
    for command, index, term in journal.entries(2, 10):
        if command[0] == 0x46:
            assert node._fastsm_apply_chunk([(index, term, command[1:])]) == [None]
    assert (counter.get(), queue.qsize(), nodes.call(queue.get)) == (1, 1, "b")


# ---- operations that cannot be done ----------------------------------------------------------------------


def test_an_operation_that_cannot_be_done_changes_nothing(cluster: Callable[..., Cluster]) -> None:
    """An operation that cannot be done is reported to its callback, stops no node, and changes nothing."""
    nodes = cluster(lambda: [FastSet(), FastPriorityQueue(), FastCounter()])
    items, queue, counter = nodes.batteries[0]
    assert nodes.call(items.remove, "a") == DENIED
    assert nodes.call(items.pop) == DENIED
    assert [nodes.call(queue.put, 1), nodes.call(queue.put, "a"), nodes.call(queue.put, 0)] == [True, DENIED, True]
    assert [nodes.call(queue.get), nodes.call(queue.get), nodes.call(queue.get)] == [0, 1, None]
    assert nodes.call(counter.add, 2**4000) == 2**4000
    assert nodes.call(counter.add, 0.5) == DENIED  # too large to be a float
    assert nodes.call(counter.add, 9 * 10**3999 - 2**4000) == 9 * 10**3999
    assert nodes.call(counter.add, 9 * 10**3999) == DENIED  # not every Python reads so many digits
    with pytest.raises(OverflowError):
        counter.set(10**4000)
    assert (counter.get(), nodes.nodes[0].failure) == (9 * 10**3999, None)


def test_wrong_types_are_refused_at_the_call(cluster: Callable[..., Cluster]) -> None:
    """A wrong type is a ``TypeError`` that names the expected one, before anything is in the log."""
    nodes = cluster(lambda: [FastDict(), FastDict("texts", keys=str, values=str), FastSet(items=bytes), FastCounter()])
    values, texts, items, counter = nodes.batteries[0]
    before = nodes.nodes[0].journal.last_index
    for call, arguments in (
        (values.set, (1.5, "a")), (values.pop, ([],)), (values.reset, ([],)), (values.set, ("a", threading.Lock())),
        (texts.set, (b"a", "a")), (texts.setdefault, ("a", 1)), (items.add, ("a",)), (items.reset, ({}, )),
        (counter.set, ("1",)), (counter.add, (None,)),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            call(*arguments)
    for call, arguments in ((values.set, ("a" * 70_000, 1)), (values.setdefault, ("a" * 70_000, 1))):
        with pytest.raises(fastsm.CommandError):
            call(*arguments)
    with pytest.raises(KeyError, match="nothing"):
        values["nothing"]
    assert nodes.nodes[0].journal.last_index == before
    for wrong in (1, "str", int, object()):
        with pytest.raises(TypeError, match="encode and decode"):
            FastDict(keys=wrong)


def test_two_batteries_of_one_name_are_refused(tmp_path: Path) -> None:
    """Two batteries of one name, which would share their keys, are refused before anything is opened."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ValueError, match="'dict'"):
        ReplicatedStateMachine(address, [], tmp_path / "node", consumers=[FastDict(), FastDict()])
    assert not (tmp_path / "node").exists()
    for name in ("", "a\0b", b"a"):
        with pytest.raises(ValueError, match="name"):
            FastDict(name)  # type: ignore[arg-type]


def test_a_battery_alone_or_on_a_stock_node_says_so() -> None:
    """Using a battery without a node, or on a stock node, raises an error that says what is missing."""
    alone = FastDict()
    with pytest.raises(fastsm.NotRunningError, match="consumers"):
        alone.set("a", 1)
    with pytest.raises(fastsm.NotRunningError, match="consumers"):
        alone.get("a")
    address = f"127.0.0.1:{free_ports(1)[0]}"
    node = SyncObj(address, [], SyncObjConf(autoTick=False, bindAddress=address), consumers=[alone])
    with pytest.raises(TypeError, match="ReplicatedStateMachine"):
        alone.set("a", 1)
    node.destroy()


def test_a_node_without_the_queue_of_an_entry_stops(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    """A node without the priority queue of an entry, which it cannot order, stops with the queue's name."""
    nodes = cluster(lambda: [FastPriorityQueue(name="jobs")], 2)
    nodes.stop(1)
    nodes.make = lambda: []
    nodes.start(1)
    nodes.settle()
    nodes.batteries[0][0].put(1)
    nodes.until(lambda: nodes.nodes[1].failure)
    assert "'jobs'" in str(nodes.nodes[1].failure)
    assert nodes.nodes[0].failure is None


class OneWay:
    """A codec that can read only while `may` is true."""

    may = True

    def encode(self, value: int) -> bytes:
        return b"%d" % value

    def decode(self, data: bytes) -> int:
        if not self.may:
            raise AttributeError("this node has another release of the class")
        return int(data)


def test_an_item_that_only_one_node_cannot_read_stops_that_node(cluster: Callable[..., Cluster]) -> None:
    """A node stops at an item that only it cannot read; put refuses an item that cannot be read back."""
    codecs = [OneWay(), OneWay()]
    given = iter(codecs)
    nodes = cluster(lambda: [FastPriorityQueue(items=next(given))], 2)
    queue = nodes.batteries[0][0]
    assert nodes.call(queue.put, 2)
    codecs[0].may = False
    with pytest.raises(AttributeError):
        queue.put(1)
    codecs[0].may, codecs[1].may = True, False
    queue.put(1)
    nodes.until(lambda: nodes.nodes[1].failure)
    assert "cannot be read" in str(nodes.nodes[1].failure)
    assert nodes.nodes[0].failure is None


MALFORMED = [
    ("add", b""), ("add", b"\xff"), ("add", b"\xff\xff\0\0"), ("queue_put", b"\x01\0\0\0q"),
    ("replace", b"\x00\x00\x01\x00" + bytes(65536)), ("heap_get", b""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "payload"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_operation_changes_nothing(cluster: Callable[..., Cluster], name: str, payload: bytes) -> None:
    """A malformed operation is skipped by every node, and the next one works."""
    nodes = cluster(lambda: [FastCounter()], 2)
    told: list[Any] = []
    nodes.nodes[0].call(f"fastsm.{name}", payload, callback=lambda *answer: told.append(answer))
    nodes.until(lambda: told)
    assert nodes.call(nodes.batteries[1][0].inc) == 1
    nodes.settle()
    assert {tuple(node.state_machine.items()) for node in nodes.nodes.values()} == {((b"counter\0", b"1"),)}
    assert [node.failure for node in nodes.nodes.values()] == [None, None]


# ---- batteries come and go -------------------------------------------------------------------------------


def test_batteries_come_and_go_in_any_order(cluster: Callable[..., Cluster]) -> None:
    """Batteries can be added, removed and reordered, because their content is kept by name."""
    nodes = cluster(lambda: [FastDict(), FastCounter(), stock.ReplCounter()])
    nodes.call(nodes.batteries[0][0].set, "a", 1)
    nodes.call(nodes.batteries[0][1].add, 5)
    nodes.call(nodes.batteries[0][2].add, 7)
    nodes.dump()
    for make, expected in (
        (lambda: [stock.ReplCounter(), FastCounter()], [7, 5]),
        (lambda: [FastQueue(), stock.ReplCounter(), FastDict()], [(0, True, False, 0), 7, {"a": 1}]),
    ):
        nodes.stop(0)
        nodes.make = make
        nodes.start(0)
        nodes.settle()
        assert [content(each) for each in nodes.batteries[0]] == expected
        nodes.dump()


# ---- codecs ----------------------------------------------------------------------------------------------


def test_codecs_give_back_what_they_were_given() -> None:
    """Codecs decode what they encoded; equal keys have equal bytes, and different keys different bytes."""
    encoded: dict[bytes, Any] = {}
    for key in KEYS_USED:
        data = KEYS.encode(key)
        assert KEYS.decode(data) == key
        assert encoded.setdefault(data, key) == key
    for value in [*VALUES_USED, *KEYS_USED, "\ud800"]:
        again = VALUES.decode(VALUES.encode(value))
        assert (type(again), again) == (type(value), value)
    for broken in (b"", b"x", b"t"):
        if broken != b"t":
            with pytest.raises(ValueError, match="expected"):
                KEYS.decode(broken)
            with pytest.raises(ValueError, match="expected"):
                VALUES.decode(broken)


class Hexadecimal:
    """A user's codec."""

    def encode(self, value: int) -> bytes:
        return b"%x" % value

    def decode(self, data: bytes) -> int:
        return int(data, 16)


def test_a_codec_of_the_users_own(cluster: Callable[..., Cluster]) -> None:
    """A user's codec is used for keys, values and items, and its bytes are stored."""
    own = Hexadecimal()
    nodes = cluster(lambda: [FastDict(keys=own, values=own), FastSet(items=own), FastPriorityQueue(items=own)])
    values, items, queue = nodes.batteries[0]
    nodes.call(values.set, 255, 16)
    nodes.call(items.add, 10)
    assert [nodes.call(queue.put, number) for number in (16, 9)] == [True, True]  # by bytes, "10" would be first
    assert (values.rawData(), items.rawData(), nodes.call(queue.get)) == ({255: 16}, {10}, 9)
    assert nodes.nodes[0].get(b"dict\x00ff") == b"10"


