"""The nodes' connections: which nodes may join, when messages are sent, and a wire format that keeps bytes."""

from __future__ import annotations

import logging
import pickle
import struct
import zlib
from typing import Any

from pysyncobj import monotonic as clock
from pysyncobj.poller import POLL_EVENT_TYPE
from pysyncobj.tcp_connection import CONNECTION_STATE
from pysyncobj.tcp_server import SERVER_STATE
from pysyncobj.transport import TCPTransport, TransportNotReadyError

logger = logging.getLogger("fastsm")

WIRE_VERSION = 3
GREETING = "fastsm"
SEVERAL = "several"  # the type of a message that contains others, to be taken in order
READ_ONLY = "readonly"  # in `refused`: all read-only nodes, since each connection has another number
WITHOUT_FASTSM = "it runs PySyncObj without fastsm, and would skip every command"
# Messages that promise something, which must be durable before they are sent.
PROMISES = frozenset(("next_node_idx", "request_vote", "response_vote"))
LARGE = 192 << 10  # bytes; larger messages are not compressed: pieces of a snapshot or of a large command
SMALL = 1 << 10  # bytes; smaller messages are not worth compressing: setting zlib up for them takes 15 µs
SAMPLE = 4 << 10  # bytes of a message that show whether the rest is worth compressing
FEW = 4  # entries, in a message that is sent together with others
MANY = 500  # messages sent together, at most: a large message delays its reader's other work
ALL_EVENTS = POLL_EVENT_TYPE.READ | POLL_EVENT_TYPE.WRITE | POLL_EVENT_TYPE.ERROR


