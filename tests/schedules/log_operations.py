"""The operations of a Raft log for schedules: their effect on a list, and what must hold in the end."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

from schedules.explorer import Schedule, Step, TellsOnce, Watched, is_file_seam
from schedules.operations import Violation, run_alone

import fastsm.raft_log
from fastsm import Entry, FastsmError, LockedError, LogId, NotRunningError, RaftLog, StorageError
from support.inside import inside
from support.list_log import ListLog, LogState, state_of

LAST = 12  # the template's last entry; all of them are durable
DIRTY = 14  # the last entry when a schedule begins
BORDER = LogId(5, 2)  # the border when a schedule begins: the first segment may be removed
Log = Any


class Operation(NamedTuple):
    """``run(log)`` runs it on the log, ``model(model)`` on the list, if that differs."""

    run: Callable[[Log], Any]
    model: Callable[[Log], Any] | None = None


def without_room(content: bytes) -> bytes:
    """Return a file without the zeros that were allocated ahead."""
    return content[: len(content.rstrip(b"\0")) + 7 & ~7]


def entries(first: int, last: int, term: int, size: int = 50) -> list[Entry]:
    return [Entry(index, term, bytes([index]) * size) for index in range(first, last + 1)]


def dirty(log: Log) -> None:
    """Make changes that no sync has covered: two entries, and a segment that may be removed."""
    log.append(entries(LAST + 1, DIRTY, 3))
    log.compact(BORDER)


class ModelLog(ListLog):
    """The list, which can be closed."""

    closed = False

    def refuse(self) -> None:
        if self.closed:
            raise NotRunningError("closed")

    def close(self) -> None:
        self.closed = True

    def hard_state(self) -> tuple[int, bytes | None]:
        return self.state.hard_state


# ---- a disk that keeps only what was synced --------------------------------------------------------------

class Kept(NamedTuple):
    """What is certainly on the disk: files by number, and the numbers of names."""

    content: dict[int, bytes]
    names: dict[str, int]

    def build(self, path: Path) -> None:
        path.mkdir()
        for name, number in self.names.items():
            (path / name).write_bytes(self.content.get(number, b""))


class WorstDisk(Watched):
    """A disk that keeps of each file only what its last sync covered, and only names that a directory sync covered."""

    content: ClassVar[dict[int, bytes]] = {}
    names_kept: ClassVar[dict[str, int]] = {}
    looks = kept_look = 0  # looks at the names: their count, and the number of the one in `names_kept`
    guard = threading.Lock()

    def stores_are_safe(self, fd: Any) -> bool:
        return False  # so that each frame is written by a call of the seam

    def sync(self, fd: Any) -> None:  # type: ignore[override]
        covered = without_room(os.pread(int(fd), os.fstat(int(fd)).st_size, 0))
        number = os.fstat(int(fd)).st_ino
        self.sync_now(fd)
        with WorstDisk.guard:
            if not WorstDisk.content.get(number, b"").startswith(covered):  # otherwise another sync covered more
                WorstDisk.content[number] = covered

    def sync_directory(self) -> None:
        with WorstDisk.guard:
            found = {name: (Path(self.path) / name).stat().st_ino for name in self.names() if name != "LOCK"}
            WorstDisk.looks += 1
            look = WorstDisk.looks
        super().sync_directory()
        with WorstDisk.guard:
            if look > WorstDisk.kept_look:  # otherwise a sync that saw the names later is over already
                WorstDisk.names_kept, WorstDisk.kept_look = found, look

    @staticmethod
    def begin(path: Path) -> None:
        """Make everything that is there now durable."""
        WorstDisk.names_kept = {each.name: each.stat().st_ino for each in path.iterdir() if each.name != "LOCK"}
        WorstDisk.content = {each.stat().st_ino: each.read_bytes() for each in path.iterdir() if each.name != "LOCK"}

    @staticmethod
    def now() -> Kept:
        with WorstDisk.guard:
            return Kept(dict(WorstDisk.content), dict(WorstDisk.names_kept))


class Acknowledged(NamedTuple):
    """The value of an operation that promises durability, and what the disk held when it returned."""

    value: Any
    kept: Kept

    def __repr__(self) -> str:
        return f"{self.value}, acknowledged"


def acknowledged(call: Callable[[Log], Any], log: Log) -> Any:
    value = call(log)
    return Acknowledged(value, WorstDisk.now()) if isinstance(log, RaftLog) else value


# ---- operations ------------------------------------------------------------------------------------------

def promise(call: Callable[[Log], Any], model: Callable[[Log], Any] | None = None) -> Operation:
    return Operation(partial(acknowledged, call), model)


def statistics(log: Log) -> Any:
    stats = log.stats()
    return stats.first_index, stats.last_index, stats.last_term, stats.entries


def model_statistics(model: ModelLog) -> Any:
    return model.first_index, model.last.index, model.last.term, len(model.state.entries)


def open_it(log: Log) -> LogState:
    with RaftLog(log.path, _files=WorstDisk) as another:
        return state_of(another)


def open_model(model: ModelLog) -> LogState:
    if not model.closed:
        raise LockedError("", None, None)
    model.closed = False  # for a moment
    try:
        return model.state
    finally:
        model.closed = True


def nothing(model: ModelLog) -> None:
    """Do nothing: the operation neither changes nor reads entries."""


OPERATIONS = {
    "append": Operation(lambda log: log.append(entries(DIRTY + 1, DIRTY + 2, 3))),
    "append, known": Operation(lambda log: log.append(entries(DIRTY - 1, DIRTY + 1, 3))),
    "append, conflict": Operation(lambda log: log.append(entries(LAST, DIRTY + 3, 9))),
    "truncate": Operation(lambda log: log.truncate_after(LAST - 2)),
    "compact": Operation(lambda log: log.compact(LogId(8, 2))),
    "compact beyond": Operation(lambda log: log.compact(LogId(40, 9))),
    "vote": promise(lambda log: log.save_hard_state(5, b"me")),
    "vote, another": promise(lambda log: log.save_hard_state(5, b"you")),
    "sync": promise(lambda log: log.sync(), nothing),
    "sync, coroutine": promise(lambda log: run_alone(log.sync_async()), nothing),
    "durable": promise(lambda log: log.durable_index, nothing),
    "hard state": promise(lambda log: log.hard_state()),
    "reads": Operation(
        lambda log: (log.entries(9, 99), statistics(log)),
        lambda model: (model.entries(9, 99), model_statistics(model))),
    "verify": Operation(lambda log: log.verify(), nothing),
    "close": promise(lambda log: log.close()),
    "open": Operation(open_it, open_model),
}  # fmt: skip
FIRSTS = tuple(name for name in OPERATIONS if name != "append, known")  # operations at whose seams others run
SECONDS = tuple(name for name in FIRSTS if name != "vote")
EVEN_CLOSED = ("close", "open")


class Template:
    """The directory that schedules begin with: three segments, a border, a vote, and two unsynced entries."""

    def __init__(self, root: Path, *, rotating: bool) -> None:  # each append begins a segment
        self.root, self.rotating, self.number = root, rotating, 0
        path = root / "template"
        with mock.patch.object(fastsm.raft_log, "SEGMENT_BYTES", 1):
            log = RaftLog(path)
            log.append(entries(1, 4, 1))
            log.append(entries(5, 10, 2))
            log.append(entries(11, LAST, 2))
            log.compact(LogId(2, 1))
            log.save_hard_state(4, b"them")
            log.sync()
            self.state = state_of(log)
            log.close()
        self.files = {each.name: without_room(each.read_bytes()) for each in path.iterdir()}

    def fresh(self, files: type[WorstDisk] = WorstDisk) -> RaftLog:
        """Open the log, and make its unsynced changes."""
        self.number += 1
        path = self.root / f"log-{self.number}"
        path.mkdir()
        for name, content in self.files.items():
            (path / name).write_bytes(content)
        WorstDisk.begin(path)
        with mock.patch.object(fastsm.raft_log, "SEGMENT_BYTES", 1 if self.rotating else 1 << 26):
            log = RaftLog(path, _files=files)
        dirty(log)
        return log

    def expected(self, names: Sequence[str]) -> tuple[list[Any], LogState]:
        """Run the operations on the list; return each result, or the class of the error, and the final content."""
        model = ModelLog(self.state)
        dirty(model)
        results: list[Any] = []
        for name in names:
            operation = OPERATIONS[name]
            try:
                if name not in EVEN_CLOSED:
                    model.refuse()
                results.append((operation.model or operation.run)(model))
            except FastsmError as error:
                results.append(type(error))
        return results, model.state

    def kept(self, kept: Kept) -> LogState:
        """Return the log that would be there after a power loss that takes everything unsynced."""
        self.number += 1
        path = self.root / f"kept-{self.number}"
        kept.build(path)
        log = RaftLog(path)
        try:
            return state_of(log)
        finally:
            inside(log).abandon()


# ---- judgement -------------------------------------------------------------------------------------------

def explore(template: Template, names: tuple[str, str], seam: int) -> Schedule:
    """Run one schedule: the second operation at a seam of the first. Raises ``Violation``."""
    log = template.fresh()
    schedule = schedule_of(log, names, seam)
    try:
        judge(template, log, names, schedule)
    except Violation:
        raise
    except Exception as error:
        raise Violation(f"{' / '.join(names)} at {schedule.place}: {schedule.outcomes}: then {error!r}") from error
    finally:
        inside(log).abandon()
    return schedule


def schedule_of(log: RaftLog, names: tuple[str, str], seam: int) -> Schedule:
    first, second = (partial(OPERATIONS[name].run, log) for name in names)
    return Schedule([Step(first, seam), Step(second, None)], is_file_seam).run()


def explore_all(template: Template, names: tuple[str, str]) -> int:
    """Run the second operation at every seam of the first; return how many there are. Raises ``Violation``."""
    seam = 0
    while explore(template, names, seam).started[1]:
        seam += 1
    return seam


def judge(template: Template, log: RaftLog, names: Sequence[str], schedule: Schedule) -> None:
    """Check that the log, a reopening and the disk agree with the list, in one of the orders."""
    ran = [name for name, started in zip(names, schedule.started, strict=True) if started]
    outcomes = schedule.outcomes[: len(ran)]
    what = f"{' / '.join(names)} at {schedule.place}: {outcomes}"
    if any(outcome.error is not None and not isinstance(outcome.error, FastsmError) for outcome in outcomes):
        raise Violation(what)
    state = None if inside(log).is_closed() else state_of(log)
    inside(log).abandon()
    with RaftLog(log.path) as again:
        found = state_of(again)
    if state not in (None, found):
        raise Violation(f"{what}: {state}, and opened again {found}")
    orders = itertools.permutations(range(len(ran)))
    if not any(fits(template, ran, order, outcomes, found) for order in orders):
        raise Violation(f"{what}: {found}")
    for number, name in enumerate(ran):
        judge_kept(template, name, ran[1 - number] if len(ran) > 1 else "", outcomes[number].value, found, what)


def fits(template: Template, names: Sequence[str], order: Sequence[int], outcomes: Sequence[Any], found: Any) -> bool:
    results, state = template.expected([names[number] for number in order])
    return state == found and all(
        agrees(names[number], outcomes[number], result) for number, result in zip(order, results, strict=True))


def agrees(name: str, outcome: Any, result: Any) -> bool:
    if outcome.error is not None:
        return type(outcome.error) is result
    value = outcome.value.value if isinstance(outcome.value, Acknowledged) else outcome.value
    return bool(value == result) or (name == "durable" and result is None)


def judge_kept(template: Template, name: str, other: str, value: Any, found: LogState | None, what: str) -> None:
    """Check that the disk keeps what an operation promised, whatever else is lost."""
    if not isinstance(value, Acknowledged):
        return
    state = template.kept(value.kept)
    synced = state.border >= BORDER and (ListLog(state).last.index >= DIRTY or other in ("truncate", "compact beyond"))
    right = {
        "vote": state.hard_state == (5, b"me"),
        "vote, another": state.hard_state == (5, b"you"),
        "sync": synced,
        "sync, coroutine": synced,
        "durable": name != "durable" or ListLog(state).last.index >= value.value,
        "hard state": name != "hard state" or state.hard_state[0] >= value.value[0],
        "close": state == found,
    }
    if not right[name]:
        raise Violation(f"{what}: {name} has returned, and the disk keeps {state}")


# ---- a disk that reports an error once -------------------------------------------------------------------

MAKE_DURABLE = ("sync", "sync, coroutine", "vote", "vote, another", "append", "close")


class WorstTellsOnce(TellsOnce, WorstDisk):
    """A disk that reports an error once, and keeps only what was synced."""


def explore_one_error(template: Template, names: tuple[str, str], seam: int) -> Schedule:
    """Run a schedule of two syncing operations; what either acknowledged must not depend on the failed sync."""
    TellsOnce.armed = False
    log = template.fresh(WorstTellsOnce)
    TellsOnce.armed = True
    schedule = schedule_of(log, names, seam)
    what = f"{' / '.join(names)} at {schedule.place}: {schedule.outcomes}"
    try:
        for name, outcome in zip(names, schedule.outcomes, strict=True):
            if outcome.error is not None and not isinstance(outcome.error, FastsmError):
                raise Violation(what)
            if name != "close":
                judge_kept(template, name, "", outcome.value, None, what)
        told = [each for each in schedule.outcomes if isinstance(each.error, StorageError)]
        if not TellsOnce.armed and not told:
            raise Violation(f"{what}: no operation raised the error")
        if not inside(log).is_closed() and log.durable_index > LAST:
            raise Violation(f"{what}: durable {log.durable_index}")
    finally:
        inside(log).abandon()
    return schedule
