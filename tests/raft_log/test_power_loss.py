"""``RaftLog`` in crashes: kills at every system call, and power losses that keep any subset of pages."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

import fastsm
from fastsm import FastsmError, LogId, RaftLog
from support.faulty import memory_directory
from support.inside import inside
from support.list_log import ListLog, LogState, do, invent, state_of
from support.power import Drawn, NoDirectorySync, NoSync, Platter, Point, QuietDirectory

pytestmark = pytest.mark.usefixtures("quiet")


class Moment(Point):
    """A point in time, and the states that a crash may leave: any since the last sync, or a prefix of an append."""

    def __init__(self, platter: Platter, where: str, history: list[LogState], synced: int, hard: LogState) -> None:
        super().__init__(platter, where)
        self.since = history[synced:]
        self.hard_state = hard.hard_state  # the last that was saved, and returned
        self.last = history[-1]

    def allows(self, found: LogState) -> bool:
        """The hard state found is not older than the last saved one."""
        return any(state == found for state in self._states()) and found.hard_state[0] >= self.hard_state[0]

    def _states(self) -> list[LogState]:
        states = []
        for before, after in zip(self.since[:1] + self.since, self.since, strict=False):
            states.append(after)
            if after.border == before.border and after.entries[: len(before.entries)] == before.entries:
                states += [
                    before._replace(entries=after.entries[:count])
                    for count in range(len(before.entries), len(after.entries))]
        return states


def live(seed: int, root: Path, planted: type[Platter] = Platter) -> list[Moment]:
    """Run a random life of a log; return its moments."""
    rng = random.Random(seed)
    model = ListLog()
    history = [model.state]
    synced, hard = 0, model.state
    moments: list[Moment] = []
    platter = planted(
        lambda where: moments.append(Moment(platter, where, history, synced, hard)),
        stores=False if seed % 4 == 0 else None,
    )
    log = RaftLog(root, _files=platter.files)
    for _ in range(40):
        step = invent(rng, model, 5000 if seed % 3 else 70_000)
        before = model.state.hard_state
        do(model, step)
        if step.method != "sync":
            history.append(model.state)
        do(log, step)
        if step.method == "sync" or model.state.hard_state != before:  # a vote that is known already writes nothing
            hard = model.state
            synced = len(history) - 1
        moments.append(Moment(platter, f"{step.method} returned", history, synced, hard))
    inside(log).abandon()
    platter.close()
    return moments


def draw_states(moments: list[Moment], root: Path, seed: int, counts: Counter[str], tries: int = 40) -> list[str]:
    rng = random.Random(seed)
    wrong = []
    for moment in rng.sample(moments, min(tries, len(moments))):
        for number in range(8):
            drawn: Drawn = moment.draw(rng) if number else moment.killed()
            drawn.build(root)
            counts.update(states=1, holes=drawn.hole, names=drawn.renamed)
            try:
                found = open_twice(root)
                if not moment.allows(found):
                    raise AssertionError("not a state since the last sync")
                if not number and found != moment.last and "returned" in moment.where:
                    raise AssertionError("a kill between calls has lost something")
            except (AssertionError, FastsmError) as error:
                wrong.append(f"seed {seed}, {moment.where}, {'power' if number else 'kill'}: {error!r}")
            else:
                counts.update(less=found != moment.last, full=found == moment.last)
    return wrong


def open_twice(root: Path) -> LogState:
    """Open the log twice; both times it has the same content, and is durable at most up to its durable index."""
    log = RaftLog(root, _files=QuietDirectory)
    found, durable = state_of(log), log.durable_index
    assert durable <= log.last_index
    inside(log).abandon()
    log = RaftLog(root, _files=QuietDirectory)
    assert state_of(log) == found, "a second opening finds another state"
    log.save_hard_state(found.hard_state[0] + 1)
    log.append([(log.last_index + 1, log.last_term, b"goes on")])
    log.sync()
    assert log.durable_index == log.last_index
    inside(log).abandon()
    return found


def life_and_deaths(seeds: range, planted: type[Platter] = Platter, segment_bytes: int = 20_000) -> list[str]:
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    with memory_directory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastsm.raft_log, "SEGMENT_BYTES", segment_bytes)
        for seed in seeds:
            moments = live(seed, root / f"life-{seed}", planted)
            wrong += draw_states(moments, root / f"drawn-{seed}", seed, counts)
    print(dict(counts))
    if planted is Platter:
        assert not wrong, "\n".join(wrong[:5])
        assert counts["states"] > 2000
        assert min(counts["holes"], counts["names"], counts["less"], counts["full"]) > 20
    return wrong


def test_no_crash_takes_what_was_synced() -> None:
    """After a kill or a power loss at any system call: a state since the last sync, or a prefix of an append."""
    life_and_deaths(range(8))


def test_planted_faults_are_seen() -> None:
    """The simulator detects a log whose syncs, or whose directory's syncs, do not happen."""
    for planted in (NoSync, NoDirectorySync):
        assert life_and_deaths(range(4), planted)


def test_durable_entries_survive_a_truncation_without_a_sync(tmp_path: Path) -> None:
    """After truncating and appending again without a sync, a power loss keeps what counted as durable."""
    moments: list[Point] = []
    with memory_directory() as root:
        platter = Platter(lambda _: None)
        log = RaftLog(root / "log", _files=platter.files)
        log.append([(index, 1, b"one") for index in range(1, 9)])
        log.sync()
        log.truncate_after(5)
        log.append([(6, 2, b"two")])
        assert log.durable_index == 5
        moments.append(Point(platter, "now"))
        log.compact(LogId(3, 1))
        assert log.durable_index == 5
        moments.append(Point(platter, "now"))
        for moment in moments:
            for seed in range(50):
                moment.draw(random.Random(seed)).build(root / "drawn")
                again = RaftLog(root / "drawn", _files=QuietDirectory)
                assert [again.term(index) for index in (4, 5)] == [1, 1]
                assert again.last_index >= 5
                inside(again).abandon()
        inside(log).abandon()
        platter.close()


@pytest.mark.parametrize("segment_bytes", [1000, 64 << 20])
def test_names_that_a_killed_process_gave_are_synced_before_the_log_goes_on(segment_bytes: int) -> None:
    """Killed after each rename, before it is durable: what the next process syncs survives a power loss."""
    renamed: list[Point] = []
    with memory_directory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastsm.raft_log, "SEGMENT_BYTES", segment_bytes)
        first = Platter(lambda where: renamed.append(Point(first, where)) if where == "after rename" else None)
        log = RaftLog(root / "first", _files=first.files)
        for index in range(1, 6):
            log.append([(index, 1, bytes(500))])
            log.sync()
        inside(log).abandon()
        assert len(renamed) == (1 if segment_bytes > 1000 else 3)
        for number, moment in enumerate(renamed):
            moment.killed().build(root / f"{number}")
            second = Platter(lambda _: None)
            second.folder(str(root / f"{number}"))
            second.take_over(root / f"{number}", moment.killed(), moment)
            log = RaftLog(root / f"{number}", _files=second.files)
            log.append([(log.last_index + 1, 7, b"promised")])
            log.sync()
            promised = state_of(log)
            lost = Point(second, "now")
            for seed in range(20):
                lost.draw(random.Random(seed)).build(root / "drawn")
                again = RaftLog(root / "drawn", _files=QuietDirectory)
                assert state_of(again) == promised
                inside(again).abandon()
            inside(log).abandon()
            second.close()
        first.close()
