"""What a node stores: entries, term and vote in ``RaftLog``, the applied state in ``FastStateMachine``.

Only the log is synced before anything is acknowledged. The state needs no sync of its own: what it loses when power
fails is applied again from the log, so the log is never compacted beyond what is durable in the state.
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
    """Return the members that a configuration entry names; None for any other entry."""
    said = decode(command)
    return json.loads(said.data) if isinstance(said, Config) else None


def config_of(members: list[str]) -> bytes:
    return config(json.dumps(sorted(members)).encode())


class Storage:
    """A node's log and state, and the members that they name.

    ``members`` are those of a new cluster; they count for as long as neither log nor state names any.
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
            # The node ended between an install and the log's compaction, so the log may continue with entries that were
            # never committed; or a power loss took entries from the log that the state kept. A follower that lacks any
            # of them gets a snapshot, so there has to be one.
            self.machine.write_snapshot(self.snapshots, applied)
            self.log.compact(applied)
            self.log.sync()
        self.configs: list[tuple[int, list[str]]] = []  # (index, members) of configuration entries in the log
        self._note_configs(self.log.entries(self.log.first_index, self.log.last_index))

    @property
    def members(self) -> list[str]:
        """The newest known members: a configuration takes effect as soon as it is in the log (thesis, 4.1)."""
        if self.configs:
            return self.configs[-1][1]
        carried = self.machine.membership()
        return self._first_members if carried is None else json.loads(carried[1])

    @property
    def config_index(self) -> int:
        """The index of the entry that named the members."""
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
        """Append new entries, in memory; ``log.sync_async()`` makes them durable."""
        self.log.append(entries)
        self._note_configs(entries)

    def fits(self, before: LogId) -> bool:
        """Return whether entries after this one may be taken: it is in the log, or was compacted, hence committed."""
        return before.index < self.log.first_index - 1 or (self.log.term(before.index) or 0) == before.term

    def take(self, entries: list[Entry]) -> None:
        """Append a leader's entries: skip those that are here already, and remove entries that contradict them."""
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
        """Write a snapshot of the applied state, then compact the log except for the last ``kept`` entries of it.

        Entries are applied meanwhile. On return the state is durable up to the snapshot's entry, so the log may be
        compacted up to there.
        """
        last = self.machine.last_applied()
        try:
            await self.machine.generate_snapshot_data(self.snapshots, last)
        except SnapshotError:
            if self.machine.stats().base <= last:
                raise
            return  # a leader's newer snapshot was installed meanwhile, which aborts this one
        kept_from = last.index - kept  # followers that are only a little late need no snapshot
        if kept_from >= self.log.first_index:
            self._compact(LogId(kept_from, self.log.term(kept_from) or 0))

    def _compact(self, up_to: LogId) -> None:
        self.log.compact(up_to)
        self.configs = [config for config in self.configs if config[0] > up_to.index]

    # ---- a snapshot that a leader sends ----------------------------------------------------------------

    def expect_snapshot(self, metadata: SnapshotMetadata) -> int:
        """Prepare for a snapshot; return the offset to send from. A part of it may be here already."""
        self.close_receiver()
        self.receiver = SnapshotReceiver(self.snapshots, metadata)
        return self.receiver.offset

    async def install(self) -> LogId:
        """Install the complete snapshot as the state, and let the log continue after it."""
        receiver = self.receiver
        assert receiver is not None
        metadata = receiver.metadata
        assert metadata is not None
        path = await receiver.finish_async()
        receiver.close()
        if self.receiver is receiver:  # a leader that did not wait may have started another transfer meanwhile
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
