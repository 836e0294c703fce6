"""The rules of procedures, for state machines that run them: those whose class has a fixture ``with_procedures``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import fastsm
from fastsm import Abort, Answer, LogId, ProcedureError, StateMachine
from fastsm.testing.helpers import PUT, apply_commands, apply_entries, needs

MakeMachine = Callable[[list[Callable[[Any, bytes], Any]]], StateMachine]


class CallRules:
    """A procedure is done completely or not at all, sees its place in the log, and may use only ``tx``."""

    def test_a_procedure_sees_its_place_in_the_log(self, with_procedures: MakeMachine) -> None:
        """A procedure sees the writes of earlier entries and its own; what it returns is the answer."""

        @fastsm.procedure
        def look(tx: Any, payload: bytes) -> list[Any]:
            before = tx.get(b"key")
            tx.put(b"key", payload)
            tx.put(b"n", b"4")
            found = [before, tx.get(b"key"), tx.add(b"n", 1), tx.count(), tx.delete_prefix(b"k"), tx.get(b"key")]
            return [*found, *[part for pair in tx.scan() for part in pair], tx.entry.index]

        machine = with_procedures([look])
        answers = apply_commands(machine, PUT, fastsm.call("look", b"new"), fastsm.read(b"n"))
        seen = [b"value", b"new", 5, 2, 1, None, b"n", b"5", 2]
        assert answers == [True, Answer(True, seen), Answer(True, b"5")], "a procedure does not see its place"
        assert machine.get(b"key") is None, "what a procedure removed is there"

    @pytest.mark.parametrize(
        ("error", "answer"),
        [
            pytest.param(Abort([1, b"no"]), Answer(False, [1, b"no"], "abort"), id="abort"),
            pytest.param(KeyError(1), Answer(False, None, "failed"), id="an error"),
            pytest.param(fastsm.CommandError("bad"), Answer(False, None, "failed"), id="a bad argument"),
        ],
    )
    def test_a_procedure_that_raises_has_no_effect(
        self, with_procedures: MakeMachine, error: Exception, answer: Answer
    ) -> None:
        """``Abort`` refuses with a value; any other exception due to the entry is "failed"."""

        @fastsm.procedure
        def fall(tx: Any, payload: bytes) -> None:
            tx.put(b"other", b"")
            tx.delete(b"key")
            raise error

        machine = with_procedures([fall])
        answers = apply_commands(machine, PUT, fastsm.call("fall"), PUT)
        assert answers == [True, answer, True], "a procedure that raised gave another answer"
        assert (machine.get(b"key"), machine.get(b"other")) == (b"value", None), "a procedure that raised had an effect"

    @pytest.mark.parametrize("error", [OSError(5, "disk"), MemoryError()], ids=["a disk", "no memory"])
    def test_the_trouble_of_a_replica_is_no_answer(self, with_procedures: MakeMachine, error: Exception) -> None:
        """An error of this replica raises ``ProcedureError``; nothing is applied, and the chunk can be retried."""
        troubles = [error]

        @fastsm.procedure
        def work(tx: Any, payload: bytes) -> int:
            tx.put(b"key", b"by the procedure")
            if troubles:
                raise troubles.pop()
            return 1

        machine = with_procedures([work])
        entries = [(1, 1, PUT), (2, 1, fastsm.call("work"))]
        with pytest.raises(ProcedureError) as raised:
            apply_entries(machine, *entries)
        assert (raised.value.index, raised.value.name) == (2, "work"), "the error does not name entry and procedure"
        assert (machine.last_applied(), machine.len()) == (LogId(0, 0), 0), "a part of the chunk was applied"
        assert apply_entries(machine, *entries) == [True, Answer(True, 1)], "the chunk cannot be applied again"

    def test_an_unknown_procedure_fails_its_chunk_first(self, with_procedures: MakeMachine) -> None:
        """An unknown name or version is an ``UnknownCommandError`` before any procedure has run."""
        ran = []

        @fastsm.procedure
        def known(tx: Any, payload: bytes) -> None:
            ran.append(payload)

        machine = with_procedures([known])
        for unknown in (fastsm.call("other"), fastsm.call("known", version=2)):
            with pytest.raises(fastsm.UnknownCommandError) as raised:
                apply_entries(machine, (1, 1, fastsm.call("known")), (2, 1, unknown))
            assert raised.value.index == 2, "the error does not name the entry"
        assert not ran, "a procedure ran in a chunk that cannot be applied"
        assert machine.last_applied() == LogId(0, 0), "a part of the chunk was applied"

    def test_a_procedure_has_nothing_but_its_tx(self, with_procedures: MakeMachine) -> None:
        """Calling the machine from inside is a ``ProcedureError``; after the call, ``tx`` can no longer be used."""
        kept = []

        @fastsm.procedure
        def keep(tx: Any, payload: bytes) -> None:
            kept.append(tx)
            for call in (lambda: machine.get(b"key"), machine.len, machine.last_applied, machine.flush, machine.stop):
                with pytest.raises(ProcedureError):
                    call()

        machine = with_procedures([keep])
        apply_commands(machine, PUT, fastsm.call("keep"))
        for arguments in (("get", b"key"), ("put", b"key", b"late")):
            with pytest.raises(ProcedureError):
                getattr(kept[0], arguments[0])(*arguments[1:])
        assert machine.get(b"key") == b"value", "a tx wrote after its call"

    def test_a_procedure_reads_the_clock_of_the_log(self, with_procedures: MakeMachine) -> None:
        """``tx`` has the clock and the deadlines as of its place, and can set deadlines."""

        @fastsm.procedure
        def renew(tx: Any, payload: bytes) -> list[Any]:
            found = [tx.clock, tx.deadline(b"key"), tx.touch(b"key", tx.clock + 2), tx.touch(b"x", 1)]
            tx.put(b"other", b"", expires=tx.clock)
            return [*found, tx.deadline(b"key"), tx.deadline(b"other")]

        machine = needs(with_procedures([renew]), "clock")
        answers = apply_commands(
            machine, fastsm.put(b"key", b"", expires=9), fastsm.tick(5), fastsm.call("renew"), fastsm.tick(6),
            fastsm.tick(7))
        assert answers[2] == Answer(True, [5, 9, True, False, 7, 5]), "tx has another time than its place in the log"
        assert answers[3:] == [Answer(True, 1), Answer(True, 1)], "a deadline that tx set does not count"
