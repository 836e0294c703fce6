"""Makes docstrings ready for Markdown, and gives compiled functions the signatures of their stubs."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Joins what stubs and compiled modules say, and turns roles and examples into Markdown."""

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        """Prepares everything once the package was read."""
        self._visit(pkg, set())
        inherit_docstrings(pkg["MemoryStateMachine"], pkg["StateMachine"])
        require_docstrings(pkg)

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


def inherit_docstrings(implementation: Any, trait: Any) -> None:
    """Gives the methods of an implementation that say nothing the docstrings of the trait, as `help` does."""
    for name, method in implementation.members.items():
        if not method.has_docstring and name in trait.members and trait.members[name].has_docstring:
            method.docstring = griffe.Docstring(trait.members[name].docstring.value, parent=method)


def require_docstrings(pkg: Any) -> None:
    """Ends the build where a public name, or a public member of a public class, was not found or says nothing."""
    silent = []
    for name in pkg.exports:
        item = pkg.members[name]
        members = item.all_members.values() if item.is_class else ()
        silent += [
            found.path for found in (item, *members)
            if not found.name.startswith("_") and (found.is_class or found.is_function) and not found.has_docstring
        ]  # fmt: skip
    machine = pkg["FastStateMachine"].all_members
    if silent or not {"apply", "get", "write_snapshot", "len"} <= machine.keys():
        raise RuntimeError(f"the reference is not complete: is the package built? Without a docstring: {silent}")


def take_signature(function: Any) -> None:
    """Gives a compiled function the parameters of its stub, without those that are for tests only."""
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
    for parameter in function.parameters:
        if parameter.name == "mode" and parameter.default is not None:
            parameter.default = oct(int(str(parameter.default), 0))  # permissions are not read in decimal


@cache
def stub_of(module: str) -> Any:
    path = Path(*module.split(".")).with_suffix(".pyi")
    return griffe.visit(module, path, path.read_text(encoding="utf-8")) if path.exists() else None


def docstring_of(item: griffe.Object) -> str:
    """Returns what fastsm says of an item, without what Python says of every object of its class."""
    text = inspect.cleandoc(item.docstring.value) if item.docstring else ""
    if text.startswith("Initialize self.") or (item.is_attribute and text.startswith("int([x])")):
        return ""
    return text


def markdown(text: str) -> str:
    """Turns roles and double backquotes into code, and examples into blocks of Python."""
    text = re.sub(r":(?:meth|class|func|mod):`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return re.sub(r"(?ms)^>>> .*?(?=\n\n|\Z)", lambda match: f"```pycon\n{match[0]}\n```", text)
