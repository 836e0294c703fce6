"""``MemoryStateMachine``: the same behaviour as ``FastStateMachine``, on a dict, deliberately plain."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fastsm.arguments import bytes_of, check_timeout, not_an_entry, pair_of
from fastsm.command import decode
from fastsm.disk import snapshot_header
from fastsm.errors import (
    CommandError,
    NotRunningError,
    OrderError,
    ProcedureError,
    SnapshotRangeError,
    StaleSnapshotError,
)
from fastsm.model.ids import checked_id, fits, in_range, term_of
from fastsm.model.judging import MAY_BE_REFUSED, Judge
from fastsm.model.tx import Outcome, Written
from fastsm.model.waiting import Waiters
from fastsm.model.watch import History, MemoryWatch, Moment
from fastsm.snapshot.file import check_metadata, open_snapshot
from fastsm.snapshot.model import CODECS, State, read_state, snapshot_bytes, write_file
from fastsm.trait import StateMachine
from fastsm.types import Entry, LogId, Result, ScanResult, SnapshotMetadata, checked_metadata

if TYPE_CHECKING:
    from typing_extensions import Self


class MemoryStateMachine(StateMachine):
    """A state machine in plain Python: the model that tests compare with, and a stand-in for use in embedders' tests.

    Nothing is durable; ``flush`` and similar methods only record what would be durable. Every write since the last
    install is kept, and a snapshot repeats these writes. Thread safety: none.
    """

    _judges: ClassVar[type[Judge]] = Judge

    def __init__(
        self, *, contiguous: bool = True, procedures: Iterable[Callable[[Any, bytes], Any]] = ()
    ) -> None:
        self._contiguous = contiguous
        self._judge = self._judges(procedures)
        self._running, self._closed = True, False
        self._waiters = Waiters(lambda: self._state.last.index)
        self._history = History(self._moment, self.entry_term)
        self._forget()

    def _forget(self) -> None:
        self._state = State()
        self._base = State()
        self._outcomes: list[Outcome] = []  # since the base: the writes, whatever the commands were
        self._durable = LogId()
        self._metadata: SnapshotMetadata | None = None
        self._end_watches()

    def __repr__(self) -> str:
        return f"<MemoryStateMachine: {len(self._state.values)} keys, applied {tuple(self._state.last)}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- life cycle ------------------------------------------------------------------------------------

    def start(self) -> None:
        self._require_open()
        self._running = True

    def stop(self) -> None:
        self.flush()
        self._end("this state machine was stopped during the wait: wait again after start()")

    def close(self) -> None:
        """Closes the state machine for good: afterwards only ``close`` and ``is_running`` work. Idempotent."""
        self._refuse_procedure()
        self._closed = self._history.closed = True
        self._end("this state machine was closed during the wait: make another one")

    def _end(self, why: str) -> None:
        self._running = False
        self._waiters.end(NotRunningError(why))
        self._history.wake()

    def is_running(self) -> bool:
        return self._running

    def _refuse_procedure(self) -> None:
        if self._judge.is_calling():
            raise ProcedureError(
                "a procedure called the state machine that runs it: it may read and write only through its tx"
            )

    def _require_open(self) -> None:
        self._refuse_procedure()
        if self._closed:
            raise NotRunningError("this state machine is closed: make another one")

    def _require(self) -> None:
        self._require_open()
        if not self._running:
            raise NotRunningError("this state machine is stopped: call start() first")

    # ---- apply -----------------------------------------------------------------------------------------

    def apply(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> list[Result]:
        """Applies committed entries, all or none."""
        self._require()
        entries, commands = self._check(chunk)
        new = entries[len(entries) - len(commands) :]
        trial, outcomes = self._state.copy(), []
        results: list[Result] = [None] * (len(entries) - len(new))
        for entry, command in zip(new, commands, strict=True):
            log_id = LogId(entry.index, entry.term)
            written = Written(trial, log_id, can_be_taken_back=isinstance(command, MAY_BE_REFUSED))
            results.append(self._judge.judge(command, written))
            trial.seen.append(log_id)
            outcomes.append(written.outcome())
        self._state = trial
        self._outcomes += outcomes
        self._waiters.tell()
        self._history.wake()
        return results

    def check(self, command: Any) -> None:
        """Raises what :meth:`apply` would raise for this command."""
        self._require()
        self._judge.check(command)

    def _decode(self, entry: Entry) -> Any:
        try:
            self._judge.check(entry.command)
        except CommandError as error:
            raise type(error)(f"entry {entry.index}: {error}", index=entry.index) from None
        return decode(entry.command)

    async def apply_chunk(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> list[Result]:
        return self.apply(chunk)

    def _check(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> tuple[list[Entry], list[Any]]:
        """Returns the entries, and the decoded commands of new ones; raises at the first one that is out of order."""
        entries: list[Entry] = []
        commands = []
        before: LogId | None = None
        previous = self.last_applied()
        for position, item in enumerate(chunk):
            if not isinstance(item, tuple) or len(item) != 3:
                raise not_an_entry(item, position)
            log_id = checked_id(item)
            if before is not None and (log_id.index <= before.index or log_id.term < before.term):
                raise OrderError(f"{log_id} after {before}: indexes rise and terms never fall", index=log_id.index)
            before = log_id
            if log_id.index <= self.last_applied().index:
                known = self.entry_term(log_id.index)
                if known is not None and known != log_id.term:
                    raise OrderError(f"{log_id}: this entry was applied in term {known}", index=log_id.index)
            else:
                if log_id.term < previous.term:
                    raise OrderError(f"{log_id} after {previous}: terms never fall", index=log_id.index)
                if self._contiguous and log_id.index != previous.index + 1:
                    after = f"{previous}: expected entry {previous.index + 1}"
                    raise OrderError(f"{log_id} after {after}", index=log_id.index)
                previous = log_id
                commands.append(self._decode(Entry(*log_id, item[2])))
            entries.append(Entry(*log_id, item[2]))
        return entries, commands

    # ---- read ------------------------------------------------------------------------------------------

    def get(self, key: Any, /) -> bytes | None:
        self._require()
        return self._state.values.get(bytes_of(key, "key"))

    def get_many(self, keys: Sequence[Any]) -> list[bytes | None]:
        """Returns the values of the keys, in their order."""
        return [self.get(key) for key in keys]

    def entry_term(self, entry_id: int, /) -> int | None:
        self._require_open()
        return term_of(operator.index(entry_id), self._state.seen)

    def len(self) -> int:
        self._require_open()
        return len(self._state.values)

    def items(self) -> list[tuple[bytes, bytes]]:
        """Returns all pairs, in the order of the entries that last wrote them."""
        self._require()
        return list(self._state.values.items())

    def scan(
        self, start: Any = None, end: Any = None, *, prefix: Any = None, limit: int | None = None, reverse: bool = False
    ) -> ScanResult:
        """Returns the pairs with ``start <= key < end`` and with the prefix, in the order of their keys."""
        limit = _checked_limit(limit)
        return ScanResult(self._range(start, end, prefix, reverse)[:limit], self.last_applied().index)

    def scan_prefix(self, prefix: Any, *, limit: int | None = None, start_after: Any = None) -> ScanResult:
        """Returns the pairs with a prefix, in the order of their keys; with ``start_after``, only those after a key."""
        limit, prefix = _checked_limit(limit), bytes_of(prefix, "prefix")
        start = None if start_after is None else bytes_of(start_after, "start_after") + b"\0"
        return ScanResult(self._range(start, None, prefix)[:limit], self.last_applied().index)

    def count(self, start: Any = None, end: Any = None, *, prefix: Any = None) -> int:
        """Returns how many keys a scan would return."""
        return len(self._range(start, end, prefix))

    def ordered(
        self, start: Any = None, end: Any = None, *, prefix: Any = None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Iterates over the pairs that a scan would return, as of the call."""
        return iter(self._range(start, end, prefix, reverse))

    def _range(self, start: Any, end: Any, prefix: Any, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        low, high, beginning = (
            None if bound is None else bytes_of(bound, name)
            for bound, name in ((start, "start"), (end, "end"), (prefix, "prefix")))
        self._require()
        found = [
            pair for pair in self._state.values.items()
            if (low is None or pair[0] >= low) and (high is None or pair[0] < high)
            and pair[0].startswith(beginning or b"")
        ]  # fmt: skip
        return sorted(found, reverse=bool(reverse))

    def modified(self, key: Any, /) -> LogId | None:
        """Returns the entry that last wrote the key; None if the key is absent."""
        self._require()
        return self._state.writers.get(bytes_of(key, "key"))

    def membership(self) -> tuple[LogId, bytes] | None:
        """Returns the id and the data of the newest ``config``, or None."""
        self._require_open()
        return self._state.membership

    # ---- time ------------------------------------------------------------------------------------------

    def clock(self) -> int:
        """Returns the clock, in milliseconds since 1970; 0 before the first tick."""
        self._require()
        return self._state.clock

    def deadline(self, key: Any, /) -> int | None:
        """Returns the deadline of a key; None if it has none or is absent."""
        self._require()
        return self._state.deadline(bytes_of(key, "key"))

    def next_deadline(self) -> int | None:
        """Returns the earliest deadline of a key or a session; None if there is none."""
        self._require()
        first = [*self._state.deadlines_of_keys()[:1], *self._state.deadlines_of_sessions()[:1]]
        return min((expires for expires, _ in first), default=None)

    # ---- waiting ---------------------------------------------------------------------------------------

    def wait_applied(self, index: int, timeout: float | None = None) -> None:
        """Returns once another thread has applied the entry at an index."""
        check_timeout(timeout)
        if not self._is_applied(index):
            self._waiters.wait(checked_id((index, 0)).index, timeout)

    async def wait_applied_async(self, index: int) -> None:
        """Does the same as :meth:`wait_applied`, for coroutines."""
        if not self._is_applied(index):
            await self._waiters.wait_async(checked_id((index, 0)).index)

    def _is_applied(self, index: int) -> bool:
        self._require()
        return checked_id((index, 0)).index <= self.last_applied().index

    # ---- changes ---------------------------------------------------------------------------------------

    def watch(
        self, prefix: Any = b"", *, start: tuple[int, int | None, int] | int | None = None, durable: bool = False
    ) -> MemoryWatch:
        """Returns the changes of all keys with ``prefix``, from a position, an index, or (by default) last applied."""
        self._require()
        return MemoryWatch(self._history, prefix, start, durable)

    def _moment(self) -> Moment:
        self._require()
        return Moment(self._base.last, self.last_applied(), self.durable(), self._outcomes)

    def _end_watches(self) -> None:
        self._history.state = object()
        self._history.wake()

    # ---- hard state ------------------------------------------------------------------------------------

    def update_last_applied(self, log_id: LogId | tuple[int, int]) -> None:
        self._require()
        log_id = checked_id(pair_of(log_id, "last applied"))
        last = self.last_applied()
        if log_id == last:
            return
        if log_id.index <= last.index or log_id.term < last.term:
            raise OrderError(
                f"last applied is {last}, cannot become {log_id}: indexes rise and terms never fall",
                index=log_id.index)
        self._state.seen.append(log_id)
        self._waiters.tell()
        self._history.wake()

    def last_applied(self) -> LogId:
        self._require_open()
        return self._state.last

    def persist_last_applied(self, log_id: LogId | tuple[int, int]) -> None:
        self.update_last_applied(log_id)
        self.flush()

    def durable(self) -> LogId:
        """Returns the entry that was the last applied one at the last flush."""
        self._require_open()
        return self._durable

    def update_last_snapshot_metadata(self, metadata: SnapshotMetadata) -> None:
        self._require()
        if not isinstance(metadata, SnapshotMetadata):
            raise TypeError(f"expected a SnapshotMetadata, found {type(metadata).__name__}")
        last = checked_id(pair_of(metadata.last_included, "last_included"))
        metadata = checked_metadata(metadata, "the state in memory")
        if last.index > self.last_applied().index:
            raise SnapshotRangeError(
                f"a snapshot as of {last} cannot be of this state: last applied is {self.last_applied()}; apply the "
                "entries, or install the snapshot, first")
        self._metadata = metadata

    def snapshot_metadata(self) -> SnapshotMetadata | None:
        self._require_open()
        return self._metadata

    def persist_last_snapshot_metadata(self, metadata: SnapshotMetadata) -> None:
        self.update_last_snapshot_metadata(metadata)
        self.save_hard_state()

    def save_hard_state(self) -> None:
        self.flush()

    def flush(self) -> None:
        self._durable = self.last_applied()
        self._history.wake()

    async def flush_async(self) -> None:
        self.flush()

    # ---- snapshots and reset ---------------------------------------------------------------------------

    def write_snapshot(
        self, directory: str | os.PathLike[str], last_included: LogId | tuple[int, int] | None = None, *,
        compress: str | None = None, attachment: Any = None, progress: Callable[[int, int], object] | None = None,
    ) -> SnapshotMetadata:
        """Writes ``directory/snapshot.fsm``: the state exactly as of ``last_included``, by default last applied.

        ``last_included``: any id from the base to last applied; an id in a gap between two terms stands for the last
        entry before the gap. Other ids, and terms that the entry cannot have, raise ``SnapshotRangeError``. The
        metadata is recorded if newer than the recorded one.
        """
        self._require()
        if compress not in {None, *CODECS}:
            raise ValueError(f'expected compress "none" or "zstd", found {compress!r}')
        last = self._wanted(last_included)
        attached = b"" if attachment is None else bytes_of(attachment, "attachment")
        data = snapshot_bytes(self._state_as_of(last), compress or "none", attached)
        if progress is not None:
            progress(0, len(data))
        metadata = write_file(directory, data)
        if progress is not None:
            progress(len(data), len(data))
        if self._metadata is None or self._metadata.last_included < metadata.last_included:
            self._metadata = metadata
        self.flush()
        return metadata

    async def generate_snapshot_data(
        self, new_snapshot_dir: str | os.PathLike[str], last_included: LogId | tuple[int, int] | None = None, *,
        compress: str | None = None, attachment: Any = None, progress: Callable[[int, int], object] | None = None,
    ) -> bytes:
        """Writes like :meth:`write_snapshot`; returns the checksum."""
        return self.write_snapshot(
            new_snapshot_dir, last_included, compress=compress, attachment=attachment, progress=progress).checksum

    def state_checksum(self, last_included: LogId | tuple[int, int] | None = None) -> tuple[LogId, bytes]:
        """Returns the id and the state checksum that a snapshot would have."""
        self._require()
        last = self._wanted(last_included)
        head = snapshot_header.unpack(snapshot_bytes(self._state_as_of(last), "none", b""), "a snapshot")
        return LogId(head.last_index, head.last_term), head.state_checksum

    async def state_checksum_async(
        self, last_included: LogId | tuple[int, int] | None = None
    ) -> tuple[LogId, bytes]:
        """Returns what :meth:`state_checksum` returns."""
        return self.state_checksum(last_included)

    def _wanted(self, last_included: LogId | tuple[int, int] | None) -> LogId:
        if last_included is None:
            return self.last_applied()
        try:
            return checked_id(pair_of(last_included, "last_included"))
        except OrderError as error:
            raise SnapshotRangeError(str(error)) from None

    def _state_as_of(self, last: LogId) -> State:
        """Returns the base with the writes of the entries up to an id."""
        last = in_range(last, self._base.last, self._state.seen)
        state = self._base.copy()
        for outcome in self._outcomes:
            if outcome.log_id.index > last.index:
                break
            outcome.write_to(state)
        state.seen = [seen for seen in self._state.seen if seen.index <= last.index]
        if last != state.last:
            state.seen.append(last)
        return state

    def install_snapshot(
        self, metadata: SnapshotMetadata | None, path: str | os.PathLike[str], *, allow_older: bool = False
    ) -> None:
        """Replaces the state with a snapshot's; ``path`` is its file, or the directory that contains it.

        With ``metadata=None`` the file's own is used. Raises ``SnapshotFormatError``, ``ChecksumMismatchError``,
        ``StaleSnapshotError``, ``OrderError``; then the old state is intact.
        """
        self._require()
        if metadata is not None:
            metadata = checked_metadata(metadata, os.fsdecode(path))
        with open_snapshot(path) as snapshot:
            if metadata is not None:
                check_metadata(metadata, snapshot.head, snapshot.path)
            snapshot.verify()
            last = snapshot.metadata.last_included
            if last < self.last_applied() and not allow_older:
                raise StaleSnapshotError(
                    f"{snapshot.path}: expected a snapshot as of {self.last_applied()} or later, found one as of "
                    f"{last}; allow_older=True installs it anyway"
                )
            state = read_state(snapshot)
        self._refuse_contradiction(last, state.seen)
        before = self.last_applied().index
        self._base = state.copy()
        self._outcomes = []
        self._state = state
        self._metadata = snapshot.metadata
        self.flush()
        self._end_watches()
        if last.index < before or last.index == 0:
            self._waiters.end(OrderError(
                f"an older state, as of {last}, has replaced the state: if it will apply this entry, wait again"))
        self._waiters.tell()

    def _refuse_contradiction(self, last: LogId, theirs: list[LogId]) -> None:
        """Refuses what ``apply`` refuses for an entry: a term that contradicts the known one, or a falling term."""
        applied = self.last_applied()
        if not (fits(last, self._state.seen) and (last.index <= applied.index or fits(applied, theirs))):
            raise OrderError(
                f"a snapshot as of {last} contradicts what is applied here, up to {applied}; to install the snapshot "
                "nevertheless, call clear() first", index=last.index)

    async def apply_snapshot_from_file(
        self, metadata: SnapshotMetadata | None, snapshot_path: str | os.PathLike[str]
    ) -> None:
        """Does the same as :meth:`install_snapshot`."""
        self.install_snapshot(metadata, snapshot_path)

    def clear(self) -> None:
        """Returns to the initial empty state."""
        self._require_open()
        self._forget()
        self._waiters.end(OrderError("the state was reset: if this entry will be applied again, wait again"))

    async def reset(self) -> None:
        self.clear()


def _checked_limit(limit: int | None) -> int | None:
    if limit is None:
        return None
    limit = operator.index(limit)
    if limit < 0:
        raise ValueError(f"limit={limit}: expected 0 or more")
    return limit
