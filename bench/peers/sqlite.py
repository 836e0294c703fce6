"""SQLite from the standard library: write-ahead log, a table without row ids, one transaction per chunk."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from bench.data import Pairs
from bench.machine import sync_data
from bench.peers import Peer

PUT = "INSERT OR REPLACE INTO pairs VALUES (?, ?)"
DELETE = "DELETE FROM pairs WHERE key = ?"


class Store(Peer):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.path = directory / "pairs.db"
        self.db = sqlite3.connect(self.path, isolation_level=None, cached_statements=8)
        for setting in ("journal_mode=WAL", "synchronous=OFF", "cache_size=-262144", "mmap_size=1073741824"):
            self.db.execute(f"PRAGMA {setting}")
        self.db.execute("CREATE TABLE IF NOT EXISTS pairs (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")

    def get(self, key: bytes) -> object:
        row = self.db.execute("SELECT value FROM pairs WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def apply(self, pairs: Pairs) -> None:
        execute = self.db.execute
        execute("BEGIN")
        if any(value is None for _, value in pairs):
            for key, value in pairs:
                execute(DELETE, (key,)) if value is None else execute(PUT, (key, value))
        else:
            self.db.executemany(PUT, pairs)
        execute("COMMIT")

    def flush(self) -> None:
        with Path(f"{self.path}-wal").open("rb") as log:  # synchronous=OFF: the sync is ours
            sync_data(log.fileno())

    def close(self) -> None:
        self.db.close()

    def snapshot(self, target: Path) -> None:
        target.mkdir(parents=True)
        copy = sqlite3.connect(target / "copy.db")
        self.db.backup(copy)
        copy.close()
