r"""States and logs as lines of JSON, and back.

A line is an object. The first one says what the lines are; the others describe what happened, in order:

    {"operation": "state", "last_applied": [9, 2], "end": true, "runs": [[1, 5, 1], [6, 9, 2]], "keys": 2}
    {"operation": "put", "index": 3, "term": 1, "key": "color", "value": "blue"}
    {"operation": "put", "index": 7, "term": 2, "key": "logo", "value_base64": "iVBORw0KGgo="}
    {"operation": "end", "lines": 2}

``"log"`` instead of ``"state"`` announces the records of a log, which may also be ``delete``, ``config``, ``session``,
``forget``, ``clock``, ``snapshot`` and ``close``. A put may have a deadline, ``"expires": 5``, and a key may be touched
after it was put: ``{"operation": "touch", "key": "color", "expires": 9}``, or null. The first line of a state has the
``clock``, if there was a tick. A session's memory is ``{"operation": "session", "session": 5, "sequence": 2, "expires":
null, "result_base64": "AQ=="}``, in addition to its index and term. ``"end": true`` announces a last line, which has
the number of lines in between: so :func:`load` detects a dump that was cut short, or from which lines were removed.
Dumps of earlier releases announce no last line, and load as before; but if they say how many keys there are, the number
must match.

Bytes that are UTF-8 are stored as text, others in Base64, which the field's name then says. :func:`load` makes an equal
state from the lines, including terms. It also accepts lines written by hand: ``{"key": "a", "value": "b"}``.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from typing import Any

from fastsm.answering import NO_DEADLINE, touch
from fastsm.command import batch, config, delete, noop, put
from fastsm.disk.format import MAX_DEADLINE, MAX_INDEX, is_session_value
from fastsm.errors import CommandError, FastsmError
from fastsm.machine import FastStateMachine
from fastsm.snapshot.file import open_snapshot
from fastsm.snapshot.model import State, snapshot_bytes, write_file
from fastsm.tools import raft_logs
from fastsm.tools.inspection import is_directory, is_raft_log
from fastsm.tools.new_state import new_state
from fastsm.tools.records import Run, log_frames, snapshot_records, snapshot_runs
from fastsm.types import Change, Entry, LogId

CHUNK_BYTES = 4 << 20
CHUNK_ENTRIES = 10_000
CUT = (
    "the dump was cut short, or lines were taken from it. To load what is left, take the first and the last line away "
    "as well"
)
OF_THE_LOG = ("snapshot", "close")  # they do not change the state

Line = dict[str, Any]


class LoadError(FastsmError):
    """Lines from which no state can be made; ``line`` is the number of the first wrong one."""

    def __init__(self, line: int, message: str) -> None:
        self.line = line
        super().__init__(f"line {line}: {message}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.line, str(self).partition(": ")[2])


# ---- dump --------------------------------------------------------------------------------------------

def dump_state(
    path: str | os.PathLike[str], *, prefix: bytes = b"", as_of: int | None = None
) -> Iterator[Line]:
    """Yields the pairs of a directory's state, or of a snapshot, in the order in which they were written.

    ``prefix``: only keys with it. ``as_of``: the state after that entry, if it is still available. The first and the
    last line are marks. Every byte is checked first: O(bytes). Writes nothing, and does not disturb an owner.
    """
    return _with_end(_state_lines(os.fsdecode(path), prefix, as_of))


def _with_end(lines: Iterator[Line]) -> Iterator[Line]:
    """Yields the lines, and a mark after the last one. A dump that fails has no such mark."""
    count = 0
    for count, line in enumerate(lines):  # noqa: B007  # the first line is not counted
        yield line
    yield {"operation": "end", "lines": count}


def _state_lines(path: str, prefix: bytes, as_of: int | None) -> Iterator[Line]:
    if is_raft_log(path):
        if prefix or as_of is not None:
            raise FastsmError(
                f"{path}: a Raft log has entries, and no state with keys: --log --from and --to choose among them")
        yield from _entry_lines(path, 0, None)
        return
    if not is_directory(path):
        if as_of is not None:
            raise FastsmError(f"{path}: expected a directory for the state as of an entry, found a snapshot")
        with open_snapshot(path) as snapshot:
            snapshot.verify()
            last = snapshot.metadata.last_included
            more = {"clock": snapshot.clock} if snapshot.clock else {}
            yield _head("state", last, snapshot_runs(snapshot), prefix, keys=snapshot.keys, **more)
            yield from _pairs(snapshot_records(snapshot), snapshot.membership, prefix)
        return
    with FastStateMachine(path, read_only=True, verify_on_open="full") as machine:
        last = machine.last_applied()
        if as_of is not None:
            last = LogId(as_of, machine.entry_term(as_of) or 0)
        records = machine._live_records(last)
        runs = [Run(*run) for run in machine._terms.runs()]
        runs = [run._replace(last=min(run.last, last.index)) for run in runs if run.first <= last.index]
        more = {} if as_of is not None else {"keys": machine.len()}
        clock = machine._clock_at(last)
        yield _head("state", last, runs, prefix, **more, **({"clock": clock} if clock else {}))
        membership = machine.membership()
        if membership is not None and membership[0].index > last.index:
            raise FastsmError(f"{path}: the membership as of entry {as_of} is in a snapshot alone: dump one as of it")
        yield from _pairs(records, membership, prefix)


def _head(operation: str, last: LogId, runs: list[Run], prefix: bytes, **more: object) -> Line:
    head: Line = {"operation": operation, "last_applied": list(last), "end": True}
    if not prefix:
        head["runs"] = [list(run) for run in runs]
    return head | (more if not prefix else text_or_base64("prefix", prefix))


def _pairs(
    records: Iterable[tuple[str, LogId, bytes, bytes, int | None]], membership: tuple[LogId, bytes] | None,
    prefix: bytes,
) -> Iterator[Line]:
    """Yields records and membership, ordered by index."""
    if prefix:
        membership = None
    for operation, log_id, key, value, expires in records:
        if membership is not None and membership[0].index < log_id.index:
            yield _line("config", membership[0], b"", membership[1])
            membership = None
        if key.startswith(prefix) if operation in ("put", "touch") else not prefix:
            yield _line(operation, log_id, key, value, expires)
    if membership is not None:
        yield _line("config", membership[0], b"", membership[1])


def dump_log(path: str | os.PathLike[str], *, first: int = 0, last: int | None = None) -> Iterator[Line]:
    """Yields the records of a directory's log from entry ``first`` to entry ``last``, both included.

    What compaction has moved to the base is no longer available: the first line says where the log starts. Every byte
    is checked first: O(bytes). Writes nothing, and does not disturb an owner.
    """
    return _with_end(_log_lines(os.fsdecode(path), first, last))


def _entry_lines(path: str, first: int, last: int | None) -> Iterator[Line]:
    with raft_logs.opened(path) as log:
        log.verified(None)
        facts = log.facts()
        term, vote = facts["term"], log.vote()
        head: Line = {"operation": "raft log", "end": True, "term": term}
        head |= {} if vote is None else text_or_base64("voted_for", vote)
        yield head | {name: facts[name] for name in ("border_index", "border_term", "first_index", "last_index")}
        for entry in log.entries(first, last):
            yield {"operation": "entry", "index": entry.index, "term": entry.term} | text_or_base64(
                "command", entry.command)


def _log_lines(path: str, first: int, last: int | None) -> Iterator[Line]:
    if is_raft_log(path):
        yield from _entry_lines(path, first, last)
        return
    if not is_directory(path):
        raise FastsmError(f"{path}: expected a directory, which has a log, found a snapshot")
    with FastStateMachine(path, read_only=True, verify_on_open="full") as machine:
        base = machine.stats().base
        runs = [Run(*run) for run in machine._terms.runs()]
        whole = first <= base.index + 1 and last is None
        applied = list(machine.last_applied())
        head: Line = {"operation": "log", "last_applied": applied, "end": True, "base": list(base)}
        yield head | ({"runs": [list(run) for run in runs]} if whole else {"first": first, "last": last})
        for frame in log_frames(machine._log):
            if last is not None and frame.runs and frame.runs[0].first > last:
                return
            for index, operation, key, value, expires in frame.records:
                if first <= index and (last is None or index <= last):
                    yield _line(operation, LogId(index, machine.entry_term(index) or 0), key, value, expires)


def change_line(change: Change) -> Line:
    """Returns a change from a watch as a line, in the format of a log's records."""
    operation = "delete" if change.value is None else "put"
    return _line(operation, LogId(change.index, change.term), change.key, change.value or b"")


