"""What is fuzzed: each decoder next to the plain reader of docs/format.md, which must agree on every input.

A target draws inputs whose checksums are right, so that they get behind them; runs one through the library's public
door; and demands a typed error or the plain reader's state. Everything else that may come is a finding.
"""

from __future__ import annotations

import dataclasses
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
import zstandard

import fastsm
import fastsm.snapshot.codec
import fastsm.snapshot.file
import fastsm.snapshot.flat
import fastsm.snapshot.receiver
from fastsm import FastsmError, FastStateMachine, types
from fastsm.procedures import Procedure
from support import by_hand, page_reader, snapshots
from support.fuzz_inputs import LAST, flat_snapshot, some_deadline, some_session, value
from support.inside import inside
from support.mutation import change_bytes, shuffle_some, sometimes
from support.page_reader import Corrupt, Decoded
from support.power import QuietDirectory
from support.simulation import kill

NUMBER = re.compile(r"[0-9a-f]{64}|0x[0-9a-f]+|-?\d+|b'.*'|b\".*\"|/\S+")


class Outcome(NamedTuple):
    """How an input ended: whether it was decoded past the header, and an error in words without numbers."""

    deep: bool
    ending: str


class Target:
    """One decoder. ``run`` raises for a finding."""

    name: str
    decoders: tuple[str, ...] = ()  # files of the library in Python that decode it

    def __init__(self, root: Path, corpus: list[bytes]) -> None:
        self.root = root
        self.corpus = corpus or [b""]

    def draw(self, dice: random.Random) -> bytes:
        """An input: a structure with lies, or a known input with other bytes; mostly with right checksums."""
        data = self.invent(dice)
        if dice.random() < 0.4:
            data = change_bytes(dice, dice.choice(self.corpus) if dice.random() < 0.5 else data, self.corpus)
        return self.seal(data) if dice.random() < 0.95 else data

    def invent(self, dice: random.Random) -> bytes:
        raise NotImplementedError

    def seal(self, data: bytes) -> bytes:
        return data

    def run(self, data: bytes, dice: random.Random) -> Outcome:
        raise NotImplementedError

    def close(self) -> None:
        """Gives back what it holds."""


def ending_of(call: Callable[[], Any]) -> tuple[str, Any]:
    """"" and what the call returns, or the typed error in words, and None. Other errors are findings, and pass."""
    try:
        return "", call()
    except FastsmError as error:
        expected = str(error).partition(", found")[0]
        return f"{type(error).__name__}: {NUMBER.sub('#', expected)[:150]}", None


def plainly(call: Callable[[], Any]) -> Any:
    """What the plain reader makes of it; None: nothing."""
    try:
        return call()
    except (Corrupt, zstandard.ZstdError):
        return None


# ---- commands --------------------------------------------------------------------------------------------

ALONE = (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 14)
IN_BATCH = (1, 2, 3, 4, 7, 9, 15, 16, 17)
IN_BRANCH = (1, 2, 7, 8, 9, 15, 17)


class Anything(dict):  # type: ignore[type-arg]
    """Procedures of every name and version."""

    def get(self, key: tuple[str, int], default: object = None) -> Procedure:
        return Procedure(*key, lambda tx, payload: tx.add(payload, 1))


