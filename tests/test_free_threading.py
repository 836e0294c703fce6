"""Builds of Python without the GIL: fastsm does not claim to work without it, so the interpreter switches it on."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fastsm

PACKAGE = Path(fastsm.__file__).parent
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def test_no_module_says_that_it_needs_no_gil() -> None:
    """No module declares that it can run without the GIL, which protects reads during writes."""
    sources = [*PACKAGE.rglob("*.pyx"), *PACKAGE.rglob("*.pxd"), *PACKAGE.parent.glob("setup.py")]
    assert sources
    for source in sources:
        assert "freethreading" not in source.read_text(encoding="utf-8"), source


@pytest.mark.skipif(not FREE_THREADED, reason="this Python always has the GIL")
def test_importing_switches_the_gil_on() -> None:
    """Importing fastsm warns that it needs the GIL, and continues with it."""
    program = "import sys, fastsm; print(sys._is_gil_enabled())"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(PACKAGE.parent)})  # fmt: skip
    assert ended.stdout == "True\n"
    assert "GIL has been enabled" in ended.stderr
