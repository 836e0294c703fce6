"""Readers of an owner that is killed again and again: ``python -m tests.readers --minutes 30``.

The owner applies chunks at full speed, flushes, compacts, takes and installs snapshots, resets and closes; the parent
kills it with SIGKILL at random moments and starts the next one. Every chunk carries a chain of checksums in its values,
so that any reader notices a partial, lost or doubled chunk at any refresh. The readers are processes that run
throughout. At the end all of them must show the state that the last owner left.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import fastsm
from fastsm import Change, CompactedError, FastsmError, FastStateMachine, LogId, Reader, put

PARTS = 16
PART_KEYS = [b"part/%d" % number for number in range(PARTS)]
KEYS = [b"chain", b"entries", b"history", *PART_KEYS]
WITHOUT_COMMAND = 97  # entries whose index is a multiple of it carry no command
LONGEST_LIFE = 1.0  # seconds until an owner is killed


def link(history: bytes, before: bytes, index: int) -> bytes:
    """Return the checksum of an entry: of its history, of all entries before it, and of its index."""
    return hashlib.blake2b(history + before + index.to_bytes(8, "little"), digest_size=16).digest()


# ---- the owner ---------------------------------------------------------------------------------------


class Owner:
    """One life of an owner, which continues from the state that it recovers and knows nothing else."""

    resets = 0.003  # of all steps, at most 0.008

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.dice = random.Random(seed)
        self.machine = self.open()

    def open(self) -> FastStateMachine:
        return FastStateMachine(
            self.root / "state", compact_floor=self.dice.choice((64 << 10, 1 << 20, 16 << 20)), retain_entries=50,
            sync=self.dice.choice(("flush", "flush", "apply")), lock_timeout=10)  # fmt: skip

    def live(self) -> NoReturn:
        """Take random steps until the process is killed."""
        while True:
            self.step()

    def step(self) -> None:
        machine, dice = self.machine, self.dice.random()
        if dice < 0.93:
            self.apply()
        elif dice < 0.95:
            machine.flush()
        elif dice < 0.965:
            machine.compact(machine.last_applied() if self.dice.random() < 0.5 else None)
        elif dice < 0.98:
            machine.write_snapshot(self.root / "snapshot")
        elif dice < 0.985:
            self.install()
        elif dice < 0.985 + self.resets:
            shutil.rmtree(self.root / "snapshot", ignore_errors=True)  # it belongs to the history that ends
            machine.clear()
        elif dice < 0.993:
            machine.close()
            self.machine = self.open()
        else:
            time.sleep(self.dice.random() * 0.02)

    def install(self) -> None:
        with contextlib.suppress(FastsmError):  # there is no snapshot, or a kill left it half written
            self.machine.install_snapshot(None, self.root / "snapshot", allow_older=True)

    def apply(self) -> None:
        """Apply a chunk that continues the state's chain."""
        machine = self.machine
        index, term = machine.last_applied()
        history = machine.get(b"history") or os.urandom(8)
        chain = machine.get(b"chain")
        digest = chain[8:] if chain else b""
        term = max(term, 1) + (self.dice.random() < 0.02)
        chunk = []
        for _ in range(self.dice.choice((1, 1, 2, 5, 30, 200))):
            index += 1
            if index % WITHOUT_COMMAND == 0:
                break
            digest = link(history, digest, index)
            own = index.to_bytes(8, "little") + digest
            size = 70_000 if self.dice.random() < 0.003 else self.dice.choice((0, 3, 10, 100, 1000, 1000))
            chunk.append((index, term, fastsm.batch([
                put(PART_KEYS[index % PARTS], own + bytes(size)), put(b"chain", own), put(b"history", history),
                fastsm.add(b"entries", 1)])))  # fmt: skip
        if chunk:
            machine.apply(chunk)
        if index % WITHOUT_COMMAND == 0:
            machine.update_last_applied((index, term))


# ---- a reader ----------------------------------------------------------------------------------------


