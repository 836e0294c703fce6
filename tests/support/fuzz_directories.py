"""Fuzz targets that have no plain reader to compare with: a saved table, and the journal of a Raft library."""

from __future__ import annotations

import random
import shutil
import struct
from functools import partial
from pathlib import Path

import fastsm
import fastsm.core.generations
from fastsm import FastStateMachine
from fastsm.integrations.pysyncobj.journal import FastJournal as Journal
from support import by_hand
from support.fuzz_inputs import value
from support.fuzz_targets import Outcome, Target, ending_of, reseal
from support.inside import inside
from support.mutation import change_bytes, shuffle_some, sometimes
from support.power import QuietDirectory
from support.simulation import kill
from support.tables import SEGMENT, TableFile

KEYS = [b"key %d" % i for i in range(60)]


class Tables(Target):
    """A directory with a base, a log, and a saved table of false content with correct checksums: the input."""

    name = "tables"

    def __init__(self, root: Path, corpus: list[bytes]) -> None:
        super().__init__(root, corpus)
        self.path = root / "state"
        fastsm.core.generations.SAVE_TABLE_ABOVE = 0
        with FastStateMachine(self.path, retain_entries=20, _files=QuietDirectory) as machine:
            for start in range(0, 60, 10):
                machine.apply([(start + i + 1, 1, fastsm.put(KEYS[start + i], b"value")) for i in range(10)])
            machine.apply([(61, 2, fastsm.config(b"members")), (62, 2, fastsm.delete(KEYS[7]))])
            machine.write_snapshot(root / "aside")
            machine.compact()
            self.state = list(machine.items())
        (self.file,) = self.path.glob("table-*")
        self.content = self.file.read_bytes()
        self.slots = list(TableFile(self.file).slots())
        shutil.copytree(self.path, root / "source")

    def draw(self, dice: random.Random) -> bytes:
        table = TableFile(self.file)
        for _ in range(dice.randrange(1, 4)):
            way = dice.randrange(3)
            if way == 0:
                field = dice.choice([name for name in table.saved._fields if name not in ("sessions", "touches")])
                table.change(**{field: sometimes(dice, 1, getattr(table.saved, field))})
            elif way == 1:
                at = dice.choice(self.slots)[0]
                table.set("Q", at, sometimes(dice, 0.5, *table.get("Q", at)) ^ 1 << dice.randrange(36))
            else:
                parts = (table.sections.runs, table.sections.metadata, table.sections.dead, table.sections.directory)
                section = dice.choice((*parts, table.sections.deadlines, table.sections.segments + SEGMENT - 64))
                at = section + dice.randrange(64)
                table.set("B", at, sometimes(dice, 1, *table.get("B", at), 256))
        table.write()
        data, _ = self.file.read_bytes(), self.file.write_bytes(self.content)
        return data

    def run(self, data: bytes, dice: random.Random) -> Outcome:
        for path in self.path.iterdir():
            path.unlink()
        for path in (self.root / "source").iterdir():
            (self.path / path.name).write_bytes(path.read_bytes())
        self.file.write_bytes(data)
        verify = dice.choice(("off", "full"))
        ending, machine = ending_of(
            lambda: FastStateMachine(self.path, verify_on_open=verify, _files=QuietDirectory))
        if machine is None:
            self.file.write_bytes(self.content)
            return Outcome(True, ending)
        try:
            believed = inside(machine).index.loaded
            if not believed:
                assert list(machine.items()) == self.state
            else:
                self.use(machine)
        finally:
            kill(machine)
            self.file.write_bytes(self.content)
        return Outcome(believed, "believed" if believed else "read")

    def use(self, machine: FastStateMachine) -> None:
        """Call reads and writes; they may return values that the table's forger chose, or raise `FastsmError`s."""
        index, term = machine.last_applied()
        for call in (
            lambda: machine.get_many(KEYS), lambda: list(machine.items()), machine.columns, machine.membership,
            machine.stats, lambda: machine.entry_term(5), machine.snapshot_metadata, lambda: machine.modified(KEYS[3]),
            lambda: machine.apply([(index + 1, term, fastsm.put(key, b"new")) for key in KEYS[:1]]),
            lambda: machine.apply([(index + 2, term, fastsm.delete(KEYS[2]))]),
        ):
            ending_of(call)


