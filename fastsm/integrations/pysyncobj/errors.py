"""The errors of this integration, in addition to those of fastsm itself."""

from __future__ import annotations

from typing import Any

from pysyncobj import FAIL_REASON, SyncObjException

from fastsm.errors import FastsmError

REASONS = {number: name for name, number in vars(FAIL_REASON).items() if name.isupper()}


class UnsupportedVersionError(FastsmError):
    """This release of PySyncObj lacks a name that the integration is built on, or has changed it."""


class DivergedError(FastsmError):
    """This node has applied an entry that its cluster has not committed, so its state differs from the cluster's.

    Stop it, remove its directory, and start it again: it recovers from a snapshot.
    """


class ConsumersChangedError(FastsmError):
    """Consumers or replicated methods are not those of the snapshot, so entries would call the wrong methods.

    Nothing was changed. The message says what was expected and found, and how a release may add and remove them.
    """


class UnreadableItemError(FastsmError):
    """An entry needs a priority queue, or the codec of one, that this node does not have; this node stops."""


class SubmitError(FastsmError, SyncObjException):  # type: ignore[misc]  # PySyncObj has no types
    """A command has no result. ``errorCode`` is one of ``pysyncobj.FAIL_REASON``, or ``"Timeout"``, as in PySyncObj.

    For a call with ``sync`` in the tick thread, which is refused, it is a sentence that says so.

    After ``QUEUE_FULL``, ``MISSING_LEADER``, ``NOT_LEADER``, ``REQUEST_DENIED`` and ``DISCARDED`` it was not applied;
    after a timeout, ``LEADER_CHANGED`` and ``UNKNOWN_OUTCOME`` it may have been applied, or may still be.
    """

    def __init__(self, reason: Any) -> None:
        SyncObjException.__init__(self, reason)
        self.reason = REASONS.get(reason, str(reason))

    def __str__(self) -> str:
        return f"no result: {self.reason}"
