"""A node's configuration: PySyncObj's, without what the node does itself, and with callbacks that cannot end a tick."""

from __future__ import annotations

import copy
import logging
from typing import Any

from pysyncobj import SyncObjConf

from fastsm.integrations.pysyncobj.waiting import Guarded

logger = logging.getLogger("fastsm")

NOT_FOR_US = ("journalFile", "fullDumpFile", "serializer", "deserializer", "serializeChecker")
OF_NO_EFFECT = (
    "logCompactionMinEntries", "logCompactionMinTime", "logCompactionSplit", "logCompactionBatchSize", "useFork",
)  # fmt: skip
CALLBACKS = ("onReady", "onStateChanged", "onCodeVersionChanged")


def configuration(conf: Any) -> Any:
    """A copy of the caller's configuration. Raises ``ValueError`` for a file or serializer of the caller's own."""
    conf = SyncObjConf() if conf is None else copy.copy(conf)
    for name in NOT_FOR_US:
        if getattr(conf, name) is not None:
            raise ValueError(f"conf.{name} is set: journal and snapshots are the node's own, in its directory")
    usual = SyncObjConf()
    without_effect = [name for name in OF_NO_EFFECT if getattr(conf, name) != getattr(usual, name)]
    if without_effect:
        logger.warning(
            "%s: set, but of no effect: a node dumps without a fork, when policy=DumpPolicy(...) says so",
            ", ".join(f"conf.{name}" for name in without_effect),
        )
    conf.__class__ = type(type(conf).__name__, (type(conf),), {name: _guarded(name) for name in CALLBACKS})
    return conf


def _guarded(name: str) -> property:
    """An attribute that PySyncObj reads where it calls the user's function."""

    def get(conf: Any) -> Any:
        function = conf.__dict__[name]
        return None if function is None else Guarded(function)

    def put(conf: Any, function: Any) -> None:
        conf.__dict__[name] = function

    return property(get, put)
