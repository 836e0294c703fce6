"""A PySyncObj cluster with fastsm as its state machine; see docs/pysyncobj.md. Needs the extra ``fastsm[pysyncobj]``.

Reading order:

    errors           errors in addition to those of fastsm
    compatibility    the names of PySyncObj that the integration is built on
    codecs           keys and values of the batteries, as bytes
    changes          which keys applied entries have changed
    operations       what the batteries do beyond the commands of the state machine: procedures
    positions        a Raft log as PySyncObj sees it: a list of (command, index, term)
    journal          PySyncObj's journal interface, on top of fastsm's
    transport        which nodes may join, and when messages are sent
    replication      entries, from the leader's journal to those of its followers
    places           a node's directory, and restoring its consistency at the start
    waiting          callers that wait for an answer; functions of the user, which may raise
    configuration    PySyncObj's configuration, minus what the node does itself; when a node dumps
    replicated       consumers and replicated methods, by the numbers used in entries
    applying         committed entries to the state machine, results to waiting callers
    shorthands       a method for each command and each read
    dumping          snapshots: written, sent, installed
    ticking          the leader proposes ticks, and counts the time of locks
    node             ReplicatedStateMachine
    drop_in          FastSyncObj, with PySyncObj's own constructor
    battery          what the batteries have in common
    locks            FastLockManager
    batteries        FastDict, FastCounter, FastSet, FastQueue, FastPriorityQueue, FastLockManager
"""

from fastsm.integrations.pysyncobj.changes import Change
from fastsm.integrations.pysyncobj.configuration import DumpPolicy
from fastsm.integrations.pysyncobj.drop_in import FastSyncObj
from fastsm.integrations.pysyncobj.errors import (
    ConsumersChangedError,
    DivergedError,
    SubmitError,
    UnreadableItemError,
    UnsupportedVersionError,
)
from fastsm.integrations.pysyncobj.journal import FastJournal
from fastsm.integrations.pysyncobj.node import ReplicatedStateMachine

__all__ = [
    "Change",
    "ConsumersChangedError",
    "DivergedError",
    "DumpPolicy",
    "FastJournal",
    "FastSyncObj",
    "ReplicatedStateMachine",
    "SubmitError",
    "UnreadableItemError",
    "UnsupportedVersionError",
]
