"""The rules of commands that answer, and of sessions, for state machines that have them: those with a ``check``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

import fastsm
from fastsm import Answer, StateMachine
from fastsm.testing.helpers import apply_chunks, apply_commands, needs
from fastsm.testing.histories import KEYS, AnsweringHistory
from fastsm.testing.snapshots import install, write_snapshot

NO_SESSION, STALE = Answer(False, None, "no session"), Answer(False, None, "stale")
SUM = fastsm.add(b"n", 1)


class AnswerRules:
    """What each command answers, which is equal on every replica, and what is done exactly once."""

    @pytest.fixture
    def answering(self, state_machine: StateMachine) -> StateMachine:
        """Returns the state machine if it has commands that answer; otherwise skips the test."""
        return needs(state_machine, "check")

    # ---- commands that answer ---------------------------------------------------------------------------

    def test_an_addition_answers_the_sum(self, answering: StateMachine) -> None:
        """An add changes an integer stored as text, starts an absent one at ``initial``, and answers the new value."""
        more = fastsm.add(b"m", 1, initial=40)
        commands = [fastsm.add(b"n", 5), fastsm.add(b"n", -7), more, fastsm.add(b"n", 2), more]
        expected = [Answer(True, number) for number in (5, -2, 41, 0, 42)]
        assert apply_commands(answering, *commands) == expected, "the answers of additions are not the sums"
        assert answering.get(b"n") == b"0", "a sum is not kept as plain text"

    @pytest.mark.parametrize("text", [b"", b"-0", b"007", b"+1", b" 1", b"1e3", b"9223372036854775808"])
    def test_what_is_no_number_is_not_added_to(self, answering: StateMachine, text: bytes) -> None:
        """An add to anything but an integer of 64 bits in its shortest form is refused, and changes nothing."""
        answer = apply_commands(answering, fastsm.put(b"n", text), SUM)[1]
        assert answer == Answer(False, None, "not a number"), f"{text!r} was added to"
        assert answering.get(b"n") == text, "a refused addition changed the value"

    def test_a_sum_beyond_64_bits_is_refused(self, answering: StateMachine) -> None:
        """An addition that leaves 64 bits answers "overflow", and the value stays."""
        for number, delta in ((2**63 - 1, 1), (-(2**63), -1)):
            answer = apply_commands(answering, fastsm.put(b"n", b"%d" % number), fastsm.add(b"n", delta))[1]
            assert answer == Answer(False, None, "overflow"), f"{number} and {delta} were added"
            assert answering.get(b"n") == b"%d" % number, "a refused addition changed the value"

    def test_a_read_answers_what_is_there_at_its_place(self, answering: StateMachine) -> None:
        """A read in the log sees the writes of earlier entries, and not those of later ones."""
        read = fastsm.read(b"k")
        answers = apply_commands(answering, read, fastsm.put(b"k", b"1"), read, fastsm.put(b"k", b"2"), read)
        found = [answer for answer in answers if isinstance(answer, Answer)]
        assert found == [Answer(True, None), Answer(True, b"1"), Answer(True, b"2")], "a read is not at its place"

    def test_a_range_is_removed_and_counted(self, answering: StateMachine) -> None:
        """``delete_range`` removes keys from the first up to, but excluding, the last; ``delete_prefix`` by prefix."""
        keys = [b"", b"a", b"a/1", b"a/2", b"a0", b"b", b"\xff", b"\xff\xff"]
        for command, left in (
            (fastsm.delete_range(b"a", b"a0"), [b"", b"a0", b"b", b"\xff", b"\xff\xff"]),
            (fastsm.delete_range(None, b"a"), keys[1:]), (fastsm.delete_range(b"b", None), keys[:5]),
            (fastsm.delete_range(b"b", b"a"), keys), (fastsm.delete_prefix(b"a/"), [b"", b"a", *keys[4:]]),
            (fastsm.delete_prefix(b"\xff"), keys[:6]), (fastsm.delete_prefix(b""), []),
        ):  # fmt: skip
            apply_commands(answering, *(fastsm.put(key, key) for key in keys))
            said = fastsm.decode(command)
            expected = [Answer(True, len(keys) - len(left))]
            assert apply_commands(answering, command) == expected, f"{said} does not answer the number of removed keys"
            assert [key for key in keys if answering.get(key) is not None] == left, f"{said} removed other keys"

    def test_a_transaction_takes_one_of_two_branches(self, answering: StateMachine) -> None:
        """If all conditions hold, ``then`` is done, otherwise ``otherwise``; each command done gives one value."""
        apply_commands(answering, fastsm.put(b"k", b"v"))
        holding = [fastsm.value_is(b"k", b"v"), fastsm.exists(b"k"), fastsm.absent(b"x"), fastsm.modified_at(b"x", 0)]
        failing = [fastsm.value_is(b"k", b"w"), fastsm.exists(b"x"), fastsm.absent(b"k"), fastsm.modified_at(b"k", 9)]
        then = [SUM, fastsm.read(b"n"), fastsm.delete(b"n"), fastsm.read(b"n"), fastsm.delete_prefix(b"n")]
        otherwise = [fastsm.read(b"k")]
        conditions = [holding, [], [fastsm.modified_at(b"k", 1)], *([each, *holding] for each in failing)]
        for tests in conditions:
            answer = apply_commands(answering, fastsm.transaction(tests, then, otherwise))[0]
            expected = Answer(True, [1, b"1", True, None, 0])
            if tests and tests[0] in failing:
                expected = Answer(False, [b"v"], "mismatch")
            assert answer == expected, f"the wrong branch was taken for {[bytes(test) for test in tests]}"

    def test_an_entry_that_cannot_be_done_changes_nothing(self, answering: StateMachine) -> None:
        """An add that is refused refuses its whole transaction or batch, of which nothing is done."""
        apply_commands(answering, fastsm.put(b"k", b"v"))
        members = [fastsm.put(b"a", b""), fastsm.delete_range(None, None), fastsm.put(b"k", b"no"), fastsm.add(b"k", 1)]
        for command in (fastsm.batch(members), fastsm.transaction([], members)):
            answer = apply_commands(answering, command)[0]
            assert answer == Answer(False, None, "not a number"), "a refused entry does not give the reason"
            found = (answering.get(b"k"), answering.get(b"a"), answering.len())
            assert found == (b"v", None, 1), "a part of a refused entry was done"

    def test_a_batch_answers_for_each_of_its_commands(self, answering: StateMachine) -> None:
        """A batch answers with one value per command if it has an add or a range; otherwise it gives True or False."""
        swap = fastsm.compare_and_swap(b"k", None, b"v")
        answers = apply_commands(
            answering, fastsm.batch([swap, SUM, fastsm.noop(), fastsm.delete_prefix(b"k")]), fastsm.batch([SUM, swap]),
            fastsm.batch([SUM, swap]), fastsm.batch([swap]), fastsm.batch([]))
        expected = [
            Answer(True, [True, 1, True, 1]), Answer(True, [2, True]), Answer(False, None, "mismatch"), False, True]
        assert answers == expected, "a batch does not answer for each of its commands"
        assert [type(answer) for answer in answers] == [type(each) for each in expected], "True is not Answer(True, …)"

    # ---- sessions ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize("together", [True, False], ids=["in one chunk", "in several"])
    def test_a_repetition_gives_the_first_answer(self, answering: StateMachine, together: bool) -> None:
        """Repeating the last sequence of a session returns the same answer, and changes nothing."""
        commands = [
            fastsm.open_session(), fastsm.once(1, 1, SUM), fastsm.put(b"n", b"10"), fastsm.once(1, 1, SUM),
            fastsm.once(1, 1, fastsm.put(b"k", b"")), fastsm.once(1, 5, SUM), fastsm.once(1, 5, SUM)]
        chunks = [commands] if together else [[command] for command in commands]
        answers = [answer for chunk in chunks for answer in apply_commands(answering, *chunk)]
        once, again = Answer(True, 1), Answer(True, 11)
        assert answers == [Answer(True, 1), once, True, once, once, again, again], "a repetition has another answer"
        assert (answering.get(b"n"), answering.get(b"k")) == (b"11", None), "a repetition was applied"

    def test_a_refusal_is_remembered(self, answering: StateMachine) -> None:
        """A refused command is refused again when repeated, even if it would be possible by then."""
        swap = fastsm.once(1, 1, fastsm.compare_and_swap(b"k", b"v", b"w"))
        answers = apply_commands(answering, fastsm.open_session(), swap, fastsm.put(b"k", b"v"), swap)
        assert answers[1:] == [False, True, False], "a refusal was not remembered"
        assert answering.get(b"k") == b"v", "a repetition of what was refused was done"

    def test_what_may_have_been_done_is_not_done_again(self, answering: StateMachine) -> None:
        """An older sequence answers "stale", an unknown or forgotten session "no session"; nothing changes."""
        answers = apply_commands(
            answering, fastsm.once(1, 1, SUM), fastsm.open_session(), fastsm.once(2, 4, SUM), fastsm.once(2, 3, SUM),
            fastsm.forget(2), fastsm.forget(2), fastsm.once(2, 5, SUM))
        expected = [NO_SESSION, Answer(True, 2), Answer(True, 1), STALE, True, False, NO_SESSION]
        assert answers == expected, "what may have been done is not refused"
        assert answering.get(b"n") == b"1", "what may have been done was done again"

    def test_sessions_are_no_keys(self, answering: StateMachine) -> None:
        """``len`` does not count sessions, and a reset forgets them."""
        apply_commands(answering, fastsm.open_session(), fastsm.once(1, 1, SUM))
        assert answering.len() == 1, "len() counts sessions"
        asyncio.run(answering.reset())
        answers = apply_commands(answering, fastsm.noop(), fastsm.once(1, 2, SUM))
        assert answers[1] == NO_SESSION, "a session survived a reset"

    def test_sessions_are_in_a_snapshot(self, answering: StateMachine, tmp_path: Path) -> None:
        """A snapshot has the sessions as of its entry; after an install, a repetition returns the first answer."""
        apply_commands(answering, fastsm.open_session(), fastsm.once(1, 1, SUM), fastsm.once(1, 2, SUM))
        term = answering.last_applied().term
        made = write_snapshot(answering, tmp_path / "new", fastsm.LogId(2, term))
        asyncio.run(answering.reset())
        install(answering, made, tmp_path / "new")
        answers = apply_commands(answering, fastsm.once(1, 1, SUM), fastsm.once(1, 2, SUM))
        assert answers == [Answer(True, 1), Answer(True, 2)], "the sessions of a snapshot are not those of its entry"

    def test_sessions_survive(
        self, answering: StateMachine, reopen: Callable[[StateMachine], StateMachine]
    ) -> None:
        """The remembered result of a command is as durable as its writes."""
        apply_commands(answering, fastsm.open_session(), fastsm.once(1, 1, SUM))
        answering.flush()
        reopened = reopen(answering)
        assert apply_commands(reopened, fastsm.once(1, 1, SUM)) == [Answer(True, 1)], "a session was lost"
        assert reopened.get(b"n") == b"1", "what was done once was done again"

    # ---- determinism ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("seed", range(4))
    def test_random_answers_are_those_of_a_dict(self, answering: StateMachine, seed: int) -> None:
        """Answers and values of 300 random entries are those of plain dicts, however they are split and replayed."""
        history = AnsweringHistory(seed, 300)
        for largest, replayed in ((1, 0), (300, 0), (12, 7)):
            parts = apply_chunks(answering, *history.chunks(largest, replayed=replayed))
            results = [result for part in parts for result in part if result is not None]
            assert results == history.results, "the answers differ from those of a dict"
            found = {key: answering.get(key) for key in KEYS}
            assert found == {key: history.values.get(key) for key in KEYS}, "the values differ from those of a dict"
            asyncio.run(answering.reset())
