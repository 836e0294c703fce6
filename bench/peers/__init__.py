"""Other stores that do a state machine's work, with the fastest settings that keep the same promises.

The extra `peers` installs their packages; a store whose package is missing is left out.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from bench.data import Pairs

MODULES = {
    "dict_log": "plain", "pysyncobj": "pysyncobj", "sqlite": "sqlite", "lmdb": "lmdb", "rocksdict": "rocksdict",
    "plyvel": "plyvel",
}  # fmt: skip


class Peer(ABC):
    """A store in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def get(self, key: bytes) -> object: ...

    def get_many(self, keys: list[bytes]) -> list[Any]:
        return list(map(self.get, keys))

    @abstractmethod
    def apply(self, pairs: Pairs) -> None:
        """Apply one committed chunk, all or nothing: visible to readers on return, durable after `flush`."""

    @abstractmethod
    def flush(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def snapshot(self, target: Path) -> None:
        """Write the whole state into a new directory, durably."""
        raise NotImplementedError


def open_peer(name: str, directory: Path) -> Peer:
    module = importlib.import_module(f"bench.peers.{MODULES[name]}")
    made: Peer = module.Store(directory)
    return made


def available() -> list[str]:
    """Return the names of the peers that can be imported."""
    found = []
    for name, module in MODULES.items():
        try:
            importlib.import_module(f"bench.peers.{module}")
        except ImportError:
            continue
        found.append(name)
    return found
