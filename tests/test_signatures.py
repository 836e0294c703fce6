"""Signatures: `inspect.signature`, `help` and editors show how the public names can be called."""

from __future__ import annotations

import inspect
import pydoc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastsm

POSITIONAL_ONLY = inspect.Parameter.POSITIONAL_ONLY
BUILTIN = (object, BaseException, Exception, ValueError, OSError, RuntimeError, tuple)


def public_callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield every public function and class, and every public method that fastsm itself defines."""
    for name in fastsm.__all__:
        value = getattr(fastsm, name)
        if not callable(value):
            continue
        yield name, value
        if isinstance(value, type):
            for method in dir(value):
                home = next(cls for cls in value.__mro__ if method in vars(cls))
                found = getattr(value, method)
                if not method.startswith("_") and home not in BUILTIN and callable(found):
                    yield f"{name}.{method}", found


CALLABLES = dict(public_callables())
COMPILED = {
    name: value for name, value in CALLABLES.items() if not inspect.isclass(value) and not inspect.isfunction(value)
    and not inspect.ismethod(value) and "_make" not in name and "_replace" not in name
}  # fmt: skip


@pytest.mark.parametrize("name", CALLABLES)
def test_every_public_name_has_a_signature_without_private_parameters(name: str) -> None:
    """`inspect.signature` works, and shows no parameter that only fastsm's own tests use."""
    signature = inspect.signature(CALLABLES[name])
    assert not [parameter for parameter in signature.parameters if parameter.startswith("_")]


@pytest.mark.parametrize("name", CALLABLES)
def test_help_says_what_a_name_is_for(name: str) -> None:
    """`help` shows a docstring that is a sentence, and the signature once, before it."""
    text = inspect.getdoc(CALLABLES[name])
    assert text
    assert text[0].isupper() or text.startswith((":", "`")), text
    assert not re.match(r"[\w.]+\(.*\) *(->|$)", text.splitlines()[0]), text
    shown = pydoc.plain(pydoc.render_doc(CALLABLES[name]))
    assert "(...)" not in shown.splitlines()[2]


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_call_takes_its_arguments_as_its_signature_says(
    name: str, directory: Path, machine_at: Callable[..., fastsm.FastStateMachine], request: pytest.FixtureRequest
) -> None:
    """A parameter that the signature calls positional only is refused as a keyword; every other one is taken."""
    owner, _, method = name.rpartition(".")
    function = COMPILED[name]
    if owner in ("FastStateMachine", "Reader"):
        machine = machine_at(directory)
        function = getattr(fastsm.Reader(directory) if owner == "Reader" else machine, method)
    if owner == "RaftLog":
        log = fastsm.RaftLog(directory)
        request.addfinalizer(log.close)
        function = getattr(log, method)
    for parameter in inspect.signature(function).parameters.values():
        said = ""
        try:
            function(**{parameter.name: object()})
        except Exception as error:  # its class depends on the other missing arguments
            said = str(error)
        refused = "takes no keyword arguments" in said or f"unexpected keyword argument '{parameter.name}'" in said
        assert refused == (parameter.kind is POSITIONAL_ONLY), f"{name}({parameter}): {said}"


def shape(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Return the name and the kind of each parameter, except `self`."""
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values() if p.name != "self"]


@pytest.mark.parametrize("machine", [fastsm.FastStateMachine, fastsm.MemoryStateMachine])
@pytest.mark.parametrize("name", sorted(fastsm.StateMachine.__abstractmethods__))
def test_both_implementations_are_called_as_the_trait_says(name: str, machine: type[fastsm.StateMachine]) -> None:
    """Parameters of trait, implementation and model have the same names and kinds; optional ones may come after."""
    trait, own = shape(getattr(fastsm.StateMachine, name)), shape(getattr(machine, name))
    assert own[: len(trait)] == trait
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind in own[len(trait) :])