def _line(operation: str, log_id: LogId, key: bytes, value: bytes, expires: int | None = None) -> Line:
    line: Line = {"operation": operation, "index": log_id.index, "term": log_id.term}
    if operation in ("put", "delete", "touch"):
        line |= text_or_base64("key", key)
    if operation == "clock":
        return line | {"clock": int.from_bytes(value, "little")}
    if operation == "touch" or expires is not None:
        line["expires"] = expires
    if operation in ("session", "forget"):
        return line | _session_line(key, value)
    if operation == "snapshot":
        return line | {"term": int.from_bytes(value[:8], "little"), "checksum": value[8:].hex()}
    return line | (text_or_base64("value", value) if operation in ("put", "config") else {})


def _session_line(key: bytes, value: bytes) -> Line:
    line: Line = {"session": int.from_bytes(key, "little")}
    if not value:
        return line
    sequence, expires = struct.unpack_from("<QQ", value)
    result = base64.b64encode(value[16:]).decode("ascii")
    return line | {
        "sequence": sequence, "expires": None if expires == NO_DEADLINE else expires, "result_base64": result}


def text_or_base64(name: str, data: bytes) -> Line:
    """Returns ``{name: text}`` for bytes that are UTF-8, ``{name_base64: …}`` for others."""
    try:
        return {name: data.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode("ascii")}


