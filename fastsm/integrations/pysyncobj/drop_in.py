"""``FastSyncObj``: PySyncObj's own constructor, for programs that are built around it."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from pysyncobj import SyncObjConf
from pysyncobj.node import TCPNode
from pysyncobj.transport import TCPTransport

from fastsm.integrations.pysyncobj.node import ReplicatedStateMachine


class FastSyncObj(ReplicatedStateMachine):
    """A :class:`ReplicatedStateMachine` with the constructor of a ``pysyncobj.SyncObj``, which it can replace.

    Its directory is named like ``conf.journalFile`` (or ``conf.fullDumpFile``), followed by ``.fastsm``. If a directory
    exists under one of the two names, it is used, so a node that is configured with a second file later keeps its
    state. If neither is set, nothing is kept, as in PySyncObj: the directory is a temporary one, removed when the node
    ends. Files of PySyncObj's own are not taken over: ``ValueError`` if there are any while the directory does not
    exist yet. ``options``: those of :class:`ReplicatedStateMachine`, such as ``durable``.
    """

    _fastsm_conf_names_files = True

    def __init__(
        self,
        selfNode: Any,
        otherNodes: Iterable[Any],
        conf: Any = None,
        consumers: Sequence[Any] | None = None,
        nodeClass: type[Any] = TCPNode,
        transport: Any = None,
        transportClass: type[Any] = TCPTransport,
        **options: Any,
    ) -> None:
        if transport is not None:
            raise TypeError("expected transportClass=, found transport=: your own class is combined with fastsm's")
        conf = SyncObjConf() if conf is None else conf
        files = [name for name in (conf.journalFile, conf.fullDumpFile) if name is not None]
        directories = [f"{os.fsdecode(name)}.fastsm" for name in files]
        directory = next(filter(os.path.lexists, directories), directories[0] if files else None)
        if directory is not None and not os.path.lexists(directory):
            stock = [name for name in files if os.path.lexists(name)]
            if stock:
                raise ValueError(
                    f"{directory}: expected no files of PySyncObj's own where this node begins, found {stock[0]!r}, "
                    "which is not taken over: move it away, and start all nodes of the cluster on fastsm")
        self._fastsm_temporary = tempfile.mkdtemp(prefix="fastsm-") if directory is None else None
        self._fastsm_remove_temporary = weakref.finalize(self, _remove, self._fastsm_temporary, os.getpid())
        try:
            super().__init__(
                selfNode, otherNodes, directory or str(self._fastsm_temporary), conf=conf, consumers=consumers or (),
                nodeClass=nodeClass, transportClass=transportClass, **options)
        except BaseException:
            self._fastsm_remove_temporary()
            raise

    def _doDestroy(self) -> None:
        super()._doDestroy()
        self._fastsm_remove_temporary()


def _remove(directory: str | None, process: int) -> None:
    if directory is not None and process == os.getpid():  # a forked child leaves it to its parent
        shutil.rmtree(directory, ignore_errors=True)