class Watcher:
    """One reader, and the violations that it has seen."""

    kind = Reader

    def __init__(self, root: Path, seed: int) -> None:
        self.path = root / "state"
        self.dice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self.open()
        self.watch_anew()

    def open(self) -> None:
        self.reader = self.kind(self.path, wait_for_owner=60, ordered=self.dice.random() < 0.3)
        self.rebuilt = self.reader.stats().rebuilt
        # A reader reports where its own state went back, but does not know what an earlier reader showed.
        self.seen = LogId()
        self.history = self.digest = b""
        self.at = 0  # the entry that `digest` stands for

    def watch(self, stop: int) -> None:
        """Check refreshes until a byte comes from the parent."""
        patience = self.dice.choice((0.0, 0.0, 0.001, 0.05))
        while not select.select([stop], [], [], patience * self.dice.random())[0]:
            try:
                self.look()
                self.read_changes()
            except FastsmError as error:
                self.counts[f"errors: {type(error).__name__}"] += 1
                self.violations.append(f"at {self.seen}: {error!r}")
                time.sleep(0.01)
            if self.dice.random() < 0.0005:
                self.counts["generations"] += self.reader.stats().opened
                self.reader.close()
                self.open()
                self.watch_anew()
                self.counts["opened anew"] += 1

    def look(self) -> None:
        """Refresh once, and check everything that must hold then."""
        reader, before = self.reader, self.seen
        if self.dice.random() < 0.2:
            with contextlib.suppress(TimeoutError):
                reader.wait(before.index + 1, 0.005)
        found = reader.refresh()
        self.counts["refreshes"] += 1
        rebuilt = reader.stats().rebuilt
        self.counts["rebuilt"] += rebuilt - self.rebuilt
        if found != before:
            self.counts["with news"] += 1
            self.counts["entries"] += max(found.index - before.index, 0)
        if found < before and rebuilt == self.rebuilt:
            self.wrong(f"went back from {before} to {found}, and does not say so")
        if not reader.durable() <= found:
            self.wrong(f"durable {reader.durable()} after last applied {found}")
        self.check(found, told=rebuilt != self.rebuilt)
        self.seen, self.rebuilt = found, rebuilt

    def check(self, found: LogId, *, told: bool) -> None:
        """Check that the chain and each part of it are those of the entries up to here."""
        reader = self.reader
        chain, entries, history, *parts = reader.get_many(KEYS)
        if chain is None or history is None:
            if found.index or (self.history and not told):
                self.wrong(f"no chain at {found}")
            self.history, self.at, self.digest = b"", 0, b""
            return
        last = int.from_bytes(chain[:8], "little")
        self.follow(history, last, told=told)
        if found.index - (found.index % WITHOUT_COMMAND == 0) != last:
            self.wrong(f"last applied is {found}, the last entry with a command {last}")
        if chain[8:] != self.digest:
            self.wrong(f"the chain at {last} is {chain[8:].hex()}, expected {self.digest.hex()}")
        if int(entries or b"0") != last - last // WITHOUT_COMMAND:
            self.wrong(f"{entries!r} entries up to {last}")
        for number, part in enumerate(parts):
            newest = last - (last - number) % PARTS
            newest -= PARTS if newest and newest % WITHOUT_COMMAND == 0 else 0
            if newest > 0 and (part is None or int.from_bytes(part[:8], "little") != newest):
                self.wrong(f"part {number} is of entry {part and int.from_bytes(part[:8], 'little')}, not {newest}")
        if reader.modified(b"chain") != (last, reader.entry_term(last)):
            self.wrong(f"the chain was modified by {reader.modified(b'chain')}, not {last}")
        if self.dice.random() < 0.05 and len(reader.scan(prefix=b"part/").entries) != len([p for p in parts if p]):
            self.wrong(f"a scan at {found} has other parts")

    def follow(self, history: bytes, last: int, *, told: bool) -> None:
        """Extend the digest to all entries up to `last`."""
        if history != self.history:
            if self.history and not told:
                self.wrong("another history, and nobody says so")
            self.history, self.at, self.digest = history, 0, b""
        if last < self.at:
            self.at, self.digest = 0, b""
        while self.at < last:
            self.at += 1
            if self.at % WITHOUT_COMMAND:
                self.digest = link(history, self.digest, self.at)

    # ---- a watch ----------------------------------------------------------------------------------------

    def watch_anew(self) -> None:
        """Start a watch at the current state, which must deliver each later entry with all its changes, in order."""
        self.told: list[Change] = []  # changes of an entry that was not delivered as a whole yet
        self.told_any = False
        while True:
            last = self.reader.refresh()
            chain, history = self.reader.get_many([b"chain", b"history"])
            self.told_digest, self.told_history = chain[8:] if chain else b"", history
            self.told_last = last.index
            try:
                self.changes = self.reader.watch(start=last.index + 1, durable=self.dice.random() < 0.2)
            except CompactedError:
                continue  # compacted or replaced since the refresh
            return

    def read_changes(self) -> None:
        """Check that the watch delivers every change of every entry once."""
        timeout = 0.002 if self.dice.random() < 0.1 else 0
        try:
            found = self.changes.read(self.dice.choice((1, 7, 1000, 100_000)), timeout=timeout)
        except CompactedError:
            self.counts["watches anew"] += 1
            self.watch_anew()
            return
        self.counts["changes"] += len(found)
        for change in found:
            self.told.append(change)
            if len(self.told) == 4 and not self.check_entry(*self.told):
                self.watch_anew()
                return

    def check_entry(self, part: Change, chain: Change, history: Change, entries: Change) -> bool:
        """Return whether these are the changes of the next entry, and continue those of the last one."""
        index = self.told_last + 1
        index += index % WITHOUT_COMMAND == 0
        digest = link(self.told_history or history.value or b"", self.told_digest, index)
        wanted = [
            (index, PART_KEYS[index % PARTS]), (index, b"chain"), (index, b"history"), (index, b"entries")]
        own = index.to_bytes(8, "little") + digest
        found = [(change.index, change.key) for change in (part, chain, history, entries)]
        right = (
            found == wanted and chain.value == own and (part.value or b"")[:24] == own
            and self.told_history in (None, history.value) and len({change.term for change in self.told}) == 1)
        if not right and self.told_any:  # the first entry may be of a state that came after the refresh
            self.wrong(f"after {self.told_last} a watch tells {found}, expected {wanted}, or another chain")
        self.told, self.told_any = [], True
        self.told_last, self.told_digest, self.told_history = index, digest, history.value
        return right

    def wrong(self, what: str) -> None:
        self.violations.append(what)

    def report(self, last: LogId) -> dict[str, Any]:
        """Report the state as of the last owner's last entry; an earlier owner's last update may have been lost."""
        self.look()
        self.read_changes()
        applied, checksum = self.reader.state_checksum(last)
        self.counts["generations"] += self.reader.stats().opened
        return {
            "applied": list(applied), "checksum": checksum.hex(), "counts": self.counts,
            "violations": self.violations[:5]}  # fmt: skip


