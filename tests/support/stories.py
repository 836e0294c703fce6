"""Random stories of a state machine: operations step by step, with the state that each must leave."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastsm
from fastsm import Entry, FastStateMachine, LogId, MemoryStateMachine, SnapshotMetadata
from support.histories import KEYS, History
from support.inside import inside

RHYTHMS = (0.02, 0.08, 0.5)  # the frequency of flushes: rare ones let the log store frames, frequent ones let it pwrite
LARGE = 70 << 10  # a value whose frame is written aside


class AnyChecksum:
    """A checksum that equals every other: that of a file which is not written yet."""

    def __eq__(self, other: object) -> bool:
        return True

    def __len__(self) -> int:
        return 32

    __hash__ = object.__hash__


class Source(NamedTuple):
    """How to make a snapshot to install: the steps of a machine that then writes one."""

    steps: tuple[tuple[str, Any], ...]
    allow_older: bool = False

    def write(self, path: Path, *, contiguous: bool) -> None:
        """Write the snapshot into a directory, if it is not there."""
        if path.exists():
            return
        path.mkdir()
        with FastStateMachine(path / "twin", contiguous=contiguous) as twin:
            for kind, argument in self.steps:
                twin.apply(argument) if kind == "apply" else twin.update_last_applied(argument)
            twin.write_snapshot(path)


class Operation(NamedTuple):
    """One call, and the position of the story after it."""

    kind: str
    argument: Any
    position: int


class State(NamedTuple):
    """Everything that can be read of a state."""

    applied: LogId
    length: int
    values: list[bytes | None]
    membership: tuple[LogId, bytes] | None
    metadata: SnapshotMetadata | None
    terms: bytes


class Story:
    """A seeded sequence of steps, each a few operations, and the states at all positions.

    A position is a state that may be found after a crash. A step can be repeated from its start by a machine that has
    done a part of it.
    """

    def __init__(self, seed: int, length: int = 36) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.contiguous = self.random.random() < 0.7
        self.sync = "apply" if self.random.random() < 0.15 else "flush"
        self.stores = False if self.random.random() < 0.25 else None
        self.rhythm = self.random.choice(RHYTHMS)
        self.large = self.random.random() < 0.15
        self.tables = self.random.random() < 0.4  # saved, however small
        self.ordered = random.Random(f"order {seed}").random() < 0.6  # keys are kept in order, and the order is saved
        self.steps: list[list[Operation]] = []
        self.states: list[State] = []
        self.epochs: list[int] = []  # for each position, the one of the last clear or install
        self.written: dict[int, LogId] = {}  # positions at which the metadata of a snapshot is recorded
        self._history = History(seed, contiguous=self.contiguous, large=False)
        self._model = MemoryStateMachine(contiguous=self.contiguous)
        self._ids: list[LogId] = []
        self._base = 0  # the index of the last compaction or install
        self._steps: list[tuple[str, Any]] = []  # from the empty state to this one, for twins
        self._lineage: list[tuple[int, int, MemoryStateMachine]] = []  # in this epoch: steps, ids, the model after them
        self._models: list[Any] = []
        self._note_position(epoch=0)
        while len(self.steps) < length:
            self.steps.append([])
            self._invent()
        self._finish_states()

    def __repr__(self) -> str:
        return (
            f"<Story of seed {self.seed}: contiguous={self.contiguous}, sync={self.sync!r}, "
            f"stores={self.stores}, rhythm={self.rhythm}>"
        )

    @property
    def last(self) -> int:
        """The last position."""
        return len(self.states) - 1

    def next_step(self, position: int) -> int:
        """Return the step to continue with from a position."""
        return next(
            (n for n, step in enumerate(self.steps) if step[-1].position > position), len(self.steps)
        )

    def position_of(self, log_id: LogId, upto: int) -> int:
        """Return the first position, since the last clear or install before `upto`, whose last entry is `log_id`."""
        position = self._when(log_id, upto)
        assert position is not None, f"{log_id} was never the last applied entry"
        return position

    def _when(self, log_id: LogId, upto: int) -> int | None:
        positions = range(self.epochs[upto], upto + 1)
        return next((position for position in positions if self.states[position].applied == log_id), None)

    def find(self, machine: fastsm.FastStateMachine, lower: int, upper: int) -> int | None:
        """Return the last position in [lower, upper] whose state is the machine's, or None.

        An install may bring back the state of an earlier position: the durable entry distinguishes the two.
        """
        found, durable = self.read(machine), machine.durable()
        for position in range(upper, lower - 1, -1):
            if self.states[position] == found and (durable == LogId() or self._when(durable, position) is not None):
                return position
        return None

    def read(self, machine: fastsm.FastStateMachine) -> State:
        return State(
            machine.last_applied(),
            machine.len(),
            machine.get_many(KEYS),
            machine.membership(),
            machine.snapshot_metadata(),
            machine.entry_terms(self._all_ids).tobytes(),
        )

    @property
    def traits(self) -> list[str]:
        """The properties in which this story differs from others."""
        named = {
            "with gaps": not self.contiguous,
            'with sync="apply"': self.sync == "apply",
            "without stores": self.stores is False,
            "with saved tables": self.tables,
            "in order": self.ordered,
            "with saved orders": self.tables and self.ordered,
            "with frames over 64 KiB": any(len(value or b"") == LARGE for s in self.states for value in s.values),
            "with rare flushes": self.rhythm == RHYTHMS[0],
            "with frequent flushes": self.rhythm == RHYTHMS[-1],
        }
        return [name for name, there in named.items() if there]

    # ---- inventing -------------------------------------------------------------------------------------

    def _invent(self) -> None:
        dice = self.random.random()
        if dice < self.rhythm:
            self._add("flush")
        elif dice < self.rhythm + (1 - self.rhythm) * 0.8:
            self._apply(self._chunk())
        else:
            self.random.choice(
                (
                    self._update, self._update, self._hard_state, self._hard_state, self._metadata_during_chunk,
                    self._clear, self._overlap, self._overlap, self._end, self._end, self._fail, self._fail,
                    self._snapshot, self._snapshot, self._compact, self._compact, self._install, self._install,
                )
            )()  # fmt: skip

    def _add(self, kind: str, argument: Any = None, *, moves: bool = False) -> None:
        if moves:
            self._note_position()
        self.steps[-1].append(Operation(kind, argument, len(self._models) - 1))

    def _note_position(self, epoch: int | None = None) -> None:
        model = self._model
        self.epochs.append(self.epochs[-1] if epoch is None else epoch)
        self._models.append(
            (
                model.last_applied(), model.len(), model.get_many(KEYS), model.membership(),
                model.snapshot_metadata(), [tuple(seen) for seen in inside(model).state.seen],
            )
        )  # fmt: skip

    def _chunk(self) -> list[Entry]:
        history, dice = self._history, self.random.random()
        if dice < 0.75:
            return history.chunk()
        if dice < 0.82:  # nothing of it takes effect
            return self._entries(fastsm.compare_and_swap(b"key-1", b"no such value", b"x"), 3)
        if dice < 0.87:
            return self._entries(fastsm.noop(), self.random.choice((1, 4)))
        if dice < 0.94:  # at the border of two terms
            history.last = LogId(history.last.index, history.last.term + self.random.choice((1, 2)))
            return self._entries(fastsm.config(history.value()), 1) + history.chunk(2)
        size = LARGE if self.large else 9000
        self.large = False
        return self._entries(fastsm.put(b"key-0", self.random.randbytes(size)), 1)

    def _entries(self, command: bytes, count: int) -> list[Entry]:
        return [self._history.entry()._replace(command=command) for _ in range(count)]

    def _apply(self, chunk: list[Entry], kind: str = "apply") -> None:
        self._model.apply(chunk)
        self._ids.append(LogId(chunk[-1].index, chunk[-1].term))
        self._add(kind, chunk, moves=True)
        self._remember("apply", chunk)

    def _update(self) -> None:
        last = self._history.last
        log_id = LogId(last.index + self.random.choice((1, 1, 4)), last.term + self.random.choice((0, 0, 1)))
        log_id = log_id._replace(term=max(1, log_id.term))
        self._history.last = log_id
        self._model.update_last_applied(log_id)
        self._ids.append(log_id)
        self._add("update", log_id, moves=True)
        self._remember("update", log_id)
        if self.random.random() < 0.3:
            self._add("save")

    def _metadata(self) -> SnapshotMetadata | None:
        if not self._ids:
            return None
        return SnapshotMetadata(self.random.choice(self._ids[-5:]), self.random.randbytes(32))

    def _hard_state(self) -> None:
        metadata = self._metadata()
        if metadata is not None:
            self._add("note", metadata)
            self._model.update_last_snapshot_metadata(metadata)
        self._add("save", moves=metadata is not None)

    def _metadata_during_chunk(self) -> None:
        """Add metadata and a chunk. The chunk is written first, so a crash may leave it without the metadata."""
        metadata = self._metadata()
        if metadata is not None:
            self._add("note", metadata)
        self._apply(self._history.chunk(2))
        if metadata is not None:
            self._model.update_last_snapshot_metadata(metadata)
        self._add("save", moves=metadata is not None)

    def _clear(self) -> None:
        self._model.clear()
        self._history.last = LogId()
        self._ids.clear()
        self._base = 0
        self._steps.clear()
        self._lineage.clear()
        self._note_position(epoch=len(self._models))
        self._add("clear")

    # ---- snapshots ---------------------------------------------------------------------------------------

    def _remember(self, kind: str, argument: Any) -> None:
        self._steps.append((kind, argument))
        self._lineage.append((len(self._steps), len(self._ids), copy.deepcopy(self._model)))

    def _seen(self) -> list[LogId]:
        """Return the entries that a snapshot, or the next base, may be as of."""
        return [log_id for log_id in inside(self._model).state.seen if log_id.index >= self._base]

    def _snapshot(self) -> None:
        """Add a snapshot. Its metadata is recorded if it is newer than the known one; its checksum may be any."""
        seen = self._seen()
        if not seen:
            self._add("save")
            return
        log_id = self.random.choice((*self.random.choices(seen, k=3), seen[-1], seen[-1]))
        known = self._model.snapshot_metadata()
        newer = known is None or known.last_included < log_id
        if newer:
            inside(self._model).metadata = SnapshotMetadata(log_id, AnyChecksum())  # type: ignore[arg-type]
            self.written[len(self._models)] = log_id
        self._add("snapshot", (log_id, self.random.choice(("none", "none", "zstd"))), moves=newer)

    def _compact(self) -> None:
        """Add a compaction: another base, the same state."""
        seen = self._seen()
        self._base = self.random.choice(seen).index if seen else self._base
        self._add("compact", self._base)

    def _install(self) -> None:
        """Add an install of an earlier state, which is remembered, or of one that another machine reached."""
        older = self.random.random() < 0.5
        if older and self._lineage:
            steps, ids, model = self.random.choice(self._lineage[-8:])
            self._steps, self._ids, self._model = self._steps[:steps], self._ids[:ids], copy.deepcopy(model)
        else:
            for _ in range(self.random.choice((1, 3))):
                chunk = self._history.chunk()
                self._model.apply(chunk)
                self._steps.append(("apply", chunk))
                self._ids.append(LogId(chunk[-1].index, chunk[-1].term))
        applied = self._history.last = self._model.last_applied()
        self._base = applied.index
        inside(self._model).metadata = SnapshotMetadata(applied, AnyChecksum())  # type: ignore[arg-type]
        self._note_position(epoch=len(self._models))
        self._add("install", Source(tuple(self._steps), older))
        self._lineage = [(len(self._steps), len(self._ids), copy.deepcopy(self._model))]

    def _overlap(self) -> None:
        """Add a chunk that is applied during a sync, which need not cover it."""
        self._apply(self._history.chunk(1))
        self._apply(self._history.chunk(), "overlap")

    def _end(self) -> None:
        self._add(self.random.choice(("close", "close", "kill", "stop")))

    def _fail(self) -> None:
        """Add a failure of the next sync, whatever it is for."""
        self._add("fail")
        self._apply(self._history.chunk())
        if self.sync == "flush":
            self._add(self.random.choice(("flush", "flush", "save", "close", "stop")))

    def _finish_states(self) -> None:
        stop = max(model[0].index for model in self._models) + 3
        self._all_ids = np.arange(stop, dtype=np.uint64)
        for *rest, seen in self._models:
            self.states.append(State(*rest, terms_of(seen, stop).tobytes()))
        del self._models, self._model, self._history


def terms_of(seen: list[tuple[int, int]], stop: int) -> np.ndarray[Any, Any]:
    """Return the term of each index below `stop` that was seen, or is between two seen ones of one term; else 0."""
    terms = np.zeros(stop, np.uint64)
    before = (0, None)
    for index, term in seen:
        terms[before[0] + 1 if term == before[1] else index : index + 1] = term
        before = (index, term)
    return terms
