"""Examining a directory or a snapshot from outside: what it contains, and whether every byte is right.

Nothing is written and no lock is kept, so an owner that has the directory open is not disturbed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from fastsm.disk import snapshot_header
from fastsm.disk.files import Directory, storage_errors
from fastsm.disk.torn_tail import torn_tail_end
from fastsm.errors import CorruptionError, FastsmError, LockedError, StorageError
from fastsm.generation.names import CURRENT
from fastsm.machine import FastStateMachine
from fastsm.snapshot.file import SNAPSHOT, Snapshot, open_snapshot
from fastsm.tools import raft_logs
from fastsm.tools.records import Run, snapshot_runs
from fastsm.types import LogId, Recovery, SnapshotMetadata, Stats, log_id_text
from fastsm.units import count_text, size_text

Progress = Callable[[int, int], None]
SHOWN_RUNS = 5
STATE_FILE = re.compile(rf"{CURRENT}|(log|base)-\d+")
A_LOG = "a Raft log; `fastsm inspect`, `fastsm verify` and `fastsm dump` read it"
A_SNAPSHOT = "a snapshot; `fastsm restore` makes a state directory from it"


def is_directory(path: str) -> bool:
    """Returns True for a state directory; False for a file, or for a directory with only a snapshot in it.

    Does not read the file. Raises ``StorageError`` for any other directory.
    """
    names = names_at(path)
    if names is None or any(map(STATE_FILE.fullmatch, names)):
        return names is not None
    if raft_logs.are_of_a_log(names):
        raise _wrong(path, f"a state directory or a snapshot, found {A_LOG}")
    if SNAPSHOT in names:
        return False
    found = f"a directory with neither {CURRENT} nor {SNAPSHOT} in it"
    raise _wrong(path, f"a state directory or a snapshot, found {found}")


def require_state(path: str | os.PathLike[str]) -> None:
    """Raises ``StorageError``, with advice, unless a path is a state directory, intact or damaged."""
    path = os.fsdecode(path)
    names = names_at(path)
    if names is None:
        snapshot = begins_like_a_snapshot(path)
        raise _wrong(path, f"a state directory, found {A_SNAPSHOT if snapshot else 'a file'}")
    if not any(map(STATE_FILE.fullmatch, names)):
        found = A_SNAPSHOT if SNAPSHOT in names else f"a directory without {CURRENT}"
        if raft_logs.are_of_a_log(names):
            found = A_LOG
        raise _wrong(path, f"a state directory, found {found}")


def is_raft_log(path: str) -> bool:
    """Returns whether a path is the directory of a Raft log, intact or damaged."""
    names = names_at(path)
    return names is not None and not any(map(STATE_FILE.fullmatch, names)) and raft_logs.are_of_a_log(names)


def begins_like_a_snapshot(path: str) -> bool:
    """Returns whether a regular file has a snapshot's magic; does not read other types (a FIFO could block)."""
    with storage_errors(path, "reading it"):
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(8) == snapshot_header.MAGIC_BYTES


def require_snapshot(path: str | os.PathLike[str]) -> None:
    """Raises ``StorageError``, with advice, unless a path is a file, or a directory with a snapshot in it."""
    path = os.fsdecode(path)
    names = names_at(path)
    if names is not None and SNAPSHOT not in names:
        state = any(map(STATE_FILE.fullmatch, names))
        found = "a state directory; `fastsm snapshot` writes one" if state else f"a directory without {SNAPSHOT}"
        raise _wrong(path, f"a snapshot, found {found}")


def names_at(path: str) -> list[str] | None:
    """Returns the names in a directory, or None for a file; raises ``StorageError`` with the system's message."""
    try:
        return os.listdir(path) if stat.S_ISDIR(os.stat(path).st_mode) else None
    except OSError as error:
        raise StorageError(error.errno, error.strerror, path) from None


def _wrong(path: str, expected: str) -> StorageError:
    return StorageError(errno.ENOENT, f"expected {expected}", path)


