from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any

from typing_extensions import Self

from fastsm.background import BackgroundCall
from fastsm.core.awaited import Ticket
from fastsm.core.group_commit import GroupCommit
from fastsm.core.hard_state import HardState
from fastsm.disk.published import Publisher
from fastsm.generation.log import Log
from fastsm.lookup.index import Index
from fastsm.procedures import Registry
from fastsm.types import Entry, LogId, Result, SnapshotMetadata

class JudgeElsewhere:
    def __new__(cls, engine: Engine, chunk: object) -> JudgeElsewhere: ...
    def __call__(self, *args: Any, **kwargs: Any) -> None: ...
    def interrupt(self, call: BackgroundCall) -> None: ...

class CompactElsewhere:
    def __new__(cls, engine: Engine, above: int) -> CompactElsewhere: ...
    def __call__(self, *args: Any, **kwargs: Any) -> None: ...

class Engine(HardState):
    def __new__(cls, *args: Any, **options: Any) -> Self: ...
    def _attach(
        self, log: Log, index: Index, commit: GroupCommit, durable: LogId, contiguous: bool, sync_on_apply: bool
    ) -> None: ...
    def _switch(
        self,
        name_next: Callable[[], None],
        log: Log,
        index: Index,
        commit: GroupCommit,
        state_of_its_own: tuple[LogId, SnapshotMetadata | None] | None = None,
    ) -> None: ...
    def _publish_by(self, publisher: Publisher | None = None) -> None: ...
    def _tell_waiting(self, before: int) -> None: ...
    def _is_called_for(self) -> bool: ...
    def _compact_above(self, dead_bytes: int) -> None: ...
    def apply(self, chunk: Iterable[Entry | tuple[int, int, bytes]]) -> list[Result]:
        """Applies committed entries, all or none. O(operations).

        `chunk`: a sequence of `Entry` or plain tuples `(index, term, command)`. Indexes rise strictly and terms
        never fall. Entries at or below `last_applied()` are skipped. Each entry that is not skipped must have the next
        index (with `contiguous=False`: any higher one).

        Returns a list with one result per entry: True if it took effect; False if a compare-and-swap or a batch did not
        match, or if the key of a touch or the session of a forget does not exist; None if it was skipped; an `Answer`
        if its command returns one. Durable on return with `sync="apply"`, otherwise after the next `flush`. Readers see
        the state before the chunk or after it, never in between.

        Raises `OrderError`, `CommandError`, `ProcedureError`, `StorageError`, `NotRunningError`; then nothing of the
        chunk was applied. Thread safe; concurrent calls take turns.
        """
    def _apply_if_free(
        self, chunk: Iterable[Entry | tuple[int, int, bytes]], room: int
    ) -> list[Result] | None: ...
    def _hold(self, chunk: Iterable[Entry | tuple[int, int, bytes]]) -> tuple[Entry | tuple[int, int, bytes], ...]: ...
    def _apply_in_turn(self, chunk: Iterable[Entry | tuple[int, int, bytes]]) -> list[Result]: ...
    def _set_procedures(self, procedures: Registry, twice: bool) -> None: ...
    def _procedures(self) -> Registry: ...
    def _looked_past(self) -> int: ...
    def _await_applied(
        self, index: int, queue: SimpleQueue[Any] | None, owner: Any, blocks: bool
    ) -> Ticket | None: ...
    def _waiting_for_entries(self) -> int: ...
    def _wait_no_more(self, ticket: Ticket) -> None: ...
