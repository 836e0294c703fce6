from collections.abc import Iterable
from typing import Any

from typing_extensions import Buffer

from fastsm.core.turns import Turns
from fastsm.journal.format import SegmentHead
from fastsm.journal.journal import Journal
from fastsm.types import Entry, LogId

LARGEST_COMMAND: int
LARGEST_VOTE: int
CHECK_SECONDS: float
CLOSED: str

class Batch: ...

class LogEngine:
    @property
    def _turns(self) -> Turns: ...
    @property
    def first_index(self) -> int:
        """The first kept entry, or the next one if there is none: 1 at first, i + 1 after `compact((i, t))`."""
    @property
    def last_index(self) -> int:
        """The last entry; in an empty log, the index after which it begins (0 at first)."""
    @property
    def last_term(self) -> int:
        """The term of the last entry; in an empty log, of the entry after which it begins (0 at first)."""
    @property
    def durable_index(self) -> int:
        """The last entry that would survive a power loss now.

        It falls only with a truncation, or when `compact` drops entries of another history.
        """
    def term(self, index: int, /) -> int | None:
        """Returns the term of an entry, or None if the log does not have it.

        The log has the terms of its entries, and of the entry after which it begins: the last compacted one, or at
        first index 0, of term 0. So the entry before any entry of the log has a known term. O(1).
        """
    def entries(self, first: int, last: int, *, max_bytes: int | None = None) -> list[Entry]:
        """Returns the existing entries from `first` to `last`, both included, as a list of `Entry`.

        `max_bytes`: only as many entries as have commands of at most this size in total, but at least one. Raises
        `CompactedError` if `first` is before `first_index`; its `oldest` is the first entry that can be read. All
        entries are from one moment of the log, which other threads may change meanwhile. O(what is returned).
        """
    def hard_state(self) -> tuple[int, bytes | None]:
        """Returns `(term, voted_for)` as last saved and durable; `(0, None)` at first."""
    def append(self, entries: Iterable[Entry | tuple[int, int, Buffer]], /) -> None:
        """Appends entries, all or none; durable after `sync`. O(bytes).

        `entries`: a sequence of `Entry` or plain tuples `(index, term, command)` with consecutive indexes and terms
        that never fall. Entries that the log has already, with the same term, are skipped, without comparing their
        commands. An `OrderError`, whose `index` names the entry, is raised for an entry that the log has with another
        term, a gap after `last_index`, a term below `last_term`, or an index below `first_index`: a follower truncates
        first. A command is bytes-like.

        Raises `CommandError` for a command of more than 2**32 - 1 bytes, and `StorageError`; then nothing has changed.
        After a crash, a prefix of what was not synced may remain.
        """
    def truncate_after(self, index: int) -> None:
        """Removes the entries after `index`; does nothing if there are none. O(segments), durable after `sync`.

        `index` may be the one after which the log begins: then no entries are left. Below that: `OrderError`.
        """
    def compact(self, up_to: LogId | tuple[int, int]) -> None:
        """Drops the entries up to `up_to`, a `LogId`, which a snapshot contains. O(segments), durable after `sync`.

        If the log does not have that very entry (a snapshot was installed), all entries are dropped, and the log begins
        after it. Does nothing if entries up to there were compacted already; a term below that of the last compacted
        entry is an `OrderError`. Reads see the change immediately. Files of segments that are no longer needed are
        removed by a later `sync`.
        """
    def save_hard_state(self, term: int, voted_for: Buffer | None = None) -> None:
        """Saves the current term, and who got this node's vote in it (bytes or None); durable on return.

        `voted_for`: at most 65,535 bytes, else a `ValueError`: each new segment of the log begins with a copy of it.
        The term never falls, and a vote cannot be changed within its term: anything else is an `OrderError`. If this
        raises `StorageError` because the disk is full, nothing has changed.
        """
    def sync(self) -> None:
        """Makes everything that was appended, truncated and compacted before the call durable.

        Overlapping calls share one sync of the file. If it fails, raises `StorageError`, and the log is poisoned: reads
        still work, writes raise until the directory is opened again.
        """
    def _attach(self, log: Journal, segment_bytes: int) -> tuple[bool, int, int, int, int]: ...
    def _mark(self) -> tuple[Any, tuple[int, int], Any]: ...
    def _sync_to(self, mark: tuple[Any, tuple[int, int], Any]) -> None: ...
    def _remove(self, retired: list[Any]) -> None: ...
    def _files(self) -> list[tuple[str, SegmentHead, int, int]]: ...
    def _counts(self) -> tuple[int, int, int, int, int, int, int, int, float]: ...
    def _is_closed(self) -> bool: ...
    def _is_poisoned(self) -> bool: ...
    def _finish(self) -> None: ...
    def _abandon(self) -> None: ...
