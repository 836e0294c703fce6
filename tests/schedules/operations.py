"""The operations of a state machine for schedules: their effect on the model, and what must hold in the end."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import blake3
import numpy as np
from schedules.explorer import Schedule, Step, TellsOnce, Watched, between_pieces

import fastsm
from fastsm import (
    CompactedError,
    FastsmError,
    FastStateMachine,
    LogId,
    MemoryStateMachine,
    NotRunningError,
    Reader,
    SnapshotError,
    SnapshotRangeError,
    StorageError,
)
from support.inside import inside

OPTIONS: dict[str, Any] = {"auto_compact": False, "verify_on_open": "full", "retain_entries": 0, "ordered": True}
APPLIED = 10  # entries of the template, 4 of them in its base
KEYS = [b"key-0", b"key-1", b"key-2", b"nothing", b"new"]
Machine = Any


class Operation(NamedTuple):
    """``run(machine, root)`` runs it on the machine, ``model(machine, root)`` on the model, if that differs."""

    run: Callable[[Machine, Path], Any]
    model: Callable[[Machine, Path], Any] | None = None
    replaces: bool = False  # it ends snapshots and compactions
    ends: bool = False      # others may then find the machine stopped
    compacts: bool = False
    is_ended: bool = False  # resets and installs end it
    sees_files: bool = False  # it sees only what is in frames


def entries(first: int, last: int, term: int = 1) -> list[tuple[int, int, bytes]]:
    return [
        (index, term, fastsm.config(b"members %d" % index) if index % 5 == 0
         else fastsm.put(b"key-%d" % (index % 3), b"%d of %d" % (index, term)))
        for index in range(first, last + 1)
    ]


def apply(machine: Machine, root: Path) -> Any:
    return machine.apply([
        (APPLIED + 1, 2, fastsm.put(b"key-0", b"newer")), (APPLIED + 2, 2, fastsm.put(b"new", b"1")),
        (APPLIED + 3, 2, fastsm.delete(b"key-1")), (APPLIED + 4, 2, fastsm.config(b"newer members"))])


def snapshot(machine: Machine, root: Path, last: tuple[int, int] | None = None) -> Any:
    return machine.write_snapshot(root / f"{type(machine).__name__}-{last}", last and LogId(*last))


def snapshot_in_coroutine(machine: Machine, root: Path) -> Any:
    # `asyncio.run` would take most of the schedule's time; the coroutine is the same without it.
    directory = root / f"{type(machine).__name__}-coroutine"
    return run_alone(machine.generate_snapshot_data(directory, machine.last_applied()))


def run_alone(coroutine: Any) -> Any:
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def restart(machine: Machine, root: Path) -> None:
    machine.stop()
    machine.start()


def read_only(machine: Machine, root: Path) -> Any:
    with FastStateMachine(root / "state", read_only=True, **OPTIONS) as other:
        return other.last_applied(), list(other.items())


def statistics(machine: Machine, root: Path) -> Any:
    stats = machine.stats()
    return stats.keys, stats.last_applied


def nothing(machine: Machine, root: Path) -> None:
    inside(machine).require()


def nothing_at_all(machine: Machine, root: Path) -> None:
    pass


def close_model(machine: Machine, root: Path) -> None:
    inside(machine).running = False


def watch(machine: Machine, root: Path) -> Any:
    watch = machine.watch(start=9)
    told = watch.read(1, timeout=0)
    if isinstance(machine, FastStateMachine):
        machine.verify()  # another operation may run here
    return told + watch.read(timeout=0)


def scan_anew(machine: Machine, root: Path) -> Any:
    """Scan after building the order in pieces, between which another operation may run."""
    inside(machine).require()
    inside(machine).order().forget()
    inside(machine).order_next(inside(machine).index, inside(machine).log.mapping, between_pieces)
    return machine.scan()


# ---- readers of the directory ----------------------------------------------------------------------------

STANDING: dict[Path, Reader] = {}  # by the template's root, a reader opened before the schedule


def shown(machine: Machine, root: Path) -> Any:
    """Return what a reader shows: last applied and all pairs. The model's shows it even when stopped."""
    if isinstance(machine, MemoryStateMachine):
        return machine.last_applied(), list(inside(machine).state.values.items())
    return machine.last_applied(), list(machine.items())


def open_reader(machine: Machine, root: Path) -> Any:
    with Reader(root / "state") as reader:
        return shown(reader, root)


