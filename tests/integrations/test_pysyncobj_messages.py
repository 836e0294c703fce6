"""Messages and wake-ups of a PySyncObj node: fewer messages, system calls and wake-ups per command than stock."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pysyncobj")

from pysyncobj import FAIL_REASON, SyncObjConf
from pysyncobj.pipe_notifier import PipeNotifier
from pysyncobj.tcp_connection import TcpConnection

import fastsm
from fastsm.integrations.pysyncobj import ReplicatedStateMachine, transport
from fastsm.integrations.pysyncobj.transport import FastTransport, encode, is_small
from support.cluster import free_ports
from support.twin_nodes import ticked_until


class Pair:
    """Two nodes that the test ticks; the first one leads, and the messages of each are recorded."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
        self.posted: list[tuple[int, dict[str, Any]]] = []
        self.nodes = [self._make(root, number, settings) for number in range(2)]
        self.until(lambda: all(node.isReady() for node in self.nodes))
        self.settle()

    def _make(self, root: Path, number: int, settings: dict[str, Any]) -> ReplicatedStateMachine:
        pair, posted = self, self.posted

        class Noting(FastTransport):
            def _post(self, node: Any, message: dict[str, Any]) -> None:
                posted.append((number, message))
                super()._post(node, message)

        least = 0.1 + 2 * number
        conf = SyncObjConf(**{
            "autoTick": False, "bindAddress": pair.addresses[number], "appendEntriesUseBatch": False,
            "connectionRetryTime": 0.05, "raftMinTimeout": least, "raftMaxTimeout": least + 0.01,
            "appendEntriesPeriod": 0.02, "connectionTimeout": 20.0, **settings,
        })  # fmt: skip
        return ReplicatedStateMachine(
            pair.addresses[number], [pair.addresses[1 - number]], root / str(number), conf=conf,
            transportClass=Noting)

    def until(self, condition: Any) -> None:
        assert ticked_until(condition, lambda: self.nodes), [node.failure for node in self.nodes]

    def settle(self) -> None:
        self.until(lambda: len({(node.raftLastApplied, node.journal.last_index) for node in self.nodes}) == 1
                   and self.nodes[0]._isLeader() and self.nodes[1]._getLeader() is not None)  # fmt: skip

    def types(self, number: int) -> list[str]:
        return [message["type"] for sender, message in self.posted if sender == number]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    for node in made.nodes:
        node.destroy()


# ---- messages --------------------------------------------------------------------------------------------


def test_commands_that_wait_leave_together(pair: Pair) -> None:
    """Waiting commands are sent together: one message to a follower has all entries, one of a follower all commands."""
    answered: list[Any] = []
    for number, sender in ((0, pair.nodes[0]), (1, pair.nodes[1])):
        pair.settle()
        pair.posted.clear()
        for key in range(500):
            sender.put(b"key-%d" % key, b"%d" % number, callback=lambda *answer: answered.append(answer))
        pair.until(lambda number=number: len(answered) == 500 * (number + 1))
        with_entries = [len(message["entries"]) for _, message in pair.posted if message.get("entries")]
        assert sum(with_entries) >= 500
        assert len(with_entries) <= 20
        assert pair.types(1).count("apply_command") == 0
        assert pair.types(1).count(transport.SEVERAL) <= 20
    assert answered == [(True, 0)] * 1000
    pair.settle()
    assert [node.get(b"key-499") for node in pair.nodes] == [b"1", b"1"]


def test_large_commands_are_sent_immediately(pair: Pair) -> None:
    """Small and large commands of a follower are answered in the order of their calls."""
    answered: list[int] = []
    sizes = [10, 5000, 10, 2 << 20, 10, 10, 70_000, 10]
    for number, size in enumerate(sizes):
        value = b"%d" % number + bytes(size)
        pair.nodes[1].put(b"key", value, callback=lambda *_, number=number: answered.append(number))
    pair.until(lambda: len(answered) == len(sizes))
    assert answered == list(range(len(sizes)))
    pair.settle()
    assert {node.get(b"key") for node in pair.nodes} == {b"7" + bytes(10)}


