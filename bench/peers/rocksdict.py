"""RocksDB through rocksdict: raw bytes, one write batch per chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rocksdict import Checkpoint, Options, Rdict, WriteBatch

from bench.data import Pairs
from bench.peers import Peer


class Store(Peer):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_write_buffer_size(256 << 20)
        self.db = Rdict(str(directory), options)
        self.get = self.db.get  # type: ignore[method-assign]

    def get(self, key: bytes) -> object:
        return self.db.get(key)

    def get_many(self, keys: list[bytes]) -> list[object]:
        found: Any = self.db.get(list[Any](keys))
        return list(found)

    def apply(self, pairs: Pairs) -> None:
        batch = WriteBatch(raw_mode=True)
        put, delete = batch.put, batch.delete
        for key, value in pairs:
            delete(key) if value is None else put(key, value)
        self.db.write(batch)

    def flush(self) -> None:
        self.db.flush_wal(True)

    def close(self) -> None:
        self.db.close()

    def snapshot(self, target: Path) -> None:
        Checkpoint(self.db).create_checkpoint(str(target))