# ---- all together ------------------------------------------------------------------------------------


class Child(NamedTuple):
    """A process, with the pipes to it and from it."""

    pid: int
    to: int
    back: int


def start(run: Callable[[int, int], None]) -> Child:
    """Fork a child that runs a function of two descriptors: one to read, one to write."""
    (to_read, to_write), (back_read, back_write) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(to_write)
            os.close(back_read)
            run(to_read, back_write)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(to_read)
    os.close(back_write)
    return Child(pid, to_write, back_read)


def watch(root: Path, seed: int, watcher: Callable[[Path, int], Watcher]) -> Callable[[int, int], None]:
    def run(stop: int, back: int) -> None:
        one = watcher(root, seed)
        one.watch(stop)
        with os.fdopen(back, "w") as file:
            json.dump(one.report(LogId(*json.loads(os.read(stop, 100)))), file)

    return run


def run(
    seconds: float,
    readers: int = 4,
    seed: int = 0,
    root: Path | None = None,
    watcher: Callable[[Path, int], Watcher] = Watcher,
) -> tuple[Counter[str], list[str]]:
    """Run owners and readers; return counts, and the violations that were seen."""
    dice = random.Random(seed)
    own = Path(tempfile.mkdtemp(prefix="fastsm-readers-", dir=root))
    children = [start(watch(own, seed + number, watcher)) for number in range(readers)]
    counts: Counter[str] = Counter()
    violations: list[str] = []
    try:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            counts["kills"] += 1
            owner = start(lambda _stop, _back: Owner(own, dice.getrandbits(32) + counts["kills"]).live())
            time.sleep(dice.random() * LONGEST_LIFE)
            os.kill(owner.pid, signal.SIGKILL)
            if os.WIFEXITED(os.waitpid(owner.pid, 0)[1]):
                violations.append("an owner ended by itself: see above")
            os.close(owner.to)
            os.close(owner.back)
        with FastStateMachine(own / "state") as machine:
            expected = machine.state_checksum()
        for child in children:
            os.write(child.to, json.dumps(expected[0]).encode())
            with os.fdopen(child.back) as file:
                report = json.load(file)
            if (report["applied"], report["checksum"]) != (list(expected[0]), expected[1].hex()):
                violations.append(f"in the end a reader has {report['applied']}, the owner {expected[0]}")
            counts.update(report["counts"])
            violations += report["violations"]
    finally:
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
        shutil.rmtree(own)
    return counts, violations


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    counts, violations = run(60 * options.minutes, options.readers, options.seed, options.directory)
    for name, count in sorted(counts.items()):
        print(f"{count:12,}  {name}")
    print(f"{len(violations):12,}  violations")
    for violation in violations:
        print(violation)
    return bool(violations)


if __name__ == "__main__":
    raise SystemExit(main())
