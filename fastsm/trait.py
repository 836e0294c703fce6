"""``StateMachine``: the twenty methods that a Raft library needs from a state machine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from os import PathLike
from typing import Any

from fastsm.types import Entry, LogId, Result, SnapshotMetadata


class StateMachine(ABC):
    """The applied half of a Raft node: committed entries go in, reads come out.

    A Raft library types against this class, and any class may implement it;
    :class:`fastsm.FastStateMachine` and :class:`fastsm.MemoryStateMachine` do. A state machine is
    deterministic: equal sequences of entries give equal states and results on every replica.
    (d-engine, a Raft library in Rust, has a trait of the same name and shape.)
    """

    __slots__ = ("__weakref__",)

    @abstractmethod
    def start(self) -> None:
        """Makes the machine run again after :meth:`stop`. Idempotent."""

    @abstractmethod
    def stop(self) -> None:
        """Makes everything applied durable, then stops. Idempotent."""

    @abstractmethod
    def is_running(self) -> bool:
        """Returns True from construction, or :meth:`start`, until :meth:`stop`."""

    @abstractmethod
    def get(self, key: Any, /) -> bytes | None:
        """Returns the value of a key (any bytes-like object), or None."""

    @abstractmethod
    def entry_term(self, entry_id: int, /) -> int | None:
        """Returns the term of the entry at an index if it is certain, else None.

        It is certain for every entry that was seen, and for indexes between two such entries of one term, since terms
        never fall.
        """

    @abstractmethod
    async def apply_chunk(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> list[Result]:
        """Applies committed entries, all or none; returns one result for each.

        True: it took effect. False: a compare-and-swap or a batch did not match, or the key of a touch or the session
        of a forget does not exist. None: it was applied before, and is skipped. An ``Answer``: its command returns one.
        Raises ``OrderError``, ``CommandError`` or ``ProcedureError``; then nothing was applied.
        """

    @abstractmethod
    def len(self) -> int:
        """Returns the number of live keys, in O(1)."""

    def __len__(self) -> int:
        return self.len()

    def __bool__(self) -> bool:
        return True  # a state machine counts as true, however empty

    def is_empty(self) -> bool:
        """Returns whether there are no live keys."""
        return self.len() == 0

    @abstractmethod
    def update_last_applied(self, log_id: LogId) -> None:
        """Moves last applied forward for an entry without a command; raises ``OrderError``."""

    @abstractmethod
    def last_applied(self) -> LogId:
        """Returns the last applied entry; ``LogId(0, 0)`` if there is none."""

    @abstractmethod
    def persist_last_applied(self, log_id: LogId) -> None:
        """Does the same as :meth:`update_last_applied`; durable on return."""

    @abstractmethod
    def update_last_snapshot_metadata(self, metadata: SnapshotMetadata) -> None:
        """Stores the metadata of the latest snapshot, in memory."""

    @abstractmethod
    def snapshot_metadata(self) -> SnapshotMetadata | None:
        """Returns the metadata of the latest snapshot, or None."""

    @abstractmethod
    def persist_last_snapshot_metadata(self, metadata: SnapshotMetadata) -> None:
        """Does the same as :meth:`update_last_snapshot_metadata`; durable on return."""

    @abstractmethod
    async def generate_snapshot_data(
        self, new_snapshot_dir: str | PathLike[str], last_included: LogId
    ) -> bytes:
        """Writes a snapshot exactly as of ``last_included``; returns its 32-byte BLAKE3 checksum."""

    @abstractmethod
    async def apply_snapshot_from_file(
        self, metadata: SnapshotMetadata | None, snapshot_path: str | PathLike[str]
    ) -> None:
        """Replaces the state with a snapshot's, in one atomic step."""

    @abstractmethod
    def save_hard_state(self) -> None:
        """Makes last applied and snapshot metadata durable."""

    @abstractmethod
    def flush(self) -> None:
        """Makes everything applied before the call durable."""

    @abstractmethod
    async def flush_async(self) -> None:
        """Does the same as :meth:`flush`, without blocking the event loop."""

    @abstractmethod
    async def reset(self) -> None:
        """Returns to the initial empty state, in one atomic step."""
