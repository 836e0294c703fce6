"""Another implementation of ``fastsm.StateMachine``: on SQLite, in one file of plain Python.

It shows what an implementation has to do. ``fastsm.testing`` checks that it does: see test_sqlite_machine.py in the
same folder. The commands are fastsm's, the storage is its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

import fastsm
from fastsm import Entry, LogId, SnapshotMetadata
from fastsm.types import Batch, CompareAndSwap, Delete, Put

TABLES = """
CREATE TABLE IF NOT EXISTS pairs (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS base (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID;  -- what entries build on
CREATE TABLE IF NOT EXISTS entries (id INTEGER PRIMARY KEY, term INTEGER, command BLOB);  -- all since the base
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""


class SqliteStateMachine(fastsm.StateMachine):
    """A durable key-value state machine in a file of SQLite. Thread safety: none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")  # a sync at each checkpoint, so at each flush
        self._db.executescript(TABLES)
        self._metadata = self._stored_metadata()
        self._running = True

    def close(self) -> None:
        self._db.close()

    # ---- life cycle ------------------------------------------------------------------------------------

    def start(self) -> None:
        self._running = True

    def stop(self) -> None:
        self.save_hard_state()
        self._running = False

    def is_running(self) -> bool:
        return self._running

    def _require(self) -> None:
        if not self._running:
            raise fastsm.NotRunningError("this state machine is stopped: call start() first")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Run a block in a transaction: all or nothing, as the trait requires."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # ---- apply -----------------------------------------------------------------------------------------

    async def apply_chunk(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> list[bool | fastsm.Answer | None]:
        self._require()
        with self._transaction():
            return [self._apply(*entry) for entry in self._in_order(chunk)]

    def _in_order(self, chunk: Sequence[Entry | tuple[int, int, bytes]]) -> Iterator[tuple[int, int, bytes]]:
        """Yield the entries; raise ``OrderError`` unless replayed entries come first, then new ones without a gap."""
        before = LogId()
        for index, term, command in chunk:
            last = self.last_applied()
            known = self.entry_term(index) if index <= last.index else None
            if index <= before.index or term < before.term or known not in (None, term):
                raise fastsm.OrderError(f"entry {index} of term {term} after {before}", index=index)
            if index > last.index and (index != last.index + 1 or term < last.term):
                raise fastsm.OrderError(f"entry {index} of term {term} after {last}", index=index)
            before = LogId(index, term)
            yield index, term, command

    def _apply(self, index: int, term: int, command: bytes) -> bool | None:
        if index <= self.last_applied().index:
            return None
        try:
            decoded = fastsm.decode(command)
        except fastsm.CommandError as error:
            raise type(error)(f"entry {index}: {error}", index=index) from None
        self._db.execute("INSERT INTO entries VALUES (?, ?, ?)", (index, term, bytes(command)))
        return execute(self._db, "pairs", decoded)

    # ---- read ------------------------------------------------------------------------------------------

    def get(self, key: Any, /) -> bytes | None:
        self._require()
        row = self._db.execute("SELECT value FROM pairs WHERE key = ?", (bytes(memoryview(key)),)).fetchone()
        return row[0] if row else None

    def len(self) -> int:
        count: int = self._db.execute("SELECT count(*) FROM pairs").fetchone()[0]
        return count

    def entry_term(self, entry_id: int, /) -> int | None:
        """Return the term of an entry that was applied, or that is between two of the same term; otherwise None."""
        below = self._id("WHERE id <= ? ORDER BY id DESC", entry_id)
        above = self._id("WHERE id >= ? ORDER BY id", entry_id)
        return above.term if below and above and below.term == above.term else None

    def last_applied(self) -> LogId:
        return self._id("ORDER BY id DESC") or LogId()

    def _id(self, where: str, *values: int) -> LogId | None:
        row = self._db.execute(f"SELECT id, term FROM entries {where} LIMIT 1", values).fetchone()
        return LogId(*row) if row else None

    # ---- hard state ------------------------------------------------------------------------------------

    def update_last_applied(self, log_id: LogId | tuple[int, int]) -> None:
        self._require()
        last, log_id = self.last_applied(), LogId(*log_id)
        if log_id == last:
            return
        if log_id.index <= last.index or log_id.term < last.term:
            raise fastsm.OrderError(f"last applied is {last}, cannot become {log_id}", index=log_id.index)
        self._db.execute("INSERT INTO entries VALUES (?, ?, NULL)", log_id)

    def persist_last_applied(self, log_id: LogId | tuple[int, int]) -> None:
        self.update_last_applied(log_id)
        self.flush()

    def update_last_snapshot_metadata(self, metadata: SnapshotMetadata) -> None:
        self._require()
        self._metadata = metadata

    def snapshot_metadata(self) -> SnapshotMetadata | None:
        return self._metadata

    def persist_last_snapshot_metadata(self, metadata: SnapshotMetadata) -> None:
        self.update_last_snapshot_metadata(metadata)
        self.save_hard_state()

    def _stored_metadata(self) -> SnapshotMetadata | None:
        row = self._db.execute("SELECT value FROM facts WHERE name = 'snapshot'").fetchone()
        index, term, checksum = json.loads(row[0]) if row else (0, 0, None)
        return SnapshotMetadata(LogId(index, term), bytes.fromhex(checksum)) if checksum is not None else None

    def save_hard_state(self) -> None:
        if self._metadata is not None:
            fact = json.dumps([*self._metadata.last_included, self._metadata.checksum.hex()])
            self._db.execute("INSERT OR REPLACE INTO facts VALUES ('snapshot', ?)", (fact,))
        self.flush()

    def flush(self) -> None:
        self._db.execute("PRAGMA wal_checkpoint(FULL)").fetchall()

    async def flush_async(self) -> None:
        self.flush()  # a real implementation would use a thread

    async def reset(self) -> None:
        with self._transaction() as db:
            for table in ("pairs", "base", "entries", "facts"):
                db.execute(f"DELETE FROM {table}")
        self._metadata = None
        self.flush()

    # ---- snapshots -------------------------------------------------------------------------------------

    async def generate_snapshot_data(self, new_snapshot_dir: str | os.PathLike[str], last_included: LogId) -> bytes:
        """Apply the entries up to ``last_included`` to a copy of the base, and write it as one line of JSON."""
        self._require()
        last = LogId(*last_included)
        self._check_range(last)
        copy = sqlite3.connect(":memory:")
        copy.execute("CREATE TABLE pairs (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
        copy.executemany("INSERT INTO pairs VALUES (?, ?)", self._db.execute("SELECT * FROM base"))
        for (command,) in self._db.execute("SELECT command FROM entries WHERE id <= ? ORDER BY id", (last.index,)):
            if command is not None:
                execute(copy, "pairs", fastsm.decode(command))
        pairs = [[key.hex(), value.hex()] for key, value in copy.execute("SELECT * FROM pairs ORDER BY key")]
        copy.close()
        seen = self._db.execute("SELECT id, term FROM entries WHERE id < ? ORDER BY id", (last.index,)).fetchall()
        content = json.dumps({"last": last, "ids": ends_of_runs([*seen, last]), "pairs": pairs}).encode()
        folder = Path(new_snapshot_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "new", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / "new", folder / "snapshot.json")
        metadata = SnapshotMetadata(last, blake3(content).digest())
        if self._metadata is None or self._metadata.last_included < last:
            self._metadata = metadata
        self.save_hard_state()
        return metadata.checksum

    def _check_range(self, last: LogId) -> None:
        below = self._id("WHERE id <= ? ORDER BY id DESC", last.index) or LogId()
        above = self._id("WHERE id >= ? ORDER BY id", last.index) or LogId()
        base = int((self._db.execute("SELECT value FROM facts WHERE name = 'base'").fetchone() or ["0"])[0])
        within = base <= last.index <= self.last_applied().index and below.term <= last.term <= above.term
        if not within and last != LogId():
            raise fastsm.SnapshotRangeError(f"there is no state as of {last}")

    async def apply_snapshot_from_file(
        self, metadata: SnapshotMetadata | None, snapshot_path: str | os.PathLike[str]
    ) -> None:
        self._require()
        path = Path(snapshot_path)
        content = await asyncio.to_thread((path / "snapshot.json" if path.is_dir() else path).read_bytes)
        found = blake3(content).digest()
        if metadata is not None and metadata.checksum != found:
            raise fastsm.ChecksumMismatchError(str(path), "checksum", metadata.checksum, found)
        told = json.loads(content)
        last = LogId(*told["last"])
        if metadata is not None and metadata.last_included != last:
            raise fastsm.SnapshotError(f"{path}: expected a snapshot as of {metadata.last_included}, found {last}")
        if last < self.last_applied():
            raise fastsm.StaleSnapshotError(f"{path}: {last} is before {self.last_applied()}")
        pairs = [(bytes.fromhex(key), bytes.fromhex(value)) for key, value in told["pairs"]]
        with self._transaction() as db:
            for table in ("pairs", "base", "entries", "facts"):
                db.execute(f"DELETE FROM {table}")
            for table in ("pairs", "base"):
                db.executemany(f"INSERT INTO {table} VALUES (?, ?)", pairs)
            db.executemany("INSERT INTO entries VALUES (?, ?, NULL)", told["ids"])
            db.execute("INSERT INTO facts VALUES ('base', ?)", (str(last.index),))
        self._metadata = SnapshotMetadata(last, found)
        self.save_hard_state()


def execute(db: sqlite3.Connection, table: str, command: object) -> bool:
    """Execute a decoded command; return False if a comparison fails."""
    if isinstance(command, Put):
        db.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", (command.key, command.value))
    elif isinstance(command, Delete):
        db.execute(f"DELETE FROM {table} WHERE key = ?", (command.key,))
    elif isinstance(command, CompareAndSwap):
        row = db.execute(f"SELECT value FROM {table} WHERE key = ?", (command.key,)).fetchone()
        if (row[0] if row else None) != command.expected:
            return False
        return execute(db, table, Delete(command.key) if command.value is None else Put(command.key, command.value))
    elif isinstance(command, Batch):
        db.execute("SAVEPOINT batch")
        matched = all(execute(db, table, member) for member in command.commands)
        if not matched:
            db.execute("ROLLBACK TO batch")
        db.execute("RELEASE batch")
        return matched
    return True  # a no-op, or a membership, which this implementation leaves to its host


def ends_of_runs(ids: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the first and the last id of each term; they determine the terms of all entries in between."""
    ends: list[tuple[int, int]] = []
    for log_id in ids:
        if len(ends) > 1 and ends[-2][1] == ends[-1][1] == log_id[1]:
            ends[-1] = log_id
        elif log_id != (0, 0):
            ends.append(log_id)
    return ends
