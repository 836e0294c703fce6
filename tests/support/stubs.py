"""Docstrings in the stubs of compiled modules, for editors, which do not import the modules.

``python tests/support/stubs.py`` copies them from the compiled modules; a test fails where they differ.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import fastsm

PACKAGE = Path(fastsm.__file__).resolve().parent


def stub_of(module: str) -> Path:
    """Return the path of a module's stub."""
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".pyi")


def compiled_bases() -> list[type]:
    """Return the compiled classes that the public ones are made of."""
    public = [getattr(fastsm, name) for name in fastsm.__all__]
    bases = {base for each in public if isinstance(each, type) for base in each.__mro__}
    return [
        base
        for base in bases
        if base.__module__.startswith("fastsm.") and stub_of(base.__module__.removeprefix("fastsm.")).exists()
    ]


CLASSES = {base.__name__ for base in compiled_bases()}
MODULES = sorted({"command", "columns", *(base.__module__.removeprefix("fastsm.") for base in compiled_bases())})


def quoted(text: str, indent: str) -> list[str]:
    """Return a docstring as lines of source."""
    start = 'r"""' if "\\" in text else '"""'
    end = '\n"""' if "\n" in text else '"""'
    return [f"{indent}{line}".rstrip() for line in f"{start}{text}{end}".splitlines()]


def with_docstrings(module: str, source: str) -> str:
    """Return a stub's source with the docstrings that public functions and methods have in the compiled module."""
    compiled = importlib.import_module(f"fastsm.{module}")
    lines = source.splitlines()
    functions: list[tuple[ast.FunctionDef, object]] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            functions.append((node, getattr(compiled, node.name)))
        elif isinstance(node, ast.ClassDef) and node.name in CLASSES:
            owner = getattr(compiled, node.name)
            functions += [(f, getattr(owner, f.name)) for f in node.body if isinstance(f, ast.FunctionDef)]
    for node, found in reversed(functions):
        text = None if node.name.startswith("_") else inspect.getdoc(found)
        if text is None:
            continue
        first, last = node.body[0], node.body[-1]
        indent = " " * (node.col_offset + 4)
        head = lines[: first.lineno - 1]
        if isinstance(first.value, ast.Constant) and first.value.value is ... and first.lineno == node.end_lineno:
            before = lines[first.lineno - 1][: first.col_offset].rstrip()
            head += [before] if before else []
        lines = [*head, *quoted(text, indent), *lines[(last.end_lineno or last.lineno) :]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite the stubs that differ, and print their names."""
    for module in MODULES:
        path = stub_of(module)
        before = path.read_text(encoding="utf-8")
        after = with_docstrings(module, before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path.relative_to(PACKAGE.parent)}: docstrings renewed")


if __name__ == "__main__":
    main()