@dataclass(frozen=True, slots=True)
class DirectoryReport:
    """What a directory contains. ``problem``: why it cannot be opened; then only files and owner are known."""

    path: str
    files: dict[str, int]
    owner: LockedError | None
    problem: str | None = None
    stats: Stats | None = None
    recovery: Recovery | None = None
    runs: list[Run] = field(default_factory=list)
    snapshot: SnapshotMetadata | None = None
    membership: tuple[LogId, bytes] | None = None
    clock: int = 0
    next_deadline: int | None = None
    advice: str | None = None  # what to do about the problem

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, for JSON."""
        found: dict[str, Any] = {"kind": "directory", "path": self.path, "files": self.files, "problem": self.problem}
        found["owner"] = None if self.owner is None else {"pid": self.owner.pid, "since": self.owner.since}
        if self.stats is not None:
            found |= self.stats.as_dict()
            found["runs"] = [list(run) for run in self.runs]
            found["snapshot"] = metadata_dict(self.snapshot)
            found["membership"] = membership_dict(self.membership)
            found["clock"], found["next_deadline"] = self.clock, self.next_deadline
        if self.recovery is not None:
            found["recovery_torn_bytes"] = self.recovery.torn_bytes
            found["recovery_clean"] = self.recovery.clean
        return found

    def rows(self) -> list[tuple[str, str]]:
        """Returns the report for people, as rows of a label and a text."""
        rows = [("directory", self.path), ("owner", owner_text(self.owner))]
        stats = self.stats
        if stats is not None:
            rows += [
                ("generation", f"{stats.generation}, its base is as of {log_id_text(stats.base)}"),
                ("keys", f"{stats.keys:,}"),
                ("bytes", f"{size_text(stats.live_bytes)} live, {size_text(stats.dead_bytes)} dead"),
                ("last applied", log_id_text(stats.last_applied)),
                ("durable", log_id_text(stats.durable)),
                ("terms", runs_text(self.runs)),
                ("snapshot", metadata_text(self.snapshot)),
                ("membership", membership_text(self.membership)),
                ("clock", clock_text(self.clock) if self.clock else "0: no tick yet"),
                ("due next", "nothing" if self.next_deadline is None else clock_text(self.next_deadline)),
            ]
        rows.append(("files", ", ".join(f"{name} {size_text(size)}" for name, size in self.files.items()) or "none"))
        if self.problem is not None:
            rows.append(("opening it", self.problem))
        elif self.owner is not None:
            rows.append(("opening it", "refused while its owner has it open"))
        elif self.recovery is not None:
            rows.append(("opening it", f"finds {self.recovery}"))
        return rows


@dataclass(frozen=True, slots=True)
class LogReport:
    """What the directory of a Raft log contains."""

    path: str
    files: dict[str, int]
    owner: LockedError | None
    problem: str | None = None
    found: dict[str, Any] = field(default_factory=dict)
    advice: str | None = None  # what to do about the problem

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, for JSON."""
        owner = None if self.owner is None else {"pid": self.owner.pid, "since": self.owner.since}
        return {
            "kind": "raft log", "path": self.path, "files": self.files, "problem": self.problem, "owner": owner,
            **self.found,
        }  # fmt: skip

    def rows(self) -> list[tuple[str, str]]:
        """Returns the report for people, as rows of a label and a text."""
        rows = [("Raft log", self.path), ("owner", owner_text(self.owner))]
        if self.found:
            first, last, last_term = (self.found[name] for name in ("first_index", "last_index", "last_term"))
            held = f"{first:,} to {last:,}" if last >= first else f"none, after {last:,}"
            vote = self.found["voted_for"]
            rows += [
                ("entries", f"{held}, the last of term {last_term:,}"),
                ("durable", f"up to entry {self.found['durable_index']:,}, according to the files"),
                ("hard state", f"term {self.found['term']:,}, {'no vote' if vote is None else f'a vote for {vote}'}"),
            ]
        rows.append(("files", ", ".join(f"{name} {size_text(size)}" for name, size in self.files.items()) or "none"))
        if self.problem is not None:
            rows.append(("opening it", self.problem))
        elif self.owner is not None:
            rows.append(("opening it", "refused while its owner has it open"))
        elif self.found.get("torn_bytes"):
            rows.append(("opening it", f"cuts off a torn tail of {size_text(self.found['torn_bytes'])}"))
        return rows


