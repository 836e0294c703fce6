"""Docstrings as they are in the source, made ready for Markdown; compiled modules get the signatures of their stubs."""

from __future__ import annotations

import inspect
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Joins what stubs and compiled modules say, and turns roles and examples into Markdown."""

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        """Once everything was read."""
        self._visit(pkg, set())

    def _visit(self, item: griffe.Object, seen: set[str]) -> None:
        if item.is_alias or item.path in seen:
            return
        seen.add(item.path)
        item.labels.discard("method descriptor")
        item.labels.discard("builtin")
        if item.is_function:
            take_signature(item)
        text = docstring_of(item)
        item.docstring = griffe.Docstring(markdown(text), parent=item) if text else None
        for member in list(item.members.values()):
            self._visit(member, seen)


def take_signature(function: Any) -> None:
    """The parameters that the stub has, for a compiled function; without those that are for tests alone."""
    stub = stub_of(function.module.path)
    if stub is not None:
        found = stub
        for name in function.path.removeprefix(function.module.path).strip(".").split("."):
            found = found.members.get(name)
            if found is None:
                return
        function.parameters = found.parameters
        function.returns = found.returns
    function.parameters = griffe.Parameters(*(p for p in function.parameters if not re.match("_[^_]", p.name)))


@cache
def stub_of(module: str) -> Any:
    path = Path(*module.split(".")).with_suffix(".pyi")
    return griffe.visit(module, path, path.read_text(encoding="utf-8")) if path.exists() else None


def docstring_of(item: griffe.Object) -> str:
    """Without the signature that Cython puts before it, and without what Python says of every object of a class."""
    text = inspect.cleandoc(item.docstring.value) if item.docstring else ""
    if text.startswith("Initialize self.") or (item.is_attribute and text.startswith("int([x])")):
        return ""
    first, _, rest = text.partition("\n")
    return textwrap.dedent(rest).strip() if re.match(rf"(\w+\.)?{item.name}\(", first) else text


def markdown(text: str) -> str:
    """Roles become code, double quotes of it single ones, and examples blocks of Python."""
    text = re.sub(r":(?:meth|class|func|mod):`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return re.sub(r"(?ms)^>>> .*?(?=\n\n|\Z)", lambda match: f"```pycon\n{match[0]}\n```", text)
