"""Time in the log: deadlines, touches and ticks agree with the model, whatever happens to the machine."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsm
import fastsm.core.generations
from fastsm import Answer, Entry, FastStateMachine, LogId, MemoryStateMachine, open_snapshot
from fastsm.snapshot.model import State
from support import by_hand
from support.by_hand import record
from support.faulty import crash_copy
from support.inside import inside

Opener = Callable[..., FastStateMachine]
KEYS = [b"", b"\x00", b"a", b"ab", b"b", b"\xff" * 40, *(b"key %d" % i for i in range(6))]


@pytest.fixture
def machine(directory: Path, machine_at: Opener) -> FastStateMachine:
    return machine_at(directory)


def applied(machine: Any, *commands: bytes) -> list[Any]:
    """Apply commands as the next chunk."""
    index, term = machine.last_applied()
    return machine.apply([(index + 1 + i, max(term, 1), command) for i, command in enumerate(commands)])


def state_of(machine: Any) -> dict[str, Any]:
    """Return everything related to time, and the order of items."""
    return {
        "items": list(machine.items()), "deadlines": {key: machine.deadline(key) for key in KEYS},
        "modified": {key: machine.modified(key) for key in KEYS}, "clock": machine.clock(),
        "next": machine.next_deadline(), "applied": machine.last_applied(),
    }


# ---- next to the model -----------------------------------------------------------------------------------

@fastsm.procedure
def meddle(tx: Any, payload: bytes) -> list[Any]:
    """Write, touch and read deadlines, as the payload's seed determines."""
    dice = random.Random(payload)
    seen: list[Any] = [tx.clock]
    for _ in range(dice.randrange(6)):
        key = dice.choice(KEYS)
        way = dice.randrange(7)
        if way == 0:
            tx.put(key, b"by a call", expires=dice.choice((None, tx.clock + dice.randrange(9))))
        elif way == 1:
            seen.append(tx.touch(key, dice.choice((None, tx.clock, 2**63 - 1))))
        elif way == 2:
            tx.delete(key)
        elif way == 3:
            seen.append(tx.delete_range(key, dice.choice((None, key + b"\xff"))))
        elif way == 4:
            seen += [name for name, _ in tx.scan(key, limit=dice.choice((None, 0, 1, 3)), reverse=dice.random() < 0.5)]
        elif way == 5:
            seen.append(tx.count(prefix=key[:1]))
        else:
            tx.put(key, b"7", expires=dice.choice((None, 5)))
            seen.append(tx.add(key, 1))
        seen.append(tx.deadline(key))
    if dice.random() < 0.2:
        raise fastsm.Abort(seen)
    return seen


class Invented:
    """Generates commands with many equal and overtaken deadlines, and deadlines of keys that are gone."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.now = 0

    def deadline(self) -> int | None:
        return self.dice.choice((None, self.now, self.now + self.dice.randrange(1, 12), self.now + 3, 2**63 - 1, 0))

    def simple(self) -> bytes:
        key, dice = self.dice.choice(KEYS), self.dice
        return dice.choice((
            lambda: fastsm.put(key, dice.randbytes(dice.randrange(20)), expires=self.deadline()),
            lambda: fastsm.put(key, b"5", expires=self.deadline()),
            lambda: fastsm.touch(key, self.deadline()),
            lambda: fastsm.delete(key),
            lambda: fastsm.add(key, 1),
        ))()

    def listed(self) -> bytes:
        dice = self.dice
        way = dice.randrange(7)
        if way == 0:
            members = [self.simple() for _ in range(dice.randrange(4))]
            return fastsm.batch([*members, fastsm.compare_and_swap(
                dice.choice(KEYS), dice.choice((None, b"5")), b"6", expires=self.deadline())])
        if way == 1:
            return fastsm.transaction(
                [fastsm.exists(dice.choice(KEYS))], [self.simple() for _ in range(3)], [self.simple(), self.simple()])
        if way == 2:
            return fastsm.delete_range(dice.choice(KEYS), dice.choice((None, dice.choice(KEYS))))
        if way == 3:
            return fastsm.call("meddle", dice.randbytes(8))
        return self.simple()

    def command(self, index: int) -> bytes:
        dice = self.dice
        way = dice.randrange(12)
        if way < 2:
            self.now += dice.choice((0, 1, 1, 2, 5))
            return fastsm.tick(
                max(0, self.now - dice.choice((0, 0, 0, 4))), limit=dice.choice((None, None, 0, 1, 2, 3)))
        if way == 2:
            return fastsm.open_session(expires=self.deadline())
        if way == 3:
            session = max(1, index - dice.randrange(25))
            return fastsm.once(session, dice.randrange(1, 4), self.listed(), expires=self.deadline())
        if way == 4 and dice.random() < 0.3:
            return fastsm.forget(max(1, index - dice.randrange(9)))
        return self.listed()

    def chunk(self, last: LogId) -> list[Entry]:
        return [
            Entry(last.index + 1 + i, max(last.term, 1), self.command(last.index + 1 + i))
            for i in range(self.dice.choice((1, 1, 2, 5, 12)))]


@pytest.mark.parametrize("seed", range(24))
def test_time_is_as_the_model_says(
    tmp_path: Path, seed: int, machine_at: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results, deadlines, clock and checksums: now, as of earlier entries, after compactions, kills and installs."""
    monkeypatch.setattr(fastsm.core.generations, "SAVE_TABLE_ABOVE", 0 if seed % 2 else 1 << 40)
    compare(tmp_path, seed, machine_at)


