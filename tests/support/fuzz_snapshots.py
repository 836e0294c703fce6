"""Inputs for the decoders of snapshots: a file, and a file that arrives in pieces."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import zstandard

import fastsm
import fastsm.snapshot.codec
import fastsm.snapshot.file
import fastsm.snapshot.flat
import fastsm.snapshot.receiver
from fastsm import FastStateMachine, LogId, SnapshotReceiver, open_snapshot
from support import page_reader, snapshots
from support.fuzz_inputs import flat_snapshot
from support.fuzz_targets import Outcome, Target, ending_of, plainly
from support.mutation import change_bytes, pieces_of, sometimes
from support.page_reader import Decoded
from support.power import QuietDirectory


class Snapshots(Target):
    """A snapshot's file: opened, verified, and installed in a machine and in the model."""

    name = "snapshots"
    decoders = (fastsm.snapshot.file.__file__, fastsm.snapshot.flat.__file__, fastsm.snapshot.codec.__file__)

    def __init__(self, root: Path, corpus: list[bytes]) -> None:
        super().__init__(root, corpus)
        self.file = root / "file"
        self.machine = FastStateMachine(root / "machine", _files=QuietDirectory)

    def invent(self, dice: random.Random) -> bytes:
        data = flat_snapshot(dice)
        return self.compressed(dice, data) if dice.random() < 0.4 else data

    def compressed(self, dice: random.Random, data: bytes) -> bytes:
        """The file with its state in a Zstandard frame, which may lie, too."""
        start = snapshots.STATE + (snapshots.field(data, "attachment size") + 7 & ~7)
        level = zstandard.ZstdCompressor(
            level=1, write_checksum=dice.random() < 0.3, write_content_size=dice.random() < 0.5)
        stored = level.compress(data[start:])
        if dice.random() < 0.1:
            stored = change_bytes(dice, stored)
        data = snapshots.with_field(data, "codec", 1)
        return snapshots.with_field(data[:start], "stored size", sometimes(dice, 0.02, len(stored))) + stored

    def seal(self, data: bytes) -> bytes:
        if len(data) < snapshots.STATE:
            return data
        start = snapshots.STATE + (snapshots.field(data, "attachment size") + 7 & ~7)
        flat = data[start:]
        if snapshots.field(data, "codec") == 1:
            size = sum(snapshots.field(data, name) for name in ("membership size", "records size"))
            size += 24 * snapshots.field(data, "runs")
            flat = plainly(lambda: page_reader.flat_state(data[start:], 1, min(size, 1 << 20))) or b""
        return snapshots.sealed(data, flat=flat)

    def run(self, data: bytes, dice: random.Random) -> Outcome:
        self.file.write_bytes(data)
        fastsm.snapshot.file.PIECE = dice.choice((200, 8 << 20))  # so that parts lie in several
        plain = plainly(lambda: page_reader.decode_snapshot(data))
        ending, opened = ending_of(self.verify)
        assert opened is None or plain is None or opened[1] == plain.membership
        if plain is not None or not ending or dice.random() < 0.2:
            self.install(plain, fastsm.MemoryStateMachine() if dice.random() < 0.3 else self.machine)
        if ending:
            assert plain is None, f"refused, {ending}, by the page {plain}"
        deep = not ending or ("flat state" in ending or "compressed" in ending or "checksum" in ending)
        return Outcome(deep, ending)

    def verify(self) -> tuple[bytes, tuple[LogId, bytes] | None]:
        with open_snapshot(self.file) as snapshot:
            snapshot.verify()
            return snapshot.attachment, snapshot.membership

    def close(self) -> None:
        self.machine.close()

    def install(self, plain: Decoded | None, machine: Any) -> None:
        before = machine.last_applied(), list(machine.items())
        ending, _ = ending_of(lambda: machine.install_snapshot(None, self.file, allow_older=True))
        if plain is not None and ending.startswith("OrderError"):  # of another history than what is applied
            assert (machine.last_applied(), list(machine.items())) == before
            machine.clear()  # as the message says
            ending, _ = ending_of(lambda: machine.install_snapshot(None, self.file))
        assert bool(ending) == (plain is None), f"installed: {ending}, by the page {plain}"
        if plain is None:
            assert (machine.last_applied(), list(machine.items())) == before
            return
        assert list(machine.items()) == list(plain.items.items())
        assert (machine.last_applied(), machine.membership()) == (plain.last_applied, plain.membership)
        assert machine.clock() == plain.clock
        assert {key: machine.deadline(key) for key in plain.items} == plain.deadlines
        for first, last, _ in plain.runs:
            for index in (first - 1, first, last, last + 1):
                assert machine.entry_term(index) == plain.term(index), index


class Receivers(Snapshots):
    """A snapshot that arrives in pieces, some of them twice, wrong, or after a restart."""

    name = "receivers"
    decoders = (fastsm.snapshot.receiver.__file__, *Snapshots.decoders)

    def run(self, data: bytes, dice: random.Random) -> Outcome:
        folder = self.root / "in"
        receiver = SnapshotReceiver(folder, _files=QuietDirectory)
        ending = ""
        try:
            for offset, piece in pieces_of(dice, data):
                if dice.random() < 0.1:
                    receiver.close()
                    receiver = SnapshotReceiver(folder, _files=QuietDirectory)
                    if receiver.offset == 0 < offset < snapshots.STATE:  # too little to tell whose it is: sent again
                        assert receiver.write(0, data[:offset]) == offset
                    if receiver.offset < offset:  # what was there cannot have been a snapshot's beginning
                        ending = "SnapshotFormatError: it starts over"
                        break
                if dice.random() < 0.1:
                    self.offer_wrong(receiver, data, offset, dice)
                ending, _ = ending_of(partial(receiver.write, offset, piece))
                if ending:
                    break
            if not ending:
                ending, path = ending_of(receiver.finish)
            deep = receiver.size is not None or "flat" in ending or "compressed" in ending or "mismatch" in ending
            plain = plainly(lambda: page_reader.decode_snapshot(data))
            if ending:
                assert plain is None, f"refused, {ending}, by the page {plain}"
                receiver.discard()
            else:
                assert Path(path).read_bytes() == data
                assert plain is not None or self.has_one_twice(data), "given out, but not by the page"
        finally:
            receiver.close()
        return Outcome(deep, ending)

    def offer_wrong(self, receiver: SnapshotReceiver, data: bytes, offset: int, dice: random.Random) -> None:
        """Pieces that are refused, or were there before: what is there stays what it is."""
        before = receiver.offset
        start = dice.randrange(offset + 1)
        again = data[start:offset]
        assert receiver.write(start, again) == before
        if again:
            assert ending_of(lambda: receiver.write(start, bytes([again[0] ^ 1]) + again[1:]))[0]
        assert ending_of(lambda: receiver.write(offset + 1, b"gap"))[0]
        assert receiver.offset == before

    def has_one_twice(self, data: bytes) -> bool:
        """Or one session, or a touch without its key: all that an install sees, and no verification."""
        self.file.write_bytes(data)
        ending, _ = ending_of(lambda: self.machine.install_snapshot(None, self.file, allow_older=True))
        return "key" in ending or "session" in ending
