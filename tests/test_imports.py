"""Imports run downward only; an unbuilt checkout says what to do, or lets the installed package be imported."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGE = CHECKOUT / "fastsm"
if not PACKAGE.is_dir():
    pytest.skip("the sources are out of the way: the installed package is tested", allow_module_level=True)
SOURCES = sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".pyx", ".pxd", ".pyi"))


FOLDERS_OF_EQUALS = ("integrations", "cli", "testing")  # the docstring lists the folder, not its modules


def module_name(path: Path) -> str:
    """Return a file's module: `core.state` for fastsm/core/state.pyx, `testing` for fastsm/testing/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def listed_name(module: str) -> str:
    """Return the name under which the docstring lists a module: its own, or that of its folder."""
    top = module.partition(".")[0]
    return top if top in FOLDERS_OF_EQUALS else module


MODULES = {module_name(path) for path in SOURCES} - {""}
FOLDERS = {name for name in MODULES if (PACKAGE / name).is_dir()} - set(FOLDERS_OF_EQUALS)


def reading_order() -> list[str]:
    """Return the modules in the order of the package's docstring; a folder comes before its modules."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")))
    assert docstring is not None
    order, folder = [], ""
    for indent, names, slash in re.findall(r"^((?:    )+)([a-z_]+(?:, [a-z_]+)*)(/?) +\S", docstring, re.MULTILINE):
        if len(indent) == 4:
            folder = f"{names}." if slash else ""
            order += names.split(", ")
        else:
            order += [folder + name for name in names.split(", ")]
    return order


# ---- imports between modules -------------------------------------------------------------------------

def imports_of(path: Path) -> Iterator[str]:
    """Yield every module of this package that a source file imports; the package itself is ''."""
    source = path.read_text(encoding="utf-8")
    found = imports_in_python(ast.parse(source)) if path.suffix in (".py", ".pyi") else imports_in_cython(source)
    for module, names in found:
        folder = module.removeprefix("fastsm").removeprefix(".")
        if folder in FOLDERS:
            yield from (f"{folder}.{name}" for name in names)
        elif module == "fastsm":
            yield from (name if name in MODULES else "" for name in names)
        elif module.startswith("fastsm."):
            yield folder


def imports_in_python(node: ast.AST) -> Iterator[tuple[str, list[str]]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, [""]) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports name the package"
            yield child.module or "", [alias.name for alias in child.names]
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue  # the interpreter does not run imports under TYPE_CHECKING
        else:
            yield from imports_in_python(child)


def imports_in_cython(source: str) -> Iterator[tuple[str, list[str]]]:
    source = re.sub(r'"""(?:.|\n)*?"""', '""', source)
    for module in re.findall(r"^ *c?import +(fastsm[\w.]*)", source, re.MULTILINE):
        yield module, [""]
    names = r"\(([^)]*)\)|([^\n(]*)"
    for match in re.finditer(rf"^ *from +(fastsm[\w.]*) +c?import +(?:{names})", source, re.MULTILINE):
        listed = re.sub(r"#.*", "", match[2] or match[3] or "")
        yield match[1], [name.split()[0] for name in listed.split(",") if name.strip()]


def test_docstring_lists_every_module() -> None:
    """The reading order in the package's docstring names each module once, and no module that does not exist."""
    assert sorted(reading_order()) == sorted({listed_name(name) for name in MODULES} - {"__main__"})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward_only(path: Path) -> None:
    """A module imports only modules that the reading order names before it, and so a folder only earlier folders."""
    order = reading_order()
    # A module that imports the package itself needs everything that the package imports.
    whole = max(order.index(name) for name in imports_of(PACKAGE / "__init__.py"))

    def rank(module: str) -> int:
        if module == "__main__":
            return len(order)
        assert module == "" or module in order, f"the docstring does not list {module}"
        return order.index(module) if module else whole

    name = listed_name(module_name(path))
    if name == "":
        return
    imported = {other for other in map(listed_name, imports_of(path)) if other != name}
    upward = [other or "fastsm itself" for other in imported if rank(other) >= rank(name)]
    assert not upward, f"{path.name} imports {upward}"


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_says_what_it_is_for(folder: str) -> None:
    """The `__init__` of each folder says what it is for and what it may import, and imports nothing itself."""
    source = (PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring is not None
    assert "may import" in docstring
    assert len(ast.parse(source).body) == 1


def test_imports_are_seen() -> None:
    """The parser of sources finds known imports of each form."""
    assert {"command", "lookup.terms"} <= set(imports_of(PACKAGE / "core" / "chunk.pxd"))
    assert {"errors", "disk.format", "disk.files"} <= set(imports_of(PACKAGE / "generation" / "log.pyx"))
    assert {"core.engine", "types"} <= set(imports_of(PACKAGE / "machine.py"))
    python = "if TYPE_CHECKING:\n    import fastsm.machine\ndef f():\n    from fastsm.generation.log import Log\n"
    assert list(imports_in_python(ast.parse(python))) == [("fastsm.generation.log", ["Log"])]
    cython = (
        '"""from fastsm.no import n"""\ncimport fastsm.a\n'
        "from fastsm.b cimport (  # why\n    x, y as z,\n)\nfrom fastsm import c, d\n")
    assert list(imports_in_cython(cython)) == [
        ("fastsm.a", [""]), ("fastsm.b", ["x", "y"]), ("fastsm", ["c", "d"])]


# ---- an unbuilt checkout -----------------------------------------------------------------------------

@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """Provide a checkout in which nothing was compiled."""
    compiled = shutil.ignore_patterns("*.so", "*.c", "*.html", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "checkout" / "fastsm", ignore=compiled)
    (tmp_path / "checkout" / "tests").mkdir()
    shutil.copy(CHECKOUT / "tests" / "conftest.py", tmp_path / "checkout" / "tests" / "conftest.py")
    return tmp_path / "checkout"


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in a folder, with that folder on its path, as it is by default."""
    removed = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTEST_ADDOPTS")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_an_unbuilt_checkout_says_what_to_do(unbuilt: Path) -> None:
    """Importing an uncompiled package raises an ``ImportError`` that names the folder and says what to do."""
    if any(getattr(finder, "__module__", "").startswith("__editable__") for finder in sys.meta_path):
        pytest.skip("an editable install lends its compiled modules to any checkout")
    ran = run_python(unbuilt, "-c", "import fastsm")
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"{unbuilt / 'fastsm'} is not built" in last
    assert "pip install -e" in last
    assert "another folder" in last


def test_tests_in_an_unbuilt_checkout_take_the_installed_package(unbuilt: Path, tmp_path: Path) -> None:
    """The tests import the installed package, although `python -m pytest` puts the checkout first on the path."""
    (tmp_path / "elsewhere").mkdir()
    is_missing = "import importlib.util as u, sys; sys.exit(u.find_spec('fastsm') is None)"
    if run_python(tmp_path / "elsewhere", "-c", is_missing).returncode:
        pytest.skip("fastsm is not installed: it was found by the path alone")
    (unbuilt / "tests" / "test_which.py").write_text(
        "from pathlib import Path\n\n"
        "import support_of_tests\n\n"
        "import fastsm\n\n\n"
        "def test_which():\n"
        "    here = Path(__file__).resolve().parent\n"
        "    assert here.parent not in Path(fastsm.__file__).resolve().parents\n"
        "    assert Path(support_of_tests.__file__).resolve().parent == here\n\n\n"
        "def test_machine(machine_at, directory):\n"
        "    assert machine_at(directory).apply([(1, 1, fastsm.noop())]) == [True]\n")
    (unbuilt / "tests" / "support_of_tests.py").write_text("")
    options = ["--import-mode=importlib", "-p", "no:cacheprovider", "-q"]
    ran = run_python(unbuilt, "-m", "pytest", *options, "tests")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 passed" in ran.stdout
