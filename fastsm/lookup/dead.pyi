from typing_extensions import Self

class DeadMap:
    def __new__(cls) -> Self: ...