def line_bytes(line: Line) -> bytes:
    """Returns a line ready to be written, without control characters that a terminal would interpret."""
    text = json.dumps(line, ensure_ascii=False)
    return (text if text.isprintable() else json.dumps(line)).encode("utf-8") + b"\n"


# ---- load --------------------------------------------------------------------------------------------

def load(path: str | os.PathLike[str], lines: Iterable[bytes]) -> tuple[LogId, int, int]:
    """Makes a new directory from lines; returns its last applied entry, and how many entries and keys it has.

    The state is that of the dump, with its indexes, terms and membership, and has the same ``state_checksum``; a dump
    by prefix or range makes a state of its content. The state is made completely or not at all. Raises ``LoadError``
    for wrong lines, missing lines (according to the end mark), or no lines; ``StorageError`` if the directory is not
    empty. O(bytes).
    """
    head, rest = _split(lines)
    entries = 0
    unsaid = _Unsaid(head.get("clock", 0))
    with new_state(path, contiguous=False, auto_compact=False) as machine:
        for chunk in _chunks(_entries(_without(unsaid, rest), [Run(*run) for run in head.get("runs", ())])):
            entries += len(chunk)
            machine.apply(chunk)
        last = LogId(*head.get("last_applied", machine.last_applied()))
        if last.index < machine.last_applied().index:
            raise LoadError(1, f"expected entries up to {last}, as this line says, found {machine.last_applied()}")
        # A dump that ends early (``last``) is a state as of its end: Raft sends what came after.
        if last.index > machine.last_applied().index and head.get("last") is None:
            if last.term < machine.last_applied().term:
                raise LoadError(
                    1, f"expected a last_applied of a term from {machine.last_applied().term} on, found {last}: terms "
                    "never fall")
            machine.update_last_applied(last)
        if unsaid.sessions or unsaid.clock:
            _install(machine, machine.path, unsaid)
        if machine.len() != head.get("keys", machine.len()):
            raise LoadError(1, f"expected {head['keys']} keys, as this line says, found {machine.len()}: {CUT}")
        return machine.last_applied(), entries, machine.len()


class _Unsaid:
    """What no command can express: sessions' memory, by ids and entries; a clock that moves without removing keys."""

    def __init__(self, clock: int) -> None:
        self.sessions: dict[int, tuple[int, bytes]] = {}
        self.clock = clock


def _without(unsaid: _Unsaid, lines: Iterator[tuple[int, Line]]) -> Iterator[tuple[int, Line]]:
    """Yields the lines, with no-ops instead of those of sessions and the clock, which are collected in ``unsaid``."""
    sessions = unsaid.sessions
    for number, line in lines:
        operation = line.get("operation")
        if operation == "clock":
            if not _is_deadline(line.get("clock")):
                raise LoadError(number, f"expected the clock, in milliseconds since 1970, found {line.get('clock')!r}")
            unsaid.clock = line["clock"]
            line = line | {"operation": "noop"}  # noqa: PLW2901  # the same line, as a command
        if operation not in ("session", "forget"):
            yield number, line
            continue
        session, index = line.get("session"), line.get("index")
        if not (isinstance(session, int) and isinstance(index, int) and _is_number(session) and _is_number(index)):
            raise LoadError(number, "expected the numbers of a session and of its entry")
        sessions.pop(session, None)
        if operation == "session":
            sessions[session] = (index, _session_value(number, line))
        yield number, line | {"operation": "noop"}


def _session_value(number: int, line: Line) -> bytes:
    sequence, expires = line.get("sequence"), _expires(number, line)
    if not _is_number(sequence):
        raise LoadError(number, "expected a sequence")
    value = struct.pack("<QQ", sequence, NO_DEADLINE if expires is None else expires)
    value += _bytes(number, line, "result")
    if not is_session_value(value):
        raise LoadError(number, "expected the result of a command, as a dump has it")
    return value


