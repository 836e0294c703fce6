"""Docs are code: examples in README, docs and docstrings run."""

from __future__ import annotations

import doctest
import importlib
from importlib.metadata import version
from pathlib import Path

import pytest

import fastsm

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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
