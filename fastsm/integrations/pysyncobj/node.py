"""``ReplicatedStateMachine``: a PySyncObj node whose state is a ``FastStateMachine``."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pysyncobj import monotonic as time_of
from pysyncobj.node import Node, TCPNode
from pysyncobj.transport import TCPTransport, TransportNotReadyError

from fastsm.clock import Clock
from fastsm.disk.files import Directory
from fastsm.errors import FastsmError, NotRunningError
from fastsm.integrations.pysyncobj import compatibility
from fastsm.integrations.pysyncobj.changes import Change
from fastsm.integrations.pysyncobj.configuration import DumpPolicy, configuration, policy_of
from fastsm.integrations.pysyncobj.dumping import Dumping
from fastsm.integrations.pysyncobj.operations import procedures_of
from fastsm.integrations.pysyncobj.places import MARK, Files, Places, Restart, restart
from fastsm.integrations.pysyncobj.replicated import (
    consumers_of,
    distinct,
    method_table,
    replicates,
    require_picklable,
)
from fastsm.integrations.pysyncobj.replication import LEADER
from fastsm.integrations.pysyncobj.shorthands import Shorthands
from fastsm.integrations.pysyncobj.ticking import LeadersClock, MakeClock
from fastsm.integrations.pysyncobj.transport import transport_class
from fastsm.integrations.pysyncobj.waiting import Guarded

if TYPE_CHECKING:
    from fastsm.machine import FastStateMachine

logger = logging.getLogger("fastsm")

# Nodes whose tick thread is to end them. The thread alone does not keep them alive, and users may have dropped them.
_ending: dict[int, ReplicatedStateMachine] = {}


class Shown:
    """Exposes a part of a node under a plain name, which a subclass may use for something else."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, node: Any, owner: type[Any]) -> Any:
        return self if node is None else getattr(node, self._name)


class Maker:
    """Stands in for the thread that made a node, since PySyncObj's tick thread ends with that thread.

    PySyncObj then ends its ticks without notice. This class ends the node: all waiting callers are told, and its
    directory is released.
    """

    def __init__(self, node: Any, thread: threading.Thread) -> None:
        self._node, self._thread = node, thread

    def is_alive(self) -> bool:
        if self._thread.is_alive():
            return True
        self._node._fastsm_end_with(self._thread)
        return False


class MakerSlot:
    """Installs a `Maker` where PySyncObj's constructor stores its thread."""

    def __set__(self, node: Any, thread: threading.Thread | None) -> None:
        node.__dict__["_SyncObj__mainThread"] = None if thread is None else Maker(weakref.proxy(node), thread)


