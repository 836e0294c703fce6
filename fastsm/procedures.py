"""Procedures: functions of the embedder that run at their place in the log, on every replica; and their rules.

A procedure must have the same outcome everywhere. So an exception that depends only on the entry is an answer, while
one that may depend on this replica (memory, disk, an import) aborts the whole ``apply``: nothing of the chunk is
applied here, as if the call had never been made.
"""

from __future__ import annotations

import inspect
import logging
import operator
import reprlib
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import Context
from typing import Any, NamedTuple, Protocol, SupportsIndex, TypeVar, overload

from fastsm.answering import encoded_name
from fastsm.answers import BadAnswerError, checked_value
from fastsm.command import check, decode
from fastsm.errors import CommandError, FastsmError, ProcedureError, UnknownCommandError
from fastsm.types import Answer, Call, Once

logger = logging.getLogger("fastsm")

F = TypeVar("F", bound=Callable[..., Any])
MARK = "__fastsm_procedure__"
LONGEST_NUMBER = 20  # bytes of a 64-bit integer as text

_shorten = reprlib.Repr()
_shorten.maxother = 60


class Abort(Exception):  # not an error but a refusal, which is an answer
    """Raised by a procedure to undo everything it wrote: its entry gives ``Answer(False, value, "abort")``."""

    def __init__(self, value: Any = None) -> None:
        self.value = value
        super().__init__(value)


class Procedure(NamedTuple):
    """A function with the name and version by which commands call it."""

    name: str
    version: int
    function: Callable[[Any, bytes], Any]


Registry = dict[tuple[str, int], Procedure]


class RunningTx(Protocol):
    """What :func:`run` needs from the ``tx`` of a call."""

    def _trouble(self) -> BaseException | None: ...
    def _end(self) -> None: ...


@overload
def procedure(function: F) -> F: ...
@overload
def procedure(*, name: str | None = None, version: SupportsIndex = 1) -> Callable[[F], F]: ...
def procedure(
    function: Any = None, *, name: str | None = None, version: SupportsIndex = 1
) -> Any:
    """Marks a function ``(tx, payload)`` as a procedure that ``fastsm.call`` runs, by default under its own name.

    >>> import fastsm
    >>> @fastsm.procedure
    ... def bump(tx, payload):
    ...     return tx.add(payload, 1)
    >>> machine = fastsm.MemoryStateMachine(procedures=[bump])
    >>> machine.apply([(1, 1, fastsm.call("bump", b"visits"))])
    [Answer(ok=True, value=1, reason=None)]
    """

    def mark(marked: F) -> F:
        label = getattr(marked, "__name__", None) if name is None else name
        if not callable(marked) or not isinstance(label, str):
            raise TypeError(f"expected a function (tx, payload) and a name of type str, found {marked!r} and {label!r}")
        kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        if any(is_kind(marked) for is_kind in kinds):
            raise TypeError(f"{marked!r} returns a coroutine or a generator: define it with `def`, without `yield`")
        encoded_name(label)
        number = operator.index(version)
        if not 0 <= number < 2**32:
            raise ValueError(f"version {number}: expected 0 to 2**32 - 1")
        try:
            setattr(marked, MARK, (label, number))
        except AttributeError:
            raise TypeError(f"{marked!r} cannot be marked: put @fastsm.procedure above its definition") from None
        return marked

    return mark if function is None else mark(function)


def registry(procedures: Iterable[Callable[[Any, bytes], Any]]) -> Registry:
    """Returns the procedures of a machine by name and version; ``ValueError`` if two have the same."""
    found: Registry = {}
    for function in procedures:
        marked = getattr(function, MARK, None)
        if marked is None:
            raise TypeError(f"{function!r} is not a procedure: put @fastsm.procedure above its definition")
        if marked in found:
            raise ValueError(
                f"two procedures {marked[0]!r} of version {marked[1]}: give one of them another version or name")
        found[marked] = Procedure(marked[0], marked[1], function)
    return found


