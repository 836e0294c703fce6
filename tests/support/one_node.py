"""PySyncObj nodes that a test ticks itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pysyncobj import SyncObjConf

from fastsm.integrations.pysyncobj import ReplicatedStateMachine
from support.cluster import free_ports

MakeNode = Callable[..., Any]


@contextmanager
def nodes_at(tmp_path: Path) -> Iterator[MakeNode]:
    """Provide a function that makes nodes, by default clusters of one, that the test ticks; end them afterwards."""
    nodes: list[ReplicatedStateMachine] = []

    def make(
        node: type[ReplicatedStateMachine] = ReplicatedStateMachine, *, partners: tuple[str, ...] = (),
        name: str = "node", conf: dict[str, Any] | None = None, **options: Any,
    ) -> ReplicatedStateMachine:
        address = f"127.0.0.1:{free_ports(1)[0]}"
        configuration = SyncObjConf(**{
            "bindAddress": address, "appendEntriesUseBatch": False, "autoTick": False, "raftMinTimeout": 0.02,
            "raftMaxTimeout": 0.03, "appendEntriesPeriod": 0.005, **(conf or {}),
        })  # fmt: skip
        directory = options.pop("directory", tmp_path / name)
        nodes.append(node(address, partners, directory, conf=configuration, **options))
        return nodes[-1]

    try:
        yield make
    finally:
        for node in nodes:
            node.destroy()
        for node in nodes:
            if node.tick_thread_alive():
                node._SyncObj__thread.join()


def ticks(node: ReplicatedStateMachine, condition: Callable[[], object]) -> None:
    """Tick a node until the condition holds."""
    for _ in range(5000):
        if condition():
            return
        node.doTick(0.002)
    raise AssertionError(f"the condition never held: {node.failure!r}")


class Answers(list[Any]):
    """A callback that collects its arguments."""

    def __call__(self, result: Any, reason: Any) -> None:
        self.append((result, reason))


def answer(node: ReplicatedStateMachine, call: Callable[..., object], *arguments: Any) -> Any:
    """Make a call, and return the arguments that its callback is given."""
    answers = Answers()
    call(*arguments, callback=answers)
    ticks(node, lambda: answers)
    return answers[0]


def threading_call(call: Callable[[], object]) -> None:
    """Call a function in another thread, and raise the error that it raised there."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
