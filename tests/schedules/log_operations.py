"""The same of a Raft log: what its schedules are made of, what each does to a list, and what may be true in the end."""

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

LAST = 12  # entry of the template, all of which is durable
DIRTY = 14  # the last entry when a schedule begins
BORDER = LogId(5, 2)  # at that time: the first segment may go
Log = Any


class Operation(NamedTuple):
    """``run(log)`` on the log; ``model(model)`` on the list, where that differs."""

    run: Callable[[Log], Any]
    model: Callable[[Log], Any] | None = None


def without_room(content: bytes) -> bytes:
    """A file without the zeros that were allocated ahead."""
    return content[: len(content.rstrip(b"\0")) + 7 & ~7]


def entries(first: int, last: int, term: int, size: int = 50) -> list[Entry]:
    return [Entry(index, term, bytes([index]) * size) for index in range(first, last + 1)]


def dirty(log: Log) -> None:
    """What no sync has covered when a schedule begins: two entries, and a segment that may go."""
    log.append(entries(LAST + 1, DIRTY, 3))
    log.compact(BORDER)


class ModelLog(ListLog):
    """The list, with an end."""

    closed = False

    def refuse(self) -> None:
        if self.closed:
            raise NotRunningError("closed")

    def close(self) -> None:
        self.closed = True

    def hard_state(self) -> tuple[int, bytes | None]:
        return self.state.hard_state


# ---- a disk that knows what was synced -------------------------------------------------------------------

class Kept(NamedTuple):
    """What is on the disk for sure: files by number, and the numbers that names have."""

    content: dict[int, bytes]
    names: dict[str, int]

    def build(self, path: Path) -> None:
        path.mkdir()
        for name, number in self.names.items():
            (path / name).write_bytes(self.content.get(number, b""))


class WorstDisk(Watched):
    """Keeps of each file what its last sync covered, and the names that a sync of the directory did; nothing else."""

    content: ClassVar[dict[int, bytes]] = {}
    names_kept: ClassVar[dict[str, int]] = {}
    looks = kept_look = 0  # at the names: how many there were, and the one that `names_kept` is of
    guard = threading.Lock()

    def stores_are_safe(self, fd: Any) -> bool:
        return False  # so each frame is a call of the seam

    def sync(self, fd: Any) -> None:  # type: ignore[override]
        covered = without_room(os.pread(int(fd), os.fstat(int(fd)).st_size, 0))
        number = os.fstat(int(fd)).st_ino
        self.sync_now(fd)
        with WorstDisk.guard:
            if not WorstDisk.content.get(number, b"").startswith(covered):  # else another one covered more
                WorstDisk.content[number] = covered

    def sync_directory(self) -> None:
        with WorstDisk.guard:
            found = {name: (Path(self.path) / name).stat().st_ino for name in self.names() if name != "LOCK"}
            WorstDisk.looks += 1
            look = WorstDisk.looks
        super().sync_directory()
        with WorstDisk.guard:
            if look > WorstDisk.kept_look:  # else another one, that saw the names later, is over already
                WorstDisk.names_kept, WorstDisk.kept_look = found, look

    @staticmethod
    def begin(path: Path) -> None:
        """All that is there now is durable."""
        WorstDisk.names_kept = {each.name: each.stat().st_ino for each in path.iterdir() if each.name != "LOCK"}
        WorstDisk.content = {each.stat().st_ino: each.read_bytes() for each in path.iterdir() if each.name != "LOCK"}

    @staticmethod
    def now() -> Kept:
        with WorstDisk.guard:
            return Kept(dict(WorstDisk.content), dict(WorstDisk.names_kept))


class Acknowledged(NamedTuple):
    """The value of an operation that promises something of the disk, and what that held when it returned."""

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
    """What changes no entry, and tells of none."""


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
FIRSTS = tuple(name for name in OPERATIONS if name != "append, known")  # at whose seams others run
SECONDS = tuple(name for name in FIRSTS if name != "vote")
EVEN_CLOSED = ("close", "open")


class Template:
    """A directory that schedules begin with: three segments, a border, a vote; and two entries that no sync covers."""

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
        """The log, opened, what it holds dirty in part."""
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
        """What the list comes to: each result, or the class of the error; and what it then holds."""
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
        """What would be there if the power failed, and all were lost that no sync has covered."""
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
    """Runs one schedule: the second operation at a seam of the first. Raises ``Violation``."""
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
    """Runs the second operation at every seam of the first; returns how many there are. Raises ``Violation``."""
    seam = 0
    while explore(template, names, seam).started[1]:
        seam += 1
    return seam


def judge(template: Template, log: RaftLog, names: Sequence[str], schedule: Schedule) -> None:
    """The list, in one of the orders, the log, what opening it again finds, and what the disk keeps, agree."""
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
    """What an operation has promised is on the disk, whatever of the rest is lost."""
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


# ---- a disk that tells of an error once ------------------------------------------------------------------

MAKE_DURABLE = ("sync", "sync, coroutine", "vote", "vote, another", "append", "close")


class WorstTellsOnce(TellsOnce, WorstDisk):
    """Both at once."""


def explore_one_error(template: Template, names: tuple[str, str], seam: int) -> Schedule:
    """One schedule of two that make durable; nothing that either acknowledged may hang on the failed sync."""
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
            raise Violation(f"{what}: nobody was told of the error")
        if not inside(log).is_closed() and log.durable_index > LAST:
            raise Violation(f"{what}: durable {log.durable_index}")
    finally:
        inside(log).abandon()
    return schedule