class FastTransport(TCPTransport):  # type: ignore[misc]  # PySyncObj has no types
    """PySyncObj's transport for nodes that speak the same version of fastsm's commands.

    Each side of a new connection sends a greeting with its version. PySyncObj is told of the other node once a matching
    greeting has arrived; until then nothing from it is passed on, and nothing is sent to it. A node that sends anything
    else (one without fastsm), or another version, is logged, listed in ``refused``, and disconnected.

    With ``holding``, messages that promise something wait for ``release``. Between ``gather`` and ``send_gathered``,
    small messages to one node are combined: each message costs a system call here, and another one and a wake-up there.
    """

    def __init__(self, *arguments: Any) -> None:
        self.holding = False
        self.refused: dict[str, str] = {}
        self._greeted: set[Any] = set()
        # Read-only nodes that have not greeted yet, and since when they have been connected
        self._silent: dict[Any, float] = {}
        self._held: list[tuple[Any, dict[str, Any]]] = []
        self._gathered: dict[Any, list[dict[str, Any]]] | None = None
        self._not_listening_before = 0.0  # when to bind the server again, at the earliest
        self._ended: Any = None  # a connection that ended while this node's address was being sent on it
        self._encoded: tuple[Any, bytes] = None, b""  # the last message: the next follower often gets the same one
        super().__init__(*arguments)

    def tryGetReady(self) -> None:
        try:
            super().tryGetReady()
        except TransportNotReadyError as error:
            if self._syncObj._SyncObj__conf.autoTick:  # otherwise PySyncObj's constructor raises
                self._syncObj._fastsm_end_unbound(error)
            raise

    # ---- who may join ----------------------------------------------------------------------------------

    def _onIncomingMessageReceived(self, conn: Any, message: Any) -> None:
        """Takes the first messages of a connection, from any sender: none of them may end the tick."""
        try:
            known = self._nodeAddrToNode.get(message) if isinstance(message, str) else None
            older = self._connections.get(known)
            super()._onIncomingMessageReceived(conn, message)
        except Exception:
            logger.exception("the first message of a connection is malformed; the connection is closed")
            conn.disconnect()
        else:
            if older is not None and older is not conn and self._connToNode(older) is None:
                older.disconnect()  # PySyncObj forgets it without closing it: the other side has begun a new one

    def _connectIfNecessarySingle(self, node: Any) -> bool:
        """Connects to a node; if that fails now (for example without a free descriptor), it is tried again later.

        Called whenever a connection has ended, in the middle of a tick.
        """
        try:
            return bool(super()._connectIfNecessarySingle(node))
        except Exception as error:
            logger.warning("no connection to %s: %s", node.id, error)
            return False

    def _sendSelfAddress(self, conn: Any) -> None:
        socket = conn._TcpConnection__socket
        super()._sendSelfAddress(conn)
        if conn._TcpConnection__socket is socket:
            return
        # It has ended, and PySyncObj would consider a replacement that is still connecting to be connected.
        self._ended, node = conn, self._connToNode(conn)
        self._preventConnectNodes.add(node)
        conn.disconnect()
        self._preventConnectNodes.discard(node)

    def _onNodeConnected(self, node: Any) -> None:
        ended, self._ended = self._ended, None
        if ended is not None and ended is self._connections.get(node):
            return  # a greeting now would precede the address on the next connection
        self._onNodeDisconnected(node)  # of an older connection
        self._post(node, {"type": GREETING, "version": WIRE_VERSION})

    def _onNodeDisconnected(self, node: Any) -> None:
        if node in self._greeted:
            self._greeted.discard(node)
            super()._onNodeDisconnected(node)

    def _onReadonlyNodeConnected(self, node: Any) -> None:
        self._silent[node] = clock.monotonic()
        self._post(node, {"type": GREETING, "version": WIRE_VERSION})

    def _onReadonlyNodeDisconnected(self, node: Any) -> None:
        self._connections.pop(node, None)  # it comes back under another name
        self._held = [(target, message) for target, message in self._held if target != node]
        if node in self._greeted:
            self._greeted.discard(node)
            super()._onReadonlyNodeDisconnected(node)
        elif self._silent.pop(node, None) is not None:
            self._note_refusal(READ_ONLY, WITHOUT_FASTSM)

    def _onTick(self) -> None:
        super()._onTick()
        if self._ready and self._server is not None and self._server._TcpServer__state == SERVER_STATE.UNBINDED:
            self._listen_again()
        if self._silent:  # a node without fastsm waits for the first entry forever
            late = clock.monotonic() - self._syncObj.conf.connectionTimeout
            for node in [node for node, since in self._silent.items() if since < late]:
                self.disconnect(node)

    def _listen_again(self) -> None:
        """Binds the server again, which PySyncObj has closed for good because a connection could not be accepted."""
        now = clock.monotonic()
        if now < self._not_listening_before or self._syncObj._SyncObj__destroying:
            return
        self._not_listening_before = now + self._syncObj.conf.bindRetryTime
        try:
            self._server.bind()
        except OSError as error:
            logger.warning("the node's address cannot be bound again: %s", error)
            self._server.unbind()

    def _onMessageReceived(self, node: Any, message: Any) -> None:
        if node in self._greeted:
            self._pass_on(node, message)
            return
        kind = message.get("type") if isinstance(message, dict) else None
        if kind != GREETING:
            self._refuse(node, WITHOUT_FASTSM)
        elif message.get("version") != WIRE_VERSION:
            self._refuse(node, f"it speaks version {message.get('version')}, this node version {WIRE_VERSION}")
        elif self._silent.pop(node, None) is not None:
            self.refused.pop(READ_ONLY, None)
            self._greeted.add(node)
            super()._onReadonlyNodeConnected(node)
        else:
            self.refused.pop(node.id, None)
            self._greeted.add(node)
            super()._onNodeConnected(node)

    def _pass_on(self, node: Any, message: Any) -> None:
        """Passes a message, or each of several combined ones, to the node."""
        messages = message.get("messages") if isinstance(message, dict) and message.get("type") == SEVERAL else None
        for each in messages if isinstance(messages, list) else (message,):
            super()._onMessageReceived(node, each)

    def _refuse(self, node: Any, reason: str) -> None:
        self._note_refusal(READ_ONLY if self._silent.pop(node, None) is not None else node.id, reason)
        self.disconnect(node)

    def _note_refusal(self, name: str, reason: str) -> None:
        if self.refused.get(name) != reason:
            logger.error("node %s is refused: %s", name, reason)
        self.refused[name] = reason

    def dropNode(self, node: Any) -> None:
        """Forgets a node that leaves the cluster.

        PySyncObj removes the connection first, so it would never be told that the node is disconnected.
        """
        self._onNodeDisconnected(node)
        super().dropNode(node)
        self.refused.pop(node.id, None)
        self._held = [(target, message) for target, message in self._held if target != node]

    def disconnect(self, node: Any) -> None:
        """Closes the connection to a node, if there is one; a new one is tried later."""
        connection = self._connections.get(node)
        if connection is not None:
            connection.disconnect()

    # ---- when messages are sent ------------------------------------------------------------------------

    def send(self, node: Any, message: dict[str, Any]) -> bool:
        """Sends or holds a message; returns False if there is no connection to that node."""
        if not self.reaches(node):
            return False
        if self.holding and message["type"] in PROMISES:
            self._held.append((node, message))
            return True
        if self._gathered is not None:
            waiting = self._gathered.setdefault(node, [])
            if is_small(message) and len(waiting) < MANY:
                waiting.append(message)
                return True
            self._post_all(node, self._gathered.pop(node))
        self._post(node, message)
        return self.reaches(node)

    def gather(self) -> None:
        """Makes small messages wait for `send_gathered` from here on."""
        if self._gathered is None:
            self._gathered = {}

    def send_gathered(self) -> None:
        """Sends what was gathered."""
        gathered, self._gathered = self._gathered or {}, None
        for node, messages in gathered.items():
            if self.reaches(node):
                self._post_all(node, messages)

    def _post_all(self, node: Any, messages: list[dict[str, Any]]) -> None:
        if messages:
            self._post(node, messages[0] if len(messages) == 1 else {"type": SEVERAL, "messages": messages})

    def reaches(self, node: Any) -> bool:
        """Returns whether that node is connected, and may join."""
        connection = self._connections.get(node)
        return node in self._greeted and connection is not None and connection.state == CONNECTION_STATE.CONNECTED

    @property
    def held(self) -> bool:
        """Returns whether messages are being held."""
        return bool(self._held)

    def release(self) -> None:
        """Sends what was held, since it is durable now."""
        held, self._held = self._held, []
        for node, message in held:
            if self.reaches(node):
                self._post(node, message)

    def backlog(self, node: Any) -> int:
        """Returns the bytes that the system has not taken yet."""
        connection = self._connections.get(node)
        return 0 if connection is None else int(connection.getSendBufferSize())

    def _post(self, node: Any, message: dict[str, Any]) -> None:
        """Does what ``TcpConnection.send`` does, but keeps bytes as bytes, and sends later what does not fit now."""
        connection = self._connections[node]
        if connection.sendRandKey:
            data = encode((connection.sendRandKey, message))
        else:
            if self._encoded[0] is not message:
                self._encoded = message, encode(message)
            data = self._encoded[1]
        if connection.encryptor:
            data = connection.encryptor.encrypt_at_time(data, int(clock.monotonic()))
        connection._TcpConnection__writeBuffer += struct.pack("i", len(data)) + data
        connection._TcpConnection__trySendBuffer()
        if connection.getSendBufferSize() and connection.state == CONNECTION_STATE.CONNECTED:
            connection._TcpConnection__poller.subscribe(
                connection.fileno(), connection._TcpConnection__processConnection, ALL_EVENTS
            )

    def destroy(self) -> None:
        self._held.clear()
        self._greeted.clear()
        self._silent.clear()
        super().destroy()


