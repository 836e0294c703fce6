"""What the batteries have in common: a name, keys with it as their prefix, and how these are changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastsm.errors import NotRunningError
from fastsm.integrations.pysyncobj import operations
from fastsm.integrations.pysyncobj.applying import Denied
from fastsm.integrations.pysyncobj.node import ReplicatedStateMachine
from fastsm.integrations.pysyncobj.places import MARK
from fastsm.integrations.pysyncobj.replicated import StateInMachine

if TYPE_CHECKING:
    from fastsm.machine import FastStateMachine

Take = Callable[[Any], Any]


def nothing(_: Any) -> None:
    return None


class Battery(StateInMachine):
    """A consumer with a name, which is the prefix of its keys in the node's state machine."""

    def __init__(self, name: str | None, kind: str) -> None:
        super().__init__()
        name = kind if name is None else name
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError(f"expected a name that is not empty and has no zero bytes, found {name!r}")
        self.prefix = name.encode() + b"\0"

    def _node(self) -> ReplicatedStateMachine:
        node = self._syncObj
        if node is None:
            raise NotRunningError(
                f"this {type(self).__name__} is not a consumer of a running node: pass it to one in consumers=")
        if not isinstance(node, ReplicatedStateMachine):
            raise TypeError(f"expected a {type(self).__name__} in a ReplicatedStateMachine, found it in {node!r}")
        return node

    def _machine(self) -> FastStateMachine:
        return self._node().state_machine

    def _pairs(self) -> list[tuple[bytes, bytes]]:
        """Returns all pairs, with keys without the prefix, in byte order."""
        size = len(self.prefix)
        return [(key[size:], value) for key, value in self._machine().scan(prefix=self.prefix).entries]

    def _submit(self, command: bytes, options: dict[str, Any], take: Take = nothing) -> Any:
        """Submits a command; ``take`` converts its result for the caller."""
        return self._node()._fastsm_submit(command, MARK, take=take, **options)

    def _operate(
        self, function: Callable[..., Any], *arguments: bytes, options: dict[str, Any], take: Take = nothing
    ) -> Any:
        """Submits an operation; ``take`` converts its value for the caller."""

        def take_value(result: Any) -> Any:
            try:
                value = operations.value_of(result)
            except Exception as error:
                raise Denied(error) from error
            return take(value)

        return self._submit(operations.encode(function, *arguments), options, take_value)


def same(result: Any) -> Any:
    return result
