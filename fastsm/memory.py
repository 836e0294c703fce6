"""``MemoryStateMachine``: the same behaviour as ``FastStateMachine``, on a dict, deliberately plain."""

from __future__ import annotations

import operator
import os
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from fastsm.command import decode
from fastsm.errors import CommandError, NotRunningError, OrderError
from fastsm.trait import StateMachine
from fastsm.types import Batch, CompareAndSwap, Config, Delete, Entry, LogId, Noop, Put, SnapshotMetadata

LARGEST = 2**64 - 2


class MemoryStateMachine(StateMachine):
    """A state machine in plain Python: the model that tests compare with, and a stand-in for embedders' tests.

    Nothing is durable; ``flush`` and its siblings only note what would be. Thread safety: none.
    """

    def __init__(self, *, contiguous: bool = True) -> None:
        self._contiguous = contiguous
        self._running = True
        self._forget()

    def _forget(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._seen: list[LogId] = []
        self._durable = LogId()
        self._metadata: SnapshotMetadata | None = None
        self._membership: tuple[LogId, bytes] | None = None

    def __repr__(self) -> str:
        return f"<MemoryStateMachine: {len(self._values)} keys, applied {tuple(self.last_applied())}>"

    # ---- life cycle ------------------------------------------------------------------------------------

    def start(self) -> None:
        self._running = True

    def stop(self) -> None:
        self.flush()
        self._running = False

    def is_running(self) -> bool:
        return self._running

    def _require(self) -> None:
        if not self._running:
            raise NotRunningError("this state machine is stopped: call start() first")

    # ---- apply -----------------------------------------------------------------------------------------

    def apply(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> list[bool | None]:
        """Applies committed entries, all or none."""
        self._require()
        entries = self._check_order(chunk)
        values = dict(self._values)
        membership = self._membership
        results: list[bool | None] = []
        for index, term, command in entries:
            if index <= self.last_applied().index:
                results.append(None)
                continue
            try:
                decoded = decode(command)
            except CommandError as error:
                raise type(error)(f"entry {index}: {error}", index=index) from None
            if isinstance(decoded, Config):
                membership = (LogId(index, term), decoded.data)
            results.append(self._apply_one(decoded, values))
        self._seen += [LogId(i, t) for i, t, _ in entries if i > self.last_applied().index]
        self._values = values
        self._membership = membership
        return results

    async def apply_chunk(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> list[bool | None]:
        return self.apply(chunk)

    def _check_order(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> list[Entry]:
        entries: list[Entry] = []
        before: LogId | None = None
        previous = self.last_applied()
        for item in chunk:
            if not isinstance(item, tuple) or len(item) != 3:
                raise TypeError(f"expected an Entry(index, term, command), found {type(item).__name__}")
            log_id = _checked(item)
            if before is not None and (log_id.index <= before.index or log_id.term < before.term):
                raise OrderError(f"{log_id} behind {before}", index=log_id.index)
            before = log_id
            if log_id.index <= self.last_applied().index:
                known = self.entry_term(log_id.index)
                if known is not None and known != log_id.term:
                    raise OrderError(f"{log_id} was applied in term {known}", index=log_id.index)
            else:
                if log_id.term < previous.term:
                    raise OrderError(f"{log_id} behind {previous}", index=log_id.index)
                if self._contiguous and log_id.index != previous.index + 1:
                    raise OrderError(f"{log_id} behind {previous}: a gap", index=log_id.index)
                previous = log_id
            entries.append(Entry(*log_id, item[2]))
        return entries

    def _apply_one(self, command: object, values: dict[bytes, bytes]) -> bool:
        if isinstance(command, Put):
            values[command.key] = command.value
        elif isinstance(command, Delete):
            values.pop(command.key, None)
        elif isinstance(command, CompareAndSwap):
            if values.get(command.key) != command.expected:
                return False
            if command.value is None:
                values.pop(command.key, None)
            else:
                values[command.key] = command.value
        elif isinstance(command, Batch):
            trial = dict(values)
            if not all(self._apply_one(member, trial) for member in command.commands):
                return False
            values.clear()
            values.update(trial)
        else:
            assert isinstance(command, (Noop, Config))
        return True

    # ---- read ------------------------------------------------------------------------------------------

    def get(self, key: Any) -> bytes | None:
        self._require()
        return self._values.get(bytes(memoryview(key)))

    def get_many(self, keys: Sequence[Any]) -> list[bytes | None]:
        """The values of the keys, in their order."""
        return [self.get(key) for key in keys]

    def entry_term(self, entry_id: int) -> int | None:
        at = bisect_left(self._seen, (entry_id,))
        if at == len(self._seen):
            return None
        if self._seen[at].index == entry_id:
            return self._seen[at].term
        if at and self._seen[at - 1].term == self._seen[at].term:
            return self._seen[at].term
        return None

    def len(self) -> int:
        return len(self._values)

    def items(self) -> list[tuple[bytes, bytes]]:
        """All pairs, in no order."""
        self._require()
        return list(self._values.items())

    def membership(self) -> tuple[LogId, bytes] | None:
        """The newest ``config``."""
        return self._membership

    # ---- hard state ------------------------------------------------------------------------------------

    def update_last_applied(self, log_id: LogId | tuple[int, int]) -> None:
        self._require()
        log_id = _checked(log_id)
        last = self.last_applied()
        if log_id == last:
            return
        if log_id.index <= last.index or log_id.term < last.term:
            raise OrderError(f"last applied is {last}, cannot become {log_id}", index=log_id.index)
        self._seen.append(log_id)

    def last_applied(self) -> LogId:
        return self._seen[-1] if self._seen else LogId()

    def persist_last_applied(self, log_id: LogId | tuple[int, int]) -> None:
        self.update_last_applied(log_id)
        self.flush()

    def durable(self) -> LogId:
        """The last applied entry at the last flush."""
        return self._durable

    def update_last_snapshot_metadata(self, metadata: SnapshotMetadata) -> None:
        self._require()
        self._metadata = metadata

    def snapshot_metadata(self) -> SnapshotMetadata | None:
        return self._metadata

    def persist_last_snapshot_metadata(self, metadata: SnapshotMetadata) -> None:
        self.update_last_snapshot_metadata(metadata)
        self.save_hard_state()

    def save_hard_state(self) -> None:
        self.flush()

    def flush(self) -> None:
        self._durable = self.last_applied()

    async def flush_async(self) -> None:
        self.flush()

    # ---- snapshots and reset ---------------------------------------------------------------------------

    async def generate_snapshot_data(
        self, new_snapshot_dir: str | os.PathLike[str], last_included: LogId
    ) -> bytes:
        """Not in this version."""
        raise NotImplementedError("snapshots are not in this version of fastsm")

    async def apply_snapshot_from_file(
        self, metadata: SnapshotMetadata | None, snapshot_path: str | os.PathLike[str]
    ) -> None:
        """Not in this version."""
        raise NotImplementedError("snapshots are not in this version of fastsm")

    def clear(self) -> None:
        """Back to the initial empty state."""
        self._forget()

    async def reset(self) -> None:
        self.clear()


def _checked(log_id: Sequence[Any]) -> LogId:
    index, term = operator.index(log_id[0]), operator.index(log_id[1])
    for name, number in (("index", index), ("term", term)):
        if not 0 <= number <= LARGEST:
            raise OrderError(f"{name} {number}: expected 0 to 2**64 - 2")
    return LogId(index, term)
