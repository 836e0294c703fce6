"""The state machine side of a Raft node on asyncio: apply loop, flushes, snapshots, a late follower, leases that end.

:class:`Committed` stands in for the Raft half: a log that every node sees grow. The part to read is :class:`Node`,
which shows what a node does with committed entries. Run: ``python examples/asyncio_node.py [entries]``
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import fastsm
from fastsm import Clock, Entry, FastStateMachine, LogId, SnapshotMetadata, SnapshotReceiver

CHUNK = 500  # entries applied at once
SNAPSHOT_EVERY = 2_000  # entries
PIECE = 64 * 1024  # bytes of a snapshot in one message


class Committed:
    """What the Raft half would provide: committed entries in order; old ones are dropped."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.first = 1  # index of the oldest entry that is still there
        self.grown = asyncio.Condition()

    @property
    def last(self) -> int:
        return self.first + len(self.entries) - 1

    async def append(self, commands: list[bytes], term: int) -> None:
        async with self.grown:
            self.entries += [Entry(self.last + 1 + i, term, command) for i, command in enumerate(commands)]
            self.grown.notify_all()

    async def after(self, index: int) -> list[Entry]:
        """Wait until there are entries after an index, and return some. Raises ``LookupError`` if they are dropped."""
        async with self.grown:
            await self.grown.wait_for(lambda: self.last > index)
        if index + 1 < self.first:
            raise LookupError(f"entry {index + 1} is dropped, the log starts at {self.first}")
        start = index + 1 - self.first
        return self.entries[start : start + CHUNK]

    def drop(self, up_to: int) -> None:
        del self.entries[: max(0, up_to + 1 - self.first)]
        self.first = max(self.first, up_to + 1)


class Node:
    """One replica: its state machine, and the loop that feeds it."""

    def __init__(self, folder: Path, log: Committed) -> None:
        self.folder = folder
        self.log = log
        folder.mkdir(exist_ok=True)  # the machine creates its own directory, but not the parents
        self.machine = FastStateMachine(folder / "state")
        self.receiver: SnapshotReceiver | None = None
        self.waiting: dict[int, asyncio.Future[bool | fastsm.Answer | None]] = {}  # by index

    async def run(self) -> None:
        """Apply, flush, answer, and take a snapshot now and then, until cancelled."""
        while True:
            entries = await self.log.after(self.machine.last_applied().index)
            results = await self.machine.apply_chunk(entries)
            await self.machine.flush_async()  # before proposers get their results; overlapping flushes share one fsync
            for entry, result in zip(entries, results, strict=True):
                if (future := self.waiting.pop(entry.index, None)) is not None and not future.done():
                    future.set_result(result)
            await self.maybe_snapshot()

    async def lead(self, term: int) -> None:
        """Propose ticks while this node leads, so that leases end. A follower proposes nothing."""
        clock = Clock(self.machine, interval_ms=20)  # the default is 1,000
        while True:
            try:
                tick = clock.poll()
            except fastsm.ClockJumpError as error:  # an operator has to look at it; until then no lease ends
                print(error, file=sys.stderr)
                tick = None
            if tick is not None:
                await self.log.append([tick], term)
            await asyncio.sleep(clock.delay())

    async def maybe_snapshot(self) -> None:
        """Take a snapshot every `SNAPSHOT_EVERY` entries. Another task could apply entries meanwhile."""
        metadata = self.machine.snapshot_metadata()
        last = self.machine.last_applied()
        if last.index - (metadata.last_included.index if metadata else 0) < SNAPSHOT_EVERY:
            return
        await self.machine.generate_snapshot_data(self.folder / "snapshots", last)
        self.log.drop(last.index)  # safe now: everything up to there is durable in the state

    async def send_snapshot(self, peer: Node) -> None:
        """Send the snapshot file, piece by piece, to a follower that needs entries which are dropped."""
        with fastsm.open_snapshot(self.folder / "snapshots") as snapshot:
            announced = snapshot.metadata.to_bytes()
            offset = await peer.announce(announced)
            while offset < snapshot.size:
                offset = await peer.receive(offset, snapshot.read_at(offset, PIECE))
                await asyncio.sleep(0)  # the network
            await peer.install()

    async def announce(self, announced: bytes) -> int:
        """Prepare for a snapshot. Returns the offset to send from: not 0 if a part of the same snapshot is here."""
        if self.receiver is not None:
            self.receiver.close()  # an earlier transfer was interrupted
        self.receiver = SnapshotReceiver(self.folder / "incoming", SnapshotMetadata.from_bytes(announced))
        return self.receiver.offset

    async def receive(self, offset: int, piece: bytes) -> int:
        """Write a piece; return the offset of the next one."""
        assert self.receiver is not None
        return self.receiver.write(offset, piece)

    async def install(self) -> None:
        assert self.receiver is not None
        with self.receiver as receiver:
            path = await receiver.finish_async()  # checks every byte
        self.receiver = None
        await self.machine.apply_snapshot_from_file(receiver.metadata, path)

    async def wait_for(self, index: int) -> None:
        while self.machine.last_applied().index < index:
            await asyncio.sleep(0.005)

    def close(self) -> None:
        self.machine.close()


async def main(folder: Path, count: int) -> None:
    log = Committed()
    leader = Node(folder / "leader", log)
    loop = asyncio.create_task(leader.run())

    proposal = leader.waiting[count + 1] = asyncio.get_running_loop().create_future()
    for start in range(0, count, 250):
        batch = [fastsm.put(b"key-%d" % (i % 1000), b"value %d" % i) for i in range(start, min(start + 250, count))]
        await log.append(batch, term=1 + start // 2_000)
    await log.append([fastsm.compare_and_swap(b"key-0", b"nothing like it", b"!")], term=1 + count // 2_000)
    print("the last proposal took effect:", await proposal)
    await leader.wait_for(log.last)
    print("leader:", leader.machine.last_applied(), "snapshot:", leader.machine.snapshot_metadata())

    follower = Node(folder / "follower", log)  # new and empty: the first entries that it needs are dropped
    try:
        await log.after(follower.machine.last_applied().index)
    except LookupError as error:
        print("follower:", error)
        await leader.send_snapshot(follower)
    following = asyncio.create_task(follower.run())
    await follower.wait_for(log.last)
    same = dict(follower.machine.items()) == dict(leader.machine.items())
    print("follower:", follower.machine.last_applied(), "equal to the leader:", same)

    assert same
    assert follower.machine.last_applied() == LogId(count + 1, 1 + count // 2_000)

    leading = asyncio.create_task(leader.lead(term=1 + count // 2_000))
    lease = fastsm.put(b"lease", b"somebody", expires=time.time_ns() // 1_000_000 + 200)
    await log.append([lease], term=1 + count // 2_000)
    await follower.wait_for(log.last)
    while follower.machine.get(b"lease") is not None:
        await asyncio.sleep(0.005)
    print("the lease is over on both:", leader.machine.get(b"lease") is None)

    for task in (leading, loop, following):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    follower.close()
    leader.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(main(Path(name), int(sys.argv[1]) if len(sys.argv) > 1 else 20_000))
