"""The process in which ``check_procedure`` runs a procedure: run as a script, so that it imports no pytest.

It reads a job from standard input and writes the procedure's outcomes to standard output, both pickled. Its clocks are
shifted before any of the user's code is imported.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import os
import pickle
import sys
import time
from types import ModuleType
from typing import Any


def shift_clocks(seconds: float) -> None:
    """Makes every function that returns the time return a shifted one. ``datetime`` uses C, so it is subclassed."""
    nanoseconds = round(seconds * 1e9)
    for name in ("time", "monotonic", "perf_counter"):
        plain, exact = getattr(time, name), getattr(time, f"{name}_ns")
        setattr(time, name, lambda plain=plain: plain() + seconds)
        setattr(time, f"{name}_ns", lambda exact=exact: exact() + nanoseconds)
    for name in ("localtime", "gmtime", "ctime"):
        convert = getattr(time, name)
        setattr(time, name, lambda at=None, convert=convert: convert(time.time() if at is None else at))
    form, show = time.strftime, time.asctime
    time.strftime = lambda pattern, *at: form(pattern, *(at or [time.localtime()]))
    time.asctime = lambda *at: show(*(at or [time.localtime()]))

    class Datetime(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + datetime.timedelta(seconds=seconds)

        @classmethod
        def utcnow(cls) -> Any:
            return cls.now(datetime.timezone.utc).replace(tzinfo=None)

        @classmethod
        def today(cls) -> Any:
            return cls.now()

    class Date(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return super().today() + datetime.timedelta(seconds=seconds)

    datetime.datetime, datetime.date = Datetime, Date  # type: ignore[misc]


def module_of(name: str, file: str) -> ModuleType:
    """Imports the user's module by its name, or by its file if the name leads elsewhere, as in a test or a script."""
    if name != "__main__":
        try:
            module = importlib.import_module(name)
        except ImportError:
            pass
        else:
            if os.path.samefile(module.__file__ or os.curdir, file):
                return module
    spec = importlib.util.spec_from_file_location("module_of_a_procedure", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def outcomes(function: Any, payloads: list[bytes], commands: list[bytes]) -> list[Any]:
    """Returns each call's outcome: its answer and writes, or the error that ends its chunk; runs each call twice."""
    import fastsm  # noqa: PLC0415  # after the path is set

    def machine() -> Any:
        made = fastsm.MemoryStateMachine(procedures=[function])
        made.apply([(index, 1, command) for index, command in enumerate(commands, 1)])
        return made

    def call(on: Any, payload: bytes) -> Any:
        index = on.last_applied().index + 1
        try:
            answer = on.apply([(index, 1, fastsm.call(name, payload, version=version))])[0]
        except fastsm.ProcedureError as error:
            on.update_last_applied((index, 1))
            return repr(error.__cause__ or error), []
        return answer, on._outcomes[-1].steps

    name, version = function.__fastsm_procedure__
    machines = [machine(), machine()]
    return [[call(each, payload) for each in machines] for payload in payloads]


def main() -> None:
    """Reads a job, runs it, and writes the outcomes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that what a procedure prints is not part of the answer
    job = pickle.load(sys.stdin.buffer)
    sys.path[:] = job["path"]
    shift_clocks(job["shift"])
    function: Any = module_of(job["module"], job["file"])
    for name in job["name"].split("."):
        function = getattr(function, name)
    if not hasattr(function, "__fastsm_procedure__"):
        import fastsm  # noqa: PLC0415

        function = fastsm.procedure(function)
    with answers:
        pickle.dump(outcomes(function, job["payloads"], job["commands"]), answers)


if __name__ == "__main__":
    main()
