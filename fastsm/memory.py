"""``MemoryStateMachine``: the same behaviour as ``FastStateMachine``, on a dict, deliberately plain."""

from __future__ import annotations

import operator
import os
import struct
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from fastsm.answering import (
    BadAnswerError,
    checked_value,
    deadline_number,
    pack_result,
    pack_session,
    unpack_result,
)
from fastsm.arguments import bytes_of, not_an_entry, pair_of
from fastsm.command import decode
from fastsm.disk.format import unpack_snapshot_head
from fastsm.errors import (
    CommandError,
    FastsmError,
    NotRunningError,
    OrderError,
    ProcedureError,
    SnapshotFormatError,
    SnapshotRangeError,
    StaleSnapshotError,
)
from fastsm.event_loops import event_loops
from fastsm.memory_tx import Outcome, Refused, Tx, Written
from fastsm.memory_watch import History, MemoryWatch, Moment
from fastsm.procedures import check_calls, registry, run
from fastsm.snapshot.file import check_metadata, open_snapshot
from fastsm.snapshot.model import CODECS, State, read_state, snapshot_bytes, write_file
from fastsm.trait import StateMachine
from fastsm.types import (
    Add,
    Answer,
    Batch,
    Call,
    CompareAndSwap,
    Config,
    Delete,
    DeleteRange,
    Entry,
    Exists,
    Forget,
    LogId,
    ModifiedAt,
    Noop,
    Once,
    OpenSession,
    Put,
    Read,
    Result,
    ScanResult,
    SnapshotMetadata,
    Transaction,
    ValueIs,
)

ANSWERING = (Add, Read, DeleteRange)
LARGEST = 2**64 - 2


