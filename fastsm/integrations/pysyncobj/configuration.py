"""A node's configuration: PySyncObj's, minus what the node does itself, with callbacks that cannot end a tick.

PySyncObj's settings for dumps become the node's :class:`DumpPolicy`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pysyncobj import SyncObjConf

from fastsm.integrations.pysyncobj.waiting import Guarded

NOT_FOR_US = ("journalFile", "fullDumpFile", "serializer", "deserializer", "serializeChecker")
OF_DUMPS = ("logCompactionMinEntries", "logCompactionMinTime", "logCompactionBatchSize")
CALLBACKS = ("onReady", "onStateChanged", "onCodeVersionChanged")
LARGEST_PIECE = 8 << 20
NEVER = 1 << 62  # bytes


class DumpPolicy(NamedTuple):
    """When a node writes a snapshot and shortens its journal.

    It does so if, since its last snapshot,

    - the journal has grown by ``journal_bytes``, and by ``ratio`` times the size of that snapshot; or
    - the journal has ``entries`` entries; or ``most_seconds`` have passed and anything was applied (None: never);

    but at most every ``least_seconds``. The nodes of one cluster do it at 100, 90, 80, 70 and 60 percent of these
    sizes, so that they do not all do it at the same time.

    - ``trailing_entries``: this many entries before a snapshot are kept: a follower that lags less needs no snapshot.
      (A leader also keeps what its connected followers lack, as long as the journal is not too large.)
    - ``piece_bytes``: bytes of a snapshot sent in one message.
    """

    journal_bytes: int = 64 << 20
    ratio: float = 1.0
    least_seconds: float = 5.0
    trailing_entries: int = 100_000
    entries: int | None = None
    most_seconds: float | None = None
    piece_bytes: int = 256 << 10


def configuration(conf: Any, *, names_files: bool = False) -> Any:
    """Returns a view of the caller's configuration, so that later changes by the caller take effect, as in PySyncObj.

    With ``names_files`` its files and serializers are ignored; otherwise setting them is a ``ValueError``.
    """
    conf = SyncObjConf() if conf is None else conf
    members = {name: _guarded(name) for name in CALLBACKS}
    for name in NOT_FOR_US:
        if names_files:
            members[name] = property(lambda conf: None)
        elif getattr(conf, name) is not None:
            raise ValueError(
                f"conf.{name} is set, but the node has its own journal and snapshots, in its directory: leave it unset")
    seen: Any = object.__new__(type(type(conf).__name__, (type(conf),), members))
    seen.__dict__ = conf.__dict__
    return seen


def policy_of(conf: Any, policy: DumpPolicy | None) -> DumpPolicy:
    """Returns the policy that a node was given, or the one that its configuration describes.

    ``logCompactionMinEntries`` and ``logCompactionMinTime`` mean the same as in PySyncObj: a node dumps when its
    journal has that many entries, or when its last dump is that old. Half of the entries, at most 100,000, are kept for
    followers that lag. ``useFork`` and ``logCompactionSplit`` need no counterpart: nothing is forked, and nodes do not
    all dump at the same time.
    """
    usual = SyncObjConf()
    given = [name for name in OF_DUMPS if getattr(conf, name) != getattr(usual, name)]
    if policy is not None:
        if given:
            raise ValueError(
                f"{', '.join(f'conf.{name}' for name in given)}: set, although policy= is given as well, which "
                "determines when a node dumps; use only one of the two")
        return _checked(policy)
    piece = conf.logCompactionBatchSize if "logCompactionBatchSize" in given else DumpPolicy().piece_bytes
    if given in ([], ["logCompactionBatchSize"]):
        return _checked(DumpPolicy(piece_bytes=piece))
    entries, seconds = conf.logCompactionMinEntries, conf.logCompactionMinTime
    return _checked(DumpPolicy(
        journal_bytes=NEVER, least_seconds=min(DumpPolicy().least_seconds, seconds), entries=entries,
        most_seconds=seconds, trailing_entries=min(DumpPolicy().trailing_entries, entries // 2), piece_bytes=piece))


def _checked(policy: DumpPolicy) -> DumpPolicy:
    for name, least in (("journal_bytes", 0), ("ratio", 0), ("least_seconds", 0), ("trailing_entries", 0),
                        ("entries", 2), ("most_seconds", 0), ("piece_bytes", 1)):  # fmt: skip
        value = getattr(policy, name)
        if value is not None and not value >= least:
            raise ValueError(f"policy, {name}={value}: expected at least {least}")
    if policy.piece_bytes > LARGEST_PIECE:
        raise ValueError(f"policy, piece_bytes={policy.piece_bytes}: expected at most {LARGEST_PIECE}")
    return policy


def _guarded(name: str) -> property:
    """Returns a property for an attribute whose value PySyncObj calls as the user's function."""

    def get(conf: Any) -> Any:
        function = conf.__dict__[name]
        return None if function is None else Guarded(function)

    def put(conf: Any, function: Any) -> None:
        conf.__dict__[name] = function

    return property(get, put)
