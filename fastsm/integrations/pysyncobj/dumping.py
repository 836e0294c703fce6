"""A node's snapshots: when one is written, how it is sent to a follower, how it is installed.

Snapshots are written and installed on separate threads, which the tick thread starts, and whose ends it handles. The
tick thread itself pickles what a snapshot has besides the state machine's state, and sends and receives pieces.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pysyncobj import monotonic as clock

from fastsm.errors import FastsmError, FormatVersionError, SnapshotError, StorageError
from fastsm.integrations.pysyncobj.applying import Applying
from fastsm.integrations.pysyncobj.configuration import DumpPolicy
from fastsm.integrations.pysyncobj.places import SENTINEL, Places
from fastsm.integrations.pysyncobj.replicated import MethodTable, StateInMachine, replicates, unpicklable
from fastsm.integrations.pysyncobj.replication import LEADER
from fastsm.snapshot.file import SNAPSHOT, Snapshot, open_snapshot
from fastsm.snapshot.receiver import SnapshotReceiver
from fastsm.types import LogId, SnapshotMetadata

logger = logging.getLogger("fastsm")

WINDOW = 1 << 20  # sent bytes that the follower has not confirmed
PATIENCE = 60.0  # seconds that a new dump waits for the arrival of a snapshot being sent
NO_ROOM_PAUSE = 10.0
LEAST_PART = 0.6  # of the policy's sizes: some nodes of a cluster dump earlier than others


class Work:
    """A function on a thread of its own; ``finish`` returns its value or raises what it raised."""

    def __init__(self, name: str, function: Callable[[], Any]) -> None:
        self._function = function
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def finish(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value


@dataclass
class Transfer:
    """A snapshot being sent to a follower, kept open so that a newer one of the same name does not replace it."""

    snapshot: Snapshot
    sent: int = 0
    taken: int = 0
    began: float = field(default_factory=clock.monotonic)


class Dump(NamedTuple):
    """A snapshot that is being written."""

    included: LogId
    work: Work


class Dumping(Applying):
    """The part of a node that dumps, sends and installs snapshots."""

    _SyncObj__raftCommitIndex: int
    _fastsm_policy: DumpPolicy
    _fastsm_places: Places

    def _fastsm_begin_dumping(self, included: LogId, size: int, methods: MethodTable) -> None:
        """Prepares dumping. ``included`` and ``size``: of the existing snapshot; ``LogId()`` and 0 if there is none."""
        self._fastsm_last_dump, self._fastsm_dump_size = included, size
        self._fastsm_dumped_at = clock.monotonic() - self._fastsm_policy.least_seconds
        self._fastsm_methods = methods
        self._fastsm_not_before = self._fastsm_no_thread_before = 0.0
        self._fastsm_dump: Dump | None = None
        self._fastsm_removing: Work | None = None
        self._fastsm_wanted = False
        self._fastsm_transfers: dict[Any, Transfer] = {}
        self._fastsm_receiver: SnapshotReceiver | None = None
        self._fastsm_arriving: SnapshotMetadata | None = None
        self._fastsm_complete: tuple[Any, SnapshotMetadata] | None = None  # received, to be installed
        self._fastsm_installing: tuple[Any, SnapshotMetadata, Work] | None = None
        self._fastsm_dumps = self._fastsm_installs = 0

    def _fastsm_take_message(self, node: Any, message: dict[str, Any]) -> None:
        if "piece" in message:
            if message["term"] >= self._SyncObj__raftCurrentTerm:
                self._fastsm_take_piece(node, message)
        elif message["type"] == "snapshot_taken":
            self._fastsm_take_confirmation(node, message)
        else:
            super()._fastsm_take_message(node, message)

    # ---- when ------------------------------------------------------------------------------------------

    def _SyncObj__tryLogCompaction(self) -> None:
        """Starts dumps and installs that are due, and handles the end of those that run. Called in each tick."""
        if self._fastsm_failure is not None:
            return
        if self._SyncObj__raftState != LEADER:
            self._fastsm_end_transfers()
        if self._fastsm_installing is not None and self._fastsm_installing[2].done:
            self._fastsm_finish_install()
        if self._fastsm_removing is not None and self._fastsm_removing.done:
            work, self._fastsm_removing = self._fastsm_removing, None
            work.finish()
        if self._fastsm_dump is not None:
            if self._fastsm_dump.work.done:
                self._fastsm_finish_dump()
        elif self._fastsm_installing is None:
            if self._fastsm_complete is not None:
                self._fastsm_begin_install()
            elif self._fastsm_wants_dump():
                self._fastsm_begin_dump()

    def _fastsm_wants_dump(self) -> bool:
        now = clock.monotonic()
        if self._SyncObj__raftLastApplied <= self._fastsm_last_dump.index or now < self._fastsm_not_before:
            self._SyncObj__forceLogCompaction = False
            return False
        if self._SyncObj__forceLogCompaction or self._fastsm_wanted:
            return True
        since = now - self._fastsm_dumped_at
        if since < self._fastsm_policy.least_seconds or not self._fastsm_is_due(since):
            return False
        sending = [transfer for transfer in self._fastsm_transfers.values() if now - transfer.began < PATIENCE]
        return not sending or self._fastsm_journal.newest_size > 4 * self._fastsm_enough_bytes

    @property
    def _fastsm_enough_bytes(self) -> int:
        """Returns how much the journal must grow before a dump is due."""
        policy = self._fastsm_policy
        return max(policy.journal_bytes, int(policy.ratio * self._fastsm_dump_size), 1)

    def _fastsm_is_due(self, since: float) -> bool:
        """Returns whether the policy requires a dump, ``since`` seconds after the last one."""
        policy, journal = self._fastsm_policy, self._fastsm_journal
        if policy.most_seconds is not None and since >= policy.most_seconds:
            return True
        by_bytes = journal.newest_size / self._fastsm_enough_bytes
        part = by_bytes if policy.entries is None else max(by_bytes, len(journal) / policy.entries)
        if part < LEAST_PART:
            return False
        # All nodes of a cluster have journals of the same length, but should not all dump at the same time.
        own = self._SyncObj__selfNode
        rank = 0 if own is None else self._fastsm_members().index(own.id)
        return part >= max(1 - 0.1 * rank, LEAST_PART)

    # ---- write -----------------------------------------------------------------------------------------

    def _fastsm_begin_dump(self) -> None:
        included = self._fastsm_machine.last_applied()
        try:
            attachment = self._fastsm_attachment()
        except Exception:
            logger.exception("no dump: the state of a consumer, or an attribute, cannot be pickled")
            self._fastsm_not_before = clock.monotonic() + NO_ROOM_PAUSE
            self._SyncObj__forceLogCompaction = False
            return
        machine, journal, places = self._fastsm_machine, self._fastsm_journal, self._fastsm_places

        def work() -> int:
            machine.write_snapshot(places.snapshot, included, attachment=attachment)
            journal.prepare()
            places.remove_incoming()
            return os.path.getsize(os.path.join(places.snapshot, SNAPSHOT))

        begun = self._fastsm_start("fastsm dump", work)
        if begun is not None:
            self._fastsm_dump = Dump(included, begun)
            self._SyncObj__forceLogCompaction = self._fastsm_wanted = False

    def _fastsm_start(self, name: str, function: Callable[[], Any]) -> Work | None:
        """Returns running work; None if no thread could be started, and for a second after that."""
        if clock.monotonic() < self._fastsm_no_thread_before:
            return None
        try:
            return Work(name, function)
        except (RuntimeError, MemoryError) as error:
            logger.warning("%s is put off, since no thread can be started: %s", name, error)
            self._fastsm_no_thread_before = clock.monotonic() + 1.0
            return None

    def _fastsm_attachment(self) -> bytes:
        """Returns the present state of PySyncObj itself and of its other consumers."""
        return pickle.dumps({
            "nodes": self._fastsm_members(),
            "code_version": self._SyncObj__enabledCodeVersion,
            "attributes": self._fastsm_attributes(),
            "consumers": [
                (name, consumer._serialize())
                for name, consumer in zip(self._fastsm_methods.consumers, self._fastsm_pickled(), strict=True)
            ],
            "methods": self._fastsm_methods.methods,
        }, 4)  # fmt: skip

    def _fastsm_members(self) -> list[str]:
        """Returns the addresses of the cluster's nodes, including this one's, unless it is read-only."""
        return sorted(node.id for node in self._SyncObj__otherNodes | {self._SyncObj__selfNode} if node is not None)

    def _fastsm_pickled(self) -> list[Any]:
        """Returns the consumers that have state of their own."""
        return [each for each in self._SyncObj__consumers if not isinstance(each, StateInMachine)]

    def _fastsm_attributes(self) -> dict[str, Any]:
        """Returns a subclass's attributes that are replicated state: those set after PySyncObj's constructor.

        Without replicated methods there are none: then attributes belong to this node alone.
        """
        if not replicates(type(self)):
            return {}
        return {
            name: value for name, value in self.__dict__.items()
            if name not in self._SyncObj__properies and not name.startswith(("_SyncObj__", "_fastsm_"))
        }  # fmt: skip

    def _fastsm_require_picklable(self) -> None:
        """Raises ``TypeError`` if no snapshot could ever be made."""
        wrong = unpicklable(self._fastsm_attributes())
        if wrong:
            raise TypeError(
                f"{type(self).__name__} has replicated methods, so what it sets after super().__init__() is "
                f"replicated state and part of snapshots; expected objects that can be pickled, found "
                f"{', '.join(wrong)}; set what belongs to this node alone before super().__init__()")

    def _fastsm_finish_dump(self) -> None:
        assert self._fastsm_dump is not None
        (included, work), self._fastsm_dump = self._fastsm_dump, None
        try:
            self._fastsm_dump_size = work.finish()
        except SnapshotError as error:
            logger.info("a dump as of %s was ended: %s", tuple(included), error)
            return
        except (StorageError, RuntimeError, MemoryError) as error:
            # Nothing depends on it yet; if the state machine is damaged, the next apply reports that.
            logger.warning("a dump as of %s failed, and will be tried again: %s", tuple(included), error)
            self._fastsm_not_before = clock.monotonic() + NO_ROOM_PAUSE
            return
        self._fastsm_last_dump, self._fastsm_dumped_at = included, clock.monotonic()
        self._fastsm_dumps += 1
        self._fastsm_journal.rotate()
        self._fastsm_journal.truncate_before(self._fastsm_keep_from(included.index))
        self._fastsm_remove_retired()

    def _fastsm_remove_retired(self) -> None:
        if self._fastsm_removing is None:
            self._fastsm_removing = self._fastsm_start("fastsm journal", self._fastsm_journal.remove_retired)

    def _fastsm_keep_from(self, included: int) -> int:
        """Returns the first entry that the journal keeps."""
        keep = included - self._fastsm_policy.trailing_entries
        usual = min(self._fastsm_policy.journal_bytes, DumpPolicy().journal_bytes)
        if self._fastsm_journal.size < 8 * max(usual, self._fastsm_dump_size):
            if self._SyncObj__raftState == LEADER:
                followers = self._SyncObj__otherNodes & self._SyncObj__connectedNodes
                matching = (self._SyncObj__raftMatchIndex[node] for node in followers)
                keep = min((keep, *(index for index in matching if index)))
            keep = min((keep, *(t.snapshot.metadata.last_included.index for t in self._fastsm_transfers.values())))
        return max(keep, 1)

    # ---- send ------------------------------------------------------------------------------------------

    def _fastsm_send_snapshot(self, node: Any) -> None:
        """Sends pieces of the newest snapshot, as far as the follower has confirmed earlier ones.

        If no piece is due, an empty one asks how far the follower is: a follower in a later term ignores pieces, and a
        leader in a later term ignores confirmations, without notice to the other side.
        """
        transfer = self._fastsm_transfer_to(node)
        if transfer is None:
            self._fastsm_transport.send(node, self._fastsm_sign_of_life())
        elif not self._fastsm_send_pieces(node, transfer):
            self._fastsm_send_piece(node, transfer, b"")

    def _fastsm_sign_of_life(self) -> dict[str, Any]:
        return {"type": "append_entries", "term": self._SyncObj__raftCurrentTerm, "commit_index": 0}

    def _fastsm_transfer_to(self, node: Any) -> Transfer | None:
        transfer = self._fastsm_transfers.get(node)
        if transfer is not None and transfer.snapshot.metadata.last_included.index >= self._fastsm_journal.first_index:
            return transfer
        self._fastsm_end_transfer(node)
        try:
            snapshot = self._fastsm_places.open_newest()
        except FastsmError as error:
            logger.warning("the snapshot is damaged, another one is made: %s", error)
            snapshot = None
        if snapshot is None or snapshot.metadata.last_included.index < self._fastsm_journal.first_index:
            self._fastsm_make_another()
            return None
        self._fastsm_transfers[node] = transfer = Transfer(snapshot)
        return transfer

    def _fastsm_make_another(self) -> None:
        self._fastsm_wanted, self._fastsm_last_dump = True, LogId()

    def _fastsm_send_pieces(self, node: Any, transfer: Transfer) -> bool:
        """Sends as much as the window allows; returns whether that was anything."""
        begin = transfer.sent
        while transfer.sent < transfer.snapshot.size and transfer.sent - transfer.taken < WINDOW:
            piece = transfer.snapshot.read_at(transfer.sent, self._fastsm_policy.piece_bytes)
            if not self._fastsm_send_piece(node, transfer, piece):
                break
            transfer.sent += len(piece)
        return transfer.sent > begin

    def _fastsm_send_piece(self, node: Any, transfer: Transfer, piece: bytes) -> bool:
        metadata = transfer.snapshot.metadata
        return self._fastsm_transport.send(node, {
            **self._fastsm_sign_of_life(), "piece": piece, "offset": transfer.sent,
            "snapshot": tuple(metadata.last_included), "checksum": metadata.checksum,
        })  # fmt: skip

    def _SyncObj__onNodeDisconnected(self, node: Any) -> None:
        super()._SyncObj__onNodeDisconnected(node)
        self._fastsm_end_transfer(node)  # the next connection may be from another process, which has received nothing

    def _SyncObj__onReadonlyNodeDisconnected(self, node: Any) -> None:
        super()._SyncObj__onReadonlyNodeDisconnected(node)
        self._SyncObj__lastResponseTime.pop(node, None)  # it comes back under another name
        self._fastsm_end_transfer(node)

    def _fastsm_end_transfer(self, node: Any) -> None:
        transfer = self._fastsm_transfers.pop(node, None)
        if transfer is not None:
            transfer.snapshot.close()

    def _fastsm_end_transfers(self) -> None:
        for node in list(self._fastsm_transfers):
            self._fastsm_end_transfer(node)

    def _fastsm_take_confirmation(self, node: Any, message: dict[str, Any]) -> None:
        transfer = self._fastsm_transfers.get(node)
        if self._SyncObj__raftState != LEADER or message["term"] != self._SyncObj__raftCurrentTerm or transfer is None:
            return
        if message["checksum"] != transfer.snapshot.metadata.checksum:
            return
        if message["damaged"]:
            logger.error("the snapshot that %s was sent is damaged; another one is made", node.id)
            self._fastsm_end_transfer(node)
            self._fastsm_make_another()
            return
        transfer.taken = message["offset"]
        if transfer.sent < transfer.taken or message["again"]:
            transfer.sent = transfer.taken
        if node in self._SyncObj__connectedNodes:
            self._fastsm_send_pieces(node, transfer)

    def _fastsm_take_reply(self, node: Any, message: dict[str, Any]) -> None:
        super()._fastsm_take_reply(node, message)
        if message["success"]:
            self._fastsm_end_transfer(node)

    # ---- receive and install ---------------------------------------------------------------------------

    def _fastsm_take_piece(self, node: Any, message: dict[str, Any]) -> None:
        self._fastsm_hear(node, message)
        if self._fastsm_installing is not None:
            return
        announced = SnapshotMetadata(LogId(*message["snapshot"]), message["checksum"])
        if announced.last_included.index <= self._SyncObj__raftLastApplied:
            self._SyncObj__sendNextNodeIdx(node, reset=True)
            return
        receiver = self._fastsm_receiver_of(announced)
        again = message["offset"] > receiver.offset
        if not again:
            try:
                receiver.write(message["offset"], message["piece"])
            except (SnapshotError, FormatVersionError) as error:
                logger.warning("a snapshot from %s is not right: %s", node.id, error)
                self._fastsm_confirm(node, announced, 0, damaged=True)
                return
        self._fastsm_confirm(node, announced, receiver.offset, again=again)
        self._fastsm_complete = (node, announced) if receiver.offset == receiver.size else None

    def _fastsm_receiver_of(self, announced: SnapshotMetadata) -> SnapshotReceiver:
        if self._fastsm_receiver is not None and self._fastsm_arriving != announced:
            self._fastsm_receiver.discard()
            self._fastsm_receiver.close()
            self._fastsm_receiver = self._fastsm_complete = None
        if self._fastsm_receiver is None:
            places = self._fastsm_places
            self._fastsm_receiver = SnapshotReceiver(places.incoming, announced, _files=places.files("incoming"))
            self._fastsm_arriving = announced
        return self._fastsm_receiver

    def _fastsm_confirm(
        self, node: Any, announced: SnapshotMetadata, offset: int, *, again: bool = False, damaged: bool = False
    ) -> None:
        self._fastsm_transport.send(node, {
            "type": "snapshot_taken", "term": self._SyncObj__raftCurrentTerm, "checksum": announced.checksum,
            "offset": offset, "again": again, "damaged": damaged,
        })  # fmt: skip

    def _fastsm_begin_install(self) -> None:
        assert self._fastsm_complete is not None
        assert self._fastsm_receiver is not None
        node, announced = self._fastsm_complete
        receiver, machine, journal = self._fastsm_receiver, self._fastsm_machine, self._fastsm_journal

        def work() -> None:
            path = receiver.finish(announced)
            receiver.close()
            machine.install_snapshot(announced, path)
            journal.prepare()

        begun = self._fastsm_start("fastsm install", work)
        if begun is not None:
            self._fastsm_receiver = self._fastsm_complete = None
            self._fastsm_installing = (node, announced, begun)

    def _fastsm_finish_install(self) -> None:
        assert self._fastsm_installing is not None
        (node, announced, work), self._fastsm_installing = self._fastsm_installing, None
        try:
            work.finish()
        except SnapshotError as error:
            logger.warning("a snapshot from %s is not right: %s", node.id, error)
            self._fastsm_arriving = None
            self._fastsm_confirm(node, announced, 0, damaged=True)
            return
        self._fastsm_installs += 1
        included = announced.last_included
        if self._fastsm_journal.term_at(included.index) == included.term:
            self._fastsm_journal.truncate_before(included.index)
        else:
            self._fastsm_journal.rebase(SENTINEL, *included)
        self._fastsm_remove_retired()
        with open_snapshot(self._fastsm_places.incoming) as snapshot:
            self._fastsm_dump_size = snapshot.size
            attachment = snapshot.attachment
        self._fastsm_last_dump = included
        self._fastsm_restore(attachment)
        self._SyncObj__raftLastApplied = included.index
        self._SyncObj__raftCommitIndex = max(self._SyncObj__raftCommitIndex, included.index)
        self._fastsm_pass_over_waiting(included.index)
        if self._fastsm_on_change is not None:
            self._fastsm_on_change(None)
        self._SyncObj__sendNextNodeIdx(node, nextNodeIdx=included.index + 1, success=True)

    def _fastsm_restore(self, attachment: bytes) -> None:
        """Takes over what ``_fastsm_attachment`` put into a snapshot."""
        content = pickle.loads(attachment)
        self._fastsm_methods.require(content, self._fastsm_places.path)
        self.__dict__.update(content["attributes"])
        for consumer, (_, state) in zip(self._fastsm_pickled(), content["consumers"], strict=False):
            consumer._deserialize(state)  # a consumer that a release has added at the end has no state yet
        self._SyncObj__enabledCodeVersion = content["code_version"]
        self._SyncObj__onSetCodeVersion(content["code_version"])
        if self._SyncObj__conf.dynamicMembershipChange:
            own = self._SyncObj__selfNode
            known = {node.id: node for node in self._SyncObj__otherNodes}  # the objects made by the user
            others = [known.get(node, node) for node in content["nodes"] if own is None or node != own.id]
            self._SyncObj__updateClusterConfiguration(others)

    def _fastsm_end_dumping(self) -> None:
        """Waits for running work, and ends transfers, once the state machine is closed."""
        dump, installing = self._fastsm_dump, self._fastsm_installing
        works = [self._fastsm_removing, dump and dump.work, installing and installing[2]]
        for work in works:
            if isinstance(work, Work):
                try:
                    work.finish()
                except FastsmError as error:
                    logger.info("ended with the node: %s", error)
        self._fastsm_end_transfers()
        if self._fastsm_receiver is not None:
            self._fastsm_receiver.close()
            self._fastsm_receiver = None
