"""A dict with an appended log: the first thing people write when a dict has to survive a restart."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

from bench.data import Pairs
from bench.machine import sync_data
from bench.peers import Peer

HEADER = struct.Struct("<II")
DELETED = 0xFFFFFFFF


class Store(Peer):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.pairs: dict[bytes, bytes] = {}
        path = directory / "log"
        if path.exists():
            self.replay(path.read_bytes())
        self.log = path.open("ab", buffering=0)
        self.get = self.pairs.get  # type: ignore[method-assign,assignment]

    def get(self, key: bytes) -> bytes | None:
        return self.pairs.get(key)

    def replay(self, log: bytes) -> None:
        pairs, unpack, offset = self.pairs, HEADER.unpack_from, 0
        while offset < len(log):
            key_size, value_size = unpack(log, offset)
            start = offset + 8 + key_size
            key = log[offset + 8 : start]
            if value_size == DELETED:
                pairs.pop(key, None)
                offset = start
            else:
                pairs[key] = log[start : start + value_size]
                offset = start + value_size

    def apply(self, pairs: Pairs) -> None:
        pack = HEADER.pack
        pieces: list[bytes] = []
        for key, value in pairs:
            pieces += (
                (pack(len(key), DELETED), key) if value is None else (pack(len(key), len(value)), key, value)
            )
        self.log.write(b"".join(pieces))
        own = self.pairs
        for key, value in pairs:
            if value is None:
                own.pop(key, None)
            else:
                own[key] = value

    def flush(self) -> None:
        sync_data(self.log.fileno())

    def close(self) -> None:
        self.flush()
        self.log.close()

    def snapshot(self, target: Path) -> None:
        target.mkdir(parents=True)
        with (target / "snapshot").open("wb") as file:
            pickle.dump(self.pairs, file, protocol=5)
            file.flush()
            sync_data(file.fileno())
