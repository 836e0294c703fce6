"""Lives of a state machine on a disk that loses power, and a check of every state that is drawn.

A life plays a story from the position of its directory, and takes a point before and after every change of a file and
after every operation. States are drawn from points, opened and checked; some are continued by another life, so that a
crash may follow a crash.
"""

from __future__ import annotations

import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fastsm import Entry, FastsmError, FastStateMachine, LogId, StorageError, open_snapshot
from fastsm.core import generations
from support.inside import inside
from support.power import Drawn, Platter, Point, QuietDirectory
from support.stories import Operation, Source, Story

# Operations that write and sync everything that is not durable yet.
WRITES = ("flush", "save", "stop", "close", "clear", "snapshot", "install")
SHELF = "snapshots"  # the directory of snapshots, within that of the state
POINTS = (26, 9, 5)  # points from which states are drawn: in a first life, in one after a crash, and so on
DRAWS = (36, 14, 8)  # states drawn from each point
LIVED_ON = (0.018, 0.011, 0.0)  # the share of the states that another life continues
KILLED = (0.14, 0.05, 0.0)  # the share of the points at which the process is also killed


class ViolationError(AssertionError):
    """A state that must not be."""


class Moment(Point):
    """A point, and what must hold for every state that is drawn from it.

    ``lower`` is the last position that counts as durable, ``returned`` that of the last operation that wrote and
    returned (which survives a kill), ``upper`` that of the current operation. ``shelf`` holds the entries that the
    snapshot on disk may be as of, and None if there may be none; ``arriving`` is that of the last snapshot begun.
    """

    def __init__(self, life: Life, where: str) -> None:
        super().__init__(life.platter, where)
        self.lower, self.returned, self.upper = life.lower, life.returned, life.upper
        self.shelf, self.arriving = life.shelf, life.arriving


class Life:
    """A part of a story, from the first opening to the last moment, on a platter of its own."""

    def __init__(self, story: Story, path: Path, rng: random.Random, planted: type[Platter] = Platter) -> None:
        self.story = story
        self.path = path
        self.random = rng
        self.platter = planted(self.note, stores=story.stores)
        self.lower = self.returned = self.upper = 0
        self.shelf: frozenset[LogId | None] = frozenset({None})
        self.arriving: LogId | None = None
        self.moments: list[Moment] = []
        self.counts: Counter[str] = Counter()
        self.machine: FastStateMachine | None = None

    def note(self, where: str) -> None:
        self.moments.append(Moment(self, where))

    def live(self, steps: int) -> None:
        """Play `steps` steps, or the rest of the story."""
        try:
            step = self.open()
            stop = min(step + steps, len(self.story.steps))
            while step < stop:
                struck = self.platter.struck
                try:
                    for operation in self.story.steps[step]:
                        self.perform(operation)
                        self.note(f"after {operation.kind}")
                    step += 1
                except StorageError:
                    if self.platter.struck == struck:
                        raise
                    self.kill()
                    step = self.open()
                    if self.random.random() < 0.8:  # the first sync after the failed one
                        self.perform(Operation("flush", None, self.upper))
                        self.note("after flush")
        finally:
            self.counts["failed syncs"] += self.platter.struck
            self.kill()
            self.platter.close()

    def open(self) -> int:
        """Open the directory as the previous process left it; return the step to continue with."""
        options = {
            "contiguous": self.story.contiguous, "sync": self.story.sync, "ordered": self.story.ordered,
            "_files": self.platter.files,
        }  # fmt: skip
        struck = self.platter.struck
        try:
            self.machine = FastStateMachine(self.path, **options)
        except StorageError:
            if self.platter.struck == struck:
                raise
            self.machine = FastStateMachine(self.path, **options)
        position = self.story.find(self.machine, self.returned, self.upper)
        if position is None:
            raise ViolationError(
                f"opened after a kill: {self.machine!r}, expected position {self.returned} to {self.upper}"
            )
        self.returned = self.upper = position
        self.believe_durable()
        self.note("after open")
        return self.story.next_step(position)

    def kill(self) -> None:
        """End the process; what it wrote is in the system's cache."""
        if self.machine is not None:
            kill(self.machine)
            self.machine = None

    def perform(self, operation: Operation) -> None:
        kind, argument, position = operation
        machine = self.machine
        assert machine is not None
        moves = position > self.upper
        self.upper = max(self.upper, position)
        calls: dict[str, Callable[[], object]] = {
            "apply": lambda: machine.apply(argument),
            "overlap": lambda: self.overlap(machine, argument),
            "update": lambda: machine.update_last_applied(argument) if moves else None,
            "note": lambda: machine.update_last_snapshot_metadata(argument),
            "flush": machine.flush,
            "save": machine.save_hard_state,
            "clear": machine.clear,
            "stop": lambda: (machine.stop(), machine.start()),
            "close": machine.close,
            "kill": self.kill,
            "fail": self.platter.fail_next,
            "snapshot": lambda: self.write_snapshot(machine, *argument),
            "compact": lambda: self.compact(machine, argument),
            "install": lambda: self.install(machine, argument),
        }
        calls[kind]()
        if kind in WRITES or (kind in ("apply", "overlap") and moves):
            self.returned = self.upper
        if kind in WRITES or (kind == "apply" and moves and self.story.sync == "apply"):
            self.lower = self.upper
        if kind in ("close", "kill"):
            self.note(f"after {kind}")
            self.open()
        self.believe_durable()
        if self.machine is not None and self.story.ordered:
            scan_all(self.machine)

    def write_snapshot(self, machine: FastStateMachine, last_included: LogId, compress: str) -> None:
        self.shelf, self.arriving = self.shelf | {last_included}, last_included
        machine.write_snapshot(self.path / SHELF, last_included, compress=compress)
        self.shelf = frozenset({last_included})

    def compact(self, machine: FastStateMachine, up_to: int) -> None:
        """Compact; the step to a new base makes everything applied durable."""
        before = machine.stats().generation
        machine.compact(up_to)
        if machine.stats().generation > before:
            self.lower = self.returned = self.upper

    def install(self, machine: FastStateMachine, source: Source) -> None:
        """Install a snapshot from another disk, which loses nothing."""
        path = self.path.parent / f"install-{self.upper}"
        source.write(path, contiguous=self.story.contiguous)
        machine.install_snapshot(None, path, allow_older=source.allow_older)

    def overlap(self, machine: FastStateMachine, chunk: list[Entry]) -> None:
        """Flush, and apply a chunk during its sync."""
        before = self.returned
        called: list[object] = []

        def apply_next_to_it() -> None:
            """Apply on another thread, because the syncing one must not write meanwhile."""
            thread = threading.Thread(target=lambda: called.append(machine.apply(chunk)))
            thread.start()
            thread.join()

        if self.story.sync != "apply":  # otherwise the chunk would wait for this sync
            self.platter.during_sync = apply_next_to_it
        try:
            machine.flush()
        finally:
            self.platter.during_sync = None
        self.lower = max(self.lower, before)
        self.counts["applied during a sync"] += len(called)
        if not called:
            machine.apply(chunk)

    def believe_durable(self) -> None:
        durable = self.machine.durable() if self.machine else LogId()
        if durable != LogId():
            self.lower = max(self.lower, self.story.position_of(durable, self.upper))


