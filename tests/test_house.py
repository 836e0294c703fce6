"""Rules for the tests themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

# Private names of the standard library. Tests of PySyncObj are left out: its names begin with an underscore.
FOREIGN = {"_asdict", "_clear_type_cache", "_exit", "_fut_waiter", "_library", "_make", "_replace"}
FILES = sorted(path for path in TESTS.rglob("test_*.py") if path.parent.name != "integrations")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_private_names_are_reached_through_one_module(path: Path) -> None:
    """Tests use private names only through `support/inside.py`, so that a renamed one is changed in one place."""
    found = [
        f"line {node.lineno}: {ast.unparse(node)}" for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        and node.attr not in FOREIGN and ast.unparse(node.value) not in ("self", "cls", "super()")
        and not ast.unparse(node.value)[0].isupper()
    ]  # fmt: skip
    assert not found
