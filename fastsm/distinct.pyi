from typing_extensions import Self

class LastOfEqual:
    def __new__(cls, count: int) -> Self: ...