def transport_class(given: type[Any]) -> type[FastTransport]:
    """Returns a subclass of the user's own class and of fastsm's; methods of the user's class come first."""
    if not (isinstance(given, type) and issubclass(given, TCPTransport)):
        raise TypeError(f"expected a subclass of pysyncobj.transport.TCPTransport as transportClass, found {given!r}")
    if issubclass(given, FastTransport):
        return given
    return FastTransport if given is TCPTransport else type(given.__name__, (given, FastTransport), {})


def is_small(message: dict[str, Any]) -> bool:
    """Returns whether a message may wait for others, to be sent together with them."""
    entries = message.get("entries", ())
    if "piece" in message or "entry" in message or len(entries) > FEW:
        return False
    return sum(len(entry[0]) for entry in entries) + len(message.get("command", b"")) < SMALL


def encode(content: Any) -> bytes:
    """Encodes a message as its reader expects it; readers accept any pickle protocol and compression level.

    Small, large and hardly compressible messages are sent uncompressed: compressing them took half of a leader's time.
    """
    data = pickle.dumps(content, 5)
    size = len(data)
    if size < SMALL:  # one uncompressed block
        return b"\x78\x01\x01" + struct.pack("<HH", size, size ^ 0xFFFF) + data + struct.pack(">I", zlib.adler32(data))
    hardly = len(data) > SAMPLE and 2 * len(zlib.compress(data[:SAMPLE], 1)) > SAMPLE
    return zlib.compress(data, 0 if hardly or len(data) > LARGE else 1)