class ReplicatedStateMachine(Shorthands, Dumping):
    """A node of a PySyncObj cluster in which all nodes are of this class: a ``SyncObj`` with a ``FastStateMachine``.

    ``self_address`` and ``partner_addresses`` ("host:port") are those of PySyncObj. Everything that the node stores is
    in ``directory``, which is made if it is missing; before PySyncObj starts, it is verified, and repaired after an
    unclean end. With ``self_address=None`` it is a read-only node: it follows the cluster and may submit, but does not
    vote.

    - ``conf``: a ``SyncObjConf``. It must not set a journal, dumps or serializers, which are the node's own.
    - ``durable``: what was acknowledged survives a power loss of all nodes. Replies and votes are sent after an fsync
      of what they promise, with one fsync per tick. Without it, acknowledged entries survive the end of every process,
      but not of every machine at the same time.
    - ``consumers``: ``SyncObjConsumer`` objects besides the state machine; their state is part of snapshots, pickled in
      the tick thread. (The batteries of fastsm have theirs in the state machine.)
    - ``policy``: a :class:`DumpPolicy`; without one, ``conf.logCompaction…`` determines when to dump, if it is set.
    - ``on_failure(error)``: called once, in the tick thread, when the node stops because it cannot continue.
    - ``on_change(changes)``: called in the tick thread with a list of :class:`Change` for each chunk that has changed
      keys, in order, before the callers that wait for its entries are told; with None when anything may have changed:
      a snapshot from the leader has replaced the state, or compactions have removed a chunk's records before they were
      read. Changes from before a restart are not repeated.
    - ``clock``: called with the state machine to make the ``fastsm.Clock`` by which this node proposes ticks while it
      is the leader and something has a deadline; None: it proposes none.
    - ``nodeClass``, ``transportClass``: as in PySyncObj; the transport is a subclass of ``TCPTransport``.
    - ``options``: those of ``FastStateMachine``, such as ``verify_on_open`` ("full" by default), ``retain_entries``, or
      ``procedures``, which must be the same on all nodes: a node that lacks one stops when it applies a call of it.

    Raises ``UnsupportedVersionError`` if PySyncObj is of a version that does not work, and the errors of opening the
    directory: ``CorruptionError``, ``ChecksumMismatchError``, ``LockedError``, ``StorageError``, ...

    If something happens after which it cannot continue (a full disk, a disk error, a command of a newer release,
    entries that contradict what it has applied), the node stops: ``failure`` is set, a CRITICAL line is logged, it
    leaves the cluster, and all waiting callers get ``UNKNOWN_OUTCOME``. Starting it again recovers it.

    A subclass may have replicated methods. Then what it sets after ``super().__init__()`` is replicated state, as in
    PySyncObj: it is part of snapshots, pickled, and state that cannot be pickled stops the node once it is ready. What
    is set before that, and all attributes of a class without replicated methods, belong to this node only. Names that
    begin with ``_fastsm_`` are reserved.

    Thread safety: every method here, from any thread. Callbacks run in the tick thread, which they must not block;
    exceptions that they raise are logged.
    """

    _SyncObj__mainThread: ClassVar[Any] = MakerSlot()
    journal = Shown("_fastsm_journal")
    _fastsm_conf_names_files: ClassVar[bool] = False
    dumps = Shown("_fastsm_dumps")
    installs = Shown("_fastsm_installs")

    def __init__(
        self,
        self_address: str | None,
        partner_addresses: Iterable[str],
        directory: str | os.PathLike[str],
        *,
        conf: Any = None,
        durable: bool = False,
        consumers: Sequence[Any] = (),
        policy: DumpPolicy | None = None,
        on_failure: Callable[[BaseException], object] | None = None,
        on_change: Callable[[list[Change] | None], object] | None = None,
        clock: MakeClock | None = Clock,
        nodeClass: type[Any] = TCPNode,
        transportClass: type[Any] = TCPTransport,
        _files: Files | None = None,
        **options: Any,
    ) -> None:
        compatibility.require()
        if not (self_address is None or isinstance(self_address, (str, Node))):
            raise TypeError(f"expected this node's address, or None for a read-only node, found {self_address!r}")
        transportClass = transport_class(transportClass)
        conf = configuration(conf, names_files=self._fastsm_conf_names_files)
        consumers = consumers_of(consumers)
        methods = method_table(type(self), consumers)
        batteries = distinct(consumers)
        require_picklable(consumers)
        options.setdefault("verify_on_open", "full")
        if any(each.ordered for each in batteries.values()):
            options.setdefault("ordered", True)
        codecs = {prefix: each.codec for prefix, each in batteries.items() if each.codec is not None}
        options["procedures"] = [*options.get("procedures", ()), *procedures_of(codecs)]
        self._fastsm_durable = durable
        self._fastsm_policy = policy_of(conf, policy)
        self._fastsm_places = Places(directory, _files or (lambda name: Directory))
        self._fastsm_on_failure = on_failure
        self._fastsm_on_change = None if on_change is None else Guarded(on_change)
        self._fastsm_began = self._fastsm_over = self._fastsm_looked_at = self._fastsm_ticking = False
        self._fastsm_turn = threading.RLock()  # held during a tick; reentrant for signal handlers
        has_others = len(consumers) > len(batteries) or conf.dynamicMembershipChange or replicates(type(self))
        self._fastsm_restart: Restart | None
        self._fastsm_restart = found = restart(
            self._fastsm_places, durable=durable, has_others=has_others, options=options)
        try:
            if found.attachment is not None:
                methods.require(pickle.loads(found.attachment), self._fastsm_places.path)
            self._fastsm_begin_replication(found.journal)
            self._fastsm_begin_applying(found.machine)
            self._fastsm_timers = [each.timer(found.machine) for each in batteries.values() if each.timed]
            if clock is not None:
                self._fastsm_timers.insert(0, LeadersClock(clock(found.machine)))
            self._fastsm_begin_dumping(found.snapshot, found.snapshot_bytes, methods)
            super().__init__(
                self_address, list(partner_addresses), conf, consumers=consumers, nodeClass=nodeClass,
                transportClass=transportClass)
        except BaseException:
            found.journal.abandon()
            found.machine.close()
            raise

    def __repr__(self) -> str:
        return f"<ReplicatedStateMachine {self._fastsm_places.path!r}: {self._fastsm_machine!r}>"

    @property
    def state_machine(self) -> FastStateMachine:
        """This node's state machine, for reading only: anything applied directly would make this node differ."""
        return self._fastsm_machine

    @property
    def failure(self) -> BaseException | None:
        """The reason why the node has stopped, or None."""
        return self._fastsm_failure

    @property
    def refused(self) -> dict[str, str]:
        """The nodes that were refused, and why. A node that is accepted later is removed from it."""
        return dict(self._fastsm_transport.refused)

    # ---- the tick --------------------------------------------------------------------------------------

    def _onTick(self, timeToWait: float = 0.0) -> None:
        if self._fastsm_machine._forked():
            raise NotRunningError("this node belongs to the process from which this one was forked")
        with self._fastsm_turn:
            outer, self._fastsm_ticking = self._fastsm_ticking, True
            try:
                self._fastsm_tick(timeToWait)
            finally:
                self._fastsm_ticking = outer
                if self._SyncObj__destroying and not (outer or self._SyncObj__conf.autoTick):
                    self._doDestroy()

    def _fastsm_tick(self, timeToWait: float) -> None:
        if self._fastsm_failure is not None or self._SyncObj__destroying:
            return
        self._fastsm_ticker = threading.get_ident()
        try:
            if not self._fastsm_began:
                self._fastsm_began = True
                self._fastsm_begin()
            self._fastsm_make_durable()  # so that only entries which the journal cannot lose are applied
            if self._SyncObj__raftState == LEADER:
                self._fastsm_commit()
                self._fastsm_propose_ticks()
            super()._onTick(0.0 if self._fastsm_behind else timeToWait)
            self._fastsm_make_durable()
            self._fastsm_waiting.expire()
            if not self._fastsm_looked_at and self._SyncObj__onReadyCalled:
                self._fastsm_looked_at = True
                self._fastsm_require_picklable()
        except Exception as error:
            self._fastsm_fail(error)
        except BaseException as error:  # such as a procedure's SystemExit
            if not self._SyncObj__conf.autoTick:
                raise  # a KeyboardInterrupt is meant for the caller of doTick
            self._fastsm_fail(error)  # otherwise PySyncObj's thread would end without notice

    def _fastsm_begin(self) -> None:
        """Sets PySyncObj's own state as the restart found it. Called in the first tick."""
        found, self._fastsm_restart = self._fastsm_restart, None
        assert found is not None
        self._SyncObj__needLoadDumpFile = False
        if found.attachment is not None:
            self._fastsm_restore(found.attachment)
        self._SyncObj__raftCommitIndex = found.commit_index
        for index, command in found.others:
            self._SyncObj__raftLastApplied = index - 1
            self._fastsm_apply_other(command)
        self._SyncObj__raftLastApplied = found.last_applied
        if self._fastsm_durable:
            self._fastsm_transport.holding = True
            super().addOnTickCallback(self._fastsm_make_durable)

    def _fastsm_propose_ticks(self) -> None:
        now, term = time_of.monotonic(), self._SyncObj__raftCurrentTerm
        for each in self._fastsm_timers:
            command = each.tick(now, term)
            if command is not None:
                with contextlib.suppress(queue.Full):  # the next one does its work
                    self._SyncObj__commandsQueue.put_nowait((bytes([MARK]) + command, None))

    def addOnTickCallback(self, callback: Callable[[], object]) -> None:
        """Adds a callback for each tick, as in PySyncObj; exceptions of the callback are logged."""
        super().addOnTickCallback(Guarded(callback))

    def _fastsm_make_durable(self) -> None:
        """Makes what was appended in this tick durable, then sends the messages that promise it."""
        if not self._fastsm_durable or self._fastsm_failure is not None:
            return
        if self._fastsm_journal.dirty:
            self._fastsm_journal.sync()
        if self._fastsm_transport.held:
            self._fastsm_transport.release()

    def _SyncObj__onBecomeLeader(self) -> None:
        super()._SyncObj__onBecomeLeader()
        if self._fastsm_durable:
            self._fastsm_journal.sync()  # a leader without followers commits in this very tick

    def _SyncObj__loadDumpFile(self, clearJournal: bool) -> None:
        raise AssertionError("snapshots are not read by PySyncObj")

    def _SyncObj__onMessageReceived(self, node: Any, message: Any) -> None:
        if self._fastsm_failure is not None:
            return
        try:
            self._fastsm_take_message(node, message)
        except (FastsmError, OSError, MemoryError) as error:
            self._fastsm_fail(error)
        except Exception:
            logger.exception("a message from node %s is malformed; it is disconnected", node.id)
            self._fastsm_transport.disconnect(node)

    # ---- the end ---------------------------------------------------------------------------------------

    def _fastsm_fail(self, error: BaseException) -> None:
        """Stops the node, which cannot continue: reports it, and leaves the cluster."""
        if self._fastsm_failure is not None:
            return
        self._fastsm_failure = error
        logger.critical("%s: this node stops: %s", self._fastsm_places.path, error, exc_info=error)
        self._SyncObj__destroying = True
        self._fastsm_transport.destroy()
        self._fastsm_waiting.give_up_all()
        if self._fastsm_on_failure is not None:
            Guarded(self._fastsm_on_failure)(error)

    def destroy(self) -> None:
        """Ends the node, as in PySyncObj. May be called from anywhere: during a tick, the node ends with that tick."""
        if self._SyncObj__conf.autoTick:
            if self.tick_thread_alive():
                _ending[id(self)] = self
            super().destroy()
            if self._fastsm_over:
                _ending.pop(id(self), None)
            return
        if self._fastsm_machine._forked():
            self._doDestroy()  # the thread that ticks exists only in the parent
            return
        self._fastsm_machine._refuse_procedure()  # the tick waits for the procedure
        self._SyncObj__destroying = True
        self._fastsm_wake()  # another thread's tick may be sleeping
        with self._fastsm_turn:
            if not self._fastsm_ticking:
                self._doDestroy()

    def _doDestroy(self) -> None:
        """Ends everything; what was applied is durable, unless the disk fails."""
        if self._fastsm_over:
            return
        self._fastsm_over = self._SyncObj__destroying = True
        forked = self._fastsm_machine._forked()  # then threads and locks belong to the parent, and no caller waits here
        # Work on threads ends with the state machine; only then is its journal closed.
        ends = [self._fastsm_machine.close, *([] if forked else [self._fastsm_end_dumping]),
                self._fastsm_transport.destroy, *(consumer._destroy for consumer in self._SyncObj__consumers),
                self._fastsm_journal._destroy, *([] if forked else [self._fastsm_end_waking])]  # fmt: skip
        try:
            for end in ends:
                try:
                    end()
                except (FastsmError, OSError) as error:
                    logger.warning("%s: while the node was ended: %s", self._fastsm_places.path, error)
                except Exception:  # from a consumer, or from the user's own transport
                    logger.exception("%s: while the node was ended", self._fastsm_places.path)
            if not forked:
                self._fastsm_waiting.give_up_all()
        finally:
            _ending.pop(id(self), None)

    def _fastsm_end_with(self, thread: threading.Thread) -> None:
        """Ends the node after the thread that made it has ended, and the ticks with it. Called in the tick thread.

        If that is the main thread, the process ends, which is not a failure.
        """
        if thread is threading.main_thread():
            self._SyncObj__destroying = True
        else:
            self._fastsm_fail(NotRunningError(
                f"the thread that made this node, {thread.name!r}, has ended, and PySyncObj's ticks with it; make the "
                "node in a thread that lives as long as the node"))
        self._doDestroy()

    def _fastsm_end_unbound(self, error: TransportNotReadyError) -> None:
        """Ends the node, since its address cannot be bound, and PySyncObj gives up its ticks. In the tick thread."""
        self._fastsm_fail(error)
        self._doDestroy()

