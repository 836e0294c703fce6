"""The rules of features beyond the trait, for machines that have them: waits for entries, checksums of states."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import LogId, StateMachine
from fastsm.testing.helpers import PUT, apply_chunks, apply_commands, apply_entries
from fastsm.testing.histories import History

PATIENCE = 30  # seconds after which a wait counts as hanging


def method_of(machine: StateMachine, name: str) -> Any:
    """Returns a method beyond the trait; without it the test is skipped."""
    method = getattr(machine, name, None)
    if method is None:
        pytest.skip(f"{type(machine).__name__} has no {name}")
    return method


async def told(waiting: asyncio.Future[None]) -> BaseException | None:
    """Returns the error with which a wait ends, or None."""
    try:
        await asyncio.wait_for(waiting, PATIENCE)
    except asyncio.TimeoutError:
        pytest.fail("the wait did not end")
    except Exception as error:
        return error
    return None


class WaitingRules:
    """A wait ends with the entry, or with an error that says why it will not come."""

    def test_what_is_applied_is_not_waited_for(self, state_machine: StateMachine) -> None:
        """Waiting for an entry up to ``last_applied`` returns immediately."""
        wait_applied = method_of(state_machine, "wait_applied")
        apply_commands(state_machine, PUT, PUT)
        for index in range(3):
            wait_applied(index, timeout=0)

    def test_what_is_not_applied_in_time_is_a_timeout(self, state_machine: StateMachine) -> None:
        """``wait_applied`` raises ``TimeoutError`` if the entry is not applied in time."""
        wait_applied = method_of(state_machine, "wait_applied")
        apply_commands(state_machine, PUT)
        with pytest.raises(TimeoutError):
            wait_applied(2, timeout=0)

    def test_a_wait_ends_when_the_entry_is_applied(self, state_machine: StateMachine) -> None:
        """A coroutine that waits for an entry continues once it is applied, and not before."""
        wait = method_of(state_machine, "wait_applied_async")

        async def main() -> None:
            waiting = asyncio.ensure_future(wait(2))
            await asyncio.sleep(0)  # until it waits
            await state_machine.apply_chunk([(1, 1, PUT)])
            await asyncio.sleep(0.01)
            assert not waiting.done(), "the wait for entry 2 ended after entry 1"
            await state_machine.apply_chunk([(2, 1, PUT)])
            assert await told(waiting) is None

        asyncio.run(main())

    def test_a_stop_ends_a_wait(self, state_machine: StateMachine) -> None:
        """A caller that waits for an entry gets ``NotRunningError`` if the machine is stopped."""
        wait = method_of(state_machine, "wait_applied_async")

        async def main() -> None:
            waiting = asyncio.ensure_future(wait(1))
            await asyncio.sleep(0)
            state_machine.stop()
            assert isinstance(await told(waiting), fastsm.NotRunningError)

        asyncio.run(main())

    def test_a_reset_ends_a_wait(self, state_machine: StateMachine) -> None:
        """A caller that waits for an entry gets ``OrderError`` if the state is reset."""
        wait = method_of(state_machine, "wait_applied_async")

        async def main() -> None:
            waiting = asyncio.ensure_future(wait(1))
            await asyncio.sleep(0)
            await state_machine.reset()
            assert isinstance(await told(waiting), fastsm.OrderError)

        asyncio.run(main())

    def test_the_state_checksum_is_a_function_of_the_entries(self, state_machine: StateMachine) -> None:
        """Equal entries have equal state checksums, however they were split; another entry gives another checksum."""
        state_checksum = method_of(state_machine, "state_checksum")
        entries = History(17, 60).entries
        sums = []
        for size in (1, 7, 60):
            apply_chunks(state_machine, *(entries[first : first + size] for first in range(0, 60, size)))
            sums.append(state_checksum())
            asyncio.run(state_machine.reset())
        assert sums == sums[:1] * 3, "the checksums of one state differ"
        assert sums[0][0] == LogId(60, entries[-1].term), "the checksum belongs to another entry"
        apply_chunks(state_machine, entries[:-1])
        assert state_checksum()[1] != sums[0][1], "two states have one checksum"

    def test_the_state_checksum_writes_and_records_nothing(self, state_machine: StateMachine, tmp_path: Path) -> None:
        """The checksum can be as of any entry possible for a snapshot, and records no metadata."""
        state_checksum = method_of(state_machine, "state_checksum")
        apply_entries(state_machine, (1, 1, PUT), (2, 1, fastsm.delete(b"key")))
        before = state_checksum((1, 1))
        assert before[0] == LogId(1, 1)
        assert before[1] != state_checksum()[1], "an older state has the checksum of the present one"
        assert state_machine.snapshot_metadata() is None, "a checksum was recorded as a snapshot"
        with pytest.raises(fastsm.SnapshotRangeError):
            state_checksum((3, 1))
