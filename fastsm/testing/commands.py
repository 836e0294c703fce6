"""The rules of commands."""

from __future__ import annotations

import pytest

import fastsm
from fastsm import LogId, StateMachine
from fastsm.testing.helpers import PUT, apply_commands, apply_entries, state_of


class CommandRules:
    """What each command does, and which bytes are not commands."""

    # ---- commands ---------------------------------------------------------------------------------------

    def test_a_later_put_wins(self, state_machine: StateMachine) -> None:
        """A put replaces the value, even within one chunk."""
        apply_commands(state_machine, PUT, fastsm.put(b"key", b"second"))
        assert state_machine.get(b"key") == b"second", "the second put of a chunk did not replace the first"
        apply_commands(state_machine, fastsm.put(b"key", b""))
        assert state_machine.get(b"key") == b"", "a put of an empty value did not replace the value"

    def test_a_delete_removes_the_key(self, state_machine: StateMachine) -> None:
        """A deleted key is gone; deleting an absent key takes effect as well."""
        apply_commands(state_machine, PUT)
        results = apply_commands(state_machine, fastsm.delete(b"key"), fastsm.delete(b"key"))
        assert results == [True, True], "the result of a delete is not True"
        assert state_machine.get(b"key") is None, "a deleted key still has a value"

    @pytest.mark.parametrize("before", [None, b"", b"old", b"old\x00"])
    def test_compare_and_swap_sets_what_it_matches(
        self, state_machine: StateMachine, before: bytes | None
    ) -> None:
        """A compare-and-swap takes effect exactly if the value is the expected one; None stands for an absent key."""
        for expected in (None, b"", b"old", b"old\x00"):
            for value in (None, b"", b"new"):
                set_up = fastsm.delete(b"key") if before is None else fastsm.put(b"key", before)
                apply_commands(state_machine, set_up)
                results = apply_commands(state_machine, fastsm.compare_and_swap(b"key", expected, value))
                case = f"the value was {before!r}, expected {expected!r}, new {value!r}"
                after = value if before == expected else before
                assert results == [before == expected], f"{case}: the result does not say whether it matched"
                assert state_machine.get(b"key") == after, f"{case}: the value is not {after!r} afterwards"

    def test_an_entry_sees_those_before_it_in_its_chunk(self, state_machine: StateMachine) -> None:
        """A compare-and-swap is judged by the effects of earlier entries, however the chunk was split."""
        results = apply_commands(
            state_machine,
            PUT,
            fastsm.compare_and_swap(b"key", b"value", b"2"),
            fastsm.compare_and_swap(b"key", b"value", b"3"),
            fastsm.delete(b"key"),
            fastsm.compare_and_swap(b"key", None, b"4"),
        )
        assert results == [True, True, False, True, True], "an entry did not see those before it"
        assert state_machine.get(b"key") == b"4", "the last entry that matched did not set the value"

    def test_a_batch_does_its_commands_in_order(self, state_machine: StateMachine) -> None:
        """Each command of a batch sees the earlier ones, and the batch gives one result."""
        members = [PUT, fastsm.compare_and_swap(b"key", b"value", b"2"), fastsm.put(b"b", b""), fastsm.delete(b"b")]
        assert apply_commands(state_machine, fastsm.batch(members)) == [True], "the batch did not match"
        assert state_machine.get(b"key") == b"2", "a command of the batch did not see the one before it"
        assert state_machine.get(b"b") is None, "the commands of the batch were not done in order"

    def test_a_batch_is_done_whole_or_not_at_all(self, state_machine: StateMachine) -> None:
        """If one command of a batch does not match, nothing of the batch is done, and the chunk continues."""
        mismatch = fastsm.compare_and_swap(b"key", b"other", b"")
        batch = fastsm.batch([fastsm.put(b"a", b"1"), fastsm.delete(b"key"), mismatch, fastsm.put(b"b", b"2")])
        absent = fastsm.compare_and_swap(b"a", None, b"free")
        results = apply_commands(state_machine, PUT, batch, absent)
        assert results == [True, False, True], "the batch failed, and another entry with it"
        assert state_machine.get(b"key") == b"value", "a batch that did not match deleted a key"
        assert state_machine.get(b"b") is None, "a batch that did not match stored a key"
        assert state_machine.get(b"a") == b"free", "an entry saw a batch that did not match"
        assert state_machine.len() == 2, "len() counts what a batch that did not match had put"

    def test_an_empty_batch_takes_effect(self, state_machine: StateMachine) -> None:
        """An empty batch matches, and does nothing."""
        assert apply_commands(state_machine, fastsm.batch([])) == [True], "the result of an empty batch is not True"

    def test_put_many_is_a_batch_of_puts(self, state_machine: StateMachine) -> None:
        """``put_many`` sets each key, and of two equal keys the later one wins."""
        results = apply_commands(
            state_machine, fastsm.put(b"key", b"0"), fastsm.put_many([b"key", b"other", b"key"], [b"1", b"2", b"3"]))
        assert results == [True, True], "put_many is not one entry with one result"
        assert state_machine.get(b"key") == b"3", "the later of two equal keys did not win"
        assert state_machine.get(b"other") == b"2", "a key of put_many is missing"

    @pytest.mark.parametrize("command", [fastsm.noop(), fastsm.config(b"members")], ids=["noop", "config"])
    def test_noop_and_config_touch_no_key(self, state_machine: StateMachine, command: bytes) -> None:
        """A noop and a config take effect, count as applied, and change no key."""
        apply_commands(state_machine, PUT)
        assert apply_commands(state_machine, command) == [True], "the result is not True"
        assert state_machine.last_applied() == LogId(2, 1), "the entry does not count as applied"
        assert (state_machine.len(), state_machine.get(b"key")) == (1, b"value"), "a key changed"

    # ---- invalid commands -------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("command", "error"),
        [
            pytest.param(b"", fastsm.CommandError, id="nothing"),
            pytest.param(PUT[:-1], fastsm.CommandError, id="cut short"),
            pytest.param(PUT + b"\x00", fastsm.CommandError, id="a byte too long"),
            pytest.param(fastsm.batch([PUT])[:-1], fastsm.CommandError, id="a batch cut short"),
            pytest.param(b"\xfe" + PUT[1:], fastsm.UnknownCommandError, id="an unknown version"),
            pytest.param(PUT[:1] + b"\xfe" + PUT[2:], fastsm.UnknownCommandError, id="an unknown kind"),
        ],
    )
    def test_a_command_that_is_none_fails_its_chunk(
        self, state_machine: StateMachine, command: bytes, error: type[Exception]
    ) -> None:
        """A malformed or unknown command raises, names its entry, and nothing of its chunk is applied.

        A replica that skipped what it does not understand would diverge from its peers.
        """
        before = state_of(state_machine)
        with pytest.raises(error) as raised:
            apply_entries(state_machine, (1, 1, PUT), (2, 1, command), (3, 1, PUT))
        assert raised.value.index == 2, "the error's index is not the entry's"  # type: ignore[attr-defined]
        assert state_of(state_machine) == before, "a part of a chunk with an invalid command was applied"