class MemoryStateMachine(StateMachine):
    """A state machine in plain Python: the model that tests compare with, and a stand-in for embedders' tests.

    Nothing is durable; ``flush`` and its siblings only note what would be. What every entry since the last install
    wrote is kept, and a snapshot writes it again. Thread safety: none.
    """

    def __init__(
        self, *, contiguous: bool = True, procedures: Iterable[Callable[[Any, bytes], Any]] = ()
    ) -> None:
        self._contiguous = contiguous
        self._procedures = registry(procedures)
        self._caller = 0  # the thread that runs a procedure at this moment
        self._running = True
        self._waiting: list[_Waiting] = []
        self._history = History(self._moment, self.entry_term)
        self._forget()

    def _forget(self) -> None:
        self._values: dict[bytes, bytes] = {}  # in the order in which they were written
        self._writers: dict[bytes, LogId] = {}
        self._sessions: dict[int, tuple[int, bytes]] = {}
        self._base = State()
        self._outcomes: list[Outcome] = []  # since the base: what was written, whatever the commands had been
        self._seen: list[LogId] = []
        self._durable = LogId()
        self._metadata: SnapshotMetadata | None = None
        self._membership: tuple[LogId, bytes] | None = None
        self._end_watches()

    def __repr__(self) -> str:
        return f"<MemoryStateMachine: {len(self._values)} keys, applied {tuple(self.last_applied())}>"

    # ---- life cycle ------------------------------------------------------------------------------------

    def start(self) -> None:
        self._running = True

    def stop(self) -> None:
        self.flush()
        self._running = False
        self._end_waiting(NotRunningError("this state machine was stopped"))

    def is_running(self) -> bool:
        return self._running

    def _require(self) -> None:
        if self._caller and self._caller == get_ident():
            raise ProcedureError("a procedure called the state machine that runs it: it has its tx alone")
        if not self._running:
            raise NotRunningError("this state machine is stopped: call start() first")

    # ---- apply -----------------------------------------------------------------------------------------

    def apply(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> list[Result]:
        """Applies committed entries, all or none."""
        self._require()
        entries = self._check_order(chunk)
        new = [entry for entry in entries if entry.index > self.last_applied().index]
        commands = [self._decode(entry) for entry in new]
        trial = State(dict(self._values), dict(self._writers), self._membership, sessions=dict(self._sessions))
        results: list[Result] = [None] * (len(entries) - len(new))
        outcomes: list[Outcome] = []
        for entry, command in zip(new, commands, strict=True):
            several = isinstance(command, (Batch, Transaction, Call, Once))
            written = Written(trial, LogId(entry.index, entry.term), can_be_taken_back=several)
            results.append(self._apply_one(command, written))
            outcomes.append(written.outcome())
        self._seen += [LogId(entry.index, entry.term) for entry in new]
        self._outcomes += outcomes
        self._values, self._writers, self._membership = trial.values, trial.writers, trial.membership
        self._sessions = trial.sessions
        self._tell_waiting()
        return results

    def check(self, command: Any) -> None:
        """Raises what :meth:`apply` would raise for this command."""
        check_calls(command, self._procedures)

    def _decode(self, entry: Entry) -> Any:
        try:
            self.check(entry.command)
        except CommandError as error:
            raise type(error)(f"entry {entry.index}: {error}", index=entry.index) from None
        return decode(entry.command)

    async def apply_chunk(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> list[Result]:
        return self.apply(chunk)

    def _check_order(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> list[Entry]:
        entries: list[Entry] = []
        before: LogId | None = None
        previous = self.last_applied()
        for position, item in enumerate(chunk):
            if not isinstance(item, tuple) or len(item) != 3:
                raise not_an_entry(item, position)
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

    def _apply_one(self, command: Any, written: Written) -> bool | Answer:  # noqa: PLR0911  # one for each kind
        """What an entry comes to. Where that is a refusal, nothing is written."""
        if isinstance(command, Once):
            return self._apply_once(command, written)
        if isinstance(command, OpenSession):
            session = written.log_id.index
            written.remember(session, pack_session(0, deadline_number(command.expires), b""))
            return Answer(True, session)
        if isinstance(command, Forget):
            if command.session not in written.state.sessions:
                return False
            written.remember(command.session, None)
            return True
        if isinstance(command, Call):
            called = self._procedures[command.name, command.version]
            with self._calling():
                answer = run(called, Tx(written), command.payload, written.log_id.index)
            if not answer.ok:
                written.take_back()
            return answer
        try:
            if isinstance(command, Transaction):
                holds = all(_holds(condition, written) for condition in command.conditions)
                values = [self._do(member, written) for member in (command.then if holds else command.otherwise)]
                checked_value(values)
                return Answer(True, values) if holds else Answer(False, values, "mismatch")
            if isinstance(command, Batch):
                values = [self._do(member, written) for member in command.commands]
                if not any(isinstance(member, ANSWERING) for member in command.commands):
                    return True
                return Answer(True, checked_value(values))
            value = checked_value(self._do(command, written))
            return Answer(True, value) if isinstance(command, ANSWERING) else True
        except Refused as refused:
            reason = refused.reason
        except BadAnswerError:
            reason = "too large"
        written.take_back()
        members = command.commands if isinstance(command, Batch) else (command,)
        answers = isinstance(command, Transaction) or any(isinstance(member, ANSWERING) for member in members)
        return Answer(False, None, reason) if answers else False

    def _apply_once(self, command: Once, written: Written) -> bool | Answer:
        """What was answered, where it was; else what the command inside comes to, which is remembered."""
        if command.session not in written.state.sessions:
            return Answer(False, None, "no session")
        _, known = written.state.sessions[command.session]
        last, expires = struct.unpack_from("<QQ", known)
        if command.sequence < last:
            return Answer(False, None, "stale")
        if command.sequence == last:
            return unpack_result(known[16:])
        result = self._apply_one(command.command, written)
        packed = pack_result(result)
        if packed is None:
            written.take_back()
            result = Answer(False, None, "too large")
            packed = pack_result(result)
            assert packed is not None
        if command.expires is not None:
            expires = command.expires
        written.remember(command.session, pack_session(command.sequence, expires, packed))
        return result

    def _do(self, command: Any, written: Written) -> Any:
        """Does what can be done, and gives its value; else raises ``Refused``."""
        if isinstance(command, Put):
            written.put(command.key, command.value)
        elif isinstance(command, Delete):
            written.put(command.key, None)
        elif isinstance(command, CompareAndSwap):
            if written.state.values.get(command.key) != command.expected:
                raise Refused("mismatch")
            written.put(command.key, command.value)
        elif isinstance(command, Add):
            return written.add(command.key, command.delta, command.initial)
        elif isinstance(command, Read):
            return written.state.values.get(command.key)
        elif isinstance(command, DeleteRange):
            return written.delete_range(command.start, command.end)
        elif isinstance(command, Config):
            written.set_membership(command.data)
        else:
            assert isinstance(command, Noop)
        return True

    @contextmanager
    def _calling(self) -> Iterator[None]:
        self._caller = get_ident()
        try:
            yield
        finally:
            self._caller = 0

    # ---- read ------------------------------------------------------------------------------------------

    def get(self, key: Any, /) -> bytes | None:
        self._require()
        return self._values.get(bytes_of(key, "key"))

    def get_many(self, keys: Sequence[Any]) -> list[bytes | None]:
        """The values of the keys, in their order."""
        return [self.get(key) for key in keys]

    def entry_term(self, entry_id: int, /) -> int | None:
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
        """All pairs, in the order of the entries that last wrote them."""
        self._require()
        return list(self._values.items())

    def scan(
        self, start: Any = None, end: Any = None, *, prefix: Any = None, limit: int | None = None, reverse: bool = False
    ) -> ScanResult:
        """The pairs with ``start <= key < end`` and with the prefix, in the order of their keys."""
        limit = _checked_limit(limit)
        return ScanResult(self._range(start, end, prefix, reverse)[:limit], self.last_applied().index)

    def scan_prefix(self, prefix: Any, *, limit: int | None = None, start_after: Any = None) -> ScanResult:
        """The pairs with a prefix, in the order of their keys; only those after a key."""
        limit, prefix = _checked_limit(limit), bytes_of(prefix, "prefix")
        start = None if start_after is None else bytes_of(start_after, "start_after") + b"\0"
        return ScanResult(self._range(start, None, prefix)[:limit], self.last_applied().index)

    def count(self, start: Any = None, end: Any = None, *, prefix: Any = None) -> int:
        """How many keys a scan would give."""
        return len(self._range(start, end, prefix))

    def ordered(
        self, start: Any = None, end: Any = None, *, prefix: Any = None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """The pairs of a scan, of the state at the call."""
        return iter(self._range(start, end, prefix, reverse))

    def _range(self, start: Any, end: Any, prefix: Any, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        low, high, beginning = (
            None if bound is None else bytes_of(bound, name)
            for bound, name in ((start, "start"), (end, "end"), (prefix, "prefix")))
        self._require()
        found = [
            pair for pair in self._values.items()
            if (low is None or pair[0] >= low) and (high is None or pair[0] < high)
            and pair[0].startswith(beginning or b"")
        ]  # fmt: skip
        return sorted(found, reverse=bool(reverse))

    def modified(self, key: Any, /) -> LogId | None:
        """The entry that last wrote the key; None when it is not there."""
        self._require()
        key = bytes_of(key, "key")
        return self._writers[key] if key in self._values else None

    def membership(self) -> tuple[LogId, bytes] | None:
        """The newest ``config``."""
        return self._membership

    # ---- waiting ---------------------------------------------------------------------------------------

    def wait_applied(self, index: int, timeout: float | None = None) -> None:
        """Returns once the entry at an index is applied, by another thread."""
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"expected a timeout of 0 or more, found {timeout!r}")
        over = threading.Event()
        waiting = self._wait_for(index, over.set)
        if waiting is not None and not over.wait(timeout):
            self._waiting = [other for other in self._waiting if other is not waiting]
            raise TimeoutError(f"entry {index} was not applied within {timeout} s")
        if waiting is not None and waiting.error is not None:
            raise waiting.error

    async def wait_applied_async(self, index: int) -> None:
        """:meth:`wait_applied` for coroutines."""
        asyncio = event_loops()
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        waiting = self._wait_for(index, lambda: loop.call_soon_threadsafe(over.set))
        if waiting is None:
            return
        try:
            await over.wait()
        finally:
            self._waiting = [other for other in self._waiting if other is not waiting]
        if waiting.error is not None:
            raise waiting.error

    def _wait_for(self, index: int, tell: Callable[[], object]) -> _Waiting | None:
        self._require()
        index = _checked((index, 0)).index
        if index <= self.last_applied().index:
            return None
        self._waiting.append(_Waiting(index, tell))
        return self._waiting[-1]

    def watch(
        self, prefix: Any = b"", *, start: tuple[int, int | None, int] | int | None = None, durable: bool = False
    ) -> MemoryWatch:
        """The changes of all keys below ``prefix``, from a place on: that of a position, an index, or last applied."""
        self._require()
        return MemoryWatch(self._history, prefix, start, durable)

    def _moment(self) -> Moment:
        self._require()
        return Moment(self._base.last, self.last_applied(), self.durable(), self._outcomes)

    def _end_watches(self) -> None:
        self._history.state = object()
        self._history.wake()

    def _tell_waiting(self) -> None:
        self._history.wake()
        applied = self.last_applied().index
        told = [waiting for waiting in self._waiting if waiting.index <= applied]
        self._waiting = [waiting for waiting in self._waiting if waiting.index > applied]
        for waiting in told:
            waiting.tell()

    def _end_waiting(self, error: FastsmError) -> None:
        self._history.wake()
        ended, self._waiting = self._waiting, []
        for waiting in ended:
            waiting.error = error
            waiting.tell()

    # ---- hard state ------------------------------------------------------------------------------------

    def update_last_applied(self, log_id: LogId | tuple[int, int]) -> None:
        self._require()
        log_id = _checked(pair_of(log_id, "last applied"))
        last = self.last_applied()
        if log_id == last:
            return
        if log_id.index <= last.index or log_id.term < last.term:
            raise OrderError(f"last applied is {last}, cannot become {log_id}", index=log_id.index)
        self._seen.append(log_id)
        self._tell_waiting()

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
        if not isinstance(metadata, SnapshotMetadata):
            raise TypeError(f"expected a SnapshotMetadata, found {type(metadata).__name__}")
        last = _checked(metadata.last_included)
        if len(metadata.checksum) != 32:
            raise SnapshotFormatError(f"expected a checksum of 32 bytes, found {len(metadata.checksum)}")
        if last.index > self.last_applied().index:
            raise SnapshotRangeError(f"a snapshot as of {last} cannot be of this state, up to {self.last_applied()}")
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
        self._history.wake()

    async def flush_async(self) -> None:
        self.flush()

    # ---- snapshots and reset ---------------------------------------------------------------------------

    def write_snapshot(
        self, directory: str | os.PathLike[str], last_included: LogId | tuple[int, int] | None = None, *,
        compress: str | None = None, attachment: Any = None, progress: Callable[[int, int], object] | None = None,
    ) -> SnapshotMetadata:
        """Writes ``directory/snapshot.fsm``: the state exactly as of ``last_included``, by default last applied.

        It may be any id from the base to last applied, in a gap too if its term can be that entry's: between two
        terms it stands for the entry before it. Other ids raise ``SnapshotRangeError``. The metadata is recorded if
        newer than the present.
        """
        self._require()
        if compress not in {None, *CODECS}:
            raise ValueError(f'expected compress "none" or "zstd", found {compress!r}')
        last = self.last_applied() if last_included is None else _checked(pair_of(last_included, "last_included"))
        data = snapshot_bytes(self._state_as_of(last), compress or "none", bytes(memoryview(attachment or b"")))
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
        """:meth:`write_snapshot`; returns the checksum."""
        return self.write_snapshot(
            new_snapshot_dir, last_included, compress=compress, attachment=attachment, progress=progress).checksum

    def state_checksum(self, last_included: LogId | tuple[int, int] | None = None) -> tuple[LogId, bytes]:
        """The id and the state checksum that a snapshot there would carry."""
        self._require()
        last = self.last_applied() if last_included is None else _checked(last_included)
        head = unpack_snapshot_head(snapshot_bytes(self._state_as_of(last), "none", b""), "a snapshot")
        return LogId(head.last_index, head.last_term), head.state_checksum

    async def state_checksum_async(
        self, last_included: LogId | tuple[int, int] | None = None
    ) -> tuple[LogId, bytes]:
        """:meth:`state_checksum`."""
        return self.state_checksum(last_included)

    def _state_as_of(self, last: LogId) -> State:
        """The base, with what the entries up to an id wrote."""
        last = self._check_range(last)
        state = self._base.copy()
        for outcome in self._outcomes:
            if outcome.log_id.index > last.index:
                break
            outcome.write_to(state)
        state.seen = [seen for seen in self._seen if seen.index <= last.index]
        if last != state.last:
            state.seen.append(last)
        return state

    def _check_range(self, last: LogId) -> LogId:
        """The id itself, or that of the entry before it when it lies between two terms."""
        base, applied = self._base.last, self.last_applied()
        if not base.index <= last.index <= applied.index:
            raise SnapshotRangeError(f"expected an id from {base} to {applied}, found {last}")
        at = bisect_left(self._seen, (last.index,))
        if last.index == base.index or self._seen[at].index == last.index:
            known = base if last.index == base.index else self._seen[at]
            if last != known:
                raise SnapshotRangeError(f"expected {known}, found {last}: another term")
            return last
        before = self._seen[at - 1] if at else LogId()
        if not before.term <= last.term <= self._seen[at].term:
            raise SnapshotRangeError(f"{last} cannot be between {before} and {self._seen[at]}: another term")
        return last if at and before.term == self._seen[at].term else before

    def install_snapshot(
        self, metadata: SnapshotMetadata | None, path: str | os.PathLike[str], *, allow_older: bool = False
    ) -> None:
        """Replaces the state by a snapshot's; ``path`` is its file or the directory that holds it.

        With ``metadata=None`` the file's own is taken. Raises ``SnapshotFormatError``, ``ChecksumMismatchError``,
        ``StaleSnapshotError``; then the old state is whole.
        """
        self._require()
        if metadata is not None and not isinstance(metadata, SnapshotMetadata):
            raise TypeError(f"expected a SnapshotMetadata, found {type(metadata).__name__}")
        with open_snapshot(path) as snapshot:
            if metadata is not None:
                check_metadata(metadata, snapshot.head, snapshot.path)
            snapshot.verify()
            last = snapshot.metadata.last_included
            if last < self.last_applied() and not allow_older:
                raise StaleSnapshotError(
                    f"{snapshot.path}: expected a snapshot as of {self.last_applied()} or later, found one as of "
                    f"{last}; allow_older=True installs it all the same"
                )
            state = read_state(snapshot)
        self._refuse_contradiction(last, state.seen)
        before = self.last_applied().index
        self._base = state.copy()
        self._outcomes = []
        self._values, self._writers, self._membership, self._seen = (
            state.values, state.writers, state.membership, state.seen)
        self._sessions = state.sessions
        self._metadata = snapshot.metadata
        self._end_watches()
        self.flush()
        if last.index < before or last.index == 0:
            self._end_waiting(OrderError(f"the state was replaced by an older one, as of {last}"))
        self._tell_waiting()

    def _refuse_contradiction(self, last: LogId, theirs: list[LogId]) -> None:
        """What ``apply`` refuses of an entry: another term than is known of it, or a falling one."""
        applied = self.last_applied()
        if not (_fits(last, self._seen) and (last.index <= applied.index or _fits(applied, theirs))):
            raise OrderError(f"a snapshot as of {last} contradicts {applied}", index=last.index)

    async def apply_snapshot_from_file(
        self, metadata: SnapshotMetadata | None, snapshot_path: str | os.PathLike[str]
    ) -> None:
        """:meth:`install_snapshot`."""
        self.install_snapshot(metadata, snapshot_path)

    def clear(self) -> None:
        """Back to the initial empty state."""
        self._forget()
        self._end_waiting(OrderError("the state was reset"))

    async def reset(self) -> None:
        self.clear()


class _Waiting:
    """Somebody who waits for an index; ``tell()`` once that is applied, or ``error`` says why it will not be."""

    def __init__(self, index: int, tell: Callable[[], object]) -> None:
        self.index = index
        self.tell = tell
        self.error: FastsmError | None = None


def _holds(condition: object, written: Written) -> bool:
    assert isinstance(condition, (ValueIs, Exists, ModifiedAt))
    value = written.state.values.get(condition.key)
    if isinstance(condition, ValueIs):
        return value == condition.value
    if isinstance(condition, Exists):
        return value is not None
    return condition.index == (0 if value is None else written.state.writers[condition.key].index)


def _checked_limit(limit: int | None) -> int | None:
    if limit is None:
        return None
    limit = operator.index(limit)
    if limit < 0:
        raise ValueError(f"limit={limit}: expected 0 or more")
    return limit


def _fits(one: LogId, seen: list[LogId]) -> bool:
    """Whether an entry can be of the history in which these were seen: one term for each, and none that falls."""
    before = max((other for other in seen if other.index <= one.index), default=LogId())
    after = min((other for other in seen if other.index >= one.index), default=one)
    return before.term <= one.term <= after.term and (before.index != one.index or before == one)


def _checked(log_id: Sequence[Any]) -> LogId:
    index, term = operator.index(log_id[0]), operator.index(log_id[1])
    for name, number in (("index", index), ("term", term)):
        if not 0 <= number <= LARGEST:
            raise OrderError(f"{name} {number}: expected 0 to 2**64 - 2")
    return LogId(index, term)
