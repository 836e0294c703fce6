from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from typing_extensions import Self

from fastsm.core.state import State
from fastsm.core.turns import Turns
from fastsm.core.watchers import Waiting, Watchers
from fastsm.generation.changes import Changes, Source

class StateSource(Source):
    def __new__(cls, state: State, durable: bool) -> Self: ...
    @property
    def durable(self) -> bool: ...
    def wait(
        self, watch: Changes, turns: Turns | None, queue: SimpleQueue[Any] | None, owner: Any
    ) -> Waiting | None: ...

def serve(watchers: Watchers, tell_all: Callable[[list[Waiting]], object]) -> None: ...