class Journals(Target):
    """A directory of one or two segments. The input is the size of the first one, then both."""

    name = "journals"

    def __init__(self, root: Path, corpus: list[bytes]) -> None:
        super().__init__(root, corpus)
        self.path = root / "journal"
        self.path.mkdir(exist_ok=True)

    def invent(self, dice: random.Random) -> bytes:
        self.index, self.term = 0, 0
        segments = [self.segment(dice, 1, (1, 0, 0, 0, 0, 0, 0, 0, 0, 0))]
        if dice.random() < 0.4:
            end = len(segments[0])
            last = self.last_checksum(segments[0])
            state = (1, self.index, self.term, 0, 0, end, dice.choice((96, end)), self.term, last, 0)
            segments.append(self.segment(dice, 2, state))
        return struct.pack("<I", len(segments[0])) + b"".join(segments)

    def segment(self, dice: random.Random, number: int, state: tuple[int, ...]) -> bytes:
        voted = sometimes(dice, 0.1, state[3], 2)
        state = tuple(sometimes(dice, 0.02, each) for each in (*state[:3], voted, *state[4:]))
        items = [self.item(dice, 7, 0, 0, struct.pack("<10Q", *state) + b"node" * voted)]
        for _ in range(dice.randrange(6)):
            kind = dice.choice((1, 1, 1, 1, 2, 3, 4, 5, 6, 8))
            self.index += kind in (1, 4)
            self.term += dice.random() < 0.2
            index = self.index if kind != 5 else dice.randrange(2)
            items.append(self.item(dice, kind, index, self.term, value(dice) if kind != 5 else dice.choice((
                b"node", b"node", b"", b"\xff\xfe"))))
        if dice.random() < 0.05:
            shuffle_some(dice, items, lambda: self.item(dice, 1, self.index, self.term, b""))
        content = by_hand.sealed(by_hand.SEGMENT, b"FASTSM-J", 0, 0, sometimes(dice, 0.01, number), number, bytes(56))
        for item in items:
            body = change_bytes(dice, item) if dice.random() < 0.02 else item
            lag = dice.choice((0, (len(content) - 96) // 8, 2**32 - 1, sometimes(dice, 0.1, 1, 1 << 32)))
            count = sometimes(dice, 0.01, 0, 1 << 32)
            content += by_hand.frame(len(content), [], body, lag=lag, identity=number, count=count)
        return content + dice.choice((b"", b"", bytes(64), b"torn"))

    def last_checksum(self, segment: bytes) -> int:
        """Return the checksum that the segment's last whole frame has once all frames are sealed."""
        sealed, offset, last = bytearray(segment), by_hand.START, 0
        by_hand.seal_frames(sealed, int.from_bytes(segment[24:32], "little"))
        while offset + 32 <= len(sealed):
            (length,) = struct.unpack_from("<Q", sealed, offset + 8)
            if not 32 <= length <= len(sealed) - offset:
                break
            last, offset = offset, offset + length
        return by_hand.frame_checksum(sealed[last:]) if last else 0

    def item(self, dice: random.Random, kind: int, index: int, term: int, data: bytes) -> bytes:
        size = sometimes(dice, 0.02, len(data), 1 << 32)
        head = struct.pack("<QQII", sometimes(dice, 0.03, index), sometimes(dice, 0.03, term), size, kind)
        return head + data + bytes(-len(data) % 8)

    def split(self, data: bytes) -> list[bytes]:
        size = int.from_bytes(data[:4], "little")
        return [segment for segment in (data[4 : 4 + size], data[4 + size :]) if segment]

    def seal(self, data: bytes) -> bytes:
        sealed = data[:4]
        for segment in self.split(data):
            changed = bytearray(segment)
            reseal(changed, 88)
            by_hand.seal_frames(changed, int.from_bytes(changed[24:32], "little"))
            sealed += changed
        return sealed

    def run(self, data: bytes, dice: random.Random) -> Outcome:
        for path in self.path.iterdir():
            path.unlink()
        for number, segment in enumerate(self.split(data), 1):
            (self.path / f"journal-{number}").write_bytes(segment)
            identity = int.from_bytes(segment[24:32], "little")
            (self.path / "NEWEST").write_bytes(by_hand.newest(number + (dice.random() < 0.02), identity))
        states, ending = [], ""
        for _ in range(2):
            ending, journal = ending_of(
                lambda: Journal(self.path, durable=bool(dice.randrange(2)), _files=QuietDirectory))
            if journal is None:
                assert not states, f"it opened only once: {ending}"
                break
            try:
                states.append((journal[:], journal.term, journal.vote))
                expected = range(journal.first_index, journal.first_index + len(journal))
                assert [index for _, index, _ in journal[:]] == list(expected)
                ending_of(partial(journal.add, b"more", journal.last_index + 1, journal.term))
                ending_of(partial(journal.cut, journal.last_index))
            finally:
                journal.abandon()
        return Outcome(bool(states and (states[0] != ([], 0, None))) or "frame" in ending, ending)
