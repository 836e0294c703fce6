"""A PySyncObj cluster with fastsm as its state machine; see docs/pysyncobj.md. Needs the extra ``fastsm[pysyncobj]``.

Reading order:

    errors           what can go wrong in addition to fastsm's own errors
    compatibility    the names of PySyncObj that all of this is built on
    codecs           keys and values of the batteries, as bytes
    changes          which keys applied entries changed
    operations       what the batteries do beyond the commands of the state machine: procedures
    positions        a Raft log as PySyncObj sees one: a list of (command, index, term)
    journal          PySyncObj's interface of a journal, on fastsm's
    transport        who may join, what leaves when
    replication      entries, from the leader's journal to those of its followers
    places           a node's directory, and how it is brought together again after any end
    waiting          who waits for an answer; functions of the user's that may raise
    configuration    PySyncObj's, without what the node does itself; when a node dumps
    replicated       consumers and replicated methods, by the numbers that entries name them by
    applying         committed entries to the state machine, results to those who wait
    shorthands       a method for each command and each read
    dumping          snapshots: written, sent, installed
    ticking          who leads proposes ticks, and counts the time of locks
    node             ReplicatedStateMachine
    drop_in          FastSyncObj: PySyncObj's own constructor
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
