"""FastStateMachine compared with its model: whatever is done to both, they agree.

One random walk serves all configurations: contiguous or not, sync="flush" or "apply", frames stored through
the mapping or written with pwrite, with or without saved tables and compaction by itself. A crash of the process is a
copy of the directory, taken without closing: everything applied must be in it, since the page cache outlives the
process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import fastsm
import fastsm.core.generations
from fastsm import Entry, LogId, MemoryStateMachine, SnapshotMetadata, SnapshotRangeError
from fastsm.disk.files import Directory
from support.faulty import PortableDirectory, crash_copy
from support.inside import inside

STEPS = 10_000
EXAMPLES, STEPS_EACH = 300, 50
RETAINED = 5  # entries
FILE = "snapshot.fsm"
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

KEYS = [b"", b"\x00", b"a", b"b", b"c", b"long" * 100]
keys = st.sampled_from(KEYS)
values = st.builds(
    lambda byte, size: bytes([byte]) * size,
    st.integers(0, 255),
    st.sampled_from([0, 1, 7, 8, 9, 100, 300, 300, 5 << 10]),
)
CURRENT_VALUE = object()  # replaced by what the key holds when the command is made
expectations = st.one_of(st.just(CURRENT_VALUE), st.none(), values)


def short(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The same, without a ``repr`` that holds all of it: one of these holds others."""
    return st.deferred(lambda: strategy)


# A deadline is so long after the clock of the model; None: none.
deadlines = st.one_of(st.none(), st.none(), st.integers(-3, 20), st.just(2**62))
limits = st.sampled_from([None, None, 0, 1, 3])
numbers = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)])
writes = short(st.one_of(
    st.tuples(st.just("put"), keys, values, deadlines),
    st.tuples(st.just("put"), keys, values, deadlines),
    st.tuples(st.just("delete"), keys),
    st.tuples(st.just("touch"), keys, deadlines),
    st.tuples(st.just("add"), st.sampled_from([b"n", b"c"]), numbers),
    st.tuples(st.just("delete_range"), keys, st.one_of(st.none(), keys)),
))
operations = short(st.one_of(
    writes,
    writes,
    st.tuples(st.just("swap"), keys, expectations, st.one_of(values, values, st.none()), deadlines),
    st.tuples(st.just("noop")),
))
conditions = st.tuples(st.sampled_from(["exists", "absent"]), keys)
branches = st.lists(st.one_of(writes, st.tuples(st.just("read"), keys)), max_size=3)
alone = short(st.one_of(
    operations,
    operations,
    st.tuples(st.just("batch"), st.lists(operations, max_size=5)),
    st.tuples(st.just("transaction"), st.lists(conditions, max_size=2), branches, branches),
    st.tuples(st.just("call"), keys),
))
session_numbers = st.integers(0, 3)  # so many sessions ago, of those that are known
commands = short(st.one_of(
    alone,
    alone,
    alone,
    st.tuples(st.just("config"), values),
    st.tuples(st.just("open_session"), deadlines),
    st.tuples(st.just("once"), session_numbers, st.integers(-1, 2), alone, deadlines),
    st.tuples(st.just("once"), session_numbers, st.integers(-1, 2), alone, deadlines),
    st.tuples(st.just("forget"), session_numbers),
    st.tuples(st.just("tick"), st.sampled_from([-5, 0, 1, 5, 30]), limits),
))
term_steps = st.sampled_from([0, 0, 0, 0, 1, 3])
index_steps = st.sampled_from([1, 1, 1, 2, 7])
reopenings = st.sampled_from(["none", "none", "close", "crash"])


@fastsm.procedure
def turn(tx: Any, payload: bytes) -> list[Any]:
    """Reads all that a procedure can, writes, and refuses where there is nothing."""
    found = [tx.clock, tx.deadline(payload), tx.count(), *[key for key, _ in tx.scan(limit=2, reverse=True)]]
    if not tx.touch(payload, tx.clock + 3):
        tx.delete_prefix(payload[:1] or b"?")
        raise fastsm.Abort(found)
    tx.put(b"turned", payload[:9], expires=tx.clock + len(payload))
    return found