def scan_all(machine: FastStateMachine) -> None:
    """Read all keys in order; raise `ViolationError` if they are not the table's."""
    found = machine.scan().entries
    if found != sorted(machine.items()) or machine.count(end=b"\xff") != machine.len():
        raise ViolationError(f"{machine!r} has an order that is not its keys': {found[:5]}")


def shelved(path: Path) -> LogId | None:
    """Check the snapshot in a state's directory; return the entry that it is as of, or None without a snapshot."""
    if not (path / SHELF / "snapshot.fsm").exists():
        return None
    with open_snapshot(path / SHELF) as snapshot:
        snapshot.verify()
        return snapshot.metadata.last_included


def kill(machine: FastStateMachine) -> None:
    """Leave a machine as a killed process would: nothing more is written; descriptors and lock are released."""
    inside(machine).worker.abandon()
    inside(machine).release()


class Simulation:
    """All states drawn from one story. ``counts`` is by kind; ``violations`` say how to reproduce them."""

    def __init__(
        self, seed: int, root: Path, planted: type[Platter] = Platter, *, most_violations: int = 10
    ) -> None:
        self.story = Story(seed)
        self.root = root
        self.planted = planted
        self.most_violations = most_violations
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self._lives = 0

    def run(self) -> Simulation:
        self.counts.update(f"stories {trait}" for trait in ("in all", *self.story.traits))
        threshold = generations.SAVE_TABLE_ABOVE
        generations.SAVE_TABLE_ABOVE = 0 if self.story.tables else threshold
        try:
            self._live(0, len(self.story.steps), "first life")
        finally:
            generations.SAVE_TABLE_ABOVE = threshold
            for path in self.root.glob("install-*"):
                shutil.rmtree(path)
        return self

    @property
    def _enough(self) -> bool:
        return len(self.violations) >= self.most_violations

    def _live(
        self,
        depth: int,
        steps: int,
        trail: str,
        *,
        drawn: Drawn | None = None,
        before: Moment | None = None,
        position: int = 0,
    ) -> None:
        """Run a life in a directory as a crash left it, then everything that follows from it."""
        path = self.root / f"life-{self._lives}"
        self._lives += 1
        life = Life(self.story, path, self.random, self.planted)
        if drawn is not None:
            drawn.build(path)
            life.platter.take_over(path, drawn, before)
            if self.random.random() < 0.1:
                life.platter.fail_next()
            life.shelf = frozenset({shelved(path)})
            if before is None:
                life.lower = life.returned = life.upper = position
            else:
                life.shelf, life.arriving = before.shelf, before.arriving
                life.lower, life.returned, life.upper = before.lower, before.returned, before.upper
        try:
            life.live(steps)
        except (AssertionError, FastsmError) as error:
            self._violated(f"{trail}: {error!r}")
        finally:
            shutil.rmtree(path)
        self.counts["lives"] += 1
        self.counts += life.counts
        self._harvest(life.moments, depth, trail)

    def _harvest(self, moments: list[Moment], depth: int, trail: str) -> None:
        """Draw states from some moments: mostly those at which much was not durable, and one of each kind."""
        order = sorted(
            range(len(moments)), key=lambda n: self.random.random() ** (1 / (1 + min(moments[n].unsure, 8))),
            reverse=True,
        )  # fmt: skip
        kinds = {moment.where: number for number, moment in enumerate(moments) if not self.counts[moment.where]}
        for number in sorted({*order[: POINTS[depth]], *kinds.values()}):
            if self._enough:
                return
            moment = moments[number]
            here = f"{trail}, moment {number} ({moment.where})"
            self.counts["points"] += 1
            self.counts[moment.where] += 1
            if self.random.random() < KILLED[depth]:
                self.counts["kills"] += 1
                steps = self.random.randrange(1, 7)
                self._live(depth + 1, steps, f"{here}, killed", drawn=moment.killed(), before=moment)
            self._draw_all(moment, depth, here)

    def _draw_all(self, moment: Moment, depth: int, trail: str) -> None:
        seen = set()
        for number in range(DRAWS[depth] if moment.unsure else 1):
            drawn = moment.draw(self.random)
            key = hash(frozenset(drawn.files.items()))
            if key in seen:
                continue
            seen.add(key)
            here = f"{trail}, draw {number}"
            self.counts["states"] += 1
            self.counts["with holes"] += drawn.hole
            self.counts["torn within a page"] += drawn.torn
            self.counts["names lost"] += drawn.renamed
            self.counts[f"after {depth} crashes"] += 1
            try:
                position = self._judge(drawn, moment)
            except (AssertionError, FastsmError, OSError) as error:
                self._violated(f"{here}: {error!r}")
                if self._enough:
                    return
                continue
            self.counts["recovered in full"] += position == moment.upper
            self.counts["recovered less"] += position < moment.upper
            if self.random.random() < LIVED_ON[depth]:
                steps = self.random.randrange(1, 7)
                self._live(depth + 1, steps, f"{here}, lost power", drawn=drawn, position=position)

    def _judge(self, drawn: Drawn, moment: Moment) -> int:
        """Open the state, twice, and return its position."""
        story = self.story
        path = self.root / "drawn"
        drawn.build(path, holes=self.random.random() < 0.95)
        expected = None
        if self.random.random() < 0.5 and story.epochs[moment.lower] == story.epochs[moment.upper]:
            expected = story.states[moment.lower].applied
            self.counts["with expect_applied"] += 1
        positions = []
        for _ in range(2):
            machine = FastStateMachine(
                path, contiguous=story.contiguous, expect_applied=expected, _files=QuietDirectory
            )
            try:
                self.counts["by a saved table"] += any(name.startswith("table-") for name in drawn.files)
                self.counts["after a base"] += inside(machine).log.base is not None
                order = inside(machine).order()
                self.counts["by a saved order"] += order is not None and order.loaded
                if not positions:
                    scan_all(machine)
                positions.append(story.find(machine, moment.lower, moment.upper))
                if positions[-1] is None:
                    where = story.find(machine, 0, story.last)
                    raise ViolationError(
                        f"{machine!r}, which is position {where}; expected {moment.lower} to {moment.upper}"
                    )
                if self.random.random() < 0.05:
                    inside(machine).check()
                    machine.verify()
                    machine.close()
            finally:
                kill(machine)
        if story.states[positions[0]] != story.states[positions[1]]:
            raise ViolationError(f"position {positions[0]}, and {positions[1]} when opened again")
        self._judge_shelf(path, positions[0], moment)
        return positions[0]

    def _judge_shelf(self, path: Path, position: int, moment: Moment) -> None:
        """Check that the snapshot on disk may be there, and that it is not older than the one that the state names."""
        found = shelved(path)
        self.counts["with a snapshot"] += found is not None
        if found not in moment.shelf:
            raise ViolationError(f"a snapshot as of {found} is on disk; expected one as of {set(moment.shelf)}")
        told = self.story.written.get(position)
        due = told is not None and told in moment.shelf and position == moment.upper
        if due and found not in (told, moment.arriving):
            raise ViolationError(f"the state knows of a snapshot as of {told}; on disk is one as of {found}")

    def _violated(self, message: str) -> None:
        self.violations.append(f"{self.story!r}, {message}")
