r"""States and logs as lines of JSON, and back.

A line is an object. The first one says what the lines are; the others describe what happened, in order:

    {"operation": "state", "last_applied": [9, 2], "end": true, "runs": [[1, 5, 1], [6, 9, 2]], "keys": 2}
    {"operation": "put", "index": 3, "term": 1, "key": "color", "value": "blue"}
    {"operation": "put", "index": 7, "term": 2, "key": "logo", "value_base64": "iVBORw0KGgo="}
    {"operation": "end", "lines": 2}

``"log"`` instead of ``"state"`` announces the records of a log, which may also be ``delete``, ``config``, ``session``,
``forget``, ``clock``, ``snapshot`` and ``close``. A put may have a deadline, ``"expires": 5``, and a key may be touched
after it was put: ``{"operation": "touch", "key": "color", "expires": 9}``; null removes its deadline. The first line of
a state has the ``clock``, if there was a tick. What the state remembers of a session is ``{"operation": "session",
"session": 5, "sequence": 2, "expires": null, "result_base64": "AQ=="}``, with an index and a term. ``"end": true``
announces a last line, which has the number of lines in between: so :func:`load` detects a dump that was cut short, or
from which lines were removed.
Dumps of earlier releases announce no last line, and load as before; but if they say how many keys there are, the number
must match.

Bytes that are UTF-8 are stored as text, others in Base64, which the field's name then says. :func:`load` makes an equal
state from the lines, including terms. It also accepts lines written by hand: ``{"key": "a", "value": "b"}``.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator

from fastsm.answering import NO_DEADLINE
from fastsm.disk.format import is_session_value
from fastsm.errors import FastsmError
from fastsm.machine import FastStateMachine
from fastsm.snapshot.file import open_snapshot
from fastsm.snapshot.model import State, snapshot_bytes, write_file
from fastsm.tools import raft_logs
from fastsm.tools.inspection import is_directory, is_raft_log
from fastsm.tools.line_entries import (
    CUT,
    Line,
    LoadError,
    bytes_of,
    chunks,
    entries_of,
    expires_of,
    head_and_rest,
    is_deadline,
    is_number,
)
from fastsm.tools.new_state import new_state
from fastsm.tools.records import Run, log_frames, snapshot_records, snapshot_runs
from fastsm.types import Change, LogId

__all__ = ["LoadError", "change_line", "dump_log", "dump_state", "line_bytes", "load", "text_or_base64"]


# ---- dump --------------------------------------------------------------------------------------------

def dump_state(
    path: str | os.PathLike[str], *, prefix: bytes = b"", as_of: int | None = None
) -> Iterator[Line]:
    """Yields the pairs of a directory's state, or of a snapshot, in the order in which they were written.

    ``prefix``: only keys with it. ``as_of``: the state after that entry, if it is still available. The first line
    describes the state, the last one counts the lines between. Every byte is checked first: O(bytes). Writes nothing,
    and does not disturb an owner.
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
            raise FastsmError(
                f"{path}: only a snapshot has the membership as of entry {as_of}: write one with `fastsm snapshot "
                f"--as-of {as_of}`, and dump that")
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
    of a prefix or a range makes a state of its content. The state is made completely or not at all. Raises
    ``LoadError`` for wrong lines, missing lines (according to the end mark), or no lines; ``StorageError`` if the
    directory is not empty. O(bytes).
    """
    head, rest = head_and_rest(lines)
    entries = 0
    unsaid = _Unsaid(head.get("clock", 0))
    with new_state(path, contiguous=False, auto_compact=False) as machine:
        for chunk in chunks(entries_of(_without(unsaid, rest), [Run(*run) for run in head.get("runs", ())])):
            entries += len(chunk)
            machine.apply(chunk)
        last = LogId(*head.get("last_applied", machine.last_applied()))
        if last.index < machine.last_applied().index:
            raise LoadError(1, f"expected entries up to {last}, as this line says, found {machine.last_applied()}")
        # A dump that ends early (``last``) is a state as of its end: Raft sends what came after.
        if last.index > machine.last_applied().index and head.get("last") is None:
            if last.term < machine.last_applied().term:
                raise LoadError(
                    1, f"expected a last_applied whose term is at least {machine.last_applied().term}, found {last}: "
                    "terms never fall")
            machine.update_last_applied(last)
        if unsaid.sessions or unsaid.clock:
            _install(machine, machine.path, unsaid)
        if machine.len() != head.get("keys", machine.len()):
            raise LoadError(1, f"expected {head['keys']} keys, as this line says, found {machine.len()}: {CUT}")
        return machine.last_applied(), entries, machine.len()


class _Unsaid:
    """What is not loaded as commands: what is remembered of sessions, which no command can express, and the clock."""

    def __init__(self, clock: int) -> None:
        self.sessions: dict[int, tuple[int, bytes]] = {}
        self.clock = clock


def _without(unsaid: _Unsaid, lines: Iterator[tuple[int, Line]]) -> Iterator[tuple[int, Line]]:
    """Yields the lines, with no-ops instead of those of sessions and the clock, which are collected in ``unsaid``."""
    sessions = unsaid.sessions
    for number, line in lines:
        operation = line.get("operation")
        if operation == "clock":
            if not is_deadline(line.get("clock")):
                raise LoadError(number, f"expected the clock, in milliseconds since 1970, found {line.get('clock')!r}")
            unsaid.clock = line["clock"]
            line = line | {"operation": "noop"}  # noqa: PLW2901  # the same line, as a command
        if operation not in ("session", "forget"):
            yield number, line
            continue
        session, index = line.get("session"), line.get("index")
        if not (isinstance(session, int) and isinstance(index, int) and is_number(session) and is_number(index)):
            raise LoadError(
                number, f"expected the numbers of a session and of its entry, found {session!r} and {index!r}")
        sessions.pop(session, None)
        if operation == "session":
            sessions[session] = (index, _session_value(number, line))
        yield number, line | {"operation": "noop"}


def _session_value(number: int, line: Line) -> bytes:
    sequence, expires = line.get("sequence"), expires_of(number, line)
    if not is_number(sequence):
        raise LoadError(number, f"expected a sequence, found {sequence!r}")
    value = struct.pack("<QQ", sequence, NO_DEADLINE if expires is None else expires)
    value += bytes_of(number, line, "result")
    if not is_session_value(value):
        raise LoadError(number, "expected the result of a command, in the form that a dump has, found other bytes")
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