def test_a_follower_does_not_say_the_same_twice_in_a_moment(pair: Pair) -> None:
    """A follower does not repeat a reply within a moment, and repeats it soon if the leader hears nothing else."""
    pair.nodes[1].conf.appendEntriesPeriod = 1000.0  # so that the moment lasts as long as the test
    pair.nodes[1].conf.leaderFallbackTimeout = 5000.0
    pair.settle()
    replies = []
    for number in range(20):
        pair.posted.clear()
        last = pair.nodes[0].journal.last_index
        pair.nodes[0].put(b"%d" % number, b"")
        pair.until(lambda last=last: pair.nodes[0].raftLastApplied > last)
        pair.settle()
        replies.append(pair.types(1).count("next_node_idx"))
    assert replies == [1] * 20
    pair.nodes[1].conf.appendEntriesPeriod = 0.02
    pair.posted.clear()
    pair.until(lambda: pair.types(1).count("next_node_idx") >= 3)


def test_a_reply_that_was_lost_with_its_connection_is_made_again(pair: Pair) -> None:
    """After a reconnection a follower sends its reply again, because it may be lost with the old connection."""
    pair.nodes[1].conf.appendEntriesPeriod = 1000.0
    pair.nodes[1].conf.leaderFallbackTimeout = 5000.0
    pair.settle()
    leader = pair.nodes[1]._getLeader()
    said = dict(pair.nodes[1]._fastsm_said)
    assert leader in said
    pair.nodes[1]._fastsm_transport.disconnect(leader)
    assert leader not in pair.nodes[1]._fastsm_said
    pair.posted.clear()
    pair.until(lambda: "next_node_idx" in pair.types(1))


@pytest.mark.parametrize("messages", [None, 7, [None], [{"type": "nonsense"}], [{"no": "type"}, 5]], ids=repr)
def test_several_messages_that_make_no_sense(pair: Pair, messages: Any) -> None:
    """Invalid messages end the connection, but not the node."""
    node, peer = pair.nodes[0], next(iter(pair.nodes[0].otherNodes))
    node._fastsm_transport._onMessageReceived(peer, {"type": transport.SEVERAL, "messages": messages})
    told: list[Any] = []
    node.put(b"a", b"b", callback=lambda *answer: told.append(answer))
    pair.until(lambda: told)
    assert told == [(True, 0)]
    assert [each.failure for each in pair.nodes] == [None, None]


@pytest.mark.parametrize("first", [{}, {"type": "append_entries"}, [], [{}], [[]], 7, "nobody", b"\xff"], ids=repr)
def test_a_first_message_that_makes_no_sense(pair: Pair, first: Any) -> None:
    """A peer whose first message is invalid is disconnected, and the node continues."""
    host, port = pair.addresses[0].split(":")
    with socket.create_connection((host, int(port))) as stranger:
        content = encode(first)
        stranger.sendall(struct.pack("i", len(content)) + content)
        stranger.setblocking(False)
        ended: list[bytes] = []

        def is_ended() -> bool:
            try:
                ended.append(stranger.recv(1000))
            except BlockingIOError:
                return False
            except ConnectionError:
                return True
            return not ended[-1]

        pair.until(is_ended)
    told: list[Any] = []
    pair.nodes[0].put(b"a", b"b", callback=lambda *answer: told.append(answer))
    pair.until(lambda: told)
    assert (told, pair.nodes[0].failure) == ([(True, 0)], None)