def check_calls(command: Any, known: Registry) -> None:
    """Raises what ``apply`` would raise for a command on a machine with these procedures."""
    check(command)
    decoded: object = decode(command)
    if isinstance(decoded, Once):
        decoded = decoded.command
    if isinstance(decoded, Call) and (decoded.name, decoded.version) not in known:
        raise UnknownCommandError(
            f"a call of procedure {decoded.name!r}, version {decoded.version}, which this machine was not given: open "
            "it with procedures=[…] on every replica before a call is proposed"
        )


def is_trouble(error: BaseException) -> bool:
    """Returns whether an exception may be specific to this replica, so that it cannot be an entry's answer."""
    replicas_own = (OSError, ImportError, SystemError, MemoryError, RecursionError, FastsmError)
    errors = [error]
    while errors:
        one = errors.pop()
        if sys.version_info >= (3, 11) and isinstance(one, ExceptionGroup):  # noqa: F821
            errors += one.exceptions
        elif not isinstance(one, Exception) or (isinstance(one, replicas_own) and not isinstance(one, CommandError)):
            return True
    return False


def run(called: Procedure, tx: RunningTx, payload: bytes, index: int) -> Answer:
    """Calls a procedure. If the answer is not ``ok``, the caller has to undo what the procedure wrote.

    Raises ``ProcedureError``; exceptions that are not an ``Exception`` are passed on.
    """
    try:
        # Empty: what the host or an earlier call has set, such as the precision of `decimal`, must not count.
        returned = Context().run(called.function, tx, payload)
    except Exception as error:
        return answer_of_error(called, error, tx._trouble(), index)
    finally:
        tx._end()
    refuse_trouble(called, tx._trouble(), index)
    return answer_of_value(called, returned, index)


def answer_of_value(called: Procedure, returned: Any, index: int, *, aborted: bool = False) -> Answer:
    """Returns the answer for a call that returned a value, or, with ``aborted``, raised an ``Abort`` with a value."""
    try:
        value = checked_value(returned.value if aborted else returned)
    except BadAnswerError as error:
        return _failed(called, error, index)
    except Exception as error:  # the value of an Abort may be a property
        refuse_trouble(called, error, index)
        return _failed(called, error, index)
    return Answer(False, value, "abort") if aborted else Answer(True, value)


def answer_of_error(called: Procedure, error: Exception, trouble: BaseException | None, index: int) -> Answer:
    """Returns the answer for a call that raised; ``trouble``: a replica-specific error from ``tx``, or None."""
    if isinstance(error, Abort):
        refuse_trouble(called, trouble, index)
        return answer_of_value(called, error, index, aborted=True)
    refuse_trouble(called, trouble or error, index)
    return _failed(called, error, index)


def add_error(key: bytes, value: bytes | None, size: int, initial: int, delta: int, reason: str) -> ValueError:
    """Returns the error of a ``tx.add`` that is refused; its message is the same on every replica.

    ``value``: the present value, or its first ``LONGEST_NUMBER`` bytes; None: no value. ``size``: that of all of it.
    """
    name = _shorten.repr(key)
    if reason == "overflow":
        number = initial if value is None else int(value)
        return ValueError(
            f"key {name}: overflow: expected a sum from -2**63 to 2**63 - 1, found {number} + {delta}; the value is "
            "unchanged")
    found = f"{size} bytes" if value is None or size > LONGEST_NUMBER else repr(value)
    return ValueError(
        f"key {name}: {reason}: expected an integer as text, such as b'-42', from -2**63 to 2**63 - 1, found {found}; "
        "put a number first")


def refuse_trouble(called: Procedure, error: BaseException | None, index: int) -> None:
    """Raises if an exception is specific to this replica, and so cannot be an answer."""
    if error is None or not is_trouble(error):
        return
    if not isinstance(error, Exception):
        raise error
    raise ProcedureError(
        f"entry {index}: procedure {called.name!r}, version {called.version}, could not be run on this replica: "
        f"{type(error).__name__}; nothing of the chunk was applied. An entry that can never be applied has to be "
        "skipped with update_last_applied, on every replica",
        index=index, name=called.name,
    ) from error


def _failed(called: Procedure, error: Exception, index: int) -> Answer:
    with suppress(Exception):  # a log handler must not affect what a replica answers
        logger.warning(
            "entry %d: procedure %r, version %d, failed", index, called.name, called.version, exc_info=error
        )
    return Answer.failed(error)