KINDS = Counter[str]()


class Comparison(RuleBasedStateMachine):
    """The walk: ``fast`` and ``model``, and what of the model's state no frame carries yet."""

    configurations: ClassVar[Counter[tuple[bool, str, bool]]] = Counter()
    tally: ClassVar[Counter[str]] = Counter()

    @initialize(
        contiguous=st.booleans(), sync=st.sampled_from(["flush", "apply"]), portable=st.booleans(),
        tables=st.booleans(), by_itself=st.booleans(),
    )
    def begin(self, contiguous: bool, sync: str, portable: bool, tables: bool, by_itself: bool) -> None:
        self.configurations[contiguous, sync, portable] += 1
        self.contiguous = contiguous
        self.tables = tables
        self.options: dict[str, Any] = {
            "contiguous": contiguous,
            "sync": sync,
            "procedures": [turn],
            "retain_entries": RETAINED,
            "_files": PortableDirectory if portable else Directory,
        }
        if by_itself:
            self.options |= {"compact_ratio": 0, "compact_floor": 0}
        fastsm.core.generations.SAVE_TABLE_ABOVE = 0 if tables else 4 << 20
        self.snapshots: list[tuple[Path, SnapshotMetadata]] = []
        self.root = Path(tempfile.mkdtemp(prefix="fastsm-model-", dir=SCRATCH))
        self.lives = 0
        self.path = self.root / "0"
        self.fast = fastsm.FastStateMachine(self.path, **self.options)
        self.model = MemoryStateMachine(contiguous=contiguous, procedures=[turn])
        self.seen: list[LogId] = []
        self.pending = 0
        self.saved_metadata: SnapshotMetadata | None = None
        self.unsynced = False

    def teardown(self) -> None:
        if hasattr(self, "fast"):
            if self.fast.is_running():
                inside(self.fast).check()
            self.fast.close()
            del self.fast
            shutil.rmtree(self.root)

    # ---- what the rules are made of ------------------------------------------------------------------

    def step(self, name: str) -> None:
        self.tally[name] += 1

    def both(self, call: Any) -> Any:
        """Does the same to both: equal results, or errors of one type with one index."""
        outcomes = []
        for machine in (self.fast, self.model):
            try:
                outcomes.append((call(machine), None, None))
            except fastsm.FastsmError as error:
                outcomes.append((None, type(error), getattr(error, "index", None)))
        assert outcomes[0] == outcomes[1]
        return outcomes[0]

    def encode(self, command: tuple[Any, ...]) -> bytes:
        kind, *arguments = command
        KINDS[kind] += 1
        make = getattr(self, f"make_{kind}", None)
        return make(*arguments) if make else getattr(fastsm, kind)(*arguments)

    def expires(self, deadline: int | None) -> int | None:
        return None if deadline is None else max(0, self.model.clock() + deadline)

    def session(self, number: int) -> tuple[int, int]:
        """The id of a session, and the sequence of its last command; one that there is none of, else."""
        known = inside(self.model).state.sessions
        if number >= len(known):
            return 10**6, 1
        return (session := list(known)[-1 - number]), int.from_bytes(known[session][:8], "little")

    def make_batch(self, members: list[Any]) -> bytes:
        return fastsm.batch([self.encode(member) for member in members])

    def make_transaction(self, conditions: list[Any], *branches: list[Any]) -> bytes:
        return fastsm.transaction(*([self.encode(each) for each in part] for part in (conditions, *branches)))

    def make_swap(self, key: bytes, expected: Any, value: bytes | None, deadline: int | None = None) -> bytes:
        expected = self.model.get(key) if expected is CURRENT_VALUE else expected
        expires = None if value is None else self.expires(deadline)
        return fastsm.compare_and_swap(key, expected, value, expires=expires)

    def make_put(self, key: bytes, value: bytes, deadline: int | None = None) -> bytes:
        return fastsm.put(key, value, expires=self.expires(deadline))

    def make_touch(self, key: bytes, deadline: int | None) -> bytes:
        return fastsm.touch(key, self.expires(deadline))

    def make_call(self, payload: bytes) -> bytes:
        return fastsm.call("turn", payload)

    def make_open_session(self, deadline: int | None) -> bytes:
        return fastsm.open_session(expires=self.expires(deadline))

    def make_once(self, number: int, step: int, inner: Any, deadline: int | None) -> bytes:
        session, sequence = self.session(number)
        command = self.encode(inner)
        return fastsm.once(session, max(1, sequence + step), command, expires=self.expires(deadline))

    def make_forget(self, number: int) -> bytes:
        return fastsm.forget(self.session(number)[0])

    def make_tick(self, step: int, limit: int | None) -> bytes:
        return fastsm.tick(max(0, self.model.clock() + step), limit=limit)

    def follow(self, log_id: LogId, index_step: int, term_step: int) -> LogId:
        return LogId(log_id.index + (1 if self.contiguous else index_step), log_id.term + term_step)

    def carried(self, *, metadata: bool = False, synced: bool = False) -> None:
        """A frame was written: nothing is pending any more."""
        self.pending = 0
        if metadata:
            self.saved_metadata = self.model.snapshot_metadata()
        if synced:
            assert self.fast.durable() == self.fast.last_applied()

    def compacted(self, generation: int) -> None:
        """Waits for a compaction by itself. The step to a next generation carries everything, too."""
        while "compact_floor" in self.options and inside(self.fast).is_called_for():
            time.sleep(0.0002)
        if self.fast.stats().generation != generation:
            self.step("compacted")
            self.carried(metadata=True, synced=True)

    def reopen(self, way: str) -> None:
        if way == "close":
            self.reopen_closed(False)
        elif way == "crash":
            self.reopen_crashed(False)

    # ---- rules ---------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.is_running())
    @rule(entries=st.lists(st.tuples(commands, index_steps, term_steps), min_size=1, max_size=12))
    def apply(self, entries: list[Any]) -> None:
        self.step("apply")
        self.apply_behind([], entries)

    @precondition(lambda self: self.model.is_running())
    @rule(key=keys, expected=expectations, value=values, between=st.lists(operations, max_size=3))
    def apply_swaps(self, key: bytes, expected: Any, value: bytes, between: list[Any]) -> None:
        """Compare-and-swaps that depend on what the chunk did before them."""
        self.step("apply_swaps")
        puts = [("put", key, value), *between]
        swaps = [("swap", key, value, None), ("swap", key, None, value), ("swap", key, expected, value)]
        chunk = [*puts, ("batch", [*between, *swaps]), *swaps]
        self.apply_behind([], [(command, 1, 0) for command in chunk])

    @precondition(lambda self: self.model.is_running())
    @rule(
        entries=st.lists(st.tuples(commands, index_steps, term_steps), max_size=3),
        replayed=st.integers(1, 5),
    )
    def apply_replayed(self, entries: list[Any], replayed: int) -> None:
        """What is replayed before a chunk is not looked at, so that it may be garbage."""
        self.step("apply_replayed")
        self.apply_behind(self.seen[-replayed:], entries)

    def apply_behind(self, again: list[LogId], entries: list[Any]) -> None:
        chunk = [Entry(*log_id, b"not looked at") for log_id in again]
        last = self.model.last_applied()
        for command, index_step, term_step in entries:
            last = self.follow(last, index_step, term_step)
            chunk.append(Entry(*last, self.encode(command)))
        generation = self.fast.stats().generation
        results, _, _ = self.both(lambda machine: machine.apply(chunk))
        assert results[: len(again)] == [None] * len(again)
        self.seen += [LogId(index, term) for index, term, _ in chunk[len(again) :]]
        if entries:
            self.carried(synced=self.options["sync"] == "apply")
        self.compacted(generation)

    @precondition(lambda self: self.model.is_running())
    @rule(key=keys, byte=st.integers(0, 255), size=st.sampled_from([65 << 10, 200 << 10]))
    def apply_large(self, key: bytes, byte: int, size: int) -> None:
        """A value that no window of populated pages holds."""
        self.step("apply_large")
        generation = self.fast.stats().generation
        last = self.follow(self.model.last_applied(), 1, 0)
        self.both(lambda machine: machine.apply([Entry(*last, fastsm.put(key, bytes([byte]) * size))]))
        self.seen.append(last)
        self.carried(synced=self.options["sync"] == "apply")
        self.compacted(generation)

    @precondition(lambda self: self.model.is_running())
    @rule(
        wrong=st.sampled_from(
            ["gap", "falling term", "known term", "twice", "malformed", "unknown", "cut", "nested", "no tuple"]
        ),
        before=st.lists(commands, max_size=3),
        replayed=st.booleans(),
    )
    def apply_wrong(self, wrong: str, before: list[Any], replayed: bool) -> None:
        """A chunk with one thing wrong, after good entries: nothing of it is applied."""
        self.step("apply_wrong")
        last = self.model.last_applied()
        chunk: list[Any] = [Entry(*log_id, b"") for log_id in self.seen[-2:]] if replayed else []
        for command in before:
            last = self.follow(last, 1, 0)
            chunk.append(Entry(*last, self.encode(command)))
        index, term = last
        chunk += {
            "gap": [Entry(index + 2, term, fastsm.noop())],
            "falling term": [Entry(index + 1, term - 1, fastsm.noop())],
            "known term": [Entry(index, term + 1, fastsm.noop())],
            "twice": [Entry(index + 1, term, fastsm.noop())] * 2,
            "malformed": [Entry(index + 1, term, b"")],
            "unknown": [Entry(index + 1, term, b"\x00\xff" + bytes(6))],
            "cut": [Entry(index + 1, term, fastsm.put(b"key", b"value")[:-1])],
            "nested": [Entry(index + 1, term, fastsm.batch([])[:4] + b"\x01\0\0\0" + fastsm.batch([]))],
            "no tuple": [[index + 1, term, fastsm.noop()]],
        }[wrong]
        if (wrong == "gap" and not self.contiguous) or (wrong == "known term" and not index):
            return  # nothing is wrong with it
        applied = self.model.last_applied()
        if wrong == "no tuple":
            for machine in (self.fast, self.model):
                with pytest.raises(TypeError):
                    machine.apply(chunk)
        else:
            _, error, _ = self.both(lambda machine: machine.apply(chunk))
            assert error is not None
        assert self.fast.last_applied() == applied

    @precondition(lambda self: self.model.is_running())
    @rule(index_step=st.sampled_from([-1, 0, 0, 1, 1, 5]), term_step=st.sampled_from([-1, 0, 0, 0, 1]))
    def update_last_applied(self, index_step: int, term_step: int) -> None:
        """An id without a command, forward, equal or back."""
        self.step("update_last_applied")
        before = self.model.last_applied()
        log_id = (before.index + index_step, before.term + term_step)
        self.both(lambda machine: machine.update_last_applied(log_id))
        if self.model.last_applied() != before:
            self.seen.append(self.model.last_applied())
            self.pending += 1

    @rule()
    def flush(self) -> None:
        self.step("flush")
        self.both(lambda machine: machine.flush())
        self.carried(synced=True)

    @rule()
    def save_hard_state(self) -> None:
        self.step("save_hard_state")
        self.both(lambda machine: machine.save_hard_state())
        self.carried(metadata=True, synced=True)

    @precondition(lambda self: self.model.is_running())
    @rule(checksum=st.binary(min_size=32, max_size=32), persist=st.booleans())
    def note_snapshot(self, checksum: bytes, persist: bool) -> None:
        self.step("note_snapshot")
        metadata = SnapshotMetadata(self.model.last_applied(), checksum)
        if persist:
            self.both(lambda machine: machine.persist_last_snapshot_metadata(metadata))
            self.carried(metadata=True, synced=True)
        else:
            self.both(lambda machine: machine.update_last_snapshot_metadata(metadata))

    @precondition(lambda self: len(self.seen) > 15 or not self.model.is_running())
    @rule()
    def stop_or_start(self) -> None:
        self.step("stop_or_start")
        if self.model.is_running():
            self.both(lambda machine: machine.stop())
            self.carried(metadata=True, synced=True)
            for call in (lambda machine: machine.get(b""), lambda machine: machine.apply([])):
                _, error, _ = self.both(call)
                assert error is fastsm.NotRunningError
        else:
            self.both(lambda machine: machine.start())

    @precondition(lambda self: self.model.is_running())
    @rule(
        back=st.integers(0, 12), index_step=st.sampled_from([0, 0, 0, -1, 1]),
        term_step=st.sampled_from([0, 0, 0, -1, 1]), attachment=st.sampled_from([b"", b"raft's"]), then=reopenings,
    )
    def write_snapshot(self, back: int, index_step: int, term_step: int, attachment: bytes, then: str) -> None:
        """As of an entry, a made-up id between two, one in front of the base or after last applied: equal files."""
        self.step("write_snapshot")
        index, term = self.seen[-back] if 0 < back <= len(self.seen) else self.model.last_applied()
        log_id = LogId(max(0, index + index_step), max(0, term + term_step))
        base = self.fast.stats().base
        files = [self.root / name / str(self.tally.total()) for name in ("fast", "model")]
        if log_id.index < base.index:
            with pytest.raises(SnapshotRangeError):
                self.fast.write_snapshot(files[0], log_id)
            return
        machines = dict(zip((self.fast, self.model), files, strict=True))
        metadata, error, _ = self.both(
            lambda machine: machine.write_snapshot(machines[machine], log_id, attachment=attachment))
        assert error in (None, SnapshotRangeError)
        if error is None:
            assert (files[0] / FILE).read_bytes() == (files[1] / FILE).read_bytes()
            self.snapshots.append((files[0], metadata))
            self.carried(metadata=True, synced=True)
        self.reopen(then)

    @precondition(lambda self: self.model.is_running() and self.snapshots)
    @rule(
        number=st.integers(0, 99), announced=st.booleans(), allow_older=st.sampled_from([True, True, False]),
        then=reopenings,
        more=st.lists(st.tuples(commands, st.integers(1, 3), term_steps), max_size=8),
    )
    def install(self, number: int, announced: bool, allow_older: bool, then: str, more: list[Any]) -> None:
        """A snapshot of this history or of one before a reset, or of a machine that went on from there."""
        self.step("install")
        newest = self.snapshots[-3:]  # older ones mostly contradict what was applied since a reset
        path, metadata = newest[number % len(newest)]
        if more:
            other = MemoryStateMachine(contiguous=False, procedures=[turn])
            other.install_snapshot(None, path)
            for command, index_step, term_step in more:
                index, term = other.last_applied()
                other.apply([Entry(index + index_step, term + term_step, self.encode(command))])
            path = self.root / "other"
            metadata = other.write_snapshot(path)
        _, error, _ = self.both(
            lambda machine: machine.install_snapshot(metadata if announced else None, path, allow_older=allow_older))
        if error is None:
            self.step("installed")
            self.seen = list(inside(self.model).state.seen)
            self.carried(metadata=True, synced=True)
        else:
            assert error in (fastsm.StaleSnapshotError, fastsm.OrderError)
        self.reopen(then)

    @precondition(lambda self: self.model.is_running())
    @rule(share=st.floats(0, 1), default=st.booleans(), then=reopenings)
    def compact(self, share: float, default: bool, then: str) -> None:
        """Up to any entry after the base: nothing of the state changes."""
        self.step("compact")
        before = self.fast.stats()
        up_to = before.base.index + round(share * (before.last_applied.index - before.base.index))
        if default:
            up_to = max(before.base.index, before.last_applied.index - RETAINED)
        self.fast.compact(None if default else up_to)
        assert before.base.index <= self.fast.stats().base.index <= up_to
        self.compacted(before.generation)
        self.reopen(then)

    @rule(expect=st.booleans())
    def close_and_reopen(self, expect: bool) -> None:
        self.reopen_closed(expect)

    def reopen_closed(self, expect: bool) -> None:
        self.step("close_and_reopen")
        self.fast.close()
        expected = self.model.last_applied() if expect else None
        self.fast = fastsm.FastStateMachine(self.path, expect_applied=expected, **self.options)
        self.model.start()
        self.carried(metadata=True, synced=True)
        assert self.fast.stats().recovery.clean
        if inside(self.fast).index.loaded:
            self.step("opened by a table")

    @rule(expect=st.booleans())
    def crash_and_reopen(self, expect: bool) -> None:
        """What no frame carries is gone, nothing else."""
        self.reopen_crashed(expect)

    def reopen_crashed(self, expect: bool) -> None:
        self.step("crash_and_reopen")
        durable = self.fast.durable()
        before = self.path
        self.lives += 1
        self.path = crash_copy(before, self.root / str(self.lives))
        self.fast.close()
        shutil.rmtree(before)
        self.fast = fastsm.FastStateMachine(self.path, expect_applied=durable if expect else None, **self.options)
        if self.pending:
            del inside(self.model).state.seen[-self.pending :]
            del self.seen[-self.pending :]
            self.pending = 0
        self.model.start()
        inside(self.model).metadata = self.saved_metadata

    @precondition(lambda self: len(self.seen) > 20)
    @rule()
    def clear(self) -> None:
        self.step("clear")
        self.both(lambda machine: machine.clear())
        self.seen.clear()
        self.carried(metadata=True, synced=True)

    # ---- what holds after each -----------------------------------------------------------------------

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "fast"):
            return
        fast, model = self.fast, self.model
        assert fast.is_running() == model.is_running()
        assert fast.last_applied() == model.last_applied()
        assert fast.len() == len(fast) == model.len()
        assert fast.is_empty() == model.is_empty()
        assert fast.membership() == model.membership()
        assert fast.snapshot_metadata() == model.snapshot_metadata()
        assert fast.durable() <= fast.last_applied()
        last = model.last_applied().index
        for index in {0, 1, *range(max(0, last - 12), last + 2)}:
            assert fast.entry_term(index) == model.entry_term(index), f"entry_term({index})"
        if model.is_running():
            assert fast.get_many(KEYS) == [fast.get(key) for key in KEYS] == model.get_many(KEYS)
            assert [key in fast for key in KEYS] == [model.get(key) is not None for key in KEYS]
            assert [fast.modified(key) for key in KEYS] == [model.modified(key) for key in KEYS]
            assert list(fast.items()) == model.items()
            assert list(fast.keys()) == [key for key, _ in model.items()]
            assert (fast.clock(), fast.next_deadline()) == (model.clock(), model.next_deadline())
            assert [fast.deadline(key) for key in KEYS] == [model.deadline(key) for key in KEYS]


def test_machine_and_model_agree_over_ten_thousand_random_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, reads, errors and snapshots are the model's, through closes, crashes, resets, installs, compactions."""
    above = fastsm.core.generations.SAVE_TABLE_ABOVE
    monkeypatch.setattr(fastsm.core.generations, "SAVE_TABLE_ABOVE", above)  # put back at the end
    Comparison.configurations.clear()
    Comparison.tally.clear()
    run_state_machine_as_test(
        Comparison,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS_EACH,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(dict(Comparison.tally), dict(KINDS))
    assert min(KINDS.values()) >= STEPS // 100
    assert Comparison.tally.total() >= STEPS
    assert len(Comparison.configurations) == 8
    assert min(Comparison.tally.values()) >= STEPS // 400
