"""The outcome of each entry in the model: every command is judged over the state that earlier entries left."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from fastsm.answering import deadline_number
from fastsm.answers import (
    BadAnswerError,
    checked_value,
    checked_values,
    pack_result,
    pack_session,
    unpack_result,
)
from fastsm.model.tx import Refused, Tx, Written
from fastsm.procedures import check_calls, registry, run
from fastsm.types import (
    Add,
    Answer,
    Batch,
    Call,
    CompareAndSwap,
    Config,
    Delete,
    DeleteRange,
    Exists,
    Forget,
    ModifiedAt,
    Noop,
    Once,
    OpenSession,
    Put,
    Read,
    Tick,
    Touch,
    Transaction,
    ValueIs,
)

ANSWERING = (Add, Read, DeleteRange, Tick)  # each of these answers if it is an entry of its own
MAKE_A_BATCH_ANSWER = (Add, DeleteRange, Touch)
MAY_BE_REFUSED = (Batch, Transaction, Call, Once)  # these may be refused after they have written something


class Judge:
    """Judges entries, one after another, with the machine's procedures."""

    def __init__(self, procedures: Iterable[Callable[[Any, bytes], Any]]) -> None:
        self._procedures = registry(procedures)
        self._caller = 0  # the thread that is running a procedure, or 0

    def check(self, command: Any) -> None:
        """Raises for a command that :meth:`judge` cannot judge."""
        check_calls(command, self._procedures)

    def is_calling(self) -> bool:
        """Returns whether this thread is running a procedure."""
        return self._caller != 0 and self._caller == get_ident()

    def judge(self, command: Any, written: Written) -> bool | Answer:
        """Returns the outcome of an entry; a refused entry writes nothing."""
        if isinstance(command, Once):
            return self._once(command, written)
        if isinstance(command, OpenSession):
            session = written.log_id.index
            written.remember(session, pack_session(0, deadline_number(command.expires), b""))
            return Answer(True, session)
        if isinstance(command, Forget):
            return written.forget(command.session)
        if isinstance(command, Call):
            return self._call(command, written)
        try:
            return self._plain(command, written)
        except Refused as refused:
            reason = refused.reason
        except BadAnswerError:
            reason = "too large"
        written.take_back()
        return Answer(False, None, reason) if _answers(command) else False

    def _plain(self, command: Any, written: Written) -> bool | Answer:
        if isinstance(command, Transaction):
            holds = all(_holds(condition, written) for condition in command.conditions)
            branch = command.then if holds else command.otherwise
            values = checked_values(self.do(member, written) for member in branch)
            return Answer(True, values) if holds else Answer(False, values, "mismatch")
        if isinstance(command, Batch):
            done = (self.do(member, written) for member in command.commands)
            if _answers(command):
                return Answer(True, checked_values(done))
            for _ in done:
                pass
            return True
        value = checked_value(self.do(command, written))
        return Answer(True, value) if _answers(command) else bool(value)

    def _call(self, command: Call, written: Written) -> Answer:
        called = self._procedures[command.name, command.version]
        with self._calling():
            answer = run(called, Tx(written), command.payload, written.log_id.index)
        if not answer.ok:
            written.take_back()
        return answer

    def _once(self, command: Once, written: Written) -> bool | Answer:
        """Returns the remembered answer, if any; otherwise judges the command inside, and remembers its outcome."""
        known = written.state.sessions.get(command.session)
        if known is None:
            return Answer(False, None, "no session")
        last, expires = struct.unpack_from("<QQ", known)
        if command.sequence < last:
            return Answer(False, None, "stale")
        if command.sequence == last:
            return unpack_result(known[16:])
        result = self.judge(command.command, written)
        packed = pack_result(result)
        if packed is None:
            written.take_back()
            result = Answer(False, None, "too large")
            packed = pack_result(result)
            assert packed is not None
        if command.expires is not None:
            expires = command.expires
        written.remember(command.session, pack_session(command.sequence, expires, packed))
        return result

    def do(self, command: Any, written: Written) -> Any:  # one case for each kind
        """Executes a command and returns its value; raises ``Refused`` if that is impossible."""
        if isinstance(command, Put):
            written.put(command.key, command.value, command.expires)
        elif isinstance(command, Delete):
            written.put(command.key, None)
        elif isinstance(command, CompareAndSwap):
            if written.state.values.get(command.key) != command.expected:
                raise Refused("mismatch")
            written.put(command.key, command.value, command.expires)
        elif isinstance(command, Touch):
            return written.touch(command.key, command.expires)
        elif isinstance(command, Tick):
            return written.tick(command.now, command.limit)
        elif isinstance(command, Add):
            return written.add(command.key, command.delta, command.initial)
        elif isinstance(command, Read):
            return written.state.values.get(command.key)
        elif isinstance(command, DeleteRange):
            return written.delete_range(command.start, command.end)
        elif isinstance(command, Config):
            written.set_membership(command.data)
        else:
            assert isinstance(command, Noop)
        return True

    @contextmanager
    def _calling(self) -> Iterator[None]:
        self._caller = get_ident()
        try:
            yield
        finally:
            self._caller = 0


def _answers(command: object) -> bool:
    """Returns whether an entry has an ``Answer`` instead of True or False."""
    if isinstance(command, Batch):
        return any(isinstance(member, MAKE_A_BATCH_ANSWER) for member in command.commands)
    return isinstance(command, (Transaction, *ANSWERING))


def _holds(condition: object, written: Written) -> bool:
    assert isinstance(condition, (ValueIs, Exists, ModifiedAt))
    value = written.state.values.get(condition.key)
    if isinstance(condition, ValueIs):
        return value == condition.value
    if isinstance(condition, Exists):
        return value is not None
    return condition.index == (0 if value is None else written.state.writers[condition.key].index)
