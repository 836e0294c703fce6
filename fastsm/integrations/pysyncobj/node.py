"""``ReplicatedStateMachine``: a PySyncObj node whose state is a ``FastStateMachine``."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pysyncobj import SyncObj, SyncObjConf

from fastsm.command import batch, compare_and_swap, delete, noop, put
from fastsm.disk.files import Directory
from fastsm.errors import FastsmError
from fastsm.integrations.pysyncobj import compatibility
from fastsm.integrations.pysyncobj.applying import Callback
from fastsm.integrations.pysyncobj.dumping import Dumping, DumpPolicy
from fastsm.integrations.pysyncobj.places import Files, Places, Restart, restart
from fastsm.integrations.pysyncobj.transport import FastTransport
from fastsm.types import ScanResult

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from fastsm.machine import FastStateMachine

logger = logging.getLogger("fastsm")

NOT_FOR_US = ("journalFile", "fullDumpFile", "serializer", "deserializer", "serializeChecker")


class ReplicatedStateMachine(Dumping):
    """A node of a PySyncObj cluster, all nodes of which are such: a ``SyncObj`` with a ``FastStateMachine``.

    ``self_address`` and ``partner_addresses`` ("host:port") are PySyncObj's. All that the node keeps is in
    ``directory``; made when it is missing, and verified, repaired where an end came between, before PySyncObj starts.

    - ``conf``: a ``SyncObjConf``. Journal, dumps and serializers are not set there: they are the node's own.
    - ``durable``: what was acknowledged survives a power loss of all nodes. Replies and votes leave after the fsync of
      what they promise, one for each tick. Without it, it survives the end of every process, but not of every
      machine at once.
    - ``consumers``: other ``SyncObjConsumer`` objects beside it; their state travels in snapshots, pickled in the
      tick thread.
    - ``policy``: a :class:`DumpPolicy`.
    - ``on_failure(error)``: called once, in the tick thread, when the node stops because it cannot go on.
    - ``options``: of ``FastStateMachine``, such as ``verify_on_open`` ("full" unless given) or ``retain_entries``.

    Raises ``UnsupportedVersionError`` where PySyncObj is not one that works, and what opening the directory raises:
    ``CorruptionError``, ``ChecksumMismatchError``, ``LockedError``, ``StorageError``, ...

    When something that it cannot go on with happens (a full disk, an error of the disk, a command of a newer release,
    entries that contradict what it has applied), the node stops: ``failure`` is set, the log has a CRITICAL line, it
    leaves the cluster, everybody who waits hears ``UNKNOWN_OUTCOME``. It is recovered by starting it again.

    Thread safety: every method here, from any thread. Callbacks come in the tick thread, which they must not block.
    """

    def __init__(
        self,
        self_address: str,
        partner_addresses: Iterable[str],
        directory: str | os.PathLike[str],
        *,
        conf: Any = None,
        durable: bool = False,
        consumers: Sequence[Any] = (),
        policy: DumpPolicy | None = None,
        on_failure: Callable[[BaseException], object] | None = None,
        _files: Files | None = None,
        _transport: type[Any] = FastTransport,
        **options: Any,
    ) -> None:
        compatibility.require()
        if not isinstance(self_address, str):
            raise TypeError(f"expected this node's address, found {self_address!r}: read-only nodes are not served")
        conf = _configuration(conf)
        options.setdefault("verify_on_open", "full")
        self.durable = durable
        self.policy = policy or DumpPolicy()
        self.places = Places(directory, _files or (lambda name: Directory))
        self._on_failure = on_failure
        self._began = self._over = False
        has_others = bool(consumers) or conf.dynamicMembershipChange or _replicates(type(self))
        self._restart: Restart | None
        self._restart = found = restart(self.places, durable=durable, has_others=has_others, options=options)
        try:
            self._begin_replication(found.journal)
            self._begin_applying(found.machine)
            self._begin_dumping(found.snapshot, found.snapshot_bytes)
            super().__init__(
                self_address, list(partner_addresses), conf, consumers=list(consumers), transportClass=_transport)
        except BaseException:
            found.journal.abandon()
            found.machine.close()
            raise

    def __repr__(self) -> str:
        return f"<ReplicatedStateMachine {self.places.path!r}: {self.machine!r}>"

    @property
    def state_machine(self) -> FastStateMachine:
        """This node's state machine. For reading; what is applied to it here alone ends the cluster's agreement."""
        return self.machine

    @property
    def failure(self) -> BaseException | None:
        """Why the node has stopped, or None."""
        return self._failure

    @property
    def refused(self) -> dict[str, str]:
        """Nodes that were refused, and why; a node leaves it when it comes back right."""
        return dict(self._transport.refused)

    # ---- shorthands ------------------------------------------------------------------------------------

    def put(
        self, key: Buffer, value: Buffer, *, sync: bool = False, callback: Callback | None = None,
        timeout: float | None = None,
    ) -> bool | None:
        """:meth:`submit` of ``fastsm.put``."""
        return self.submit(put(key, value), sync=sync, callback=callback, timeout=timeout)

    def delete(
        self, key: Buffer, *, sync: bool = False, callback: Callback | None = None, timeout: float | None = None
    ) -> bool | None:
        """:meth:`submit` of ``fastsm.delete``."""
        return self.submit(delete(key), sync=sync, callback=callback, timeout=timeout)

    def compare_and_swap(
        self, key: Buffer, expected: Buffer | None, value: Buffer | None, *, sync: bool = False,
        callback: Callback | None = None, timeout: float | None = None,
    ) -> bool | None:
        """:meth:`submit` of ``fastsm.compare_and_swap``."""
        return self.submit(compare_and_swap(key, expected, value), sync=sync, callback=callback, timeout=timeout)

    def batch(
        self, commands: Iterable[bytes], *, sync: bool = False, callback: Callback | None = None,
        timeout: float | None = None,
    ) -> bool | None:
        """:meth:`submit` of ``fastsm.batch``: all of the commands or none, in one entry."""
        return self.submit(batch(commands), sync=sync, callback=callback, timeout=timeout)

    def get(self, key: Buffer) -> bytes | None:
        """The value of a key as this node has it, or None: it may be behind. O(1)."""
        return self.machine.get(key)

    def get_many(self, keys: Iterable[Buffer]) -> list[bytes | None]:
        """The values of keys as this node has them, all from one applied state."""
        return self.machine.get_many(keys)

    def get_view(self, key: Buffer) -> memoryview | None:
        """The value of a key as this node has it, without a copy."""
        return self.machine.get_view(key)

    def scan_prefix(self, prefix: Buffer, *, limit: int | None = None, start_after: Buffer | None = None) -> ScanResult:
        """Pairs sorted by key, as this node has them."""
        return self.machine.scan_prefix(prefix, limit=limit, start_after=start_after)

    def sync_read(self, key: Buffer, *, timeout: float | None = None) -> bytes | None:
        """The value of a key behind a round through the log: all that was acknowledged before the call is in it.

        Raises :class:`SubmitError`.
        """
        self.submit(noop(), sync=True, timeout=timeout)
        return self.machine.get(key)

    # ---- the tick --------------------------------------------------------------------------------------

    def _onTick(self, timeToWait: float = 0.0) -> None:
        if self._failure is not None or self._over:
            return
        try:
            if not self._began:
                self._began = True
                self._begin()
            self._make_durable()  # nothing is applied that the journal could lose
            super()._onTick(0.0 if self._behind else timeToWait)
            self._make_durable()
            self._expire()
        except Exception as error:
            self._fail(error)
        if self._failure is not None and not self.conf.autoTick:
            self._doDestroy()

    def _begin(self) -> None:
        """In the first tick: PySyncObj's own state as the restart found it."""
        found, self._restart = self._restart, None
        assert found is not None
        self._SyncObj__needLoadDumpFile = False
        if found.attachment is not None:
            self.restore(found.attachment)
        self._SyncObj__raftLastApplied = found.last_applied
        self._SyncObj__raftCommitIndex = found.commit_index
        for command in found.others:
            self._apply_other(command)
        if self.durable:
            self._transport.holding = True
            self.addOnTickCallback(self._make_durable)

    def _make_durable(self) -> None:
        """What was appended in this tick so far, and then lets the messages go that promise it."""
        if not self.durable or self._failure is not None:
            return
        if self.journal.dirty:
            self.journal.sync()
        if self._transport.held:
            self._transport.release()

    def _SyncObj__onBecomeLeader(self) -> None:
        super()._SyncObj__onBecomeLeader()
        if self.durable:
            self.journal.sync()  # a leader without followers commits in this very tick

    def _SyncObj__loadDumpFile(self, clearJournal: bool) -> None:
        raise AssertionError("snapshots are not read by PySyncObj")

    def _SyncObj__onMessageReceived(self, node: Any, message: Any) -> None:
        if self._failure is not None:
            return
        try:
            self._take_message(node, message)
        except (FastsmError, OSError, MemoryError) as error:
            self._fail(error)
        except Exception:
            logger.exception("a message of node %s makes no sense; it is disconnected", node.id)
            self._transport.disconnect(node)

    # ---- the end ---------------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> None:
        """The node cannot go on. It says so, and leaves."""
        if self._failure is not None:
            return
        self._failure = error
        logger.critical("%s: this node stops: %s", self.places.path, error, exc_info=error)
        self._SyncObj__destroying = True
        self._transport.destroy()
        self._give_up_all()
        if self._on_failure is not None:
            try:
                self._on_failure(error)
            except Exception:
                logger.exception("on_failure raised")

    def _doDestroy(self) -> None:
        """Ends everything; what was applied is durable, unless the disk refuses."""
        if self._over:
            return
        self._over = self._SyncObj__destroying = True
        # What runs on threads ends with the state machine; only then is the journal closed under it.
        for end in (self.machine.close, self._end_dumping, super()._doDestroy):
            try:
                end()
            except (FastsmError, OSError) as error:
                logger.warning("%s: while the node was ended: %s", self.places.path, error)
        self._give_up_all()


def _configuration(conf: Any) -> Any:
    """A copy of the caller's configuration, with nothing in it that is the node's own."""
    conf = SyncObjConf() if conf is None else copy.copy(conf)
    for name in NOT_FOR_US:
        if getattr(conf, name) is not None:
            raise ValueError(f"conf.{name} is set: journal and snapshots are the node's own, in its directory")
    return conf


def _replicates(node: type[Any]) -> bool:
    """Whether a subclass has replicated methods of its own."""
    own = set(dir(node)) - set(dir(SyncObj))
    return any(getattr(getattr(node, name, None), "replicated", False) for name in own)
