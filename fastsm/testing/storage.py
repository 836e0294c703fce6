"""The rules of hard state: what is kept besides the keys, what is forgotten, and what survives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

import fastsm
from fastsm import LogId, SnapshotMetadata, StateMachine
from fastsm.testing.helpers import METADATA, PUT, apply_chunks, apply_commands, apply_entries, state_of
from fastsm.testing.histories import KEYS, History


class StorageRules:
    """Last applied, snapshot metadata, flush, reset; and with ``reopen``, what exists afterwards."""

    # ---- hard state -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("method", ["update_last_applied", "persist_last_applied"])
    def test_last_applied_moves_forward(self, state_machine: StateMachine, method: str) -> None:
        """A host may count an entry as applied without its command; a later replay of it is skipped."""
        apply_entries(state_machine, (1, 1, PUT))
        getattr(state_machine, method)(LogId(4, 2))
        assert state_machine.last_applied() == LogId(4, 2), f"{method}() did not move last_applied()"
        assert state_machine.len() == 1, f"{method}() changed the keys"
        results = apply_entries(state_machine, (4, 2, fastsm.delete(b"key")), (5, 2, fastsm.put(b"other", b"")))
        assert results == [None, True], "applying does not continue after the new last_applied()"
        assert state_machine.get(b"key") == b"value", "an entry that counted as applied was applied"

    @pytest.mark.parametrize("method", ["update_last_applied", "persist_last_applied"])
    def test_last_applied_as_it_is_changes_nothing(self, state_machine: StateMachine, method: str) -> None:
        """Setting ``last_applied`` to its present value does nothing, even before the first entry."""
        getattr(state_machine, method)(LogId(0, 0))
        apply_entries(state_machine, (1, 2, PUT))
        before = state_of(state_machine)
        getattr(state_machine, method)(LogId(1, 2))
        assert state_of(state_machine) == before, f"{method}() with the same id changed the state"

    @pytest.mark.parametrize("method", ["update_last_applied", "persist_last_applied"])
    @pytest.mark.parametrize(
        "log_id",
        [
            pytest.param((1, 2), id="back"),
            pytest.param((2, 3), id="another term at the same index"),
            pytest.param((2, 1), id="a lower term at the same index"),
            pytest.param((3, 1), id="forward in a lower term"),
        ],
    )
    def test_last_applied_never_goes_back(
        self, state_machine: StateMachine, method: str, log_id: tuple[int, int]
    ) -> None:
        """``last_applied`` moves only to higher indexes in terms that do not fall, otherwise ``OrderError``."""
        apply_entries(state_machine, (1, 2, PUT), (2, 2, PUT))
        before = state_of(state_machine)
        with pytest.raises(fastsm.OrderError):
            getattr(state_machine, method)(LogId(*log_id))
        assert state_of(state_machine) == before, f"{method}() raised, and changed the state"

    @pytest.mark.parametrize("method", ["update_last_snapshot_metadata", "persist_last_snapshot_metadata"])
    def test_snapshot_metadata_is_the_latest(self, state_machine: StateMachine, method: str) -> None:
        """``snapshot_metadata`` returns what was set last, and setting it changes nothing else."""
        apply_commands(state_machine, PUT, PUT)
        before = state_of(state_machine)
        newer = SnapshotMetadata(LogId(2, 1), b"\xff" * 32)
        for metadata in (METADATA, newer):
            getattr(state_machine, method)(metadata)
            assert state_machine.snapshot_metadata() == metadata, f"snapshot_metadata() is not what {method}() set"
        assert state_of(state_machine) == {**before, "snapshot_metadata": newer}, f"{method}() changed more"

    def test_flushing_changes_nothing_that_is_read(self, state_machine: StateMachine) -> None:
        """``flush``, ``flush_async`` and ``save_hard_state`` store data; what is read does not change."""
        apply_commands(state_machine, PUT)
        before = state_of(state_machine)
        state_machine.flush()
        asyncio.run(state_machine.flush_async())
        state_machine.save_hard_state()
        assert state_of(state_machine) == before, "a flush changed the state"

    def test_reset_forgets_everything(self, state_machine: StateMachine) -> None:
        """After ``reset`` the state machine is like new, and accepts another log from its first entry."""
        new = state_of(state_machine)
        apply_entries(state_machine, (1, 5, PUT), (2, 6, fastsm.config(b"members")))
        state_machine.update_last_snapshot_metadata(METADATA)
        asyncio.run(state_machine.reset())
        assert state_of(state_machine) == new, "something survived reset()"
        assert state_machine.is_running(), "reset() stopped a running state machine"
        results = apply_entries(state_machine, (1, 1, fastsm.compare_and_swap(b"key", None, b"")))
        assert results == [True], "after reset() a new log is not accepted from its first entry"

    def test_reset_of_a_stopped_one_leaves_it_stopped(self, state_machine: StateMachine) -> None:
        """``reset`` works after ``stop``, and does not start the state machine."""
        apply_commands(state_machine, PUT)
        state_machine.stop()
        asyncio.run(state_machine.reset())
        assert not state_machine.is_running(), "reset() started a stopped state machine"
        assert state_machine.last_applied() == LogId(0, 0), "reset() of a stopped state machine did nothing"

    # ---- durability -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("how", ["flush", "flush_async", "save_hard_state", "stop"])
    def test_what_was_made_durable_survives(
        self, state_machine: StateMachine, reopen: Callable[[StateMachine], StateMachine], how: str
    ) -> None:
        """After ``flush``, ``flush_async``, ``save_hard_state`` or ``stop``, what was applied survives."""
        history = History(how == "stop", 100)
        apply_chunks(state_machine, *history.chunks(9))
        last = history.entries[-1]
        state_machine.update_last_applied(LogId(last.index + 3, last.term))
        before = state_of(state_machine)
        done = getattr(state_machine, how)()
        if how == "flush_async":
            asyncio.run(done)
        reopened = reopen(state_machine)
        assert reopened.is_running(), "the reopened state machine does not run"
        assert state_of(reopened) == before, f"the state after {how}() did not survive"

    def test_a_replay_after_reopening_is_skipped(
        self, state_machine: StateMachine, reopen: Callable[[StateMachine], StateMachine]
    ) -> None:
        """After reopening, a host may replay its whole log: only new entries are applied."""
        history = History(7, 60)
        apply_chunks(state_machine, history.entries[:40])
        state_machine.flush()
        reopened = reopen(state_machine)
        results = apply_entries(reopened, *history.entries)
        assert results == [None] * 40 + list(history.results[40:]), "the replay was not skipped up to what is new"
        found = {key: reopened.get(key) for key in KEYS}
        assert found == {key: history.values.get(key) for key in KEYS}, "the values are not those of the history"

    def test_persisted_hard_state_survives(
        self, state_machine: StateMachine, reopen: Callable[[StateMachine], StateMachine]
    ) -> None:
        """``persist_last_applied`` and ``persist_last_snapshot_metadata`` are durable on return."""
        apply_commands(state_machine, PUT)
        state_machine.persist_last_applied(LogId(5, 3))
        reopened = reopen(state_machine)
        assert reopened.last_applied() == LogId(5, 3), "last_applied() is not what was persisted"
        assert reopened.entry_term(5) == 3, "the term of the entry that was persisted is not known"
        reopened.persist_last_snapshot_metadata(METADATA)
        assert reopen(reopened).snapshot_metadata() == METADATA, "snapshot_metadata() is not what was persisted"

    def test_save_hard_state_saves_the_snapshot_metadata(
        self, state_machine: StateMachine, reopen: Callable[[StateMachine], StateMachine]
    ) -> None:
        """``save_hard_state`` makes metadata durable that was only in memory."""
        apply_commands(state_machine, PUT)
        state_machine.update_last_snapshot_metadata(METADATA)
        state_machine.save_hard_state()
        assert reopen(state_machine).snapshot_metadata() == METADATA, "snapshot_metadata() is not what was saved"

    def test_reset_survives(
        self, state_machine: StateMachine, reopen: Callable[[StateMachine], StateMachine]
    ) -> None:
        """After ``reset``, nothing of the old state comes back, even after reopening."""
        new = state_of(state_machine)
        apply_commands(state_machine, PUT, PUT)
        state_machine.save_hard_state()
        asyncio.run(state_machine.reset())
        assert state_of(reopen(state_machine)) == new, "something of the state before reset() came back"
