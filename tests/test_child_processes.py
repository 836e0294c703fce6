"""Child processes import the installed package, whatever folder their parent runs in."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
FOLDERS = ("bench", "examples", "fastsm", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (CHECKOUT / folder).rglob("*.py"))


def unsafe_children(source: str, *, moved: bool) -> Iterator[int]:
    """Yield the line of every Python child that searches the folder in which its parent happens to run.

    `-c` and `-m` put the current folder first on the path. A child is safe with a `cwd` of its own, with code that
    begins by setting `sys.path`, or where `moved` says that the parent itself runs elsewhere. A script that is started
    by its path searches its own folder instead.
    """
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("subprocess.")):
            continue
        command = node.args[0] if node.args else None
        words = [ast.unparse(word) for word in command.elts] if isinstance(command, ast.List) else []
        if "sys.executable" not in words or not {"'-c'", "'-m'"} & set(words):
            continue
        if not moved and "cwd" not in {keyword.arg for keyword in node.keywords} and "sys.path[:] =" not in source:
            yield node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_no_child_searches_the_current_folder(path: Path) -> None:
    """No script, benchmark or example starts a child that an unbuilt checkout in the current folder could shadow."""
    # The fixture in conftest.py moves every test into an empty folder.
    moved = path.name.startswith("test_")
    assert list(unsafe_children(path.read_text(encoding="utf-8"), moved=moved)) == []


def test_unsafe_children_are_seen() -> None:
    """The search finds a child that runs in its parent's folder, and none that runs in a folder of its own."""
    call = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', code]{})\n"
    assert list(unsafe_children(call.format(""), moved=False)) == [2]
    assert list(unsafe_children(call.format(", cwd=folder"), moved=False)) == []
    assert list(unsafe_children(call.format(""), moved=True)) == []
    assert list(unsafe_children(call.format("").replace("'-c', code", "script"), moved=False)) == []


def test_tests_run_in_an_empty_folder() -> None:
    """The current folder of a test holds nothing that a child could import."""
    assert os.listdir() == []


@pytest.mark.skipif(not (CHECKOUT / "bench").is_dir(), reason="the tests run without the checkout's bench folder")
def test_benchmarks_prefer_the_installed_package(tmp_path: Path) -> None:
    """`python -m bench` in an unbuilt checkout imports the installed package."""
    for name in ("bench", "fastsm"):
        ignored = shutil.ignore_patterns("*.so", "*.c", "__pycache__")
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=ignored)
    (tmp_path / "installed" / "fastsm").mkdir(parents=True)
    (tmp_path / "installed" / "fastsm" / "__init__.py").write_text("")
    code = "import bench, fastsm; print(fastsm.__file__)"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")})
    assert ended.stdout.strip() == str(tmp_path / "installed" / "fastsm" / "__init__.py")
