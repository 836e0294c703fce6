"""State machines that are wrong about answers, sessions, procedures or time.

pytest runs the suite on them if it is given this file by name; each class fails at least one test.
"""

from __future__ import annotations

import struct
from typing import Any

from fastsm import Answer, MemoryStateMachine
from fastsm.model.judging import Judge
from fastsm.model.tx import Refused, Tx, Written
from fastsm.snapshot.model import State
from fastsm.types import (
    Add,
    Batch,
    Call,
    CompareAndSwap,
    DeleteRange,
    Forget,
    Once,
    Put,
    Read,
    Tick,
    Touch,
    Transaction,
)
from support.wrong_suites import StoringStateMachine, collect

found_by, suites = collect(beyond_the_trait=True)


# ---- commands that answer ------------------------------------------------------------------------------

@found_by("an_addition_answers_the_sum")
class AddsToInitialAlways(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            if isinstance(command, Add) and written.state.values.get(command.key) is not None:
                return super().do(Add(command.key, command.delta + command.initial, 0), written)
            return super().do(command, written)


@found_by("what_is_no_number_is_not_added_to", "random_answers_are_those_of_a_dict")
class ReadsNumbersAsPythonDoes(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            if isinstance(command, Add):
                try:
                    number = int(written.state.values.get(command.key, b"x"))
                except ValueError:
                    return super().do(command, written)
                written.put(command.key, b"%d" % number)
            return super().do(command, written)


@found_by("a_sum_beyond_64_bits_is_refused")
class SumsAreOfAnySize(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            try:
                return super().do(command, written)
            except Refused as refused:
                if refused.reason != "overflow":
                    raise
                return 0


@found_by("a_read_answers_what_is_there_at_its_place")
class ReadsBeforeTheChunk(MemoryStateMachine):
    class _judges(Judge):
        before: Any = None

        def do(self, command: Any, written: Written) -> Any:
            return self.before.get(command.key) if isinstance(command, Read) else super().do(command, written)

    def apply(self, chunk: Any) -> Any:
        self._judge.before = self._state.values
        return super().apply(chunk)


@found_by("a_range_is_removed_and_counted")
class RemovesTheEndToo(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            if isinstance(command, DeleteRange) and command.end is not None:
                command = DeleteRange(command.start, command.end + b"\x00")
            return super().do(command, written)


@found_by("a_transaction_takes_one_of_two_branches")
class OneConditionIsEnough(MemoryStateMachine):
    class _judges(Judge):
        def judge(self, command: Any, written: Written) -> Any:
            if isinstance(command, Transaction):
                command = Transaction(command.conditions[-1:], command.then, command.otherwise)
            return super().judge(command, written)


@found_by("an_entry_that_cannot_be_done_changes_nothing", "random_answers_are_those_of_a_dict")
class RefusesHalfWay(MemoryStateMachine):
    class _judges(Judge):
        def judge(self, command: Any, written: Written) -> Any:
            if isinstance(command, (Batch, Transaction)):
                written.take_back = lambda: None  # type: ignore[method-assign]
            return super().judge(command, written)


@found_by("a_batch_answers_for_each_of_its_commands")
class BatchesAnswerTrue(MemoryStateMachine):
    class _judges(Judge):
        def judge(self, command: Any, written: Written) -> Any:
            answer = super().judge(command, written)
            return bool(answer) if isinstance(command, Batch) else answer


# ---- sessions ------------------------------------------------------------------------------------------

@found_by("a_repetition_gives_the_first_answer")
class DoesEverythingAgain(MemoryStateMachine):
    class _judges(Judge):
        def judge(self, command: Any, written: Written) -> Any:
            if isinstance(command, Once) and command.session in written.state.sessions:
                return super().judge(command.command, written)
            return super().judge(command, written)


@found_by("a_refusal_is_remembered")
class RemembersSuccessOnly(MemoryStateMachine):
    class _judges(Judge):
        def judge(self, command: Any, written: Written) -> Any:
            before = dict(written.state.sessions)
            answer = super().judge(command, written)
            if isinstance(command, Once) and not answer:
                written.state.sessions = before
            return answer


@found_by("what_may_have_been_done_is_not_done_again")
class TakesAnyNewSequence(MemoryStateMachine):
    class _judges(Judge):
        def judge(self, command: Any, written: Written) -> Any:
            known = written.state.sessions.get(command.session) if isinstance(command, Once) else None
            if known is not None and command.sequence < struct.unpack_from("<Q", known)[0]:
                return super().judge(command.command, written)
            return super().judge(command, written)


@found_by("sessions_are_no_keys")
class CountsSessions(MemoryStateMachine):
    def len(self) -> int:
        return super().len() + len(self._state.sessions)


@found_by("sessions_are_no_keys")
class ResetKeepsSessions(MemoryStateMachine):
    def clear(self) -> None:
        state = self._state
        super().clear()
        self._state.sessions = {number + 1: value for number, value in state.sessions.items()} | state.sessions


@found_by("sessions_are_in_a_snapshot")
class SnapshotsTheSessionsOfNow(MemoryStateMachine):
    def _state_as_of(self, last: Any) -> State:
        state = super()._state_as_of(last)
        state.sessions = {number: self._state.sessions.get(number, value) for number, value in state.sessions.items()}
        return state


@found_by("sessions_survive")
class StoresNoSessions(StoringStateMachine):
    def _stored(self) -> dict[str, Any]:
        stored = super()._stored()
        stored["_state"].sessions = {}
        return stored


# ---- procedures ----------------------------------------------------------------------------------------

@found_by("a_procedure_sees_its_place_in_the_log")
class TxReadsTheStateBeforeTheEntry(MemoryStateMachine):
    class _judges(Judge):
        def _call(self, command: Call, written: Written) -> Answer:
            before = written.state.copy()
            get, Tx.get = Tx.get, lambda tx, key: before.values.get(key)  # type: ignore[method-assign, assignment]
            try:
                return super()._call(command, written)
            finally:
                Tx.get = get  # type: ignore[method-assign]


@found_by("a_procedure_that_raises_has_no_effect")
class KeepsWhatAbortsWrote(MemoryStateMachine):
    class _judges(Judge):
        def _call(self, command: Call, written: Written) -> Answer:
            written.take_back = lambda: None  # type: ignore[method-assign]
            return super()._call(command, written)


@found_by("the_trouble_of_a_replica_is_no_answer")
class AnswersItsTrouble(MemoryStateMachine):
    class _judges(Judge):
        def _call(self, command: Call, written: Written) -> Answer:
            try:
                return super()._call(command, written)
            except Exception:
                return Answer(False, None, "failed")


@found_by("an_unknown_procedure_fails_its_chunk_first")
class LooksForProceduresLate(MemoryStateMachine):
    def apply(self, chunk: Any) -> Any:
        for entry in chunk:
            super().apply([entry])
        return []


@found_by("a_procedure_has_nothing_but_its_tx")
class ProceduresCallAnything(MemoryStateMachine):
    class _judges(Judge):
        def is_calling(self) -> bool:
            return False


@found_by("a_procedure_reads_the_clock_of_the_log")
class TxHasNoClock(MemoryStateMachine):
    class _judges(Judge):
        def _call(self, command: Call, written: Written) -> Answer:
            clock, written.state.clock = written.state.clock, 0
            try:
                return super()._call(command, written)
            finally:
                written.state.clock = clock


# ---- time ----------------------------------------------------------------------------------------------

@found_by("the_clock_never_goes_back")
class SetsItsClockBack(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            if isinstance(command, Tick):
                written.state.clock = 0
            return super().do(command, written)


@found_by("a_key_lives_until_a_tick_at_its_deadline")
class ReadsLookAtTheClock(MemoryStateMachine):
    def get(self, key: Any, /) -> bytes | None:
        expires = self._state.deadline(bytes(key))
        return super().get(key) if expires is None or expires > self._state.clock else None


@found_by("a_key_lives_until_a_tick_at_its_deadline", "random_times_are_those_of_a_dict")
class ADeadlineLastsOneLonger(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            if isinstance(command, Tick):
                now = max(command.now, written.state.clock)
                written.tick(now, 0)
                written.state.clock -= 1
                try:
                    return written.tick(0, command.limit)
                finally:
                    written.state.clock += 1
            return super().do(command, written)


@found_by("a_tick_of_an_earlier_time_removes_what_is_due")
class ALateTickDoesNothing(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            if isinstance(command, Tick) and command.now < written.state.clock:
                return 0
            return super().do(command, written)


@found_by("a_write_sets_the_deadline_anew")
class DeadlinesSurviveOverwrites(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            if isinstance(command, Put) and command.expires is None:
                command = Put(command.key, command.value, written.state.deadline(command.key))
            return super().do(command, written)


@found_by("a_write_sets_the_deadline_anew")
class AnAddIsAPut(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            answer = super().do(command, written)
            if isinstance(command, Add):
                written.touch(command.key, None)
            return answer


@found_by("a_write_sets_the_deadline_anew")
class SwapsHaveNoDeadline(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            if isinstance(command, CompareAndSwap):
                command = CompareAndSwap(command.key, command.expected, command.value)
            return super().do(command, written)


@found_by("a_touch_changes_the_deadline_alone")
class ATouchIsAPut(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            if isinstance(command, Touch) and command.key in written.state.values:
                written.put(command.key, written.state.values[command.key], command.expires)
                return True
            return super().do(command, written)


@found_by("a_tick_takes_the_earliest_first")
class TakesDueKeysByHash(MemoryStateMachine):
    class Unsorted(State):
        def deadlines_of_keys(self) -> list[tuple[int, bytes]]:
            return sorted(super().deadlines_of_keys(), key=lambda due: (due[0], due[1][::-1]))

    def _forget(self) -> None:
        super()._forget()
        self._state.__class__ = self.Unsorted

    def apply(self, chunk: Any) -> Any:
        results = super().apply(chunk)
        self._state.__class__ = self.Unsorted
        return results

    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            written.state.__class__ = TakesDueKeysByHash.Unsorted
            return super().do(command, written)


@found_by("a_tick_takes_the_earliest_first")
class TicksHaveNoLimit(MemoryStateMachine):
    class _judges(Judge):
        def do(self, command: Any, written: Written) -> Any:
            return super().do(Tick(command.now, None) if isinstance(command, Tick) else command, written)


@found_by("the_next_deadline_is_the_earliest")
class ForgetsSessionsInTheNextDeadline(MemoryStateMachine):
    def next_deadline(self) -> int | None:
        self._require()
        return min((expires for expires, _ in self._state.deadlines_of_keys()), default=None)


@found_by("a_session_lives_until_a_tick")
class RepetitionsKeepASessionAlive(MemoryStateMachine):
    class _judges(Judge):
        def judge(self, command: Any, written: Written) -> Any:
            answer = super().judge(command, written)
            if isinstance(command, Once) and command.expires is not None:
                known = written.state.sessions.get(command.session)
                if known is not None:
                    written.remember(command.session, known[:8] + struct.pack("<Q", command.expires) + known[16:])
            return answer


@found_by("a_session_lives_until_a_tick")
class SessionsAreForEver(MemoryStateMachine):
    class _judges(Judge):
        def judge(self, command: Any, written: Written) -> Any:
            sessions = dict(written.state.sessions)
            answer = super().judge(command, written)
            if isinstance(command, Tick):
                written.state.sessions = sessions
            elif isinstance(command, Forget):
                sessions.pop(command.session, None)
            return answer


@found_by("a_stopped_one_tells_no_time")
class TellsTheTimeWhenStopped(MemoryStateMachine):
    def clock(self) -> int:
        return self._state.clock


@found_by("a_reset_forgets_the_time")
class ResetKeepsTheClock(MemoryStateMachine):
    def clear(self) -> None:
        clock = self._state.clock
        super().clear()
        self._state.clock = clock


@found_by("time_is_in_a_snapshot")
class SnapshotsTheClockOfNow(MemoryStateMachine):
    def _state_as_of(self, last: Any) -> State:
        state = super()._state_as_of(last)
        state.clock = self._state.clock
        return state


@found_by("time_survives")
class StoresNoClock(StoringStateMachine):
    def _stored(self) -> dict[str, Any]:
        stored = super()._stored()
        stored["_state"].clock = 0
        return stored


globals().update(suites())
