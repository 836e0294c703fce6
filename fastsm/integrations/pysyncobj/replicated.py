"""State besides the state machine's: consumers and attributes that replicated methods change.

An entry of PySyncObj names a replicated method by a number: its place among all methods of the node and its consumers,
sorted by version, consumer and name. So snapshots record consumers and methods, and a release in which the numbers mean
something else is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any, NamedTuple

from pysyncobj import SyncObj, SyncObjConsumer

from fastsm.integrations.pysyncobj.codecs import Codec
from fastsm.integrations.pysyncobj.errors import ConsumersChangedError
from fastsm.integrations.pysyncobj.ticking import Timer
from fastsm.machine import FastStateMachine


def replicates(owner: type[Any]) -> bool:
    """Returns whether a subclass of ``SyncObj`` has replicated methods of its own."""
    own = set(dir(owner)) - set(dir(SyncObj))
    return any(getattr(getattr(owner, name, None), "replicated", False) for name in own)


class StateInMachine(SyncObjConsumer):  # type: ignore[misc]  # PySyncObj has no types
    """A consumer whose state is entirely in the node's state machine; no entry names its methods."""

    prefix = b""  # of its keys
    codec: Codec | None = None  # for items that are compared while entries are applied
    ordered = False  # whether entries need the order of the keys, which should not be built during a tick
    timed = False  # whether it has a `timer`

    def _serialize(self) -> None:
        return None

    def _deserialize(self, data: object) -> None:
        """Does nothing: the state is in the state machine."""

    def timer(self, machine: FastStateMachine) -> Timer:
        """Returns an object from which the leader requests entries to propose."""
        raise NotImplementedError


def distinct(consumers: Iterable[Any]) -> dict[bytes, StateInMachine]:
    """Returns consumers with state in the machine, by key prefix; ``ValueError`` if two have the same prefix."""
    found: dict[bytes, StateInMachine] = {}
    for consumer in consumers:
        if isinstance(consumer, StateInMachine):
            if consumer.prefix in found:
                raise ValueError(
                    f"two batteries have the name {consumer.prefix[:-1].decode()!r}, and would share their keys; "
                    "give each its own: name=")
            found[consumer.prefix] = consumer
    return found


def consumers_of(consumers: Iterable[Any]) -> list[Any]:
    """Returns the consumers; for an object that has a consumer, such as a ``ReplLockManager``, that consumer."""
    found = []
    for consumer in consumers:
        if not isinstance(consumer, SyncObjConsumer) and getattr(consumer, "_consumer", None):
            consumer = consumer._consumer()  # noqa: PLW2901  # PySyncObj does the same with what it is given
        found.append(consumer)
    return found


class MethodTable(NamedTuple):
    """The consumers' classes, and the replicated methods in the order of their numbers."""

    consumers: list[str]
    methods: list[str]

    def require(self, content: dict[str, Any], path: str) -> None:
        """Raises ``ConsumersChangedError`` unless everything in a snapshot's table has the same number here."""
        found = [name for name, _ in content["consumers"]]
        if self.consumers[: len(found)] == found and self.methods[: len(content["methods"])] == content["methods"]:
            return
        raise ConsumersChangedError(
            f"{path}: expected the consumers of the snapshot, {found}, with the replicated methods "
            f"{content['methods']}, found {self.consumers} with {self.methods}. The entries name methods by these "
            "numbers: keep each consumer in its place, and each method, even unused ones; add a consumer at the end; "
            "mark an added method with @replicated(ver=N), above all versions so far, and call setCodeVersion(N) once "
            "all nodes run the release"
        )


def method_table(node: type[Any], consumers: list[Any]) -> MethodTable:
    """Returns a node's table, numbered as by PySyncObj."""
    found = []
    consumers = [each for each in consumers if not isinstance(each, StateInMachine)]
    for number, owner in enumerate([node, *consumers]):
        for name in dir(owner):
            method = getattr(owner, name, None)
            if callable(method) and getattr(method, "replicated", False) and name != method.origName:
                found.append((method.ver, number, name))
    methods = [f"{number}.{name}" for _, number, name in sorted(found)]
    return MethodTable([type(each).__qualname__ for each in consumers], methods)


def require_picklable(consumers: Iterable[Any]) -> None:
    """Raises ``TypeError`` if a consumer can never be in a snapshot. Skips those with their own serialization."""
    for consumer in consumers:
        if getattr(type(consumer), "_serialize", None) is SyncObjConsumer._serialize:
            wrong = unpicklable(consumer._serialize())
            if wrong:
                raise TypeError(
                    f"what a {type(consumer).__name__} sets after super().__init__() is replicated state and part of "
                    f"snapshots; expected objects that can be pickled, found {', '.join(wrong)}; set what belongs to "
                    "this node alone before super().__init__()")


def unpicklable(attributes: dict[str, Any]) -> list[str]:
    """Returns the attributes that cannot be in a snapshot, each with the reason."""
    found = []
    for name, value in attributes.items():
        try:
            pickle.dumps(value, 4)
        except Exception as error:
            found.append(f"{name} ({error})")
    return found
