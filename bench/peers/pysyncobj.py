"""PySyncObj's parts: its file journal with a dict, and its snapshot, a gzipped pickle."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

from pysyncobj.journal import FileJournal

from bench.data import Pairs
from bench.machine import sync_data
from bench.peers import Peer


class Store(Peer):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.pairs: dict[bytes, bytes] = {}
        self.journal = FileJournal(str(directory / "journal"))
        for entry in self.journal[:]:
            self.change(pickle.loads(entry[0]))
        self.index = len(self.journal)
        self.get = self.pairs.get  # type: ignore[method-assign,assignment]

    def get(self, key: bytes) -> bytes | None:
        return self.pairs.get(key)

    def change(self, command: tuple[bytes, bytes | None]) -> None:
        key, value = command
        if value is None:
            self.pairs.pop(key, None)
        else:
            self.pairs[key] = value

    def apply(self, pairs: Pairs) -> None:
        for command in pairs:
            self.index += 1
            self.journal.add(pickle.dumps(command), self.index, 1)
            self.change(command)

    def flush(self) -> None:
        self.journal.flush()

    def close(self) -> None:
        self.flush()
        self.journal._destroy()

    def snapshot(self, target: Path) -> None:
        target.mkdir(parents=True)
        with (target / "dump").open("wb") as file:
            with gzip.GzipFile(fileobj=file, mode="wb") as packed:
                pickle.dump(self.pairs, packed, -1)
            file.flush()
            sync_data(file.fileno())