@dataclass(frozen=True, slots=True)
class SnapshotReport:
    """The content of a snapshot's header; whether it is true is known only after :func:`verify`."""

    path: str
    size: int
    codec: str
    keys: int
    sessions: int
    records_bytes: int
    metadata: SnapshotMetadata
    state_checksum: bytes
    attachment_bytes: int
    runs: list[Run]
    membership: tuple[LogId, bytes] | None
    clock: int
    problem: None = None
    advice: None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, for JSON."""
        return {
            "kind": "snapshot", "path": self.path, "size": self.size, "codec": self.codec, "keys": self.keys,
            "sessions": self.sessions, "clock": self.clock,
            "live_bytes": self.records_bytes, **(metadata_dict(self.metadata) or {}),
            "state_checksum": self.state_checksum.hex(), "attachment_bytes": self.attachment_bytes,
            "runs": [list(run) for run in self.runs], "membership": membership_dict(self.membership), "problem": None,
        }  # fmt: skip

    def rows(self) -> list[tuple[str, str]]:
        """Returns the report for people, as rows of a label and a text."""
        return [
            ("snapshot", self.path),
            ("size", f"{size_text(self.size)}, codec {self.codec}"),
            ("as of", log_id_text(self.metadata.last_included)),
            ("keys", f"{self.keys:,}"),
            ("sessions", f"{self.sessions:,}"),
            ("clock", clock_text(self.clock) if self.clock else "0: no tick yet"),
            ("bytes", f"{size_text(self.records_bytes)} of records, {size_text(self.attachment_bytes)} of attachment"),
            ("terms", runs_text(self.runs)),
            ("membership", membership_text(self.membership)),
            ("checksum", self.metadata.checksum.hex()),
            ("of the state", self.state_checksum.hex()),
        ]


# ---- look --------------------------------------------------------------------------------------------

def inspect(path: str | os.PathLike[str]) -> DirectoryReport | SnapshotReport | LogReport:
    """Returns what a directory or a snapshot's file contains. O(log), or O(saved table).

    For a snapshot O(runs), or O(size) if it is compressed; for a Raft log O(bytes). Damage found on the way becomes the
    problem of a directory's report. Raises ``StorageError`` if there is nothing to examine, and ``SnapshotFormatError``
    for a file that is not a snapshot.
    """
    path = os.fsdecode(path)
    if is_raft_log(path):
        return inspect_log(path)
    if not is_directory(path):
        with open_snapshot(path) as snapshot:
            return _inspect_snapshot(snapshot)
    owner, files = look_at_files(path)
    try:
        with FastStateMachine(path, read_only=True, verify_on_open="off") as machine:
            stats = machine.stats()
            recovery = stats.recovery if owner is not None else judge_end(machine)
            return DirectoryReport(
                path, files, owner, None, stats, recovery, [Run(*run) for run in machine._terms.runs()],
                machine.snapshot_metadata(), machine.membership(), machine.clock(), machine.next_deadline())
    except StorageError:
        raise
    except FastsmError as error:
        return DirectoryReport(
            path, files, owner, str(error), advice=_advice(error, f"`fastsm repair {path}` says what can be kept"))


def inspect_log(path: str) -> LogReport:
    """Returns what the directory of a Raft log contains. O(bytes)."""
    owner, files = look_at_files(path)
    try:
        with raft_logs.opened(path) as log:
            return LogReport(path, files, owner, None, log.facts())
    except StorageError:
        raise
    except FastsmError as error:
        return LogReport(
            path, files, owner, str(error),
            advice=_advice(error, "restore all of it, or give the node a new identity and an empty log"))


def _advice(error: FastsmError, remedy: str) -> str:
    """Returns the remedy for a damaged directory; files of another release are not damaged."""
    if isinstance(error, CorruptionError):
        return f"damaged; {remedy}"
    return "this release cannot read it; use the release that wrote it"


def _inspect_snapshot(snapshot: Snapshot) -> SnapshotReport:
    head = snapshot.head
    return SnapshotReport(
        snapshot.path, snapshot.size, snapshot.codec, snapshot.keys, snapshot.sessions, head.records_size,
        snapshot.metadata, snapshot.state_checksum, head.attachment_size, snapshot_runs(snapshot), snapshot.membership,
        snapshot.clock)


def clock_text(milliseconds: int) -> str:
    """Formats a time in milliseconds since 1970 for people."""
    try:
        moment = datetime.fromtimestamp(0, timezone.utc) + timedelta(milliseconds=milliseconds)
    except OverflowError:
        return f"{milliseconds:,} ms since 1970"
    return moment.isoformat(sep=" ", timespec="milliseconds").replace("+00:00", " UTC")


def look_at_files(path: str) -> tuple[LockedError | None, dict[str, int]]:
    """Returns which process has the directory open, and the sizes of its files."""
    with storage_errors(path, "looking at the directory"):
        directory = Directory(path, create=False)
        try:
            owner = directory.owner()
        finally:
            directory.close()
        sizes = {}
        for name in sorted(os.listdir(path)):
            with contextlib.suppress(FileNotFoundError):  # its owner may be removing it
                found = os.stat(os.path.join(path, name), follow_symlinks=False)
                if stat.S_ISREG(found.st_mode):
                    sizes[name] = found.st_size
    return owner, sizes


def judge_end(machine: FastStateMachine) -> Recovery:
    """Returns what recovery would find after the last frame of a log that no process has open. O(bytes there).

    Raises ``CorruptionError`` if recovery would.
    """
    log = machine._log
    found = machine.stats().recovery
    descriptor = log.verification()[0]
    try:
        with storage_errors(log.path, "reading the log"):
            size = os.fstat(descriptor.number).st_size
            torn = torn_tail_end(descriptor, log.head.identity, log.end, max(size, log.end), log.path) - log.end
    finally:
        descriptor.close()
    return Recovery(found.clean and not torn, found.frames, found.log_bytes, torn, found.suspect_bytes, found.seconds)


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> str:
    """Checks every byte of a directory or a snapshot; returns a sentence about what was verified.

    Raises ``CorruptionError``, ``SnapshotFormatError`` or ``ChecksumMismatchError``, which name the first damage.
    ``progress(done, total)`` reports bytes. O(bytes).
    """
    path = os.fsdecode(path)
    if is_raft_log(path):
        with raft_logs.opened(path) as log:
            return log.verified(progress)
    if not is_directory(path):
        with open_snapshot(path) as snapshot:
            snapshot.verify(progress)
            return (
                f"{count_text(snapshot.keys, 'key')} as of {log_id_text(snapshot.metadata.last_included)}, "
                f"{size_text(snapshot.size)}")
    owner, _ = look_at_files(path)
    with FastStateMachine(path, read_only=True, verify_on_open="off") as machine:
        machine.verify(progress)
        stats = machine.stats()
        text = (
            f"{count_text(stats.keys, 'key')} as of {log_id_text(stats.last_applied)}, "
            f"{size_text(stats.log_bytes + stats.base_bytes)}")
        if owner is None:
            try:
                torn = judge_end(machine).torn_bytes
            except CorruptionError:
                if look_at_files(path)[0] is None:
                    raise
                torn = 0  # an owner has come in the meantime, and is appending
            if torn:
                text += f"; after it a torn tail of {size_text(torn)}, which opening cuts off"
    return text


# ---- as text -----------------------------------------------------------------------------------------

def owner_text(owner: LockedError | None) -> str:
    if owner is None:
        return "no process has it open"
    since = f", since {owner.since}" if owner.since else ""
    return f"process {owner.pid or '(unknown)'}{since}"


def runs_text(runs: list[Run]) -> str:
    if not runs:
        return "none"
    shown = [f"{term} from {first:,} to {last:,}" for first, last, term in runs[-SHOWN_RUNS:]]
    more = "… " if len(runs) > SHOWN_RUNS else ""
    return f"{count_text(len(runs), 'run')}: {more}{', '.join(shown)}"


def metadata_text(metadata: SnapshotMetadata | None) -> str:
    if metadata is None:
        return "none was taken"
    return f"as of {log_id_text(metadata.last_included)}, BLAKE3 {metadata.checksum.hex()[:16]}…"


def metadata_dict(metadata: SnapshotMetadata | None) -> dict[str, Any] | None:
    if metadata is None:
        return None
    return {
        "last_included_index": metadata.last_included.index, "last_included_term": metadata.last_included.term,
        "checksum": metadata.checksum.hex(),
    }  # fmt: skip


def membership_text(membership: tuple[LogId, bytes] | None) -> str:
    if membership is None:
        return "none"
    log_id, data = membership
    shown = ascii(data[:40].decode("utf-8", "replace"))[1:-1] + ("…" if len(data) > 40 else "")
    return f"{shown} ({size_text(len(data))}, from {log_id_text(log_id)})"


def membership_dict(membership: tuple[LogId, bytes] | None) -> dict[str, Any] | None:
    if membership is None:
        return None
    return {"index": membership[0].index, "term": membership[0].term, "data_hex": membership[1].hex()}
