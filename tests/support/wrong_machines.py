"""State machines that are wrong about the life cycle, reads, chunks, commands, terms or hard state.

pytest runs the suite on them when it is given this file by name; each class fails it somewhere.
"""

from __future__ import annotations

from typing import Any

from fastsm import (
    CommandError,
    Entry,
    FastsmError,
    LogId,
    MemoryStateMachine,
    OrderError,
    noop,
)
from fastsm.model.judging import Judge
from fastsm.model.tx import Refused, Written
from fastsm.types import Batch, CompareAndSwap, Config, Delete, Put
from support.wrong_suites import collect

found_by, suites = collect(beyond_the_trait=False)


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


globals().update(suites())
