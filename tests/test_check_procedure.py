"""``fastsm.testing.check_procedure`` finds procedures that depend on more than ``tx`` and the payload."""

from __future__ import annotations

import datetime
import itertools
import os
import random
import sys
import time
import uuid
from datetime import datetime as imported_by_name
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import Abort, Answer, FastStateMachine, ProcedureError
from fastsm.testing import check_procedure

STATE = {b"a": b"1", b"b": b"2", b"c": b"3"}
counter = itertools.count()
seeded = random.Random(7)


# ---- wrong procedures ----------------------------------------------------------------------------------

@fastsm.procedure
def iterates_a_set(tx: Any, payload: bytes) -> None:
    for key in {b"a", b"b", b"c", payload}:
        tx.put(key, b"")


def answers_a_set(tx: Any, payload: bytes) -> Any:
    return next(iter({"one", "two", "three", "four"})).encode()


def formats_a_clock(tx: Any, payload: bytes) -> None:
    tx.put(payload, time.strftime("%Y-%m-%d").encode())


def formats_a_datetime(tx: Any, payload: bytes) -> None:
    tx.put(payload, f"{imported_by_name.now():%Y}".encode())


def formats_a_date(tx: Any, payload: bytes) -> bytes:
    return datetime.date.today().isoformat().encode()


def reads_a_clock(tx: Any, payload: bytes) -> int:
    return time.time_ns()


def knows_its_time_zone(tx: Any, payload: bytes) -> bytes:
    return time.strftime("%H", time.localtime(0)).encode()


@fastsm.procedure(name="dice", version=3)
def draws_a_random_number(tx: Any, payload: bytes) -> None:
    tx.put(payload, b"%d" % random.randrange(10**9))


def draws_from_a_seed(tx: Any, payload: bytes) -> int:
    return seeded.randrange(10**9)


def makes_an_id(tx: Any, payload: bytes) -> bytes:
    return uuid.uuid4().bytes


def counts_its_calls(tx: Any, payload: bytes) -> int:
    return next(counter)


def knows_its_process(tx: Any, payload: bytes) -> int:
    return os.getpid()


def overwrites_what_differs(tx: Any, payload: bytes) -> None:
    tx.put(b"k", b"%d" % os.getpid())
    tx.put(b"k", b"")


def fails_here_only(tx: Any, payload: bytes) -> None:
    if os.getpid() % 2 or next(counter) % 2:
        raise KeyError(payload)


WRONG = [
    iterates_a_set, answers_a_set, formats_a_clock, formats_a_datetime, formats_a_date, reads_a_clock,
    knows_its_time_zone, draws_a_random_number, draws_from_a_seed, makes_an_id, counts_its_calls, knows_its_process,
    overwrites_what_differs, fails_here_only,
]  # fmt: skip


@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__name__)
def test_procedures_that_differ_are_found(function: Any) -> None:
    """The error names the procedure and the payload, and says what a procedure may depend on."""
    with pytest.raises(ProcedureError, match="nothing but tx") as raised:
        check_procedure(function, [b"k"], STATE)
    assert "payload b'k'" in str(raised.value)
    assert raised.value.name == function.__qualname__


# ---- right procedures ----------------------------------------------------------------------------------

def moves_what_is_due(tx: Any, payload: bytes) -> list[Any]:
    """Do everything that a procedure may do."""
    print("a procedure may print")
    moved = [key for key, _ in tx.scan() if (tx.deadline(key) or tx.clock + 1) <= tx.clock]
    for key in sorted({*moved, payload}):
        tx.put(b"moved/" + key, str(tx.modified(key)).encode(), expires=tx.clock + 10)
        tx.delete(key)
    if not moved:
        raise Abort([tx.clock, tx.count()])
    tx.touch(b"moved/" + payload, None)
    return [tx.add(b"total", len(moved)), *moved]


def test_procedures_that_depend_on_tx_alone_pass() -> None:
    """The answers are returned; each call sees the changes of the calls before it, and the clock of the log."""
    state = [fastsm.put(b"k", b"", expires=5), fastsm.put(b"n", b"", expires=9), fastsm.tick(7, limit=0)]
    assert check_procedure(moves_what_is_due, [b"x", b"x"], state) == [
        Answer(True, [1, b"k"]), Answer(False, [7, 4], "abort")]


def passes(tx: Any, payload: bytes) -> int:
    return len(payload)


def reads_a_missing_file(tx: Any, payload: bytes) -> bytes:
    return Path("/no such file").read_bytes()


def test_procedures_that_would_end_the_chunk_are_found() -> None:
    """A procedure that raises an ``OSError``, which ends the chunk on a replica, is a ``ProcedureError``, too."""
    with pytest.raises(ProcedureError, match="FileNotFoundError"):
        check_procedure(reads_a_missing_file, [b""])


class Named:
    @staticmethod
    def passes(tx: Any, payload: bytes) -> None: ...


def test_only_what_another_process_can_load_is_checked() -> None:
    """A lambda, a local function, a method of an object and a built-in are refused, with advice what to do."""
    assert check_procedure(Named.passes, [b""]) == [Answer(True, None)]

    def local(tx: Any, payload: bytes) -> None: ...

    for function in (lambda tx, payload: None, local, Named().__init__, print):
        with pytest.raises(ValueError, match="at the top of a module"):
            check_procedure(function, [b""])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="processes=1"):
        check_procedure(passes, [b""], processes=1)


def test_a_module_that_another_process_cannot_import_is_refused(tmp_path: Path) -> None:
    """The error of a procedure whose module another process cannot import says why."""
    (tmp_path / "module_that_ends.py").write_text(
        "import os, sys\nif os.environ.get('PYTHONHASHSEED') == '2':\n    raise RuntimeError('not here')\n"
        "def p(tx, payload):\n    return 1\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import module_that_ends  # noqa: PLC0415

        with pytest.raises(ValueError, match="not here"):
            check_procedure(module_that_ends.p, [b""])
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("module_that_ends", None)


@pytest.mark.parametrize("function", [draws_a_random_number, reads_a_clock, counts_its_calls])
def test_a_machine_that_runs_each_call_twice_finds_it_too(directory: Path, function: Any) -> None:
    """With ``check_procedures=True`` the applying process runs each call twice, and refuses one that differs."""
    marked = fastsm.procedure(function) if function is not draws_a_random_number else function
    name, version = marked.__fastsm_procedure__
    with FastStateMachine(directory, procedures=[marked], check_procedures=True) as machine:
        with pytest.raises(ProcedureError, match="run twice"):
            machine.apply([(1, 1, fastsm.call(name, version=version))])
        assert machine.last_applied() == (0, 0)
