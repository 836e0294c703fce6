"""The docs are tested: examples in README, docs and docstrings run, links work, and the reference is complete."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest

import fastsm

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_a_page_run(page: Path) -> None:
    """Every `>>>` example of a page gives the output on the page."""
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_python_without_prompts_compile(page: Path) -> None:
    """Blocks of Python on a page compile, even those that need a cluster to run."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        if ">>>" not in block:
            compile(textwrap.dedent(block), str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("module", ["clock", "machine", "command"])
def test_examples_of_a_module_run(module: str) -> None:
    """Every `>>>` example of a docstring gives its output."""
    found = importlib.import_module(f"fastsm.{module}")
    result = doctest.testmod(found, extraglobs={"fastsm": fastsm, **vars(fastsm)})
    assert result.attempted > 0
    assert result.failed == 0


def test_the_version_is_that_of_the_installed_package() -> None:
    """`fastsm.__version__` is the version of the installed package."""
    assert fastsm.__version__ == version("fastsm")


# ---- links and names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Every relative link names a file of the checkout, and a heading that the file has."""
    for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        if "fastsm/" in target and not (ROOT / "fastsm").is_dir():
            continue  # the sources are moved away: the installed package is tested
        there = page.parent / target if target else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not heading or heading in headings_of(there), f"{page.name} links to {target}#{heading}"


def headings_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as Python-Markdown makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_every_public_name_is_in_the_reference() -> None:
    """A name that the package exports is on one of the pages that are built from docstrings."""
    shown = " ".join(re.findall(r"^::: (\S+)", "\n".join(
        page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md")), re.MULTILINE))
    modules = {"fastsm.command", "fastsm.types", "fastsm.errors"}
    assert modules <= set(shown.split())
    for name in fastsm.__all__:
        home = getattr(getattr(fastsm, name), "__module__", "fastsm.command")
        assert f"fastsm.{name}" in shown.split() or home in modules or name.startswith("MAX_"), name


def test_the_reference_of_the_machine_groups_every_public_method_once() -> None:
    """Each method is in one of the groups of the page: life cycle, write, read, durability, snapshots, tools."""
    page = (ROOT / "docs" / "reference" / "machine.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: fastsm\.FastStateMachine\.(\w+)", page, re.MULTILINE)
    machine = fastsm.FastStateMachine
    public = [name for name in dir(machine) if not name.startswith("_") and callable(getattr(machine, name))]
    assert sorted(shown) == sorted(public)


def test_every_page_is_in_the_navigation() -> None:
    """A reader of the site finds every page of the docs in its menu."""
    site = ROOT / "mkdocs.yml"
    if not site.exists():
        pytest.skip("not a checkout: there is no mkdocs.yml")
    menu = site.read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}
    assert set(re.findall(r": ([\w/]+\.md)$", menu, re.MULTILINE)) == pages


SOURCES = r"https://(?:raw\.githubusercontent\.com/fastsm/fastsm|github\.com/fastsm/fastsm/(?:tree|blob))/main/([^#]+)"
SITE = r"https://fastsm\.github\.io/fastsm/([^#]*)"


def test_links_of_the_readme_work_on_a_package_index() -> None:
    """Links of the README, which is also shown without the other files, are absolute and name existing files."""
    targets = re.findall(r"\]\(([^)]+)\)", PAGES[0].read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        source, page = re.match(SOURCES, target), re.match(SITE, target)
        assert source or page, target
        if source and (ROOT / "fastsm").is_dir():  # otherwise only the package is installed
            assert (ROOT / source[1]).exists(), target
        if page:
            here = ROOT / "docs" / page[1].rstrip("/")
            file = here / "index.md" if here.is_dir() else here.with_suffix(".md")
            assert file.exists(), target
            assert "#" not in target or target.partition("#")[2] in headings_of(file), target


# ---- importing ---------------------------------------------------------------------------------------


def test_importing_the_package_is_light() -> None:
    """Importing fastsm imports neither asyncio, which only coroutines need, nor NumPy, which only arrays need."""
    heavy = ("numpy", "asyncio", "ssl", "tempfile", "zstandard", "rich", "typer", "pytest", "json")
    code = f"import sys, fastsm; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