def refresh(machine: Machine, root: Path) -> Any:
    """Refresh while the next slot is partly stored, as by an owner in the middle of a publication."""
    reader = STANDING[root]
    tear(root / "state")
    reader.refresh()
    return shown(reader, root)


def tear(state: Path) -> None:
    """Store the fields of an invalid next publication, except for its number, which would come last."""
    slots = np.memmap(state / "PUBLISHED", np.uint64, "r+", 64, (2, 8))
    older = slots[int(slots[1][0] < slots[0][0])]
    older[1:7] = slots[int(slots[1][0] > slots[0][0])][1:7] + np.uint64(8)


def membership(machine: Machine, root: Path) -> Any:
    return machine.membership()


def view(machine: Machine, root: Path) -> Any:
    value = machine.get_view(b"key-0")
    return value and bytes(value)


OPERATIONS = {
    "apply": Operation(apply),
    "update_last_applied": Operation(lambda machine, root: machine.update_last_applied(LogId(APPLIED + 2, 2))),
    "flush": Operation(lambda machine, root: machine.flush()),
    "save_hard_state": Operation(lambda machine, root: machine.save_hard_state()),
    "snapshot": Operation(snapshot, is_ended=True),
    "snapshot, older": Operation(partial(snapshot, last=(8, 1)), is_ended=True),
    "snapshot, coroutine": Operation(snapshot_in_coroutine, is_ended=True),
    "compact": Operation(lambda machine, root: machine.compact(8), nothing, compacts=True, is_ended=True),
    "compact by itself": Operation(
        lambda machine, root: inside(machine).compact_by_itself(), nothing_at_all, compacts=True, is_ended=True),
    "install": Operation(lambda machine, root: machine.install_snapshot(None, root / "other"), replaces=True),
    "reset": Operation(lambda machine, root: machine.clear(), replaces=True),
    "verify": Operation(lambda machine, root: machine.verify(), nothing),
    "stop, start": Operation(restart, ends=True),
    "close": Operation(lambda machine, root: machine.close(), close_model, replaces=True, ends=True),
    "open read-only": Operation(
        read_only, lambda machine, root: (machine.last_applied(), list(inside(machine).state.values.items())),
        sees_files=True),
    "open reader": Operation(open_reader, shown),
    "refresh": Operation(refresh, shown),
    "watch": Operation(watch, is_ended=True),
    "get_many": Operation(lambda machine, root: machine.get_many(KEYS)),
    "scan": Operation(
        lambda machine, root: machine.scan_prefix(b"key"),
        lambda machine, root: fastsm.ScanResult(
            sorted(pair for pair in machine.items() if pair[0].startswith(b"key")), machine.last_applied().index)),
    "scan, order built": Operation(scan_anew, lambda machine, root: machine.scan()),
    "ordered": Operation(lambda machine, root: list(machine.ordered(b"key-1", reverse=True))),
    "count": Operation(lambda machine, root: machine.count(b"key-1")),
    "items": Operation(lambda machine, root: list(machine.items())),
    "membership": Operation(membership),
    "stats": Operation(statistics, lambda machine, root: (machine.len(), machine.last_applied())),
    "state checksum": Operation(lambda machine, root: machine.state_checksum(), is_ended=True),
    "get_view": Operation(view, lambda machine, root: machine.get(b"key-0")),
}  # fmt: skip

SNAPSHOTS = {  # the directory of each snapshot
    "snapshot": "FastStateMachine-None", "snapshot, older": "FastStateMachine-(8, 1)",
    "snapshot, coroutine": "FastStateMachine-coroutine"}
READS = (  # they change nothing, so they run one after another
    "get_many", "scan", "ordered", "count", "items", "membership", "stats", "state checksum", "get_view")
READ_ALL = "all reads"
OPERATIONS_AND_READS = OPERATIONS | {
    READ_ALL: Operation(
        lambda machine, root: [OPERATIONS[name].run(machine, root) for name in READS],
        lambda machine, root: [(OPERATIONS[name].model or OPERATIONS[name].run)(machine, root) for name in READS])}
SECONDS = [name for name in OPERATIONS_AND_READS if name not in READS]  # each other operation, and all reads together


# ---- the state to begin with -----------------------------------------------------------------------------

class Numbers:
    """Stands in for ``os.urandom``: other bytes at each call, the same in each schedule, so that files are equal."""

    count = 0

    def __call__(self, size: int) -> bytes:
        self.count += 1
        return blake3.blake3(b"%d" % self.count).digest(length=size)


NUMBERS = Numbers()


