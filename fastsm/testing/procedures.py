"""``check_procedure``: checks that a procedure depends on nothing but ``tx`` and its payload."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import fastsm
from fastsm import Answer, ProcedureError

RUNNER = Path(__file__).with_name("procedure_process.py")
PROGRAM = f"import runpy; runpy.run_path({str(RUNNER)!r}, run_name='__main__')"
SHIFT = 34_218_061.001  # seconds: another year, month, day, hour, minute and second
PATIENCE = 120  # seconds after which a process counts as hanging

State = Mapping[bytes, bytes] | Iterable[bytes]


def check_procedure(
    function: Callable[[Any, bytes], Any], payloads: Iterable[bytes], state: State = (), *, processes: int = 5
) -> list[Answer]:
    """Runs a procedure in several processes, and raises ``ProcedureError`` if they differ. Returns its answers.

    The payloads are applied one after another, each on the state that the previous ones left. ``state`` is the initial
    state: a mapping of keys to values, or commands that are applied first (for deadlines and a clock, or a history).

    Each process has a different hash seed (so that sets of str and bytes have a different order), time, time zone and
    random numbers, and runs each call twice. What a call answers and writes, in which order, must
    be equal everywhere. If not, the error names the payload and its outcomes. A procedure that behaves differently on
    only one machine in a thousand is not found.

    ``function`` is loaded by its module and name, so it must be defined at the top of a module. Takes a second or two.

    >>> import fastsm
    >>> from fastsm.testing import check_procedure
    >>> check_procedure(my_procedure, [b"a", b"b"], {b"key": b"value"})  # doctest: +SKIP
    """
    jobs = [bytes(payload) for payload in payloads]
    commands = _commands(state)
    module, file = _place(function)
    job = {
        "path": [os.path.abspath(path) for path in sys.path], "module": module, "file": file,
        "name": function.__qualname__, "payloads": jobs, "commands": commands,
    }
    if processes < 2:
        raise ValueError(f"processes={processes}: expected 2 or more, to compare them")
    found = _run(job, processes)
    answers = []
    for number, payload in enumerate(jobs):
        outcomes = [outcome for process in found for outcome in process[number]]
        different = [outcome for i, outcome in enumerate(outcomes) if outcome not in outcomes[:i]]
        label = f"procedure {function.__qualname__}, payload {payload[:60]!r} (number {number})"
        if len(different) > 1:
            told = "\n".join(f"  {answer}, having written {_text(steps)}" for answer, steps in different[:3])
            raise ProcedureError(
                f"{label}: had {len(different)} different outcomes in {processes} processes:\n{told}\nIt must depend "
                "on nothing but tx and its payload: not on the order of a set, a clock, a random number, or a global",
                name=function.__qualname__)
        if not isinstance(different[0][0], Answer):
            raise ProcedureError(f"{label}: {different[0][0]}", name=function.__qualname__)
        answers.append(different[0][0])
    return answers


def _commands(state: State) -> list[bytes]:
    if isinstance(state, Mapping):
        return [fastsm.put(key, value) for key, value in state.items()]
    commands = [bytes(command) for command in state]
    for command in commands:
        fastsm.check(command)
    return commands


def _place(function: Callable[..., Any]) -> tuple[str, str]:
    """Returns the module of a function, and the file from which another process can load it."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    found: Any = module
    for name in getattr(function, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    file = getattr(module, "__file__", None)
    if module is None or file is None or found is not function:
        raise ValueError(
            f"{function!r} cannot be loaded in another process: define it with `def` at the top of a module")
    return module.__name__, os.path.abspath(file)


def _run(job: dict[str, Any], processes: int) -> list[Any]:
    """Returns the outcomes in each process. The processes run concurrently; with files, none waits for another."""
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as name:
        try:
            for number in range(processes):
                place = Path(name, str(number))
                place.with_suffix(".job").write_bytes(pickle.dumps(job | {"shift": SHIFT * number}))
                with (
                    open(place.with_suffix(".job"), "rb") as given, open(place, "wb") as said,
                    open(place.with_suffix(".errors"), "wb") as errors,
                ):
                    children.append(subprocess.Popen(
                        [sys.executable, "-c", PROGRAM], stdin=given, stdout=said, stderr=errors, cwd=name,
                        env={**os.environ, "PYTHONHASHSEED": str(1 + number), "TZ": f"XXX{number % 12}"},
                    ))
            ended = [child.wait(PATIENCE) for child in children]
        finally:
            for child in children:
                child.kill()  # does nothing to one that is over
                child.wait()
        for number, code in enumerate(ended):
            if code != 0:
                errors_of_child = Path(name, f"{number}.errors").read_text(errors="replace")
                raise ValueError(
                    f"{job['file']}: cannot be loaded in another process, or made it exit with "
                    f"{code}:\n{errors_of_child}")
        return [pickle.loads(Path(name, str(number)).read_bytes()) for number in range(processes)]


def _text(steps: list[Any]) -> str:
    shown = ", ".join(f"{name}{arguments!r}" for name, arguments in steps[:5])
    return (shown or "nothing") + (", …" if len(steps) > 5 else "")
