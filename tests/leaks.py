"""Repeats everything that takes memory, files or maps: ``python -m tests.leaks --rounds 5000``.

Neither the process's own memory, its descriptors and maps, nor Python's blocks may grow; the status is 1 if one does.
Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import mmap
import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fastsm
import fastsm.core.generations
import fastsm.raft_log
from fastsm import FastsmError, FastStateMachine, RaftLog, SnapshotReceiver, open_snapshot
from fastsm.integrations.pysyncobj.journal import FastJournal as Journal
from support.faulty import memory_directory
from support.power import QuietDirectory

SAMPLES = 5  # the first one is taken after the warm-up
KEYS = [b"key %d" % i for i in range(500)]
BALLAST = b"#" * 200


class Held(NamedTuple):
    """What a process holds; as `SLACK`, how much more is not a leak yet."""

    private_bytes: int
    virtual_bytes: int      # adjacent maps count as one
    descriptors: int
    maps: int
    blocks: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        sys._clear_type_cache()  # it holds the names of attributes that were looked up
        rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
        private = sum(int(line.split()[1]) for line in rollup if line.startswith("Private_"))
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").count("\n")
        virtual = os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        return cls(1024 * private, virtual, len(os.listdir("/proc/self/fd")), maps, sys.getallocatedblocks())


# Some growth is no leak: a thread may get an arena of its own, 64 MiB of addresses. A leak in each round is more.
SLACK = Held(1 << 20, 256 << 20, 0, 4, 100)


def live_once(root: Path) -> None:
    """Use a machine, a receiver, a journal and a log from opening to closing, with errors."""
    with FastStateMachine(root / "state", retain_entries=100, _files=QuietDirectory) as machine:
        index, term = machine.last_applied()
        machine.apply([(index + 1, term + 1, fastsm.put_many(KEYS, [BALLAST] * len(KEYS)))])
        machine.apply([(index + 2 + i, term + 1, fastsm.delete(key)) for i, key in enumerate(KEYS[::7])])
        views = [machine.get_view(key) for key in KEYS]
        columns = machine.columns()
        machine.get_many(KEYS)
        machine.get_columns(KEYS)
        machine.scan_prefix(b"key 1")
        machine.count(b"key 1", b"key 2")
        pairs = machine.ordered()
        next(pairs)
        iterator = machine.items()
        next(iterator)
        for number, compress in enumerate(("none", "zstd")):
            machine.write_snapshot(root / f"snapshot-{number}", compress=compress, attachment=b"mine")
        machine.compact(machine.last_applied())
        for number in range(2):
            machine.install_snapshot(None, root / f"snapshot-{number}")
        assert sum(view is not None for view in views) > 400
        assert len(columns) == 4
        asyncio.run(machine.flush_async())
        for call in (
            lambda: machine.apply([(1, 0, b"")]), lambda: machine.apply([(index + 9_999, term, b"\7")]),
            lambda: machine.install_snapshot(None, root / "nothing"), lambda: FastStateMachine(root / "state"),
        ):
            with contextlib.suppress(FastsmError):
                call()
                raise AssertionError("no error")
        if term % 5 == 0:
            machine.clear()
    receive(root)
    journal = Journal(root / "journal", _files=QuietDirectory)
    for _ in range(20):
        journal.add(BALLAST, journal.last_index + 1, 1)
    journal.truncate_before(journal.last_index - 5)
    journal.close()
    keep_log(root)


def keep_log(root: Path) -> None:
    """Use a log from opening to closing: segments that begin and are removed, conflicts, votes, reads."""
    with RaftLog(root / "raft-log", _files=QuietDirectory) as log:
        term = log.hard_state()[0] + 1
        log.save_hard_state(term, b"me")
        for _ in range(20):
            first = log.last_index + 1
            log.append([(first + i, term, BALLAST * (i + 1)) for i in range(5)])
        log.truncate_after(log.last_index - 3)
        assert len(log.entries(log.first_index, log.last_index)) > 90
        asyncio.run(log.sync_async())
        log.compact((log.last_index - 2, log.last_term))
        log.sync()
        log.verify()
        log.stats()
        log.compact((log.last_index + 10, term))
        for call in (
            lambda: log.append([(1, 0, b"")]), lambda: log.save_hard_state(term, b"you"), lambda: log.entries(1, 2),
            lambda: log.truncate_after(1), lambda: RaftLog(root / "raft-log"),
        ):
            with contextlib.suppress(FastsmError):
                call()
                raise AssertionError("no error")


def receive(root: Path) -> None:
    """Receive a snapshot in pieces, one of them wrong, with a restart in between."""
    with open_snapshot(root / "snapshot-0") as snapshot:
        half = snapshot.size // 2
        with SnapshotReceiver(root / "in", _files=QuietDirectory) as receiver:
            receiver.write(0, snapshot.read_at(0, half))
            with contextlib.suppress(FastsmError):
                receiver.write(half + 1, b"gap")
        with SnapshotReceiver(root / "in", _files=QuietDirectory) as receiver:
            receiver.write(half, snapshot.read_at(half, snapshot.size))
            receiver.finish(snapshot.metadata)
        snapshot.verify()


PLANTED: dict[str, list[object]] = {name: [] for name in Held._fields}


def plant(name: str) -> None:
    """Leak something in each round, for the test that leaks are found."""
    if name == "descriptors":
        PLANTED[name].append(os.open("/dev/null", os.O_RDONLY))
    elif name == "virtual_bytes":
        PLANTED[name].append(fastsm.disk.mapping.Mapping(1 << 20))
    elif name == "maps":
        with open(__file__, "rb") as file:
            PLANTED[name].append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    elif name == "private_bytes":
        PLANTED[name].append(bytearray(b"#" * (100 << 10)))
    elif name == "blocks":
        PLANTED[name].append([object() for _ in range(200)])


def grown(samples: list[Held], rounds: int) -> list[str]:
    """Return what the last sample has more of than the first one."""
    found = []
    for name, *values, slack in zip(Held._fields, *samples, SLACK._replace(blocks=100 + rounds // 4), strict=True):
        if values[-1] - values[0] > slack:
            found.append(f"{name} grow: {values}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--plant", choices=Held._fields, help="a leak of this kind, to see that it is found")
    options = parser.parse_args()
    logging.getLogger("fastsm").setLevel(logging.CRITICAL + 1)
    fastsm.core.generations.SAVE_TABLE_ABOVE = 0
    fastsm.raft_log.SEGMENT_BYTES = 20_000
    samples: list[Held] = []
    with memory_directory() as root:
        for number in range(options.rounds + 1):
            live_once(root)
            if options.plant:
                plant(options.plant)
            if number >= options.rounds // 5 and (options.rounds - number) % max(1, options.rounds // SAMPLES) == 0:
                samples.append(Held.now())
                print(f"round {number}: {samples[-1]}", flush=True)
    problems = grown(samples, options.rounds)
    print("\n".join(problems) or f"nothing grew in {options.rounds} rounds")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