class Template:
    """The directory that schedules begin with: a base and a log, another replica's snapshot, and the equal model."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = MemoryStateMachine()
        with FastStateMachine(root / "template", **OPTIONS) as machine:
            for one in (machine, self.model):
                one.apply(entries(1, 4))
            machine.compact()
            for one, entry in itertools.product((machine, self.model), entries(5, APPLIED)):
                one.apply([entry])  # one chunk per entry, so that compaction has something to do
        self.files = {path.name: path.read_bytes() for path in (root / "template").iterdir()}
        self.found: dict[bytes, Any] = {}  # by the digest of the files
        (root / "state").mkdir(mode=0o700)
        other = MemoryStateMachine()
        other.apply([*entries(1, APPLIED), (11, 3, fastsm.put(b"key-0", b"theirs")), (12, 3, fastsm.delete(b"key-2"))])
        other.write_snapshot(root / "other")

    def fresh(self) -> FastStateMachine:
        self.fill_state()
        NUMBERS.count = 0
        return FastStateMachine(self.root / "state", _files=Watched, **OPTIONS)

    def fill_state(self) -> None:
        """Restore the state's directory to its beginning, and remove all snapshots."""
        for directory in SNAPSHOTS.values():
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(self.root / directory):
                    os.unlink(self.root / directory / name)
        state = self.root / "state"
        for name in os.listdir(state):
            os.unlink(state / name)
        for name, content in self.files.items():
            (state / name).write_bytes(content)

    def reopened(self) -> Any:
        """Return what an opening finds in the state's directory; equal files, which are frequent, are opened once."""
        digest = blake3.blake3()
        for path in sorted((self.root / "state").iterdir()):
            if path.name not in ("LOCK", "PUBLISHED"):
                digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
        key = digest.digest()
        if key not in self.found:
            with FastStateMachine(self.root / "state", **OPTIONS) as machine:
                inside(machine).check()
                self.found[key] = state_of(machine)
        return self.found[key]

    @cache  # noqa: B019  # as many as there are pairs
    def expected(self, names: tuple[str, ...]) -> tuple[tuple[Any, ...], Any]:
        """Run the operations on the model; return each result, or the class of the error, and the final state."""
        machine = copy.deepcopy(self.model)
        results = []
        for name in names:
            operation = OPERATIONS_AND_READS[name]
            try:
                results.append((operation.model or operation.run)(machine, self.root))
            except FastsmError as error:
                results.append(type(error))
        inside(machine).running = True
        return tuple(results), state_of(machine)


def state_of(machine: Machine) -> Any:
    """Return everything that can be compared."""
    return (
        machine.last_applied(), list(machine.items()), machine.membership(), machine.snapshot_metadata(),
        machine.scan(), machine.scan(reverse=True),
        [machine.entry_term(index) for index in range(APPLIED + 6)])  # fmt: skip


# ---- judgement -------------------------------------------------------------------------------------------

class Violation(AssertionError):
    """A schedule had an outcome that no order of its operations has."""


def explore(template: Template, names: Sequence[str], seams: Sequence[int]) -> Schedule:
    """Run one schedule: each operation of ``names`` at a seam of the one before. Raises ``Violation``."""
    machine = template.fresh()
    if "refresh" in names:
        STANDING[template.root] = Reader(template.root / "state")
    steps = [
        Step(partial(OPERATIONS_AND_READS[name].run, machine, template.root), seam)
        for name, seam in itertools.zip_longest(names, seams)]
    with mock.patch("os.urandom", NUMBERS):
        schedule = Schedule(steps).run()
    try:
        judge(template, machine, names, schedule)
    except Violation:
        raise
    except Exception as error:
        raise Violation(f"{' / '.join(names)} at {schedule.place}: {schedule.outcomes}: then {error!r}") from error
    finally:
        machine.close()
        if template.root in STANDING:
            STANDING.pop(template.root).close()
    return schedule


def explore_all(template: Template, names: tuple[str, str]) -> int:
    """Run the second operation at every seam of the first; return how many there are. Raises ``Violation``."""
    seam = 0
    while explore(template, names, (seam,)).started[1]:
        seam += 1
    return seam


