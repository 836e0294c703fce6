"""The entries that the lines of a dump describe, and the first of them that is wrong."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from typing import Any

from fastsm.answering import touch
from fastsm.command import batch, config, delete, noop, put
from fastsm.disk.format import MAX_DEADLINE, MAX_INDEX
from fastsm.errors import CommandError, FastsmError
from fastsm.tools.records import Run
from fastsm.types import Entry, LogId

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


def head_and_rest(lines: Iterable[bytes]) -> tuple[Line, Iterator[tuple[int, Line]]]:
    """Returns the first line, if it is an announcement, and the other lines with their numbers."""
    parsed = _parsed(lines)
    first = next(parsed, None)
    if first is None:
        raise LoadError(1, "expected a line of a dump, or one written by hand, found none: did the dump fail?")
    number, line = first
    if line.get("operation") == "raft log":
        raise LoadError(number, "this is the dump of a Raft log, which has no state; load a dump of the state")
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
    if not is_deadline(line.get("clock", 0)):
        raise LoadError(number, f"expected a clock, in milliseconds since 1970, found {line['clock']!r}")
    if not is_number(line.get("keys", 0)):
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
    return isinstance(value, list) and len(value) == count and all(is_number(part) for part in value)


def is_deadline(value: object) -> bool:
    """Returns whether a value is a time in milliseconds that a deadline can have."""
    return type(value) is int and 0 <= value <= MAX_DEADLINE


def expires_of(number: int, line: Line) -> int | None:
    """Returns the deadline of a line; None if it has none."""
    expires: int | None = line.get("expires")
    if expires is not None and not is_deadline(expires):
        raise LoadError(number, f"expected expires, in milliseconds since 1970, or null, found {expires!r}")
    return expires


def is_number(value: object) -> bool:
    """Returns whether a value is an integer that an index, a term or a session can have."""
    return type(value) is int and 0 <= value <= MAX_INDEX


def _parsed(lines: Iterable[bytes]) -> Iterator[tuple[int, Line]]:
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:  # the latter for lists nested thousands deep
            raise LoadError(number, f"expected a JSON object: {error}") from None
        if not isinstance(line, dict):
            raise LoadError(number, f"expected a JSON object, found {type(line).__name__}")
        yield number, line


def entries_of(lines: Iterator[tuple[int, Line]], runs: list[Run]) -> Iterator[Entry]:
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
    for log_id, group in groupby(_judged(lines), lambda item: item[1]):
        items = list(group)
        commands = [command for _, _, several in items for command in several]
        try:
            yield items[0][0], log_id, commands[0] if len(commands) == 1 else batch(commands)
        except CommandError as error:  # one entry has too many lines
            raise LoadError(items[-1][0], str(error)) from None


def _judged(lines: Iterator[tuple[int, Line]]) -> Iterator[tuple[int, LogId, list[bytes]]]:
    """Yields the number, the id and the commands of each line. If it has no id, its index is the next one."""
    last = LogId(0, 1)
    for number, line in lines:
        if line.get("operation") in OF_THE_LOG:
            continue
        found = line.get("index", last.index + 1), line.get("term", last.term)
        if not all(map(is_number, found)) or found[0] < max(last.index, 1) or found[1] < last.term:
            raise LoadError(
                number, f"expected an index of at least 1 and a term, neither below {tuple(last)}, found {found}: "
                "indexes rise and terms never fall")
        if found[0] == last.index and found[1] != last.term:
            raise LoadError(number, f"expected term {last.term} again for entry {last.index}, found {found[1]}")
        last = LogId(*found)
        try:
            yield number, last, _commands(number, line)
        except CommandError as error:  # a key is too long
            raise LoadError(number, str(error)) from None


def _commands(number: int, line: Line) -> list[bytes]:
    """Returns the commands for a line."""
    if line.get("operation") != "touch":
        return [_command(number, line)]
    # In a loaded state, the earlier deadline may be the same, but a touch that changes nothing would leave no record.
    key, expires = bytes_of(number, line, "key"), expires_of(number, line)
    return [touch(key, 1 if expires is None else None), touch(key, expires)]


def _command(number: int, line: Line) -> bytes:
    operation = line.get("operation", "put")
    if operation == "put":
        return put(bytes_of(number, line, "key"), bytes_of(number, line, "value"), expires=expires_of(number, line))
    if operation == "delete":
        return delete(bytes_of(number, line, "key"))
    if operation == "config":
        return config(bytes_of(number, line, "value"))
    if operation == "noop":
        return noop()
    raise LoadError(number, f"expected put, delete, touch or config, found operation {operation!r}")


def bytes_of(number: int, line: Line, name: str) -> bytes:
    """Returns the bytes of a field, from its text or from its Base64."""
    text, coded = line.get(name), line.get(f"{name}_base64")
    if isinstance(text, str) and coded is None:
        return text.encode("utf-8", "surrogatepass")
    if isinstance(coded, str) and text is None:
        try:
            return base64.b64decode(coded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise LoadError(number, f"{name}_base64: {error}") from None
    raise LoadError(number, f'expected "{name}" or "{name}_base64", one of them, as a string')


def chunks(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Yields the entries in lists that are small enough to be applied as chunks."""
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
