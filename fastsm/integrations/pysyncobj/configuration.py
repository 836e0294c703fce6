"""A node's configuration: PySyncObj's, without what the node does itself, and with callbacks that cannot end a tick.

What PySyncObj's configuration says of dumps becomes the node's :class:`DumpPolicy`.
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

    It does when, since its last snapshot,

    - ``journal_bytes`` have come, and ``ratio`` times the size of that snapshot; or
    - the journal has reached ``entries``; or ``most_seconds`` have passed and anything was applied (None: never);

    but not more often than every ``least_seconds``. Nodes of one cluster differ by some percent, so as not to do it all
    at the same time.

    - ``trailing_entries``: so many entries before a snapshot are kept: a follower that lags less needs no snapshot.
      (A leader also keeps what its connected followers lack, as long as the journal is not too large.)
    - ``piece_bytes``: of a snapshot that is sent, in one message.
    """

    journal_bytes: int = 64 << 20
    ratio: float = 1.0
    least_seconds: float = 5.0
    trailing_entries: int = 100_000
    entries: int | None = None
    most_seconds: float | None = None
    piece_bytes: int = 256 << 10


def configuration(conf: Any, *, names_files: bool = False) -> Any:
    """The caller's configuration, seen through another class: what the caller changes later counts, as in PySyncObj.

    With ``names_files`` its files and serializers are passed over, else they are a ``ValueError``.
    """
    conf = SyncObjConf() if conf is None else conf
    members = {name: _guarded(name) for name in CALLBACKS}
    for name in NOT_FOR_US:
        if names_files:
            members[name] = property(lambda conf: None)
        elif getattr(conf, name) is not None:
            raise ValueError(f"conf.{name} is set: journal and snapshots are the node's own, in its directory")
    seen: Any = object.__new__(type(type(conf).__name__, (type(conf),), members))
    seen.__dict__ = conf.__dict__
    return seen


def policy_of(conf: Any, policy: DumpPolicy | None) -> DumpPolicy:
    """The policy that a node was given, or the one that its configuration describes.

    ``logCompactionMinEntries`` and ``logCompactionMinTime`` mean what they mean in PySyncObj: a journal never stays
    longer, nor a dump older. Half of the entries are kept for followers that lag. ``useFork`` and
    ``logCompactionSplit`` need no counterpart: nothing is forked, and nodes do not dump all at the same time.
    """
    usual = SyncObjConf()
    given = [name for name in OF_DUMPS if getattr(conf, name) != getattr(usual, name)]
    if policy is not None:
        if given:
            raise ValueError(
                f"{', '.join(f'conf.{name}' for name in given)}: set, and policy= is given as well, which says when a "
                "node dumps; leave one of the two out")
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
    """An attribute that PySyncObj reads where it calls the user's function."""

    def get(conf: Any) -> Any:
        function = conf.__dict__[name]
        return None if function is None else Guarded(function)

    def put(conf: Any, function: Any) -> None:
        conf.__dict__[name] = function

    return property(get, put)
