"""Docstrings as they are in the source, made ready for Markdown; those of compiled methods come from the module itself."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from typing import Any

from griffe import Docstring, Extension, Object, Parameters


class Docstrings(Extension):
    """Fills in docstrings that only the compiled modules have, and turns roles and examples into Markdown."""

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        """Once everything was read, stubs included."""
        self._visit(pkg, set())

    def _visit(self, item: Object, seen: set[str]) -> None:
        if item.is_alias or item.path in seen:
            return
        seen.add(item.path)
        text = item.docstring.value if item.docstring else compiled_docstring(item)
        if item.is_function:  # what is for tests alone is no part of the interface
            item.parameters = Parameters(*(p for p in item.parameters if not re.match("_[^_]", p.name)))
        if text.startswith("Initialize self."):
            item.docstring = None
        elif text:
            item.docstring = Docstring(markdown(text), parent=item)
        for member in list(item.members.values()):
            self._visit(member, seen)


def compiled_docstring(item: Object) -> str:
    """The docstring of a compiled function, without the signature that Cython puts before it."""
    try:
        found: Any = importlib.import_module(item.module.path)
        for name in item.path.removeprefix(item.module.path).strip(".").split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return ""
    if not (item.is_function or item.is_class or item.is_attribute) or isinstance(found, (int, str, bytes)):
        return ""
    text = inspect.getdoc(found) or ""
    first, _, rest = text.partition("\n")
    name = item.name
    return textwrap.dedent(rest).strip() if re.match(rf"(\w+\.)?{name}\(", first) else text


def markdown(text: str) -> str:
    """Roles become code, double quotes of it single ones, and examples blocks of Python."""
    text = re.sub(r":(?:meth|class|func|mod):`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return re.sub(r"(?ms)^>>> .*?(?=\n\n|\Z)", lambda match: f"```pycon\n{match[0]}\n```", text)
