"""A Raft log: append and sync, open, read, and the memory per entry."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import pytest

import fastsm
from bench.data import scaled
from bench.harness import measured
from bench.machine import sync_data, write_all
from bench.peers import open_peer
from fastsm import Entry

PEERS = ["sqlite", "lmdb", "plyvel", "pysyncobj"]
COMMAND = 128
SYNCS = scaled(100)
MILLION = scaled(1_000_000)
Append = Callable[[list[Entry]], object]


def opened(who: str, place: Path) -> tuple[Append, Callable[[], object], Callable[[], object]]:
    """Open a log; return its functions to append, to sync and to close."""
    if who == "fastsm":
        log = fastsm.RaftLog(place / who)
        return log.append, log.sync, log.close
    peer: Any = open_peer(who, place / who)
    if who == "pysyncobj":
        add = peer.journal.add

        def append_each(entries: list[Entry]) -> None:
            for index, term, command in entries:
                add(command, index, term)

        return append_each, peer.flush, peer.close
    key = struct.Struct(">Q").pack  # big-endian, so that keys ascend: a tree is fastest at that
    term_of = struct.Struct("<Q").pack

    def append(entries: list[Entry]) -> None:
        peer.apply([(key(index), term_of(term) + command) for index, term, command in entries])

    return append, peer.flush, peer.close


def batches(first: int, count: int, size: int, each: int) -> list[list[Entry]]:
    return [
        [Entry(first + i * each + j, 1, os.urandom(size)) for j in range(each)]
        for i in range(count)]


@pytest.mark.parametrize(
    ("row", "each", "size"),
    [("raft_log.sync.100", 100, COMMAND), ("raft_log.sync.1", 1, COMMAND), ("raft_log.sync.1m", 1, 1 << 20)])
def test_append_then_sync(compare: Any, place: Path, who: str, row: str, each: int, size: int) -> None:
    """Compare with appending as many bytes to a growing file, with one `fdatasync` each time."""
    if who not in ("fastsm", *PEERS):
        pytest.skip(f"{who} is not a log")
    append, sync, close = opened(who, place)
    count = SYNCS if size < 1 << 20 else max(1, SYNCS // 4)
    turn = iter(range(1000))

    def prepare() -> Any:
        sync()
        os.sync()
        number = next(turn)
        made = batches(number * count * each + 1, count, size, each)
        pieces = [b"".join(bytes(16) + entry.command for entry in batch) for batch in made]
        return (made,), (os.open(place / f"bare-{number}", os.O_WRONLY | os.O_CREAT), pieces)

    def subject(made: list[list[Entry]]) -> None:
        for batch in made:
            append(batch)
            sync()

    def base(descriptor: int, pieces: list[bytes]) -> None:
        for piece in pieces:
            write_all(descriptor, piece)
            sync_data(descriptor)
        os.close(descriptor)

    compare(row, subject, base, count, prepare, rounds=15, who=who)
    close()


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a closed log of a million entries."""
    directory = tmp_path_factory.mktemp("million") / "log"
    with fastsm.RaftLog(directory) as log:
        for first in range(1, MILLION + 1, 1000):
            log.append([Entry(first + i, 1, os.urandom(COMMAND)) for i in range(1000)])
    return directory


def test_open(compare: Any, million: Path) -> None:
    """Compare with reading the log's files and hashing them."""

    def subject() -> None:
        fastsm.RaftLog(million)._abandon()

    def base() -> None:
        for path in sorted(million.glob("journal-*")):
            blake3.blake3(path.read_bytes()).digest()

    compare("raft_log.open", subject, base, MILLION)


def test_read_all(compare: Any, million: Path) -> None:
    """Compare with making as many entries from existing tuples; what was read is freed after the clock is read."""
    mine: list[list[Entry]] = []
    theirs: list[list[Entry]] = []

    def prepare() -> Any:
        mine.clear()
        theirs.clear()
        return (), ()

    with fastsm.RaftLog(million) as log:
        tuples = [tuple(entry) for entry in log.entries(1, MILLION)]
        compare(
            "raft_log.read", lambda: mine.append(log.entries(1, MILLION)),
            lambda: theirs.append(list(map(Entry._make, tuples))), MILLION, prepare)


CHILD = """
import fastsm

log = fastsm.RaftLog(sys.argv[1])
count, before = int(sys.argv[2]), own_memory()
log.append([(1, 1, b"")])
for first in range(2, count, 100):
    log.append([(index, 1, b"v" * 128) for index in range(first, first + 100)])
print(json.dumps((own_memory() - before) / count))
log._abandon()
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell")
def test_memory_of_an_entry(note: Any, place: Path) -> None:
    """Note the growth of the process's own memory; mapped pages belong to the page cache and are not counted."""
    note("raft_log.memory", "bytes", [measured(CHILD, place / "log", MILLION)])
