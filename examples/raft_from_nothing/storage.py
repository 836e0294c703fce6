"""What a node keeps: ``RaftLog`` for entries, term and vote, ``FastStateMachine`` for what was applied.

Only the log is synced before anything is acknowledged. The state needs no sync of its own: what it loses in a power
loss is applied again from the log, so the log is never compacted beyond what is durable in the state.
"""

from __future__ import annotations

import json
from pathlib import Path

from fastsm import (
    Entry,
    FastStateMachine,
    LogId,
    RaftLog,
    SnapshotError,
    SnapshotMetadata,
    SnapshotReceiver,
    config,
    decode,
)  # fmt: skip
from fastsm.types import Config


def members_of(command: bytes) -> list[str] | None:
    """The members that a configuration entry names; None for every other entry."""
    said = decode(command)
    return json.loads(said.data) if isinstance(said, Config) else None


def config_of(members: list[str]) -> bytes:
    return config(json.dumps(sorted(members)).encode())


class Storage:
    """A node's log and state, and the members that they name.

    ``members``: of a new cluster, for as long as neither log nor state name any.
    """

    def __init__(self, folder: Path, members: list[str]) -> None:
        self.log = RaftLog(folder / "log")
        border = self.log.first_index - 1
        self.machine = FastStateMachine(
            folder / "state", expect_applied=(border, self.log.term(border) or 0) if border else None)
        self.snapshots = folder / "snapshots"
        self.receiver: SnapshotReceiver | None = None
        self._first_members = members
        applied = self.machine.last_applied()
        if self.log.term(applied.index) != applied.term:
            # The end came between an install and the log's step: the log may go on with entries that were never
            # committed. Or a power loss took entries from the log that the state has kept. A follower that lacks any of
            # them gets a snapshot, so there has to be one.
            self.machine.write_snapshot(self.snapshots, applied)
            self.log.compact(applied)
            self.log.sync()
        self.configs: list[tuple[int, list[str]]] = []  # (index, members) of configuration entries in the log
        self._note_configs(self.log.entries(self.log.first_index, self.log.last_index))

    @property
    def members(self) -> list[str]:
        """The newest members that are known of: a configuration counts from when it is in the log (thesis, 4.1)."""
        if self.configs:
            return self.configs[-1][1]
        carried = self.machine.membership()
        return self._first_members if carried is None else json.loads(carried[1])

    @property
    def config_index(self) -> int:
        """The entry that named the members."""
        if self.configs:
            return self.configs[-1][0]
        carried = self.machine.membership()
        return 0 if carried is None else carried[0].index

    def _note_configs(self, entries: list[Entry]) -> None:
        for index, _, command in entries:
            members = members_of(command)
            if members is not None:
                self.configs.append((index, members))

    def append(self, entries: list[Entry]) -> None:
        """Takes new entries, in memory; ``log.sync_async()`` makes them durable."""
        self.log.append(entries)
        self._note_configs(entries)

    def fits(self, before: LogId) -> bool:
        """Whether a leader's entries after this one may be taken: it is in the log, or committed long ago."""
        return before.index < self.log.first_index - 1 or (self.log.term(before.index) or 0) == before.term

    def take(self, entries: list[Entry]) -> None:
        """Takes a leader's entries: those that are here are skipped, and what contradicts them is removed."""
        entries = [entry for entry in entries if entry.index >= self.log.first_index]
        for i, entry in enumerate(entries):
            term = self.log.term(entry.index)
            if term != entry.term:
                if term is not None:
                    self.log.truncate_after(entry.index - 1)
                    self.configs = [config for config in self.configs if config[0] < entry.index]
                self.append(entries[i:])
                return

    async def take_snapshot(self, kept: int) -> None:
        """Writes a snapshot of what is applied, and lets the log forget all but so many of its entries.

        Applying goes on meanwhile. On return the snapshot's entry is durable in the state: the log may go up to there.
        """
        last = self.machine.last_applied()
        try:
            await self.machine.generate_snapshot_data(self.snapshots, last)
        except SnapshotError:
            if self.machine.stats().base <= last:
                raise
            return  # a leader's newer snapshot was installed meanwhile, which ends this one
        kept_from = last.index - kept  # followers that are only a little late need no snapshot
        if kept_from >= self.log.first_index:
            self._compact(LogId(kept_from, self.log.term(kept_from) or 0))

    def _compact(self, up_to: LogId) -> None:
        self.log.compact(up_to)
        self.configs = [config for config in self.configs if config[0] > up_to.index]

    # ---- a snapshot that a leader sends ----------------------------------------------------------------

    def expect_snapshot(self, metadata: SnapshotMetadata) -> int:
        """Prepares for a snapshot; returns the offset from which it is wanted. A part of it may be here already."""
        self.close_receiver()
        self.receiver = SnapshotReceiver(self.snapshots, metadata)
        return self.receiver.offset

    async def install(self) -> LogId:
        """The snapshot is complete: it becomes the state, and the log goes on after it."""
        receiver = self.receiver
        assert receiver is not None
        metadata = receiver.metadata
        assert metadata is not None
        path = await receiver.finish_async()
        receiver.close()
        if self.receiver is receiver:  # a leader that did not wait may have begun to send anew meanwhile
            self.receiver = None
        if metadata.last_included > self.machine.last_applied():
            await self.machine.apply_snapshot_from_file(metadata, path)
            self._compact(metadata.last_included)
        return metadata.last_included

    def close_receiver(self) -> None:
        if self.receiver is not None:
            self.receiver.close()
            self.receiver = None

    async def close(self) -> None:
        self.close_receiver()
        await self.machine.close_async()
        self.log.close()