def _install(machine: FastStateMachine, directory: str, unsaid: _Unsaid) -> None:
    """Gives a machine its sessions and clock, by installing a snapshot of its state with them. O(bytes), in memory."""
    state = State(membership=machine.membership(), clock=unsaid.clock)
    waiting = sorted(unsaid.sessions.items(), key=lambda item: item[1][0])
    for operation, writer, key, value, expires in machine._live_records(None):
        while waiting and waiting[0][1][0] < writer.index:  # a session's record is the last one of its entry
            _remember(state, *waiting.pop(0))
        if operation == "touch":
            state.touch(writer, key, expires)
        else:
            state.put(writer, key, value, expires)
    for each in waiting:
        _remember(state, *each)
    for first, last, term in machine._terms.runs():
        state.seen += [LogId(first, term), LogId(last, term)][first == last :]
    with tempfile.TemporaryDirectory(dir=os.path.dirname(directory) or ".") as scratch:
        write_file(scratch, snapshot_bytes(state, "none", b""))
        machine.install_snapshot(None, scratch)


def _remember(state: State, session: int, record: tuple[int, bytes]) -> None:
    index, value = record
    state.remember(LogId(index, 0), session, value)  # the state keeps no terms of sessions


def _split(lines: Iterable[bytes]) -> tuple[Line, Iterator[tuple[int, Line]]]:
    """Returns the first line, if it is an announcement, and the other lines with their numbers."""
    parsed = _parsed(lines)
    first = next(parsed, None)
    if first is None:
        raise LoadError(1, "expected a line of a dump, or one written by hand, found none: did the dump fail?")
    number, line = first
    if line.get("operation") not in ("state", "log"):
        return {}, _up_to_end(chain([first], parsed), announced=False)
    runs = _runs(number, line)
    for name in ("last_applied", "base"):
        if not _is_numbers(line.get(name, [0, 0]), 2):
            raise LoadError(number, f"expected {name}, [index, term], found {line[name]!r}")
    last = LogId(*line.get("last_applied", [MAX_INDEX, MAX_INDEX]))
    if runs and not (runs[-1].last <= last.index and (runs[-1].term or 0) <= last.term):
        raise LoadError(number, f"expected runs up to last_applied, {last}, found {runs[-1]}")
    if line.get("base", [0, 0])[0]:
        raise LoadError(number, "this log starts after a base, so it is no state of its own; load a dump of the state")
    if not _is_deadline(line.get("clock", 0)):
        raise LoadError(number, f"expected a clock, in milliseconds since 1970, found {line['clock']!r}")
    if not _is_number(line.get("keys", 0)):
        raise LoadError(number, f"expected a number of keys, found {line['keys']!r}")
    return line, _up_to_end(parsed, announced=line.get("end") is True)


def _runs(number: int, line: Line) -> list[Run]:
    """Returns the runs of terms in the first line."""
    runs = line.get("runs", [])
    if not isinstance(runs, list) or not all(_is_numbers(run, 3) for run in runs):
        raise LoadError(number, "expected runs, each [first index, last index, term]")
    seen = lowest = 0
    for first, last, term in runs:
        if not (seen < first <= last and term >= lowest):
            raise LoadError(
                number, f"expected runs whose indexes rise and whose terms never fall, found {[first, last, term]} "
                f"after entry {seen} of term {lowest}")
        seen, lowest = last, term
    return [Run(*run) for run in runs]


def _up_to_end(lines: Iterator[tuple[int, Line]], *, announced: bool) -> Iterator[tuple[int, Line]]:
    """Yields the lines before the end mark, which has their number; all lines if no mark is announced."""
    count = number = 0
    for number, line in lines:
        if line.get("operation") != "end":
            yield number, line
            count += 1
            continue
        if line.get("lines") != count:
            raise LoadError(number, f"expected {line.get('lines')} lines before this one, found {count}: {CUT}")
        for after, _ in lines:
            raise LoadError(after, "expected nothing after the end mark, found a line: load one dump at a time")
        return
    if announced:
        raise LoadError(number + 1, f"expected the end mark, found the end of the input: {CUT}")


