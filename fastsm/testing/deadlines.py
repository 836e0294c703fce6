"""The rules of time in the log, for state machines that have it: ``clock``, ``deadline``, ``next_deadline``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import Answer, LogId, StateMachine
from fastsm.testing.helpers import apply_chunks, apply_commands, needs
from fastsm.testing.histories import KEYS, TimedHistory
from fastsm.testing.snapshots import install, write_snapshot


def time_of(machine: Any) -> dict[str, Any]:
    """Returns everything that a state machine shows of time."""
    keys = (*KEYS, b"k", b"other")
    return {
        "clock": machine.clock(), "next": machine.next_deadline(),
        "deadlines": {key: machine.deadline(key) for key in keys if machine.get(key) is not None},
    }


class DeadlineRules:
    """A key, or a session, lives until a tick removes it; no other clock is consulted."""

    @pytest.fixture
    def timed(self, state_machine: StateMachine) -> Any:
        """Returns the state machine if it has time; otherwise skips the test."""
        return needs(state_machine, "clock", "deadline", "next_deadline")

    def test_the_clock_never_goes_back(self, timed: Any) -> None:
        """The clock is 0 before the first tick, and then the latest time of a tick."""
        assert timed.clock() == 0, "the clock is not 0 before the first tick"
        for now, expected in ((5, 5), (3, 5), (5, 5), (9, 9), (0, 9), (2**63 - 1, 2**63 - 1)):
            assert apply_commands(timed, fastsm.tick(now)) == [Answer(True, 0)], "a tick did not answer what it removed"
            assert timed.clock() == expected, f"after a tick to {now} the clock is not {expected}"

    def test_a_key_lives_until_a_tick_at_its_deadline(self, timed: Any) -> None:
        """A deadline at or before the clock is due, and the next tick removes the key; nothing else does."""
        apply_commands(timed, fastsm.tick(10), fastsm.put(b"k", b"", expires=12), fastsm.put(b"other", b"", expires=4))
        assert timed.get(b"other") == b"", "a due key was removed before the next tick"
        assert apply_commands(timed, fastsm.tick(11)) == [Answer(True, 1)], "a tick did not count what it removed"
        assert (timed.get(b"k"), timed.get(b"other")) == (b"", None), "a tick did not remove what is due, and only that"
        assert apply_commands(timed, fastsm.tick(12)) == [Answer(True, 1)], "a deadline equal to the clock is not due"
        assert timed.len() == 0, "a key that a tick removed is counted"

    def test_a_tick_of_an_earlier_time_removes_what_is_due(self, timed: Any) -> None:
        """What is due depends on the clock, not on the time that a late leader proposes."""
        apply_commands(timed, fastsm.tick(10), fastsm.put(b"k", b"", expires=9))
        assert apply_commands(timed, fastsm.tick(3)) == [Answer(True, 1)], "what is due by the clock was not removed"

    def test_a_write_sets_the_deadline_anew(self, timed: Any) -> None:
        """A put or a swap without a deadline removes it, and so does a delete; an add keeps it."""
        swap = fastsm.compare_and_swap
        for command, expected in (
            (fastsm.put(b"k", b"1", expires=5), 5), (fastsm.add(b"k", 1), 5), (fastsm.put(b"k", b"1"), None),
            (swap(b"k", b"1", b"2", expires=7), 7), (swap(b"k", b"no", b"", expires=9), 7),
            (swap(b"k", b"2", b"3"), None),
            (fastsm.put_many([b"k", b"other"], [b"", b""], expires=[8, None]), 8),
            (fastsm.batch([fastsm.delete(b"k"), fastsm.put(b"k", b"")]), None),
        ):  # fmt: skip
            apply_commands(timed, command)
            assert timed.deadline(b"k") == expected, f"after {fastsm.decode(command)} the deadline is not {expected}"

    def test_a_touch_changes_the_deadline_alone(self, timed: Any) -> None:
        """A touch gives True if the key exists, and changes neither value nor entry; None removes the deadline."""
        apply_commands(timed, fastsm.put(b"k", b"v"))
        for expires in (7, 3, None, 0):
            assert apply_commands(timed, fastsm.touch(b"k", expires)) == [True], "a touch did not find its key"
            assert (timed.get(b"k"), timed.deadline(b"k")) == (b"v", expires), "a touch changed more than the deadline"
        if hasattr(timed, "modified"):
            assert timed.modified(b"k") == LogId(1, 1), "a touch changed the entry that wrote the key"
        assert apply_commands(timed, fastsm.touch(b"x", 9)) == [False], "a touch of an absent key is not False"
        assert timed.deadline(b"x") is None, "an absent key has a deadline"
        answers = apply_commands(timed, fastsm.batch([fastsm.touch(b"k", 1), fastsm.touch(b"x", 1)]))
        assert answers == [Answer(True, [True, False])], "a batch of touches does not answer for each of them"

    def test_a_tick_takes_the_earliest_first(self, timed: Any) -> None:
        """Ticks remove keys by deadline and key, then sessions, at most ``limit`` in total; 0 only moves the clock."""
        due = [(b"b", 1), (b"", 2), (b"\x00", 2), (b"aa", 2), (b"az", 2), (b"ba", 2), (b"\xff" * 40, 2), (b"a", 3)]
        apply_commands(timed, *(fastsm.put(key, b"", expires=expires) for key, expires in reversed(due)))
        apply_commands(timed, fastsm.open_session(expires=1), fastsm.open_session(expires=0), fastsm.put(b"k", b""))
        assert apply_commands(timed, fastsm.tick(9, limit=0)) == [Answer(True, 0)], "a limit of 0 was exceeded"
        assert timed.clock() == 9, "a tick of limit 0 did not move the clock"
        for count in range(1, len(due) + 1):
            assert apply_commands(timed, fastsm.tick(9, limit=1)) == [Answer(True, 1)], "a limit of 1 was not used"
            left = [key for key, _ in due if timed.get(key) is not None]
            assert left == [key for key, _ in due[count:]], "a tick did not take the earliest first"
        assert timed.next_deadline() == 0, "sessions were removed before keys"
        assert apply_commands(timed, fastsm.tick(9, limit=1)) == [Answer(True, 1)]
        assert timed.next_deadline() == 1, "the session of the earliest deadline was not removed first"
        assert apply_commands(timed, fastsm.tick(9, limit=5)) == [Answer(True, 1)]
        assert timed.get(b"k") == b"", "a tick removed a key without a deadline"

    def test_the_next_deadline_is_the_earliest(self, timed: Any) -> None:
        """The next deadline is the earliest of all keys and sessions; None if there is none."""
        for command, expected in (
            (fastsm.put(b"k", b""), None), (fastsm.put(b"a", b"", expires=9), 9), (fastsm.open_session(expires=5), 5),
            (fastsm.touch(b"k", 3), 3), (fastsm.delete(b"k"), 5), (fastsm.forget(3), 9),
            (fastsm.touch(b"a", None), None),
        ):  # fmt: skip
            apply_commands(timed, command)
            assert timed.next_deadline() == expected, f"after {fastsm.decode(command)} it is not {expected}"

    def test_a_session_lives_until_a_tick(self, timed: Any) -> None:
        """A due session works, and a ``once`` moves its deadline; a repetition, or one without a deadline, does not."""
        put = fastsm.put(b"k", b"")
        apply_commands(timed, fastsm.open_session(expires=5), fastsm.tick(9, limit=0), fastsm.once(1, 1, put))
        assert timed.get(b"k") == b"", "a session that is due does not work until a tick removes it"
        for command, expected in (
            (fastsm.once(1, 2, put, expires=20), 20), (fastsm.once(1, 2, put, expires=40), 20),
            (fastsm.once(1, 3, put), 20), (fastsm.once(1, 1, put, expires=50), 20),
        ):  # fmt: skip
            apply_commands(timed, command)
            assert timed.next_deadline() == expected, f"after {fastsm.decode(command)} it is not {expected}"
        answers = apply_commands(timed, fastsm.tick(20), fastsm.once(1, 4, put))
        assert answers == [Answer(True, 1), Answer(False, None, "no session")], "a tick did not end a session"

    def test_a_stopped_one_tells_no_time(self, timed: Any) -> None:
        """After ``stop``, ``clock``, ``deadline`` and ``next_deadline`` raise ``NotRunningError``."""
        timed.stop()
        for read in (timed.clock, timed.next_deadline, lambda: timed.deadline(b"k")):
            with pytest.raises(fastsm.NotRunningError):
                read()

    def test_a_reset_forgets_the_time(self, timed: Any) -> None:
        """A reset restores the clock and the deadlines of a new machine."""
        new = time_of(timed)
        apply_commands(timed, fastsm.tick(5), fastsm.put(b"k", b"", expires=9), fastsm.open_session(expires=7))
        asyncio.run(timed.reset())
        assert time_of(timed) == new, "time survived reset()"

    def test_time_is_in_a_snapshot(self, timed: Any, tmp_path: Path) -> None:
        """A snapshot has clock, deadlines and touches as of its entry, whatever came after it."""
        apply_commands(
            timed, fastsm.put(b"k", b"", expires=9), fastsm.put(b"a", b"", expires=2), fastsm.touch(b"a", 30),
            fastsm.tick(3), fastsm.put(b"other", b"", expires=8))
        before, last = time_of(timed), timed.last_applied()
        apply_commands(timed, fastsm.touch(b"a", 4), fastsm.touch(b"k", None), fastsm.tick(10))
        made = write_snapshot(timed, tmp_path / "new", last)
        asyncio.run(timed.reset())
        install(timed, made, tmp_path / "new")
        assert time_of(timed) == before, "the time of a snapshot is not that of its entry"
        assert apply_commands(timed, fastsm.tick(8)) == [Answer(True, 1)], "a deadline of a snapshot does not count"

    def test_time_survives(self, timed: Any, reopen: Callable[[StateMachine], Any]) -> None:
        """Clock and deadlines are as durable as keys."""
        history = TimedHistory(5, 80)
        apply_chunks(timed, *history.chunks(9))
        before = time_of(timed)
        timed.flush()
        reopened = reopen(timed)
        assert time_of(reopened) == before, "the time differs after reopening"
        answers = apply_commands(reopened, fastsm.tick(before["clock"] + 50))
        assert answers == [history.state.perform(81, ("tick", before["clock"] + 50))], "what was due was forgotten"

    @pytest.mark.parametrize("seed", range(4))
    def test_random_times_are_those_of_a_dict(self, timed: Any, seed: int) -> None:
        """Answers, values and deadlines of 300 random entries are those of plain dicts, however they are split."""
        history = TimedHistory(seed, 300)
        for largest, replayed in ((1, 0), (300, 0), (12, 7)):
            parts = apply_chunks(timed, *history.chunks(largest, replayed=replayed))
            results = [result for part in parts for result in part if result is not None]
            assert results == history.results, "the answers differ from those of a dict"
            found = {key: timed.get(key) for key in KEYS}
            assert found == {key: history.values.get(key) for key in KEYS}, "the values differ from those of a dict"
            assert timed.clock() == history.state.clock, "the clock differs from that of a dict"
            for key in history.values:
                assert timed.deadline(key) == history.state.deadlines.get(key), "a deadline differs from that of a dict"
            asyncio.run(timed.reset())
