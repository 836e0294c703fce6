"""LMDB: one write transaction per chunk, synced by `flush`."""

from __future__ import annotations

from pathlib import Path

import lmdb

from bench.data import Pairs
from bench.peers import Peer


class Store(Peer):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.env = lmdb.open(str(directory), map_size=16 << 30, sync=False, metasync=False, writemap=True)
        self.renew()

    def renew(self) -> None:
        self.reader = self.env.begin(buffers=False)
        self.get = self.reader.get  # type: ignore[method-assign]

    def get(self, key: bytes) -> object:
        return self.reader.get(key)

    def apply(self, pairs: Pairs) -> None:
        self.reader.abort()  # an open reader would prevent the reuse of old pages
        with self.env.begin(write=True) as transaction:
            put, delete = transaction.put, transaction.delete
            for key, value in pairs:
                delete(key) if value is None else put(key, value)
        self.renew()

    def flush(self) -> None:
        self.env.sync(True)

    def close(self) -> None:
        self.reader.abort()
        self.env.sync(True)
        self.env.close()

    def snapshot(self, target: Path) -> None:
        target.mkdir(parents=True)
        self.env.copy(str(target), compact=False)