def test_a_connection_that_ends_while_the_address_is_sent(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a connection that ends while the address is sent, the next one sends the address first."""
    first_messages: list[Any] = []
    take = FastTransport._onIncomingMessageReceived
    send, broken = TcpConnection.send, [True]

    def noting(self: Any, conn: Any, message: Any) -> None:
        first_messages.append(message)
        take(self, conn, message)

    def breaking(self: Any, message: Any) -> None:
        if broken.pop() if broken else False:
            self.disconnect()  # as if the other side reset it: PySyncObj reconnects immediately
            return
        send(self, message)

    for node in pair.nodes:
        node.conf.connectionRetryTime = 0.0
    pair.settle()
    monkeypatch.setattr(FastTransport, "_onIncomingMessageReceived", noting)
    monkeypatch.setattr(TcpConnection, "send", breaking)
    caller = pair.nodes[pair.addresses.index(max(pair.addresses))]
    caller._fastsm_transport.disconnect(next(iter(caller.otherNodes)))
    pair.until(lambda: not broken and first_messages and all(node.hasQuorum for node in pair.nodes))
    pair.settle()
    assert set(first_messages) == {max(pair.addresses)}
    assert [node.failure for node in pair.nodes] == [None, None]


@pytest.mark.parametrize("size", [0, 1, 900, 1023, 1024, 5000, 300_000])
def test_every_message_is_read_as_pysyncobj_reads_it(size: int) -> None:
    """Every message, compressed or not, is read as PySyncObj reads it."""
    for content in (bytes(size), os.urandom(size)):
        message = {"type": "append_entries", "entries": [(content, 1, 1)]}
        assert fastsm.integrations.pysyncobj.transport.pickle.loads(zlib.decompress(encode(message))) == message


def test_small_and_large_messages_are_distinguished() -> None:
    """Single small entries and commands count as small; pieces, large entries and many entries do not."""
    entry = (bytes(10), 1, 1)
    assert is_small({"type": "append_entries", "entries": [entry]})
    assert is_small({"type": "apply_command", "command": bytes(100)})
    for large in (
        {"entries": [entry] * 5}, {"entries": [(bytes(2000), 1, 1)]}, {"entries": [], "piece": b""},
        {"entries": [], "entry": (1, 1, b"", True, True)}, {"command": bytes(2000)},
    ):
        assert not is_small({"type": "append_entries", **large})


# ---- wake-ups --------------------------------------------------------------------------------------------


def test_many_commands_wake_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many commands between two looks at the queue write to the pipe once; commands in a message do not."""
    pair.settle()
    wakes: list[PipeNotifier] = []

    def notify(notifier: PipeNotifier) -> None:
        wakes.append(notifier)

    monkeypatch.setattr(PipeNotifier, "notify", notify)
    told: list[Any] = []
    for _ in range(3):
        for _ in range(100):
            pair.nodes[1].put(b"a", b"b", callback=lambda *answer: told.append(answer))
        pair.until(lambda: len(told) % 100 == 0 and told)
        told.clear()
    assert wakes == [pair.nodes[1]._SyncObj__pipeNotifier] * 3


def test_no_command_is_left_asleep(pair: Pair) -> None:
    """However threads and ticks interleave, a sleeping tick is woken by a command after its look at the queue."""
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            pair.nodes[0].doTick(20.0)

    def tick_other() -> None:
        while not stop.is_set():
            pair.nodes[1].doTick(0.001)

    threads = [threading.Thread(target=each) for each in (tick, tick_other)]
    for thread in threads:
        thread.start()
    try:
        for number in range(300):
            assert pair.nodes[0].put(b"%d" % number, b"", sync=True, timeout=15) is True
    finally:
        stop.set()
        pair.nodes[0].put(b"last", b"")
        for thread in threads:
            thread.join()


def test_commands_left_by_a_full_look_at_the_queue_wake_again(pair: Pair) -> None:
    """If a look at the queue ends by its time limit, the next tick does not sleep before the rest."""
    node = pair.nodes[0]
    pair.settle()
    node._fastsm_woken = False
    node.conf.appendEntriesPeriod = 0.0
    node._checkCommandsToApply()
    assert node._fastsm_woken


def test_a_flood_of_commands_goes_in_pieces(pair: Pair) -> None:
    """A follower forwards a flood of commands in several messages, so that the leader can do other work."""
    pair.settle()
    pair.posted.clear()
    told: list[Any] = []
    for _ in range(3000):
        pair.nodes[1].put(b"key", bytes(900), callback=lambda *answer: told.append(answer))
    pair.until(lambda: len(told) == 3000)
    sizes = [len(message["messages"]) for sender, message in pair.posted if message["type"] == transport.SEVERAL]
    assert max(sizes) <= transport.MANY
    assert told == [(True, 0)] * 3000


# ---- connections -----------------------------------------------------------------------------------------


def no_descriptor(*_: Any) -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_connection_that_cannot_be_opened_stops_no_node(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that cannot be opened for lack of descriptors is retried, and the node continues."""
    caller = pair.nodes[pair.addresses.index(max(pair.addresses))]
    called = next(node for node in pair.nodes if node is not caller)
    for node in pair.nodes:
        node.conf.connectionRetryTime = 0.0
    with monkeypatch.context() as patch:
        patch.setattr(TcpConnection, "connect", no_descriptor)
        called._fastsm_transport.disconnect(caller.selfNode)
        pair.until(lambda: not caller.hasQuorum)
        for _ in range(10):
            caller.doTick(0.001)
    pair.until(lambda: all(node.hasQuorum for node in pair.nodes))
    assert [node.failure for node in pair.nodes] == [None, None]


def test_a_server_that_could_not_accept_listens_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that could not accept listens again; PySyncObj's own would stay closed."""
    caller = pair.nodes[pair.addresses.index(max(pair.addresses))]
    called = next(node for node in pair.nodes if node is not caller)
    for node in pair.nodes:
        node.conf.connectionRetryTime = node.conf.bindRetryTime = 0.0
    server = called._fastsm_transport._server
    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "accept", no_descriptor)
        caller._fastsm_transport.disconnect(called.selfNode)
        pair.until(lambda: server._TcpServer__fileno is None)
    pair.until(lambda: all(node.hasQuorum for node in pair.nodes))
    pair.settle()
    assert [node.failure for node in pair.nodes] == [None, None]


def test_an_older_connection_of_a_node_is_ended(pair: Pair) -> None:
    """A new connection of a node ends its older one, which the other side may have forgotten."""
    caller = pair.nodes[pair.addresses.index(max(pair.addresses))]
    called = next(node for node in pair.nodes if node is not caller)
    connection = caller._fastsm_transport._connections[called.selfNode]
    older = connection._TcpConnection__socket
    caller.conf.connectionRetryTime = 0.0
    connection._TcpConnection__poller.unsubscribe(connection.fileno())
    connection._TcpConnection__socket = None  # the other side does not learn of it
    connection.disconnect()
    pair.until(lambda: all(node.hasQuorum for node in pair.nodes))
    pair.settle()

    def ended() -> bool:
        try:
            while older.recv(1 << 16):
                pass
        except BlockingIOError:
            return False
        return True

    pair.until(ended)
    older.close()
    assert [node.failure for node in pair.nodes] == [None, None]


@pytest.mark.parametrize("command", [b"", "text", None, 7, [b"\x46"]], ids=repr)
def test_a_forwarded_command_that_makes_no_sense(pair: Pair, command: Any) -> None:
    """An invalid forwarded command ends the connection, but not the leader."""
    leader, follower = pair.nodes
    leader._fastsm_transport._onMessageReceived(follower.selfNode, {"type": "apply_command", "command": command})
    for _ in range(5):
        leader.doTick(0.001)
    assert (leader.failure, leader._isLeader()) == (None, True)
    pair.settle()


def test_a_burst_is_committed_in_one_step(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst is committed without a look at each entry, which PySyncObj would take."""
    looked: list[int] = []
    original = ReplicatedStateMachine._SyncObj__getEntries

    def looking(node: Any, first: int, count: int | None = None, most: int | None = None) -> Any:
        looked.append(first)
        return original(node, first, count, most)

    pair.settle()
    monkeypatch.setattr(ReplicatedStateMachine, "_SyncObj__getEntries", looking)
    told: list[Any] = []
    for number in range(2000):
        pair.nodes[0].put(b"%d" % number, b"", callback=lambda *answer: told.append(answer))
    pair.until(lambda: len(told) == 2000)
    assert told == [(True, 0)] * 2000
    assert len(looked) < 400  # a few per message, not one per entry


# ---- commands in flight ----------------------------------------------------------------------------------


def test_commands_wait_for_the_connection_to_the_leader(pair: Pair) -> None:
    """A follower without a connection to the leader keeps commands until there is one."""
    leader, follower = pair.nodes
    told: list[Any] = []
    for node in pair.nodes:
        node.conf.connectionRetryTime = 1000.0
    follower._fastsm_transport.disconnect(leader.selfNode)
    pair.until(lambda: not leader.hasQuorum and not follower.hasQuorum)
    for number in range(10):
        follower.put(b"%d" % number, b"", callback=lambda *answer: told.append(answer))
        follower.doTick(0)
    assert (told, follower._getLeader()) == ([], leader.selfNode)
    for node in pair.nodes:
        node.conf.connectionRetryTime = 0.0
        node._fastsm_transport._lastConnectAttempt.clear()
    pair.until(lambda: len(told) == 10)
    assert told == [(True, 0)] * 10


def test_calls_in_flight_are_answered_when_the_connection_to_the_leader_ends(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the connection to the leader ends, callers of commands in flight get an unknown outcome."""
    leader, follower = pair.nodes
    told: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(FastTransport, "_post", lambda *_: None)  # lost on the way
        follower.put(b"a", b"b", callback=lambda *answer: told.append(answer))
        follower.doTick(0)
    for node in pair.nodes:
        node.conf.connectionRetryTime = 0.0
    follower._fastsm_transport.disconnect(leader.selfNode)
    pair.until(lambda: told)
    assert told == [(None, FAIL_REASON.UNKNOWN_OUTCOME)]
    assert leader._isLeader()
    follower.put(b"a", b"c", callback=lambda *answer: told.append(answer))
    pair.until(lambda: len(told) == 2)
    assert (told[1], leader.get(b"a")) == ((True, 0), b"c")