class Commands(Target):
    """``decode``, ``check`` and ``apply``."""

    name = "commands"

    def __init__(self, root: Path, corpus: list[bytes]) -> None:
        super().__init__(root, corpus)
        self.machine: FastStateMachine | None = None

    def invent(self, dice: random.Random) -> bytes:
        command = self.listed(dice)
        if dice.random() < 0.1:
            deadline = dice.choice((0, 2**63 - 1, 2**63, 2**64 - 1))
            numbers = struct.pack("<QQQ", dice.randrange(30), dice.randrange(4), deadline)
            return self.header(dice, 13, 0, len(command)) + numbers + command
        return command

    def listed(self, dice: random.Random) -> bytes:
        way = dice.random()
        if way < 0.5:
            return self.simple(dice, ALONE)
        if way < 0.75:
            members = [self.simple(dice, IN_BATCH) for _ in range(dice.randrange(5))]
            return self.header(dice, 6, 0, len(members)) + b"".join(members)
        kinds = ((128, 129, 130), IN_BRANCH, IN_BRANCH)
        parts = [[self.simple(dice, each) for _ in range(dice.randrange(3))] for each in kinds]
        counts = struct.pack("<II", sometimes(dice, 0.05, len(parts[1]), 1 << 32), len(parts[2]))
        return self.header(dice, 10, 0, len(parts[0])) + counts + b"".join(b"".join(part) for part in parts)

    def header(self, dice: random.Random, kind: int, key_size: int, size: int) -> bytes:
        kind = sometimes(dice, 0.03, kind, 20)
        key_size, size = sometimes(dice, 0.04, key_size, 1 << 16), sometimes(dice, 0.06, size, 1 << 32)
        return struct.pack("<BBHI", dice.random() < 0.02, kind, key_size, size)

    def simple(self, dice: random.Random, kinds: tuple[int, ...]) -> bytes:
        kind, key, new, old = dice.choice(kinds), value(dice), value(dice), value(dice)
        if dice.random() < 0.02:
            kind = dice.choice((5, 8, 11, 12, 14, 18, 128))
        if kind in (3, 16):
            size = page_reader.NONE if dice.random() < 0.2 else len(old)
            old = b"" if size == page_reader.NONE else old
            head = self.header(dice, kind, len(key), len(new))
            deadline = struct.pack("<Q", some_deadline(dice)) if kind == 16 else b""
            return head + struct.pack("<I", sometimes(dice, 0.05, size, 1 << 32)) + deadline + key + old + new
        has_key, has_value, may_be_none = page_reader.LAYOUTS[kind]
        key, new = key if has_key else b"", new if has_value else b""
        size = len(new)
        if may_be_none and dice.random() < 0.2:
            new, size = b"", page_reader.NONE
        layout = page_reader.NUMBERS.get(kind, "<")
        choose = some_deadline if kind in (12, 15, 17, 18) else lambda dice: dice.choice((0, 1, 5, 2**31 - 1))
        numbers = [choose(dice) for _ in layout[1:]]
        return self.header(dice, kind, len(key), size) + struct.pack(layout, *numbers) + key + new

    def run(self, data: bytes, dice: random.Random) -> Outcome:
        ending, decoded = ending_of(lambda: fastsm.decode(data))
        plain = plainly(lambda: page_reader.decode_command(data))
        assert (plain is None) == bool(ending), f"{decoded}, by the page {plain}"
        assert ending_of(lambda: fastsm.check(data))[0] == ending
        if plain is not None:
            assert plain_form(decoded) == plain
        if self.machine is None or self.machine.last_applied().index > 20_000:
            if self.machine is not None:
                self.machine.clear()
            self.machine = self.machine or FastStateMachine(self.root / "state", _files=QuietDirectory)
            self.machine._set_procedures(Anything(), False)
        before = self.machine.last_applied().index
        applied, results = ending_of(lambda: self.machine.apply([(before + 1, 1, data)]))
        assert bool(applied) == bool(ending), (ending, applied)
        assert self.machine.last_applied().index == before + (results is not None)
        return Outcome(not ending.startswith("Unknown"), ending)

    def close(self) -> None:
        if self.machine is not None:
            self.machine.close()


KINDS = {
    types.Put: 1, types.Delete: 2, types.CompareAndSwap: 3, types.Noop: 4, types.Config: 5, types.Batch: 6,
    types.Add: 7, types.Read: 8, types.DeleteRange: 9, types.Transaction: 10, types.Call: 11, types.OpenSession: 12,
    types.Once: 13, types.Forget: 14, types.Touch: 17, types.Tick: 18,
    types.ValueIs: 128, types.Exists: 129, types.ModifiedAt: 130,
}  # fmt: skip


def plain_form(command: Any) -> page_reader.Command:  # noqa: PLR0911  # one for each layout
    """A decoded command as the plain reader has it: kind, and the fields in the order of the bytes."""
    kind = KINDS[type(command)]
    if kind in (1, 3):
        if command.expires is None:
            return kind, *(getattr(command, field.name) for field in dataclasses.fields(command)[:-1])
        values = (command.value,) if kind == 1 else (command.expected, command.value)
        return (15 if kind == 1 else 16), command.expires, command.key, *values
    if kind == 17:
        return kind, no_deadline(command.expires), command.key
    if kind == 18:
        return kind, command.now, no_deadline(command.limit)
    if kind == 6:
        return kind, [plain_form(member) for member in command.commands]
    if kind == 10:
        return kind, *([plain_form(each) for each in part] for part in (
            command.conditions, command.then, command.otherwise))
    if kind == 13:
        return kind, command.session, command.sequence, no_deadline(command.expires), plain_form(command.command)
    if kind == 12:
        return kind, no_deadline(command.expires)
    if kind == 7:
        return kind, command.delta, command.initial, command.key
    if kind == 11:
        return kind, command.version, command.name.encode(), command.payload
    if kind == 130:
        return kind, command.index, command.key
    return kind, *(getattr(command, field.name) for field in dataclasses.fields(command))


