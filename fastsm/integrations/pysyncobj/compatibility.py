"""The names of PySyncObj that the integration is built on, and whether the installed release has all of them.

Most are private, so they are checked, with their signatures, before a node is made.

All times in the integration, except those of held locks, are from ``pysyncobj.monotonic``. It is not
``time.monotonic``, which is adjusted to real time, but the raw clock: after a month they differ by seconds, which must
not delay a heartbeat.
"""

from __future__ import annotations

import inspect

import pysyncobj.fast_queue
import pysyncobj.journal
import pysyncobj.pipe_notifier
import pysyncobj.syncobj
import pysyncobj.tcp_connection
import pysyncobj.tcp_server
import pysyncobj.transport
from pysyncobj.version import VERSION

from fastsm.integrations.pysyncobj.errors import UnsupportedVersionError

WORKING = ("0.3.16", "0.3.17")

METHODS = {
    pysyncobj.syncobj.SyncObj: {
        "_onTick": "timeToWait",
        "_doDestroy": "",
        "_applyCommand": "command callback commandType",
        "_checkCommandsToApply": "",
        "_SyncObj__callErrCallback": "err callback",
        "_SyncObj__applyLogEntries": "",
        "_SyncObj__doApplyCommand": "command",
        "_SyncObj__onMessageReceived": "node message",
        "_SyncObj__onNodeConnected": "node",
        "_SyncObj__onNodeDisconnected": "node",
        "_SyncObj__onReadonlyNodeDisconnected": "node",
        "_SyncObj__sendNextNodeIdx": "node reset nextNodeIdx success",
        "_SyncObj__sendAppendEntries": "",
        "_SyncObj__getEntries": "fromIDx count maxSizeBytes",
        "_SyncObj__tryLogCompaction": "",
        "_SyncObj__loadDumpFile": "clearJournal",
        "_SyncObj__onBecomeLeader": "",
        "_SyncObj__onSetCodeVersion": "newVersion",
        "_SyncObj__updateClusterConfiguration": "newNodes",
    },
    pysyncobj.transport.TCPTransport: {
        "send": "node message",
        "destroy": "",
        "_onNodeConnected": "node",
        "_onNodeDisconnected": "node",
        "_onReadonlyNodeConnected": "node",
        "_onReadonlyNodeDisconnected": "node",
        "_onTick": "",
        "_connectIfNecessarySingle": "node",
        "_onMessageReceived": "node message",
        "_onIncomingMessageReceived": "conn message",
        "_sendSelfAddress": "conn",
    },
    pysyncobj.tcp_connection.TcpConnection: {
        "send": "message",
        "disconnect": "",
        "getSendBufferSize": "",
        "_TcpConnection__trySendBuffer": "",
        "_TcpConnection__processConnection": "descr eventType",
    },
    pysyncobj.fast_queue.FastQueue: {
        "put_nowait": "value",
        "get_nowait": "",
    },
    pysyncobj.tcp_server.TcpServer: {
        "bind": "",
        "unbind": "",
    },
    pysyncobj.journal.Journal: {
        "add": "command idx term",
        "clear": "",
        "deleteEntriesFrom": "entryFrom",
        "deleteEntriesTo": "entryTo",
        "setRaftCommitIndex": "raftCommitIndex",
        "getRaftCommitIndex": "",
        "setCurrentTerm": "term votedForNodeId",
        "getCurrentTerm": "",
        "getVotedForNodeId": "",
        "onOneSecondTimer": "",
        "_destroy": "",
    },
}

# Attributes that their constructors set, and the integration reads or sets.
ATTRIBUTES = {
    pysyncobj.syncobj.SyncObj: (
        "raftLog", "raftState", "raftLeader", "raftLastApplied", "raftCommitIndex", "raftCurrentTerm", "raftNextIndex",
        "raftMatchIndex", "otherNodes", "readonlyNodes", "connectedNodes", "commandsWaitingCommit", "transport",
        "newAppendEntriesTime", "consumers", "needLoadDumpFile", "leaderCommitIndex", "forceLogCompaction",
        "destroying", "properies", "selfNode", "enabledCodeVersion", "mainThread", "onReadyCalled",
        "onTickCallbacks", "conf", "lastResponseTime", "commandsQueue", "pipeNotifier", "onTickCallbacksLock",
        "commandsWaitingReply",
    ),
    pysyncobj.tcp_connection.TcpConnection: ("writeBuffer", "poller", "socket"),
    pysyncobj.tcp_server.TcpServer: ("state",),
    pysyncobj.fast_queue.FastQueue: ("queue", "maxSize"),
    pysyncobj.pipe_notifier.PipeNotifier: ("pipeR", "pipeW"),
}  # fmt: skip


def missing() -> list[str]:
    """Returns what the installed release lacks or has changed; empty for one that works."""
    found = []
    for owner, methods in METHODS.items():
        for name, parameters in methods.items():
            method = getattr(owner, name, None)
            expected = parameters.split()
            if method is None:
                found.append(f"{owner.__name__}.{name}")
            elif list(inspect.signature(method).parameters)[1:] != expected:
                found.append(f"{owner.__name__}.{name}({', '.join(expected)})")
    for owner, attributes in ATTRIBUTES.items():
        set_there = owner.__init__.__code__.co_names
        mangled = (f"_{owner.__name__}__{name}" for name in attributes)
        found += [f"{owner.__name__}.{name}" for name in mangled if name not in set_there]
    return found


def require() -> None:
    """Raises ``UnsupportedVersionError`` unless every name exists."""
    lacking = missing()
    if lacking:
        raise UnsupportedVersionError(
            f"PySyncObj {VERSION} lacks names that fastsm is built on ({', '.join(lacking)}); "
            f"install one of {', '.join(WORKING)}"
        )
