"""The library of shim.c: compiling it, running a program with it, and controlling it from within that program."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.permits import cannot

SOURCE = Path(__file__).with_name("shim.c")
KILL, KILL_AFTER, FAIL, FAIL_DONE, FAIL_ALLOCATION, SHORT = range(1, 7)


def compiled(directory: Path) -> Path:
    """Compile the library into a directory; skip the test if there is no compiler."""
    if sys.platform != "linux":
        pytest.skip("the shim is for Linux")
    if os.environ.get("LD_PRELOAD"):
        pytest.skip("a sanitizer is preloaded, and takes the same calls")
    if shutil.which("gcc") is None:
        cannot("there is no gcc to compile the shim with")
    library = directory / "shim.so"
    command = ["gcc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"]
    subprocess.run(command, check=True)
    return library


def run_with(library: Path, program: Path, *arguments: object) -> dict[str, Any]:
    """Run a program under the shim; return the JSON in the last line of its output."""
    ended = subprocess.run(
        [sys.executable, program, *map(str, arguments)], env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


class Shim:
    """Controls the library from within the process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.shim_arm.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int]
        self._library.shim_disarm.restype = ctypes.c_char_p

    def arm(self, action: int, n: int, code: int = 0) -> None:
        """Let the action happen at the n-th call from now on."""
        self._library.shim_arm(action, n, code)

    def disarm(self) -> str:
        """Disarm the library; return the name of the call that met the action, or an empty string."""
        return self._library.shim_disarm().decode()
