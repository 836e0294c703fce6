"""Docs are code: examples in README, docs and docstrings run."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fastsm

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_a_page_run(page: Path) -> None:
    """Every `>>>` of a page gives what the page says."""
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("module", ["machine", "command"])
def test_examples_of_a_module_run(module: str) -> None:
    """Every `>>>` of a docstring gives what it says."""
    found = importlib.import_module(f"fastsm.{module}")
    result = doctest.testmod(found, extraglobs={"fastsm": fastsm, **vars(fastsm)})
    assert result.attempted > 0
    assert result.failed == 0


def test_the_version_is_that_of_the_installed_package() -> None:
    """`fastsm.__version__` says what was installed."""
    assert fastsm.__version__ == version("fastsm")


# ---- links and names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Every relative link names a file of the checkout."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "fastsm/" in target and not (ROOT / "fastsm").is_dir():
            continue  # the sources are out of the way: the installed package is tested
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_public_name_is_in_the_reference() -> None:
    """A name that the package exports is on one of the pages that are built from docstrings."""
    shown = " ".join(re.findall(r"^::: (\S+)", "\n".join(
        page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md")), re.MULTILINE))
    modules = {"fastsm.command", "fastsm.types", "fastsm.errors"}
    assert modules <= set(shown.split())
    for name in fastsm.__all__:
        home = getattr(getattr(fastsm, name), "__module__", "fastsm.command")
        assert f"fastsm.{name}" in shown.split() or home in modules or name.startswith("MAX_"), name


# ---- importing ---------------------------------------------------------------------------------------


def test_importing_the_package_is_light() -> None:
    """Who runs on threads does not pay for asyncio, and NumPy is imported by those who ask for arrays."""
    heavy = ("numpy", "asyncio", "ssl", "tempfile", "zstandard", "rich", "typer", "pytest", "json")
    code = f"import sys, fastsm; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