def judge(template: Template, machine: FastStateMachine, names: Sequence[str], schedule: Schedule) -> None:
    """Check that the state, a reopening and the model, in one of the orders, agree."""
    ran = [name for name, started in zip(names, schedule.started, strict=True) if started]
    outcomes = schedule.outcomes[: len(ran)]
    for outcome in outcomes:
        if outcome.error is not None and not isinstance(outcome.error, FastsmError):
            raise Violation(f"{' / '.join(names)} at {schedule.place}: {outcomes}")
    for name, outcome in zip(ran, outcomes, strict=True):
        ended = name in SNAPSHOTS and isinstance(outcome.error, SnapshotError) and ran.count(name) == 1
        if ended and (template.root / SNAPSHOTS[name] / "snapshot.fsm").exists():
            raise Violation(f"{' / '.join(names)} at {schedule.place}: {outcomes}, but its file is there")
    state = None
    if machine.is_running():
        inside(machine).check()
        state = state_of(machine)
        machine.close()
    found = template.reopened()
    if template.root in STANDING:
        STANDING[template.root].refresh()
        if shown(STANDING[template.root], template.root) != (found[0], found[1]):
            raise Violation(f"{' / '.join(names)} at {schedule.place}: a reader does not show {found}")
    if state is not None and found != state:
        raise Violation(f"{' / '.join(names)} at {schedule.place}: {outcomes}: state {state}, reopened {found}")
    if not any(fits(template, ran, order, outcomes, found) for order in itertools.permutations(range(len(ran)))):
        raise Violation(f"{' / '.join(names)} at {schedule.place}: {outcomes}: state {found}")


def fits(template: Template, names: Sequence[str], order: Sequence[int], outcomes: Sequence[Any], found: Any) -> bool:
    """Return whether the model, in this order, has the same outcomes; operations that may be refused did nothing."""
    done = [number for number in order if not was_ended(names, number, outcomes[number].error)]
    results, state = template.expected(tuple(names[number] for number in done))
    return state == found and all(
        agrees(template, names, number, outcomes[number], result) for number, result in zip(done, results, strict=True))


def agrees(template: Template, names: Sequence[str], number: int, outcome: Any, result: Any) -> bool:
    if outcome.error is not None:
        return type(outcome.error) is result
    if outcome.value == result:
        return True
    if OPERATIONS_AND_READS[names[number]].sees_files:  # an update of last applied is not in a frame yet
        return bool(outcome.value == template.expected((names[number],))[0][0])
    return False


def was_ended(names: Sequence[str], number: int, error: BaseException | None) -> bool:
    """Return whether an operation failed because another one ended it, or removed what it needed."""
    if error is None:
        return False
    operation = OPERATIONS_AND_READS[names[number]]
    others = [OPERATIONS_AND_READS[name] for i, name in enumerate(names) if i != number]
    if isinstance(error, (CompactedError, SnapshotRangeError)):
        return operation.is_ended and any(other.compacts or other.replaces for other in others)
    if type(error) is SnapshotError:  # only a close ends an install
        return any(other.ends or (operation.is_ended and other.replaces) for other in others)
    return isinstance(error, NotRunningError) and any(other.ends for other in others)


# ---- a disk that reports an error once -------------------------------------------------------------------

MAKE_DURABLE = ("apply", "flush", "save_hard_state", "update")


def explore_one_error(template: Template, names: Sequence[str], seam: int) -> Schedule:
    """Run a schedule of two syncing operations; what either acknowledged must not depend on the failed sync."""
    template.fill_state()
    TellsOnce.armed = False
    machine = FastStateMachine(template.root / "state", sync="apply", _files=TellsOnce, **OPTIONS)
    machine.update_last_applied(LogId(APPLIED, 1))
    acts = {
        "apply": lambda: machine.apply([(machine.last_applied().index + 1, 2, fastsm.put(b"x", b"y"))]),
        "flush": machine.flush, "save_hard_state": machine.save_hard_state,
        "update": lambda: machine.persist_last_applied(LogId(machine.last_applied().index + 1, 2)),
    }
    machine.update_last_applied(LogId(APPLIED + 1, 2))  # so that each of the two has something to make durable
    TellsOnce.armed = True
    schedule = Schedule([Step(acts[names[0]], seam), Step(acts[names[1]], None)]).run()
    failed = [outcome for outcome in schedule.outcomes if isinstance(outcome.error, StorageError)]
    first, second = schedule.outcomes
    durable = machine.durable()
    with contextlib.suppress(StorageError):
        machine.close()
    acknowledged = [outcome for outcome in (first, second) if outcome.error is None and outcome.value != [None]]
    if schedule.started[1] and (not failed or durable.index > APPLIED or acknowledged):
        raise Violation(f"{' / '.join(names)} at {schedule.place}: {schedule.outcomes}, durable {durable}")
    return schedule