def compare(tmp_path: Path, seed: int, machine_at: Opener) -> None:
    """Walks a machine and its model at random; ``AssertionError`` if they differ."""
    dice, invented = random.Random(seed), Invented(seed)
    path = tmp_path / "state"
    options = {"procedures": [meddle], "retain_entries": 30}
    machine, model = machine_at(path, **options), MemoryStateMachine(procedures=[meddle])
    lives = 0
    for step in range(90):
        chunk = invented.chunk(model.last_applied())
        assert machine.apply(chunk) == model.apply(chunk)
        inside(machine).check()
        assert state_of(machine) == state_of(model)
        way = dice.randrange(14)
        if way == 0:
            machine.compact(dice.choice((None, machine.last_applied())))
        elif way == 1:
            machine.close()
            machine = machine_at(path, **options)
        elif way == 2:
            machine.flush()
            lives += 1
            crash_copy(path, tmp_path / f"life {lives}")
            machine.close()
            path = tmp_path / f"life {lives}"
            machine = machine_at(path, **options)
        elif way == 3:
            machine.write_snapshot(tmp_path / "snapshot")
            with open_snapshot(tmp_path / "snapshot") as snapshot:
                snapshot.verify()
                assert snapshot.clock == model.clock()
            machine.install_snapshot(None, tmp_path / "snapshot")
        elif way == 4 and step > 70:
            for each in (machine, model):
                each.clear()
            invented.now = 0
        if way < 4:
            inside(machine).check()
            assert state_of(machine) == state_of(model)
        if way in (5, 6, 7):
            first = machine.stats().base.index
            last = model.last_applied()
            index = dice.randrange(first, last.index + 1)
            as_of = LogId(index, machine.entry_term(index) or 0)
            assert machine.state_checksum(as_of) == model.state_checksum(as_of)
    assert machine.state_checksum() == model.state_checksum()


