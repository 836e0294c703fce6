"""State machines that are wrong about what survives and about snapshots.

pytest runs the suite on them when it is given this file by name; each class fails it somewhere.
"""

from __future__ import annotations

import time
from typing import Any

from fastsm import ChecksumMismatchError, LogId, MemoryStateMachine, NotRunningError, SnapshotFormatError
from fastsm.snapshot.model import State
from support.wrong_suites import StoringStateMachine, collect

found_by, suites = collect(beyond_the_trait=False)


# ---- what survives -------------------------------------------------------------------------------------


@found_by("what_was_made_durable_survives")
class FlushAsyncStoresNothing(StoringStateMachine):
    async def flush_async(self) -> None:
        if not self.is_running():
            raise NotRunningError("stopped")


@found_by("a_replay_after_reopening_is_skipped", "what_was_made_durable_survives")
class StoresNoTerms(StoringStateMachine):
    def _stored(self) -> dict[str, Any]:
        stored = super()._stored()
        stored["_state"].seen = []
        return stored


@found_by("persisted_hard_state_survives")
class PersistIsUpdate(StoringStateMachine):
    def persist_last_applied(self, log_id: Any) -> None:
        self.update_last_applied(log_id)


@found_by("save_hard_state_saves_the_snapshot_metadata", "persisted_hard_state_survives")
class StoresNoMetadata(StoringStateMachine):
    def _stored(self) -> dict[str, Any]:
        return {**super()._stored(), "_metadata": None}


@found_by("reset_survives")
class ResetInMemoryOnly(StoringStateMachine):
    def clear(self) -> None:
        MemoryStateMachine.clear(self)

# ---- snapshots -----------------------------------------------------------------------------------------


@found_by("the_checksum_is_that_of_the_metadata")
class SumsWithHalfAChecksum(MemoryStateMachine):
    async def generate_snapshot_data(self, new_snapshot_dir: Any, last_included: LogId) -> bytes:
        return (await super().generate_snapshot_data(new_snapshot_dir, last_included))[:16]


@found_by("the_checksum_is_that_of_the_metadata")
class RecordsNoSnapshot(MemoryStateMachine):
    def write_snapshot(self, *arguments: Any, **options: Any) -> Any:
        metadata, made = self._metadata, super().write_snapshot(*arguments, **options)
        self._metadata = metadata
        return made


@found_by("an_older_snapshot_is_not_recorded")
class RecordsEverySnapshot(MemoryStateMachine):
    def write_snapshot(self, *arguments: Any, **options: Any) -> Any:
        self._metadata = super().write_snapshot(*arguments, **options)
        return self._metadata


@found_by("writing_a_snapshot_changes_no_state")
class SnapshotMovesTheState(MemoryStateMachine):
    def write_snapshot(self, *arguments: Any, **options: Any) -> Any:
        self._state.values, values = {}, self._state.values
        try:
            return super().write_snapshot(*arguments, **options)
        finally:
            self._state.values = dict(list(values.items())[:-1])


@found_by("a_snapshot_is_exact_as_of_an_earlier_entry")
class SnapshotsWhatIsThereNow(MemoryStateMachine):
    def _state_as_of(self, last: LogId) -> State:
        state = super()._state_as_of(last)
        present = super()._state_as_of(self.last_applied())
        if state.seen:
            present.writers = {key: min(writer, last) for key, writer in present.writers.items()}
            state.values, state.writers = present.values, present.writers
        return state


@found_by("an_entry_without_a_command_may_be_the_last_included")
class SnapshotsKnowOnlyCommands(MemoryStateMachine):
    def _state_as_of(self, last: LogId) -> State:
        state = super()._state_as_of(last)
        state.seen = [outcome.log_id for outcome in self._outcomes if outcome.log_id.index <= last.index]
        return state


@found_by("installed_in_an_empty_one_the_state_is_equal")
class InstallForgetsTerms(MemoryStateMachine):
    def install_snapshot(self, *arguments: Any, **options: Any) -> None:
        super().install_snapshot(*arguments, **options)
        self._state.seen = self._state.seen[-1:]


@found_by("installed_in_an_empty_one_the_state_is_equal")
class InstallMerges(MemoryStateMachine):
    def install_snapshot(self, *arguments: Any, **options: Any) -> None:
        super().install_snapshot(*arguments, **options)
        self._metadata = None


@found_by("a_snapshot_that_cannot_be_exact_is_refused")
class RoundsDownToWhatWasApplied(MemoryStateMachine):
    def _state_as_of(self, last: LogId) -> State:
        return super()._state_as_of(min(last, self.last_applied()))


@found_by("a_snapshot_that_cannot_be_exact_is_refused")
class TakesAnyTerm(MemoryStateMachine):
    def _state_as_of(self, last: LogId) -> State:
        return super()._state_as_of(LogId(last.index, self.entry_term(last.index) or last.term))


@found_by("a_stale_snapshot_is_refused")
class InstallsOlderOnes(MemoryStateMachine):
    def install_snapshot(self, metadata: Any, path: Any, **options: Any) -> None:
        super().install_snapshot(metadata, path, allow_older=True)


@found_by("a_damaged_snapshot_is_refused")
class EmptiesItselfFirst(MemoryStateMachine):
    def install_snapshot(self, *arguments: Any, **options: Any) -> None:
        self._require()
        self._forget()
        super().install_snapshot(*arguments, **options)


@found_by("a_damaged_snapshot_is_refused")
class SkipsWhatIsDamaged(MemoryStateMachine):
    def install_snapshot(self, *arguments: Any, **options: Any) -> None:
        try:
            super().install_snapshot(*arguments, **options)
        except SnapshotFormatError:
            return


@found_by("another_snapshot_than_announced_is_refused")
class TakesTheFilesOwnWord(MemoryStateMachine):
    def install_snapshot(self, metadata: Any, path: Any, **options: Any) -> None:
        super().install_snapshot(None, path, **options)


@found_by("another_snapshot_than_announced_is_refused")
class ComparesNoChecksums(MemoryStateMachine):
    def install_snapshot(self, metadata: Any, path: Any, **options: Any) -> None:
        try:
            super().install_snapshot(metadata, path, **options)
        except ChecksumMismatchError:
            super().install_snapshot(None, path, **options)


@found_by("equal_states_have_equal_snapshots")
class SnapshotsCarryAClock(MemoryStateMachine):
    def write_snapshot(self, *arguments: Any, **options: Any) -> Any:
        return super().write_snapshot(*arguments, **{**options, "attachment": str(time.monotonic_ns()).encode()})


@found_by("equal_states_have_equal_snapshots")
class SnapshotsCountChunks(MemoryStateMachine):
    def _forget(self) -> None:
        super()._forget()
        self._chunks = 0

    def apply(self, chunk: Any) -> list[bool | None]:
        self._chunks += 1
        return super().apply(chunk)

    def write_snapshot(self, *arguments: Any, **options: Any) -> Any:
        return super().write_snapshot(*arguments, **{**options, "attachment": str(self._chunks).encode()})


@found_by("a_stopped_one_writes_and_installs_nothing")
class SnapshotsWhenStopped(MemoryStateMachine):
    def write_snapshot(self, *arguments: Any, **options: Any) -> Any:
        running, self._running = self._running, True
        try:
            return super().write_snapshot(*arguments, **options)
        finally:
            self._running = running


globals().update(suites())