def _is_numbers(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(_is_number(part) for part in value)


def _is_deadline(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_DEADLINE


def _expires(number: int, line: Line) -> int | None:
    expires: int | None = line.get("expires")
    if expires is not None and not _is_deadline(expires):
        raise LoadError(number, f"expected expires, in milliseconds since 1970, or null, found {expires!r}")
    return expires


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_INDEX


def _parsed(lines: Iterable[bytes]) -> Iterator[tuple[int, Line]]:
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:  # the latter for lists nested thousands deep
            raise LoadError(number, f"expected an object of JSON: {error}") from None
        if not isinstance(line, dict):
            raise LoadError(number, f"expected an object of JSON, found {type(line).__name__}")
        yield number, line


def _entries(lines: Iterator[tuple[int, Line]], runs: list[Run]) -> Iterator[Entry]:
    """Yields one entry for each index, and no-ops where a run of terms begins or ends without an entry.

    If runs were announced, each entry must be in one of them, so the terms of no-ops in between never fall.
    """
    ahead = runs[::-1]
    run = Run(0, 0, 0)
    applied = 0
    for number, log_id, command in _by_entry(lines):
        while ahead and ahead[-1].first <= log_id.index:
            if applied < run.last:
                yield _noop(run.last, run)
            run = ahead.pop()
            if run.first < log_id.index:
                yield _noop(run.first, run)
            applied = run.first
        if runs and not (run.first <= log_id.index <= run.last and run.term == log_id.term):
            raise LoadError(number, f"expected an entry of the runs that the first line announces, found {log_id}")
        yield Entry(*log_id, command)
        applied = log_id.index
    for rest in [run, *ahead[::-1]]:
        yield from (_noop(index, rest) for index in sorted({rest.first, rest.last}) if index > applied)


def _noop(index: int, run: Run) -> Entry:
    return Entry(index, run.term or 0, noop())


def _by_entry(lines: Iterator[tuple[int, Line]]) -> Iterator[tuple[int, LogId, bytes]]:
    """Yields the number of the first line, the id and the command of each entry."""
    last = LogId(0, 1)
    lines = (item for item in lines if item[1].get("operation") not in OF_THE_LOG)

    def place(item: tuple[int, Line]) -> LogId:
        """Returns the id of a line; if it has none, the next index after the previous line's."""
        nonlocal last
        number, line = item
        found = line.get("index", last.index + 1), line.get("term", last.term)
        if not all(map(_is_number, found)) or found[0] < max(last.index, 1) or found[1] < last.term:
            raise LoadError(
                number, f"expected an index from 1 on and a term, neither below {tuple(last)}, found {found}: indexes "
                "rise and terms never fall")
        if found[0] == last.index and found[1] != last.term:
            raise LoadError(number, f"expected term {last.term} again for entry {last.index}, found {found[1]}")
        last = LogId(*found)
        return last

    for log_id, group in groupby(lines, place):
        items = list(group)
        yield items[0][0], log_id, _command_of(items)


def _command_of(items: list[tuple[int, Line]]) -> bytes:
    """Returns the command for the lines of one entry."""
    number = items[0][0]
    try:
        commands = []
        for number, line in items:
            commands += _commands(number, line)
        return commands[0] if len(commands) == 1 else batch(commands)
    except CommandError as error:  # a key is too long, or one entry has too many lines
        raise LoadError(number, str(error)) from None


def _commands(number: int, line: Line) -> list[bytes]:
    """Returns the commands for a line."""
    if line.get("operation") != "touch":
        return [_command(number, line)]
    # In a loaded state, the earlier deadline may be the same, but a touch that changes nothing would leave no record.
    key, expires = _bytes(number, line, "key"), _expires(number, line)
    return [touch(key, 1 if expires is None else None), touch(key, expires)]


def _command(number: int, line: Line) -> bytes:
    operation = line.get("operation", "put")
    if operation == "put":
        return put(_bytes(number, line, "key"), _bytes(number, line, "value"), expires=_expires(number, line))
    if operation == "delete":
        return delete(_bytes(number, line, "key"))
    if operation == "config":
        return config(_bytes(number, line, "value"))
    if operation == "noop":
        return noop()
    raise LoadError(number, f"expected put, delete, touch or config, found operation {operation!r}")


def _bytes(number: int, line: Line, name: str) -> bytes:
    text, coded = line.get(name), line.get(f"{name}_base64")
    if isinstance(text, str) and coded is None:
        return text.encode("utf-8", "surrogatepass")
    if isinstance(coded, str) and text is None:
        try:
            return base64.b64decode(coded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise LoadError(number, f"{name}_base64: {error}") from None
    raise LoadError(number, f'expected "{name}" or "{name}_base64", a text')


def _chunks(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    chunk: list[Entry] = []
    size = 0
    for entry in entries:
        chunk.append(entry)
        size += len(entry.command)
        if size > CHUNK_BYTES or len(chunk) >= CHUNK_ENTRIES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