def no_deadline(expires: int | None) -> int:
    return page_reader.NO_DEADLINE if expires is None else expires


# ---- the log ---------------------------------------------------------------------------------------------

class Logs(Target):
    """A directory of CURRENT, a log and perhaps its base; the input is CURRENT, the base's size, base and log."""

    name = "logs"
    CURRENT = 64
    FRONT = CURRENT + 8

    def __init__(self, root: Path, corpus: list[bytes]) -> None:
        super().__init__(root, corpus)
        self.path = root / "state"
        self.path.mkdir(exist_ok=True)

    def invent(self, dice: random.Random) -> bytes:
        base = flat_snapshot(dice) if dice.random() < 0.15 else b""
        self.index, self.term = struct.unpack_from("<QQ", base, 16) if base else (0, 1)
        if dice.random() < 0.02:
            self.index = 6
        log = by_hand.log_head(
            base=(self.index, self.term if self.index else 0), size=len(base), checksum=base[128:160] or bytes(32))
        log = by_hand.sealed(by_hand.LOG, *(
            sometimes(dice, 0.01, field) if isinstance(field, int) and at > 2 else field
            for at, field in enumerate(struct.unpack_from(by_hand.LOG[:-1], log))))
        for _ in range(dice.randrange(6)):
            log += self.frame(dice, len(log))
        if dice.random() < 0.2:
            log += dice.choice((bytes(40), b"torn", log[96:], self.frame(dice, len(log))[:-8]))
        durable = dice.choice((96, 96, 96, len(log), len(log) // 2 & ~7))
        current = by_hand.current(durable=sometimes(dice, 0.02, durable))
        return current + struct.pack("<Q", len(base)) + base + log

    def frame(self, dice: random.Random, offset: int) -> bytes:
        runs, known = [], []
        for _ in range(dice.choice((0, 1, 1, 1, 2, 3))):
            first, self.index = min(self.index + 1, LAST), min(self.index + dice.choice((1, 1, 2, 5)), LAST)
            self.term = min(self.term + dice.choice((0, 0, 1)), LAST)
            gap = runs and dice.random() < 0.2
            runs.append((sometimes(dice, 0.02, self.index), by_hand.GAP if gap else sometimes(dice, 0.02, self.term)))
            known += [] if gap else range(first, self.index + 1)
        if runs and runs[-1][1] == by_hand.GAP and dice.random() < 0.9:
            runs[-1] = (runs[-1][0], self.term)
        records = [self.record(dice, index) for index in sorted(dice.choices(known, k=3) if known else [])]
        if dice.random() < 0.15:
            records.append(self.record(dice, dice.choice((0, self.index)), dice.choice((4, 5))))
        if dice.random() < 0.05:
            shuffle_some(dice, records, lambda: self.record(dice, self.index))
        if dice.random() < 0.03:
            shuffle_some(dice, runs, lambda: (self.index + 1, self.term))
        body = change_bytes(dice, b"".join(records)) if dice.random() < 0.05 else b"".join(records)
        lag = dice.choice((0, 0, (offset - 96) // 8, 2**32 - 1, sometimes(dice, 0.1, 1, 1 << 32)))
        count = sometimes(dice, 0.02, len(runs), 1 << 32)
        return by_hand.frame(offset, [by_hand.run(*run) for run in runs], body, lag=lag, count=count)

    def record(self, dice: random.Random, index: int, operation: int = 0) -> bytes:
        operation = operation or dice.choice((1, 1, 1, 2, 3, 6, 7, 8, 8, 9))
        key = value(dice) if operation in (1, 2, 8) else b""
        if operation in (1, 2, 8) and dice.random() < 0.7:
            key = dice.choice((b"a", b"b"))
        data = b"" if operation in (2, 5, 7, 8) else value(dice)
        expires = some_deadline(dice) if operation in (1, 8) and dice.random() < 0.4 else None
        if operation == 4:
            data = struct.pack("<Q", self.term) + data
        elif operation in (6, 7):
            key = struct.pack("<Q", dice.randrange(3))
            data = some_session(dice) if operation == 6 else b""
        elif operation == 9:
            data = struct.pack("<Q", some_deadline(dice))
        data += b"!" * (dice.random() < 0.01)
        timed = int(expires is not None)
        return by_hand.record(
            sometimes(dice, 0.01, operation, 256), sometimes(dice, 0.02, index), key, data, expires,
            sometimes(dice, 0.01, timed, 256))

    def split(self, data: bytes) -> tuple[bytes, bytes, bytes]:
        """CURRENT, base and log."""
        stop = self.FRONT + int.from_bytes(data[self.CURRENT : self.FRONT], "little")
        return data[: self.CURRENT], data[self.FRONT : stop], data[stop:]

    def seal(self, data: bytes) -> bytes:
        current, base, log = map(bytearray, self.split(data))
        if len(base) >= snapshots.STATE:
            base[:] = snapshots.sealed(bytes(base))
            if len(log) >= by_hand.START:
                log[56:88] = base[128:160]
        reseal(current, 56)
        reseal(log, 88)
        by_hand.seal_frames(log, int.from_bytes(log[24:32], "little"))
        return bytes(current + data[self.CURRENT : self.FRONT] + base + log)

    def run(self, data: bytes, dice: random.Random) -> Outcome:
        current, base, log = self.split(data)
        for path in self.path.iterdir():
            if path.name not in ("LOCK", "PUBLISHED"):
                path.unlink()
        (self.path / "CURRENT").write_bytes(current)
        (self.path / "log-1").write_bytes(log)
        if base:
            (self.path / "base-1").write_bytes(base)
        plain = plainly(lambda: self.read_plainly(current, base, log))
        if plain is not None and dice.random() < 0.3:  # what is after the end is the owner's, whom a reader trusts
            looked, machine = ending_of(lambda: FastStateMachine(self.path, read_only=True, _files=QuietDirectory))
            assert not looked, looked
            self.judge(machine, plain)
        ending, machine = ending_of(
            lambda: FastStateMachine(self.path, verify_on_open="full", contiguous=False, _files=QuietDirectory))
        self.judge(machine, plain)
        if machine is None:
            assert (self.path / "log-1").read_bytes() == log, "a file was changed"
        return Outcome(plain is not None or "frame" in ending, ending)

    def read_plainly(self, current: bytes, base: bytes, log: bytes) -> Decoded:
        page_reader.demand(len(current) == 64, "size of CURRENT")
        generation, identity = page_reader.header(current, b"FASTSM-C", 64)
        page_reader.demand(generation == 1, "this log")
        page_reader.demand(len(log) >= by_hand.START, "a whole header")
        base = base if any(log[48:56]) else b""
        durable, *last = struct.unpack_from("<QQQ", current, 32)
        return page_reader.decode_log(log, generation, identity, durable, base=base, last=(last[0], last[1]))

    def judge(self, machine: FastStateMachine | None, plain: Decoded | None) -> None:
        """The state is the plain reader's, and goes on."""
        assert (machine is None) == (plain is None), f"{machine!r}, by the page {plain}"
        if machine is None or plain is None:
            return
        try:
            assert_same(machine, plain)
            assert machine.stats().recovery.log_bytes == plain.end
            assert len(plain.frames) == machine.stats().recovery.frames
            index, term = machine.last_applied()
            if index < LAST and not inside(machine).log.read_only:
                machine.apply([(index + 1, term, fastsm.put(b"more", b"of it"))])
                inside(machine).check()
        finally:
            kill(machine)


def sessions_of(machine: FastStateMachine) -> list[tuple[int, int, bytes]]:
    """Entry, number and record of each session."""
    return [
        (log_id.index, int.from_bytes(key, "little"), data)
        for operation, log_id, key, data, _ in inside(machine).live_records(machine.last_applied())
        if operation == "session"]


def reseal(data: bytearray, at: int) -> None:
    """Computes the checksum of a fixed header anew."""
    if len(data) >= at + 8:
        data[at : at + 8] = struct.pack("<Q", xxhash.xxh64_intdigest(bytes(data[:at])))


def assert_same(machine: FastStateMachine, plain: Decoded) -> None:
    """A machine has the state that the plain reader has found."""
    assert list(machine.items()) == list(plain.items.items())
    assert machine.get_many(list(plain.items)) == list(plain.items.values())
    assert machine.last_applied() == plain.last_applied
    assert machine.membership() == plain.membership
    assert machine.clock() == plain.clock
    assert {key: machine.deadline(key) for key in plain.items} == plain.deadlines
    assert {session: value for _, session, value in sessions_of(machine)} == plain.sessions
    metadata = machine.snapshot_metadata()
    assert (metadata and (metadata.last_included, metadata.checksum)) == plain.metadata
    for first, last, _ in plain.runs:
        for index in (first - 1, first, last, last + 1):
            assert machine.entry_term(index) == plain.term(index), index