@pytest.mark.parametrize("seed", range(4))
def test_many_ticks_in_one_chunk(tmp_path: Path, seed: int, machine_at: Opener) -> None:
    """Each sees what earlier entries wrote, overtook or took back: as in chunks of one entry, and as in the model."""
    invented = Invented(seed)
    ticking = [
        each for index in range(1, 400, 2)
        for each in (invented.command(index), fastsm.tick(index // 4, limit=invented.dice.choice((None, 0, 1, 2))))]
    chunk = [Entry(index, 1, command) for index, command in enumerate(ticking, 1)]
    model = MemoryStateMachine(procedures=[meddle])
    whole, single = (machine_at(tmp_path / name, procedures=[meddle]) for name in ("whole", "single"))
    answers = model.apply(chunk)
    assert whole.apply(chunk) == answers
    assert [answer for entry in chunk for answer in single.apply([entry])] == answers
    for machine in (whole, single):
        inside(machine).check()
        assert state_of(machine) == state_of(model)
        assert machine.state_checksum() == model.state_checksum()


@fastsm.procedure
def take_back(tx: Any, payload: bytes) -> list[bytes]:
    """Write twenty keys, which every other call takes back."""
    for number in range(20):
        tx.put(b"%d/%s" % (number, payload), b"")
    seen = [key for key, _ in tx.scan(b"1", b"2", limit=200)]
    if len(payload) % 2:
        raise fastsm.Abort(seen)
    return seen


def test_ranges_over_many_keys_that_a_chunk_wrote_and_took_back(tmp_path: Path, machine_at: Opener) -> None:
    """Ranges over many keys that a chunk wrote and took back have each key once, in order, in every call."""
    chunk = [Entry(index, 1, fastsm.call("take_back", b"x" * (index % 7) + b"%d" % (index % 30)))
             for index in range(1, 80)]
    machine, model = (machine_at(tmp_path / "state", procedures=[take_back]),
                      MemoryStateMachine(procedures=[take_back]))
    assert machine.apply(chunk) == model.apply(chunk)
    assert state_of(machine) == state_of(model)


class ForgetsInCompactions(FastStateMachine):
    """A planted fault: compaction loses a deadline."""

    compacted = False

    def compact(self, *arguments: Any) -> None:
        super().compact(*arguments)
        self.compacted = True

    def deadline(self, key: Any, /) -> int | None:
        return None if self.compacted else super().deadline(key)


def deadline_survives(state: State, log_id: LogId, key: bytes, value: bytes, expires: int | None = None) -> None:
    """A planted fault: a deadline survives an overwrite without one."""
    expires = state.deadline(key) if expires is None else expires
    right["put"](state, log_id, key, value, expires)


def by_hash(state: State) -> list[tuple[int, bytes]]:
    """A planted fault: equal deadlines are ordered by a hash."""
    return sorted(right["deadlines_of_keys"](state), key=lambda due: (due[0], hashlib.sha256(due[1]).digest()))


def touch_is_a_write(state: State, log_id: LogId, key: bytes, expires: int | None) -> None:
    """A planted fault: a touch writes the value again."""
    right["put"](state, log_id, key, state.values[key], expires)


right: dict[str, Any] = {name: getattr(State, name) for name in ("put", "deadlines_of_keys", "touch")}
PLANTED = {"put": deadline_survives, "deadlines_of_keys": by_hash, "touch": touch_is_a_write}


@pytest.mark.parametrize("name", [*PLANTED, "compact"])
def test_planted_faults_are_found(
    tmp_path: Path, name: str, machine_at: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random walk with the model finds each of these classic mistakes within a few seeds."""
    if name == "compact":
        monkeypatch.setattr(fastsm, "FastStateMachine", ForgetsInCompactions)  # which the fixture makes
    else:
        monkeypatch.setattr(State, name, PLANTED[name])
    for seed in range(20):
        (tmp_path / f"{seed}").mkdir()
        try:
            compare(tmp_path / f"{seed}", seed, machine_at)
        except AssertionError:
            return
    pytest.fail(f"a fault in {name} was not found")


def test_a_saved_table_has_sessions_deadlines_and_clock(
    directory: Path, machine_at: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An opening that reads no log finds all of them, and continues with them."""
    monkeypatch.setattr(fastsm.core.generations, "SAVE_TABLE_ABOVE", 0)
    machine = machine_at(directory)
    applied(machine, *(fastsm.put(b"%d" % i, b"", expires=i) for i in range(5_000)))
    applied(machine, *(fastsm.touch(b"%d" % i, 7_000 + i) for i in range(0, 5_000, 2)))
    applied(machine, *(fastsm.open_session(expires=i) for i in range(300)), fastsm.tick(99))
    before = machine.state_checksum(), machine.next_deadline(), machine.clock()
    machine.close()
    machine = machine_at(directory)
    assert inside(machine).index.loaded
    inside(machine).check()
    assert (machine.state_checksum(), machine.next_deadline(), machine.clock()) == before
    assert applied(machine, fastsm.tick(10**6)) == [Answer(True, 5_000 - 50 + 200)]
    assert machine.next_deadline() is None


# ---- what a tick does ------------------------------------------------------------------------------------

def removed(machine: FastStateMachine, path: Path) -> list[bytes]:
    """Return the keys that the log's last entry deleted, in the order of its records."""
    from fastsm.tools.json_lines import dump_log  # noqa: PLC0415  # imports what else the tests need not

    machine.flush()
    last = machine.last_applied().index
    return [line["key"].encode() for line in dump_log(path, first=last) if line["operation"] == "delete"]


def test_equal_deadlines_go_in_the_order_of_their_keys(directory: Path, machine_at: Opener) -> None:
    """Keys with equal deadlines are removed in key order, whether put earlier or in the tick's own chunk."""
    keys = [b"%d" % i for i in range(400)]
    shuffled = keys[:]
    random.Random(3).shuffle(shuffled)
    machine = machine_at(directory)
    applied(machine, *(fastsm.put(key, b"", expires=5) for key in shuffled[:300]))
    chunk = [fastsm.put(key, b"", expires=5) for key in shuffled[300:]]
    assert applied(machine, *chunk, fastsm.tick(5, limit=250))[-1] == Answer(True, 250)
    assert removed(machine, directory) == sorted(keys)[:250]
    assert applied(machine, fastsm.tick(0)) == [Answer(True, 150)]
    assert removed(machine, directory) == sorted(keys)[250:]


def test_a_limit_counts_keys_first_then_sessions(machine: FastStateMachine) -> None:
    """The limit counts both together; with 0 only the clock moves."""
    applied(machine, fastsm.put(b"a", b"", expires=9), fastsm.open_session(expires=1), fastsm.open_session(expires=2))
    assert applied(machine, fastsm.tick(20, limit=0)) == [Answer(True, 0)]
    assert (machine.clock(), machine.next_deadline(), machine.len()) == (20, 1, 1)
    assert applied(machine, fastsm.tick(3, limit=2)) == [Answer(True, 2)]
    assert (machine.clock(), machine.next_deadline(), machine.len()) == (20, 2, 0)
    assert applied(machine, fastsm.once(3, 1, fastsm.noop()), fastsm.tick(0), fastsm.once(3, 2, fastsm.noop())) == [
        True, Answer(True, 1), Answer(False, None, "no session")]


def test_an_overwrite_without_a_deadline_removes_it(machine: FastStateMachine) -> None:
    """The key stays, whatever its earlier deadline was; even if a touch had removed it."""
    applied(machine, *(fastsm.put(key, b"1", expires=5) for key in (b"a", b"b", b"c")))
    applied(machine, fastsm.put(b"a", b"2"), fastsm.touch(b"b", None), fastsm.compare_and_swap(b"c", b"1", b"2"))
    assert applied(machine, fastsm.tick(100)) == [Answer(True, 0)]
    assert machine.len() == 3


# ---- cost ------------------------------------------------------------------------------------------------

def test_a_touch_costs_the_same_for_any_value(machine: FastStateMachine) -> None:
    """A touch does not write the value again."""
    grown = []
    for size in (10, 1 << 20):
        applied(machine, fastsm.put(b"key", bytes(size), expires=1))
        before = machine.stats().log_bytes
        applied(machine, fastsm.touch(b"key", 2))
        grown.append(machine.stats().log_bytes - before)
        assert machine.get(b"key") == bytes(size)
    assert grown[0] == grown[1] < 128


def test_overwrites_with_new_deadlines_do_not_grow_memory(machine: FastStateMachine) -> None:
    """For a key, a touched key and a session, overtaken deadlines are removed."""
    applied(machine, fastsm.open_session(expires=1))
    for i in range(60):
        applied(machine, *(fastsm.put(b"key", b"", expires=100 * i + j) for j in range(50)))
        applied(machine, *(fastsm.touch(b"key", 100 * i + j) for j in range(50)))
        applied(machine, *(fastsm.once(1, 50 * i + j, fastsm.noop(), expires=100 * i + j) for j in range(1, 50)))
    live_keys, held_keys, live_sessions, held_sessions = inside(machine).deadlines()
    assert (live_keys, live_sessions) == (1, 1)
    assert held_keys < 100
    assert held_sessions < 100
    assert machine.next_deadline() == 5_949


def test_two_fifths_of_many_deadlines_may_be_stale(machine: FastStateMachine) -> None:
    """No more than that are stale, however often keys are overwritten, touched and deleted."""
    dice = random.Random(4)
    for _ in range(40):
        applied(machine, *(
            dice.choice((
                fastsm.put(key, b"", expires=dice.randrange(10**6)), fastsm.touch(key, dice.randrange(10**6)),
                fastsm.put(key, b""), fastsm.delete(key)))
            for key in (b"%d" % dice.randrange(3_000) for _ in range(500))))
        live, held, _, _ = inside(machine).deadlines()
        assert held - live <= max(64, 2 * held // 5 + 1)
    inside(machine).check()


@pytest.mark.parametrize("seed", range(4))
def test_large_ticks_leave_the_deadlines_in_order(machine: FastStateMachine, seed: int) -> None:
    """The many deadlines that a tick leaves overtaken are removed at once, whatever is next to and below them."""
    dice, model, now = random.Random(seed), MemoryStateMachine(), 0
    for _ in range(12):
        commands = [
            fastsm.put(
                b"%d" % dice.randrange(20_000), b"", expires=now + 1 + dice.randrange(dice.choice((5, 500, 10**9))))
            for _ in range(dice.choice((10, 1_000, 5_000)))]
        commands += [fastsm.open_session(expires=now + dice.randrange(1, 1_000)) for _ in range(dice.randrange(100))]
        now += dice.choice((1, 300, 1_000))
        commands.append(fastsm.tick(now, limit=dice.choice((None, None, 700))))
        assert applied(machine, *commands) == applied(model, *commands)
        assert applied(machine, fastsm.tick(now)) == applied(model, fastsm.tick(now))
        assert machine.next_deadline() == model.next_deadline()
        inside(machine).check()


def test_keys_without_a_deadline_cost_nothing(machine: FastStateMachine) -> None:
    """No record is longer, and nothing is kept in memory."""
    before = machine.stats().log_bytes
    applied(machine, fastsm.put(b"key", b"value"))
    assert machine.stats().log_bytes - before == 32 + 16 + 24
    assert inside(machine).deadlines() == (0, 0, 0, 0)


def test_a_range_in_a_procedure_looks_at_its_own_keys_alone(directory: Path, machine_at: Opener) -> None:
    """A short scan of many keys examines few of them, whatever the chunk has written."""
    @fastsm.procedure
    def pop(tx: Any, payload: bytes) -> Any:
        for key, value in tx.scan(prefix=payload, limit=1):
            tx.delete(key)
            tx.put(b"zz" + key, value)
            return key
        return None

    machine = machine_at(directory, procedures=[pop])
    applied(machine, *(fastsm.put(b"%05d" % i, b"v") for i in range(20_000)))
    assert applied(machine, fastsm.call("pop", b"1")) == [Answer(True, b"10000")]
    order = inside(machine).order()
    looks = order.looks
    assert applied(machine, *(fastsm.call("pop", b"1") for _ in range(100))) == [
        Answer(True, b"%05d" % (10_001 + i)) for i in range(100)]
    assert order.looks - looks < 100 * 300


# ---- readers meanwhile -----------------------------------------------------------------------------------

def test_a_reader_between_two_ticks_of_a_chunk_changes_nothing(directory: Path, machine_at: Opener) -> None:
    """A reader drops stale deadlines, and so moves others, while a procedure runs; the second tick is still right."""
    machines: list[Any] = []

    @fastsm.procedure
    def let_others_read(tx: Any, payload: bytes) -> int:
        reader = threading.Thread(target=machines[0].next_deadline)
        reader.start()
        reader.join()
        return tx.clock

    machines.append(machine_at(directory, procedures=[let_others_read]))
    model = MemoryStateMachine(procedures=[fastsm.procedure(name="let_others_read")(lambda tx, payload: tx.clock)])
    for each in (*machines, model):
        applied(each, *(fastsm.put(b"%d" % i, b"", expires=100 + i * 7 % 90) for i in range(90)))
        applied(each, *(fastsm.touch(b"%d" % i, 150 + i) for i in range(0, 60, 2)))
    chunk = [
        fastsm.tick(130, limit=3), fastsm.call("let_others_read"), fastsm.tick(140, limit=9),
        fastsm.call("let_others_read"), fastsm.tick(190)]
    assert applied(machines[0], *chunk) == applied(model, *chunk)
    inside(machines[0]).check()
    assert state_of(machines[0]) == state_of(model)


def test_a_range_in_a_procedure_does_not_open_the_machine_to_it(directory: Path, machine_at: Opener) -> None:
    """After a scan through tx, a call of the machine on the procedure's thread is still refused."""
    machines: list[FastStateMachine] = []

    @fastsm.procedure
    def read_past_tx(tx: Any, payload: bytes) -> Any:
        seen = tx.scan()
        for call in (machines[0].clock, machines[0].next_deadline, lambda: machines[0].deadline(b"a")):
            with pytest.raises(fastsm.ProcedureError):
                call()
        return [key for key, _ in seen]

    machines.append(machine_at(directory, procedures=[read_past_tx]))
    applied(machines[0], fastsm.put(b"a", b""))
    assert applied(machines[0], fastsm.call("read_past_tx")) == [Answer(True, [b"a"])]


def test_a_tick_passes_an_overtaken_deadline_once(machine: FastStateMachine) -> None:
    """Prolonged leases leave overtaken deadlines: no later tick examines them, even without a reader."""
    applied(machine, *(fastsm.put(b"%03d" % i, b"", expires=100 + i) for i in range(200)))
    applied(machine, *(fastsm.open_session(expires=100 + i) for i in range(50)))
    applied(machine, *(fastsm.touch(b"%03d" % i, 1_000) for i in range(40)))
    applied(machine, *(fastsm.once(201 + i, 1, fastsm.noop(), expires=1_000) for i in range(20)))
    assert inside(machine).deadlines() == (200, 240, 50, 70)
    assert applied(machine, fastsm.tick(119)) == [Answer(True, 0)]
    assert inside(machine).deadlines() == (200, 200, 50, 50)
    assert applied(machine, fastsm.tick(120)) == [Answer(True, 1)]


def test_readers_next_to_a_long_tick_change_nothing(directory: Path, machine_at: Opener) -> None:
    """Readers run between its pieces, and drop stale deadlines, so that the tick has to find its place again."""
    machine, model = machine_at(directory), MemoryStateMachine()
    keys = [b"%05d" % i for i in range(10_000)]
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            machine.next_deadline()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for first in (0, 100_000):
            chunk = [
                fastsm.put_many(keys, [b""] * len(keys), expires=[first + i * 7 % 1_000 for i in range(len(keys))]),
                fastsm.put_many(keys[::5], [b""] * 2_000, expires=[first + 500] * 2_000)]
            ticks = [fastsm.put(b"03", b"", expires=first + 2), fastsm.tick(first + 600, limit=6_000),
                     fastsm.delete(b"00001"), fastsm.tick(first + 900), fastsm.delete_range(b"0", b"04"),
                     fastsm.add(b"n", 1), fastsm.tick(first + 2_000)]
            for commands in (chunk, ticks):
                assert applied(machine, *commands) == applied(model, *commands)
            inside(machine).check()
    finally:
        ended.set()
        reader.join()
    assert state_of(machine) == state_of(model)
    assert machine.state_checksum() == model.state_checksum()


DISTANT = [0, 1, 2**20, 2**23, 2**33, 10**12, 2**45, 2**62, 2**63 - 1]


@pytest.mark.parametrize("seed", range(6))
def test_deadlines_of_any_distance_go_in_their_order(
    directory: Path, seed: int, machine_at: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Milliseconds or millennia apart, before and after the first one: stored in few bits, removed in exact order."""
    monkeypatch.setattr(fastsm.core.generations, "SAVE_TABLE_ABOVE", 0)
    dice, machine, model = random.Random(seed), machine_at(directory), MemoryStateMachine()

    def some() -> int:
        return min(max(0, dice.choice(DISTANT) + dice.randrange(-3, 4) * dice.choice((1, 1, 100))), 2**63 - 1)

    now = 0
    for step in range(60):
        commands = [
            dice.choice((fastsm.put(key, b"", expires=some()), fastsm.touch(key, some())))
            for key in (b"%d" % dice.randrange(300) for _ in range(dice.choice((1, 10, 100))))]
        commands += [fastsm.open_session(expires=some()) for _ in range(dice.randrange(4))]
        if step % 7 == 6:
            now = max(now, some())
            commands.append(fastsm.tick(now, limit=dice.choice((None, 5, 50))))
        assert applied(machine, *commands) == applied(model, *commands)
        assert machine.next_deadline() == model.next_deadline()
        inside(machine).check()
        if step % 20 == 10:
            machine.close()
            machine = machine_at(directory)
            assert inside(machine).index.loaded
    while model.next_deadline() is not None:
        tick = fastsm.tick(2**63 - 1, limit=7)
        assert applied(machine, tick) == applied(model, tick)
        assert list(machine.items()) == model.items()
    assert machine.state_checksum() == model.state_checksum()


MEMORY = """
import sys, fastsm
def private():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous:")) * 1024
count = int(sys.argv[2])
machine = fastsm.FastStateMachine(sys.argv[1], auto_compact=False)
keys = [b"k%015d" % i for i in range(count)]
def each(make):
    first = machine.last_applied().index + 1
    for at in range(0, count, 1000):
        machine.apply([(first + i, 1, make(i)) for i in range(at, at + 1000)])
each(lambda i: fastsm.put(keys[i], b""))
before = private()
for round in range(1, 3):
    each(lambda i: fastsm.touch(keys[i], 10**12 * round + 1000 * (i * 7919 % count)))
print((private() - before) / count)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup")
@pytest.mark.skipif("FASTSM_SANITIZED" in os.environ, reason="a sanitizer keeps what was freed")
def test_a_key_that_was_touched_takes_little_memory(tmp_path: Path) -> None:
    """A deadline and the place of its touch take less than 32 bytes, including overwritten ones."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "state"), "300000"], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 32


# ---- snapshots that cannot be ------------------------------------------------------------------------------

PUT, SESSION, TOUCH = 1, 6, 8
TWICE: dict[str, tuple[list[bytes], dict[str, int]]] = {
    "a key": ([record(PUT, 1, b"k", b"1"), record(PUT, 2, b"k", b"2")], {"keys": 1}),
    "a session": ([record(SESSION, 1, bytes(8), bytes(16)), record(SESSION, 2, bytes(8), bytes(16))], {"sessions": 1}),
    "a touch": (
        [record(PUT, 1, b"k", b"1"), record(TOUCH, 2, b"k", b"", 5), record(TOUCH, 2, b"k", b"", 6)], {"keys": 1}),
    "a touch before the put": ([record(TOUCH, 1, b"k", b"", 5), record(PUT, 2, b"k", b"1")], {"keys": 1}),
    "a touch of no key": ([record(TOUCH, 2, b"k", b"", 5)], {}),
}


@pytest.mark.parametrize("what", TWICE)
def test_a_snapshot_with_a_record_too_many_is_not_installed(tmp_path: Path, what: str, machine_at: Opener) -> None:
    """A snapshot with a repeated record is refused, whatever counts its header has, and the old state stays."""
    records, numbers = TWICE[what]
    (tmp_path / "file").write_bytes(by_hand.snapshot(
        (2, 1), [by_hand.term_run(1, 2, 1)], records, **{"keys": 0, "sessions": 0, **numbers}))
    machine = machine_at(tmp_path / "state")
    applied(machine, fastsm.put(b"old", b"state"))
    for each in (machine, MemoryStateMachine()):
        with pytest.raises(fastsm.SnapshotError):
            each.install_snapshot(None, tmp_path / "file")
    assert list(machine.items()) == [(b"old", b"state")]
