"""State machines that are wrong, each in one way, and the rules of the conformance suite that find it.

pytest runs the suite on them when it is given this file by name; each class fails it somewhere.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest

from fastsm import (
    ChecksumMismatchError,
    CommandError,
    Entry,
    FastsmError,
    LogId,
    MemoryStateMachine,
    NotRunningError,
    OrderError,
    SnapshotFormatError,
    noop,
)
from fastsm.memory_judging import Judge
from fastsm.memory_tx import Refused, Written
from fastsm.memory_waiting import Waiters
from fastsm.snapshot.model import State
from fastsm.testing import StateMachineConformance
from fastsm.testing.answers import AnswerRules
from fastsm.testing.calls import CallRules
from fastsm.testing.deadlines import DeadlineRules
from fastsm.testing.watching import WatchRules
from fastsm.types import Batch, CompareAndSwap, Config, Delete, Put

FAULTS: dict[str, set[str]] = {}  # the name of a wrong class, and tests that must fail
Wrong = type[MemoryStateMachine]
BEYOND_THE_TRAIT = (AnswerRules, CallRules, DeadlineRules, WatchRules)


def collect(*, beyond_the_trait: bool) -> tuple[Callable[..., Callable[[Wrong], Wrong]], Callable[[], dict[str, type]]]:
    """A decorator that notes wrong machines, and a function that gives the suites on those of this file.

    They are of the rules of the trait, or of those of answers, procedures, time and watches: all together take long.
    """
    noted: list[Wrong] = []

    def found_by(*tests: str) -> Callable[[Wrong], Wrong]:
        def note(wrong: Wrong) -> Wrong:
            FAULTS[wrong.__name__] = {f"test_{test}" for test in tests}
            noted.append(wrong)
            return wrong

        return note

    return found_by, lambda: {f"Test{wrong.__name__}": suite_on(wrong, beyond_the_trait) for wrong in noted}


found_by, suites = collect(beyond_the_trait=False)


class StoringStateMachine(MemoryStateMachine):
    """The model with something like a disk, which outlives it. This one is right."""

    def __init__(self, **options: Any) -> None:
        self._disk: dict[str, Any] = {}
        super().__init__(**options)

    def flush(self) -> None:
        super().flush()
        self._disk.update(self._stored())

    def _stored(self) -> dict[str, Any]:
        stored = {name: getattr(self, name).copy() for name in ("_state", "_outcomes", "_base")}
        return {**stored, "_metadata": self._metadata}

    def clear(self) -> None:
        super().clear()
        self.flush()

    def reopen(self) -> StoringStateMachine:
        again = type(self)()
        again._disk = self._disk
        for name, value in self._disk.items():
            setattr(again, name, value.copy() if isinstance(value, (State, list)) else value)
        return again


# ---- life cycle ----------------------------------------------------------------------------------------


@found_by("an_empty_state_machine_holds_nothing")
class StartsAtTermOne(MemoryStateMachine):
    def last_applied(self) -> LogId:
        return super().last_applied() if self._state.seen else LogId(0, 1)


@found_by("a_state_machine_is_true_however_empty")
class FalseWhenEmpty(MemoryStateMachine):
    def __bool__(self) -> bool:
        return self.len() > 0


@found_by("it_runs_from_construction_until_stop", "a_stopped_state_machine_refuses")
class StopDoesNotStop(MemoryStateMachine):
    def stop(self) -> None:
        self.flush()


@found_by("start_and_stop_may_be_repeated")
class SecondStopStarts(MemoryStateMachine):
    def stop(self) -> None:
        self._running = not self._running


@found_by("a_stopped_state_machine_refuses")
class AppliesWhenStopped(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        running, self._running = self._running, True
        try:
            return super().apply(chunk)
        finally:
            self._running = running


@found_by("a_stopped_state_machine_still_tells_where_it_is")
class TellsNothingWhenStopped(MemoryStateMachine):
    def entry_term(self, entry_id: int) -> int | None:
        self._require()
        return super().entry_term(entry_id)


@found_by("stop_and_start_keep_the_state", "a_stopped_state_machine_still_tells_where_it_is")
class StopForgets(MemoryStateMachine):
    def stop(self) -> None:
        super().stop()
        self._forget()


# ---- reads ---------------------------------------------------------------------------------------------


@found_by("what_was_put_is_read")
class EmptyValuesAreAbsent(MemoryStateMachine):
    def get(self, key: Any) -> bytes | None:
        return super().get(key) or None


@found_by("what_was_put_is_read")
class StripsTrailingNuls(MemoryStateMachine):
    def get(self, key: Any) -> bytes | None:
        value = super().get(key)
        return None if value is None else value.rstrip(b"\x00")


@found_by("keys_are_any_bytes_like_object")
class KeysAreBytesOnly(MemoryStateMachine):
    def get(self, key: Any) -> bytes | None:
        return super().get(key) if isinstance(key, bytes) else None


@found_by("len_is_the_number_of_live_keys")
class LenCountsDeletedKeys(MemoryStateMachine):
    def _forget(self) -> None:
        super()._forget()
        self._ever: set[bytes] = set()

    def apply(self, chunk: Any) -> list[bool | None]:
        results = super().apply(chunk)
        self._ever |= self._state.values.keys()
        return results

    def len(self) -> int:
        return len(self._ever)


# ---- chunks, replay, order -----------------------------------------------------------------------------


@found_by("a_command_that_is_none_fails_its_chunk", "entries_out_of_order_are_refused")
class AppliesUpToTheError(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        try:
            return super().apply(chunk)
        except FastsmError:
            for entry in chunk:
                super().apply([entry])
            raise


@found_by("it_goes_on_after_a_refused_chunk")
class StopsAtAnError(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        try:
            return super().apply(chunk)
        except FastsmError:
            self.stop()
            raise


@found_by("there_is_one_result_for_each_entry")
class NoResultsForReplays(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        return [result for result in super().apply(chunk) if result is not None]


@found_by("there_is_one_result_for_each_entry")
class ResultsAreNeverFalse(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        return [result is not None or None for result in super().apply(chunk)]


@found_by("entries_may_be_plain_tuples")
class WantsEntries(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        if isinstance(chunk, list) and chunk and not isinstance(chunk[0], Entry):
            raise TypeError("expected an Entry")
        return super().apply(chunk)


@found_by("an_empty_chunk_changes_nothing")
class LooksAtTheFirstEntry(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        return super().apply(chunk) if chunk[0] else []


@found_by("last_applied_is_the_last_entry_of_the_chunk")
class LastAppliedIsTheFirst(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        results = super().apply(chunk)
        if len(chunk) > 1:
            self._state.seen[-1] = LogId(self._state.seen[-1].index, chunk[0][1])
        return results


@found_by("replayed_entries_are_skipped")
class AppliesReplaysAgain(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        results = super().apply(chunk)
        for result, entry in zip(results, chunk, strict=True):
            if result is None:
                other = MemoryStateMachine(contiguous=False)
                other._state.values = self._state.values
                other.apply([entry])
                self._state.values = other._state.values
        return results


@found_by("replayed_entries_are_skipped", "there_is_one_result_for_each_entry")
class RefusesReplays(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        if any(entry[0] <= self.last_applied().index for entry in chunk):
            raise OrderError("applied already")
        return super().apply(chunk)


@found_by("a_chunk_may_begin_with_a_replay")
class SkipsAChunkThatBeginsWithAReplay(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        if chunk and chunk[0][0] <= self.last_applied().index:
            return [None] * len(self._check(chunk)[0])
        return super().apply(chunk)


@found_by("replayed_commands_are_not_looked_at")
class DecodesReplays(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        if any(entry[2] == b"no command" for entry in chunk):
            raise CommandError("no command")
        return super().apply(chunk)


@found_by("a_replay_of_another_term_is_an_order_error")
class IgnoresTheTermOfReplays(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        known = [self.entry_term(entry[0]) for entry in chunk]
        return super().apply(
            [(e[0], e[1] if term is None else term, e[2]) for term, e in zip(known, chunk, strict=True)]
        )


@found_by("entries_out_of_order_are_refused")
class AcceptsGaps(MemoryStateMachine):
    def __init__(self, **options: Any) -> None:
        super().__init__(contiguous=False, **options)


@found_by("entries_out_of_order_are_refused")
class AcceptsTermsThatFall(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        if len(chunk) == 1 and chunk[0][1] < self.last_applied().term:
            chunk = [(chunk[0][0], self.last_applied().term, chunk[0][2])]
        return super().apply(chunk)


# ---- commands ------------------------------------------------------------------------------------------


@found_by("a_later_put_wins", "put_many_is_a_batch_of_puts")
class FirstPutWins(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            if isinstance(command, Put):
                if command.key not in written.state.values:
                    super().do(command, written)
                return True
            return super().do(command, written)


@found_by("a_delete_removes_the_key")
class DeleteOfNothingIsFalse(MemoryStateMachine):
    class _judges(Judge):
        def judge(self, command: Any, written: Written) -> Any:
            missing = isinstance(command, Delete) and command.key not in written.state.values
            return super().judge(command, written) and not missing


@found_by("compare_and_swap_sets_what_it_matches")
class AbsentEqualsEmpty(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            found = written.state.values.get(getattr(command, "key", b""))
            if isinstance(command, CompareAndSwap) and not command.expected and not found:
                command = CompareAndSwap(command.key, found, command.value)
            return super().do(command, written)


@found_by("compare_and_swap_sets_what_it_matches")
class ComparesPrefixes(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            if isinstance(command, CompareAndSwap) and command.expected and command.key in written.state.values:
                found = written.state.values[command.key]
                if found.startswith(command.expected):
                    command = CompareAndSwap(command.key, found, command.value)
            return super().do(command, written)


@found_by("compare_and_swap_sets_what_it_matches")
class SwapToNothingStoresEmpty(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            if isinstance(command, CompareAndSwap) and command.value is None:
                command = CompareAndSwap(command.key, command.expected, b"")
            return super().do(command, written)


@found_by("an_entry_sees_those_before_it_in_its_chunk", "chunk_sizes_and_replays_make_no_difference")
class JudgesByTheStateBeforeTheChunk(MemoryStateMachine):
    class _judges(Judge):
        before: Any = None

        def do(self, command: Any, written: Written) -> Any:
            if isinstance(command, CompareAndSwap) and self.before.get(command.key) != command.expected:
                raise Refused("mismatch")
            return super().do(command, written)

    def apply(self, chunk: Any) -> list[bool | None]:
        self._judge.before = self._state.values
        return super().apply(chunk)


@found_by("a_batch_is_done_whole_or_not_at_all", "a_random_history_comes_to_what_a_dict_comes_to")
class BatchStopsHalfWay(MemoryStateMachine):
    class _judges(Judge):
        def judge(self, command: Any, written: Written) -> Any:
            if isinstance(command, Batch):
                try:
                    return all(self.do(member, written) for member in command.commands)
                except Refused:
                    return False
            return super().judge(command, written)


@found_by("a_batch_does_its_commands_in_order")
class BatchMembersDoNotSeeEachOther(MemoryStateMachine):
    class _judges(Judge):
        def judge(self, command: Any, written: Written) -> Any:
            if isinstance(command, Batch):
                for member in command.commands:
                    if isinstance(member, CompareAndSwap) and written.state.values.get(member.key) != member.expected:
                        return False
            return super().judge(command, written)


@found_by("an_empty_batch_takes_effect")
class EmptyBatchIsFalse(MemoryStateMachine):
    class _judges(Judge):
        def judge(self, command: Any, written: Written) -> Any:
            return super().judge(command, written) and command != Batch(())


@found_by("noop_and_config_touch_no_key")
class NoopDoesNotCount(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        return [] if [entry[2] for entry in chunk] == [noop()] else super().apply(chunk)


@found_by("noop_and_config_touch_no_key")
class ConfigIsAKey(MemoryStateMachine):
    class _judges(Judge):
        def judge(self, command: Any, written: Written) -> Any:
            if isinstance(command, Config):
                written.put(b"config", command.data)
            return super().judge(command, written)


@found_by("a_command_that_is_none_fails_its_chunk")
class SkipsWhatItDoesNotUnderstand(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        try:
            return super().apply(chunk)
        except CommandError as error:
            return self.apply([(i, t, noop() if i == error.index else c) for i, t, c in chunk])


@found_by("a_command_that_is_none_fails_its_chunk")
class DoesNotNameTheEntry(MemoryStateMachine):
    def apply(self, chunk: Any) -> list[bool | None]:
        try:
            return super().apply(chunk)
        except CommandError as error:
            raise type(error)(str(error)) from None


# ---- terms ---------------------------------------------------------------------------------------------


@found_by("terms_of_entries_seen_are_known", "a_random_history_comes_to_what_a_dict_comes_to")
class EveryEntryHasTheLastTerm(MemoryStateMachine):
    def entry_term(self, entry_id: int) -> int | None:
        return self._state.seen[-1].term if super().entry_term(entry_id) is not None else None


@found_by("terms_between_equal_terms_are_certain")
class KnowsOnlyWhatItSaw(MemoryStateMachine):
    def entry_term(self, entry_id: int) -> int | None:
        return dict(self._state.seen).get(entry_id)


@found_by("terms_between_different_terms_are_not_guessed")
class TakesTheTermBefore(MemoryStateMachine):
    def entry_term(self, entry_id: int) -> int | None:
        below = [seen.term for seen in self._state.seen if seen.index <= entry_id <= self._state.seen[-1].index]
        return below[-1] if below else None


@found_by("terms_before_the_first_entry_seen_are_not_guessed")
class TakesTheTermOfTheFirst(MemoryStateMachine):
    def entry_term(self, entry_id: int) -> int | None:
        if self._state.seen and 0 < entry_id < self._state.seen[0].index:
            return self._state.seen[0].term
        return super().entry_term(entry_id)


# ---- hard state ----------------------------------------------------------------------------------------


@found_by("last_applied_never_goes_back")
class LastAppliedGoesBack(MemoryStateMachine):
    def update_last_applied(self, log_id: Any) -> None:
        while self._state.seen and self._state.seen[-1].index > log_id[0]:
            self._state.seen.pop()
        super().update_last_applied(log_id)


@found_by("last_applied_never_goes_back")
class LastAppliedTakesAnyTerm(MemoryStateMachine):
    def update_last_applied(self, log_id: Any) -> None:
        self._require()
        if log_id[0] >= self.last_applied().index:
            self._state.seen[-1:] = [LogId(*log_id)]


@found_by("last_applied_moves_forward")
class UpdateDoesNothing(MemoryStateMachine):
    def update_last_applied(self, log_id: Any) -> None:
        self._require()


@found_by("last_applied_as_it_is_changes_nothing")
class UpdateToTheSameIsAnError(MemoryStateMachine):
    def update_last_applied(self, log_id: Any) -> None:
        if LogId(*log_id) == self.last_applied():
            raise OrderError("it is that already")
        super().update_last_applied(log_id)


@found_by("snapshot_metadata_is_the_latest")
class KeepsTheFirstMetadata(MemoryStateMachine):
    def update_last_snapshot_metadata(self, metadata: Any) -> None:
        super().update_last_snapshot_metadata(self._metadata or metadata)


@found_by("flushing_changes_nothing_that_is_read")
class FlushForgetsTerms(MemoryStateMachine):
    def flush(self) -> None:
        super().flush()
        self._state.seen = [LogId(seen.index, self._state.seen[-1].term + 1) for seen in self._state.seen]


@found_by("reset_forgets_everything")
class ResetKeepsLastApplied(MemoryStateMachine):
    def clear(self) -> None:
        seen = self._state.seen
        super().clear()
        self._state.seen = seen


@found_by("reset_forgets_everything")
class ResetKeepsMetadata(MemoryStateMachine):
    def clear(self) -> None:
        metadata = self._metadata
        super().clear()
        self._metadata = metadata


@found_by("reset_of_a_stopped_one_leaves_it_stopped")
class ResetStarts(MemoryStateMachine):
    def clear(self) -> None:
        super().clear()
        self._running = True


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


# ---- beyond the trait ----------------------------------------------------------------------------------


@found_by("what_is_applied_is_not_waited_for")
class WaitsForTheNextEntry(MemoryStateMachine):
    def wait_applied(self, index: int, timeout: float | None = None) -> None:
        super().wait_applied(index + 1, timeout)


@found_by("what_is_not_applied_in_time_is_a_timeout")
class TimesOutInSilence(MemoryStateMachine):
    def wait_applied(self, index: int, timeout: float | None = None) -> None:
        with contextlib.suppress(TimeoutError):
            super().wait_applied(index, timeout)


@found_by("a_wait_ends_when_the_entry_is_applied")
class EndsWaitsWithAnyEntry(MemoryStateMachine):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._waiters = Waiters(lambda: 99 if self.last_applied().index else 0)


@found_by("a_stop_ends_a_wait", "a_reset_ends_a_wait")
class EndsWaitsAsIfApplied(MemoryStateMachine):
    class Deaf(Waiters):
        def end(self, error: Any) -> None:
            for waiting in self.waiting:
                waiting.tell()

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._waiters = self.Deaf(lambda: self.last_applied().index)


@found_by("the_state_checksum_is_a_function_of_the_entries")
class ChecksumsCountChunks(MemoryStateMachine):
    chunks = 0

    def apply(self, chunk: Any) -> list[bool | None]:
        self.chunks += 1
        return super().apply(chunk)

    def state_checksum(self, last_included: Any = None) -> Any:
        log_id, checksum = super().state_checksum(last_included)
        return log_id, checksum + bytes([self.chunks % 256])


@found_by("the_state_checksum_writes_and_records_nothing")
class ChecksumsOfThePresentOnly(MemoryStateMachine):
    def state_checksum(self, last_included: Any = None) -> Any:
        log_id, _ = super().state_checksum(last_included)
        return log_id, super().state_checksum()[1]


@found_by("a_scan_gives_the_range_in_order")
class ScansTheEndToo(MemoryStateMachine):
    def scan(self, start: Any = None, end: Any = None, **options: Any) -> Any:
        return super().scan(start, None if end is None else end + b"\x00", **options)


@found_by("a_scan_gives_the_range_in_order", "ordered_stays_at_its_moment")
class SortsByLength(MemoryStateMachine):
    def _range(self, start: Any, end: Any, prefix: Any, reverse: bool = False) -> Any:
        found = super()._range(start, end, prefix)
        return sorted(found, key=lambda pair: (len(pair[0]), pair), reverse=bool(reverse))


@found_by("a_limit_cuts_a_scan")
class TakesAnyLimit(MemoryStateMachine):
    def scan(self, *bounds: Any, limit: Any = None, **options: Any) -> Any:
        return super().scan(*bounds, limit=None if limit is None or limit < 0 else limit, **options)


@found_by("a_prefix_is_scanned_in_pages")
class StartsAtTheLastKeyAgain(MemoryStateMachine):
    def scan_prefix(self, prefix: Any, *, limit: Any = None, start_after: Any = None) -> Any:
        if start_after is None:
            return super().scan_prefix(prefix, limit=limit)
        return super().scan_prefix(prefix, limit=limit, start_after=start_after + b"\x00")


@found_by("a_count_is_that_of_the_scan")
class CountsAllKeys(MemoryStateMachine):
    def count(self, *bounds: Any, **options: Any) -> int:
        super().count(*bounds, **options)
        return self.len()


@found_by("ordered_stays_at_its_moment")
class OrderedIsAtTheFirstStep(MemoryStateMachine):
    def ordered(self, *bounds: Any, **options: Any) -> Any:
        self._require()
        return (pair for _ in (0,) for pair in self._range(*(bounds or (None, None)), None, **options))


@found_by("a_stopped_one_reads_nothing_in_order")
class ScansWhenStopped(MemoryStateMachine):
    def scan(self, *bounds: Any, **options: Any) -> Any:
        running, self._running = self._running, True
        try:
            return super().scan(*bounds, **options)
        finally:
            self._running = running


@found_by("ordered_reads_follow_a_random_history")
class ScansEmptyValuesNot(MemoryStateMachine):
    def _range(self, *bounds: Any, **options: Any) -> Any:
        return [pair for pair in super()._range(*bounds, **options) if pair[1]]


def suite_on(wrong: Wrong, beyond_the_trait: bool) -> type:
    """The suite, or that part of it, as a class that pytest collects."""

    class Suite(StateMachineConformance):
        @pytest.fixture
        def state_machine(self) -> MemoryStateMachine:
            return wrong()

        @pytest.fixture
        def with_procedures(self) -> Any:
            return lambda procedures: wrong(procedures=procedures)

    def reopen(self: object) -> Callable[[StoringStateMachine], StoringStateMachine]:
        return lambda machine: machine.reopen()

    for name in dir(StateMachineConformance):
        if name.startswith("test_") and beyond_the_trait != any(hasattr(rules, name) for rules in BEYOND_THE_TRAIT):
            setattr(Suite, name, None)
    if issubclass(wrong, StoringStateMachine):
        Suite.reopen = pytest.fixture(reopen)  # type: ignore[method-assign]
    Suite.__name__ = Suite.__qualname__ = f"Test{wrong.__name__}"
    return Suite


globals().update(suites())
