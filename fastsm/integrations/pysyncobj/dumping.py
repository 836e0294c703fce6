"""Snapshots of a node: when one is written, how it gets to a follower, how it is installed.

All work is done on threads of its own; the tick thread starts it, and takes note of its end.
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
from fastsm.integrations.pysyncobj.places import SENTINEL, Places
from fastsm.integrations.pysyncobj.replication import LEADER
from fastsm.snapshot.file import SNAPSHOT, Snapshot, open_snapshot
from fastsm.snapshot.receiver import SnapshotReceiver
from fastsm.types import LogId, SnapshotMetadata

logger = logging.getLogger("fastsm")

PIECE = 256 << 10
WINDOW = 1 << 20  # bytes on the way that the follower has not confirmed
PATIENCE = 60.0  # seconds that a new dump waits for a snapshot to arrive that is being sent
NO_ROOM_PAUSE = 10.0

class DumpPolicy(NamedTuple):
    """When a node writes a snapshot and shortens its journal.

    - ``journal_bytes``: when so much has come since the last one, and
    - ``ratio``: so many times the size of the last one,
    - ``least_seconds``: but not more often than that.
    - ``trailing_entries``: so many entries before a snapshot are kept: a follower that lags less needs no snapshot.
      (A leader also keeps what its connected followers lack, as long as the journal is not too large.)
    """

    journal_bytes: int = 64 << 20
    ratio: float = 1.0
    least_seconds: float = 5.0
    trailing_entries: int = 100_000


class Work:
    """A function on a thread of its own; ``finish`` gives its value or raises what it raised."""

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
    """A snapshot on its way to a follower. Open: it stays what it is when a newer one takes its name."""

    snapshot: Snapshot
    sent: int = 0
    taken: int = 0
    began: float = field(default_factory=clock.monotonic)


class Dump(NamedTuple):
    """One that is being written."""

    included: LogId
    work: Work


class Dumping(Applying):
    """The part of a node that dumps, sends and installs snapshots."""

    policy: DumpPolicy
    places: Places

    def _begin_dumping(self, included: LogId, size: int) -> None:
        """``included`` and ``size``: of the snapshot that is there; ``LogId()`` and 0 when there is none."""
        self._last_dump, self._dump_size = included, size
        self._dumped_at = clock.monotonic() - self.policy.least_seconds
        self._not_before = 0.0
        self._dump: Dump | None = None
        self._removing: Work | None = None
        self._wanted = False
        self._transfers: dict[Any, Transfer] = {}
        self._receiver: SnapshotReceiver | None = None
        self._arriving: SnapshotMetadata | None = None
        self._complete: tuple[Any, SnapshotMetadata] | None = None  # received, to be installed
        self._installing: tuple[Any, SnapshotMetadata, Work] | None = None
        self.dumps = self.installs = 0

    def _take_message(self, node: Any, message: dict[str, Any]) -> None:
        if "piece" in message:
            if message["term"] >= self._SyncObj__raftCurrentTerm:
                self._take_piece(node, message)
        elif message["type"] == "snapshot_taken":
            self._take_confirmation(node, message)
        else:
            super()._take_message(node, message)

    # ---- when ------------------------------------------------------------------------------------------

    def _SyncObj__tryLogCompaction(self) -> None:
        """Called in every tick."""
        if self._failure is not None:
            return
        if self._SyncObj__raftState != LEADER:
            self._end_transfers()
        if self._installing is not None and self._installing[2].done:
            self._finish_install()
        if self._removing is not None and self._removing.done:
            work, self._removing = self._removing, None
            work.finish()
        if self._dump is not None:
            if self._dump.work.done:
                self._finish_dump()
        elif self._installing is None:
            if self._complete is not None:
                self._begin_install()
            elif self._wants_dump():
                self._begin_dump()

    def _wants_dump(self) -> bool:
        now = clock.monotonic()
        if self._SyncObj__raftLastApplied <= self._last_dump.index or now < self._not_before:
            self._SyncObj__forceLogCompaction = False
            return False
        if self._SyncObj__forceLogCompaction or self._wanted:
            return True
        # Nodes of one cluster have journals of one length: they need not all dump at once.
        rank = sorted(node.id for node in self._SyncObj__otherNodes | {self._SyncObj__selfNode}).index(
            self._SyncObj__selfNode.id)
        least = max(self.policy.journal_bytes, int(self.policy.ratio * self._dump_size)) * (1 + 0.1 * rank)
        if self.journal.newest_size < least or now - self._dumped_at < self.policy.least_seconds:
            return False
        sending = [transfer for transfer in self._transfers.values() if now - transfer.began < PATIENCE]
        return not sending or self.journal.newest_size > 4 * least

    # ---- write -----------------------------------------------------------------------------------------

    def _begin_dump(self) -> None:
        self._SyncObj__forceLogCompaction = self._wanted = False
        included = self.machine.last_applied()
        try:
            attachment = self._attachment()
        except Exception:
            logger.exception("no dump: the state of a consumer cannot be pickled")
            self._not_before = clock.monotonic() + NO_ROOM_PAUSE
            return
        machine, journal, places = self.machine, self.journal, self.places

        def work() -> int:
            machine.write_snapshot(places.snapshot, included, attachment=attachment)
            journal.prepare()
            places.remove_incoming()
            return os.path.getsize(os.path.join(places.snapshot, SNAPSHOT))

        self._dump = Dump(included, Work("fastsm dump", work))

    def _attachment(self) -> bytes:
        """PySyncObj's own state and that of its other consumers, now."""
        return pickle.dumps({
            "nodes": sorted(node.id for node in self._SyncObj__otherNodes | {self._SyncObj__selfNode}),
            "code_version": self._SyncObj__enabledCodeVersion,
            "attributes": {
                name: value for name, value in self.__dict__.items()
                if name not in self._SyncObj__properies and not name.startswith("_SyncObj__")
            },
            "consumers": [consumer._serialize() for consumer in self._SyncObj__consumers],
        }, 4)  # fmt: skip

    def _finish_dump(self) -> None:
        assert self._dump is not None
        (included, work), self._dump = self._dump, None
        try:
            self._dump_size = work.finish()
        except SnapshotError as error:
            logger.info("a dump as of %s was ended: %s", tuple(included), error)
            return
        except StorageError as error:
            # Nothing depends on it yet; if the state machine is hurt, the next apply says so.
            logger.warning("a dump as of %s failed, it is tried again: %s", tuple(included), error)
            self._not_before = clock.monotonic() + NO_ROOM_PAUSE
            return
        self._last_dump, self._dumped_at = included, clock.monotonic()
        self.dumps += 1
        self.journal.rotate()
        self.journal.truncate_before(self._keep_from(included.index))
        self._remove_retired()

    def _remove_retired(self) -> None:
        if self._removing is None:
            self._removing = Work("fastsm journal", self.journal.remove_retired)

    def _keep_from(self, included: int) -> int:
        """The first entry that the journal keeps."""
        keep = included - self.policy.trailing_entries
        if self.journal.size < 8 * max(self.policy.journal_bytes, self._dump_size):
            if self._SyncObj__raftState == LEADER:
                matching = (self._SyncObj__raftMatchIndex[node] for node in self._SyncObj__connectedNodes)
                keep = min((keep, *(index for index in matching if index)))
            keep = min((keep, *(t.snapshot.metadata.last_included.index for t in self._transfers.values())))
        return max(keep, 1)

    # ---- send ------------------------------------------------------------------------------------------

    def _send_snapshot(self, node: Any) -> None:
        """Pieces of the newest snapshot, as far as the follower has confirmed the ones before.

        Where none is due, an empty one asks how far the follower is: pieces are passed over by a follower of a later
        term, confirmations by a leader of a later one, and neither would ever say so.
        """
        transfer = self._transfer_to(node)
        if transfer is None:
            self._transport.send(node, self._sign_of_life())
        elif not self._send_pieces(node, transfer):
            self._send_piece(node, transfer, b"")

    def _sign_of_life(self) -> dict[str, Any]:
        return {"type": "append_entries", "term": self._SyncObj__raftCurrentTerm, "commit_index": 0}

    def _transfer_to(self, node: Any) -> Transfer | None:
        transfer = self._transfers.get(node)
        if transfer is not None and transfer.snapshot.metadata.last_included.index >= self.journal.first_index:
            return transfer
        self._end_transfer(node)
        try:
            snapshot = self.places.open_newest()
        except FastsmError as error:
            logger.warning("the snapshot is damaged, another one is made: %s", error)
            snapshot = None
        if snapshot is None or snapshot.metadata.last_included.index < self.journal.first_index:
            self._make_another()
            return None
        self._transfers[node] = transfer = Transfer(snapshot)
        return transfer

    def _make_another(self) -> None:
        self._wanted, self._last_dump = True, LogId()

    def _send_pieces(self, node: Any, transfer: Transfer) -> bool:
        """Sends what the window has room for; whether that was anything."""
        begin = transfer.sent
        while transfer.sent < transfer.snapshot.size and transfer.sent - transfer.taken < WINDOW:
            piece = transfer.snapshot.read_at(transfer.sent, PIECE)
            if not self._send_piece(node, transfer, piece):
                break
            transfer.sent += len(piece)
        return transfer.sent > begin

    def _send_piece(self, node: Any, transfer: Transfer, piece: bytes) -> bool:
        metadata = transfer.snapshot.metadata
        return self._transport.send(node, {
            **self._sign_of_life(), "piece": piece, "offset": transfer.sent, "snapshot": tuple(metadata.last_included),
            "checksum": metadata.checksum,
        })  # fmt: skip

    def _SyncObj__onNodeDisconnected(self, node: Any) -> None:
        super()._SyncObj__onNodeDisconnected(node)
        self._end_transfer(node)  # who comes next may be another process, which has nothing

    def _end_transfer(self, node: Any) -> None:
        transfer = self._transfers.pop(node, None)
        if transfer is not None:
            transfer.snapshot.close()

    def _end_transfers(self) -> None:
        for node in list(self._transfers):
            self._end_transfer(node)

    def _take_confirmation(self, node: Any, message: dict[str, Any]) -> None:
        transfer = self._transfers.get(node)
        if self._SyncObj__raftState != LEADER or message["term"] != self._SyncObj__raftCurrentTerm or transfer is None:
            return
        if message["checksum"] != transfer.snapshot.metadata.checksum:
            return
        if message["damaged"]:
            logger.error("the snapshot that %s was sent is damaged; another one is made", node.id)
            self._end_transfer(node)
            self._make_another()
            return
        transfer.taken = message["offset"]
        if transfer.sent < transfer.taken or message["again"]:
            transfer.sent = transfer.taken
        if node in self._SyncObj__connectedNodes:
            self._send_pieces(node, transfer)

    def _take_reply(self, node: Any, message: dict[str, Any]) -> None:
        super()._take_reply(node, message)
        if message["success"]:
            self._end_transfer(node)

    # ---- receive and install ---------------------------------------------------------------------------

    def _take_piece(self, node: Any, message: dict[str, Any]) -> None:
        self._hear(node, message)
        if self._installing is not None:
            return
        announced = SnapshotMetadata(LogId(*message["snapshot"]), message["checksum"])
        if announced.last_included.index <= self._SyncObj__raftLastApplied:
            self._SyncObj__sendNextNodeIdx(node, reset=True)
            return
        receiver = self._receiver_of(announced)
        again = message["offset"] > receiver.offset
        if not again:
            try:
                receiver.write(message["offset"], message["piece"])
            except (SnapshotError, FormatVersionError) as error:
                logger.warning("a snapshot from %s is not right: %s", node.id, error)
                self._confirm(node, announced, 0, damaged=True)
                return
        self._confirm(node, announced, receiver.offset, again=again)
        self._complete = (node, announced) if receiver.offset == receiver.size else None

    def _receiver_of(self, announced: SnapshotMetadata) -> SnapshotReceiver:
        if self._receiver is not None and self._arriving != announced:
            self._receiver.discard()
            self._receiver.close()
            self._receiver = self._complete = None
        if self._receiver is None:
            self._receiver = SnapshotReceiver(self.places.incoming, _files=self.places.files("incoming"))
            if self._arriving != announced:
                self._receiver.discard()  # what a process before this one left may be of another one
            self._arriving = announced
        return self._receiver

    def _confirm(
        self, node: Any, announced: SnapshotMetadata, offset: int, *, again: bool = False, damaged: bool = False
    ) -> None:
        self._transport.send(node, {
            "type": "snapshot_taken", "term": self._SyncObj__raftCurrentTerm, "checksum": announced.checksum,
            "offset": offset, "again": again, "damaged": damaged,
        })  # fmt: skip

    def _begin_install(self) -> None:
        assert self._complete is not None
        assert self._receiver is not None
        (node, announced), self._complete = self._complete, None
        receiver, machine, journal = self._receiver, self.machine, self.journal

        def work() -> None:
            path = receiver.finish(announced)
            receiver.close()
            machine.install_snapshot(announced, path)
            journal.prepare()

        self._receiver = None
        self._installing = (node, announced, Work("fastsm install", work))

    def _finish_install(self) -> None:
        assert self._installing is not None
        (node, announced, work), self._installing = self._installing, None
        try:
            work.finish()
        except SnapshotError as error:
            logger.warning("a snapshot from %s is not right: %s", node.id, error)
            self._arriving = None
            self._confirm(node, announced, 0, damaged=True)
            return
        self.installs += 1
        included = announced.last_included
        if self.journal.term_at(included.index) == included.term:
            self.journal.truncate_before(included.index)
        else:
            self.journal.rebase(SENTINEL, *included)
        self._remove_retired()
        with open_snapshot(self.places.incoming) as snapshot:
            self._dump_size = snapshot.size
            attachment = snapshot.attachment
        self._last_dump = included
        self._SyncObj__raftLastApplied = included.index
        self._SyncObj__raftCommitIndex = max(int(self.raftCommitIndex), included.index)
        self.restore(attachment)
        self._pass_over_waiting(included.index)
        self._SyncObj__sendNextNodeIdx(node, nextNodeIdx=included.index + 1, success=True)

    def restore(self, attachment: bytes) -> None:
        """Takes over what ``_attachment`` put into a snapshot."""
        content = pickle.loads(attachment)
        self.__dict__.update(content["attributes"])
        for consumer, state in zip(self._SyncObj__consumers, content["consumers"], strict=True):
            consumer._deserialize(state)
        self._SyncObj__enabledCodeVersion = content["code_version"]
        self._SyncObj__onSetCodeVersion(content["code_version"])
        if self.conf.dynamicMembershipChange:
            own = self._SyncObj__selfNode.id
            self._SyncObj__updateClusterConfiguration([node for node in content["nodes"] if node != own])

    def _end_dumping(self) -> None:
        """Waits for what runs; the state machine has ended its jobs."""
        works = [self._removing, self._dump and self._dump.work, self._installing and self._installing[2]]
        for work in works:
            if isinstance(work, Work):
                try:
                    work.finish()
                except FastsmError as error:
                    logger.info("ended with the node: %s", error)
        self._end_transfers()
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
