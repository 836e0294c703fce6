"""The stubs of compiled modules have the docstrings that `help` shows."""

from __future__ import annotations

import pytest

from support import stubs


@pytest.mark.parametrize("module", stubs.MODULES)
def test_docstrings_of_a_stub_are_those_of_its_module(module: str) -> None:
    """Each public function and method has its docstring in the stub; `tests/support/stubs.py` copies them there."""
    source = stubs.stub_of(module).read_text(encoding="utf-8")
    assert stubs.with_docstrings(module, source) == source
