"""LevelDB through plyvel: one write batch per chunk."""

from __future__ import annotations

from pathlib import Path

import plyvel  # type: ignore[import-untyped]

from bench.data import Pairs
from bench.peers import Peer


class Store(Peer):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.db = plyvel.DB(
            str(directory), create_if_missing=True, write_buffer_size=256 << 20, lru_cache_size=256 << 20,
            bloom_filter_bits=10, compression=None)
        self.get = self.db.get  # type: ignore[method-assign]

    def get(self, key: bytes) -> object:
        return self.db.get(key)

    def write(self, pairs: Pairs, sync: bool) -> None:
        with self.db.write_batch(sync=sync) as batch:
            put, delete = batch.put, batch.delete
            for key, value in pairs:
                delete(key) if value is None else put(key, value)

    def apply(self, pairs: Pairs) -> None:
        self.write(pairs, False)

    def flush(self) -> None:
        self.write([], True)  # LevelDB's only sync: an empty batch syncs the log

    def close(self) -> None:
        self.db.close()
