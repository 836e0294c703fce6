"""The rules of the state machine trait, one test each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import fastsm
from fastsm import Entry, LogId, StateMachine
from fastsm.testing.answers import AnswerRules
from fastsm.testing.calls import CallRules, MakeMachine
from fastsm.testing.commands import CommandRules
from fastsm.testing.deadlines import DeadlineRules
from fastsm.testing.helpers import METADATA, PUT, apply_chunks, apply_commands, apply_entries, state_of
from fastsm.testing.histories import KEYS, History
from fastsm.testing.order import OrderRules
from fastsm.testing.snapshots import SnapshotRules
from fastsm.testing.storage import StorageRules
from fastsm.testing.waiting import WaitingRules
from fastsm.testing.watching import WatchRules


class StateMachineConformance(
    CommandRules, AnswerRules, CallRules, DeadlineRules, OrderRules, SnapshotRules, StorageRules, WaitingRules,
    WatchRules,
):
    """Subclass this, and give it a fixture ``state_machine``: an empty, running state machine.

    Entries are handed over without gaps. For a state machine that stores data, add a second fixture, ``reopen``: a
    function that closes the given state machine, opens the same storage again, and returns the result. Without it the
    tests of durability are skipped. For one that runs procedures, add a third fixture, ``with_procedures``: a function
    that makes an empty, running state machine with the given procedures.

    Features beyond the trait are tested if they exist: commands that answer if there is ``check``, time if there is
    ``clock``, ordered reads if there is ``scan``, waits if there is ``wait_applied``.
    """

    @pytest.fixture
    def state_machine(self) -> StateMachine:
        """An empty, running state machine."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture state_machine: an empty, running one")

    @pytest.fixture
    def reopen(self) -> Callable[[StateMachine], StateMachine]:
        """A function that closes a state machine, and opens its storage again."""
        pytest.skip(f"{type(self).__name__} has no fixture reopen: what must survive is not tested")

    @pytest.fixture
    def with_procedures(self) -> MakeMachine:
        """A function that makes an empty, running state machine with procedures."""
        pytest.skip(f"{type(self).__name__} has no fixture with_procedures: procedures are not tested")

    # ---- an empty one -----------------------------------------------------------------------------------

    def test_an_empty_state_machine_holds_nothing(self, state_machine: StateMachine) -> None:
        """A new state machine has no keys, has applied nothing, and has no terms and no snapshot."""
        assert state_machine.len() == 0, "len() of a new state machine is not 0"
        assert state_machine.is_empty() is True, "is_empty() of a new state machine is not True"
        assert state_machine.last_applied() == LogId(0, 0), "last_applied() of a new one is not LogId(0, 0)"
        assert state_machine.get(b"key") is None, "get() of a key that was never put is not None"
        assert state_machine.entry_term(1) is None, "entry_term() of an entry never seen is not None"
        assert state_machine.snapshot_metadata() is None, "snapshot_metadata() without a snapshot is not None"

    def test_a_state_machine_is_true_however_empty(self, state_machine: StateMachine) -> None:
        """``bool`` is True even for an empty state machine, so that ``if machine:`` only tests for None."""
        assert bool(state_machine) is True, "bool() of an empty state machine is not True"
        apply_commands(state_machine, PUT)
        assert bool(state_machine) is True, "bool() of a state machine with a key is not True"

    # ---- life cycle -------------------------------------------------------------------------------------

    def test_it_runs_from_construction_until_stop(self, state_machine: StateMachine) -> None:
        """A state machine runs when it is made, not after ``stop``, and again after ``start``."""
        assert state_machine.is_running() is True, "a new state machine does not run"
        state_machine.stop()
        assert state_machine.is_running() is False, "it runs after stop()"
        state_machine.start()
        assert state_machine.is_running() is True, "it does not run after start()"

    def test_start_and_stop_may_be_repeated(self, state_machine: StateMachine) -> None:
        """A second ``start`` or ``stop`` does nothing, and is not an error."""
        state_machine.start()
        assert state_machine.is_running(), "start() of a running one stopped it"
        state_machine.stop()
        state_machine.stop()
        assert not state_machine.is_running(), "a second stop() started it"

    def test_a_stopped_state_machine_refuses(self, state_machine: StateMachine) -> None:
        """After ``stop``, reads and changes raise ``NotRunningError``, and change nothing."""
        apply_commands(state_machine, PUT)
        before = state_of(state_machine)
        state_machine.stop()
        calls: dict[str, Callable[[], Any]] = {
            "get": lambda: state_machine.get(b"key"),
            "apply_chunk": lambda: apply_entries(state_machine, (2, 1, fastsm.delete(b"key"))),
            "update_last_applied": lambda: state_machine.update_last_applied(LogId(2, 1)),
            "persist_last_applied": lambda: state_machine.persist_last_applied(LogId(2, 1)),
            "update_last_snapshot_metadata": lambda: state_machine.update_last_snapshot_metadata(METADATA),
            "persist_last_snapshot_metadata": lambda: state_machine.persist_last_snapshot_metadata(METADATA),
        }
        for name, call in calls.items():
            try:
                result = call()
            except fastsm.NotRunningError:
                continue
            pytest.fail(f"{name} of a stopped state machine gave {result!r}, not a NotRunningError")
        state_machine.start()
        assert state_of(state_machine) == before, "a call that was refused changed the state"

    def test_a_stopped_state_machine_still_tells_where_it_is(self, state_machine: StateMachine) -> None:
        """After ``stop``, a host may still ask how far it has applied, and may flush."""
        apply_commands(state_machine, PUT, PUT)
        state_machine.stop()
        assert state_machine.last_applied() == LogId(2, 1), "last_applied() differs after stop()"
        assert state_machine.entry_term(2) == 1, "entry_term() differs after stop()"
        assert state_machine.len() == 1, "len() differs after stop()"
        assert state_machine.snapshot_metadata() is None, "snapshot_metadata() differs after stop()"
        state_machine.flush()
        state_machine.save_hard_state()

    def test_stop_and_start_keep_the_state(self, state_machine: StateMachine) -> None:
        """What was applied before ``stop`` exists after ``start``, and applying continues from there."""
        apply_commands(state_machine, PUT)
        before = state_of(state_machine)
        state_machine.stop()
        state_machine.start()
        assert state_of(state_machine) == before, "stop() and start() changed the state"
        assert apply_commands(state_machine, fastsm.delete(b"key")) == [True], "applying fails after start()"

    # ---- reads ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("value", [b"", b"\x00", b"value", b"value\x00", bytes(range(256)) * 300])
    def test_what_was_put_is_read(self, state_machine: StateMachine, value: bytes) -> None:
        """Any key and any value are returned byte for byte, as ``bytes``; an empty value is not an absent one."""
        for key in (b"", b"\x00", b"key", b"key\x00", b"\xff" * 300, b"k" * 65_535):
            apply_commands(state_machine, fastsm.put(key, value))
            found = state_machine.get(key)
            assert type(found) is bytes, f"get() gave a {type(found).__name__}, not bytes"
            assert found == value, "get() returned another value than was put"
            assert state_machine.get(key + b"?") is None, "a longer key has the value of this one"

    @pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
    def test_keys_are_any_bytes_like_object(self, state_machine: StateMachine, wrap: Callable[..., Any]) -> None:
        """``get`` takes bytes, bytearray and memoryview."""
        apply_commands(state_machine, PUT)
        assert state_machine.get(wrap(b"key")) == b"value", f"get() of a {wrap.__name__} did not find the key"

    def test_len_is_the_number_of_live_keys(self, state_machine: StateMachine) -> None:
        """``len`` counts keys that have a value: neither writes, nor deleted keys."""
        steps = [
            (fastsm.put(b"a", b"1"), 1),
            (fastsm.put(b"b", b""), 2),
            (fastsm.put(b"a", b"2"), 2),
            (fastsm.delete(b"a"), 1),
            (fastsm.delete(b"a"), 1),
            (fastsm.compare_and_swap(b"b", b"", None), 0),
            (fastsm.compare_and_swap(b"b", None, b"3"), 1),
            (fastsm.batch([fastsm.put(b"c", b""), fastsm.put(b"d", b""), fastsm.delete(b"b")]), 2),
        ]
        for command, expected in steps:
            apply_commands(state_machine, command)
            assert state_machine.len() == expected, f"len() is wrong after {fastsm.decode(command)}"
            assert len(state_machine) == expected, "len(machine) and machine.len() differ"
            assert state_machine.is_empty() is (expected == 0), "is_empty() does not follow len()"

    # ---- chunks -----------------------------------------------------------------------------------------

    def test_there_is_one_result_for_each_entry(self, state_machine: StateMachine) -> None:
        """The result is a list as long as the chunk: True, False for what did not match, None for a replay."""
        apply_commands(state_machine, PUT)
        results = apply_entries(
            state_machine,
            Entry(1, 1, PUT),
            Entry(2, 1, fastsm.compare_and_swap(b"key", b"other", b"")),
            Entry(3, 1, fastsm.delete(b"key")),
        )
        assert results == [None, False, True], "the results are not those of the entries"

    def test_entries_may_be_plain_tuples(self, state_machine: StateMachine) -> None:
        """A tuple ``(index, term, command)`` is accepted like an ``Entry``, in a list or in a tuple."""
        chunks = apply_chunks(state_machine, [(1, 1, PUT)], ((2, 1, PUT), Entry(3, 1, PUT)))
        assert chunks == [[True], [True, True]], "plain tuples are not applied like entries"
        assert state_machine.last_applied() == LogId(3, 1), "last_applied() is not the last of the tuples"

    def test_an_empty_chunk_changes_nothing(self, state_machine: StateMachine) -> None:
        """A chunk without entries gives no results and leaves the state as it was."""
        apply_commands(state_machine, PUT)
        before = state_of(state_machine)
        assert apply_entries(state_machine) == [], "the result of an empty chunk is not an empty list"
        assert state_of(state_machine) == before, "an empty chunk changed the state"

    def test_last_applied_is_the_last_entry_of_the_chunk(self, state_machine: StateMachine) -> None:
        """``last_applied`` is the id of the newest entry, whatever its command did."""
        apply_entries(state_machine, (1, 3, PUT), (2, 5, fastsm.compare_and_swap(b"key", None, b"")))
        assert state_machine.last_applied() == LogId(2, 5), "last_applied() is not the last entry's id"

    # ---- replay -----------------------------------------------------------------------------------------

    def test_replayed_entries_are_skipped(self, state_machine: StateMachine) -> None:
        """Entries at or below ``last_applied`` are not applied again, since a host may replay its log."""
        first, second = (1, 1, PUT), (2, 1, fastsm.put(b"key", b"newer"))
        apply_entries(state_machine, first, second)
        before = state_of(state_machine)
        assert apply_entries(state_machine, first) == [None], "the result of a replayed entry is not None"
        assert state_of(state_machine) == before, "a replayed entry was applied again"

    def test_a_chunk_may_begin_with_a_replay(self, state_machine: StateMachine) -> None:
        """Of a chunk that begins with known entries, the new ones are applied."""
        swap = (1, 1, fastsm.compare_and_swap(b"n", None, b"1"))
        apply_entries(state_machine, swap)
        results = apply_entries(state_machine, swap, (2, 1, fastsm.compare_and_swap(b"n", b"1", b"2")))
        assert results == [None, True], "the new entry after a replayed one did not take effect"
        assert state_machine.get(b"n") == b"2", "the value is not what the new entry set"

    def test_replayed_commands_are_not_looked_at(self, state_machine: StateMachine) -> None:
        """A replayed entry is skipped by its index, even if its command could not be decoded."""
        apply_commands(state_machine, PUT)
        assert apply_entries(state_machine, (1, 1, b"no command")) == [None], "a replayed command was decoded"

    def test_a_replay_of_another_term_is_an_order_error(self, state_machine: StateMachine) -> None:
        """A replayed entry with another known term belongs to another log: ``OrderError``, and nothing is applied."""
        apply_entries(state_machine, (1, 2, PUT))
        before = state_of(state_machine)
        for term in (1, 3):
            with pytest.raises(fastsm.OrderError):
                apply_entries(state_machine, (1, term, PUT), (2, 3, fastsm.delete(b"key")))
        assert state_of(state_machine) == before, "a part of a chunk of another log was applied"

    # ---- order ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "ids",
        [
            pytest.param([(4, 5)], id="a gap before the chunk"),
            pytest.param([(3, 5), (5, 5)], id="a gap in the chunk"),
            pytest.param([(3, 5), (3, 5)], id="an index twice"),
            pytest.param([(3, 5), (4, 5), (3, 5)], id="an index that falls"),
            pytest.param([(2, 5), (1, 5), (3, 5)], id="a replay out of order"),
            pytest.param([(3, 4)], id="a term below the last applied one"),
            pytest.param([(3, 6), (4, 5)], id="a term that falls in the chunk"),
        ],
    )
    def test_entries_out_of_order_are_refused(
        self, state_machine: StateMachine, ids: list[tuple[int, int]]
    ) -> None:
        """Indexes rise by one and terms never fall, otherwise it is an ``OrderError``, and nothing is applied."""
        apply_entries(state_machine, (1, 5, PUT), (2, 5, PUT))
        before = state_of(state_machine)
        with pytest.raises(fastsm.OrderError):
            apply_entries(state_machine, *((*log_id, fastsm.put(b"other", b"new")) for log_id in ids))
        assert state_of(state_machine) == before, "a part of a chunk out of order was applied"

    def test_it_goes_on_after_a_refused_chunk(self, state_machine: StateMachine) -> None:
        """After an error, the entries that should have come are applied as if there had been no error."""
        with pytest.raises(fastsm.OrderError):
            apply_entries(state_machine, (1, 1, PUT), (3, 1, PUT))
        with pytest.raises(fastsm.CommandError):
            apply_entries(state_machine, (1, 1, PUT), (2, 1, b""))
        assert apply_entries(state_machine, (1, 1, PUT), (2, 1, PUT)) == [True, True], (
            "entries of a refused chunk are not applied when they come again"
        )

    # ---- terms ------------------------------------------------------------------------------------------

    def test_terms_of_entries_seen_are_known(self, state_machine: StateMachine) -> None:
        """``entry_term`` returns the term of each applied entry, and None beyond them."""
        terms = [1, 1, 2, 2, 2, 7]
        apply_entries(state_machine, *((i, term, PUT) for i, term in enumerate(terms, 1)))
        found = [state_machine.entry_term(i) for i in range(1, 8)]
        assert found == [*terms, None], "entry_term() is not the term of each entry"

    def test_terms_between_equal_terms_are_certain(self, state_machine: StateMachine) -> None:
        """Terms never fall, so an index between two entries of one term has that term, seen or not."""
        apply_entries(state_machine, (1, 3, PUT))
        state_machine.update_last_applied(LogId(9, 3))
        found = [state_machine.entry_term(i) for i in range(1, 11)]
        assert found == [3] * 9 + [None], "the term between two entries of one term is unknown"

    def test_terms_between_different_terms_are_not_guessed(self, state_machine: StateMachine) -> None:
        """Between two entries of different terms, an unseen entry may have either, so the result is None."""
        apply_entries(state_machine, (1, 3, PUT))
        state_machine.update_last_applied(LogId(5, 4))
        found = [state_machine.entry_term(i) for i in range(1, 6)]
        assert found == [3, None, None, None, 4], "a term that is not certain was given, or a certain one was not"

    def test_terms_before_the_first_entry_seen_are_not_guessed(self, state_machine: StateMachine) -> None:
        """Nothing is known about entries before the first one that the state machine has seen."""
        state_machine.update_last_applied(LogId(5, 2))
        found = [state_machine.entry_term(i) for i in range(1, 7)]
        assert found == [None] * 4 + [2, None], "a term that is not certain was given"

    # ---- determinism ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("seed", range(3))
    def test_a_random_history_comes_to_what_a_dict_comes_to(
        self, state_machine: StateMachine, seed: int
    ) -> None:
        """Results, values and terms after 400 random entries are those of a plain dict."""
        history = History(seed, 400)
        results = [result for part in apply_chunks(state_machine, *history.chunks(9)) for result in part]
        assert results == history.results, "the results differ from those of a dict"
        found = {key: state_machine.get(key) for key in KEYS}
        assert found == {key: history.values.get(key) for key in KEYS}, "the values differ from those of a dict"
        assert state_machine.len() == len(history.values), "len() differs from that of a dict"
        terms = [state_machine.entry_term(entry.index) for entry in history.entries]
        assert terms == [entry.term for entry in history.entries], "the terms differ from those of the entries"

    @pytest.mark.parametrize("seed", range(3, 6))
    def test_chunk_sizes_and_replays_make_no_difference(self, state_machine: StateMachine, seed: int) -> None:
        """A history leads to one state, and the same results, however it is split and replayed."""
        history = History(seed, 200)
        outcomes = []
        for largest, replayed in ((1, 0), (200, 0), (12, 7)):
            parts = apply_chunks(state_machine, *history.chunks(largest, replayed=replayed))
            results = [result for part in parts for result in part if result is not None]
            outcomes.append((results, state_of(state_machine)))
            asyncio.run(state_machine.reset())
        assert outcomes[1] == outcomes[0], "one large chunk gives another result than single entries"
        assert outcomes[2] == outcomes[0], "chunks that replay give another result than single entries"
