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
        """The first entry that is kept, or the next one when there is none: 1 at first; i + 1 after `compact((i, t))`.

        """
    @property
    def last_index(self) -> int:
        """The last entry. An empty log: the one that it begins after, 0 at first."""
    @property
    def last_term(self) -> int:
        """The term of the last entry. An empty log: of the one that it begins after, 0 at first."""
    @property
    def durable_index(self) -> int:
        """The last entry that would survive a power loss now. It falls with a truncation only."""
    def term(self, index: int, /) -> int | None:
        """The term of an entry, or None when the log does not know it.

        Known are the entries that are there, and the one that the log begins after: what was compacted last, or 0, of
        term 0, at first. So the entry before any entry of the log has a term. O(1).
        """
    def entries(self, first: int, last: int, *, max_bytes: int | None = None) -> list[Entry]:
        """The entries from `first` to `last`, both included, as a list of `Entry`: as many of them as are there.

        `max_bytes`: at most as many as have so many bytes of commands together, but at least one. What lies before
        `first_index` was compacted: `CompactedError`, whose `oldest` is the first entry that can be read. As the log
        is at one moment, next to whatever is appended, truncated or compacted. O(what is returned).
        """
    def hard_state(self) -> tuple[int, bytes | None]:
        """`(term, voted_for)` as they were last saved, and are durable; `(0, None)` at first."""
    def append(self, entries: Iterable[Entry | tuple[int, int, Buffer]], /) -> None:
        """Appends entries, all or none; durable after `sync`. O(bytes).

        `entries`: a sequence of `Entry` or plain tuples `(index, term, command)` with consecutive indexes and terms
        that never fall. Those that are there already, with the same term, are skipped: their command is not looked at.
        An entry that is there with another term, a gap after `last_index`, a term below `last_term`, or an index below
        `first_index` is an `OrderError`, whose `index` names it: a follower truncates first. A command is bytes-like.

        Raises `CommandError` for a command of more than 2**32 - 1 bytes, `StorageError`; then nothing has changed.
        After a crash a prefix of what was not synced is there.
        """
    def truncate_after(self, index: int) -> None:
        """Removes the entries after `index`; at or above `last_index` nothing happens. O(1), durable after `sync`.

        `index` may be the one that the log begins after: then no entry is left. Below that: `OrderError`.
        """
    def compact(self, up_to: LogId | tuple[int, int]) -> None:
        """Drops the entries up to `up_to`, a `LogId`: a snapshot holds them. O(1), durable after `sync`.

        Where the log does not hold that very entry (a snapshot was installed), all entries are dropped, and the log
        begins after it. At or below what was compacted already nothing happens; a term below that one's is an
        `OrderError`. Reads see it at once. The files of segments that hold nothing any more go with a later `sync`.
        """
    def save_hard_state(self, term: int, voted_for: Buffer | None = None) -> None:
        """Saves the current term and who was voted for in it, bytes or None; durable on return.

        `voted_for`: at most 65,535 bytes, else a `ValueError`: each new segment of the log begins with a copy of it.
        The term never falls, and a vote that was given stays as it is in its term: anything else is an `OrderError`.
        On a `StorageError` from a full disk nothing has changed.
        """
    def sync(self) -> None:
        """Makes everything that was appended, truncated and compacted before the call durable.

        One sync of the file serves all calls that overlap. Raises `StorageError` when it fails; the log is poisoned
        then: reads go on, writes raise until the directory is opened again.
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
