from collections.abc import Callable

from typing_extensions import Self

class Sorting:
    def __new__(cls) -> Self: ...

class Pauses:
    def __new__(cls, tick: Callable[[], object] | None = None) -> Self: ...
    @property
    def away(self) -> bool: ...
